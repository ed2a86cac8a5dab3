"""Codecs at cuts across parallel branches: they are measured there, planned with, and used by a split model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.codec import Budget, CodecTable, find_codec, fit_codec, measure
from torchsurgeon.cutting import tail_for
from torchsurgeon.planning import Frontier
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.serve import ModelRegistry, Server, create_app

torch.set_num_threads(1)
BUDGET = Budget(max_top1_change=0.3)


class Branches(nn.Module):
    """Two branches behind a layer, of which the second shrinks its input more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.thin = nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 3, stride=2, padding=1))
        self.end = nn.Linear(16 * 64 + 2 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        wide, thin = self.wide(x), self.thin(x)
        return self.end(torch.cat([wide.flatten(1), thin.flatten(1)], 1))


def pictures(count: int, seed: int) -> list[Tensor]:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").split(1))


def made() -> tuple[nn.Module, ts.LayerGraph]:
    torch.manual_seed(0)
    model = Branches().eval()
    return model, ts.trace(model, pictures(1, 0)[0])


MODEL, GRAPH = made()
NAMES = [layer.name for layer in GRAPH.layers]
ACROSS = GRAPH.point_of([NAMES.index(name) for name in ("stem", "relu", "thin.0", "thin.1")])


@pytest.fixture(scope="module")
def table() -> CodecTable:
    return measure(GRAPH, pictures(40, 1), ["zstd", "int8", "int4"], points=[0], across=[ACROSS], budget=BUDGET)


def profiles(table: CodecTable) -> dict[str, Any]:
    measured = ts.profile(GRAPH, repeats=3)
    return {"device": measured, "server": measured.scaled(0.1), "codecs": table}


def test_the_cut_goes_across_branches() -> None:
    assert ACROSS.layers is not None
    assert ACROSS.name == "thin.1"
    assert len(ACROSS.tensors) == 2


def test_codecs_are_measured_and_judged_there(table: CodecTable) -> None:
    rows = {row.cost.codec: row for row in table.at(ACROSS)}
    assert set(rows) == {"raw", "zstd", "int8", "int4"}
    assert all(row.layers == ACROSS.layers for row in rows.values())
    assert rows["raw"].cost.size_bytes == ACROSS.size_bytes
    assert rows["int8"].cost.size_bytes == pytest.approx(ACROSS.size_bytes / 4, rel=0.05)
    head, tail = ts.cut(GRAPH, ACROSS).head, tail_for(GRAPH, [spec.name for spec in ACROSS.tensors])
    for name in ("int8", "int4"):
        codec, changed = find_codec(name), 0
        for picture in pictures(40, 1):
            encoded = [(tensor, codec.encode(tensor)) for tensor in head(picture)]
            decoded = [
                find_codec(one.codec).decode(one.data, t.dtype, t.shape, one.order, max_bytes=t.nbytes)
                for t, one in encoded
            ]
            changed += int(tail(*decoded).argmax(1) != MODEL(picture).argmax(1))
        (finding,) = rows[name].findings
        assert finding.estimate == changed / 40
        assert table.allowed(ACROSS, name) == finding.kept
    # The point with as many layers is another cut, of which nothing was measured.
    assert table.at(ACROSS.index) == ()
    assert CodecTable.from_json(table.to_json()) == table


def test_such_cuts_are_neither_left_out_for_others_nor_others_for_them() -> None:
    everywhere = measure(GRAPH, pictures(40, 1), ["zstd", "int8", "int4"], across=[ACROSS], budget=BUDGET)
    assert all(row.findings or row.cost.lossless for row in everywhere.at(ACROSS))
    without = measure(GRAPH, pictures(40, 1), ["zstd", "int8", "int4"], budget=BUDGET)
    assert [(row.name, row.cost.codec, row.untested) for row in everywhere.rows if row.layers is None] == [
        (row.name, row.cost.codec, row.untested) for row in without.rows
    ]


def test_a_plan_has_every_codec_that_was_measured_there_and_no_other(table: CodecTable) -> None:
    device, server, _ = profiles(table).values()
    there = [row for row in LayerCosts(GRAPH, device, server).rows(table) if row.layers == ACROSS.layers]
    assert {row.codec for row in there} == {cost.codec for cost in table.costs(ACROSS) if cost.within_budget}
    assert {"raw", "zstd", "int8"} <= {row.codec for row in there}
    frontier = Frontier.build(GRAPH, device, server, table)
    elsewhere = {row.codec for row in frontier.rows if row.layers not in (None, ACROSS.layers)}
    assert elsewhere <= {"raw"}
    cuts = {row.layers for row in frontier.rows if row.layers is not None}
    assert {point.layers for point in frontier.across(GRAPH)} == cuts


def test_a_table_with_a_cut_that_the_model_does_not_have_is_refused(table: CodecTable) -> None:
    rows = tuple(dataclasses.replace(row, layers=(1, 5)) if row.layers else row for row in table.rows)
    with pytest.raises(ts.PartitionError, match="cannot run apart"):
        Frontier.build(GRAPH, *profiles(dataclasses.replace(table, rows=rows)).values())


def test_a_frontier_names_its_cuts_only_for_its_own_model(table: CodecTable) -> None:
    frontier = Frontier.build(GRAPH, *profiles(table).values())
    other = ts.trace(nn.Linear(4, 2).eval(), torch.rand(1, 4))
    with pytest.raises(ts.PlanError, match="this frontier is of Branches"):
        frontier.across(other)


def test_a_fitted_codec_encodes_those_tensors_that_it_was_fitted_to() -> None:
    fitted = fit_codec(GRAPH, "relu", pictures(40, 2), name="stem")
    names = [fitted.at(2).name]
    found = measure(GRAPH, pictures(40, 1), names, points=["relu"], across=[ACROSS], budget=BUDGET)
    (there,) = [row for row in found.at(ACROSS) if row.cost.codec == names[0]]
    assert not there.cost.lossless
    assert there.findings
    assert there.cost.size_bytes < ACROSS.size_bytes / 4
    own = fit_codec(GRAPH, ACROSS, pictures(40, 2), name="across")
    own.check(GRAPH)


def test_a_split_model_runs_such_a_cut_with_the_codec_of_the_plan(table: CodecTable) -> None:
    registry = ModelRegistry()
    picture = pictures(1, 3)[0]
    registry.add("net", MODEL, picture)
    only = dataclasses.replace(
        table, rows=tuple(row for row in table.rows if row.layers == ACROSS.layers and row.cost.codec == "int8")
    )
    layers = ts.profile(GRAPH, repeats=3)
    samples = layers.samples_s.copy()
    # The device is slow but for the cut's own layers, so that only this cut pays over a narrow link.
    samples[:] = [1e-6 if k in (ACROSS.layers or ()) else 10.0 for k in range(len(NAMES))]
    device = dataclasses.replace(layers, samples_s=samples, whole_s=samples.sum(axis=1))
    options = {"device_profile": device, "server_profile": layers, "link": ts.Link("narrow", 1e4, 1e7, 0.01)}
    with (
        Server(create_app(registry)) as server,
        ts.SplitModule(
            MODEL, picture, server=server.url, name="net", codecs=only, fallback="error", **options
        ) as split,
    ):
        answer = split(picture)
        assert split.partition == ACROSS
        assert split.last.sent_bytes < ACROSS.size_bytes / 3
        assert split.last.bits == "changed by a lossy codec"
        torch.testing.assert_close(answer, MODEL(picture), atol=0.1, rtol=0.1)
    registry.close()
