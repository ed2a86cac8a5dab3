"""A student head between a device and a server: when it runs, and what answers when the server cannot."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import flat_profile
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import Part, deviation, find_backend
from torchsurgeon.codec import FittedCodec, find_codec
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import BackendError, BackendWarning, MissingCodecWarning
from torchsurgeon.serve import ModelRegistry, Server, create_app

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("patient")

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


# --- by a backend ---


def known(graph: ts.LayerGraph, backend: str, layer_s: float) -> ts.LayerProfile:
    found = flat_profile(graph, layer_s)
    return dataclasses.replace(found, provenance={**found.provenance, "backend": backend})


@pytest.mark.parametrize("backend", ["onnxruntime", ["onnxruntime"]], ids=str)
def test_a_backend_runs_the_student_and_the_model_that_is_behind_it_on_the_device(
    backend: str | list[str], model: nn.Module, graph: ts.LayerGraph, student: FittedCodec, path: Path
) -> None:
    with serving(model, path) as server:
        split = ts.SplitModule(
            *(model, X), server=server.url, name="net", partition=CUT, codec=student.at(2), backend=backend,
            device_profile=[known(graph, "eager", 2e-3), known(graph, "onnxruntime", 1e-3)],
        )  # fmt: skip
        split.prepare()
        end_s = time.monotonic() + 60
        while True:
            answer = split(X)
            assert split.last is not None
            # An answer may be late while a thread of this process builds the parts.
            if (split.last.backend == "onnxruntime" and not split.last.degraded) or time.monotonic() > end_s:
                break
        assert (split.last.backend, split.last.degraded) == ("onnxruntime", None)
        # A value that lies between two steps of the codec may be rounded to the other one.
        assert deviation(answer, by_hand(graph, student, 2)[0]) < 0.02
        assert not torch.equal(answer, model(X))
        assert split(torch.cat([X, X])).shape == (2, 10)
        assert split.last.backend == "onnxruntime"
    with split:
        assert deviation(split(X), model(X)) < 1e-4
        assert split.last.degraded


def test_a_student_that_a_backend_does_not_take_runs_in_eager_pytorch(
    model: nn.Module, graph: ts.LayerGraph, student: FittedCodec, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = find_backend("onnxruntime")
    build = backend.build

    def refuse(part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Any:
        if any(graph.steps[step].name == "2" for step in part.segment.steps):
            raise BackendError("layer '2' cannot be exported", "2")
        return build(part, example, free_batch=free_batch)

    monkeypatch.setattr(backend, "build", refuse)
    with serving(model, path) as server:
        split = ts.SplitModule(
            *(model, X), server=server.url, name="net", partition=CUT, codec=student.at(2), backend=backend
        )
        with split, pytest.warns(BackendWarning) as caught:
            answer = split(X)
        assert torch.equal(answer, by_hand(graph, student, 2)[0])
        assert split.last is not None
        assert split.last.backend == "eager"
    head, whole = (str(one.message) for one in caught)
    assert head.endswith("does not run a part of the model, which runs in eager PyTorch: layer '2' cannot be exported")
    assert whole.endswith("eager PyTorch the rest: layer '2' cannot be exported")
