"""Codecs at several cuts of one inference are measured together, as a chain of machines uses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.codec import Budget, find_codec, measure, measure_together
from torchsurgeon.serve import ModelRegistry, Server, create_app

torch.set_num_threads(1)
BUDGET = Budget(max_top1_change=0.5, min_cosine=0.5)


def made() -> ts.LayerGraph:
    torch.manual_seed(0)
    layers = nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 6)
    return ts.trace(nn.Sequential(*layers).eval(), torch.rand(1, 12))


GRAPH = made()
CALLS = list(torch.randn(60, 12, generator=torch.Generator().manual_seed(1)).split(1))


def there_and_back(tensor: Tensor, name: str) -> Tensor:
    encoded = find_codec(name).encode(tensor)
    codec = find_codec(encoded.codec)
    return codec.decode(encoded.data, tensor.dtype, tensor.shape, encoded.order, max_bytes=tensor.nbytes)


def test_one_cut_is_measured_as_by_itself() -> None:
    table = measure(GRAPH, CALLS, ["int4"], points=["1"], budget=BUDGET)
    (alone,) = [row.findings for row in table.rows if row.cost.codec == "int4"]
    top1, cosine = measure_together(GRAPH, CALLS, [("1", "int4")], BUDGET)
    assert top1 == alone[0]
    # Tails that run together round otherwise.
    assert (cosine.estimate, cosine.bound) == pytest.approx((alone[1].estimate, alone[1].bound), abs=1e-6)


def test_the_second_codec_gets_what_the_first_has_decoded() -> None:
    layers, changed = list(GRAPH.model), 0
    for call in CALLS:
        own = GRAPH.model(call)
        first = there_and_back(layers[1](layers[0](call)), "int4")
        second = there_and_back(layers[3](layers[2](first)), "int4")
        changed += int(layers[4](second).argmax(1) != own.argmax(1))
    top1, cosine = measure_together(GRAPH, CALLS, [("1", "int4"), ("3", "int4")], BUDGET)
    assert top1.estimate == changed / len(CALLS)
    assert changed
    assert top1.count == len(CALLS)
    assert cosine.estimate < 1
    lossless = measure_together(GRAPH, CALLS, [("server", "zstd"), ("1", "raw"), ("3", "zstd")], BUDGET)
    assert [finding.estimate for finding in lossless] == pytest.approx([0.0, 1.0])


def test_a_machine_in_the_middle_may_pass_on_what_it_decoded() -> None:
    once = measure_together(GRAPH, CALLS, [("1", "int8")], BUDGET)
    twice = measure_together(GRAPH, CALLS, [("1", "int8"), ("1", "int8")], BUDGET)
    assert twice[0].estimate == pytest.approx(once[0].estimate, abs=2 / len(CALLS))
    assert twice[1].estimate == pytest.approx(once[1].estimate, abs=1e-3)


def test_a_running_chain_changes_as_many_answers_as_were_measured() -> None:
    model, changed = GRAPH.model, 0
    cloud, edge = ModelRegistry(), ModelRegistry()
    cloud.add("model", model, CALLS[0])
    with (
        Server(create_app(cloud)) as far,
        ts.SplitModule(model, CALLS[0], server=far.url, partition="3", codec="int4", fallback="error") as onward,
    ):
        edge.add("model", onward)
        with (
            Server(create_app(edge)) as near,
            ts.SplitModule(model, CALLS[0], server=near.url, partition="1", codec="int4", fallback="error") as split,
        ):
            for call in CALLS:
                changed += int(split(call).argmax(1) != model(call).argmax(1))
    edge.close()
    cloud.close()
    top1, _ = measure_together(GRAPH, CALLS, [("1", "int4"), ("3", "int4")], BUDGET)
    assert top1.estimate == changed / len(CALLS)


def test_what_cannot_be_measured_together_is_refused() -> None:
    with pytest.raises(ts.CodecError, match="got 0 samples and 1 cuts"):
        measure_together(GRAPH, [], [("1", "int4")], BUDGET)
    with pytest.raises(ts.CodecError, match="got 60 samples and 0 cuts"):
        measure_together(GRAPH, CALLS, [], BUDGET)
    with pytest.raises(ts.CodecError, match="nothing crosses at the last point"):
        measure_together(GRAPH, CALLS, [("device", "int4")], BUDGET)
    with pytest.raises(ts.CodecError, match="there is no codec 'int7'"):
        measure_together(GRAPH, CALLS, [("1", "int7")], BUDGET)
    with pytest.raises(ts.PartitionError):
        measure_together(GRAPH, CALLS, [("3", "int4"), ("1", "int4")], BUDGET)
    with pytest.raises(ts.SampleSizeError):
        measure_together(GRAPH, CALLS[:4], [("1", "int4")], BUDGET)
