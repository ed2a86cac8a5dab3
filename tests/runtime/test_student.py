"""A student head between a device and a server: when it runs, and what answers when the server cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.codec import FittedCodec, find_codec
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import MissingCodecWarning
from torchsurgeon.serve import ModelRegistry, Server, create_app

torch.set_num_threads(1)

CUT = "3"


def pictures(count: int, seed: int) -> list[Tensor]:
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, size=(24, 24), mode="bicubic").split(1))


X = pictures(1, 0)[0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, stride=2), nn.ReLU()
    return nn.Sequential(*head, nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1296, 10)).eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> ts.LayerGraph:
    return ts.trace(model, X)


@pytest.fixture(scope="module")
def student(graph: ts.LayerGraph) -> FittedCodec:
    return ts.distill(graph, CUT, pictures(32, 1), share=0.4, training_s=0.5, name="small")


@pytest.fixture
def path(student: FittedCodec, tmp_path: Path) -> Path:
    student.save(tmp_path / "small.student")
    return tmp_path / "small.student"


@contextmanager
def serving(model: nn.Module, path: Path | None) -> Iterator[Server]:
    registry = ModelRegistry()
    served = registry.add("net", model, X)
    if path is not None:
        served.add_codec(path)
    with Server(create_app(registry)) as server:
        yield server
    registry.close()


def by_hand(graph: ts.LayerGraph, student: FittedCodec, rate: float) -> tuple[Tensor, int]:
    """Return the answer of student, codec and tail one after the other, and what crosses."""
    assert student.student is not None
    (boundary,) = student.student.module(graph, student.point[0])(X)
    encoded = student.at(rate).encode(boundary, graph.point(CUT).tensors[0].name)
    decoded = find_codec(encoded.codec).decode(
        encoded.data, boundary.dtype, boundary.shape, encoded.order, max_bytes=1 << 20
    )
    with torch.no_grad():
        return cut(graph, CUT).tail(decoded), len(encoded.data)


def test_the_student_computes_what_crosses(
    model: nn.Module, graph: ts.LayerGraph, student: FittedCodec, path: Path
) -> None:
    with serving(model, path) as server:
        split = ts.SplitModule(
            model, X, server=server.url, name="net", partition=CUT, codec=student.at(2), fallback="error"
        )
        with split:
            answer = split(X)
            wanted, _ = by_hand(graph, student, 2)
            assert torch.equal(answer, wanted)
            assert not torch.equal(answer, model(X))
            assert split.last.bits == "changed by a lossy codec"
            assert split.last.degraded is None


def test_without_a_server_the_model_itself_answers(model: nn.Module, student: FittedCodec) -> None:
    with ts.SplitModule(model, X, server="http://127.0.0.1:9", name="net", partition=CUT, codec=student.at(2)) as split:
        assert torch.equal(split(X), model(X))
        assert split.last.degraded


def test_a_server_that_goes_while_the_call_is_under_way_leaves_the_models_own_answer(
    model: nn.Module, student: FittedCodec, path: Path
) -> None:
    with serving(model, path) as server:
        split = ts.SplitModule(model, X, server=server.url, name="net", partition=CUT, codec=student.at(2))
        split(X)
        assert split.last.degraded is None
    with split:
        assert torch.equal(split(X), model(X))
        assert split.last.degraded
        assert split.last.local_s > 0


def test_a_server_without_the_file_gets_what_the_models_own_layers_compute(
    model: nn.Module, student: FittedCodec
) -> None:
    with (
        serving(model, None) as server,
        ts.SplitModule(
            model, X, server=server.url, name="net", partition=CUT, codec=student.at(2), fallback="error"
        ) as split,
        pytest.warns(MissingCodecWarning, match="small"),
    ):
        assert torch.allclose(split(X), model(X))


def test_elsewhere_the_models_own_layers_run(model: nn.Module, student: FittedCodec, path: Path) -> None:
    with (
        serving(model, path) as server,
        ts.SplitModule(
            model, X, server=server.url, name="net", partition="1", codec=student.at(2), fallback="error"
        ) as split,
    ):
        assert torch.allclose(split(X), model(X))


def test_a_second_server_without_the_file_gets_what_the_models_own_layers_compute(
    model: nn.Module, student: FittedCodec, path: Path
) -> None:
    with serving(model, None) as second:
        with serving(model, path) as first:
            split = ts.SplitModule(
                model, X, server=[first.url, second.url], name="net", partition=CUT, codec=student.at(2)
            )
            split(X)
            assert split.last.bits == "changed by a lossy codec"
        with split, warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingCodecWarning)
            for _ in range(3):
                assert torch.allclose(split(X), model(X), atol=1e-6)
                assert split.last.bits != "changed by a lossy codec"
