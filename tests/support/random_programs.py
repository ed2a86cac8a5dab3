"""Random programs of views, in-place operators and shared memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

Pool = list[Any]


OPERATIONS: dict[str, Callable[[nn.Module, Pool, int, int, int], Any]] = {
    # new memory
    "linear": lambda m, p, i, j, k: m.linear(p[i]),
    "tanh": lambda m, p, i, j, k: p[i].tanh(),
    "add": lambda m, p, i, j, k: p[i] + p[j],
    "scaled by a size": lambda m, p, i, j, k: p[i] * (p[j].shape[k % p[j].dim()] + k),
    "cat": lambda m, p, i, j, k: torch.cat([p[i], p[j]], k % p[i].dim()),
    "max": lambda m, p, i, j, k: p[i].max(k % p[i].dim()).values,
    "sum": lambda m, p, i, j, k: p[i].sum(k % p[i].dim()),
    "parameter": lambda m, p, i, j, k: p[i] * m.scale,
    "zeros": lambda m, p, i, j, k: torch.zeros(4, 6),
    "zeros like": lambda m, p, i, j, k: torch.zeros_like(p[i]),
    "clone": lambda m, p, i, j, k: p[i].clone(),
    # the same memory
    "slice": lambda m, p, i, j, k: p[i][..., k % 3 :],
    "row": lambda m, p, i, j, k: p[i][k % 2],
    "transpose": lambda m, p, i, j, k: p[i].transpose(-1, -2),
    "chunk": lambda m, p, i, j, k: torch.chunk(p[i], 2, k % p[i].dim())[k % 2],
    "unbind": lambda m, p, i, j, k: p[i].unbind(-1)[k % 2],
    "flatten": lambda m, p, i, j, k: p[i].flatten(),
    "view": lambda m, p, i, j, k: p[i].view(p[j].shape),
    "expand": lambda m, p, i, j, k: p[i].expand(3, 4, 6),
    "expand as": lambda m, p, i, j, k: p[i].expand_as(p[j]),
    "contiguous": lambda m, p, i, j, k: p[i].contiguous(),
    "identity": lambda m, p, i, j, k: m.identity(p[i]),
    "detach": lambda m, p, i, j, k: p[i].detach(),
    # overwriting
    "add_": lambda m, p, i, j, k: p[i].add_(p[j]),
    "mul_": lambda m, p, i, j, k: p[i].mul_(0.5 + k),
    "relu_": lambda m, p, i, j, k: m.relu(p[i]),
    "copy_": lambda m, p, i, j, k: p[i].copy_(p[j]),
    "iadd": lambda m, p, i, j, k: _added(p[i], p[j]),
    "set item": lambda m, p, i, j, k: p[i].__setitem__(k % 2, p[j]),
    "set slice": lambda m, p, i, j, k: p[i].__setitem__((..., slice(k % 3)), float(k)),
    "out": lambda m, p, i, j, k: torch.mul(p[i], 2, out=p[j]),
}


def _added(x: Any, y: Any) -> Any:
    x += y
    return x


class Program(nn.Module):
    """Runs a list of operations on a growing pool of tensors, and returns some of them."""

    def __init__(self, operations: list[tuple[str, int, int, int]], outputs: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operations, self.outputs = operations, outputs
        self.linear, self.relu, self.identity = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Any, y: Any) -> Any:
        pool = [x, y]
        for name, i, j, k in self.operations:
            value = OPERATIONS[name](self, pool, i % len(pool), j % len(pool), k)
            pool.append(pool[i % len(pool)] if value is None else value)
        return [pool[0].tanh(), *(pool[i % len(pool)] for i in self.outputs)]


def possible(operations: list[tuple[str, int, int, int]], outputs: list[int]) -> Program:
    """The program without the operations that eager PyTorch refuses."""
    kept: list[tuple[str, int, int, int]] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for operation in operations:
            try:
                Program([*kept, operation], outputs)(*example())
            except (RuntimeError, IndexError, TypeError, ZeroDivisionError, UserWarning):
                continue
            kept.append(operation)
    return Program(kept, outputs).eval()


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


operation = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5))
