"""Predictors: fitted to samples, sane where there were none, and the same after they were written and read."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchsurgeon as ts
from torchsurgeon.prediction import costs_on, load_device
from torchsurgeon.prediction.doubts import Predicted, whole_interval
from torchsurgeon.prediction.fitted import BlockCorrection
from torchsurgeon.prediction.kinds import KINDS, Operation
from torchsurgeon.prediction.samples import Sample, SampleTable

pytestmark = pytest.mark.usefixtures("few_forms")

PEAK_FLOP_S, BANDWIDTH_BYTE_S, CALL_S = 50e9, 10e9, 3e-6


def truth_s(operation: Operation) -> float:
    """A device whose layers take exactly a call, their arithmetic and their bytes."""
    sizes = np.array([operation.sizes], dtype=float).reshape(1, len(operation.sizes))
    flops, moved = KINDS[operation.kind].work(sizes)
    return CALL_S + float(flops[0]) / PEAK_FLOP_S + float(moved[0]) * operation.item_bytes / BANDWIDTH_BYTE_S


def drawn(kind: str, rng: random.Random) -> Operation:
    def log(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    if kind == "convolution":
        side, kernel = log(4, 56), rng.choice((1, 3))
        return Operation(kind, "2d", (1, 16 * log(1, 16), 16 * log(1, 16), 1, side**2, side**2, kernel**2, 1, 1))
    if kind == "linear":
        return Operation(kind, "linear", (log(1, 64), log(16, 32768), log(8, 2048)))
    if kind == "view":
        return Operation(kind, "view", ())
    return Operation("activation", rng.choice(("relu", "relu in place", "gelu")), (log(100, 1_000_000),))


def samples(seed: int = 0, count: int = 80, joules: bool = False) -> list[Sample]:
    rng = random.Random(seed)
    found = []
    for kind in ("convolution", "linear", "activation", "view"):
        for group in range(count):
            operation = drawn(kind, rng)
            seconds = truth_s(operation) * rng.uniform(0.93, 1.07)
            found.append(Sample(operation, seconds, 5 * seconds if joules else float("nan"), 0.0, group))
    return found


FACTS = {"device": "a made-up device", "threads": 1, "backend": "eager"}


@pytest.fixture(scope="module")
def predictor(few_forms: None) -> ts.Predictor:
    return ts.Predictor.fit(samples(), FACTS)


@pytest.fixture(scope="module")
def metered(few_forms: None) -> ts.Predictor:
    return ts.Predictor.fit(samples(joules=True), FACTS | {"meter": "a meter", "idle_power_w": 2.0})


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64 * 256, 10),
    ).eval()


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    return ts.trace(small(), torch.rand(1, 16, 16, 16))


def test_a_models_layers_are_predicted_from_their_configurations(predictor: ts.Predictor, graph: ts.LayerGraph) -> None:
    profile = predictor.predict(graph)
    profile.check(graph)
    assert profile.layers == tuple(layer.name for layer in graph.layers)
    assert profile.provenance["predicted"] is True
    expected = truth_s(Operation("convolution", "2d", (1, 16, 32, 1, 256, 256, 9, 1, 1)))
    assert profile.layer_s[0] == pytest.approx(expected, rel=0.25)
    assert predictor.fitted["convolution"].held_out.median < 0.1
    assert not any(predictor.bounded(graph))


def test_intervals_hold_the_predictions_and_most_truths(predictor: ts.Predictor, graph: ts.LayerGraph) -> None:
    profile = predictor.predict(graph)
    assert profile.interval_s is not None
    assert profile.whole_interval_s is not None
    assert (profile.interval_s[:, 0] <= profile.layer_s).all()
    assert (profile.layer_s <= profile.interval_s[:, 1]).all()
    assert profile.whole_interval_s[0] <= profile.total_s <= profile.whole_interval_s[1]
    rng = random.Random(1)
    for kind in ("convolution", "linear", "activation"):
        model, errors = predictor.model(kind), predictor.fitted[kind].held_out
        assert model is not None
        fresh = [drawn(kind, rng) for _ in range(200)]
        guess = model.predict(SampleTable.of(kind, [Sample(op, 1.0) for op in fresh]))
        truth = np.array([truth_s(op) * rng.uniform(0.93, 1.07) for op in fresh])
        inside = (truth >= guess * errors.low) & (truth <= guess * errors.high)
        assert inside.mean() > 0.75


def test_a_prediction_is_the_same_after_writing_and_reading(
    metered: ts.Predictor, graph: ts.LayerGraph, tmp_path: Path
) -> None:
    metered.save(tmp_path / "device.json")
    again = ts.Predictor.load(tmp_path / "device.json")
    first, second = metered.predict(graph), again.predict(graph)
    assert first.layer_s.tolist() == second.layer_s.tolist()
    assert first.interval_s is not None
    assert second.interval_s is not None
    assert first.interval_s.tolist() == second.interval_s.tolist()
    assert first.total_s == second.total_s
    assert first.energy is not None
    assert second.energy is not None
    assert first.energy.layer_j.tolist() == second.energy.layer_j.tolist()
    assert again.provenance == metered.provenance
    assert again.to_json() == metered.to_json()


def test_energy_is_predicted_where_it_was_metered(
    predictor: ts.Predictor, metered: ts.Predictor, graph: ts.LayerGraph
) -> None:
    assert predictor.predict(graph).energy is None
    energy = metered.predict(graph).energy
    assert energy is not None
    assert energy.meter == "predicted from a meter"
    assert energy.idle_power_w == 2.0
    assert energy.layer_j[0] == pytest.approx(5 * metered.predict(graph).layer_s[0], rel=0.1)
    assert (energy.interval_j[:, 0] <= energy.layer_j).all()
    assert (energy.layer_j <= energy.interval_j[:, 1]).all()


def test_a_layer_type_without_a_model_is_bounded_and_named(predictor: ts.Predictor) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU()).eval()
    graph = ts.trace(model, torch.rand(1, 16, 16, 16))
    with pytest.warns(ts.PredictionWarning, match=r"normalization \(batch_norm\)"):
        profile = predictor.predict(graph)
    assert predictor.bounded(graph) == (False, True, False)
    assert profile.layer_s[1] >= predictor.roofline.overhead_s


def test_a_layer_nobody_describes_is_bounded_and_named(predictor: ts.Predictor) -> None:
    class Distances(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(torch.cdist(x, x))

    graph = ts.trace(Distances().eval(), torch.rand(1, 500, 16))
    with pytest.warns(ts.PredictionWarning, match="cdist"):
        profile = predictor.predict(graph)
    assert profile.layer_s[0] > profile.layer_s[1] / 10


def test_a_variant_without_samples_takes_its_nearest(predictor: ts.Predictor) -> None:
    graph = ts.trace(nn.Sequential(nn.Mish(), nn.GELU("tanh")).eval(), torch.rand(1, 1000))
    with pytest.warns(ts.PredictionWarning, match="'mish': predicted as 'relu'|'gelu tanh': predicted as 'gelu'"):
        profile = predictor.predict(graph)
    assert (profile.layer_s > 0).all()


def test_what_has_samples_is_predicted_without_a_word(predictor: ts.Predictor, graph: ts.LayerGraph) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(graph)


@settings(max_examples=40)
@given(
    st.sampled_from(["convolution", "linear", "activation"]), st.integers(0, 79), st.integers(1, 12), st.integers(1, 12)
)
def test_more_work_than_any_sample_takes_longer_and_never_less_than_nothing(
    predictor: ts.Predictor, kind: str, row: int, octaves: int, more: int
) -> None:
    model = predictor.model(kind)
    assert model is not None
    table = predictor.samples[kind]
    largest = table.sizes.max(axis=0)
    growing = [i for i, name in enumerate(table.kind.columns) if largest[i] > 4 and "size" not in name]
    sizes = []
    for factor in (2**octaves, 2 ** (octaves + more)):
        grown = largest.copy()
        grown[growing] *= factor
        sizes.append(tuple(grown.astype(int).tolist()))
    variant = str(table.variants[row])
    operations = [Operation(kind, variant, size) for size in sizes]
    less, longer = model.predict(SampleTable.of(kind, [Sample(op, 1.0) for op in operations]))
    assert 0 < less <= longer
    assert longer > less * 1.2


@settings(max_examples=40)
@given(st.integers(1, 10**7), st.sampled_from(["relu", "relu in place", "gelu"]), st.sampled_from([1, 2, 4, 8]))
def test_a_prediction_is_positive_and_finite_anywhere(
    predictor: ts.Predictor, elements: int, variant: str, item_bytes: int
) -> None:
    model = predictor.model("activation")
    assert model is not None
    table = SampleTable.of("activation", [Sample(Operation("activation", variant, (elements,), item_bytes), 1.0)])
    assert 0 < model.predict(table)[0] < 10
    assert 0 <= model.sampled.outside(table)[0][0] < 40


def test_far_outside_its_samples_a_prediction_is_less_certain(predictor: ts.Predictor) -> None:
    def width(side: int) -> float:
        graph = ts.trace(nn.Sequential(nn.ReLU()).eval(), torch.zeros(1).expand(1, side))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interval_s = predictor.predict(graph).interval_s
        assert interval_s is not None
        return float(interval_s[0, 1] / interval_s[0, 0])

    assert width(50_000_000) > 2 * width(50_000)


def test_a_correction_scales_the_sum_of_layers(predictor: ts.Predictor, graph: ts.LayerGraph) -> None:
    block = BlockCorrection(offset=float(np.log(0.8)), low=0.9, high=1.2)
    corrected = ts.Predictor(predictor.provenance, predictor.samples, predictor.fitted, predictor.roofline, block)
    plain, scaled = predictor.predict(graph), corrected.predict(graph)
    assert scaled.total_s == pytest.approx(0.8 * plain.layer_s.sum())
    assert scaled.whole_interval_s == pytest.approx((0.9 * scaled.total_s, 1.2 * scaled.total_s))


NETWORKS = BlockCorrection(low=0.9, high=1.2)


def with_networks(predictor: ts.Predictor) -> ts.Predictor:
    """The predictor after enough networks were timed, too."""
    return ts.Predictor(predictor.provenance, predictor.samples, predictor.fitted, predictor.roofline, NETWORKS)


def warned(predictor: ts.Predictor, *layers: nn.Module, shape: tuple[int, ...]) -> ts.LayerProfile:
    graph = ts.trace(nn.Sequential(*layers).eval(), torch.zeros(shape))
    with pytest.warns(ts.PredictionWarning):
        return predictor.predict(graph)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU()],
        [nn.Conv2d(16, 32, 9, padding=4)],
        [nn.Conv2d(16, 32, 9, padding=4), nn.ReLU()],
        [nn.Conv2d(16, 16, 9, padding=4), nn.GELU(), nn.Conv2d(16, 16, 11, padding=5), nn.Mish()],
    ],
)
def test_a_whole_model_is_at_least_as_uncertain_as_each_of_its_layers(
    predictor: ts.Predictor, layers: list[nn.Module]
) -> None:
    graph = ts.trace(nn.Sequential(*layers).eval(), torch.rand(1, 16, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = with_networks(predictor).predict(graph)
    assert profile.interval_s is not None
    assert profile.whole_interval_s is not None
    low_s, high_s = profile.whole_interval_s
    below_s, above_s = profile.layer_s - profile.interval_s[:, 0], profile.interval_s[:, 1] - profile.layer_s
    # What falls below zero cannot be counted in full.
    assert profile.total_s - low_s >= min(below_s.max(), 0.95 * profile.total_s) * 0.999
    assert high_s - profile.total_s >= above_s.max() * 0.999


def test_a_whole_model_is_as_uncertain_as_a_layer_of_several_operations() -> None:
    operations = [Operation("linear", "linear", (1, 64, 8 * size)) for size in range(1, 9)]
    ones = np.ones(8)
    found = Predicted(ones, ones / 3, 3 * ones, [""] * 8)
    low_s, high_s = whole_interval(operations, [0] * 8, found, 8.0, 0.9, 1.2)
    assert high_s == pytest.approx(24.0)
    assert low_s == pytest.approx(8 / 3)


def test_many_layers_that_each_take_next_to_nothing_are_named(predictor: ts.Predictor) -> None:
    profile = warned(predictor, *(nn.Sigmoid() for _ in range(300)), shape=(1, 10_000))
    assert len(profile.warned) > 290


def test_layers_unlike_the_samples_are_off_together(predictor: ts.Predictor) -> None:
    def more(count: int) -> float:
        profile = warned(
            with_networks(predictor), *(nn.Conv2d(16, 16, 31 - 2 * i, padding="same") for i in range(count)),
            shape=(1, 16, 32, 32),
        )  # fmt: skip
        assert profile.whole_interval_s is not None
        return profile.whole_interval_s[1] / profile.total_s

    # Errors of four independent layers would make the interval half as wide.
    assert more(4) > 0.75 * more(1)


@pytest.mark.parametrize(
    ("layer", "shape", "why"),
    [
        (nn.Conv2d(16, 32, 15, padding=7), (1, 16, 32, 32), "225 kernel, where samples have 1 to 9"),
        (nn.Conv2d(2048, 16, 1), (1, 2048, 8, 8), "2,048 in channels"),
        (nn.Conv2d(16, 32, 3), (64, 16, 32, 32), "64 batch"),
        (nn.Linear(100_000, 16), (1, 100_000), "100,000 in features"),
        (nn.Conv1d(16, 32, 3), (1, 16, 1000), "no samples of convolution '1d'"),
        (nn.Conv3d(16, 32, 3), (1, 16, 8, 8, 8), "no samples of convolution '3d'"),
        (nn.Linear(512, 512).bfloat16(), (64, 512), "elements of 2 bytes"),
        (nn.Sigmoid(), (1, 100_000), "no samples of activation 'sigmoid'"),
    ],
)
def test_a_layer_unlike_the_samples_is_named_with_the_reason(
    predictor: ts.Predictor, layer: nn.Module, shape: tuple[int, ...], why: str
) -> None:
    dtype = next((tensor.dtype for tensor in layer.parameters()), torch.float32)
    graph = ts.trace(nn.Sequential(layer).eval(), torch.zeros(shape, dtype=dtype))
    with pytest.warns(ts.PredictionWarning, match=f"{graph.layers[0].name}: .*{why}"):
        profile = predictor.predict(graph)
    assert why in profile.warned[graph.layers[0].name]


def test_a_combination_of_sizes_that_no_sample_comes_near_is_named() -> None:
    rng = random.Random(0)

    def along(one: int, other: int) -> Sample:
        operation = Operation("linear", "linear", (1, one, other))
        return Sample(operation, truth_s(operation) * rng.uniform(0.95, 1.05), group=rng.randrange(1000))

    # Wide in one dimension or in the other, and never in both.
    found = [along(round(16 * 512 ** rng.random()), 16) for _ in range(100)]
    found += [along(16, round(16 * 512 ** rng.random())) for _ in range(100)]
    predictor = ts.Predictor.fit(found, FACTS)
    graph = ts.trace(nn.Linear(4096, 4096).eval(), torch.rand(1, 4096))
    with pytest.warns(ts.PredictionWarning, match="linear has"):
        predictor.predict(graph)


def test_a_base_grows_with_the_work_even_where_samples_of_one_size_differ_in_time() -> None:
    rng = random.Random(0)
    found = [
        Sample(Operation("matmul", "matmul", (16, 49, 49, 32)), 5e-5 * 40 ** (group % 2), group=group)
        for group in range(60)
    ]
    found += [Sample(drawn("activation", rng), 1e-5, group=group) for group in range(20)]
    model = ts.Predictor.fit(found, FACTS).model("matmul")
    assert model is not None
    small, large = (Sample(Operation("matmul", "matmul", (16, 49 * n, 49 * n, 32 * n)), 1.0) for n in (1, 16))
    guess = model.predict(SampleTable.of("matmul", [small, large]))
    assert guess[1] > 1000 * guess[0]


def test_a_recurrent_layer_takes_time_for_each_step() -> None:
    rng = random.Random(0)

    def layer(steps: int) -> Operation:
        return Operation("recurrent", "gru", (steps, 1, 16, 16, 3, 1))

    found = []
    for group in range(60):
        steps = round(128 ** rng.random())
        found.append(Sample(layer(steps), (50e-6 + 20e-6 * steps) * rng.uniform(0.95, 1.05), group=group))
    model = ts.Predictor.fit(found, FACTS).model("recurrent")
    assert model is not None
    guess = model.predict(SampleTable.of("recurrent", [Sample(layer(2000), 1.0)]))
    assert guess[0] == pytest.approx(2000 * 20e-6, rel=0.2)


def test_a_variant_with_few_samples_counts_as_one_without() -> None:
    few = [Sample(Operation("activation", "tanh", (100_000,)), 1e-4, group=1)] * 3
    predictor = ts.Predictor.fit([*samples(), *few], FACTS)
    profile = warned(predictor, nn.Tanh(), shape=(1, 100_000))
    assert "there are 3 samples of activation 'tanh'" in next(iter(profile.warned.values()))


def test_layers_that_take_next_to_nothing_are_not_named(predictor: ts.Predictor) -> None:
    graph = ts.trace(nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 8), nn.Tanh()).eval(), torch.rand(8, 2048))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predictor.predict(graph).warned == {}


def test_a_layer_smaller_than_all_samples_may_take_less_and_no_longer(predictor: ts.Predictor) -> None:
    graphs = [ts.trace(nn.Linear(size, 8).eval(), torch.rand(1, size)) for size in (2, 64)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, known = (predictor.predict(graph) for graph in graphs)
    assert small.interval_s is not None
    assert known.interval_s is not None
    assert small.interval_s[0, 0] < small.layer_s[0] / 8
    assert small.interval_s[0, 1] / small.layer_s[0] <= 1.001 * known.interval_s[0, 1] / known.layer_s[0]


def test_a_plan_says_which_layers_are_known_badly_and_where_they_run(predictor: ts.Predictor) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 15, padding=7), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval()
    graph = ts.trace(model, torch.rand(1, 16, 64, 64))
    with pytest.warns(ts.PredictionWarning):
        predicted = predictor.predict(graph)
    name = graph.layers[0].name
    here = ts.plan(graph, device=predicted, server=predicted, link="3g")
    assert here.row.on_device
    assert f"on the device the time of a layer may be off by a factor: {name}" in here.explain()
    there = ts.plan(graph, device=predicted.scaled(1e6), server=predicted, link="wifi")
    assert there.row.index == 0
    assert f"on the server the time of a layer may be off by a factor: {name}" in there.explain()
    assert here.interval_s is not None
    assert predicted.whole_interval_s is not None
    assert here.interval_s[0] <= predicted.whole_interval_s[0]
    assert here.interval_s[1] >= predicted.whole_interval_s[1]


def test_what_was_warned_of_is_kept_with_the_profile(predictor: ts.Predictor, tmp_path: Path) -> None:
    profile = warned(predictor, nn.Conv2d(16, 32, 15), shape=(1, 16, 32, 32))
    profile.save(tmp_path / "profile.json")
    again = ts.LayerProfile.load(tmp_path / "profile.json")
    assert again.warned == profile.warned
    assert again.scaled(2.0).warned == profile.warned


def test_a_whole_model_without_a_correction_is_as_uncertain_as_its_layers(
    predictor: ts.Predictor, graph: ts.LayerGraph
) -> None:
    profile = predictor.predict(graph)
    assert profile.interval_s is not None
    assert profile.whole_interval_s == pytest.approx(tuple(profile.interval_s.sum(axis=0)))


def test_too_few_samples_are_refused_with_their_counts() -> None:
    with pytest.raises(ts.CalibrationError, match=r"19 of convolution.*at least 20"):
        ts.Predictor.fit(samples(count=19), FACTS)


def test_a_profile_of_another_device_is_told_apart(predictor: ts.Predictor, graph: ts.LayerGraph) -> None:
    measured = ts.profile(graph, repeats=2, warmup=1, meter=None)
    found = predictor.mismatches(measured)
    assert any("a made-up device" in what for what in found)
    here = ts.Predictor(measured.provenance, predictor.samples, predictor.fitted, predictor.roofline)
    assert here.mismatches(measured) == ()
    assert here.mismatches(measured.scaled(2.0)) == ("it was scaled to emulate another device",)
    assert "predicted" in here.mismatches(here.predict(graph))[0]
    two = ts.Predictor(measured.provenance | {"threads": 2}, predictor.samples, predictor.fitted, predictor.roofline)
    assert two.mismatches(measured) == ("its threads is 1, this device's is 2",)


def test_a_bound_names_its_sources_and_no_plan_takes_it_unasked(graph: ts.LayerGraph) -> None:
    device = ts.reference_device("jetson-orin-nano")
    assert device.is_bound
    assert all(device.bounded(graph))
    sources = device.provenance["reconstructed_from"]
    assert any("peak" in source for source in sources)
    assert any("bandwidth" in source for source in sources)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = device.predict(graph)
    assert profile.is_bound
    assert profile.interval_s is None
    assert profile.whole_interval_s is None
    assert profile.energy is None
    weights = graph.layers[-1].parameter_bytes
    assert profile.layer_s[-1] >= weights / device.roofline.bandwidth_byte_s
    measured = ts.profile(graph, repeats=2, warmup=1, meter=None)
    assert not measured.is_bound
    for sides in ({"device": profile, "server": measured}, {"device": measured, "server": profile}):
        with pytest.raises(ts.PlanError, match="allow_bounds=True"):
            ts.plan(graph, **sides, link="lte")
        assert ts.plan(graph, **sides, link="lte", allow_bounds=True).value > 0
    links = [ts.Link.parse("wifi")]
    with pytest.raises(ts.PlanError, match="Orin Nano"):
        ts.plan(graph, stages=[profile, measured], links=links)
    assert ts.plan(graph, stages=[profile, measured], links=links, allow_bounds=True).latency_s > 0


def test_reference_devices_that_were_measured_have_models() -> None:
    for name in ts.reference_devices():
        device = ts.reference_device(name)
        assert ("reconstructed_from" in device.provenance) == device.is_bound
        assert device.provenance["device"]


@pytest.mark.parametrize(
    ("name", "gflop_s", "gbyte_s"),
    [
        ("tegra-k1-cpu", 73.6, 14.9),
        ("tegra-k1-gpu", 327, 14.9),
        ("k40-gpu", 4291, 288),
    ],
)
def test_the_papers_machines_are_measured_and_stay_below_their_data_sheets(
    name: str, gflop_s: float, gbyte_s: float
) -> None:
    device = ts.reference_device(name)
    assert "claritylab/djinn" in device.provenance["measured_by"]
    assert {"convolution", "linear", "matmul", "pooling", "activation", "normalization"} <= set(device.fitted)
    assert 0.05 * gflop_s < device.roofline.peak_flop_s / 1e9 <= gflop_s
    assert 0.05 * gbyte_s < device.roofline.bandwidth_byte_s / 1e9 <= gbyte_s
    metered = any(known.energy_form is not None for known in device.fitted.values())
    assert metered == name.startswith("tegra")


def test_a_device_is_a_file_or_a_name(tmp_path: Path) -> None:
    ts.reference_device("k40-gpu").save(tmp_path / "mine.json")
    assert load_device(tmp_path / "mine.json").provenance == load_device("k40-gpu").provenance
    with pytest.raises(ts.CalibrationError, match="tegra-k1-gpu"):
        load_device("tesla-k80")
    with pytest.raises(ts.CalibrationError, match="tegra-k1-gpu"):
        ts.reference_device("tesla-k80")


def test_costs_come_from_a_profile_a_calibration_or_a_name(
    predictor: ts.Predictor, graph: ts.LayerGraph, tmp_path: Path
) -> None:
    predicted = predictor.predict(graph)
    predicted.save(tmp_path / "profile.json")
    predictor.save(tmp_path / "device.json")
    for where in (tmp_path / "profile.json", tmp_path / "device.json"):
        assert costs_on(graph, where).layer_s == pytest.approx(predicted.layer_s)
    assert costs_on(graph, "jetson-orin-nano").total_s > 0
    other = ts.trace(nn.Sequential(nn.Linear(3, 3)).eval(), torch.rand(1, 3))
    with pytest.raises(ts.ProfileError, match="not of Sequential"):
        costs_on(other, tmp_path / "profile.json")
