"""A split model that is called by code which torch.compile compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, Frozen, right, split_of, top, truth
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import Server

INPUTS = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def split(server: Server) -> Iterator[ts.SplitModule]:
    with split_of(server, partition=2, fallback="error") as module:
        yield module
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_module_with_a_split_inside_is_compiled_around_it(split: ts.SplitModule, backend: str) -> None:
    own, ours = nn.Sequential(Frozen(), top(), nn.ReLU()).eval(), nn.Sequential(split, top(), nn.ReLU()).eval()
    ours.compile(backend=backend)
    for x in (INPUTS[:1], INPUTS[:2], INPUTS[:5], INPUTS):
        assert torch.equal(ours(x), own(x))
    ours(INPUTS).sum().backward()
    own(INPUTS).sum().backward()
    assert torch.equal(ours[1].weight.grad, own[1].weight.grad)  # type: ignore[arg-type]
    assert split.last is not None
    assert split.last.server is not None


def test_nothing_of_the_split_itself_is_compiled(split: ts.SplitModule) -> None:
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph.code)
        return graph.forward

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.top = split, top()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.top(self.split(x.abs()))

    torch.compile(Parent(), backend=backend)(EXAMPLE)
    assert len(compiled) == 2
    assert "abs" in compiled[0]
    assert "linear" in compiled[1]


def test_a_function_that_calls_a_split_is_compiled_around_it(split: ts.SplitModule) -> None:
    @torch.compile(backend="eager")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return split(x * 2) + 1

    assert torch.equal(twice(EXAMPLE), truth(EXAMPLE * 2) + 1)


def test_a_split_that_is_compiled_itself_runs_as_it_is(split: ts.SplitModule) -> None:
    assert right(torch.compile(split, backend="eager"))
    split.compile(backend="eager")
    assert right(split, INPUTS)
