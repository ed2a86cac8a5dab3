"""``torchsurgeon codecs`` and ``distill``: what crosses at a cut, and a small network that computes it."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.cli.arguments import (
    check_files,
    command,
    device_argument,
    file_argument,
    index_or_name,
    model_arguments,
    number,
    threads_argument,
    traced,
    weights_argument,
    whole_number,
)
from torchsurgeon.cli.files import check_given, check_model
from torchsurgeon.cli.screen import console, loading, progress, warn
from torchsurgeon.errors import TorchSurgeonError, UnfinishedWarning, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands
    from torchsurgeon.codec import Budget

# How often a measurement or a training says how far it is where there is no terminal to draw a bar on.
_REPORT_EVERY_S = 20.0


def add_codecs(commands: Commands) -> None:
    """Declare ``torchsurgeon codecs``."""
    parser = command(
        commands,
        _codecs,
        "codecs",
        "Measure what codecs save, and how they change the answers, at cuts that can pay.",
        "torchvision:resnet50 --sample photos --out codecs.json",
        "torchvision:resnet50 --weights default --sample photos --codecs int8,int8+zstd --min-cosine 0.999",
        "torchvision:resnet50 --weights default --sample photos --point layer2.3.relu_2 --fit layer2.fitted",
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
    check_files(options.out, options.fit)
    check_given(options.frontier, *options.fitted or ())
    check_model(options)
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
        for name in names or ():
            codec.find_codec(name)
        if budget is not None:
            budget.check_sample(len(samples), graph.batch, graph.outputs[0])
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
    from torchsurgeon.accuracy.limits import budget_of

    limits = {
        name: getattr(options, name)
        for name in ("max_top1_change", "min_cosine", "min_boxes_matched", "min_pixels_kept")
        if getattr(options, name) is not None
    }
    return budget_of(**limits, decide_by=options.decide_by) if limits else None


def add_distill(commands: Commands) -> None:
    """Declare ``torchsurgeon distill``."""
    parser = command(
        commands,
        _distill,
        "distill",
        "Make a small network that takes the place of the layers before a cut, from images without labels.",
        "torchvision:resnet50 --weights default --point layer2.3.relu_2 --data photos --minutes 30 "
        "--out layer2.student",
        "torchsurgeon.demo:lite0 --point net.blocks.5.layers.4.1 --data photos --share 0.05 --out lite0.student",
    )
    model_arguments(parser)
    weights_argument(parser)
    parser.add_argument("--point", metavar="POINT", required=True, help="a partition point, by index or layer name")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", required=True, help="folder of your own images, 500 or more"
    )
    parser.add_argument(
        "--minutes",
        type=number,
        default=30.0,
        metavar="MINUTES",
        help="how long to train (default: %(default)s); thinning and fitting take a minute or two beside it",
    )
    parser.add_argument(
        "--share",
        type=number,
        default=0.1,
        metavar="SHARE",
        help="the student's operations over those of the whole model, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=whole_number(1), default=32, metavar="N", help="images trained on at a time (default: 32)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="write the student with its codec to this file, for serve --codec and codecs --fitted; the training is "
        "kept in FILE.training meanwhile, and the same command goes on from there",
    )
    device_argument(parser, "device to train on")
    threads_argument(parser)


def _distill(options: argparse.Namespace) -> None:
    if not options.data.is_dir():
        raise TorchSurgeonError(f"--data must be a folder of images; there is no folder {short(options.data)}")
    check_files(options.out)
    check_model(options)
    with loading():
        import torch

        from torchsurgeon import codec
        from torchsurgeon.profiling import find_device

    device = find_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    graph = traced(options, device, options.weights)
    sample = codec.image_sample(graph, options.data)
    checkpoint = options.out.with_name(f"{options.out.name}.training")
    reported_s = time.monotonic()

    def report(done: float, total: float, what: str) -> None:
        nonlocal reported_s
        advance(done, max(total, 1e-9), f"distilling: {what}")
        if not sys.stderr.isatty() and time.monotonic() - reported_s >= _REPORT_EVERY_S:
            reported_s = time.monotonic()
            print(f"{done:.0f} of {total:.0f} s trained: {what}", file=sys.stderr, flush=True)

    with progress("distilling") as advance, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnfinishedWarning)
        made = codec.distill(
            graph,
            index_or_name(options.point),
            sample,
            share=options.share,
            training_s=options.minutes * 60,
            batch=options.batch,
            device=device,
            checkpoint=checkpoint,
            progress=report,
        )
    made.save(options.out)
    assert made.student is not None
    print(
        f"wrote {made.name} to {options.out}: {made.student.flops_share:.1%} of the model's operations, "
        f"{made.rates[-1]:.2g} to {made.rates[0]:.2g} bits a value. On images kept apart: "
        f"{codec.Look.of(made.student)}. Judge it with other images: "
        f"codecs --fitted {options.out} --point {options.point}"
    )
    for warning in caught:
        warn(warning.message)
    if not caught:
        checkpoint.unlink(missing_ok=True)
