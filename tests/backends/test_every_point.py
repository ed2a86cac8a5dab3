"""Heads, middles and tails of small models answer as in eager PyTorch, for batches of 1, 2 and 5."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchsurgeon as ts
from benchmarks.support import exports
from torchsurgeon.backends import Backend, BuiltPart, Part, deviation, find_backend

BATCHES = (1, 2, 5)
# Building a part takes a second or two, so each backend gets a spread of the cuts. With 1 it gets every cut.
EVERY = {"onnxruntime": 2, "openvino": 4, "openvino:bf16": 8}


class Convolutions(nn.Module):
    """Branches, a residual connection over several layers, layers in place, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        z = self.pointwise(functional.hardswish(self.depthwise(y)))
        z = z * functional.adaptive_avg_pool2d(self.squeeze(z), 1).sigmoid() + y
        return {"scores": self.head(z.mean((2, 3))).softmax(1), "map": z.amax(1)}


class Attention(nn.Module):
    """Tokens, whose number and batch size are read off the tensor and cross as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 16), nn.Parameter(torch.randn(1, 9, 16) / 4)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return functional.gelu(self.norm(x))[:, 0]


class Views(nn.Module):
    """Chunks and slices of one tensor that are read much later, one of them overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(4, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self.first(x).chunk(3, 1)
        b = self.second(b.tanh())
        a = a.clone()
        a[:, 1:3] = b[:, :2]
        return self.last(torch.cat([a, b, c.flip(1)], 1)), c.transpose(0, 1)


class Lengths(nn.Module):
    """Sound: a recurrent layer, and padding by a number that is computed from the length."""

    def __init__(self) -> None:
        super().__init__()
        self.bands, self.scores = nn.Conv1d(4, 8, 3), nn.Linear(8, 3)
        self.gate = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pad(self.bands(x), (0, x.shape[-1] // 4))
        y = y * self.gate(y).sigmoid()
        return self.scores(y.cumsum(-1).transpose(1, 2)).log_softmax(-1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutions": (Convolutions, lambda batch: torch.rand(batch, 3, 12, 12)),
    "attention": (Attention, lambda batch: torch.randint(0, 50, (batch, 9))),
    "views": (Views, lambda batch: torch.randn(batch, 6)),
    "lengths": (Lengths, lambda batch: torch.randn(batch, 4, 16)),
}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    model, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model().eval(), [inputs(batch) for batch in BATCHES]


def compare(part: Part, backend: Backend, calls: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    """Build a part for the first call and compare all calls; return how many ran, and how many the backend took."""
    built = BuiltPart(part, backend, set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ts.BackendWarning)
        built.build(*calls[0])
    taken = 0
    for tensors in calls:
        found, wanted = built(*tensors), part.segment(*tensors)
        assert len(found) == len(wanted)
        for spec, one, other in zip(part.outputs, found, wanted, strict=True):
            assert deviation(one, other) <= backend.tolerance, (spec.name, [tuple(one.shape) for one in tensors])
        taken += built.takes(tensors)
    return len(calls), taken


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_tails_answer_within_the_tolerance(name: str) -> None:
    model, inputs = made(name)
    graph = ts.trace(model, inputs[0])
    runs, taken = Counter[str](), Counter[str]()
    for index, point in enumerate(graph.points[1:]):
        backends = [backend for backend, step in EVERY.items() if index % step == 0]
        if not backends:
            continue
        head = Part.head(graph, point)
        boundaries = [head.segment(x) for x in inputs]
        parts = [(head, [[x] for x in inputs])]
        if point.index < len(graph.layers):
            parts.append((Part.tail(graph, [spec.name for spec in point.tensors]), boundaries))
        for part, calls in parts:
            with exports.made_once():
                for backend in backends:
                    all_runs, all_taken = compare(part, find_backend(backend), calls)
                    runs[backend] += all_runs
                    taken[backend] += all_taken
                    assert all_taken == all_runs or part.numbers, "only numbers are fixed in what is built"
    assert set(runs) == set(EVERY)
    for backend in EVERY:
        assert taken[backend] > runs[backend] / 2, backend


@pytest.mark.parametrize("name", MODELS)
def test_what_lies_between_two_cuts_answers_within_the_tolerance(name: str) -> None:
    model, inputs = made(name)
    graph, backend = ts.trace(model, inputs[0]), find_backend("onnxruntime")
    points = graph.points[1:-1:2]
    for first, second in zip(points, points[2:], strict=False):
        head = Part.head(graph, first)
        names = [spec.name for spec in first.tensors]
        middle = Part.middle(graph, names, second)
        tail = Part.tail(graph, [spec.name for spec in second.tensors])
        boundaries = [head.segment(x) for x in inputs]
        compare(middle, backend, boundaries)
        for x, boundary in zip(inputs, boundaries, strict=True):
            for one, other in zip(
                tail.segment(*middle.segment(*boundary)), Part.head(graph, graph.points[-1]).segment(x), strict=True
            ):
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_every_part_knows_what_comes_before_it_and_after_it(name: str) -> None:
    model, inputs = made(name)
    graph = ts.trace(model, inputs[0])
    wanted = [Part.head(graph, graph.points[-1]).segment(x) for x in inputs]
    for point in graph.points[1:]:
        parts = [Part.head(graph, point)]
        if point.index < len(graph.layers):
            parts.append(Part.tail(graph, [spec.name for spec in point.tensors]))
        for part in parts:
            after = part.after()
            for x, answers in zip(inputs, wanted, strict=True):
                found = part.segment(*part.before()(x))
                found = found if after is None else after(*found)
                assert all(torch.equal(one, other) for one, other in zip(found, answers, strict=True))
