"""Calls of a model in other threads while one thread traces it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.alone import alone, exporting

X, Z = torch.rand(2, 8), torch.rand(3, 8)
# What calls beside the traced one gave. A list would be taken for a memory of the model's, and emptied.
RESULTS: queue.SimpleQueue[Any] = queue.SimpleQueue()


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What a call in another thread gives, or raises."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(torch.no_grad()(call))
        return done.exception() or done.result()


class Beside(nn.Module):
    """In the main thread, every call has another one beside it."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.first, self.keeps = nn.Linear(8, 8), keeps

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.keeps:
            self.kept = y
        if threading.current_thread() is threading.main_thread():
            RESULTS.put(in_a_thread(lambda: self(Z)))
            if self.keeps:
                self.kept = y
        return self.kept.relu() if self.keeps else y.relu()


def results() -> list[Any]:
    return [RESULTS.get() for _ in range(RESULTS.qsize())]


@pytest.mark.parametrize("verify", [False, True])
def test_calls_beside_the_tracing_of_a_model_that_leaves_nothing_get_its_own_answer(verify: bool) -> None:
    model = Beside(keeps=False).eval()
    with torch.no_grad():
        expected = in_a_thread(lambda: model(Z))
        ts.trace(model, X, verify=verify)
    found = results()
    assert len(found) >= (2 if verify else 1)
    assert all(torch.equal(one, expected) for one in found)


def test_calls_beside_the_tracing_of_a_model_that_assigns_attributes_are_refused_once_that_is_known() -> None:
    model = Beside(keeps=True).eval()
    ts.trace(model, X)
    known = results()[1:]
    assert len(known) > 2
    assert all(isinstance(one, TraceError) and "being traced in another thread" in str(one) for one in known)
    # When it is traced again, it is known from the start.
    ts.trace(model, X, verify=False)
    assert all(isinstance(one, TraceError) for one in results())
    assert isinstance(in_a_thread(lambda: model(Z)), Tensor)


def test_calls_while_torch_export_follows_the_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    other = nn.Linear(8, 8)
    with alone(model):
        assert isinstance(in_a_thread(lambda: model(X)), Tensor)
        with exporting():
            assert "torch.export has replaced its weights" in str(in_a_thread(lambda: model[0](X)))
            assert isinstance(in_a_thread(lambda: other(X)), Tensor)
        assert isinstance(in_a_thread(lambda: model(X)), Tensor)


def test_pytorch_is_as_it_was_after_a_refused_trace() -> None:
    before = nn.Module.__call__
    with pytest.raises(TraceError):
        ts.trace(nn.Dropout().train(), X)
    with pytest.raises(TraceError):
        ts.trace(Beside(keeps=False).eval(), torch.rand(2, 9))
    assert nn.Module.__call__ is before


def test_two_threads_may_trace_at_once() -> None:
    models = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(lambda model: ts.trace(model, X), models))
    assert [len(graph.layers) for graph in graphs] == [2] * 4
