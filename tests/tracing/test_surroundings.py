"""What a model's code asks of its surroundings is a premise of its trace: another answer later is noticed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from small_models import model
from torch import Tensor, nn, set_float32_matmul_precision
from torch import get_float32_matmul_precision as precision_of_products

from torchsurgeon.models.premises import Premises

OF_THREAD, LATER, OF_CONTEXT = threading.local(), threading.local(), ContextVar("scale", default=1.0)
OF_THREAD.scale = 1.0
NAME = "TORCHSURGEON_TEST_OF_A_NAME"


@contextlib.contextmanager
def set_to(change: Callable[[Any], Any], now: Any, before: Any) -> Iterator[None]:
    change(now)
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def of_environment(name: str) -> Iterator[None]:
    os.environ[name] = "2"
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def of_thread(variables: threading.local) -> Iterator[None]:
    before = dict(vars(variables))
    variables.scale = 2.0
    try:
        yield
    finally:
        vars(variables).clear()
        vars(variables).update(before)


@contextlib.contextmanager
def of_context() -> Iterator[None]:
    token = OF_CONTEXT.set(2.0)
    try:
        yield
    finally:
        OF_CONTEXT.reset(token)


ASKED: dict[str, tuple[Callable[[], Any], Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "the default dtype": (
        lambda: torch.get_default_dtype().itemsize,
        lambda: set_to(torch.set_default_dtype, torch.float64, torch.float32),
    ),
    "the default dtype, of a tensor that is made": (
        lambda: torch.zeros(1).itemsize,
        lambda: set_to(torch.set_default_dtype, torch.float64, torch.float32),
    ),
    "deterministic algorithms": (
        lambda: 1 + torch.are_deterministic_algorithms_enabled(),
        lambda: set_to(torch.use_deterministic_algorithms, True, False),
    ),
    "the precision of products, imported by another name": (
        lambda: len(precision_of_products()),
        lambda: set_to(set_float32_matmul_precision, "medium", precision_of_products()),
    ),
    "the number of threads": (
        torch.get_num_threads,
        lambda: set_to(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()),
    ),
    "a flag of a backend": (
        lambda: 1 + torch.backends.mkldnn.enabled,
        lambda: set_to(torch._C._set_mkldnn_enabled, False, True),
    ),
    "a backend of attention": (
        lambda: 1 + torch.backends.cuda.flash_sdp_enabled(),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ),
    "a variable of the environment": (
        lambda: float(os.environ.get("TORCHSURGEON_TEST_OF_A_TEXT", "1")),
        lambda: of_environment("TORCHSURGEON_TEST_OF_A_TEXT"),
    ),
    "a variable of the environment by a constant": (
        lambda: 1 + (NAME in os.environ),
        lambda: of_environment(NAME),
    ),
    "getenv": (
        lambda: float(os.getenv("TORCHSURGEON_TEST_OF_GETENV") or 1),
        lambda: of_environment("TORCHSURGEON_TEST_OF_GETENV"),
    ),
    "a variable of the thread": (lambda: OF_THREAD.scale, lambda: of_thread(OF_THREAD)),
    "a variable that the thread has not got yet": (
        lambda: getattr(LATER, "scale", 1.0),
        lambda: of_thread(LATER),
    ),
    "a variable of the context": (OF_CONTEXT.get, of_context),
}


@pytest.mark.parametrize("name", ASKED)
def test_another_answer_of_the_surroundings_breaks_the_premises_until_it_is_taken_back(name: str) -> None:
    ask, change = ASKED[name]

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(x) * ask()  # type: ignore[no-any-return]

    premises = Premises(model(forward, first=nn.Linear(4, 4)))
    assert premises.hold()
    with change():
        assert not premises.hold()
        assert "was traced, and is" in str(premises.broken())
    assert premises.hold()
    assert premises.broken() is None


def test_nothing_is_watched_that_the_code_does_not_ask_for() -> None:
    premises = Premises(model(lambda self, x: self.first(x), first=nn.Linear(4, 4)))
    with contextlib.ExitStack() as inside:
        for _, change in ASKED.values():
            inside.enter_context(change())
        assert premises.hold()


def test_whether_parameters_need_gradients_is_a_premise_where_the_code_asks_for_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(x) * (2 if self.first.weight.requires_grad else 3)  # type: ignore[no-any-return]

    made = model(forward, first=nn.Linear(4, 4))
    premises = Premises(made)
    assert premises.hold()
    made.requires_grad_(False)
    assert "'parameters.requires_grad' of 'its surroundings' was (True, True)" in str(premises.broken())
    made.requires_grad_(True)
    assert premises.hold()
