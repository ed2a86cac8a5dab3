"""Parts written as ONNX models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.backends import Part
from torchsurgeon.backends.onnx import write_onnx

pytest.importorskip("onnxscript")

X = torch.rand(1, 4, generator=torch.Generator().manual_seed(0))


def test_how_operators_are_translated_is_looked_up_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.onnx._internal.exporter import _registration

    registry, looked_up = _registration.ONNXRegistry, []
    before = registry.from_torchlib

    def counted(**kwargs: int) -> _registration.ONNXRegistry:
        looked_up.append(before(**kwargs))
        return looked_up[-1]

    spy = staticmethod(counted)
    monkeypatch.setattr(registry, "from_torchlib", spy)
    monkeypatch.setattr("torchsurgeon.backends.onnx._translations", {})
    graph = ts.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), X)
    for i, point in enumerate(graph.points[1:]):
        write_onnx(Part.head(graph, point), [X], tmp_path / f"{i}.onnx", free_batch=False)
        # What the program itself does afterwards is none of this.
        assert vars(registry)["from_torchlib"] is spy
    (known,) = looked_up
    torch.onnx.export(graph.model, (X,), dynamo=True, verbose=False, custom_translation_table={})
    assert len(looked_up) == 2
    assert known.functions.keys() == looked_up[1].functions.keys()


def test_another_threads_own_translations_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.onnx._internal.exporter import _registration

    monkeypatch.setattr("torchsurgeon.backends.onnx._translations", {})
    graph = ts.trace(nn.Sequential(nn.ReLU()).eval(), X)
    relu = torch.ops.aten.relu.default
    export, given = torch.onnx.export, []

    def while_another_exports(*args: object, **kwargs: object) -> object:
        registry = _registration.ONNXRegistry.from_torchlib(opset_version=18)
        given.append(len(registry.get_decomps(relu)))
        registry.register_op(relu, lambda x: x)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", while_another_exports)
    for i in range(2):
        write_onnx(Part.head(graph, graph.points[-1]), [X], tmp_path / f"{i}.onnx", free_batch=False)
    assert given[0] == given[1] > 0


def test_a_pytorch_without_that_registry_writes_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("torchsurgeon.backends.onnx.import_module", absent)
    graph = ts.trace(nn.Sequential(nn.ReLU()).eval(), X)
    write_onnx(Part.head(graph, graph.points[-1]), [X], tmp_path / "part.onnx", free_batch=False)
    assert (tmp_path / "part.onnx").stat().st_size
