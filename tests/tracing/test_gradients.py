"""What a model asks of gradients is answered as for ``model(x)`` under ``torch.no_grad()``, or the call is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import split
from small_models import model
from torch import Tensor, is_inference_mode_enabled, nn

import torchsurgeon as ts
from torchsurgeon.errors import TraceError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

QUESTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "requires_grad": lambda self, x: x.requires_grad,
    "is_leaf": lambda self, x: not x.is_leaf,
    "grad_fn": lambda self, x: x.grad_fn is not None,
    "requires_grad of a view": lambda self, x: x.contiguous().requires_grad,
    "requires_grad by getattr": lambda self, x: getattr(x, "requires_" + "grad"),
}
OF_INFERENCE: dict[str, Callable[[Any, Tensor], Any]] = {
    "is_inference": lambda self, x: x.is_inference(),
    "is_inference of a result": lambda self, x: self.first(x).is_inference(),
    "is_inference_mode_enabled": lambda self, x: torch.is_inference_mode_enabled(),
    "is_inference_mode_enabled by another name": lambda self, x: is_inference_mode_enabled(),
}


def asking(question: Callable[[Any, Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.first(x) + (100 if question(self, x) else 0))

    return model(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 8))


def same_at_every_cut(made: nn.Module, given: Callable[[], Tensor], reason: str, *contexts: Any) -> None:
    """A split model answers as the model does in the same context, without a server's help."""
    with split(made, X) as module:
        for point in module.graph.points:
            module.partition = point.index
            with contextlib.ExitStack() as inside:
                for context in contexts:
                    inside.enter_context(context())
                with torch.no_grad():
                    expected = made(given())
                assert torch.equal(module(given()), expected)
            assert module.last is not None
            if point.index < len(module.graph.layers):
                assert reason in str(module.last.degraded)


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_input_that_requires_gradients_is_answered_by_a_model_that_asks_for_that(name: str) -> None:
    def of_a_graph() -> Tensor:
        with torch.enable_grad():
            return X.clone().requires_grad_() * 1

    made = asking(QUESTIONS[name])
    assert ts.trace(made, X).traced_by == "recorded"
    same_at_every_cut(made, of_a_graph, "requires gradients")


@pytest.mark.parametrize("name", OF_INFERENCE)
def test_a_call_in_inference_mode_is_answered_by_a_model_that_asks_for_that(name: str) -> None:
    made = asking(OF_INFERENCE[name])
    assert ts.trace(made, X).traced_by == "recorded"
    same_at_every_cut(made, lambda: X * 1, "inference_mode", torch.inference_mode)


def test_a_tensor_of_inference_mode_is_answered_by_a_model_that_asks_for_that() -> None:
    def made_there() -> Tensor:
        with torch.inference_mode():
            return X * 1

    same_at_every_cut(asking(OF_INFERENCE["is_inference"]), made_there, "inference_mode")


def test_models_that_ask_nothing_take_any_input_and_mode() -> None:
    made = asking(lambda self, x: torch.is_grad_enabled())
    with split(made, X) as module:
        module.partition = 1
        expected = made(X.clone()) if not torch.is_grad_enabled() else torch.no_grad()(made)(X)
        for context in (torch.inference_mode, torch.enable_grad, torch.no_grad):
            with context():
                assert torch.equal(module(X.clone()), expected)
                assert module.last is not None
                assert module.last.degraded is None
        assert torch.equal(module(X.clone().requires_grad_()), expected)
        assert module.last.degraded is None


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_where_a_model_is_traced_does_not_change_what_it_is_asked(context: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + (100 if torch.is_grad_enabled() or y.requires_grad or y.is_inference() else 0)

    made = model(forward, first=nn.Linear(8, 8))
    with context():
        graph = ts.trace(made, X)
    part = ts.cut(graph, 1)
    with torch.no_grad():
        assert torch.equal(part.tail(*part.head(X)), made(X))


def test_a_model_that_reads_how_often_a_tensor_was_written_to_is_refused_by_name() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(x) * (2 if x._version else 3)

    with pytest.raises(TraceError, match="how often a tensor was written to"):
        ts.trace(model(forward, first=nn.Linear(8, 8)), X)


class Inner(nn.Module):
    """Cannot be followed, and asks."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return x + (100 if x.requires_grad or x.is_inference() or torch.is_grad_enabled() else 0)


def test_a_whole_module_that_asks_is_called_as_under_no_grad() -> None:
    made = model(lambda self, x: self.last(self.inner(x)), inner=Inner(), last=nn.Linear(8, 8))
    graph = ts.trace(made, X)
    assert "inner" in graph.opaque
    head = ts.cut(graph, 1).head
    with torch.no_grad():
        head(X)
    with torch.enable_grad(), pytest.raises(TypeError, match="no_grad"):
        head(X)
    with torch.inference_mode(), pytest.raises(TypeError, match="inference_mode"):
        head(X)
    with torch.no_grad(), pytest.raises(TypeError, match=r"pass x.detach\(\)"):
        head(X.clone().requires_grad_())
