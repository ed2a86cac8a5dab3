"""``torchsurgeon demo``, ``serve``, ``run`` and ``link``: the two sides of a split model, and the link between them."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import (
    SPEC_HELP,
    WEIGHTS_HELP,
    command,
    index_or_name,
    leaf_argument,
    number,
    pairs,
    port_number,
    threads_argument,
    weights_argument,
    whole_number,
)
from torchsurgeon.cli.completion import completed, named, one_of
from torchsurgeon.cli.screen import loading
from torchsurgeon.errors import TorchSurgeonError, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands

_RUNS = 10


def add_demo(commands: Commands) -> None:
    """Declare ``torchsurgeon demo``."""
    parser = command(
        commands,
        _demo,
        "demo",
        "Show the main job on this machine: a classifier of photographs, split over emulated links.",
        "",
        "--slow 40 --photos photos/ --out results",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the pictures and the results (default: %(default)s)",
    )
    parser.add_argument(
        "--slow",
        type=number,
        default=20.0,
        metavar="FACTOR",
        help="how many times slower than this machine the device is (default: %(default)s)",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="folder of photographs (default: the two that come with scikit-learn)",
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="photographs measured in each setting (default: %(default)s)",
    )


def _demo(options: argparse.Namespace) -> None:
    with loading():
        from torchsurgeon.demo import run

    # By default SIGTERM would end this process at once and leave its server and links running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(options.out, slow=options.slow, repeats=options.repeats, photos=options.photos)


def add_serve(commands: Commands) -> None:
    """Declare ``torchsurgeon serve``."""
    parser = command(
        commands,
        _serve,
        "serve",
        "Serve models: run the part of each that a device does not run.",
        "alexnet=torchvision:alexnet",
        "mine=my_package.models:make --weights mine=mine.safetensors --host 0.0.0.0 --port 9000",
    )
    models = parser.add_argument(
        "models", nargs="+", metavar="NAME=SPEC", help=f"the name under which a model is served, and {SPEC_HELP}"
    )
    completed(models, named(completion.specs))
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; nothing is encrypted, and anyone who reaches it may use it (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=8000,
        help="port to listen on; 0 takes a free one and prints it (default: %(default)s)",
    )
    weights = parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"weights of a model: {WEIGHTS_HELP}; may be repeated (default: random ones)",
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
    leaf_argument(parser, "NAME=MODULE", "keep this submodule of a model whole, as the device does")
    codec = parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a codec that was fitted to a model (codecs --fit), as devices have it; may be repeated (default: none)",
    )
    completed(codec, named(one_of((), "fitted")))
    backend = parser.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME=BACKEND",
        help="what runs a model's layers in place of eager PyTorch: onnxruntime, openvino, openvino:bf16, inductor or "
        "aot; of several with commas between, devices may choose; may be repeated (default: eager)",
    )
    completed(backend, named(one_of(completion.BACKENDS)))
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="seed of random weights (default: %(default)s)"
    )
    threads_argument(parser)
    parser.add_argument(
        "--max-batch",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="largest batch that a request may have (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=whole_number(1),
        metavar="N",
        help="requests of one model that run at once, each on --threads threads (default: so many that they use each "
        "core once)",
    )
    parser.add_argument(
        "--batching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run requests together that wait and are alike, where a model allows it (default: --batching)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="run them together only as far as each answer keeps the bits that it has alone (default: also where it "
        "is the same to rounding, which devices are told)",
    )
    parser.add_argument(
        "--max-queue",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="requests of one model that may wait; another one is answered with 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-connections",
        type=whole_number(1),
        default=512,
        metavar="N",
        help="most connections; for another one, the one that has been idle the longest is closed (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--max-connections-per-address",
        type=whole_number(1),
        metavar="N",
        help="most connections from one address (default: half of --max-connections, and no limit for this machine's "
        "own address)",
    )
    parser.add_argument(
        "--grace-s",
        type=number,
        default=10.0,
        metavar="SECONDS",
        help="after SIGTERM or Ctrl-C, longest time for the requests that are under way (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="how the log is written to standard error; with json, what is printed otherwise is part of it (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write a line for each request: client, id, model, cut, status and milliseconds (default: "
        "--no-access-log)",
    )
    parser.add_argument(
        "--metrics",
        action="store_true",
        help="answer GET /metrics with what the server does, for Prometheus (default: no such path)",
    )


def _serve(options: argparse.Namespace) -> None:
    models, weights, inputs = pairs(options.models), pairs(options.weights), pairs(options.input)
    backends = pairs(options.backend)
    leaves: dict[str, list[str]] = {}
    for text in options.leaf:
        for name, module in pairs([text]).items():
            leaves.setdefault(name, []).append(module)
    codecs: dict[str, list[str]] = {}
    for text in options.codec:
        for name, path in pairs([text]).items():
            codecs.setdefault(name, []).append(path)
    for name in (*weights, *inputs, *leaves, *codecs, *backends):
        if name not in models:
            raise TorchSurgeonError(
                f"--weights, --input, --leaf, --codec and --backend take the name of a served model; got "
                f"{short(name, 100)}, and the served models are {short(list(models), 200)}"
            )
    with loading():
        import torch

        from torchsurgeon import serve

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    serve.run(
        models,
        options.host,
        options.port,
        weights=weights,
        input_specs=inputs,
        leaf_modules=leaves,
        codecs=codecs,
        backends=backends,
        verify=options.verify,
        seed=options.seed,
        max_batch=options.max_batch,
        concurrency=options.concurrency,
        max_queue=options.max_queue,
        batching="off" if not options.batching else "exact" if options.exact else "rounded",
        max_connections=options.max_connections,
        max_connections_per_address=options.max_connections_per_address,
        grace_s=options.grace_s,
        log_format=options.log_format,
        access_log=options.access_log,
        metrics=options.metrics,
    )


def add_run(commands: Commands) -> None:
    """Declare ``torchsurgeon run``."""
    parser = command(
        commands,
        _run,
        "run",
        "Run a model split with a server, and show where it is cut and why.",
        "torchvision:alexnet --server http://127.0.0.1:8000",
        "torchvision:alexnet --server http://edge:8000 --server http://cloud:8000 --deadline 0.2 --watch",
    )
    completed(parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP), completion.specs)
    parser.add_argument(
        "--server",
        action="append",
        required=True,
        metavar="URL",
        help="a torchsurgeon serve; may be repeated, in the order in which they are preferred",
    )
    parser.add_argument("--name", help="the model's name on the server (default: the last part of SPEC)")
    weights_argument(parser)
    leaf_argument(parser, "MODULE", "keep this submodule whole, as the server does")
    image = parser.add_argument(
        "--input",
        default="random",
        metavar="FILE",
        help="an image, or 'random' for random numbers (default: %(default)s)",
    )
    completed(image, one_of(("random",), "jpg", "jpeg", "png", "webp"))
    parser.add_argument(
        "--count",
        type=whole_number(1),
        metavar="N",
        help="how many inferences (default: 10; with --watch until interrupted)",
    )
    parser.add_argument(
        "--interval",
        type=number,
        default=0.0,
        metavar="SECONDS",
        help="shortest time from the start of one inference to the next (default: %(default)s)",
    )
    partition = parser.add_argument(
        "--partition",
        default="auto",
        metavar="POINT",
        help="where to cut: auto, device, server, a partition index or a layer's name (default: %(default)s)",
    )
    completed(partition, one_of(("auto", "device", "server")))
    parser.add_argument(
        "--deadline", type=number, metavar="SECONDS", help="when each answer is due, from its call (default: never)"
    )
    parser.add_argument(
        "--fallback",
        choices=("local", "error"),
        default="local",
        help="when no server answers, run the rest here or fail (default: %(default)s)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="use only answers with the same bits as this device's, not those that are the same to rounding (default: "
        "use both)",
    )
    threads_argument(parser)
    parser.add_argument("--watch", action="store_true", help="draw a live view (default: a line for each inference)")


def _run(options: argparse.Namespace) -> None:
    if options.input != "random" and not Path(options.input).is_file():
        raise TorchSurgeonError(f"--input must be an image or 'random'; there is no file {short(options.input)}")
    with loading():
        import torch

        from torchsurgeon import codec
        from torchsurgeon.cli import watch
        from torchsurgeon.models import specs
        from torchsurgeon.module import SplitModule

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = specs.load(options.spec, weights=options.weights)
    args, kwargs = model.args, model.kwargs
    with SplitModule(
        model.model,
        kwargs or args,
        server=options.server,
        name=options.name or specs.short_name(options.spec),
        partition=index_or_name(options.partition),
        fallback=options.fallback,
        deadline_s=options.deadline,
        exact=options.exact,
        leaf_modules=options.leaf,
        verify=options.verify,
    ) as split:
        if options.input != "random":
            args, kwargs = (codec.image_call(split.graph, options.input),), {}
        count = options.count or (None if options.watch else _RUNS)
        answer = watch.run(split, args, kwargs, count=count, interval_s=options.interval, live=options.watch)
        print(watch.answer_text(answer))


def add_link(commands: Commands) -> None:
    """Declare ``torchsurgeon link``."""
    parser = command(
        commands,
        _link,
        "link",
        "Emulate a wireless link: a TCP proxy with a rate and a delay.",
        "--listen 9000 --to 127.0.0.1:8000 --profile lte",
        "--listen 9000 --to 127.0.0.1:8000 --profile trace:up.txt,down.txt,0.06",
    )
    parser.add_argument(
        "--listen",
        type=port_number,
        required=True,
        metavar="PORT",
        help="port to listen on; 0 takes a free one and prints it",
    )
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="where connections go on to")
    profile = parser.add_argument(
        "--profile",
        required=True,
        help=f"{', '.join(completion.LINKS)}, UP/DOWN/RTT in Mbit/s and seconds, or a recording "
        "trace:UPFILE,DOWNFILE,RTT",
    )
    completed(profile, one_of(completion.LINKS))


def _link(options: argparse.Namespace) -> None:
    with loading():
        from torchsurgeon.emulate import LinkEmulator, parse_profile

    host, colon, port = options.to.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise TorchSurgeonError(f"--to must be HOST:PORT; got {short(options.to)}")
    link = parse_profile(options.profile)
    emulator = LinkEmulator(options.listen, host.strip("[]"), int(port), link)
    print(f"ready: {link}; listening on {emulator.host}:{emulator.port}, to {options.to}", flush=True)
    emulator.run()
