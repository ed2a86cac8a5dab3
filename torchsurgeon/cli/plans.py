"""``torchsurgeon plan`` and ``sweep``: where to cut for a link, a load and an objective."""

from __future__ import annotations

import argparse
import dataclasses
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchsurgeon.cli.arguments import model_arguments, pairs, traced
from torchsurgeon.cli.screen import console, warn
from torchsurgeon.codec import CodecTable
from torchsurgeon.errors import PredictionWarning, TorchSurgeonError
from torchsurgeon.link import Link
from torchsurgeon.planning import Frontier, plan, sweep
from torchsurgeon.prediction import costs_on

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands


def add_plan(commands: Commands) -> None:
    """Declare ``torchsurgeon plan``."""
    parser = commands.add_parser("plan", help="find the best cut and codec for a link and an objective, and say why")
    _plan_arguments(parser)
    parser.add_argument("--load", type=float, default=1.0, metavar="K", help="the server takes K times its profile")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="at most")
    parser.add_argument("--energy", type=float, metavar="JOULES", help="of the device, at most")
    parser.add_argument("--memory", type=float, metavar="MB", help="of the head's weights and tensors, at most")
    parser.add_argument("--min-layers", type=int, default=0, metavar="N", help="run on the device at least")
    parser.add_argument("--no-raw-input", action="store_true", help="let no input of the model leave the device")
    parser.add_argument("--no-server", action="store_true", help="let nothing leave the device")
    parser.add_argument("--frontier", type=Path, metavar="FILE", help="write the rows that can win as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what each cut costs, e.g. plan.png")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page on which link and load can be moved")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from torchsurgeon import report

    parts, objective = _planned(options)
    found = plan(
        **parts,
        objective=objective,
        load=options.load,
        slowdown=options.slowdown,
        latency_s=options.latency,
        energy_j=options.energy,
        memory_bytes=None if options.memory is None else options.memory * 1e6,
        min_layers=options.min_layers,
        raw_input=not options.no_raw_input,
        server_allowed=not options.no_server,
    )
    screen = console()
    screen.print(report.plan_table(found))
    screen.print(found.explain(), highlight=False, markup=False, soft_wrap=True)
    if options.frontier is not None:
        found.frontier.save(options.frontier)
    if options.plot is not None:
        report.plan_picture(parts["graph"], found, options.plot)
    if options.html is not None:
        report.explorer(parts["graph"], found, options.html)


def add_sweep(commands: Commands) -> None:
    """Declare ``torchsurgeon sweep``."""
    parser = commands.add_parser("sweep", help="the best cut and its gain over a grid of uplink rates and server loads")
    _plan_arguments(parser)
    parser.add_argument("--uplinks", default="0.1:1000:41", metavar="FROM:TO:N", help="Mbit/s, N rates between")
    parser.add_argument("--loads", default="0.1:100:31", metavar="FROM:TO:N", help="times the server's profile")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each pair")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw heat maps, e.g. sweep.png")
    parser.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace) -> None:
    from torchsurgeon.report import sweep_picture, sweep_table

    parts, objective = _planned(options)
    link = parts.pop("link")
    rates, loads = (
        [scale * value for value in _spread(text)] for text, scale in ((options.uplinks, 1e6), (options.loads, 1))
    )
    found = sweep(Frontier.build(**parts), link, rates, loads, objective, options.slowdown)
    console().print(sweep_table(found))
    if options.csv is not None:
        found.save(options.csv)
    if options.plot is not None:
        sweep_picture(found, options.plot)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    what = "a measured profile, or the calibration or name of a device to predict for"
    parser.add_argument("--device", required=True, metavar="FILE", help=f"the device: {what}")
    parser.add_argument("--server", required=True, metavar="FILE", help="the server: as the device")
    parser.add_argument(
        "--link", default="lte", help="3g, lte, wifi, lte-2021, 5g-low, 5g-mmwave, or UP/DOWN/RTT (Mbit/s, s)"
    )
    parser.add_argument("--uplink", type=float, metavar="MBIT_S", help="in place of the link's own rate")
    parser.add_argument(
        "--objective",
        default="latency",
        help="latency, energy, throughput, server_time, or a sum of these with weights, e.g. latency=1,energy=0.5",
    )
    parser.add_argument("--codecs", type=Path, metavar="FILE", help="codecs measured by torchsurgeon codecs --out")
    parser.add_argument("--slowdown", type=float, default=1.0, metavar="S", help="the device takes S times its profile")


def _planned(options: argparse.Namespace) -> tuple[dict[str, Any], str | dict[str, float]]:
    """What a plan is made of, and its objective; says where costs are guesses."""
    graph = traced(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PredictionWarning)
        device, server = costs_on(graph, options.device), costs_on(graph, options.server)
    notes = list(dict.fromkeys(str(warning.message) for warning in caught))
    notes += [
        f"{name}: a bound from data sheets, not a measured device; real times are longer"
        for name, costs in dict(zip((options.device, options.server), (device, server), strict=True)).items()
        if costs.provenance.get("predicted") and costs.interval_s is None
    ]
    for note in notes:
        warn(note)
    link = Link.parse(options.link)
    if options.uplink is not None:
        link = dataclasses.replace(link, uplink_bit_s=options.uplink * 1e6)
    parts = {
        "graph": graph,
        "device": device,
        "server": server,
        "link": link,
        "codecs": None if options.codecs is None else CodecTable.load(options.codecs),
    }
    if "=" not in options.objective:
        return parts, str(options.objective)
    weights = {name: _number(text) for name, text in pairs(options.objective.split(",")).items()}
    return parts, weights


def _spread(text: str) -> list[float]:
    """The values that FROM:TO:N means, evenly spread in their logarithm."""
    parts = [_number(part) for part in text.split(":")]
    if len(parts) != 3 or not 0 < parts[0] < parts[1] < math.inf or not 2 <= parts[2] <= 1000:
        raise TorchSurgeonError(f"{text!r} is not FROM:TO:N with 0 < FROM < TO and 2 to 1000 values")
    count = int(parts[2])
    return [parts[0] * (parts[1] / parts[0]) ** (i / (count - 1)) for i in range(count)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TorchSurgeonError(f"{text!r} is not a number") from None
