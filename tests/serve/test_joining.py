"""Requests at different cuts of one model run together from the later cut on, and each gets its own answer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.codec import find_codec
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import ProtocolError
from torchsurgeon.serve import ModelRegistry, ServedModel
from torchsurgeon.serve.batching import Gain
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.worker import Worker
from torchsurgeon.wire.buffers import aligned_buffer

MOST = 8


class Residual(nn.Module):
    """A skip connection, an in-place layer, a layer that changes the order in memory, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.stem(x))
        z = self.relu(self.left(y) + self.right(y)) + y
        logits = self.head(self.pool(z).permute(0, 2, 3, 1).flatten(1))
        return {"logits": logits, "label": logits.argmax(1)}


def perceptron() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(16, 16), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def pools() -> nn.Module:
    """Layers whose results do not depend on the size of the batch in any bit."""
    return nn.Sequential(
        nn.MaxPool2d(3, 1, 1), nn.Hardswish(), nn.AvgPool2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Softmax(1),
    )  # fmt: skip


def seeded(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (1, 16)),
    "residual": (Residual, (1, 3, 12, 12)),
    "pools": (pools, (1, 3, 12, 12)),
    "channels last": (lambda: Residual().to(memory_format=torch.channels_last), (1, 3, 12, 12)),
}


def input_of(name: str, seed: int, batch: int = 1) -> Tensor:
    shape = (batch, *MODELS[name][1][1:])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def serving(name: str, batching: str, monkeypatch: pytest.MonkeyPatch) -> ServedModel:
    """A served model whose requests are joined wherever they can be, whether that pays or not."""
    registry = ModelRegistry(profiler=None, batching=batching, concurrency=1, max_batch=MOST)  # type: ignore[arg-type]
    served = registry.add("net", seeded(MODELS[name][0]()), input_of(name, 0))
    monkeypatch.setattr(served.intake._gain, "limit", lambda kind: MOST)
    monkeypatch.setattr(served.intake._gain_of_several, "limit", lambda kind: MOST)
    return served


@contextmanager
def held(served: ServedModel) -> Iterator[None]:
    """Keep the thread of a model busy inside the block, so that requests wait together."""
    free, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        free.wait(20)

    job = served.worker.submit(wait)
    begun.wait(20)
    try:
        yield
    finally:
        free.set()
        job.result(20)


@functools.cache
def points(name: str) -> list[int]:
    return [point.index for point in ts.trace(seeded(MODELS[name][0]()), input_of(name, 0)).points[:-1]]


def sent(served: ServedModel, index: int, x: Tensor) -> dict[str, Tensor]:
    """What a device sends that cuts at a point."""
    point = served.graph.points[index]
    with torch.no_grad():
        tensors = (x,) if index == 0 else cut(served.graph, point).head(x)
    return dict(zip([spec.name for spec in point.tensors], tensors, strict=True))


def request(tensors: dict[str, Tensor], **options: Any) -> Received:
    message = wire.encode_request(tensors, **options)
    body = aligned_buffer(message.size_bytes)
    body[:] = b"".join(bytes(one) for one in message.buffers)
    return Received(body, message.header_bytes, 0.0, 0.0)


def answer(encoded: wire.Encoded) -> dict[str, Tensor]:
    body = bytearray(b"".join(bytes(one) for one in encoded.buffers))
    return wire.decode_response(body, encoded.header_bytes).tensors


def ask(served: ServedModel, asked: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Have requests wait together, and return their answers. What is known of each kind is found out before."""
    for tensors in asked:
        served.intake.submit(request(tensors)).result(20)
    with held(served):
        futures = [served.intake.submit(request(tensors)) for tensors in asked]
    return [answer(one.result(20)) for one in futures]


def alone(served: ServedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return answer(served.answer(request(tensors)))


class Counted:
    """How many samples each run of a model's last layers had."""

    def __init__(self, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        run = served.answers._run

        def counted(plan: Any, tensors: Any, over: Any = None) -> Any:
            self.sizes.append(tensors[0].shape[0])
            return run(plan, tensors, over)

        monkeypatch.setattr(served.answers, "_run", counted)


@pytest.mark.parametrize(("name", "batching"), [("pools", "exact"), *((name, "rounded") for name in MODELS)])
def test_every_pair_of_cuts_gets_the_answers_that_each_gets_alone(
    name: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(name, batching, monkeypatch)
    assert served.together > 1
    joined = 0
    for one in points(name):
        for other in points(name):
            asked = [sent(served, index, input_of(name, i)) for i, index in enumerate((one, other, one))]
            runs = Counted(served, monkeypatch)
            for tensors, found in zip(asked, ask(served, asked), strict=True):
                expected = alone(served, tensors)
                for key, value in found.items():
                    if batching == "exact":
                        assert torch.equal(value, expected[key]), (one, other)
                    else:
                        torch.testing.assert_close(value, expected[key])
            joined += max(runs.sizes) > 1
            monkeypatch.undo()
            monkeypatch.setattr(served.intake._gain, "limit", lambda kind: MOST)
            monkeypatch.setattr(served.intake._gain_of_several, "limit", lambda kind: MOST)
    # Those at points with the same tensors, and next to all others.
    assert joined > 0.8 * len(points(name)) ** 2
    served.close()


def test_many_cuts_at_once_run_their_last_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving("perceptron", "rounded", monkeypatch)
    asked = [sent(served, index, input_of("perceptron", index)) for index in (6, 0, 4, 2, 6, 8)]
    for tensors in asked:
        served.intake.submit(request(tensors)).result(20)
    runs = Counted(served, monkeypatch)
    with held(served):
        futures = [served.intake.submit(request(tensors)) for tensors in asked]
    answers = [answer(one.result(20)) for one in futures]
    assert runs.sizes == [6]
    for tensors, one in zip(asked, answers, strict=True):
        torch.testing.assert_close(one, alone(served, tensors))
    assert served.statistics.by_requests[6] == 1
    told = served.statistics.as_triton("net", "1")
    assert told["inference_count"] == 6 + 6 + 6
    served.close()


def test_requests_of_one_cut_that_ask_otherwise_are_joined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving("residual", "rounded", monkeypatch)
    tensors = sent(served, 2, input_of("residual", 1))
    ways: list[dict[str, Any]] = [{}, {"crc32": True}, {"output_codec": find_codec("zstd")}, {"request_id": "one"}]
    for way in ways:
        served.intake.submit(request(tensors, **way)).result(20)
    expected, runs = alone(served, tensors), Counted(served, monkeypatch)
    with held(served):
        futures = [served.intake.submit(request(tensors, **way)) for way in ways]
    for one in futures:
        torch.testing.assert_close(answer(one.result(20)), expected)
    assert runs.sizes[0] > 1
    served.close()


def test_a_wrong_request_among_others_is_the_only_one_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving("perceptron", "rounded", monkeypatch)
    asked = [sent(served, index, input_of("perceptron", index)) for index in (0, 2, 4)]
    for tensors in asked:
        served.intake.submit(request(tensors, crc32=True)).result(20)
    bodies = [request(tensors, crc32=True) for tensors in asked]
    bodies[1].body[-1] ^= 1
    with held(served):
        futures = [served.intake.submit(one) for one in bodies]
    assert isinstance(futures[1].exception(20), ProtocolError)
    for tensors, one in zip(asked[::2], futures[::2], strict=True):
        torch.testing.assert_close(answer(one.result(20)), alone(served, tensors))
    served.close()


def test_a_batch_that_fails_in_the_part_before_the_later_cut_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving("perceptron", "rounded", monkeypatch)
    asked = [sent(served, index, input_of("perceptron", index)) for index in (0, 4)]

    def fails(*given: Any) -> None:
        raise RuntimeError("out of memory")

    for tensors in asked:
        served.intake.submit(request(tensors)).result(20)
    monkeypatch.setattr(served.answers._joining, "advance", fails)
    with held(served):
        futures = [served.intake.submit(request(tensors)) for tensors in asked]
    for tensors, one in zip(asked, futures, strict=True):
        torch.testing.assert_close(answer(one.result(20)), alone(served, tensors))
    served.close()


def test_only_so_many_samples_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving("perceptron", "rounded", monkeypatch)
    asked = [sent(served, index, input_of("perceptron", index, batch=3)) for index in (0, 2, 4)]
    for tensors in asked:
        served.intake.submit(request(tensors)).result(20)
    runs = Counted(served, monkeypatch)
    with held(served):
        futures = [served.intake.submit(request(tensors)) for tensors in asked]
    for tensors, one in zip(asked, futures, strict=True):
        torch.testing.assert_close(answer(one.result(20)), alone(served, tensors))
    assert max(runs.sizes) <= MOST
    served.close()


def test_cuts_that_do_not_lie_one_behind_the_other_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of each of two branches, beside what the other branch needs: neither determines the other."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x).relu() + self.right(x).sigmoid()

    registry = ModelRegistry(profiler=None, batching="rounded", concurrency=1, max_batch=MOST)
    served = registry.add("net", seeded(Branches()), torch.rand(1, 4))
    monkeypatch.setattr(served.intake._gain, "limit", lambda kind: MOST)
    monkeypatch.setattr(served.intake._gain_of_several, "limit", lambda kind: MOST)
    x = torch.rand(1, 4)
    with torch.no_grad():
        asked = [{"left": served.graph.model.left(x), "x": x}, {"right": served.graph.model.right(x), "x": x}]  # type: ignore[operator]
        expected = served.graph.model(x)
    for found in ask(served, asked):
        torch.testing.assert_close(found["output"], expected)
    assert set(served.statistics.by_requests) == {1}
    registry.close()


def test_a_thread_takes_kinds_that_belong_together_and_leaves_others_their_share() -> None:
    class Together:
        taken: list[list[int]] = []  # noqa: RUF012

        def limit(self, kind: object) -> int:
            return 4

        def limit_of_several(self) -> int:
            return 5

        def joins(self, kind: object, other: object) -> bool:
            return {str(kind), str(other)} <= {"a", "b", "c"} and {str(kind), str(other)} != {"b", "c"}

        def weights(self, loads: Any) -> list[float]:
            return [1.0] * len(loads)

        def answer_together(self, loads: Any) -> list[Any]:
            self.taken.append(list(loads))
            return list(loads)

    worker = Worker("test", 1, Together())
    free = threading.Event()
    busy = worker.submit(lambda: free.wait(20))
    kinds = ["a", "b", "x", "c", "a", None, "b", "a", "a", "a"]
    asked = [
        worker.submit(lambda i=i: i, kind=kind, load=i)  # type: ignore[misc]
        for i, kind in enumerate(kinds)
    ]
    free.set()
    assert [one.result(20) for one in asked] == list(range(len(kinds)))
    assert busy.result(20)
    # Four of the first kind fill its batch. Then one is left of it, and two of another kind; "b" and "c" never meet.
    assert Together.taken[0] == [0, 4, 7, 8]
    assert all({kinds[i] for i in one} != {"b", "c"} for one in Together.taken)
    assert [1, 6, 9] in [sorted(one) for one in Together.taken]
    assert worker.waiting == 0
    worker.close()


def test_requests_of_very_many_kinds_do_not_keep_the_queue_from_others_for_long() -> None:
    class Together:
        compared = 0

        def limit(self, kind: object) -> int:
            return 64

        def limit_of_several(self) -> int:
            return 64

        def joins(self, kind: object, other: object) -> bool:
            Together.compared += 1
            return True

        def weights(self, loads: Any) -> list[float]:
            return [1.0] * len(loads)

        def answer_together(self, loads: Any) -> list[Any]:
            return list(loads)

    worker = Worker("test", 1, Together())
    free = threading.Event()
    busy = worker.submit(lambda: free.wait(20))
    asked = [worker.submit(lambda: None, kind=str(i), load=i) for i in range(64)]
    free.set()
    assert [one.result(20) for one in asked] == list(range(64))
    assert busy.result(20)
    # Eight runs of eight kinds, each of which is compared with those before it.
    assert Together.compared == 8 * 28
    worker.close()


def test_a_thread_whose_group_fails_runs_the_request_alone_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def limit(self, kind: object) -> int:
            return 4

        def limit_of_several(self) -> int:
            return 4

        def joins(self, kind: object, other: object) -> bool:
            raise KeyError("the table was emptied")

        def weights(self, loads: Any) -> list[float]:
            return [1.0] * len(loads)

        def answer_together(self, loads: Any) -> list[Any]:
            raise AssertionError("nothing is run together")

    worker = Worker("test", 1, Failing())
    free = threading.Event()
    busy = worker.submit(lambda: free.wait(20))
    asked = [worker.submit(lambda kind=kind: kind, kind=kind) for kind in "ab"]  # type: ignore[misc]
    free.set()
    assert busy.result(20)
    assert [one.result(20) for one in asked] == ["a", "b"]
    assert worker.submit(lambda: "c").result(20) == "c"
    assert "runs alone" in caplog.text
    worker.close()


def test_another_thread_may_empty_the_table_of_pairs_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Emptied(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            self.clear()

        def __contains__(self, key: Any) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    served = serving("perceptron", "rounded", monkeypatch)
    monkeypatch.setattr(served.answers._joining, "_pairs", Emptied())
    asked = [sent(served, index, input_of("perceptron", index)) for index in (0, 4)]
    runs = Counted(served, monkeypatch)
    for tensors, found in zip(asked, ask(served, asked), strict=True):
        torch.testing.assert_close(found, alone(served, tensors))
    assert 2 in runs.sizes
    served.close()


def test_kinds_are_joined_only_where_that_takes_less_time_than_one_after_the_other() -> None:
    for takes, best in ((lambda size: 1.0, 4), (lambda size: 1.2 * size, 1)):
        gain = Gain(4)
        gain.took("several", 1, 1.0)
        for _ in range(40):
            size = gain.limit("several")
            if size > 1:
                gain.took("several", size, takes(size))
        limits = [gain.limit("several") for _ in range(20)]
        assert max(set(limits), key=limits.count) == best
