"""How codecs are measured: calls that run together, what is tested in which order, what is left out, and interrupts."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import cli, codec
from torchsurgeon.codec import Budget, CodecTable, find_codec, halves, measure
from torchsurgeon.codec.boundaries import Tails, Walk
from torchsurgeon.errors import CodecError, SampleSizeError, UnfinishedWarning

torch.set_num_threads(1)


class Viewed(nn.Module):
    """Reads its batch size early, so that a number crosses beside the features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8 * 9, 5)

    def forward(self, image: Tensor) -> Tensor:
        count = image.size(0)
        x = torch.relu(self.first(image))
        x = nn.functional.adaptive_avg_pool2d(x.relu_(), 3)
        return self.last(x.view(count, -1))


class Windows(nn.Module):
    """Folds windows into the batch, the windows outermost, so that the parts of one call do not lie together."""

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.view(len(rows), 4, 300).transpose(0, 1).reshape(-1, 300) * 1.5
        x = torch.tanh(x)
        return x.view(4, -1, 300).sum(0)


class Fixed(nn.Module):
    """Takes one row only."""

    def forward(self, row: Tensor) -> Tensor:
        return torch.tanh(row.view(1, 600) * 2).view(2, 300)


class Sequence(nn.Module):
    """Has its batch in the second dimension."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.tanh(rows.transpose(0, 1) * 2).transpose(0, 1).contiguous() + 1


def noise(*shape: int, count: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("model", "shape", "together"),
    [
        (Viewed(), (1, 3, 16, 16), 16),
        (Viewed(), (2, 3, 16, 16), 16),
        (Sequence(), (1, 20, 30), 16),
        (Windows(), (1, 1200), 0),
        (Fixed(), (1, 600), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_calls_run_together_where_that_gives_each_its_own_answer(
    model: nn.Module, shape: tuple[int, ...], together: int
) -> None:
    calls = noise(*shape, count=21)
    graph = ts.trace(model.eval(), calls[0])
    walk = Walk(graph, [[call] for call in calls])
    answers = list(walk.answers())
    seen = []
    with torch.no_grad():
        for point in graph.points[:-1]:
            boundaries = walk.to(point)
            tails = Tails(walk, answers)
            seen.append(tails.together)
            for answer, output, call in zip(answers, tails(boundaries), calls, strict=True):
                assert torch.equal(answer["output"], model(call))
                assert output["output"].shape == answer["output"].shape
                assert torch.allclose(output["output"], answer["output"], atol=1e-5)
    # Where windows are outermost, only some points allow it.
    assert set(seen) == {together} if together else {1, 16}


def test_what_is_kept_at_a_point_is_not_overwritten_by_later_layers() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(inplace=True), nn.Linear(300, 4)).eval()
    calls = noise(1, 300, count=3)
    graph = ts.trace(model, calls[0])
    walk = Walk(graph, [[call] for call in calls])
    with torch.no_grad():
        for point in graph.points[:-1]:
            expected = [ts.cut(graph, point).head(call)[0] for call in calls]
            assert all(torch.equal(one[0], other) for one, other in zip(walk.to(point), expected, strict=True))


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    return ts.trace(Viewed().eval(), noise(1, 3, 16, 16)[0])


CALLS = noise(1, 3, 16, 16, count=40)
ALL = ["int4", "int8+zstd", "float16", "int8", "zstd", "bfloat16"]


def statuses(table: CodecTable, point: int) -> dict[str, str]:
    return {
        row.cost.codec: "lossless" if row.cost.lossless else row.untested or ("yes" if row.cost.within_budget else "no")
        for row in table.at(point)
    }


def test_the_first_failure_ends_the_test_of_coarser_codecs(graph: ts.LayerGraph) -> None:
    point = graph.point("first")
    seen = []

    def nearness(own: Tensor, changed: Tensor) -> float:
        seen.append(own)
        return -float((own - changed).abs().max())

    every = measure(graph, CALLS, ALL, points=["first"], budget=Budget(score=nearness, min_score=-9))
    findings = {row.cost.codec: row.finding("nearness") for row in every.rows}
    fine, coarse = findings["float16"], findings["bfloat16"]
    assert fine is not None
    assert coarse is not None
    assert coarse.bound < fine.bound
    seen.clear()
    budget = Budget(score=nearness, min_score=(coarse.bound + fine.bound) / 2)
    table = measure(graph, CALLS, ALL, points=["first"], budget=budget)
    assert statuses(table, point.index) == {
        "raw": "lossless",
        "int4": "after bfloat16",
        "int8+zstd": "after bfloat16",
        "float16": "yes",
        "int8": "after bfloat16",
        "zstd": "lossless",
        "bfloat16": "no",
    }
    assert len(seen) == 2 * len(CALLS)
    # Sizes and errors are known all the same.
    assert all(row.cost.size_bytes > 0 and (row.cost.lossless or row.boundary) for row in table.rows)


def test_codecs_that_change_the_same_share_their_test(graph: ts.LayerGraph) -> None:
    table = measure(graph, CALLS, ["int8+zstd", "int8"], points=["first"], budget=Budget(min_cosine=0.5))
    rows = {row.cost.codec: row for row in table.rows}
    assert rows["int8"].findings == rows["int8+zstd"].findings
    assert rows["int8"].findings[0].count == 40


def test_a_codec_that_has_failed_for_certain_is_tested_no_further(graph: ts.LayerGraph) -> None:
    seen = []

    def never(own: Tensor, changed: Tensor) -> bool:
        seen.append(own)
        return False

    table = measure(graph, CALLS, ["int8"], points=["first"], budget=Budget(accept=never, min_accepted=0.9))
    assert len(seen) == 16
    found = table.rows[-1].finding("accepted")
    assert found is not None
    assert (found.estimate, found.bound, found.count, found.kept) == (0.0, 0.0, 16, False)


class Noisy(nn.Module):
    """Its input compresses well, and the features behind it do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("noise", torch.randn(1, 2000))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :2000] * self.noise
        return torch.tanh(x)[:, :4] + 1


def test_what_is_larger_than_a_lossless_codec_before_is_not_tested_by_default() -> None:
    calls = [torch.full((1, 4096), k / 40) for k in range(1, 41)]
    graph = ts.trace(Noisy().eval(), calls[0])
    behind = next(point for point in graph.points if point.name == "mul")
    budget = Budget(min_cosine=0.5)
    table = measure(graph, calls, ["zstd", "float16"], budget=budget)
    assert statuses(table, behind.index)["float16"] == "not smaller than zstd at getitem"
    named = measure(graph, calls, ["zstd", "float16"], budget=budget, points=[0, behind.index])
    assert statuses(named, behind.index)["float16"] == "yes"


def test_a_codec_that_loses_something_only_in_later_calls_is_tested() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4)).eval()
    graph = ts.trace(model, torch.zeros(1, 300))
    # NaN cannot be packed, so these calls are sent without loss.
    calls = [torch.full((1, 300), float("nan")) for _ in range(70)]
    calls[1::2] = noise(1, 300, count=35)
    table = measure(graph, calls, ["int8"], points=[0], budget=Budget(min_cosine=-1))
    assert [row.cost.lossless for row in table.rows] == [True, False]
    assert table.rows[1].findings


@pytest.mark.parametrize(("count", "odd"), [(40, None), (40, 7), (10, None), (10, 7)])
def test_a_lossy_codec_counts_as_lossless_for_no_sample(count: int, odd: int | None) -> None:
    """Of calls that it cannot encode nothing is known of those that it can; one of these shows what it loses."""
    graph = ts.trace(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4)).eval(), torch.zeros(1, 300))
    calls = [torch.full((1, 300), float("inf")) for _ in range(count)]
    if odd is not None:
        calls[odd] = noise(1, 300, count=1)[0]
    table = measure(graph, calls, ["zstd", "int8"], points=[0], budget=Budget(min_cosine=-1, decide_by="estimate"))
    lossless = {row.cost.codec: row.cost.lossless for row in table.rows}
    assert lossless == {"raw": True, "zstd": True} | ({} if odd is None else {"int8": False})


def test_sizes_are_of_the_same_calls_for_all_codecs() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4)).eval()
    calls = noise(1, 300, count=100)
    graph = ts.trace(model, calls[0])
    table = measure(graph, calls, ["zstd", "int8+zstd"], points=[0], budget=Budget(max_top1_change=0.9))
    for row in table.rows[1:]:
        every_fourth = [len(find_codec(row.cost.codec).encode(call).data) for call in calls[::4]]
        assert row.cost.size_bytes == sum(every_fourth) / 25


def test_the_last_point_and_samples_that_are_too_small_are_refused_at_once(graph: ts.LayerGraph) -> None:
    with pytest.raises(CodecError, match="is the last, at which nothing crosses"):
        measure(graph, CALLS, points=[len(graph.layers)])
    with pytest.raises(SampleSizeError, match="299 calls are needed"):
        measure(graph, CALLS, budget=Budget(max_top1_change=0.01), progress=lambda *_: pytest.fail("it began"))


def test_progress_never_goes_back_and_ends_at_its_end(graph: ts.LayerGraph) -> None:
    told: list[tuple[float, float, str]] = []
    measure(graph, CALLS, ALL, budget=Budget(min_cosine=0.9), progress=lambda *now: told.append(now))
    done = [now[0] for now in told]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(told[-1][1])
    assert len({total for _, total, _ in told}) == 1
    assert told[0][2] == "the model's own answers"
    assert {point.name for point in codec.promising(graph)} == {what for _, _, what in told[1:]} - {told[0][2]}


def test_an_interrupt_keeps_what_was_measured(graph: ts.LayerGraph) -> None:
    points = ["first", 0]
    whole = measure(graph, CALLS, ["int8"], points=points)
    assert whole.unfinished == ()

    def stop_at_second(done: float, total: float, what: str) -> None:
        if what == "first":
            raise KeyboardInterrupt

    with pytest.warns(UnfinishedWarning, match="1 of 2 points were measured before"):
        table = measure(graph, CALLS, ["int8"], points=points, progress=stop_at_second)
    assert {row.name for row in table.rows} == {"input"}
    assert table.unfinished == ("first",)
    assert [(row.point, row.cost.codec) for row in table.rows] == [(r.point, r.cost.codec) for r in whole.at(0)]

    def stop_at_once(done: float, total: float, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(graph, CALLS, ["int8"], points=points, progress=stop_at_once)


def test_halves_are_drawn_once_and_hold_every_sample() -> None:
    first, second = halves(range(101))
    assert (len(first), len(second)) == (50, 51)
    assert sorted([*first, *second]) == list(range(101))
    assert halves(range(101)) == (first, second)
    assert first != list(range(50))


def test_an_interrupted_command_writes_and_prints_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / "a.png")
    out = tmp_path / "codecs.json"
    complete = codec.measure

    def interrupted(*args: Any, **options: Any) -> CodecTable:
        warnings.warn("measuring codecs was interrupted", UnfinishedWarning, stacklevel=2)
        return dataclasses.replace(complete(*args, **options), unfinished=("relu", "last"))

    monkeypatch.setattr(codec, "measure", interrupted)
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--sample", str(tmp_path), "--codecs", "zstd", "--point", "0", "--out", str(out)]
    assert cli.main(["codecs", "factories:tiny", *options]) == 130
    printed = capsys.readouterr()
    assert "interrupted before relu; 2 points not measured" in " ".join(printed.out.split())
    assert f"interrupted; 2 points were not measured; what was measured until then is in {out}" in printed.err
    assert CodecTable.load(out).unfinished == ("relu", "last")


def test_the_command_takes_a_score_of_one_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sample", str(tmp_path), "--min-boxes-matched", "0.9", "--min-pixels-kept", "0.9"]
    assert cli.main(["codecs", "factories:tiny", *options]) == 2
    assert "give one" in capsys.readouterr().err
