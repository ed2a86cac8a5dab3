"""The rate of a fitted codec follows the link: fewer bits over a slow one, more over a quick one, within the budget."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.adapting import Estimates, Quantity
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable, Finding, FittedCodec, fit_codec
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.serve import ModelRegistry, Server, create_app

Split = tuple[ts.SplitModule, LinkEmulator]
CUT = "2"
RATES = (4.0, 2.0, 1.0, 0.5)
SLOW, QUICK = ts.Link("slow", 4e5, 1e7, 0.02), ts.Link("quick", 1e9, 1e9, 0.02)


def pictures(count: int, seed: int) -> list[Tensor]:
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").split(1))


X = pictures(1, 0)[0]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
    return nn.Sequential(*head, nn.Conv2d(12, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10)).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> ts.LayerGraph:
    return ts.trace(model, X)


@pytest.fixture(scope="module")
def fitted(graph: ts.LayerGraph) -> FittedCodec:
    return fit_codec(graph, CUT, pictures(40, 1), name="follows")


@pytest.fixture(scope="module")
def table(graph: ts.LayerGraph, fitted: FittedCodec) -> CodecTable:
    """Every rate but the lowest is within the budget; times are alike, so that only bytes and losses differ."""
    point = graph.point(CUT)
    values = point.size_bytes / 4

    def row(codec: str, size_bytes: float, changed: float) -> CodecRow:
        findings = (Finding("top-1 changed", changed, changed + 0.01, 0.05, 300, changed + 0.01 <= 0.05),)
        cost = CodecCost(codec, size_bytes, 1e-4, 1e-4, lossless=False, within_budget=findings[0].kept)
        return CodecRow(point.index, point.name, float(point.size_bytes), cost, None, findings)

    rows = [row(fitted.at(rate).name, values * rate / 8, 0.03 / rate) for rate in RATES]
    rows.append(row("int8", values, 0.001))
    assert [one.cost.within_budget for one in rows] == [True, True, True, False, True]
    return CodecTable(type(graph.model).__name__, graph.fingerprint, 1, 300, "made up", tuple(rows))


@pytest.fixture(scope="module")
def known(graph: ts.LayerGraph) -> dict[str, Any]:
    """Profiles by which the device takes long for all layers behind the cut."""
    count, cut = len(graph.layers), graph.point(CUT).index
    names = tuple(layer.name for layer in graph.layers)

    def made(seconds: list[float]) -> LayerProfile:
        samples = numpy.array([seconds])
        return LayerProfile("Sequential", graph.fingerprint, 1, names, samples, samples.sum(axis=1), {})

    device = made([1e-4 if k < cut else 10.0 for k in range(count)])
    return {"device_profile": device, "server_profile": made([1e-4] * count)}


@contextmanager
def over(model: nn.Module, fitted: FittedCodec, link: ts.Link, **options: Any) -> Iterator[Split]:
    """Yield a split model over an emulated link, and the emulator."""
    registry = ModelRegistry()
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder, "follows.fitted"))
        registry.add("net", model, X).add_codec(Path(folder, "follows.fitted"))
    with (
        Server(create_app(registry)) as server,
        LinkEmulator(0, "127.0.0.1", server.port, link) as emulator,
        ts.SplitModule(model, X, server=f"http://127.0.0.1:{emulator.port}", name="net", link=link, **options) as split,
    ):
        yield split, emulator
    registry.close()


def sent_as(split: ts.SplitModule) -> str:
    assert split.last is not None
    assert split.last.decision is not None
    return str(split.last.decision.row.codec)


def remote(split: ts.SplitModule) -> bool:
    return split.last.server is not None and split.last.degraded is None


def until(what: Callable[[], bool], split: ts.SplitModule) -> None:
    end_s = time.monotonic() + 120
    split(X)
    while not what():
        assert time.monotonic() < end_s, (split.last, split.stats())
        split(X)


def test_the_rate_follows_the_link(
    model: nn.Module, fitted: FittedCodec, table: CodecTable, known: dict[str, Any]
) -> None:
    # At a fixed cut: where the cut is free, too, a tail that ran here once would show how quick it is in truth.
    with over(model, fitted, SLOW, partition=CUT, codec="auto", codecs=table, **known) as (split, emulator):
        # The coarsest of those within the budget. The device itself may be the first to answer.
        until(lambda: remote(split) and sent_as(split) == fitted.at(1.0).name, split)
        slow_bytes = split.last.sent_bytes
        assert split.last.bits == "changed by a lossy codec"
        emulator.set_link(QUICK)
        # How much finer depends on how busy this machine is, which the estimates count as the link's.
        coarse = fitted.at(1.0).name
        until(lambda: remote(split) and sent_as(split) != coarse and split.last.sent_bytes > 1.5 * slow_bytes, split)
        assert split.last.decision.row.budget_used < 0.9
        emulator.set_link(SLOW)
        until(lambda: remote(split) and sent_as(split) == coarse, split)
        assert split.partition.name == CUT
        used = {decision.row.codec for decision in split.decisions}
        assert fitted.at(0.5).name not in used


@pytest.mark.parametrize("partition", [CUT, "auto"])
def test_a_link_in_between_gets_a_rate_in_between(
    model: nn.Module, fitted: FittedCodec, table: CodecTable, known: dict[str, Any], partition: str
) -> None:
    """By the estimates alone, over all links from slow to quick: what is sent never gets coarser on a quicker link."""
    with over(model, fitted, SLOW, partition=partition, codec="auto", codecs=table, **known) as (split, _):
        split.prepare()
        (peer,) = split._engine.servers.peers
        rows = {row.codec: row for row in peer.plan.frontier.rows if row.name == CUT}
        assert partition == "auto" or set(rows.values()) == set(peer.plan.frontier.rows)
        assert set(rows) == {"raw", "int8", *(fitted.at(rate).name for rate in RATES[:-1])}
        chosen = []
        for exponent in range(40):
            peer.adopt(ts.Link("estimated", 1e5 * 10 ** (exponent / 10), 1e7, 0.02))
            estimates = Estimates(peer.state.link.estimate(), peer.state.load.estimate(), Quantity(1, 0.1, 0.1, 0))
            peer.plan = peer.plan.toward(peer.plan.goal)
            chosen.append(peer.plan.decide(estimates)[1].row)
        used = [row.budget_used for row in chosen]
        assert used == sorted(used, reverse=True)
        assert len({row.codec for row in chosen}) >= 4
        assert (chosen[0].codec, chosen[-1].codec) == (fitted.at(1.0).name, "raw")


def test_a_fixed_cut_without_a_table_or_with_a_named_codec_keeps_its_codec(
    model: nn.Module, fitted: FittedCodec, table: CodecTable, known: dict[str, Any]
) -> None:
    with over(model, fitted, QUICK, partition=CUT, codec=fitted.at(1.0), codecs=table, **known) as (split, _):
        until(lambda: remote(split), split)
        assert split.last.decision is None
        coarse_bytes = split.last.sent_bytes
        split.codec = "auto"
        until(lambda: remote(split), split)
        assert split.last.sent_bytes > coarse_bytes
        assert sent_as(split) != fitted.at(1.0).name
        split.codec = fitted.at(1.0)
        until(lambda: remote(split), split)
        assert (split.last.decision, split.last.sent_bytes) == (None, coarse_bytes)
    with over(model, fitted, QUICK, partition=CUT, codec="auto", **known) as (split, _):
        split(X)
        assert split.last.decision is None


def test_cut_and_codec_may_be_fixed_and_freed_at_any_time(
    model: nn.Module, fitted: FittedCodec, table: CodecTable, known: dict[str, Any]
) -> None:
    with over(model, fitted, SLOW, codec="auto", codecs=table, **known) as (split, _):
        for partition, codecs in ((CUT, {fitted.at(1.0).name}), (4, None), ("server", None), ("auto", None)):
            split.partition = partition
            split(X)
            if codecs is not None:
                assert sent_as(split) in codecs
            elif partition != "auto":
                # No codec was measured there.
                assert split.last.decision is None
                torch.testing.assert_close(split(X), model(X))


def test_a_server_without_the_file_is_sent_the_other_codecs(
    model: nn.Module, fitted: FittedCodec, table: CodecTable, known: dict[str, Any]
) -> None:
    registry = ModelRegistry()
    registry.add("net", model, X)
    with (
        Server(create_app(registry)) as server,
        ts.SplitModule(
            model, X, server=server.url, name="net", partition=CUT, codec="auto", codecs=table, link=SLOW, **known
        ) as split,
    ):
        split(X)
        assert sent_as(split) == "int8"
    registry.close()
