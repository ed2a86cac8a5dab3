"""``torchsurgeon profile``, ``calibrate``, ``predict`` and ``codecs``: what layers and boundaries cost."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchsurgeon import codec
from torchsurgeon.cli.arguments import model_arguments, pairs, traced, whole_number
from torchsurgeon.cli.screen import console, progress, warn
from torchsurgeon.errors import NoisyProfileWarning, PredictionWarning, ThrottledWarning, TorchSurgeonError
from torchsurgeon.prediction import Predictor, calibrate, load_device
from torchsurgeon.profiling import LayerProfile, find_device, layer_trace, profile

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands

# Where there is no terminal to draw a bar on.
_TELL_EVERY_S = 20.0


def add_profile(commands: Commands) -> None:
    """Declare ``torchsurgeon profile``."""
    parser = commands.add_parser("profile", help="measure each layer's time, memory and energy on this machine")
    model_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the profile as JSON")
    parser.add_argument("--repeats", type=int, default=20, help="measured runs, each of the whole model")
    parser.add_argument("--warmup", type=int, default=3, help="runs before them")
    parser.add_argument("--threads", type=whole_number, help="CPU threads of one inference")
    parser.add_argument("--cooldown", type=float, default=0.0, metavar="SECONDS", help="rest before every 10 repeats")
    parser.add_argument("--no-energy", action="store_true", help="do not meter joules, which takes its time")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the layers as bars, e.g. profile.png")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write one run for ui.perfetto.dev")
    parser.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> None:
    from torchsurgeon import report

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
        )
    if options.out is not None:
        measured.save(options.out)
    screen = console()
    screen.print(report.profile_table(graph, measured))
    screen.print(str(measured), highlight=False, markup=False)
    for warning in caught:
        warn(warning.message)
    if options.plot is not None:
        report.profile_picture(graph, measured, options.plot)
    if options.trace is not None:
        layer_trace(graph, device).save(options.trace)


def add_calibrate(commands: Commands) -> None:
    """Declare ``torchsurgeon calibrate``."""
    parser = commands.add_parser("calibrate", help="time layers of every kind on this machine, to predict models")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="write the calibration as JSON")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="time to spend, default 300")
    parser.add_argument("--threads", type=whole_number, help="CPU threads of one inference")
    parser.add_argument("--seed", type=int, default=0, help="of the networks that are drawn")
    parser.add_argument(
        "--from-csv",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="fit measurements taken elsewhere instead, e.g. conv=conv.csv; docs/prediction.md lists the columns",
    )
    parser.add_argument("--name", default="an unnamed device", help="of the device in the CSV files")
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    from torchsurgeon.report import calibration_table

    if options.from_csv:
        predictor = Predictor.from_csv(pairs(options.from_csv), options.name)
        predictor.save(options.out)
        console().print(calibration_table(predictor))
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    told_s = 0.0

    def tell(spent_s: float, budget_s: float, what: str) -> None:
        nonlocal told_s
        advance(spent_s, budget_s, what)
        if not sys.stderr.isatty() and spent_s - told_s >= _TELL_EVERY_S:
            told_s = spent_s
            print(f"{spent_s:.0f} of {budget_s:g} s: {what}", file=sys.stderr, flush=True)

    try:
        with progress("calibrating") as advance, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ThrottledWarning)
            predictor = calibrate(
                options.device, budget_s=options.budget, out=options.out, seed=options.seed, progress=tell
            )
    except KeyboardInterrupt:
        print(f"torchsurgeon: interrupted; the same command goes on with {options.out}", file=sys.stderr)
        raise
    console().print(calibration_table(predictor))
    print(f"written to {options.out}")
    for warning in caught:
        warn(warning.message)


def add_predict(commands: Commands) -> None:
    """Declare ``torchsurgeon predict``."""
    parser = commands.add_parser("predict", help="predict each layer's time on a calibrated device, running nothing")
    model_arguments(parser)
    parser.add_argument(
        "--device",
        required=True,
        metavar="DEVICE",
        help="a file of torchsurgeon calibrate, or tegra-k1-cpu, tegra-k1-gpu, tesla-k40, xeon-1-thread",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a measured profile to compare with")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted over measured, e.g. predicted.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the prediction as a profile that plan reads")
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> None:
    from torchsurgeon import report

    if options.plot is not None and options.profile is None:
        raise TorchSurgeonError("--plot draws predictions over measurements; give these with --profile FILE")
    predictor = load_device(options.device)
    graph = traced(options)
    measured = None if options.profile is None else LayerProfile.load(options.profile)
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


def add_codecs(commands: Commands) -> None:
    """Declare ``torchsurgeon codecs``."""
    parser = commands.add_parser("codecs", help="measure what codecs save and change at the cuts that can pay")
    model_arguments(parser)
    parser.add_argument("--weights", metavar="FILE", help=".safetensors, .pt, or 'default'")
    parser.add_argument("--sample", type=Path, metavar="DIR", required=True, help="folder of your own images")
    parser.add_argument("--most", type=whole_number, default=32, help="samples taken from the folder, default 32")
    parser.add_argument(
        "--codecs", metavar="NAMES", help="separated by commas, e.g. zstd,int8+zstd,jpeg-75; default all"
    )
    parser.add_argument(
        "--point", action="append", metavar="POINT", help="an index or a layer's name, for each to take"
    )
    parser.add_argument("--max-top1-change", type=float, metavar="SHARE", help="predictions a lossy codec may change")
    parser.add_argument("--min-cosine", type=float, metavar="COSINE", help="likeness of outputs that one must keep")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    parser.set_defaults(run=_codecs)


def _codecs(options: argparse.Namespace) -> None:
    from torchsurgeon.report import codec_table

    device = find_device(options.device)
    graph = traced(options, device, options.weights)
    budget = None
    if options.max_top1_change is not None or options.min_cosine is not None:
        budget = codec.Budget(max_top1_change=options.max_top1_change, min_cosine=options.min_cosine)
    with progress("measuring codecs") as advance:
        measured = codec.measure(
            graph,
            codec.image_sample(graph, options.sample, options.most),
            None if options.codecs is None else options.codecs.split(","),
            points=None if options.point is None else [int(p) if p.isdigit() else p for p in options.point],
            budget=budget,
            device=device,
            progress=advance,
        )
    if options.out is not None:
        measured.save(options.out)
    console().print(codec_table(measured))
