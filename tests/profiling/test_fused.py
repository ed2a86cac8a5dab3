"""Profiles by a backend that fuses layers: what is measured, and what is interpolated between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import Backend, Part
from torchsurgeon.profiling.parts import WORKS, Curve, fitted_factors, works


class Plain(Backend):
    """Runs parts in eager PyTorch, and counts those that it builds."""

    name = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.built: list[Part] = []

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        self.built.append(part)
        return part.segment


class NoTails(Plain):
    """Takes only parts that begin with the model's input."""

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        if part.inputs[0].name != "input":
            raise ts.BackendError("not this part")
        return super().build(part, example, free_batch=free_batch)


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    return ts.trace(model.eval(), torch.rand(1, 3, 16, 16))


def test_the_kinds_of_work_are_told_apart(graph: ts.LayerGraph) -> None:
    kinds = [WORKS[kind] for kind in works(graph)]
    assert kinds == ["matrix product" if k == 5 else kind for k, kind in enumerate(kinds)]
    assert kinds[0] == "depthwise"  # 54 operations for each result
    assert kinds[1] == kinds[3] == kinds[4] == "memory"
    assert kinds[2] == "depthwise"


def test_factors_are_found_again_in_parts_that_follow_them() -> None:
    rng = np.random.default_rng(0)
    wanted = np.array([0.1, 0.5, 0.8, 2.0])
    parts = []
    for _ in range(40):
        kinds, seconds = rng.integers(0, 4, 12), rng.uniform(0.5, 2.0, 12)
        parts.append((kinds, seconds, float((seconds * wanted[kinds]).sum())))
    assert fitted_factors(parts, [measured for _, _, measured in parts]) == pytest.approx(wanted, rel=0.1)


def test_one_measurement_scales_all_layers_alike() -> None:
    kinds, seconds = np.array([0, 1, 2, 3]), np.array([1.0, 2.0, 3.0, 4.0])
    assert fitted_factors([(kinds, seconds, 5.0)], [5.0]) == pytest.approx(np.full(4, 0.5), rel=0.05)


def test_a_curve_goes_through_what_was_measured_and_ends_at_the_whole(graph: ts.LayerGraph) -> None:
    eager_s = np.array([4.0, 1.0, 2.0, 1.0, 0.5, 1.5])
    curve = Curve(graph, eager_s, 5.0)
    assert curve.layer_s.sum() == pytest.approx(5.0)
    curve.add(3, 3.2, 2.1)
    curve.add(1, 2.5, 3.0)
    heads_s, tails_s = curve.heads_s(), curve.tails_s()
    assert heads_s[[0, 1, 3, 6]] == pytest.approx([0.0, 2.5, 3.2, 5.0])
    assert tails_s[[0, 1, 3, 6]] == pytest.approx([5.0, 3.0, 2.1, 0.0])
    assert 2.5 <= heads_s[2] <= 3.2
    assert (np.diff(heads_s) >= 0).all()
    assert curve.points == [1, 3]


def test_a_backend_is_measured_at_the_points_that_are_asked_for(graph: ts.LayerGraph) -> None:
    backend, done = Plain(), []
    measured = ts.profile(
        graph, backend=backend, points=[2, 4], repeats=3, meter=None, progress=lambda *how_far: done.append(how_far)
    )
    assert measured.parts is not None
    assert measured.parts.points == (2, 4)
    assert done == [(1, 2), (2, 2)]
    assert len(backend.built) == 5, "the whole, two heads and two tails"
    assert measured.backend == "plain"
    assert measured.head_s[0] == measured.tail_s[-1] == 0
    assert measured.head_s[-1] == pytest.approx(measured.tail_s[0])
    assert measured.layer_s.sum() == pytest.approx(measured.total_s)
    assert "by plain" in str(measured)
    assert "2 points" in str(measured)


def test_without_a_budget_only_the_whole_is_measured(graph: ts.LayerGraph) -> None:
    backend = Plain()
    measured = ts.profile(graph, backend=backend, budget_s=0, repeats=2, meter=None)
    assert measured.parts is not None
    assert measured.parts.points == ()
    assert measured.parts.error == 0.0
    assert len(backend.built) == 1


def test_a_known_eager_profile_is_not_measured_again(graph: ts.LayerGraph) -> None:
    eager = ts.profile(graph, repeats=2, meter=None).scaled(50.0)
    measured = ts.profile(graph, backend=Plain(), eager=eager, budget_s=0, repeats=3)
    # The backend is eager PyTorch again, so its times are those that the given profile says.
    assert eager.total_s / 3 < measured.total_s < 3 * eager.total_s


def test_a_profile_by_a_backend_is_kept_in_a_file(graph: ts.LayerGraph, tmp_path: Path) -> None:
    measured = ts.profile(graph, backend=Plain(), points=[3], repeats=2, meter=None)
    measured.save(tmp_path / "plain.json")
    again = ts.LayerProfile.load(tmp_path / "plain.json")
    assert again.parts is not None
    assert again.parts.to_json() == measured.parts.to_json()  # type: ignore[union-attr]
    assert again.scaled(2.0).head_s == pytest.approx(2 * measured.head_s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.update(head_s=[0.0, 1.0]), "heads"),
        (lambda parts: parts.update(points=[99]), "between 0 and"),
        (lambda parts: parts.update(points=["3"]), "seconds of heads and tails"),
        (lambda parts: parts.update(tail_s=[-1.0] * 7), "not negative"),
        (lambda parts: parts.pop("errors"), "errors"),
    ],
)
def test_damaged_parts_are_refused(
    graph: ts.LayerGraph, change: Callable[[dict[str, object]], object], message: str
) -> None:
    data = ts.profile(graph, backend=Plain(), points=[3], repeats=2, meter=None).to_json()
    change(data["parts"])
    with pytest.raises(ts.ProfileError, match=message):
        ts.LayerProfile.from_json(data)


def test_parts_that_a_backend_does_not_take_are_measured_in_eager_and_said(graph: ts.LayerGraph) -> None:
    with pytest.warns(ts.BackendWarning, match="does not run all parts"):
        measured = ts.profile(graph, backend=NoTails(), points=[3], repeats=2, meter=None)
    assert measured.parts is not None
    assert measured.parts.points == (3,)
    assert measured.provenance["not_by_backend"] == [graph.point(3).name]


def test_eager_by_name_is_the_profile_of_layers(graph: ts.LayerGraph) -> None:
    measured = ts.profile(graph, backend="eager", repeats=2, meter=None)
    assert measured.parts is None
    assert measured.backend == "eager"


def test_what_makes_no_sense_is_refused(graph: ts.LayerGraph) -> None:
    with pytest.raises(ts.BackendError, match="no-such"):
        ts.profile(graph, backend="no-such")
    with pytest.raises(ts.ProfileError, match="budget_s"):
        ts.profile(graph, backend=Plain(), budget_s=-1)


def test_up_to_a_layer_that_the_backend_does_not_take_parts_are_measured_by_it(graph: ts.LayerGraph) -> None:
    refused = graph.layers[3].name

    class NoPooling(Plain):
        """Does not take the pooling layer."""

        def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
            if any(graph.steps[step].name == refused for step in part.segment.steps):
                raise ts.BackendError("it does not pool", refused)
            return super().build(part, example, free_batch=free_batch)

    backend = NoPooling()
    with pytest.warns(ts.BackendWarning, match="does not take"):
        measured = ts.profile(graph, backend=backend, points=[2, 4], repeats=2, meter=None)
    ends = {part.outputs for part in backend.built}
    # The whole model, the head and the tail of point 2, the head of point 4; its tail needs no pooling.
    assert ends == {graph.point(3).tensors, graph.point(2).tensors, graph.outputs}
    assert measured.provenance["not_by_backend"] == ["the whole model", graph.point(2).name, graph.point(4).name]
