"""Settings that the first call computes, or that lie beside results in a dict, are premises of a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import split
from small_models import model
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.models.premises import Premises

X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))


def if_none(self: Any, x: Tensor) -> Tensor:
    if self.scale is None:
        self.scale = 2.0
    return self.lin(x) * self.scale  # type: ignore[no-any-return]


def if_absent(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "factor"):
        self.factor = 2.0
    return self.lin(x) * self.factor  # type: ignore[no-any-return]


def in_a_dict(self: Any, x: Tensor) -> Tensor:
    if "scale" not in self.table:
        self.table["scale"] = 2.0
    return self.lin(x) * self.table["scale"]  # type: ignore[no-any-return]


def beside_results(self: Any, x: Tensor) -> Tensor:
    self.table["features"] = x = self.lin(x)
    self.table["batch"] = x.shape[0]
    return x * self.table.get("scale", 2.0)


def on_another_path(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 6:
        self.table["scale"] = 3.0
    return self.lin(x) * self.table.get("scale", 2.0)  # type: ignore[no-any-return]


def attribute(made: Any) -> None:
    made.scale = 3.0


def new_attribute(made: Any) -> None:
    made.factor = 3.0


def entry(made: Any) -> None:
    made.table["scale"] = 3.0


def larger_batch(made: Any) -> None:
    with torch.no_grad():
        made(torch.rand(9, 4))


def made_of(forward: Any, **table: Any) -> Any:
    torch.manual_seed(0)
    made = model(forward, lin=nn.Linear(4, 4))
    made.scale, made.table = None, table
    return made


SETTINGS: list[tuple[Any, Callable[[Any], None], dict[str, float]]] = [
    (if_none, attribute, {}),
    (if_absent, new_attribute, {}),
    (in_a_dict, entry, {}),
    (beside_results, entry, {}),
    (beside_results, entry, {"scale": 1.0}),
    (on_another_path, entry, {}),
    (on_another_path, larger_batch, {}),
]


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize(("forward", "change", "table"), SETTINGS)
def test_a_setting_that_is_changed_by_hand_is_noticed(
    forward: Any, change: Callable[[Any], None], table: dict[str, float], warm: bool
) -> None:
    made = made_of(forward, **table)
    if warm:
        made(X)
    premises = Premises(made, ts.trace(made, X).reading)
    for _ in range(2):
        # What the model's own call computes is what was traced.
        assert premises.broken() is None
        made(X)
        made(X[:1])
    change(made)
    assert not premises.hold()
    assert "was traced, and is 3.0 now" in str(premises.broken())


def test_with_a_setting_changed_by_hand_the_model_itself_answers() -> None:
    made = made_of(if_none)
    with split(made, X) as module, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.ChangedModelWarning)
        for point in module.graph.points[:-1]:
            module.partition = point.index
            made.scale = None
            assert torch.equal(module(X), made(X))
            made.scale = 3.0
            assert torch.equal(module(X), made(X))
            assert module.last is not None
            assert "attribute 'scale' of the model was 2.0" in str(module.last.degraded)


def counter(self: Any, x: Tensor) -> Tensor:
    self.scale = (self.scale or 0) + 1
    return self.lin(x)  # type: ignore[no-any-return]


def of_sizes(self: Any, x: Tensor) -> Tensor:
    if self.scale != x.shape[0]:
        self.scale = x.shape[0]
        self.table["batch"] = x.shape[0]
    return self.lin(x) * self.scale + self.table["batch"]  # type: ignore[no-any-return]


def assigned_always() -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.scale = 2.0
        return self.lin(x) * self.scale  # type: ignore[no-any-return]

    return forward


@pytest.mark.parametrize("forward", [counter, of_sizes, assigned_always()])
def test_results_of_a_call_may_change(forward: Any) -> None:
    made = made_of(forward)
    premises = Premises(made, ts.trace(made, X).reading)
    for batch in (1, 2, 5):
        made(torch.rand(batch, 4))
        assert premises.broken() is None
    made.scale = 7
    assert premises.broken() is None
