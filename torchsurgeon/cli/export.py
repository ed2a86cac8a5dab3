"""``torchsurgeon export``: parts of a model as files, for devices without PyTorch and for other servers."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import (
    command,
    file_argument,
    index_or_name,
    judged_by,
    model_arguments,
    traced,
    weights_argument,
)
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.files import check_costs, check_given, check_model
from torchsurgeon.cli.screen import loading, warn
from torchsurgeon.errors import NoisyProfileWarning, PredictionWarning, TorchSurgeonError, short

if TYPE_CHECKING:
    from torchsurgeon.backends import Backend
    from torchsurgeon.cli.arguments import Commands
    from torchsurgeon.profiling import LayerProfile
    from torchsurgeon.tracing import LayerGraph


def add_export(commands: Commands) -> None:
    """Declare ``torchsurgeon export``."""
    parser = command(
        commands,
        _export,
        "export",
        "Write heads for a device without PyTorch, or a tail for another inference server.",
        "torchvision:mobilenet_v3_large --points features.3.add features.8.add --out bundle --name mobile",
        "torchvision:resnet50 --device pi.json --server k40-gpu --out bundle",
        "torchvision:resnet50 --backend onnxruntime:int8 --backend-sample photos --backend-limits min-cosine=0.99 "
        "--out bundle",
        "torchvision:resnet50 --weights default --point layer2.3.relu_2 --codecs codecs.json --fitted layer2.fitted "
        "--out bundle",
        "torchvision:resnet50 --point layer3.5.relu_2 --triton repository --name resnet_tail",
    )
    model_arguments(parser)
    weights_argument(parser)
    parser.add_argument(
        "--points",
        "--point",
        nargs="+",
        type=index_or_name,
        metavar="POINT",
        help="where the device may cut: indices or names of layers, or server (default: the points that are the best "
        "over one of the links that plan knows)",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="the model's name at its servers (default: the last part of SPEC)"
    )
    backend = parser.add_argument(
        "--backend", default="onnxruntime", help="what runs the heads on the device (default: %(default)s)"
    )
    completed(backend, one_of(("onnxruntime", "onnxruntime:int8")))
    parser.add_argument(
        "--backend-sample",
        type=Path,
        metavar="DIR",
        help="a folder of your own images, which calibrates and judges --backend onnxruntime:int8 (default: none)",
    )
    parser.add_argument(
        "--backend-limits",
        metavar="LIMITS",
        help="how much the answers may change on --backend-sample, such as max-top1-change=0.01,min-cosine=0.99; a "
        "part that changes more is written in float32 (default: none)",
    )
    for side in ("device", "server"):
        where = parser.add_argument(
            f"--{side}",
            metavar="FILE",
            help=f"what layers cost on the {side}: a measured profile of this model, the calibration of a device to "
            f"predict for, or {completion.marked_devices()} (default: they are measured on this machine)",
        )
        completed(where, one_of(completion.REFERENCE_DEVICES, "json"))
    file_argument(parser, "--codecs", "codecs measured by torchsurgeon codecs --out", "only raw tensors are sent")
    fitted = parser.add_argument(
        "--fitted",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a codec that was fitted (codecs --fit) or a student (distill), which belongs to the bundle, and which "
        "servers are given by serve --codec; may be repeated (default: none)",
    )
    completed(fitted, one_of((), "fitted", "student"))
    parser.add_argument(
        "--no-whole",
        dest="whole",
        action="store_false",
        help="leave out the whole model, without which the device cannot answer alone (default: it is written)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a bundle to this new folder (default: none)")
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="DIR",
        help="write the tail behind the one point into this model repository of NVIDIA Triton (default: not written)",
    )
    parser.add_argument(
        "--ovms",
        type=Path,
        metavar="DIR",
        help="write the tail behind the one point into this folder of the OpenVINO Model Server, which sees it as "
        "/models (default: not written)",
    )


def _export(options: argparse.Namespace) -> None:
    if options.out is None and options.triton is None and options.ovms is None:
        raise TorchSurgeonError("export writes files: give --out DIR, --triton DIR or --ovms DIR")
    tails = options.triton is not None or options.ovms is not None
    if tails and len(options.points or ()) != 1:
        raise TorchSurgeonError("--triton and --ovms write the tail behind one point; give --point POINT")
    if options.backend not in ("onnxruntime", "onnxruntime:int8"):
        raise TorchSurgeonError(
            "a bundle's heads are run by onnxruntime or onnxruntime:int8; got --backend "
            f"{short(options.backend, 60, quote=False)}"
        )
    check_costs(name for name in (options.device, options.server) if name is not None)
    check_given(options.codecs, *options.fitted)
    check_model(options)
    with loading():
        from torchsurgeon.backends import find_backend
        from torchsurgeon.codec import CodecTable, load_codec
        from torchsurgeon.export import best_points, export_bundle, export_openvino, export_triton
        from torchsurgeon.models.specs import short_name
        from torchsurgeon.report import bytes_text

    judged = judged_by(options.backend_sample, options.backend_limits, "--backend-")
    backend = find_backend(options.backend, **judged)
    codecs = None if options.codecs is None else CodecTable.load(options.codecs)
    name = options.name or short_name(options.spec)
    graph = traced(options, weights=options.weights)
    if options.out is not None:
        server = _costs(graph, options.server)
        device = _costs(graph, options.device, eager=server if options.server is None else None, backend=backend)
        points = options.points or best_points(graph, device, server)
        written = export_bundle(
            graph,
            options.out,
            points=points,
            device=device,
            server=server,
            codecs=codecs,
            fitted=[load_codec(file, graph) for file in options.fitted],
            name=name,
            whole=options.whole,
            backend=backend,
        )
        named = ", ".join(point.name for point in written.points)
        print(f"{options.out}: {bytes_text(written.size_bytes)}, heads up to {short(named, 300, quote=False)}")
        if written.left_out:
            warn(f"left out, since a device without PyTorch does not have these codecs: {', '.join(written.left_out)}")
        for part in written.in_floats:
            warn(f"in float32 is {part}")
    for write, folder in ((export_triton, options.triton), (export_openvino, options.ovms)):
        if folder is not None:
            print(f"written to {write(graph, folder, point=options.points[0], name=name)}")


def _costs(
    graph: LayerGraph, where: str | None, *, eager: LayerProfile | None = None, backend: str | Backend = "eager"
) -> LayerProfile:
    """Return what a model costs on one side: as a file says, or measured here.

    Args:
        graph: the traced model.
        where: the file; None to measure.
        eager: what it costs here in eager PyTorch, if that is known.
        backend: what runs the model on that side.
    """
    from torchsurgeon.prediction import costs_on
    from torchsurgeon.profiling import profile

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PredictionWarning)
        warnings.simplefilter("always", NoisyProfileWarning)
        if where is not None:
            found = costs_on(graph, where)
        else:
            found = profile(graph, meter=None, backend=backend, eager=None if backend == "eager" else eager)
    for warning in caught:
        warn(warning.message)
    return found
