"""``torchsurgeon trace`` and ``doctor``: what a model is like, and where it can be cut."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from torchsurgeon.cli.arguments import model_arguments, traced
from torchsurgeon.cli.screen import console
from torchsurgeon.cutting import doctor
from torchsurgeon.models import specs

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands


def add_trace(commands: Commands) -> None:
    """Declare ``torchsurgeon trace``."""
    parser = commands.add_parser("trace", help="list a model's layers and partition points")
    model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_trace)


def _trace(options: argparse.Namespace) -> None:
    graph = traced(options)
    if options.json:
        print(json.dumps(graph.to_json()))
        return
    from torchsurgeon.report import graph_table

    console().print(graph_table(graph))


def add_doctor(commands: Commands) -> None:
    """Declare ``torchsurgeon doctor``."""
    parser = commands.add_parser(
        "doctor", help="tell what splitting a model is like: tracing, opaque parts, cuts that can pay"
    )
    model_arguments(parser)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    from torchsurgeon.report import diagnosis_text

    model = specs.load(options.spec, input_spec=options.input)
    found = doctor.examine(model.model, *model.args, leaf_modules=options.leaf, **model.kwargs)
    console().print(diagnosis_text(found))
