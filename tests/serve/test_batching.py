"""Requests that wait run together: each gets the answer it would have got alone, and no device is misled about bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.codec import find_codec
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import ArithmeticMismatchError, ModelFailedError, ProtocolError
from torchsurgeon.serve import ModelRegistry, ServedModel, Server, create_app
from torchsurgeon.serve.batching import Gain
from torchsurgeon.serve.failure import ExpiredError, GoneError
from torchsurgeon.serve.independence import most_exact, why_alone
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.recent import Recent
from torchsurgeon.serve.worker import Worker
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.wire.buffers import aligned_buffer

SHAPE = (1, 3, 12, 12)
X = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Several boundary tensors, two outputs, an in-place layer, and rows that are flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.stem(x))
        z = self.left(y) + self.right(y)
        logits = self.head(z.flatten(2).transpose(1, 2).reshape(-1, 8)).reshape(x.shape[0], -1, 5).mean(1)
        return {"logits": logits, "label": logits.argmax(1)}


class Whatever(nn.Module):
    """Mixes the samples of a batch in the way that it is told."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.way, self.last = nn.Linear(6, 6), way, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.way == "centred":
            y = y - y.mean(0)
        elif self.way == "scaled":
            y = y / y.abs().max()
        elif self.way == "softmax":
            y = y.softmax(0)
        elif self.way == "shifted":
            y = y.roll(1, 0)
        elif self.way == "summed":
            y = y + 0.01 * y.sum(0)
        elif self.way == "counted":
            y = y * (1 + x.shape[0])
        elif self.way == "hardly counted":
            y = y * (1 + 0.01 * x.shape[0])
        elif self.way == "quantized":
            scale = y.abs().max() / 127
            y = (y / scale).round() * scale
        return self.last(y)


def seeded(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


@contextmanager
def held(served: ServedModel) -> Iterator[None]:
    """Keep all threads of a model busy inside the block, so that requests wait together."""
    free, begun = threading.Event(), threading.Barrier(served.worker.concurrency + 1)

    def wait() -> None:
        begun.wait(20)
        free.wait(20)

    jobs = [served.worker.submit(wait) for _ in range(served.worker.concurrency)]
    begun.wait(20)
    try:
        yield
    finally:
        free.set()
        for job in jobs:
            job.result(20)


def request(tensors: dict[str, Tensor], **options: Any) -> Received:
    message = wire.encode_request(tensors, **options)
    body = aligned_buffer(message.size_bytes)
    body[:] = b"".join(bytes(one) for one in message.buffers)
    return Received(body, message.header_bytes, 0.0, 0.0)


def answer(encoded: wire.Encoded) -> dict[str, Tensor]:
    body = bytearray(b"".join(bytes(one) for one in encoded.buffers))
    return wire.decode_response(body, encoded.header_bytes).tensors


def registry_of(batching: str = "rounded", **options: Any) -> ModelRegistry:
    return ModelRegistry(profiler=None, batching=batching, concurrency=1, **options)  # type: ignore[arg-type]


class Runs:
    """Counts of samples in each run of a model's plans."""

    def __init__(self, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        run = served.answers._run

        def counted(plan: Any, tensors: Any, over: Any = None) -> Any:
            self.sizes.append(max(tensors, key=Tensor.dim).shape[0])
            return run(plan, tensors, over)

        monkeypatch.setattr(served.answers, "_run", counted)
        # Whether it pays is another matter.
        monkeypatch.setattr(served.intake._gain, "limit", lambda kind: served.together)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    registry = registry_of()
    yield registry.add("net", seeded(Net()), X)
    registry.close()


def boundary(graph: LayerGraph, index: int, x: Tensor) -> dict[str, Tensor]:
    point = graph.points[index]
    with torch.no_grad():
        return dict(zip([spec.name for spec in point.tensors], cut(graph, point).head(x), strict=True))


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return torch.allclose(one["logits"], other["logits"], rtol=1e-5, atol=1e-6) and torch.equal(
        one["label"], other["label"]
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_requests_that_wait_run_once_at_every_cut_and_each_gets_its_own_answer(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format
) -> None:
    runs, graph = Runs(served, monkeypatch), served.graph
    joined = 0
    for index in range(len(graph.points) - 1):
        xs = [torch.rand(SHAPE, generator=torch.Generator().manual_seed(i)).to(memory_format=layout) for i in range(6)]
        runs.sizes.clear()
        with held(served):
            asked = [served.intake.submit(request(boundary(graph, index, x))) for x in xs]
        with torch.no_grad():
            assert all(close(answer(one.result(20)), graph.model(x)) for one, x in zip(asked, xs, strict=True)), (
                graph.points[index].name
            )
        joined += runs.sizes == [6]
        assert runs.sizes == [6] or len(runs.sizes) == 6, graph.points[index].name
    # Not where the rows of a sample are folded into the batch, or its size is sent.
    assert 0 < joined < len(graph.points) - 1


def test_only_requests_that_are_alike_are_joined(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(served, monkeypatch)
    kinds = [
        request({"x": X}),
        request({"x": X.to(memory_format=torch.channels_last)}),
        request({"x": X}, codecs={"x": find_codec("float16")}),
        request({"x": X}, output_codec=find_codec("zstd")),
        request({"x": torch.rand(1, 3, 16, 16)}),
        request({"x": X.repeat(3, 1, 1, 1)}),
    ]
    again = [Received(one.body, one.header_bytes, 0.0, 0.0) for one in kinds]
    with held(served):
        asked = [served.intake.submit(one) for one in (*kinds, *again)]
    answers = [answer(one.result(20)) for one in asked]
    assert runs.sizes[:4] == [2, 2, 2, 2]
    assert sorted(runs.sizes[4:]) in ([1, 1, 6], [2, 6])
    for one, other in zip(answers[:6], answers[6:], strict=True):
        assert close(one, other)
    assert not close(answers[0], answers[2])
    assert answers[5]["logits"].shape == (3, 5)


def test_one_bad_request_spoils_nobody_elses(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(served, monkeypatch)
    good, bad = [request({"x": X}, crc32=True) for _ in range(4)], request({"x": X}, crc32=True)
    bad.body[-100] ^= 1
    with held(served):
        asked = [served.intake.submit(one) for one in (*good[:2], bad, *good[2:])]
    assert isinstance(asked[2].exception(20), ProtocolError)
    with torch.no_grad():
        assert all(close(answer(one.result(20)), served.graph.model(X)) for one in (*asked[:2], *asked[3:]))
    assert runs.sizes == [4]


def test_who_has_left_and_whose_deadline_has_passed_are_left_out_of_the_batch_of_the_others(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, before = Runs(served, monkeypatch), served.statistics.as_triton("net", "1")
    requests = [request({"x": X}) for _ in range(6)]
    with held(served):
        asked = [served.intake.submit(one) for one in requests]
        requests[1].gone = True
        requests[4].due_s = time.perf_counter() - 1.0
    assert isinstance(asked[1].exception(20), GoneError)
    assert isinstance(asked[4].exception(20), ExpiredError)
    with torch.no_grad():
        expected = served.graph.model(X)
    assert all(close(answer(asked[i].result(20)), expected) for i in (0, 2, 3, 5))
    assert runs.sizes == [4]
    told = served.statistics.as_triton("net", "1")["inference_stats"]
    assert told["fail"]["count"] == before["inference_stats"]["fail"]["count"] + 2
    # Where nobody waits for any of them, nothing runs.
    with held(served):
        gone = [request({"x": X}) for _ in range(3)]
        asked = [served.intake.submit(one) for one in gone]
        for one in gone:
            one.gone = True
    assert all(isinstance(one.exception(20), GoneError) for one in asked)
    assert runs.sizes == [4]


def test_requests_with_ids_of_their_own_run_together_and_each_answer_repeats_its_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = registry_of()
    served = registry.add("net", seeded(Net()), X)
    runs, planned, plan = Runs(served, monkeypatch), list[object](), served.answers._plan
    monkeypatch.setattr(served.answers, "_plan", lambda *given: planned.append(given) or plan(*given))
    # Of different lengths, so the padding behind them differs too.
    ids = ["a" * i for i in range(1, 120, 20)]
    with held(served):
        asked = [served.intake.submit(request({"x": X}, request_id=one)) for one in ids]
    for one, request_id in zip(asked, ids, strict=True):
        encoded = one.result(20)
        body = bytearray(b"".join(bytes(part) for part in encoded.buffers))
        assert wire.decode_response(body, encoded.header_bytes).request_id == request_id
    assert runs.sizes == [6]
    assert len(planned) == 1
    registry.close()


def header(text: str) -> Received:
    return Received(memoryview(bytearray(text.encode() + b"tensors")), len(text.encode()), 0.0, 0.0)


def test_what_requests_have_in_common_is_their_header_without_its_id() -> None:
    same = [
        '{"id":"1","inputs":[{"name":"x"}],"parameters":{}}  ',
        '{"id": "22" ,"inputs":[{"name":"x"}],"parameters":{}}',
        '{"id":"\\\\","inputs":[{"name":"x"}],"parameters":{}}',
        '{"id":"a\\",\\"inputs\\":[","inputs":[{"name":"x"}],"parameters":{}}',
        '{"inputs":[{"name":"x"}],"id":"é","parameters":{}}',
    ]
    assert {header(one).alike for one in same} == {b'{"inputs":[{"name":"x"}],"parameters":{}}'}
    for text in (
        '{"inputs":[{"name":"id"}],"parameters":{"a":"b"}}  ',
        '{"inputs":[{"name":"\\"id\\":\\"x\\""}]}',
        '{"parameters":{"a\\"id":"x"}}',
        '{"inputs":[{"name":"x,\\"id\\":\\"y"}]}',
    ):
        found = header(text).alike
        assert isinstance(found, bytes)
        assert found.strip() == text.strip().encode()
    # Without a header, or with a very long one, there is the length of the body alone.
    assert Received(memoryview(b"{}"), None, 0.0, 0.0).alike == 2
    assert header('{"inputs":[' + " " * 5000 + "]}").alike == 5000 + 13 + 7


def test_a_table_that_is_full_forgets_only_what_was_not_used_for_the_longest_time() -> None:
    table: Recent[str, int] = Recent(3)
    for i, key in enumerate("abc"):
        table.put(key, i)
    assert table.get("a") == 0
    table.put("d", 3)
    assert [table.get(key) for key in "abcd"] == [0, None, 2, 3]
    table.put("a", 9)
    assert (len(table), table.values()) == (3, [2, 3, 9])
    gain = Gain(8)
    gain.took("kept", 1, 2.0)
    for i in range(1000):
        gain.took(i, 1, 1.0)
        assert gain.alone_s("kept") == 2.0


def test_a_batch_that_fails_runs_again_one_by_one(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(served, monkeypatch)
    counted = served.answers._run

    def fails_together(plan: Any, tensors: Any, over: Any = None) -> Any:
        if tensors[0].shape[0] > 1:
            raise RuntimeError("out of memory")
        return counted(plan, tensors, over)

    monkeypatch.setattr(served.answers, "_run", fails_together)
    with held(served):
        asked = [served.intake.submit(request({"x": X})) for _ in range(3)]
    assert all(one.result(20).size_bytes for one in asked)
    assert runs.sizes == [1, 1, 1]


class Looks(nn.Module):
    """Fails for what its table does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)
        self.last = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x))


def test_a_client_whose_request_fails_spoils_one_batch_and_runs_alone_then(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of()
    served = registry.add("net", seeded(Looks()), torch.zeros(1, 4, dtype=torch.int64))
    assert served.together > 1
    runs = Runs(served, monkeypatch)

    def ask(value: int, holder: str) -> Future[wire.Encoded]:
        found = request({served.graph.inputs[0].name: torch.full((1, 4), value)})
        found.holder = holder
        return served.intake.submit(found)

    def ask_all() -> list[int]:
        runs.sizes.clear()
        with held(served):
            asked = [ask(9, "bad"), ask(0, "good"), ask(1, "good")]
        with pytest.raises(ModelFailedError):
            asked[0].result(20)
        assert all(one.result(20).size_bytes for one in asked[1:])
        return sorted(runs.sizes)

    assert ask_all() == [1, 1, 1, 3]
    for _ in range(3):
        assert ask_all() == [1, 2]
    # It is trusted again once its requests were answered for a while.
    for _ in range(32):
        assert ask(0, "bad").result(20).size_bytes
    assert ask_all() == [1, 1, 1, 3]
    registry.close()


def test_a_batch_has_at_most_so_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(max_batch=4)
    served = registry.add("net", seeded(Net()), X)
    runs = Runs(served, monkeypatch)
    with held(served):
        asked = [served.intake.submit(request({"x": X})) for _ in range(10)]
        pairs = [served.intake.submit(request({"x": X.repeat(3, 1, 1, 1)})) for _ in range(2)]
    for one in (*asked, *pairs):
        one.result(20)
    assert runs.sizes == [4, 4, 2, 3, 3]
    registry.close()


def test_a_request_that_is_cancelled_while_it_waits_is_left_out(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(served, monkeypatch)
    with held(served):
        asked = [served.intake.submit(request({"x": X})) for _ in range(4)]
        asked[1].cancel()
        asked[0].cancel()
    for one in asked[2:]:
        one.result(20)
    assert runs.sizes == [2]
    assert served.worker._slow == 0


def test_the_times_of_an_answer_add_up(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(served, monkeypatch)
    with held(served):
        asked = [served.intake.submit(request({"x": X})) for _ in range(3)]
    for one in asked:
        encoded = one.result(20)
        body = bytearray(b"".join(bytes(part) for part in encoded.buffers))
        told = wire.decode_response(body, encoded.header_bytes).parameters
        assert all(told[name] >= 0 for name in ("receive_s", "queue_s", "decode_s", "compute_s"))


# --- which models ---


@pytest.mark.parametrize(
    "way", ["centred", "scaled", "softmax", "shifted", "quantized", "summed", "counted", "hardly counted"]
)
def test_a_model_that_mixes_its_samples_is_found_and_not_batched(way: str) -> None:
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    graph = ts.trace(seeded(Whatever(way)), x)
    assert graph.batch_free
    why = why_alone(graph, [x])
    assert why is not None
    assert "do not leave each other alone" in why
    registry = registry_of()
    assert registry.add("net", graph.model, x).together == 1
    registry.close()


def test_a_model_whose_samples_leave_each_other_alone_may_be_batched() -> None:
    x = torch.rand(1, 6)
    assert why_alone(ts.trace(seeded(Whatever("")), x), [x]) is None
    assert why_alone(ts.trace(seeded(Net()), X), [X]) is None
    whole = torch.tensor([[3, 1, 2]])
    assert why_alone(ts.trace(nn.Embedding(4, 2).eval(), whole), [whole]) is None
    assert why_alone(ts.trace(nn.Embedding(4, 2).eval(), whole[:, :1]), [whole[:, :1]]) is None
    pair = torch.rand(2, 6)
    assert why_alone(ts.trace(seeded(Whatever("")), pair), [pair]) is None


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().long().sort(0).values


class Either(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).any(0).expand_as(x)


class Masked(nn.Module):
    """Takes what any sample's mask lets through; the example's mask lets everything through."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask.amax(0)


class Longest(nn.Module):
    """Looks at as many tokens of every text as the longest in the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        longest = (x != 0).sum(1).max()
        return (self.tokens(x) * (torch.arange(x.shape[1]) < longest)[:, None]).mean(1)


class Transformed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=0)


@pytest.mark.parametrize("kind", [Sorted, Either, Masked, Longest, Transformed])
def test_samples_that_mix_without_a_floating_point_number_that_shows_it_are_found(kind: type[nn.Module]) -> None:
    x = 3 * torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    inputs = [x, torch.ones(1, 6, dtype=torch.int64)] if kind is Masked else [x]
    if kind is Longest:
        inputs = [torch.tensor([[3, 1, 4, 1, 5, 0]])]
    graph = ts.trace(seeded(kind()), *inputs)
    assert graph.batch_free
    assert why_alone(graph, inputs) is not None


@pytest.mark.parametrize(("way", "found"), [("", False), ("summed", True), ("centred", True)])
def test_a_processor_that_multiplies_coarsely_is_not_taken_for_a_model_that_mixes_its_samples(
    way: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """Multiply in the precision of bfloat16, as a GPU may in that of TF32, in batches of more than one."""
        exact, weight = layer.forward, layer.weight.bfloat16().float()
        return lambda x: exact(x) if x.shape[0] == 1 else functional.linear(x.bfloat16().float(), weight, layer.bias)

    model = seeded(Whatever(way))
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    graph = ts.trace(model, x)
    for layer in (model.first, model.last):
        monkeypatch.setattr(layer, "forward", coarse(layer))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with torch.no_grad():
        alone, together = model.first(x), model.first(x.repeat(2, 1))[:1]
    assert float((together - alone).abs().max() / alone.abs().max()) > 1e-3
    assert (why_alone(graph, [x]) is not None) == found


def test_a_model_that_takes_no_other_values_is_served_and_not_batched(caplog: pytest.LogCaptureFixture) -> None:
    class Looked(nn.Module):
        """Floating-point numbers that are places in a table."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x.long())

    x = torch.arange(6.0)[None]
    registry = registry_of()
    with caplog.at_level("INFO"):
        assert registry.add("net", seeded(Looked()), x).together == 1
    registry.close()
    assert "it does not take other values than its example's: IndexError" in caplog.text


def test_models_whose_batch_is_not_free_or_whose_path_depends_on_values_are_not_batched() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(6) * 2

    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, x[0].bool()]

    x = torch.rand(1, 6)
    for model in (Fixed(), Sized()):
        graph = ts.trace(model.eval(), x)
        assert why_alone(graph, [x]) is not None


# --- bits ---


def test_how_many_samples_keep_their_bits_is_found_by_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(nn.Module):
        """Its last bits are others in batches of more than three."""

        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] <= 3 else (x * 3 + 3) / 3

    x = torch.rand(1, 6)
    graph = ts.trace(seeded(Whatever("")), x)
    elementwise = ts.trace(nn.Sequential(nn.ReLU(), nn.Hardtanh()).eval(), x)
    assert most_exact(elementwise, [x]) == 8
    step = next(step for step in elementwise.steps if step.type_name == "Hardtanh")
    assert graph.batch_free
    monkeypatch.setattr(step.target, "forward", Counted().forward)
    assert most_exact(elementwise, [x]) == 3


def test_an_exact_server_batches_only_as_far_as_bits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsurgeon.serve.registry.most_exact", lambda graph, tensors: 3)
    registry = registry_of("exact")
    served = registry.add("net", seeded(Net()), X)
    assert served.together == 3
    assert "batching" not in served.fingerprint()["arithmetic"]
    registry.close()
    monkeypatch.setattr("torchsurgeon.serve.registry.most_exact", lambda graph, tensors: 1)
    registry = registry_of("exact")
    assert registry.add("net", seeded(Net()), X).together == 1
    registry.close()
    registry = registry_of("off")
    assert registry.add("net", seeded(Net()), X).together == 1
    registry.close()


@pytest.mark.parametrize(("exact_up_to", "told"), [(8, False), (1, True)])
def test_devices_are_told_where_answers_may_be_the_same_to_rounding_only(
    monkeypatch: pytest.MonkeyPatch, exact_up_to: int, told: bool
) -> None:
    monkeypatch.setattr("torchsurgeon.serve.registry.most_exact", lambda graph, tensors: exact_up_to)
    registry, model = registry_of(), seeded(Net())
    registry.add("net", model, X)
    with Server(create_app(registry)) as server:
        with ts.SplitModule(model, X, server=server.url, name="net", partition=1) as split, torch.no_grad():
            split(X)
            assert split.last.bits == ("same to rounding" if told else "same bits")
            assert any("run requests together" in why for why in split.last.inexact_because) == told
        options: dict[str, Any] = {"server": server.url, "name": "net", "partition": 1, "exact": True}
        with ts.SplitModule(model, X, fallback="error", **options) as split, torch.no_grad():
            if told:
                with pytest.raises(ArithmeticMismatchError, match="Start the server with --exact"):
                    split(X)
            else:
                assert torch.equal(split(X)["logits"], model(X)["logits"])
    registry.close()


# --- how many ---


@pytest.mark.parametrize(
    ("each_s", "best"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39, 16: 0.39, 32: 0.4, 64: 0.5}, 4),
        ({1: 1.0, 2: 0.99, 4: 0.98, 8: 1.0, 16: 1.2, 32: 1.3, 64: 1.4}, 1),
        # Two gain nothing, and more do.
        ({1: 1.0, 2: 1.0, 4: 0.6, 8: 0.3, 16: 0.3, 32: 0.3, 64: 0.3}, 8),
    ],
)
def test_so_many_are_taken_together_as_take_the_least_time_each(each_s: dict[int, float], best: int) -> None:
    gain, limits = Gain(64), []
    for _ in range(400):
        limits.append(gain.limit("kind"))
        gain.took("kind", limits[-1], limits[-1] * each_s[limits[-1]])
    assert limits[0] == 1
    assert sorted(limits[50:])[175] == best
    assert limits[50:].count(best) > 300
    # Others are tried again now and then.
    assert set(limits[50:]) == set(each_s)


def test_a_number_that_never_waits_is_not_tried_for_ever() -> None:
    gain, limits = Gain(64), []
    for _ in range(200):
        limits.append(gain.limit("kind"))
        size = min(limits[-1], 4)
        gain.took("kind", size, size * (1.0 if size == 1 else 1.1))
    assert limits[50:].count(1) > 140


def test_the_kinds_that_are_remembered_are_bounded() -> None:
    gain = Gain(8)
    for i in range(10_000):
        gain.took(i, 1, 1.0)
    assert len(gain._kinds) <= 256
    assert gain.limit("unknown") == 1


def test_waiting_jobs_are_shared_among_the_threads_and_keep_their_order() -> None:
    class Together:
        def __init__(self) -> None:
            self.taken: list[list[int]] = []

        def limit(self, kind: object) -> int:
            return 100

        def limit_of_several(self) -> int:
            raise AssertionError("no kinds belong together")

        def joins(self, kind: object, other: object) -> bool:
            return False

        def weights(self, loads: Any) -> list[float]:
            return [1.0] * len(loads)

        def answer_together(self, loads: Any) -> list[Any]:
            self.taken.append(list(loads))
            return [ValueError(str(load)) if load == 3 else load for load in loads]

    group = Together()
    worker = Worker("test", 2, group)
    free, begun = threading.Event(), threading.Barrier(3)

    def wait() -> None:
        begun.wait(20)
        free.wait(20)

    waits = [worker.submit(wait) for _ in range(2)]
    begun.wait(20)
    kinds = ["a", "b", "a", "a", "b", "a", None]
    asked: list[Future[Any]] = [
        worker.submit(lambda i=i: i, kind=kind, load=i)
        for i, kind in enumerate(kinds)  # type: ignore[misc]
    ]
    free.set()
    for i, one in enumerate(asked):
        if i == 3:
            assert isinstance(one.exception(20), (ValueError, type(None)))
        else:
            assert one.result(20) == i
    for one in waits:
        one.result(20)
    assert all(one == sorted(one) and len({kinds[i] for i in one}) == 1 for one in group.taken)
    assert max(map(len, group.taken)) == 2
    assert worker._slow == 0
    assert worker.waiting == 0
    worker.close()


@pytest.mark.parametrize("direct", [True, False])
def test_many_clients_at_once_get_their_own_answers(direct: bool) -> None:
    registry, model = ModelRegistry(profiler=None, batching="rounded", concurrency=2), seeded(Net())
    graph = registry.add("net", model, X).graph
    points = range(len(graph.points) - 1)

    def client(seed: int) -> bool:
        x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))
        options: dict[str, Any] = {"server": server.url, "name": "net", "partition": seed % len(points)}
        with ts.SplitModule(model, X, **options) as split, torch.no_grad():
            return all(close(split(x + i), model(x + i)) for i in range(8))

    with Server(create_app(registry), direct=direct) as server, ThreadPoolExecutor(12) as pool:
        assert all(pool.map(client, range(24)))
    registry.close()
