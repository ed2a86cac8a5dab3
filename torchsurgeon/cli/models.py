"""``torchsurgeon trace`` and ``doctor``: what a model is like, and where it can be cut."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from torchsurgeon.cli.access import Access, access, access_arguments
from torchsurgeon.cli.arguments import command, model_arguments, traced, weights_argument
from torchsurgeon.cli.files import check_model
from torchsurgeon.cli.screen import console, loading

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands
    from torchsurgeon.models import Model


def add_trace(commands: Commands) -> None:
    """Declare ``torchsurgeon trace``."""
    parser = command(
        commands,
        _trace,
        "trace",
        "List a model's layers, and what crosses when it is cut after each.",
        "torchvision:resnet50",
        "my_package.models:make --input x:float32[1,3,64,64] --json",
    )
    model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON (default: print a table)")


def _trace(options: argparse.Namespace) -> None:
    check_model(options)
    graph = traced(options)
    if options.json:
        print(json.dumps(graph.to_json()))
        return
    with loading():
        from torchsurgeon.report import graph_table

    console().print(graph_table(graph))


def add_doctor(commands: Commands) -> None:
    """Declare ``torchsurgeon doctor``."""
    parser = command(
        commands,
        _doctor,
        "doctor",
        "Tell how well a model can be split: how it is traced, and which cuts can pay.",
        "torchvision:resnet50",
        "my_package.models:make --leaf encoder",
        "torchvision:resnet50 --weights default --server http://edge:8000",
    )
    model_arguments(parser)
    weights_argument(parser)
    parser.add_argument(
        "--server",
        metavar="URL",
        help="a torchsurgeon serve of this model: say whether its answers have the same bits as this device's "
        "(default: none is asked)",
    )
    parser.add_argument("--name", help="the model's name on the server (default: the last part of SPEC)")
    access_arguments(parser)


def _doctor(options: argparse.Namespace) -> None:
    let_in = access(options)
    check_model(options)
    with loading():
        from torchsurgeon.cutting import doctor
        from torchsurgeon.models import specs
        from torchsurgeon.report import diagnosis_text
        from torchsurgeon.transport import HttpTransport

    name = options.name or specs.short_name(options.spec)
    if options.server is not None:
        # Examining a model takes long, so a server that cannot be asked afterwards is told of before.
        with HttpTransport(options.server, token=let_in.token, verify=let_in.ca, cert=let_in.cert) as transport:
            transport.get_json(f"/v2/models/{name}")
    model = specs.load(options.spec, input_spec=options.input, weights=options.weights)
    found = doctor.examine(model.model, *model.args, leaf_modules=options.leaf, verify=options.verify, **model.kwargs)
    console().print(diagnosis_text(found))
    if options.server is not None:
        print(_compared(options, model, name, let_in))


def _compared(options: argparse.Namespace, model: Model, name: str, let_in: Access) -> str:
    """Return whether a server's answers have the same bits as this device's, and if not, what differs."""
    from torchsurgeon.module import SplitModule

    with SplitModule(
        model.model,
        model.kwargs or model.args,
        server=options.server,
        name=name,
        partition="server",
        fallback="error",
        leaf_modules=options.leaf,
        verify=options.verify,
        token=let_in.token,
        ca=let_in.ca,
        cert=let_in.cert,
    ) as split:
        (server,) = split.prepare().stats()["servers"]
    because = ", ".join(server["inexact_because"])
    if not because:
        return f"{server['server']} gives the same bits as this device"
    return f"{server['server']} gives the same answers as this device to rounding only, because these differ: {because}"
