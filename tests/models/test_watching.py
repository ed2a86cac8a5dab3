"""Weights that change are noticed however they are written to; the background thread comes and goes with its owner."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchsurgeon.models import watching
from torchsurgeon.models.watching import Patrol, WatchedWeights

PATIENCE_S = 60.0


class Model(nn.Module):
    """Holds one weight, with the memory of a NumPy array, and a batch norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.array = np.ones(size, dtype=np.float32)
        self.weight = nn.Parameter(torch.from_numpy(self.array), False)
        self.norm: Any = nn.BatchNorm1d(4)


def inference_weight(model: Any) -> None:
    with torch.inference_mode():
        model.weight = nn.Parameter(torch.ones(len(model.weight)), False)


def aliased(weight: Tensor) -> Tensor:
    return torch.empty(0).set_(weight.untyped_storage())


# Each writes to the last element of the weight, in a way that PyTorch does not count.
WRITES: dict[str, Callable[[Any], object]] = {
    "data": lambda model: model.weight.data[-1:].mul_(2),
    "data.copy_": lambda model: model.weight.data.copy_(torch.cat([model.weight[:-1], torch.zeros(1)])),
    "detached data": lambda model: model.weight.data.detach()[-1:].zero_(),
    "numpy": lambda model: model.weight.numpy().__setitem__(-1, 5.0),
    "the array it was made from": lambda model: model.array.__setitem__(-1, 5.0),
    "its storage": lambda model: model.weight.untyped_storage().__setitem__(model.weight.nbytes - 1, 7),
    "another tensor on its storage": lambda model: aliased(model.weight)[-1:].zero_(),
    "its address": lambda model: ctypes.memset(model.weight.data_ptr() + model.weight.nbytes - 1, 7, 1),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("size", [100, 100_000])
def test_writes_that_nobody_counts_are_noticed(name: str, made_in_inference_mode: bool, size: int) -> None:
    if made_in_inference_mode and name == "the array it was made from":
        pytest.skip("a tensor on an array's memory is made outside inference_mode")
    model = Model(size)
    if made_in_inference_mode:
        inference_weight(model)
    weights = WatchedWeights(model)
    weights.remember()
    assert weights.same_in_full()
    with torch.inference_mode(made_in_inference_mode):
        WRITES[name](model)
    assert not weights.same_in_full()
    assert not weights.same()


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_a_small_model_are_noticed_without_reading_in_full(name: str) -> None:
    model = Model(100)
    weights = WatchedWeights(model)
    weights.remember()
    WRITES[name](model)
    assert not weights.same(quickly=True)


def test_weights_that_have_changed_once_stay_changed() -> None:
    model = Model(10)
    weights, was = WatchedWeights(model), model.weight.data
    model.weight.data = was * 2
    assert not weights.same()
    model.weight.data = was
    assert not weights.same()


def test_the_batches_that_a_batch_norm_has_seen_do_not_count() -> None:
    model = Model(10)
    weights = WatchedWeights(model)
    weights.remember()
    model.norm.num_batches_tracked.data.add_(1)
    assert weights.same_in_full()
    model.norm.running_mean.data.add_(1)
    assert not weights.same_in_full()


# --- the background thread ---


class Owner:
    def __init__(self, size: int = 100_000) -> None:
        self.model = Model(size)
        self.weights = WatchedWeights(self.model)
        self.weights.remember()
        self.patrol = Patrol(self.now)

    def now(self) -> WatchedWeights:
        return self.weights


def until(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def patrols() -> int:
    return sum(thread.name == "torchsurgeon-weights" for thread in threading.enumerate())


def test_the_thread_notices_a_write() -> None:
    owner = Owner()
    owner.patrol.start()
    owner.model.weight.data[-1] = 5

    def noticed() -> bool:
        owner.patrol.used()
        return not owner.weights.same(quickly=True)

    until(noticed)
    owner.patrol.close()


def test_the_thread_ends_when_it_is_closed_also_while_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    before = patrols()
    monkeypatch.setattr(watching, "_IDLE_S", 0.0)
    owner = Owner()
    owner.patrol.start()
    assert patrols() == before + 1
    owner.patrol.close()
    owner.patrol.close()
    until(lambda: patrols() == before)
    owner.patrol.start()
    assert patrols() == before


def test_the_thread_keeps_nobody_alive_and_ends_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    before = patrols()
    monkeypatch.setattr(watching, "_IDLE_S", 0.0)
    owner = Owner()
    owner.patrol.start()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    until(lambda: gone() is None and patrols() == before)


def test_a_model_that_nobody_uses_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_PASS_S", 0.0)
    owner, passes = Owner(10), 0

    def compare() -> Any:
        nonlocal passes
        passes += 1
        return iter(())

    monkeypatch.setattr(owner.weights, "compare", compare)
    owner.patrol.start()
    until(lambda: passes > 3)
    monkeypatch.setattr(watching, "_IDLE_S", 0.0)
    until(lambda: owner.patrol._sleeps)
    seen = passes
    monkeypatch.setattr(watching, "_IDLE_S", 60.0)
    assert owner.patrol._sleeps
    assert passes == seen
    owner.patrol.used()
    until(lambda: passes > seen + 3)
    owner.patrol.close()


def test_a_child_process_watches_after_a_fork() -> None:
    owner = Owner()
    owner.patrol.start()
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        owner.patrol.start()
        owner.model.weight.data[-1] = 5
        end_s = time.monotonic() + PATIENCE_S
        while owner.weights.same(quickly=True) and time.monotonic() < end_s:
            owner.patrol.used()
            time.sleep(0.01)
        sending.send(owner.weights.same(quickly=True))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert receiving.poll(PATIENCE_S)
    assert receiving.recv() is False
    process.join()
    owner.patrol.close()
