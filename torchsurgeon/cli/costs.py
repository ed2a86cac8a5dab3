"""``torchsurgeon profile``, ``calibrate``, ``predict`` and ``codecs``: what layers and boundaries cost."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon import _whole_file
from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import (
    command,
    device_argument,
    file_argument,
    index_or_name,
    model_arguments,
    number,
    pairs,
    threads_argument,
    traced,
    weights_argument,
    whole_number,
)
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.screen import console, loading, progress, warn
from torchsurgeon.errors import (
    CodecError,
    NoisyProfileWarning,
    PredictionWarning,
    ThrottledWarning,
    TorchSurgeonError,
    UnfinishedWarning,
    short,
)

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands
    from torchsurgeon.codec import Budget

# How often a calibration says how far it is where there is no terminal to draw a bar on.
_REPORT_EVERY_S = 20.0


def add_profile(commands: Commands) -> None:
    """Declare ``torchsurgeon profile``."""
    parser = command(
        commands,
        _profile,
        "profile",
        "Measure each layer's time, memory and energy on this machine.",
        "torchvision:resnet50 --out laptop.json",
        "torchvision:resnet50 --device cuda --repeats 50 --no-energy",
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
        type=number,
        default=0.0,
        metavar="SECONDS",
        help="pause before every 10 repeats, so that the machine cools down (default: %(default)s)",
    )
    parser.add_argument(
        "--no-energy",
        action="store_true",
        help="do not measure energy, which takes time (default: measure it where there is a meter)",
    )
    file_argument(parser, "--plot", "draw the layers as bars, for example in profile.png", "not drawn")
    file_argument(parser, "--trace", "write one run as a trace that ui.perfetto.dev shows")


def _profile(options: argparse.Namespace) -> None:
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
        "--out board.json --from-csv conv=conv.csv --name 'my board'",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        required=True,
        help="JSON file of the calibration; an interrupted calibration continues from it",
    )
    device_argument(parser, "device to calibrate")
    parser.add_argument(
        "--budget",
        type=number,
        default=300.0,
        metavar="SECONDS",
        help="time to spend (default: %(default)s)",
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
        default="an unnamed device",
        help="name of the device in the CSV files (default: %(default)s)",
    )


def _calibrate(options: argparse.Namespace) -> None:
    with loading():
        import torch

        from torchsurgeon.prediction import Predictor, calibrate
        from torchsurgeon.report import calibration_table

    if options.from_csv:
        predictor = Predictor.from_csv(pairs(options.from_csv), options.name)
        predictor.save(options.out)
        console().print(calibration_table(predictor))
        return
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
            predictor = calibrate(
                options.device, budget_s=options.budget, out=options.out, seed=options.seed, progress=report
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on with {options.out}") from None
    console().print(calibration_table(predictor))
    print(f"written to {options.out}")
    for warning in caught:
        warn(warning.message)


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


def add_codecs(commands: Commands) -> None:
    """Declare ``torchsurgeon codecs``."""
    parser = command(
        commands,
        _codecs,
        "codecs",
        "Measure what codecs save, and how they change the answers, at cuts that can pay.",
        "torchvision:resnet50 --sample photos --out codecs.json",
        "torchvision:resnet50 --weights default --sample photos --codecs int8,int8+zstd --min-cosine 0.999",
        "torchvision:resnet50 --weights default --sample photos --point layer2 --fit layer2.fitted",
    )
    model_arguments(parser)
    weights_argument(parser)
    parser.add_argument("--sample", type=Path, metavar="DIR", required=True, help="folder of your own images")
    parser.add_argument(
        "--most",
        type=whole_number(1),
        metavar="N",
        help="how many calls are made of the images, at most (default: of all images)",
    )
    parser.add_argument(
        "--codecs",
        metavar="NAMES",
        help="codecs separated by commas, such as zstd,int8+zstd,jpeg-75,webp-80@0.5 (default: all, image codecs at "
        "several qualities and sizes)",
    )
    parser.add_argument(
        "--point",
        action="append",
        metavar="POINT",
        help="a partition point by its index or its layer's name; may be repeated (default: those that can pay)",
    )
    file_argument(
        parser,
        "--frontier",
        "a file that plan --frontier wrote, whose cuts across parallel branches are measured, too",
        "only cuts between layers",
    )
    file_argument(
        parser,
        "--fit",
        "fit a codec to the only --point from half of the calls, write it to this file for serve --codec, and measure "
        "it at several rates on the others",
        "none is fitted",
    )
    parser.add_argument(
        "--fitted",
        type=Path,
        action="append",
        metavar="FILE",
        help="a codec that was fitted (--fit) or a student (distill), which is measured at several rates, too; may be "
        "repeated (default: none)",
    )
    parser.add_argument(
        "--max-top1-change",
        type=number,
        metavar="SHARE",
        help="share of predicted classes that a lossy codec may change (default: any)",
    )
    parser.add_argument(
        "--min-cosine",
        type=number,
        metavar="COSINE",
        help="mean cosine similarity of the outputs that a lossy codec must keep (default: any)",
    )
    parser.add_argument(
        "--min-boxes-matched",
        type=number,
        metavar="SHARE",
        help="of a detector: mean share of boxes that a lossy codec must keep (default: any)",
    )
    parser.add_argument(
        "--min-pixels-kept",
        type=number,
        metavar="SHARE",
        help="of a segmentation: mean share of pixels whose class a lossy codec must keep (default: any)",
    )
    parser.add_argument(
        "--decide-by",
        choices=("bound", "estimate"),
        default="bound",
        help="bound: a codec may be used if, with 95 %% confidence, all calls keep these limits; estimate: if the "
        "images do, which says little where they are few (default: %(default)s)",
    )
    device_argument(parser, "device to measure on")
    threads_argument(parser)
    file_argument(parser, "--out", "write the table to this JSON file, which plan --codecs reads")


def _codecs(options: argparse.Namespace) -> None:
    if not options.sample.is_dir():
        raise TorchSurgeonError(f"--sample must be a folder of images; there is no folder {short(options.sample)}")
    points = None if options.point is None else [index_or_name(point) for point in options.point]
    if options.fit is not None and (points is None or len(points) != 1):
        raise TorchSurgeonError(f"--fit fits a codec to one --point; got {len(points or [])} of them")
    with loading():
        import torch

        from torchsurgeon import codec
        from torchsurgeon.planning import Frontier
        from torchsurgeon.profiling import find_device
        from torchsurgeon.report import codec_table

    frontier = None if options.frontier is None else Frontier.load(options.frontier)

    device = find_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    graph = traced(options, device, options.weights)
    across = () if frontier is None else frontier.across(graph)
    budget = _budget(options)
    samples = codec.image_sample(graph, options.sample, options.most)
    names = None if options.codecs is None else options.codecs.split(",")
    if options.fitted:
        loaded = [codec.load_codec(file, graph) for file in options.fitted]
        names = [*(names or codec.measured_names()), *(rated.name for one in loaded for rated in one.some())]
    if options.fit is not None and points is not None:
        # Judged on other calls than those that it is fitted to.
        setup, samples = codec.halves(samples)
        # Fitting takes minutes, so what would end the command afterwards ends it now.
        for file in filter(None, (options.fit, options.out)):
            _whole_file.check_writable(file, CodecError)
        for name in names or ():
            codec.find_codec(name)
        if budget is not None:
            budget.check_sample(len(samples), graph.batch)
        with progress("fitting a codec") as advance:
            fitted = codec.fit_codec(graph, points[0], setup, device=device, progress=advance)
        fitted.save(options.fit)
        print(f"wrote {fitted.name} to {options.fit}: {fitted.rates[-1]:.2g} to {fitted.rates[0]:.2g} bits a value")
        names = [*(names or codec.measured_names()), *(one.name for one in fitted.some())]
    begin_s = reported_s = time.monotonic()

    def report(done: float, total: float, what: str) -> None:
        nonlocal reported_s
        advance(done, total, f"measuring codecs: {what}")
        now_s = time.monotonic()
        if not sys.stderr.isatty() and now_s - reported_s >= _REPORT_EVERY_S:
            reported_s = now_s
            left_s = (now_s - begin_s) * (total - done) / done
            print(f"{done / total:.0%} done, about {left_s:.0f} s left: {what}", file=sys.stderr, flush=True)

    with progress("measuring codecs") as advance, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnfinishedWarning)
        measured = codec.measure(
            graph,
            samples,
            names,
            points=points,
            across=across,
            budget=budget,
            device=device,
            progress=report,
        )
    if options.out is not None:
        measured.save(options.out)
    console().print(codec_table(measured))
    if measured.unfinished:
        kept = "" if options.out is None else f"; what was measured until then is in {options.out}"
        raise KeyboardInterrupt(f"{len(measured.unfinished)} points were not measured{kept}")
    for warning in caught:
        warn(warning.message)


def _budget(options: argparse.Namespace) -> Budget | None:
    from torchsurgeon import codec

    scores = {"min_boxes_matched": codec.boxes_matched, "min_pixels_kept": codec.pixels_kept}
    given = [
        (function, getattr(options, name)) for name, function in scores.items() if getattr(options, name) is not None
    ]
    if len(given) > 1:
        raise TorchSurgeonError("--min-boxes-matched is for detectors, --min-pixels-kept for segmentation; give one")
    score, min_score = given[0] if given else (None, None)
    if options.max_top1_change is None and options.min_cosine is None and score is None:
        return None
    return codec.Budget(
        max_top1_change=options.max_top1_change,
        min_cosine=options.min_cosine,
        score=score,
        min_score=min_score,
        decide_by=options.decide_by,
    )
