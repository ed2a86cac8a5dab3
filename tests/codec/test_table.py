"""Codecs measured on a user's sample: what the table says, what a budget allows, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.codec import (
    Budget,
    CodecTable,
    codec_names,
    find_codec,
    image_call,
    image_sample,
    measure,
    measured_names,
    promising,
)
from torchsurgeon.errors import CodecError, PartitionError

torch.set_num_threads(1)


class Photo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(8, 4, 3, stride=2)
        self.last = nn.Linear(4 * 7 * 7, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.first(image.float() / 255))
        return self.last(self.second(x).flatten(1))


def photos(count: int = 3) -> list[Tensor]:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return [torch.stack([x * 7, y * k, (x + y) * 3])[None].to(torch.uint8) for k in range(1, count + 1)]


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    return ts.trace(Photo().eval(), photos()[0])


@pytest.fixture(scope="module")
def table(graph: ts.LayerGraph) -> CodecTable:
    budget = Budget(min_cosine=0.9999, decide_by="estimate")
    return measure(graph, photos(), budget=budget, points=[0, "first", "relu", "second"])


def test_sizes_are_those_that_cross(graph: ts.LayerGraph, table: CodecTable) -> None:
    point = graph.point("relu")
    model, sizes = graph.model, {}
    boundaries = [torch.relu(model.first(photo.float() / 255)) for photo in photos()]
    for name in ("raw", "zstd", "int8", "int8+zstd"):
        sizes[name] = sum(len(find_codec(name).encode(one).data) for one in boundaries) / 3
    found = {cost.codec: cost.size_bytes for cost in table.costs(point.index)}
    assert {name: found[name] for name in sizes} == pytest.approx(sizes)
    assert found["raw"] == point.size_bytes
    for row in table.at(point.index):
        assert row.ratio == pytest.approx(point.size_bytes / row.cost.size_bytes)


def test_image_codecs_are_measured_where_there_are_images_and_only_there(
    table: CodecTable, graph: ts.LayerGraph
) -> None:
    at_input = {cost.codec for cost in table.costs(0)}
    assert at_input == {"raw", "zstd", *(name for name in measured_names() if find_codec(name).image)}
    inside = {cost.codec for cost in table.costs(graph.point("relu").index)}
    assert inside == {name for name in codec_names() if find_codec(name).image is None}


def test_what_is_lossless_is_always_allowed_and_the_rest_within_the_budget(table: CodecTable) -> None:
    for row in table.rows:
        cost = row.cost
        assert cost.lossless == find_codec(cost.codec).lossless
        assert table.allowed(row.point, cost.codec) == cost.within_budget
        if cost.lossless:
            assert cost.within_budget
            assert (row.boundary, row.findings, row.untested) == (None, (), "")
        elif row.untested:
            assert not cost.within_budget
            assert not row.findings
        else:
            found = row.finding("cosine")
            assert found is not None
            assert cost.within_budget == found.kept == (found.estimate >= 0.9999)
            assert row.boundary is not None
            assert row.boundary.rmse <= row.boundary.max_abs
    assert {row.cost.within_budget for row in table.rows if not row.cost.lossless} == {True, False}


def test_finer_codecs_err_less(table: CodecTable, graph: ts.LayerGraph) -> None:
    rows = {row.cost.codec: row for row in table.at(graph.point("first").index)}
    errors = [rows[name].boundary.rmse for name in ("float16", "bfloat16", "int8", "int4")]
    assert errors == sorted(errors)
    assert rows["int8"].boundary == rows["int8+zstd"].boundary


def test_without_a_budget_nothing_lossy_is_allowed(graph: ts.LayerGraph) -> None:
    table = measure(graph, photos(1), ["float16", "zstd"], points=["relu"])
    assert [(c.codec, c.within_budget) for c in table.costs(graph.point("relu").index)] == [
        ("raw", True),
        ("float16", False),
        ("zstd", True),
    ]


def test_a_table_survives_its_file(table: CodecTable, tmp_path: Path, graph: ts.LayerGraph) -> None:
    path = tmp_path / "codecs.json"
    table.save(path)
    again = CodecTable.load(path)
    assert again == table
    again.check(graph)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "torchsurgeon.codecs/1"}, "the format of a codec table must be .* measure the codecs again"),
        ({"unfinished": None}, "holds a wrong value"),
        ({"rows": None}, "holds a wrong value"),
        ({"rows": [{}]}, "has no field"),
        ({"model": ...}, "has no field 'model'"),
        ({"batch": float("inf")}, "holds a wrong value"),
        ({"provenance": 7}, "holds a wrong value"),
    ],
)
def test_a_damaged_table_is_refused(table: CodecTable, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    data = table.to_json() | change
    path = tmp_path / "codecs.json"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    with pytest.raises(CodecError, match=says) as refused:
        CodecTable.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, "half"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "codecs.json").write_text(text)
    with pytest.raises(CodecError, match=r"codecs\.json is not JSON"):
        CodecTable.load(tmp_path / "codecs.json")


def test_a_table_of_another_batch_size_is_refused(table: CodecTable, graph: ts.LayerGraph) -> None:
    with pytest.raises(CodecError, match=f"batches of {graph.batch + 1}"):
        dataclasses.replace(table, batch=graph.batch + 1).check(graph)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size_bytes", -1.0), ("encode_s", float("nan")), ("decode_s", "soon"), ("decode_s", True),
        ("within_budget", "no"), ("codec", 3), ("head_share", 10**400),
    ],
)  # fmt: skip
def test_a_table_with_costs_that_cannot_be_is_refused(table: CodecTable, field: str, value: object) -> None:
    data = json.loads(json.dumps(table.to_json()))
    data["rows"][0]["cost"][field] = value
    with pytest.raises(CodecError, match=rf"{field} must be .*; got .*; measure"):
        CodecTable.from_json(data)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (None, "point", 1.5), (None, "name", 3), (None, "raw_bytes", -1.0), (None, "raw_bytes", float("inf")),
        (None, "untested", None), (None, "layers", "ab"), (None, "layers", [0, -1]), (None, "cost", []),
        (None, "boundary", "none"), (None, "findings", [3]), ("boundary", "rmse", "small"),
        ("boundary", "cosine", float("nan")), ("findings", "estimate", "few"), ("findings", "bound", float("nan")),
        ("findings", "count", -1), ("findings", "kept", "yes"), ("findings", "measure", None),
    ],
)  # fmt: skip
def test_a_table_with_rows_that_cannot_be_is_refused(
    table: CodecTable, part: str | None, field: str, value: object
) -> None:
    data = json.loads(json.dumps(table.to_json()))
    row = next(row for row in data["rows"] if row["findings"])
    changed = row if part is None else row[part][0] if part == "findings" else row[part]
    changed[field] = value
    with pytest.raises(CodecError, match=rf"{field} must be .*; got .*; measure"):
        CodecTable.from_json(data)


def test_a_table_of_another_model_is_refused(table: CodecTable) -> None:
    other = ts.trace(nn.Sequential(nn.Linear(3, 3)).eval(), torch.zeros(1, 3))
    with pytest.raises(CodecError, match=r"measured on Photo .* not on Sequential"):
        table.check(other)
    with pytest.raises(CodecError, match="was not measured at point 0; measured are: raw, zstd"):
        table.allowed(0, "int8")
    assert table.costs(99) == ()


# --- budgets ---


def test_a_budget_by_predictions_counts_those_that_change(graph: ts.LayerGraph) -> None:
    budget = Budget(max_top1_change=1.0)
    table = measure(graph, photos(8), ["int4", "float16"], points=["first", "second"], budget=budget)
    for row in table.rows:
        if not row.cost.lossless:
            found = row.finding("top-1 changed")
            assert found is not None
            assert (found.count, found.kept, row.cost.within_budget) == (8, True, True)
            assert (found.estimate * 8).is_integer()


def test_a_budget_may_be_any_function_of_the_models_outputs(graph: ts.LayerGraph) -> None:
    seen = []

    def close(reference: Tensor, output: Tensor) -> bool:
        seen.append((reference, output))
        return bool((reference - output).abs().max() < 1e-3)

    budget = Budget(accept=close, min_accepted=1, decide_by="estimate")
    table = measure(graph, photos(4), ["float16", "int4"], points=["relu"], budget=budget)
    assert len(seen) == 8
    expected = [graph.model(photo) for photo in photos(4)]
    assert all(any(torch.equal(reference, one) for one in expected) for reference, _ in seen)
    at = graph.point("relu").index
    assert table.allowed(at, "float16")
    assert not table.allowed(at, "int4")
    assert table.budget == "close accepts 100.00% of calls; in the sample itself"
    most = Budget(accept=lambda *_: True, min_accepted=0.4)
    half = measure(graph, photos(6), ["int4"], points=["relu"], budget=most)
    assert half.allowed(at, "int4")


def test_a_budget_without_a_sample_is_refused(graph: ts.LayerGraph) -> None:
    with pytest.raises(CodecError, match="measured on samples of your own, and samples is empty"):
        measure(graph, [], budget=Budget(min_cosine=0.9))


# --- samples and points ---


def test_samples_unlike_the_example_are_refused(graph: ts.LayerGraph) -> None:
    with pytest.raises(
        CodecError, match=r"sample 1 .*'image' must be of the example's dtype torch.uint8; got torch.float32"
    ):
        measure(graph, [photos()[0], torch.zeros(1, 3, 32, 32)])
    with pytest.raises(CodecError, match=r"sample 0 has torch.uint8 of shape \[1, 3, 64, 64\]"):
        measure(graph, [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
    with pytest.raises(CodecError, match="sample 0 is not a call like the traced example"):
        measure(graph, [{"picture": photos()[0]}])
    with pytest.raises(CodecError, match="there is no codec 'zip'"):
        measure(graph, photos(1), ["zip"])
    with pytest.raises(PartitionError, match="there is no layer 'third'"):
        measure(graph, photos(1), points=["third"])


def test_several_inputs_and_several_boundary_tensors() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = torch.relu(x)
            return y * 2 + torch.tanh(y) + ids

    calls = [{"x": torch.randn(1, 500), "ids": torch.arange(500)[None]} for _ in range(2)]
    graph = ts.trace(Two().eval(), **calls[0])
    table = measure(graph, calls, ["int8"], budget=Budget(min_cosine=0.99, decide_by="estimate"))
    raw, packed = table.costs(0)
    assert raw.size_bytes == 500 * 4 + 500 * 8
    assert packed.size_bytes == 500 + 8 + 500 * 8
    assert packed.within_budget


def test_promising_points_never_grow_and_are_bounded() -> None:
    layers = [nn.Linear(16, 16) for _ in range(60)]
    graph = ts.trace(
        nn.Sequential(nn.Linear(8, 32), *[nn.Linear(32, 16)], *layers, nn.Linear(16, 4)).eval(), torch.zeros(1, 8)
    )
    points = promising(graph, 10)
    assert [p.index for p in points] == sorted({p.index for p in points})
    sizes = [p.size_bytes for p in points]
    assert sizes == sorted(sizes, reverse=True)
    assert points[0].index == 0
    assert len(promising(graph)) <= 24
    long = ts.trace(nn.Sequential(*layers).eval(), torch.zeros(1, 16))
    assert len(promising(long, 10)) == 10
    assert promising(long, 10)[-1].index > 50


def test_a_folder_of_images_is_a_sample(tmp_path: Path) -> None:
    for k, size in enumerate([(64, 40), (40, 64), (32, 32)]):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    graph = ts.trace(Photo().eval(), photos()[0])
    calls = image_sample(graph, tmp_path)
    assert [(call.shape, call.dtype) for call in calls] == [((1, 3, 32, 32), torch.uint8)] * 3
    exact = torch.from_numpy(numpy.array(Image.open(tmp_path / "2.png"))).permute(2, 0, 1)
    assert torch.equal(calls[2][0], exact)
    assert torch.equal(image_call(graph, tmp_path / "1.png"), calls[1])
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 4)).eval()
    floats = image_sample(ts.trace(model, torch.zeros(2, 3, 32, 32)), tmp_path)
    assert [call.shape for call in floats] == [(2, 3, 32, 32)]
    pair = image_call(ts.trace(model, torch.zeros(2, 3, 32, 32)), tmp_path / "0.png")
    assert torch.equal(pair[0], floats[0][0])
    assert torch.equal(pair[0], pair[1])
    assert -2.2 < float(floats[0].min()) < 0 < float(floats[0].max()) < 2.7


def test_an_image_of_16_bits_keeps_its_brightness(tmp_path: Path) -> None:
    graph = ts.trace(Photo().eval(), photos()[0])
    Image.fromarray(numpy.linspace(0, 65535, 1600).reshape(40, 40).astype("uint16")).save(tmp_path / "a.png")
    assert image_call(graph, tmp_path / "a.png").float().mean().item() == pytest.approx(127, abs=3)
    Image.fromarray(numpy.full((40, 40), 0.5, "float32")).save(tmp_path / "a.tiff")
    with pytest.raises(CodecError, match="must have 8 or 16 bits a channel; got one of Pillow's mode 'F'"):
        image_call(graph, tmp_path / "a.tiff")


def test_folders_and_models_that_make_no_sample_are_refused(tmp_path: Path, graph: ts.LayerGraph) -> None:
    with pytest.raises(CodecError, match="is not readable: No such file"):
        image_sample(graph, tmp_path / "nowhere")
    with pytest.raises(CodecError, match=r"takes 1 images; the folder '.*' holds 0"):
        image_sample(graph, tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(CodecError, match=r"a.png' is not readable"):
        image_sample(graph, tmp_path)
    rows = ts.trace(nn.Sequential(nn.Linear(3, 3)).eval(), torch.zeros(1, 3))
    with pytest.raises(CodecError, match="image files need a model with one input"):
        image_sample(rows, tmp_path)


def test_the_command_prints_the_table_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / "a.png")
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "codecs.json"
    options = ["--sample", str(tmp_path), "--codecs", "zstd,int8+zstd", "--point", "0", "--point", "1"]
    budget = ["--min-cosine", "0.9"]
    assert cli.main(["codecs", "factories:tiny", *options, *budget]) == 2
    assert "needs at least 30 calls; 1 judge here. Give more samples" in capsys.readouterr().err
    budget += ["--decide-by", "estimate"]
    assert cli.main(["codecs", "factories:tiny", *options, *budget, "--out", str(out)]) == 0
    # A caption is folded to its table's width.
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("int8+zstd", "lossless", "yes", "mean cosine similarity at least 0.9; in the sample itself"):
        assert word in printed
    assert [row.cost.codec for row in CodecTable.load(out).at(0)] == ["raw", "zstd", "int8+zstd"]
    assert cli.main(["codecs", "factories:tiny", "--sample", str(tmp_path / "none")]) == 2
    assert "--sample must be a folder of images" in capsys.readouterr().err
    assert cli.main(["codecs", "factories:tiny", *options[:2], "--codecs", "zip"]) == 2
    assert "there is no codec 'zip'" in capsys.readouterr().err
