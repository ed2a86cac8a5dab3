"""``torchsurgeon demo``, ``run`` and ``link``: a split model at work, and the link to its server."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchsurgeon.cli import completion
from torchsurgeon.cli.access import access, access_arguments
from torchsurgeon.cli.arguments import (
    SPEC_HELP,
    command,
    index_or_name,
    leaf_argument,
    number,
    port_number,
    seconds,
    threads_argument,
    weights_argument,
    whole_number,
)
from torchsurgeon.cli.completion import completed, one_of
from torchsurgeon.cli.files import check_model
from torchsurgeon.cli.screen import loading, warn
from torchsurgeon.errors import TorchSurgeonError, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands

_RUNS = 10
# No server is waited for so long, so a longer deadline is most likely in milliseconds.
_LONGEST_DEADLINE_S = 30.0


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


def add_run(commands: Commands) -> None:
    """Declare ``torchsurgeon run``."""
    parser = command(
        commands,
        _run,
        "run",
        "Run a model split with a server, and show where it is cut and why.",
        "torchvision:alexnet --server http://127.0.0.1:8000",
        "torchvision:alexnet --server http://edge:8000 --server http://cloud:8000 --deadline 200ms --watch",
        "torchvision:alexnet --server https://edge:8000 --token-file token.txt --ca ca.pem",
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
    access_arguments(parser)
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
        type=seconds,
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
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        help="when each answer is due, from its call, such as 0.2 or 200ms (default: never)",
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
    token, ca, cert = access(options)
    check_model(options)
    if options.deadline is not None and options.deadline > _LONGEST_DEADLINE_S:
        given = f"{options.deadline:g}"
        warn(f"--deadline {given} s is longer than any server is waited for; write {given}ms if milliseconds are meant")
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
        token=token,
        ca=ca,
        cert=cert,
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
