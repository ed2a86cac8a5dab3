"""``torchsurgeon plan`` and ``sweep``: where to cut for a link, a load and an objective."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import warnings
from typing import TYPE_CHECKING, Any

from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import (
    check_files,
    command,
    file_argument,
    model_arguments,
    number,
    pairs,
    positive,
    seconds,
    traced,
    whole_number,
)
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.files import check_costs, check_given, check_model
from torchsurgeon.cli.limits import idle_latency, limits_of, unkept
from torchsurgeon.cli.screen import console, loading, warn
from torchsurgeon.errors import InfeasibleError, PlanError, PredictionWarning, TorchSurgeonError, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands
    from torchsurgeon.planning import Objective
    from torchsurgeon.profiling import LayerProfile

_WEIGHTS = "--objective must be a name or weights by name, such as latency=1,energy=0.5"


def add_plan(commands: Commands) -> None:
    """Declare ``torchsurgeon plan``."""
    parser = command(
        commands,
        _plan,
        "plan",
        "Find the best cut and codec for a link and an objective, and say why.",
        "torchvision:resnet50 --device jetson.json --server k40-gpu --link lte",
        "torchvision:resnet50 --device jetson.json --server k40-gpu --objective energy --html plan.html",
    )
    _plan_arguments(parser)
    parser.add_argument(
        "--uplink", type=positive, metavar="MBIT_S", help="uplink rate in Mbit/s (default: the link's own)"
    )
    parser.add_argument(
        "--load",
        type=positive,
        default=1.0,
        metavar="K",
        help="the server takes K times as long as its profile says (default: %(default)s)",
    )
    parser.add_argument(
        "--latency",
        type=seconds,
        metavar="SECONDS",
        help="highest latency allowed, such as 0.2 or 200ms (default: any)",
    )
    parser.add_argument(
        "--energy", type=number, metavar="JOULES", help="highest energy of the device allowed (default: any)"
    )
    parser.add_argument(
        "--memory",
        type=number,
        metavar="MB",
        help="most memory allowed on the device, for the head's weights and tensors (default: any)",
    )
    parser.add_argument(
        "--min-layers",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="fewest layers that run on the device (default: %(default)s)",
    )
    parser.add_argument(
        "--no-raw-input",
        action="store_true",
        help="no input of the model may leave the device (default: it may)",
    )
    parser.add_argument(
        "--no-server", action="store_true", help="nothing may leave the device (default: what is cut may)"
    )
    file_argument(parser, "--frontier", "write the cuts that can win for some link and load as JSON")
    file_argument(parser, "--plot", "draw what each cut costs, for example in plan.png", "not drawn")
    file_argument(parser, "--html", "write a page with sliders for link, load and objective")


def _plan(options: argparse.Namespace) -> None:
    check_files(options.frontier, options.plot, options.html)
    _check_read(options)
    with loading():
        from torchsurgeon import report
        from torchsurgeon.planning import Constraints, plan

    limits = limits_of(options)
    Constraints(**limits)  # which refuses a wrong one before the model is loaded
    parts, objective, notes = _planned(options, options.uplink, energy=options.energy is not None)
    try:
        found = plan(
            **parts,
            objective=objective,
            load=options.load,
            slowdown=options.slowdown,
            **limits,
            allow_bounds=options.allow_bounds,
        )
    except InfeasibleError as error:
        raise InfeasibleError(unkept(limits, error.least), error.least) from None
    idle = idle_latency(found)
    for note in notes if idle is None else [*notes, idle]:
        warn(note)
    screen = console()
    screen.print(report.plan_table(found))
    screen.print(report.plan_explanation(found), highlight=False)
    if options.frontier is not None:
        found.frontier.save(options.frontier)
    if options.plot is not None:
        report.plan_picture(parts["graph"], found, options.plot)
    if options.html is not None:
        report.explorer(parts["graph"], found, options.html)


def add_sweep(commands: Commands) -> None:
    """Declare ``torchsurgeon sweep``."""
    parser = command(
        commands,
        _sweep,
        "sweep",
        "Find the best cut, and what it gains, over a grid of uplink rates and server loads.",
        "torchvision:resnet50 --device jetson.json --server k40-gpu --plot sweep.png",
        "torchvision:resnet50 --device jetson.json --server k40-gpu --uplinks 1:100:21 --csv sweep.csv",
    )
    _plan_arguments(parser)
    parser.add_argument(
        "--uplinks",
        default="0.1:1000:41",
        metavar="FROM:TO:N",
        help="N uplink rates in Mbit/s, evenly spread on a logarithmic scale (default: %(default)s)",
    )
    parser.add_argument(
        "--loads",
        default="0.1:100:31",
        metavar="FROM:TO:N",
        help="N loads: the server takes so many times as long as its profile says (default: %(default)s)",
    )
    file_argument(parser, "--csv", "write a line for each pair of rate and load")
    file_argument(parser, "--plot", "draw heat maps, for example in sweep.png", "not drawn")


def _sweep(options: argparse.Namespace) -> None:
    check_files(options.csv, options.plot)
    _check_read(options)
    rates = [1e6 * rate for rate in _spread(options.uplinks)]
    loads = _spread(options.loads)
    with loading():
        from torchsurgeon.planning import Frontier, sweep
        from torchsurgeon.planning.sides import with_joules
        from torchsurgeon.report import sweep_picture, sweep_table

    parts, objective, notes = _planned(options)
    link = parts.pop("link")
    if objective.energy:
        parts["device"] = with_joules(parts["device"])
    found = sweep(Frontier.build(**parts), link, rates, loads, objective, options.slowdown)
    for note in notes:
        warn(note)
    console().print(sweep_table(found))
    if options.csv is not None:
        found.save(options.csv)
    if options.plot is not None:
        sweep_picture(found, options.plot)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    for side in ("device", "server"):
        where = parser.add_argument(
            f"--{side}",
            required=True,
            action="append",
            metavar="FILE",
            help=f"the {side}: a measured profile of this model, the calibration of a device to predict for, or "
            f"{completion.marked_devices()}; given again, the same by another backend, which is chosen with the cut",
        )
        completed(where, one_of(completion.REFERENCE_DEVICES, "json"))
    link = parser.add_argument(
        "--link",
        default="lte",
        help=f"{', '.join(completion.LINKS)}, or UP/DOWN/RTT in Mbit/s and seconds (default: %(default)s)",
    )
    completed(link, one_of(completion.LINKS))
    objective = parser.add_argument(
        "--objective",
        default="latency",
        help="what is made small: latency, energy, throughput, server_time, or a weighted sum such as "
        "latency=1,energy=0.5 (default: %(default)s)",
    )
    completed(objective, one_of(("latency", "energy", "throughput", "server_time")))
    file_argument(parser, "--codecs", "codecs measured by torchsurgeon codecs --out", "only raw tensors are sent")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="name each layer whose time is predicted roughly, and say why (default: count them)",
    )
    parser.add_argument(
        "--allow-bounds",
        action="store_true",
        help="plan with a device of which only the data sheet is known, although real times are longer by factors that "
        "differ from layer to layer (default: such a device is refused)",
    )
    parser.add_argument(
        "--slowdown",
        type=positive,
        default=1.0,
        metavar="S",
        help="the device takes S times as long as its profile says (default: %(default)s)",
    )


def _check_read(options: argparse.Namespace) -> None:
    """Check that the files that a plan is made of are there."""
    check_costs([*options.device, *options.server])
    check_given(options.codecs)
    check_model(options)


def _planned(
    options: argparse.Namespace, uplink_mbit_s: float | None = None, *, energy: bool = False
) -> tuple[dict[str, Any], Objective, list[str]]:
    """Return what a plan is made of, its objective, and what a user is told of costs that are guesses.

    Files and numbers are read before the model is loaded, so that a mistake in them is told at once.

    Args:
        options: the parsed arguments.
        uplink_mbit_s: the uplink's rate in place of the link's own. The downlink stays.
        energy: whether energy counts although it is not in the objective.
    """
    with loading():
        from torchsurgeon.codec import CodecTable
        from torchsurgeon.link import Link
        from torchsurgeon.planning import Objective
        from torchsurgeon.prediction import all_costs_on, load_costs

    weights: str | dict[str, float] = options.objective
    if "=" in options.objective:
        weights = {name: _number(text) for name, text in pairs(options.objective.split(","), _WEIGHTS).items()}
    objective = Objective.of(weights)
    link = Link.parse(options.link)
    if uplink_mbit_s is not None:
        link = dataclasses.replace(link, uplink_bit_s=uplink_mbit_s * 1e6)
    if (objective.energy or energy) and link.radio is None:
        raise PlanError(
            f"the power of the radio on --link {short(options.link, 100)} is not known, and energy counts; name a link "
            "with a radio, such as wifi, whose rate --uplink sets"
        )
    names = [*options.device, *options.server]
    known = [load_costs(name) for name in names]
    bounds = [name for name, costs in zip(names, known, strict=True) if costs.is_bound]
    if bounds and not options.allow_bounds:
        raise PlanError(
            f"{bounds[0]}: a bound from data sheets, not a measured device, and a plan needs measured costs; profile "
            "the model or calibrate the device there, or plan with the bound by --allow-bounds"
        )
    codecs = None if options.codecs is None else CodecTable.load(options.codecs)
    graph = traced(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PredictionWarning)  # told in the notes
        profiles = [all_costs_on(graph, costs) for costs in known]
    count = len(options.device)
    device, server = (list(itertools.chain(*some)) for some in (profiles[:count], profiles[count:]))
    notes = []
    for place, (name, (eager, *_)) in enumerate(zip(names, profiles, strict=True)):
        notes += _guesses(f"{'device' if place < count else 'server'} {name}", eager, verbose=options.verbose)
    return {"graph": graph, "device": device, "server": server, "link": link, "codecs": codecs}, objective, notes


def _guesses(where: str, profile: LayerProfile, *, verbose: bool) -> list[str]:
    """Return what a user is told of the times in a profile that are guesses."""
    if profile.is_bound:
        return [f"{where}: a bound from data sheets, not a measured device; real times are longer"]
    rough, count = profile.warned, len(profile.layers)
    if not rough:
        return []
    said = f"{where}: the times of {len(rough)} of {count} layers are predicted roughly"
    return [said, *(f"{name}: {why}" for name, why in rough.items())] if verbose else [f"{said}; --verbose lists them"]


def _spread(text: str) -> list[float]:
    """Return the numbers that FROM:TO:N means, evenly spread on a logarithmic scale."""
    parts = [_number(part) for part in text.split(":")]
    if len(parts) != 3 or not 0 < parts[0] < parts[1] < math.inf or not 2 <= parts[2] <= 1000:
        raise TorchSurgeonError(
            f"the argument must be FROM:TO:N with 0 < FROM < TO and 2 to 1000 values; got {short(text)}"
        )
    count = int(parts[2])
    return [parts[0] * (parts[1] / parts[0]) ** (i / (count - 1)) for i in range(count)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TorchSurgeonError(f"the argument must hold numbers; got {short(text)}") from None
