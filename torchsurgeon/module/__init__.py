"""The class that most users meet: a model whose head runs on this device and whose tail runs on a server."""

from __future__ import annotations

from torchsurgeon.module.arguments import ServerAddress
from torchsurgeon.module.split import SplitModule

__all__ = ["ServerAddress", "SplitModule"]
