"""Random small models give their own answers after they were traced and cut, or are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import verdicts
from random_models import ROOTS, STATEMENTS, Piece, RandomModel, difference, random_model
from verdicts import CHANGED, DIFFERENT, EQUAL, FAILURES, RAW_ERROR, REFUSED, judge

from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.tracer import trace

COUNT, GROUPS = 160, 8


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_models_give_their_own_answers_or_are_refused_by_name(group: int) -> None:
    for seed in range(group, COUNT, GROUPS):
        model = random_model(seed)
        verdict = judge(model)
        assert verdict.outcome not in FAILURES, (
            f"seed {seed}, {verdict.outcome}: {verdict.detail}\n"
            f"python -m benchmarks.coverage.fuzz --seed {seed} --count 1\n{model.source}"
        )


# --- the judge itself ---


def of(*names: str, roots: tuple[str, ...] = ()) -> RandomModel:
    """The model of these statements, by kind and name."""
    every = {name: fragment for found in STATEMENTS.values() for name, fragment in found.items()}
    changes = {fragment.name: fragment for fragment in ROOTS}
    pieces = tuple(Piece(every[name], 1) for name in names)
    return dataclasses.replace(random_model(0), pieces=pieces, roots=tuple(Piece(changes[name], 1) for name in roots))


def test_a_model_of_layers_is_equal() -> None:
    assert judge(of("layer: linear", "layer: GRU")).outcome == EQUAL


def test_an_answer_of_other_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_other_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
        graph = trace(model, *args, **kwargs)
        model.l0.bias.data[0] += 1e-3
        return graph

    monkeypatch.setattr(verdicts, "trace", of_other_weights)
    monkeypatch.setattr(verdicts, "_snapshot", lambda model: {})
    verdict = judge(of("layer: linear"))
    assert (verdict.outcome, verdict.detail) == (DIFFERENT, "example, cut 0 (input): the result has other values")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: setattr(m, "extra", 1), "model.extra"),
        (lambda m: m.l0.bias.data.add_(1), "l0._parameters.bias (its bits)"),
        (lambda m: m.l0.register_forward_hook(print), "l0._forward_hooks"),
        (lambda m: m.w1["a"].append(1), "model.w1.a (its keys)"),
    ],
)
def test_a_model_that_tracing_changes_is_noticed(monkeypatch: pytest.MonkeyPatch, change: Any, what: str) -> None:
    def changing(model: Any, *args: Any, **kwargs: Any) -> Any:
        graph = trace(model, *args, **kwargs)
        change(model)
        return graph

    monkeypatch.setattr(verdicts, "trace", changing)
    verdict = judge(of("layer: linear", "constant: in a dict"))
    assert verdict.outcome == CHANGED
    assert what in verdict.detail


def test_results_that_differ_in_type_structure_or_one_bit_are_different() -> None:
    zero = torch.zeros(2)
    same: list[tuple[Any, Any]] = [(zero, zero.clone()), ({"a": (zero, 1)}, {"a": (zero.clone(), 1)})]
    other: list[tuple[Any, Any]] = [
        (zero, -zero),
        (zero, zero.double()),
        (zero, zero[:1]),
        ([zero], (zero,)),
        ({"a": zero}, {"b": zero}),
        (1, 1.0),
        (torch.tensor(2), 2),
    ]
    assert not any(difference(*pair) for pair in same)
    assert all(difference(*pair) for pair in other)


def test_models_differ_and_are_drawn_again_from_their_seed() -> None:
    models = [random_model(seed) for seed in range(40)]
    assert len({model.source.rpartition("def make()")[0] for model in models}) == len(models)
    assert models[7].source == random_model(7).source


@pytest.mark.parametrize(
    ("error", "outcome"), [(TraceError("no"), REFUSED), (RuntimeError("no"), RAW_ERROR), (TypeError("no"), RAW_ERROR)]
)
def test_only_an_error_of_torchsurgeons_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str
) -> None:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(verdicts, "trace", refusing)
    assert judge(of("layer: linear")).outcome == outcome
