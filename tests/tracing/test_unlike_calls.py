"""Calls that are unlike the example in a way that the values of tensors do not show are refused, so the model answers.

A split model runs its parts for a call only if ``LayerGraph.tensors_of_call()`` takes it; any other call is answered by
the model itself, or raises. What is refused here was once answered otherwise than the model answers it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchsurgeon as ts

X, Y = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)), torch.rand(2, 4)


def model_of(forward: Callable[..., Any]) -> nn.Module:
    """A model with a linear layer of four features, ``lin``, whose ``forward`` is given."""
    made = type("Model", (nn.Module,), {"forward": forward, "__module__": __name__})()
    made.lin = nn.Linear(4, 4)
    return made.eval()


def takes(graph: ts.LayerGraph, *args: Any, **kwargs: Any) -> bool:
    try:
        graph.tensors_of_call(args, kwargs)
    except TypeError:
        return False
    return True


# --- arguments ---


def test_an_argument_that_only_the_example_gives_is_not_that_of_other_calls() -> None:
    def scaled(self: Any, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.lin(x) * scale

    graph = ts.trace(model_of(scaled), X, scale=3.0)
    assert takes(graph, Y, scale=3.0)
    assert takes(graph, x=Y, scale=3.0)
    assert not takes(graph, Y)
    assert not takes(graph, Y, scale=2.0)
    graph = ts.trace(model_of(scaled), X)
    assert takes(graph, Y)
    assert takes(graph, Y, 1.0)
    assert not takes(graph, Y, 2.0)


def test_flags_by_position_that_only_the_example_gives() -> None:
    def flagged(self: Any, x: torch.Tensor, *flags: int) -> torch.Tensor:
        return self.lin(x) * (1 + sum(flags))

    graph = ts.trace(model_of(flagged), X, 1)
    assert takes(graph, Y, 1)
    assert not takes(graph, Y)
    assert not takes(graph, Y, 1, 1)


def test_equal_numbers_of_another_type_are_another_argument() -> None:
    def scaled(self: Any, x: torch.Tensor, scale: Any = 2) -> torch.Tensor:
        return (x + 1) * scale

    graph = ts.trace(model_of(scaled), torch.ones(2, 4, dtype=torch.int64), 1)
    assert takes(graph, torch.ones(2, 4, dtype=torch.int64), 1)
    for other in (1.0, True):
        assert not takes(graph, torch.ones(2, 4, dtype=torch.int64), other)


# --- the form of tensors ---


def test_tensors_of_another_rank() -> None:
    def doubled_in_three(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x).reshape(-1, 4).relu()
        return y * 2 if x.dim() == 3 else y

    graph = ts.trace(model_of(doubled_in_three), X)
    assert takes(graph, torch.rand(6, 4))
    assert not takes(graph, torch.rand(2, 3, 4))
    assert not takes(graph, torch.rand(4))


def test_the_order_of_dimensions_in_memory_where_the_model_asks_for_it() -> None:
    def by_order(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.dim_order() == (0, 2, 3, 1) else x + 1

    picture = torch.rand(1, 3, 5, 5)
    graph = ts.trace(model_of(by_order), picture)
    assert takes(graph, torch.rand(1, 3, 5, 5))
    assert not takes(graph, picture.to(memory_format=torch.channels_last))


# --- memory ---


def overwriting_a_copy(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.lin(x)
    y = h.t().contiguous()
    y.add_(1)
    return h.sum(1) + y.sum(0)


def overwriting_what_may_be_a_view(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = x * 2
    y = h.flatten(1)
    y.relu_()
    return h.sum((1, 2, 3)) + y.sum(1)


def test_a_call_that_copies_where_the_example_did_not() -> None:
    """Whether ``contiguous()`` copies depends on the batch; what is overwritten then is the copy, or the tensor."""
    graph = ts.trace(model_of(overwriting_a_copy), X)
    assert takes(graph, torch.rand(3, 4))
    assert not takes(graph, torch.rand(1, 4))
    pictures = torch.rand(2, 3, 4, 4)
    other = pictures.to(memory_format=torch.channels_last)
    for example, unlike in ((pictures, other), (other, pictures)):
        graph = ts.trace(model_of(overwriting_what_may_be_a_view), example)
        assert takes(graph, torch.empty_like(example))
        assert not takes(graph, unlike)


def test_nothing_is_asked_of_the_layout_where_nothing_is_overwritten_later() -> None:
    def copying(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.lin(x)).flatten() * 2

    graph = ts.trace(model_of(copying), X)
    assert takes(graph, torch.rand(1, 4))
    assert takes(graph, torch.rand(4, 2).t())


def test_arguments_that_share_memory_where_the_model_overwrites_one() -> None:
    def overwriting(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return self.lin(x) * 2 + y

    def reading(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * 2 + y

    graph = ts.trace(model_of(overwriting), X.clone(), Y.clone())
    assert takes(graph, X.clone(), Y.clone())
    shared = X.clone()
    assert not takes(graph, shared, shared.view(2, 4))
    assert takes(ts.trace(model_of(reading), X, Y), shared, shared.view(2, 4))
    with pytest.raises(ts.errors.TraceError, match="share memory"):
        ts.trace(model_of(overwriting), shared, shared.view(2, 4))


@pytest.mark.parametrize("where", ["of a slice", "with an offset"])
def test_as_strided_that_reads_outside_of_its_tensor_is_not_cut(where: str) -> None:
    def beyond(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        part = h[:, 1:3]
        read = part.as_strided((2, 2), (1, 1), 0) if where == "with an offset" else part.as_strided((2, 2), (4, 1))
        return read * 2 + part.sum()

    with pytest.raises(ts.errors.TraceError, match="as_strided"):
        ts.trace(model_of(beyond), X)


def test_as_strided_within_its_tensor_is_followed() -> None:
    def windows(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x).as_strided((3, 4), (2, 1)) * 2

    model = model_of(windows)
    graph = ts.trace(model, X)
    for point in graph.points:
        parts = ts.cut(graph, point)
        with torch.no_grad():
            assert torch.equal(parts.tail(*parts.head(Y)), model(Y))


def test_a_view_as_another_dtype_is_overwritten() -> None:
    def through_its_bits(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        h.view(torch.int32).add_(1)
        return h * 2

    model = model_of(through_its_bits)
    graph = ts.trace(model, X)
    assert graph.traced_by == "recorded"
    for point in graph.points:
        parts = ts.cut(graph, point)
        with torch.no_grad():
            assert torch.equal(parts.tail(*parts.head(Y)), model(Y))


# --- what the model returns ---


@dataclasses.dataclass
class Scored:
    """A result with a field that is only assigned later."""

    scores: torch.Tensor
    doubled: Any = dataclasses.field(init=False, default=None)


class Tagged(dict):  # type: ignore[type-arg]
    """A dict that may have attributes beside its keys."""


class Slotted:
    """An object whose attributes are in no dict."""

    __slots__ = ("inner",)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner


def with_attribute(y: torch.Tensor) -> torch.Tensor:
    y.aux = y * 2  # type: ignore[attr-defined]
    return y


def tagged(y: torch.Tensor) -> Tagged:
    made = Tagged(y=y)
    made.aux = y * 2  # type: ignore[attr-defined]
    return made


UNSEEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "values of a dict": lambda y: {"a": y * 2}.values(),
    "a deque": lambda y: collections.deque([y * 2]),
    "slots": lambda y: Slotted(y * 2),
    "an iterator": lambda y: iter([y * 2]),
    "a closure": lambda y: lambda: y,
    "an attribute of a tensor": with_attribute,
    "an attribute of a dict": tagged,
    "a list of another class": lambda y: type("Results", (list,), {})([y]),
    "keys that read alike": lambda y: {1: y, "1": y * 2},
}


@pytest.mark.parametrize("what", UNSEEN)
def test_results_that_would_lose_a_part_are_refused(what: str) -> None:
    def returning(self: Any, x: torch.Tensor) -> Any:
        y = self.lin(x)
        return y, UNSEEN[what](y)

    with pytest.raises(ts.errors.TraceError, match="returns"):
        ts.trace(model_of(returning), X)


def test_fields_that_are_assigned_later_and_defaults_of_dicts_are_kept() -> None:
    def returning(self: Any, x: torch.Tensor) -> Any:
        scored = Scored(self.lin(x))
        scored.doubled = scored.scores * 2
        scored.more = scored.scores * 3  # type: ignore[attr-defined]
        found = collections.defaultdict(list)
        found["last"].append(scored.scores * 4)
        return scored, found

    model = model_of(returning)
    graph = ts.trace(model, X)
    with torch.no_grad():
        expected, expected_found = model(Y)
        for point in graph.points:
            parts = ts.cut(graph, point)
            scored, found = parts.tail(*parts.head(Y))
            assert type(scored) is Scored
            for name in ("scores", "doubled", "more"):
                assert torch.equal(getattr(scored, name), getattr(expected, name))
            assert torch.equal(found["last"][0], expected_found["last"][0])
            assert found["another"] == []


# --- weights ---


def test_a_plain_tensor_that_decides_the_path_is_noted() -> None:
    def branching(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        return y * 2 if self.flag else y + 1

    for read in ("flag", "item", "tolist"):
        model = model_of(branching)
        values = torch.tensor([0, 1])
        model.flag = torch.tensor(0) if read == "flag" else _Reading(values, read)
        graph = ts.trace(model, X)
        assert graph.decides_anew() is None
        (model.flag if read == "flag" else values).fill_(1)
        assert graph.decides_anew() is not None, read


class _Reading:
    """Is true where the first of some numbers is."""

    def __init__(self, values: torch.Tensor, how: str) -> None:
        self.values, self.how = values, how

    def __bool__(self) -> bool:
        return bool(self.values[0].item() if self.how == "item" else self.values.tolist()[0])


def test_weights_of_another_form_are_another_model_where_the_code_reads_their_form() -> None:
    def of_dtype(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.scale.dtype) * 2).relu() * self.scale

    def of_shape(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2 * self.scale.shape[0]

    def of_neither(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).relu() * self.scale

    for forward, forms in ((of_dtype, 1), (of_shape, 1), (of_neither, 0)):
        model = model_of(forward)
        model.scale = nn.Parameter(torch.ones(4))
        graph = ts.trace(model, X)
        assert graph.reformed() is None
        other = torch.ones(4, dtype=torch.bfloat16) if forward is of_dtype else torch.ones(1)
        model.scale = nn.Parameter(other)
        assert (graph.reformed() is not None) == bool(forms), forward.__name__


def test_weights_that_lie_otherwise_in_memory_where_the_code_asks_how_they_lie() -> None:
    model = model_of(lambda self, x: self.lin(x) * (2 if self.lin.weight.is_contiguous() else 3))
    graph = ts.trace(model, X)
    assert graph.reformed() is None
    model.lin.weight = nn.Parameter(model.lin.weight.detach().t())
    assert "layout in memory" in (graph.reformed() or "")


def test_weights_that_were_two_tensors_and_are_one() -> None:
    model = model_of(lambda self, x: self.lin(x) * (2 if self.other.weight is self.lin.weight else 3))
    model.other = nn.Linear(4, 4).eval()
    graph = ts.trace(model, X)
    assert graph.reformed() is None
    model.other.weight = model.lin.weight
    assert "were two tensors" in (graph.reformed() or "")


def test_weights_that_were_one_tensor_and_are_two() -> None:
    def tied(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.lin(x).relu(), self.other.weight)

    model = model_of(tied)
    model.other = nn.Linear(4, 4, bias=False).eval()
    model.other.weight = model.lin.weight
    graph = ts.trace(model, X)
    assert graph.reformed() is None
    model.lin.weight = model.other.weight = nn.Parameter(torch.ones(4, 4))
    assert graph.reformed() is None
    model.other.weight = nn.Parameter(torch.ones(4, 4))
    assert "one tensor" in (graph.reformed() or "")


# --- what tensors are besides elements, sizes and dtypes ---


class Marked:
    @staticmethod
    def tensor() -> torch.Tensor:
        made = Y.clone()
        made.mask = torch.zeros(4)  # type: ignore[attr-defined]
        return made


COMPLEX = torch.complex(X, Y)
UNLIKE: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor], Callable[[Any, torch.Tensor], bool]]] = {
    "a parameter": (X, lambda: nn.Parameter(Y), lambda self, x: isinstance(x, nn.Parameter)),
    "a parameter by its class": (X, lambda: nn.Parameter(Y), lambda self, x: type(x) is not torch.Tensor),
    "an attribute": (X, Marked.tensor, lambda self, x: getattr(x, "mask", None) is not None),
    "lazily conjugated": (COMPLEX, lambda: COMPLEX.clone().conj(), lambda self, x: x.is_conj()),
    "a conjugate that is lazily conjugated": (COMPLEX, lambda: COMPLEX.conj(), lambda self, x: not x.mH.is_conj()),
    "lazily negated": (X, lambda: COMPLEX.conj().imag, lambda self, x: torch.is_neg(x)),
    "an error where it is lazy": (COMPLEX, lambda: COMPLEX.conj(), lambda self, x: torch.view_as_real(x) is x),
    "a copy where it is lazy": (COMPLEX, lambda: COMPLEX.conj(), lambda self, x: x.resolve_conj() is not x),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_tensor_that_answers_a_question_of_the_model_otherwise_is_not_taken(name: str) -> None:
    example, other, question = UNLIKE[name]

    def asking(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * (2 if question(self, x) else 3) + 1

    graph = ts.trace(model_of(asking), example)
    assert takes(graph, example * 2)
    assert not takes(graph, other())

    # Where nothing is asked, such a tensor is as good as any.
    graph = ts.trace(model_of(lambda self, x: x * 3 + 1), example)
    assert takes(graph, other())


def test_a_question_in_a_module_of_helpers_is_found() -> None:
    helpers = types.ModuleType("helpers_of_a_test")
    helpers.is_trained = lambda x: isinstance(x, nn.Parameter)  # type: ignore[attr-defined]
    graph = ts.trace(model_of(lambda self, x: self.lin(x) * (2 if helpers.is_trained(x) else 3)), X)
    assert takes(graph, Y)
    assert not takes(graph, nn.Parameter(Y))


def test_an_example_that_is_a_parameter_is_traced_as_an_ordinary_tensor() -> None:
    graph = ts.trace(model_of(lambda self, x: self.lin(x) * (2 if isinstance(x, nn.Parameter) else 3)), nn.Parameter(X))
    assert takes(graph, Y)
    assert not takes(graph, nn.Parameter(X))
    graph = ts.trace(model_of(lambda self, x: self.lin(x)), nn.Parameter(X))
    assert takes(graph, nn.Parameter(X))


@pytest.mark.parametrize("name", ["storage_offset", "_is_view", "is_shared", "_base"])
def test_a_model_that_asks_where_its_input_lies_in_memory_is_refused(name: str) -> None:
    def asking(self: Any, x: torch.Tensor) -> torch.Tensor:
        answer = getattr(x, name)
        return self.lin(x) * (3 if (answer() if callable(answer) else answer is not None) else 2)

    with pytest.raises(ts.errors.TraceError, match=f"how a tensor lies in its caller's memory \\({name}\\)"):
        ts.trace(model_of(asking), X)


def test_zero_with_the_other_sign_is_another_argument() -> None:
    def signed(self: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self.lin(x) * math.copysign(1, scale)

    graph = ts.trace(model_of(signed), X, 0.0)
    assert takes(graph, Y, 0.0)
    assert not takes(graph, Y, -0.0)
