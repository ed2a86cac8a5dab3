"""Nested values come apart into named leaves and together again."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchsurgeon.tracing.structure import LEAF, flatten, leaf_name

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Result:
    scores: Any
    boxes: Any = None
    computed: Any = dataclasses.field(init=False, default=3)


@dataclasses.dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """The form of transformers' outputs: a dataclass and a mapping at once."""

    logits: Any = None
    past: Any = None


containers = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda two: Pair(*two))
        | st.tuples(inner, inner).map(lambda two: Result(*two))
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


def distinct_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return len({str(key) for key in value}) == len(value) and all(map(distinct_keys, value.values()))
    if dataclasses.is_dataclass(value):
        return distinct_keys(list(vars(value).values()))
    return all(map(distinct_keys, value)) if isinstance(value, (list, tuple)) else True


@given(containers.filter(distinct_keys))
def test_what_comes_apart_comes_together_again(value: Any) -> None:
    leaves, structure = flatten(value)
    rebuilt = structure.rebuild(dict(leaves))
    assert rebuilt == value
    assert type(rebuilt) is type(value)
    assert structure.paths() == [path for path, _ in leaves]
    for path, _ in leaves:
        assert structure.at(path) == LEAF
        assert structure.replaced(path, LEAF) == structure


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (3, ["root"]),
        ((1, [2]), ["root.0", "root.1.0"]),
        ({"out": 1, "aux": {"a": 2}}, ["root.out", "root.aux.a"]),
        (Pair(1, (2, 3)), ["root.0", "root.1.0", "root.1.1"]),
        (Result(1, boxes=None), ["root.scores", "root.boxes", "root.computed"]),
        ({}, []),
    ],
)
def test_leaves_are_named_by_their_place(value: Any, names: list[str]) -> None:
    assert [leaf_name("root", path) for path, _ in flatten(value)[0]] == names


def test_sizes_are_one_value() -> None:
    size = torch.zeros(2, 3).shape
    assert flatten(size) == ([((), size)], LEAF)


def test_results_of_operators_keep_their_type() -> None:
    top = torch.arange(6.0).topk(2)
    leaves, structure = flatten(top)
    rebuilt = structure.rebuild(dict(leaves))
    assert type(rebuilt) is type(top)
    assert torch.equal(rebuilt.indices, top.indices)


def test_classes_that_are_dataclass_and_mapping_keep_both() -> None:
    output = ModelOutput(logits=1, past=(2, 3))
    leaves, structure = flatten(output)
    assert [leaf_name("o", path) for path, _ in leaves] == ["o.logits", "o.past.0", "o.past.1"]
    rebuilt = structure.rebuild(dict(leaves))
    assert type(rebuilt) is ModelOutput
    assert (rebuilt.logits, rebuilt.past) == (1, (2, 3))


def test_mappings_of_a_users_own_class_are_rebuilt_as_such() -> None:
    value = UserDict(a=1, b=2)
    leaves, structure = flatten(value)
    rebuilt = structure.rebuild(dict(leaves))
    assert type(rebuilt) is UserDict
    assert rebuilt == value


def test_a_part_can_be_replaced() -> None:
    structure = flatten({"a": 1, "b": [2, 3]})[1]
    wider = structure.replaced(("b", "1"), flatten((4, 5))[1])
    assert wider.rebuild({("a",): 1, ("b", "0"): 2, ("b", "1", "0"): 4, ("b", "1", "1"): 5}) == {
        "a": 1,
        "b": [2, (4, 5)],
    }
