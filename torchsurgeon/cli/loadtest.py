"""``torchsurgeon bench-server``: a server under the load of many devices."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchsurgeon.cli import completion
from torchsurgeon.cli.access import access, access_arguments
from torchsurgeon.cli.arguments import (
    SPEC_HELP,
    WEIGHTS_HELP,
    command,
    file_argument,
    index_or_name,
    leaf_argument,
    lists,
    number,
    pairs,
    seconds,
    whole_number,
)
from torchsurgeon.cli.completion import completed, named, one_of
from torchsurgeon.cli.screen import Advance, console, loading, progress, warn
from torchsurgeon.errors import LoadTestError, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands
    from torchsurgeon.loadtest import Arrivals, LoadRequest, Target


def add_bench_server(commands: Commands) -> None:
    """Declare ``torchsurgeon bench-server``."""
    parser = command(
        commands,
        _bench_server,
        "bench-server",
        "Put a server under the load of many devices, and show how long answers take.",
        "http://127.0.0.1:8000 alexnet --rate 50",
        "http://127.0.0.1:8000 alexnet=torchvision:alexnet --cut server --cut features.12 --codec raw --codec int8 "
        "--rate 50 --rate 100 --devices 40 --plot load.png",
        "http://127.0.0.1:8000 alexnet --closed-loop --json load.json",
    )
    parser.add_argument("url", metavar="URL", help="the server's URL")
    models = parser.add_argument(
        "models",
        nargs="+",
        metavar="NAME[=SPEC]",
        help=f"a model that the server holds, for cuts of it with {SPEC_HELP}",
    )
    completed(models, named(completion.specs))
    parser.add_argument(
        "--cut",
        action="append",
        default=[],
        metavar="POINT",
        help="where the devices cut the models: server, a partition index, a layer's name, or all for every cut; may "
        "be repeated (default: server, which is the whole model)",
    )
    codec = parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="CODEC",
        help="what the tensors are sent under, such as int8+zstd; may be repeated (default: raw)",
    )
    completed(codec, one_of(("raw", "zstd", "float16", "int8", "int8+zstd", "int4", "jpeg-80")))
    parser.add_argument(
        "--rate",
        action="append",
        type=number,
        default=[],
        metavar="R",
        help="requests per second of all devices; may be repeated, for one test after the other (default: the "
        "recording's own rate)",
    )
    arrivals = parser.add_argument(
        "--arrivals",
        default="exponential",
        metavar="SHAPE|FILE",
        help=f"how the gaps between requests spread: {', '.join(completion.SHAPES)}, or a file with recorded gaps in "
        "seconds, one a line (default: %(default)s, as of many users who know nothing of each other)",
    )
    completed(arrivals, one_of(completion.SHAPES, "txt", "csv"))
    parser.add_argument(
        "--closed-loop",
        action="store_true",
        help="each device sends its next request once it has its answer, which finds the highest rate (default: "
        "requests are due at moments that do not depend on answers)",
    )
    parser.add_argument(
        "--devices",
        type=whole_number(1),
        metavar="N",
        help="how many devices there are, each with a connection and a cut of its own (default: 20, or one for each "
        "model, cut and codec if that is more)",
    )
    parser.add_argument("--seconds", type=seconds, default=10.0, help="how long each test lasts (default: %(default)s)")
    parser.add_argument(
        "--warmup",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="how long requests are sent before that without being counted (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="a request without an answer so long after it was due has failed (default: %(default)s)",
    )
    parser.add_argument(
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        help="tell the server after how long an answer is of no use, so that it refuses what it cannot keep (default: "
        "none is told)",
    )
    weights = parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"weights of a model, on which sizes under a codec depend: {WEIGHTS_HELP}; may be repeated (default: "
        "random ones)",
    )
    completed(weights, named(one_of(("default",), "safetensors", "pt", "pth")))
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="example input of a model, such as resnet=x:float32[1,3,320,320]; may be repeated (default: the example "
        "that the model comes with)",
    )
    leaf_argument(parser, "NAME=MODULE", "keep this submodule of a model whole, as the server does")
    access_arguments(parser)
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="seed of the moments (default: %(default)s)"
    )
    file_argument(parser, "--json", "write everything to this JSON file")
    file_argument(parser, "--plot", "draw the latencies, for example in load.png", "not drawn")


def _bench_server(options: argparse.Namespace) -> None:
    specs = dict(_name_and_spec(text) for text in options.models)
    inputs = pairs(options.input, "--input must be NAME=SPEC")
    weights = pairs(options.weights, "--weights must be NAME=FILE")
    leaves = lists(options.leaf, "--leaf must be NAME=MODULE")
    for name in (*inputs, *weights, *leaves):
        if specs.get(name) is None:
            raise LoadTestError(
                f"--input, --weights and --leaf take the name of a model that is given with its SPEC; got {short(name)}"
            )
    with loading():
        from torchsurgeon import report
        from torchsurgeon.loadtest import LoadReport, Target, drive, try_each

    arrivals = _arrivals(options)
    token, ca, cert = access(options)
    target = Target.at(options.url, token=token, verify=ca, cert=cert, deadline_s=options.deadline)
    requests: list[LoadRequest] = []
    for name, spec in specs.items():
        if spec is None:
            requests += _whole(target, name, options, {"token": token, "verify": ca, "cert": cert})
        else:
            requests += _cuts(target, name, spec, options, inputs.get(name), weights.get(name), leaves.get(name, ()))
    devices = options.devices or max(20, len(requests))
    rates: list[float | None] = [None] if arrivals is None else options.rate or [None]
    runs = []
    with progress("preparing") as advance:
        try_each(target, requests)
        for n, rate in enumerate(rates):
            whole_s = options.warmup + options.seconds
            what = "each device as it can" if arrivals is None else f"{rate:g} a second" if rate else "as recorded"
            run = drive(
                target,
                requests,
                None if arrivals is None else arrivals.times_s(whole_s, rate, options.seed + n),
                devices=devices,
                seconds=options.seconds,
                warmup_s=options.warmup,
                timeout_s=options.timeout,
                rate_per_s=rate,
                seed=options.seed + n,
                progress=functools.partial(_advance, advance, n, len(rates), what),
            )
            runs.append(run)
    found = LoadReport(target.url, "closed loop" if arrivals is None else arrivals.name, devices, runs)
    console().print(report.load_table(found))
    for line in report.load_findings(found):
        warn(line)
    if options.json is not None:
        found.save(options.json)
    if options.plot is not None:
        report.load_picture(found, options.plot)


def _advance(advance: Advance, done: int, tests: int, what: str, passed_s: float, whole_s: float) -> None:
    advance(done * whole_s + passed_s, tests * whole_s, what)


def _name_and_spec(text: str) -> tuple[str, str | None]:
    return next(iter(pairs([text], "a model must be NAME or NAME=SPEC").items())) if "=" in text else (text, None)


def _arrivals(options: argparse.Namespace) -> Arrivals | None:
    """Return when requests are due; None for a closed loop."""
    from torchsurgeon.loadtest import Arrivals

    if options.closed_loop:
        if options.rate:
            raise LoadTestError("--closed-loop has no rate of its own; give --rate or --closed-loop")
        return None
    if options.arrivals in completion.SHAPES:
        if not options.rate:
            raise LoadTestError(
                f"arrivals of the shape {options.arrivals} need --rate R; --closed-loop finds the highest rate"
            )
        return Arrivals.named(options.arrivals)
    if not Path(options.arrivals).is_file():
        return Arrivals.named(options.arrivals)  # which says what there is
    return Arrivals.recorded(options.arrivals)


def _whole(target: Target, name: str, options: argparse.Namespace, access: dict[str, Any]) -> list[LoadRequest]:
    """Return requests for a whole model, from what the server says of it."""
    from torchsurgeon.loadtest import whole_requests
    from torchsurgeon.transport import HttpTransport

    if any(cut != "server" for cut in options.cut):
        raise LoadTestError(
            f"to cut the model {short(name)}, it must be known here; give {name[:100]}=SPEC in place of {name[:100]}"
        )
    with HttpTransport(options.url, **access) as transport:
        metadata = transport.get_json(f"/v2/models/{name}")
    return whole_requests(target, name, metadata, options.codec or ["raw"])


def _cuts(
    target: Target,
    name: str,
    spec: str,
    options: argparse.Namespace,
    input_spec: str | None,
    weights: str | None,
    leaves: Collection[str],
) -> list[LoadRequest]:
    """Return requests for cuts of a model."""
    from torchsurgeon.loadtest import cut_requests
    from torchsurgeon.models import specs
    from torchsurgeon.tracing import trace

    loaded = specs.load(spec, input_spec=input_spec, weights=weights)
    graph = trace(loaded.model, *loaded.args, leaf_modules=leaves, verify=options.verify, **loaded.kwargs)
    cuts = [index_or_name(cut) for cut in options.cut] or ["server"]
    return cut_requests(target, name, graph, loaded.args, loaded.kwargs, cuts=cuts, codecs=options.codec or ["raw"])
