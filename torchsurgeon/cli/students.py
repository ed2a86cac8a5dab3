"""``torchsurgeon distill``: a small network in place of a model's first layers."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon import _whole_file
from torchsurgeon.cli.arguments import (
    command,
    device_argument,
    index_or_name,
    model_arguments,
    number,
    threads_argument,
    traced,
    weights_argument,
    whole_number,
)
from torchsurgeon.cli.screen import loading, progress, warn
from torchsurgeon.errors import CodecError, TorchSurgeonError, UnfinishedWarning, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands

_REPORT_EVERY_S = 60.0


def add_distill(commands: Commands) -> None:
    """Declare ``torchsurgeon distill``."""
    parser = command(
        commands,
        _distill,
        "distill",
        "Make a small network that takes the place of the layers before a cut, from images without labels.",
        "torchvision:resnet50 --weights default --point layer2 --data photos --minutes 30 --out layer2.student",
        "torchsurgeon.demo:lite0 --point blocks.5 --data photos --share 0.05 --out lite0.student",
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
    _whole_file.check_writable(options.out, CodecError)
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
