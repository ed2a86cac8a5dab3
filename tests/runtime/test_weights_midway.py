"""Weights that change while a call is under way: no answer has an old head and a new tail, and no call changes them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from classifier import PATIENCE_S, degraded
from torch import nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.transport import Answer, InProcessTransport

X = torch.linspace(-1, 1, 8).reshape(1, 8)


class Midway(InProcessTransport):
    """Calls ``meanwhile`` once before it sends the tensors of an inference."""

    meanwhile: Callable[[], Any] | None = None

    def infer(self, *args: Any, **kwargs: Any) -> Answer:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().infer(*args, **kwargs)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval().requires_grad_(False)


def double(*models: nn.Module) -> None:
    for model in models:
        model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("fallback", ["local", "error"])
def test_an_old_head_is_not_finished_with_new_weights_that_another_call_has_noticed(fallback: Any) -> None:
    model, other = net(), net()
    registry = ModelRegistry(profiler=None)
    registry.add("net", other, X)
    with (
        Midway(create_app(registry)) as transport,
        ts.SplitModule(model, X, server=transport, name="net", partition=1, fallback=fallback) as split,
    ):
        assert torch.equal(split(X), model(X))

        def both() -> None:
            double(model, other)
            split.prepare()

        transport.meanwhile = both
        if fallback == "error":
            with pytest.raises(ts.ModelMismatchError, match="changed since this call began; call it again"):
                split(X)
        else:
            assert torch.equal(split(X), model(X))
            assert degraded(split) == (
                "weights: this model's weights have changed since the handshake; load the same on the server"
            )
        assert torch.equal(split(X), model(X))
        assert split.last is not None
        assert split.last.degraded is None
    registry.close()


@pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")
@pytest.mark.parametrize("fallback", ["local", "error"])
@pytest.mark.parametrize("partition", [1, "auto"])
def test_a_head_of_weights_that_change_while_a_server_is_made_ready_is_not_finished_with_the_old_ones(
    partition: Any, fallback: Any
) -> None:
    model = net()
    registry = ModelRegistry()
    registry.add("net", net(), X)

    class Changing(InProcessTransport):
        def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
            told = super().get_json(path, timeout_s=timeout_s)
            if path.endswith("/fingerprint") and torch.equal(model[0].weight, net()[0].weight):
                double(model)
            return told

    with (
        Changing(create_app(registry)) as transport,
        ts.SplitModule(model, X, server=transport, name="net", partition=partition, fallback=fallback) as split,
    ):
        if fallback == "error":
            with pytest.raises(ts.ModelMismatchError, match="changed since this call began; call it again"):
                split(X)
            with pytest.raises(ts.ModelMismatchError, match="other weights on the server"):
                split(X)
        else:
            for _ in range(2):
                assert torch.equal(split(X), model(X))
    registry.close()


def test_a_head_of_weights_that_change_while_parts_are_compiled_is_not_finished_with_the_old_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    registry = ModelRegistry(profiler=None)
    registry.add("net", net(), X)
    options: dict[str, Any] = {"partition": 1, "fallback": "error", "backend": lambda part: part}
    with (
        InProcessTransport(create_app(registry)) as transport,
        ts.SplitModule(model, X, server=transport, name="net", **options) as split,
    ):
        assert torch.equal(split(X), model(X))
        monkeypatch.setattr(split._engine.parts, "due", lambda *_: True)
        monkeypatch.setattr(split._engine.parts, "compile", lambda *_: double(model))
        with pytest.raises(ts.ModelMismatchError, match="changed since this call began; call it again"):
            split(X)
    registry.close()


def test_a_late_tail_on_the_device_does_not_finish_an_old_head_with_new_weights() -> None:
    model, ended = net(), threading.Event()
    registry = ModelRegistry(profiler=None)
    registry.add("net", net(), X)
    with (
        Midway(create_app(registry)) as transport,
        ts.SplitModule(model, X, server=transport, name="net", partition=1) as split,
    ):
        split(X)
        under_way = threading.Event()

        def wait() -> None:
            under_way.set()
            ended.wait(PATIENCE_S)

        transport.meanwhile = wait
        answer = split.submit(X)
        assert under_way.wait(PATIENCE_S)
        time.sleep(0.02)  # the device looks at its weights once the request is on its way, before it waits
        double(model)
        assert torch.equal(answer.result(PATIENCE_S), model(X))
        ended.set()
    registry.close()


@pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")
def test_a_request_does_not_count_in_the_statistics_of_a_model_that_is_trained_on_the_server() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval().requires_grad_(False)
    other, example = copy.deepcopy(model), torch.rand(4, 8)
    registry = ModelRegistry(profiler=None)
    registry.add("net", other, example)
    with (
        Midway(create_app(registry)) as transport,
        ts.SplitModule(model, example, server=transport, name="net", partition=1) as split,
    ):
        split(example)
        before = copy.deepcopy(other.state_dict())
        other.train()
        assert torch.equal(split(example), model(example))
        assert "training mode" in degraded(split)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    registry.close()
