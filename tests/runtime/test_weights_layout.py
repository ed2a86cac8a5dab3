"""Weights that lie otherwise in memory on the two sides: other kernels run, so answers are the same to rounding."""

from __future__ import annotations

import pytest
import torch
from classifier import remote, until
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app

X = torch.rand(3, 300, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1000), nn.ReLU(), nn.Linear(1000, 100)
        return nn.Sequential(*layers).eval().requires_grad_(False)


def transpose(model: nn.Sequential) -> None:
    """Have the weights of linear layers lie column by column, with the same elements."""
    for i in (0, 2, 4):
        model[i].weight = nn.Parameter(model[i].weight.t().contiguous().t(), requires_grad=False)


@pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")
@pytest.mark.parametrize("exact", [False, True])
def test_answers_have_the_same_bits_only_while_weights_lie_alike(exact: bool) -> None:
    model, other = net(), net()
    registry = ModelRegistry(profiler=None)
    registry.add("net", other, X)
    with (
        Server(create_app(registry)) as server,
        ts.SplitModule(model, X, server=server.url, name="net", partition=1, exact=exact) as split,
    ):

        def answered() -> tuple[bool, str]:
            split.prepare()
            answer = split(X)
            assert split.last is not None
            assert torch.equal(answer, model(X)) or split.last.bits != "same bits"
            return split.last.degraded is None, split.last.bits

        assert answered() == (True, "same bits")
        transpose(model)
        assert answered() == ((False, "same bits") if exact else (True, "same to rounding"))
        assert split.last is not None
        assert "layout" in str(split.last.degraded if exact else split.last.inexact_because)
        transpose(other)
        until(lambda: remote(split), split, lambda split: torch.equal(split(X), model(X)))
        assert answered() == (True, "same bits")
    registry.close()
