"""The tail server: it holds models, and runs the part of a model that turns the tensors it is sent into the output."""

from __future__ import annotations

from torchsurgeon.serve.app import TailApp, create_app
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.running import run
from torchsurgeon.serve.served import ServedModel
from torchsurgeon.serve.server import Server

__all__ = ["ModelRegistry", "ServedModel", "Server", "TailApp", "create_app", "run"]
