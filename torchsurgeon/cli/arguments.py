"""What arguments of several commands mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree

from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.models import specs
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.tracer import trace

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

SPEC_HELP = "torchvision:NAME, package.module:factory, or a .pt2 file"


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that name a model and how it is traced."""
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument("--input", metavar="SPEC", help="example input, e.g. x:float32[1,3,224,224]")
    parser.add_argument(
        "--leaf", action="append", default=[], metavar="MODULE", help="keep this module whole, as one layer"
    )


def traced(options: argparse.Namespace, device: torch.device | None = None, weights: str | None = None) -> LayerGraph:
    """Return the graph of the model that :func:`model_arguments` name, on ``device`` where one is given."""
    loaded = specs.load(options.spec, input_spec=options.input, weights=weights)
    args, kwargs = loaded.args, loaded.kwargs
    if device is not None:
        loaded.model.to(device)
        args, kwargs = _pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    return trace(loaded.model, *args, leaf_modules=options.leaf, **kwargs)


def whole_number(text: str) -> int:
    """Return the whole number from 1 on that an argument is. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def port_number(text: str) -> int:
    """Return the port that an argument is, 0 for a free one. Raises ArgumentTypeError."""
    # getaddrinfo takes 65536 and more, and means another port.
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give one from 0 to 65535")
    return int(text)


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return what ``NAME=VALUE`` arguments name. Raises TorchSurgeonError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise TorchSurgeonError(f"{text!r} is not NAME=VALUE")
        if name in found:
            raise TorchSurgeonError(f"the name {name!r} is given twice")
        found[name] = value
    return found
