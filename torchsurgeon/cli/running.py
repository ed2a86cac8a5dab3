"""``torchsurgeon demo``, ``serve``, ``run`` and ``link``: the two sides of a split model, and what lies between."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchsurgeon import codec
from torchsurgeon.cli.arguments import SPEC_HELP, pairs, port_number, whole_number
from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.models import specs
from torchsurgeon.module import SplitModule

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands

_RUNS = 10


def add_demo(commands: Commands) -> None:
    """Declare ``torchsurgeon demo``."""
    parser = commands.add_parser("demo", help="everything on this machine, over emulated links")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures and the results")
    parser.add_argument(
        "--slow", type=float, default=10.0, metavar="FACTOR", help="how much slower the device is than this machine"
    )
    parser.add_argument("--repeats", type=whole_number, default=5, help="inferences measured in each setting")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from torchsurgeon.demo import run

    # The default would end this process without a word and leave its server and links running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(options.out, slow=options.slow, repeats=options.repeats)


def add_serve(commands: Commands) -> None:
    """Declare ``torchsurgeon serve``."""
    parser = commands.add_parser("serve", help="serve the tails of models")
    parser.add_argument("models", nargs="+", metavar="NAME=SPEC", help=SPEC_HELP)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port_number, default=8000, help="0 takes a free one and says which")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help=".safetensors, .pt, or 'default'"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=SPEC", help="e.g. resnet=x:float32[1,3,320,320]"
    )
    parser.add_argument(
        "--leaf", action="append", default=[], metavar="NAME=MODULE", help="keep this module whole, as the device does"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--threads", type=whole_number, help="CPU threads of one inference")
    parser.add_argument("--max-batch", type=whole_number, default=64)
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from torchsurgeon import serve

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models, weights, inputs = pairs(options.models), pairs(options.weights), pairs(options.input)
    leaves: dict[str, list[str]] = {}
    for text in options.leaf:
        for name, module in pairs([text]).items():
            leaves.setdefault(name, []).append(module)
    for name in (*weights, *inputs, *leaves):
        if name not in models:
            raise TorchSurgeonError(
                f"no model {name!r} is served; --weights, --input and --leaf take {', '.join(models)}"
            )
    serve.run(
        models,
        options.host,
        options.port,
        weights=weights,
        input_specs=inputs,
        leaf_modules=leaves,
        seed=options.seed,
        max_batch=options.max_batch,
    )


def add_run(commands: Commands) -> None:
    """Declare ``torchsurgeon run``."""
    parser = commands.add_parser("run", help="run a model split with a server, and show where it is cut and why")
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument(
        "--server", action="append", required=True, metavar="URL", help="a torchsurgeon serve; for each to try"
    )
    parser.add_argument("--name", help="the model's name on the server; default SPEC's own name")
    parser.add_argument("--weights", metavar="FILE", help=".safetensors, .pt, or 'default'; the server's")
    parser.add_argument(
        "--leaf", action="append", default=[], metavar="MODULE", help="keep this module whole, as the server does"
    )
    parser.add_argument("--input", default="random", metavar="FILE", help="an image, or 'random' numbers")
    parser.add_argument(
        "--count", type=whole_number, metavar="N", help="inferences; default 10, with --watch until interrupted"
    )
    parser.add_argument("--interval", type=float, default=0.0, metavar="SECONDS", help="from start to start, at least")
    parser.add_argument("--partition", default="auto", help="auto, device, server, an index or a layer's name")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="of every inference")
    parser.add_argument("--fallback", choices=("local", "error"), default="local", help="when no server answers")
    parser.add_argument("--watch", action="store_true", help="draw a live view")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from torchsurgeon.cli import watch

    model = specs.load(options.spec, weights=options.weights)
    args, kwargs = model.args, model.kwargs
    partition: str | int = int(options.partition) if options.partition.isdigit() else options.partition
    with SplitModule(
        model.model,
        kwargs or args,
        server=options.server,
        name=options.name or specs.short_name(options.spec),
        partition=partition,
        fallback=options.fallback,
        deadline_s=options.deadline,
        leaf_modules=options.leaf,
    ) as split:
        if options.input != "random":
            args, kwargs = (codec.image_call(split.graph, options.input),), {}
        count = options.count or (None if options.watch else _RUNS)
        answer = watch.run(split, args, kwargs, count=count, interval_s=options.interval, live=options.watch)
        print(watch.answer_text(answer))


def add_link(commands: Commands) -> None:
    """Declare ``torchsurgeon link``."""
    parser = commands.add_parser("link", help="emulate a wireless link: a TCP proxy with a rate and a delay")
    parser.add_argument(
        "--listen", type=port_number, required=True, metavar="PORT", help="0 takes a free one and says which"
    )
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--profile", required=True, help="3g, lte, wifi, UP/DOWN/RTT (Mbit/s, s), or trace:UPFILE,DOWNFILE,RTT"
    )
    parser.set_defaults(run=_link)


def _link(options: argparse.Namespace) -> None:
    from torchsurgeon.emulate import LinkEmulator, parse_profile

    host, colon, port = options.to.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise TorchSurgeonError(f"--to {options.to!r} is not HOST:PORT")
    link = parse_profile(options.profile)
    emulator = LinkEmulator(options.listen, host.strip("[]"), int(port), link)
    print(f"ready: {link}; listening on {emulator.host}:{emulator.port}, to {options.to}", flush=True)
    emulator.run()
