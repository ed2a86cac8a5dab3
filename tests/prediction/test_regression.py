"""The forms of a kind's model: which is chosen for which measurements, and that it is as good as plain regressors."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from threadpoolctl import threadpool_limits

from benchmarks import csv_import
from torchsurgeon.prediction.kinds import Array, Operation
from torchsurgeon.prediction.regression import FORMS, HeldOut, fit_kind, out_of_fold, refit_kind
from torchsurgeon.prediction.samples import Sample, SampleTable, read_csv


@pytest.fixture(scope="module")
def made_up() -> dict[str, SampleTable]:
    return {name: table for name, (_, table) in csv_import.made_up(quick=True).items()}


def within_20(truth: Array, predicted: Array) -> float:
    return float(np.mean(np.abs(predicted / truth - 1) <= 0.2))


@pytest.mark.parametrize("name", ["kernels", "kernels, disturbed", "caches", "no formula"])
def test_rows_held_out_are_predicted_as_well_as_by_plain_regressors(made_up: dict[str, SampleTable], name: str) -> None:
    table = made_up[name]
    unseen = table.groups % 4 == 0
    seen, rows = table.take(~unseen), table.take(unseen)
    ours = within_20(rows.seconds, fit_kind(seen, seen.seconds).predict(rows))
    for rival in (HistGradientBoostingRegressor(random_state=0), RandomForestRegressor(100, random_state=0)):
        with threadpool_limits(1):
            rival.fit(np.log(seen.sizes), np.log(seen.seconds))
        # Of a few hundred rows, a share is known to one percent at best.
        assert ours >= within_20(rows.seconds, np.exp(rival.predict(np.log(rows.sizes)))) - 0.02


def test_disturbed_measurements_are_followed_by_their_medians(made_up: dict[str, SampleTable]) -> None:
    table = made_up["kernels, disturbed"]
    model = fit_kind(table, table.seconds)
    assert model.form == "median trees"
    quiet = np.array([csv_import.kernels_s(sample.operation) for sample in table.samples()])
    # A quarter of the rows took twice as long in the mean.
    assert np.median(model.predict(table) / quiet) < 1.1


def test_a_device_that_follows_no_formula_gets_a_form_without_a_base(made_up: dict[str, SampleTable]) -> None:
    table = made_up["no formula"]
    assert fit_kind(table, table.seconds).form == "plain trees"


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_grows_with_the_work_beyond_its_samples(form: str) -> None:
    rng = random.Random(0)
    samples = []
    for group in range(100):
        sizes = (rng.randint(1, 64), 8 * rng.randint(1, 64), 8 * rng.randint(1, 64))
        samples.append(Sample(Operation("linear", "linear", sizes), 1e-6 + math.prod(sizes) * 1e-10, group=group))
    table = SampleTable.of("linear", samples)
    perfect = HeldOut.of(table.seconds, table.seconds)
    model = refit_kind(table, table.seconds, form, perfect)
    beyond = [Operation("linear", "linear", (64 * factor, 512 * factor, 512)) for factor in (1, 4, 16)]
    border, more, most = model.predict(SampleTable.of("linear", [Sample(op, 1.0) for op in beyond]))
    assert border < more / 4 < most / 16
    assert np.isfinite(model.predict(table)).all()


@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_that_is_fitted_again_predicts_the_same(made_up: dict[str, SampleTable], form: str) -> None:
    table = made_up["caches"].take(slice(0, 60))
    known = HeldOut.of(table.seconds, table.seconds)
    first, second = (refit_kind(table, table.seconds, form, known).predict(table) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_predictions_are_scaled_to_the_sum_only_where_that_makes_errors_smaller() -> None:
    truth = np.concatenate([np.full(90, 1.0), np.full(10, 100.0)])
    # All are predicted too short by the same factor: scaling mends all.
    assert HeldOut.of(truth, truth / 1.2, smeared=True).sum_ratio == pytest.approx(1.2)
    # A few long ones are predicted too short: scaling would spoil all others.
    few = np.where(truth > 50, truth / 1.2, truth)
    errors = HeldOut.of(truth, few, smeared=True)
    assert errors.sum_ratio == 1.0
    assert errors.median == 0.0


def test_rows_along_a_grid_are_not_held_out_size_by_size() -> None:
    # Every fifth row has the same size: held out together, no model would have seen that size.
    sizes = [(1, 64 * 2**row, 64 * 4**column) for row in range(8) for column in range(5)]
    samples = [Sample(Operation("linear", "linear", s), math.prod(s) * 1e-9, group=i) for i, s in enumerate(sizes)]
    table = SampleTable.of("linear", samples)
    steps = {64 * 4**column: 3.0**column for column in range(5)}
    seconds = table.seconds * np.array([steps[int(out)] for out in table.sizes[:, 2]])
    assert np.median(np.abs(out_of_fold(table, seconds, "forest") / seconds - 1)) < 0.6


def test_two_rows_of_the_same_operation_are_held_out_together(tmp_path: Path) -> None:
    lines = [f"{8 * (row % 25 + 1)},64,{row + 1}" for row in range(50)]
    (tmp_path / "fc.csv").write_text("\n".join(["in_features,out_features,us", *lines]))
    samples = read_csv("fc", tmp_path / "fc.csv")
    assert [sample.group for sample in samples] == [*range(25), *range(25)]


def test_fitting_leaves_the_number_of_threads_as_it_was(made_up: dict[str, SampleTable]) -> None:
    before = torch.get_num_threads()
    table = made_up["caches"].take(slice(0, 25))
    fit_kind(table, table.seconds)
    assert torch.get_num_threads() == before


def test_the_bytes_of_a_network_count_where_weights_are_read() -> None:
    rng = random.Random(0)
    samples = []
    for group in range(160):
        sizes, network = (1, 8 * rng.randint(8, 32), 8 * rng.randint(8, 32)), rng.choice((1e5, 1e8))
        # Weights that other layers put out of the caches take three times as long to read.
        seconds = 2e-6 + math.prod(sizes) * 1e-10 * (3 if network > 1e6 else 1)
        samples.append(Sample(Operation("linear", "linear", sizes), seconds, group=group, network_bytes=network))
    table = SampleTable.of("linear", samples)
    alike = dataclasses.replace(table, network_bytes=np.zeros(len(table)))
    known, unknown = (fit_kind(one, one.seconds).held_out.median for one in (table, alike))
    assert known < unknown / 2


def test_the_bytes_of_networks_are_kept_where_they_are_known() -> None:
    operation = Operation("linear", "linear", (1, 64, 64))
    for network_bytes in (0.0, 5e6):
        table = SampleTable.of("linear", [Sample(operation, 1e-5, network_bytes=network_bytes)])
        data = table.to_json()
        assert ("network_bytes" in data) is (network_bytes > 0)
        assert SampleTable.from_json("linear", data).network_bytes.tolist() == [network_bytes]
    wrong = data | {"network_bytes": [-1]}
    with pytest.raises(ValueError, match="network_bytes of linear must be from 0"):
        SampleTable.from_json("linear", wrong)
