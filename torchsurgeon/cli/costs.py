"""``torchsurgeon profile``, ``calibrate`` and ``predict``: what layers cost."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import (
    check_files,
    command,
    device_argument,
    file_argument,
    model_arguments,
    pairs,
    seconds,
    threads_argument,
    traced,
    whole_number,
)
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.files import check_costs, check_given, check_model
from torchsurgeon.cli.screen import console, loading, progress, warn
from torchsurgeon.errors import (
    CalibrationError,
    NoisyProfileWarning,
    PredictionWarning,
    ThrottledWarning,
    TorchSurgeonError,
    short,
)

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands

# How often a calibration says how far it is where there is no terminal to draw a bar on.
_REPORT_EVERY_S = 20.0
_UNNAMED = "an unnamed device"
_BUDGET_S = 300.0
_MEASURING = {"device": "cpu", "budget": _BUDGET_S, "backend": [], "backend_budget": 100.0, "threads": None, "seed": 0}
"""The options of a calibration that say how this machine is measured, with their defaults."""


def add_profile(commands: Commands) -> None:
    """Declare ``torchsurgeon profile``."""
    parser = command(
        commands,
        _profile,
        "profile",
        "Measure each layer's time, memory and energy on this machine.",
        "torchvision:resnet50 --out laptop.json",
        "torchvision:resnet50 --device cuda --repeats 50 --no-energy",
        "torchvision:resnet50 --backend onnxruntime --out laptop-onnxruntime.json",
    )
    model_arguments(parser)
    device_argument(parser, "device to measure on")
    file_argument(parser, "--out", "write the profile to this JSON file")
    parser.add_argument(
        "--repeats",
        type=whole_number(1),
        default=20,
        metavar="N",
        help="how many times the whole model is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--warmup",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="how many times it runs before, unmeasured (default: %(default)s)",
    )
    threads_argument(parser)
    parser.add_argument(
        "--cooldown",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="pause before every 10 repeats, so that the machine cools down (default: %(default)s)",
    )
    parser.add_argument(
        "--no-energy",
        action="store_true",
        help="do not measure energy, which takes time (default: measure it where there is a meter)",
    )
    backend_arguments(parser)
    file_argument(parser, "--plot", "draw the layers as bars, for example in profile.png", "not drawn")
    file_argument(parser, "--trace", "write one run as a trace that ui.perfetto.dev shows")


def backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what runs the model in place of eager PyTorch, and for how long its parts are measured."""
    backend = parser.add_argument(
        "--backend",
        default="eager",
        metavar="NAME",
        help=f"what runs the model: {', '.join(completion.BACKENDS)}; one other than eager fuses layers, so heads and "
        "tails are measured at a few points and interpolated between these (default: %(default)s)",
    )
    completed(backend, one_of(completion.BACKENDS))
    parser.add_argument(
        "--backend-budget",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="with --backend, how long points are measured (default: %(default)s)",
    )


def _profile(options: argparse.Namespace) -> None:
    check_files(options.out, options.plot, options.trace)
    check_model(options)
    with loading():
        import torch

        from torchsurgeon import report
        from torchsurgeon.profiling import find_device, layer_trace, profile

    device = find_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    graph = traced(options, device)
    with progress("profiling") as advance, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoisyProfileWarning)
        measured = profile(
            graph,
            device,
            repeats=options.repeats,
            warmup=options.warmup,
            meter=None if options.no_energy else "auto",
            cooldown_s=options.cooldown,
            progress=advance,
            backend=options.backend,
            budget_s=options.backend_budget,
        )
    if options.out is not None:
        measured.save(options.out)
    screen = console()
    screen.print(report.profile_table(graph, measured))
    screen.print(str(measured), highlight=False, markup=False)
    for warning in caught:
        if isinstance(warning.message, NoisyProfileWarning):
            warn(f"{warning.message.finding}; quiet the machine, or give more --repeats or a longer --cooldown")
        else:
            warn(warning.message)
    if options.plot is not None:
        report.profile_picture(graph, measured, options.plot)
    if options.trace is not None:
        layer_trace(graph, device).save(options.trace)


def add_calibrate(commands: Commands) -> None:
    """Declare ``torchsurgeon calibrate``."""
    parser = command(
        commands,
        _calibrate,
        "calibrate",
        "Time layers of every kind on this machine, so that models can be predicted.",
        "--out jetson.json",
        "--out jetson.json --backend onnxruntime",
        "--out board.json --from-csv conv=conv.csv --name 'my board'",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        required=True,
        help="JSON file of the calibration; one that was interrupted, or had a smaller --budget, is continued",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished calibration in --out that had as large a --budget (default: it is refused)",
    )
    device_argument(parser, "device to calibrate")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=_BUDGET_S,
        metavar="SECONDS",
        help="time to spend on measuring; to start and to fit takes some more (default: %(default)s)",
    )
    backend = parser.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help=f"add what networks take by this backend ({', '.join(completion.BACKENDS[1:])}) to the calibration in "
        "--out, which is made first unless there is one; may be repeated (default: eager PyTorch alone)",
    )
    completed(backend, one_of(completion.BACKENDS[1:]))
    parser.add_argument(
        "--backend-budget",
        type=seconds,
        default=_MEASURING["backend_budget"],
        metavar="SECONDS",
        help="time to spend on each --backend (default: %(default)s)",
    )
    threads_argument(parser)
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed of the random networks that are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--from-csv",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="fit times measured elsewhere, such as conv=conv.csv, whose columns docs/prediction.md lists; may be "
        "repeated (default: measure on this machine)",
    )
    parser.add_argument(
        "--name",
        default=_UNNAMED,
        help="name of the device in the CSV files (default: %(default)s)",
    )


def _calibrate(options: argparse.Namespace) -> None:
    _check_options(options)
    with loading():
        import torch

        from torchsurgeon.prediction import Predictor, calibrate, calibrate_backend
        from torchsurgeon.prediction.backends import calibratable
        from torchsurgeon.report import calibration_table

    if options.from_csv:
        imported = Predictor.from_csv(pairs(options.from_csv, "--from-csv must be KIND=FILE"), options.name)
        imported.save(options.out)
        console().print(calibration_table(imported))
        return
    # A calibration takes minutes, so what would end the command after it ends it now.
    check_files(options.out)
    for name in options.backend:
        calibratable(name, options.backend_budget)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    reported_s = 0.0

    def report(spent_s: float, budget_s: float, what: str) -> None:
        nonlocal reported_s
        advance(spent_s, budget_s, what)
        if not sys.stderr.isatty() and spent_s - reported_s >= _REPORT_EVERY_S:
            reported_s = spent_s
            print(f"{spent_s:.0f} of {budget_s:g} s: {what}", file=sys.stderr, flush=True)

    try:
        with progress("calibrating") as advance, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ThrottledWarning)
            predictor: Predictor | None = None
            missing: tuple[str, ...] = ()
            if options.backend and options.out.exists():
                # An unfinished one goes on, and what is no calibration is refused there.
                with contextlib.suppress(CalibrationError):
                    predictor = Predictor.load(options.out)
            if predictor is None:
                predictor = calibrate(
                    options.device,
                    budget_s=options.budget,
                    out=options.out,
                    seed=options.seed,
                    progress=report,
                    overwrite=options.overwrite,
                )
                missing = predictor.missing()
            for name in options.backend:
                reported_s = 0.0
                predictor = calibrate_backend(
                    predictor, name, options.device, budget_s=options.backend_budget, seed=options.seed, progress=report
                )
                predictor.save(options.out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on with {options.out}") from None
    console().print(calibration_table(predictor))
    print(f"written to {options.out}")
    for warning in caught:
        warn(warning.message)
    if missing:
        warn(
            f"too few samples of {', '.join(missing)} were timed; the device's roofline predicts these layers, which "
            f"may be off by a factor; the same command with --budget {max(_BUDGET_S, 2 * options.budget):g} goes on "
            "from here"
        )


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that would not count beside the others."""
    given = [name for name, default in _MEASURING.items() if getattr(options, name) != default]
    if options.from_csv and given:
        raise TorchSurgeonError(
            f"--{given[0].replace('_', '-')} says how this machine is measured, and --from-csv measures nothing; leave "
            "one of them out"
        )
    if options.name != _UNNAMED and not options.from_csv:
        raise TorchSurgeonError(
            f"--name names the device of --from-csv, and this machine has its own name; got {short(options.name)}; "
            "leave it out"
        )
    if "backend_budget" in given and not options.backend:
        raise TorchSurgeonError("--backend-budget is the time for each --backend, and none is given; name one")


def add_predict(commands: Commands) -> None:
    """Declare ``torchsurgeon predict``."""
    parser = command(
        commands,
        _predict,
        "predict",
        "Predict each layer's time on a calibrated device, without running the model.",
        "torchvision:resnet50 --device jetson.json",
        "torchvision:resnet50 --device jetson.json --profile measured.json --plot predicted.png",
    )
    model_arguments(parser)
    device = parser.add_argument(
        "--device",
        required=True,
        metavar="DEVICE",
        help=f"a file written by torchsurgeon calibrate, or {completion.marked_devices()}",
    )
    completed(device, one_of(completion.REFERENCE_DEVICES, "json"))
    file_argument(parser, "--profile", "a measured profile to compare with", "no comparison")
    file_argument(parser, "--plot", "draw predicted over measured times; needs --profile", "not drawn")
    file_argument(parser, "--json", "write the prediction as a profile, which plan reads")


def _predict(options: argparse.Namespace) -> None:
    if options.plot is not None and options.profile is None:
        raise TorchSurgeonError("--plot draws predicted over measured times; give these with --profile FILE")
    check_files(options.json, options.plot)
    check_costs([options.device])
    check_given(options.profile)
    check_model(options)
    with loading():
        from torchsurgeon import report
        from torchsurgeon.prediction import load_device
        from torchsurgeon.profiling import LayerProfile

    predictor = load_device(options.device)
    measured = None if options.profile is None else LayerProfile.load(options.profile)
    graph = traced(options)
    if measured is not None:
        measured.check(graph)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PredictionWarning)
        predicted = predictor.predict(graph)
    if options.json is not None:
        predicted.save(options.json)
    console().print(report.prediction_table(graph, predictor, predicted, measured))
    notes = [] if measured is None else [f"{options.profile}: {what}" for what in predictor.mismatches(measured)]
    for note in [*(warning.message for warning in caught), *notes]:
        warn(note)
    if measured is not None and options.plot is not None:
        report.prediction_picture(graph, predicted, measured, options.plot)
