"""Quick requests run where they are received, and what the scheduler does to one of them changes nothing in that."""

from __future__ import annotations

import threading

import pytest
import torch

from torchsurgeon.serve.quick import QuickRequests
from torchsurgeon.serve.worker import Worker

QUICK_S, SLOW_S = 1e-4, 1e-2


def test_one_slow_request_does_not_move_a_model_to_its_thread_and_several_do() -> None:
    quick = QuickRequests()
    assert not quick.expects(100)
    quick.took(100, QUICK_S)
    assert quick.expects(100)
    assert not quick.expects(101)
    for _ in range(50):
        quick.took(100, SLOW_S)
        quick.took(100, QUICK_S)
        quick.took(100, QUICK_S)
        assert quick.expects(100)
    for _ in range(4):
        quick.took(100, SLOW_S)
    assert not quick.expects(100)


def test_one_quick_request_does_not_bring_a_slow_model_back_and_several_do() -> None:
    quick = QuickRequests()
    for duration_s in (SLOW_S, SLOW_S, SLOW_S, SLOW_S, QUICK_S, QUICK_S):
        quick.took(100, duration_s)
        assert not quick.expects(100)
    for _ in range(8):
        quick.took(100, QUICK_S)
    assert quick.expects(100)


def test_the_lengths_that_are_remembered_are_bounded() -> None:
    quick = QuickRequests()
    for size in range(10_000):
        quick.took(size, QUICK_S)
    assert len(quick._kinds) <= 256


@pytest.mark.parametrize("kind", ["quick", "slow"])
def test_a_quick_job_waits_for_quick_ones_only(kind: str) -> None:
    worker = Worker("test")
    begun, end = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        end.wait(10)

    with torch.no_grad():
        running = worker.submit(job, quick=kind == "quick")
        waiting = worker.submit(lambda: None, quick=kind == "quick")
        assert begun.wait(10)
        # This one does not end in time, whatever it was expected to do.
        assert worker.now(lambda: "done") is None
        end.set()
        running.result(10)
        waiting.result(10)
        assert worker.now(lambda: "done") == "done"
        with torch.enable_grad():
            assert worker.now(lambda: "done") is None
    worker.close()
