"""``torchsurgeon simulate``: how many inferences servers sustain when devices cut the model."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import command, number, positive, seconds, whole_number
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.files import check_given
from torchsurgeon.cli.screen import console, loading, progress
from torchsurgeon.errors import SimulationError

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands


def add_simulate(commands: Commands) -> None:
    """Declare ``torchsurgeon simulate``."""
    parser = command(
        commands,
        _simulate,
        "simulate",
        "Find how long queries take at a number of servers, and the highest rate of inferences that they sustain.",
        "frontier.json --link lte --servers 8 --rate 500",
        "frontier.json --link 3g --servers 16 --limit 0.25 --percentile 99.9",
    )
    where = parser.add_argument(
        "frontier",
        type=Path,
        metavar="FRONTIER",
        help="the cuts of a model, as torchsurgeon plan --frontier writes them",
    )
    completed(where, one_of((), "json"))
    parser.add_argument(
        "--servers", type=whole_number(1), required=True, metavar="N", help="how many servers there are, with one queue"
    )
    parser.add_argument(
        "--rate",
        type=number,
        metavar="R",
        help="inferences per second of all devices (default: no times are simulated)",
    )
    parser.add_argument(
        "--limit",
        type=seconds,
        metavar="SECONDS",
        help="the longest time at the servers allowed to the percentile (default: no highest rate is searched)",
    )
    parser.add_argument(
        "--percentile", type=number, default=99.0, metavar="P", help="which percentile (default: %(default)s)"
    )
    link = parser.add_argument(
        "--link",
        default="lte",
        help=f"{', '.join(completion.LINKS)}, or UP/DOWN/RTT in Mbit/s and seconds (default: %(default)s)",
    )
    completed(link, one_of(completion.LINKS))
    parser.add_argument(
        "--slowdown",
        type=positive,
        default=1.0,
        metavar="S",
        help="the devices take S times as long as the frontier says (default: %(default)s)",
    )
    for option, what in (("arrivals", "gaps between inferences"), ("service", "service times")):
        shape = parser.add_argument(
            f"--{option}",
            default=f"web-search-{option}",
            metavar="SHAPE",
            help=f"how {what} spread: {', '.join(completion.SHAPES)} (default: %(default)s)",
        )
        completed(shape, one_of(completion.SHAPES))


def _simulate(options: argparse.Namespace) -> None:
    if options.rate is None and options.limit is None:
        raise SimulationError(
            "there is nothing to simulate: give --rate for the times at a rate, --limit for the highest rate, or both"
        )
    check_given(options.frontier)
    with loading():
        from torchsurgeon.link import Link
        from torchsurgeon.planning import Frontier
        from torchsurgeon.report import simulation_table
        from torchsurgeon.simulate import Shape, sustained

    frontier, link = Frontier.load(options.frontier), Link.parse(options.link)
    arrivals, service = Shape.named(options.arrivals), Shape.named(options.service)
    # For both ways: one simulation of the rate, and about a dozen to find the highest one.
    total = 2 * (options.rate is not None) + 24 * (options.limit is not None)
    steps = itertools.count(1)
    with progress("simulating") as advance:
        ways = sustained(
            frontier,
            link,
            options.servers,
            rate_per_s=options.rate,
            limit_s=options.limit,
            percentile=options.percentile,
            slowdown=options.slowdown,
            arrivals=arrivals,
            service=service,
            progress=lambda: advance(min(next(steps), total), total),
        )
    console().print(simulation_table(ways, options.percentile))
