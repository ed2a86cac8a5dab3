"""What the demo compares: ways to run the model over each link and within each budget, and what they take."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchsurgeon.codec import CodecTable
from torchsurgeon.link import Link
from torchsurgeon.module import SplitModule
from torchsurgeon.planning import Row, plan
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph

LOSSLESS, BUDGET = "lossless", "3 %"
OBJECTIVES = {"one": "latency", "stream": "throughput"}
WAYS = ("device", "server", "ours")
_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run the model, as it is planned.

    Attributes:
        mode: ``"one"`` photograph at a time, or ``"stream"``.
        link: the link's name.
        budget: ``"lossless"``, or ``"3 %"`` where so many of the answers may change.
        way: ``"device"`` for everything there, ``"server"`` for everything there with the best codec for the
            photograph, ``"ours"`` for what the planner chooses among all cuts and codecs, the former two included.
        row: the cut and the codec.
        predicted_s: the predicted latency, or of a stream the seconds between answers.
    """

    mode: str
    link: str
    budget: str
    way: str
    row: Row
    predicted_s: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What one setting was measured to take.

    Attributes:
        mode: as in ``Setting``.
        link: as in ``Setting``.
        budget: as in ``Setting``.
        way: as in ``Setting``.
        cut: where the model is cut, in words.
        codec: how what crosses is encoded; empty where nothing does.
        index: the index of the partition point.
        predicted_s: as in ``Setting``.
        measured_s: the median latency; of a stream, the mean seconds between answers, as ``between_s()`` has them.
        low_s: the latency's lower quartile; of a stream, the same as ``measured_s``.
        high_s: its upper quartile, likewise.
        sent_bytes: mean bytes sent for one photograph.
        radio_j: the joules that the device's radio takes for one photograph, by the link's radio and the bytes sent;
            None where the radio is unknown. In a stream nothing is counted for staying awake after a transfer.
        photographs: how many were classified.
        same_bits: of how many the answer was the model's own, bit for bit.
        same_label: of how many the label was the model's own.
    """

    mode: str
    link: str
    budget: str
    way: str
    cut: str
    codec: str
    index: int
    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float
    sent_bytes: float
    radio_j: float | None
    photographs: int
    same_bits: int
    same_label: int


def settings(
    graph: LayerGraph, device: LayerProfile, server: LayerProfile, table: CodecTable, link: Link, slowdown: float
) -> list[Setting]:
    """Return the ways to compare over one link, as the planner chooses them.

    Args:
        graph: the traced model.
        device: what each layer costs on this machine.
        server: what each layer costs on the server.
        table: measured codecs. Its lossy ones are left out where nothing may be lost.
        link: the link.
        slowdown: the factor by which the device is slower than this machine.
    """
    exact = dataclasses.replace(table, rows=tuple(row for row in table.rows if row.cost.lossless))
    found = []
    for mode, objective in OBJECTIVES.items():
        for budget, codecs in ((LOSSLESS, exact), (BUDGET, table)):
            over = link if mode == "one" else link.back_to_back()
            planned = plan(
                graph, device=device, server=server, link=over, codecs=codecs, slowdown=slowdown, objective=objective
            )
            assert planned.server_only is not None
            for way, terms in zip(WAYS, (planned.device_only, planned.server_only, planned.terms), strict=True):
                predicted_s = terms.latency_s if mode == "one" else terms.interval_s
                found.append(Setting(mode, link.name, budget, way, terms.row, predicted_s))
    return found


def measured(
    setting: Setting,
    split: SplitModule,
    link: Link,
    frames: Sequence[Tensor],
    own: Sequence[Tensor],
    step: Callable[[], None],
) -> Result:
    """Return what a setting takes.

    Args:
        setting: the setting.
        split: the split model, over the setting's link.
        link: the link.
        frames: the photographs. The first one opens the connection and makes the server build the tail, so it is not
            timed; before a stream it is classified once more for that.
        own: the model's own answer for each.
        step: called after each photograph.
    """
    row = setting.row
    split.partition = "device" if row.on_device else row.point(split.graph)
    split.codec = row.codec
    answers, times, sent = [], [], []
    if setting.mode == "one":
        for frame in frames:
            answers.append(split(frame))
            assert split.last is not None
            times.append(split.last.total_s)
            sent.append(split.last.sent_bytes)
            step()
        low_s, middle_s, high_s = statistics.quantiles(times[1:], n=4) if len(times) > 2 else (times[-1],) * 3
    else:
        for _ in range(2):
            split(frames[0])
        assert split.last is not None
        alone_s, begin_s = split.last.total_s, time.perf_counter()
        arrived_s = []
        for answer in split.map(frames, depth=_DEPTH):
            arrived_s.append(time.perf_counter() - begin_s)
            answers.append(answer)
            assert split.last is not None
            sent.append(split.last.sent_bytes)
            step()
        low_s = middle_s = high_s = between_s(arrived_s, alone_s)
    over = link if setting.mode == "one" else link.back_to_back()
    sent_bytes = statistics.mean(sent)
    answer_bytes = sum(spec.size_bytes for spec in split.graph.outputs)
    crosses = not row.on_device
    return Result(
        *(setting.mode, setting.link, setting.budget, setting.way, words(row), row.codec if crosses else "", row.index),
        *(setting.predicted_s, middle_s, low_s, high_s, sent_bytes),
        radio_j=0.0 if not crosses else None if over.radio is None else over.request_j(sent_bytes, answer_bytes),
        photographs=len(frames),
        same_bits=sum(torch.equal(a, b) for a, b in zip(answers, own, strict=True)),
        same_label=sum(torch.equal(a.argmax(1), b.argmax(1)) for a, b in zip(answers, own, strict=True)),
    )


def between_s(arrived_s: Sequence[float], alone_s: float) -> float:
    """Return the mean seconds between the answers of a stream.

    Calls under way share the link, so the first answers come late and almost at once. The pauses between answers alone
    would leave out what had crossed until the first of them. So the time is taken from the beginning, less what the
    first photograph would have taken alone.

    Args:
        arrived_s: when each answer came, since the first call began.
        alone_s: the seconds that one call takes by itself.
    """
    pauses = max(len(arrived_s) - 1, 1)
    return max(arrived_s[-1] - alone_s, arrived_s[-1] - arrived_s[0]) / pauses


def words(row: Row) -> str:
    """Return where a row cuts the model, in words."""
    if row.on_device:
        return "all on the device"
    if row.index == 0:
        return "all on the server"
    block = re.match(r"net\.blocks\.(\d+)\.", row.name)
    return f"after block {block[1]}" if block else f"after {row.name.removeprefix('net.')}"


def words_with_codec(row: Row) -> str:
    """Return where a row cuts the model, and of the ways to send the photograph also the codec."""
    return f"{words(row)}: {row.codec}" if row.index == 0 and not row.on_device else words(row)
