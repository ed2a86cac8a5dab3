"""A model of the coverage table with the calls it is tried with, and tensors to call it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is tried.

    Attributes:
        model: the model, in eval mode.
        args: the positional arguments that it is traced with.
        kwargs: the keyword arguments that it is traced with.
        other: a call of other sizes; None to try twice the batch and other image sizes.
        note: what else is unusual about the call, for the page.
        refusal: a regular expression that the reason for refusing the model matches; empty where it must be traced.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    other: Arguments | None = None
    note: str = ""
    refusal: str = ""


Factory = Callable[[], Case]


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(sum(shape)))
