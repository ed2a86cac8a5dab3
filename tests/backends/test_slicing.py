"""Parts that are cut out of one ONNX model, beside the parts that PyTorch runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import Part, deviation, find_backend
from torchsurgeon.backends.slicing import Slices

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Overwrites tensors, passes its input on to a later layer, and reads a tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 3, 3, padding=1)
        self.rest = nn.Dropout()
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(self.relu(self.stem(x))) + x
        return {"scores": self.head(self.rest(y).mean((2, 3))).softmax(1), "map": y.amax(1)}


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    torch.manual_seed(0)
    return ts.trace(Net().eval(), X)


@pytest.fixture(scope="module")
def slices(graph: ts.LayerGraph) -> Slices:
    with torch.no_grad():
        return Slices(graph, graph.points[1:-1], [X])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_every_part_gives_what_pytorch_gives(graph: ts.LayerGraph, slices: Slices, name: str) -> None:
    backend, cut = find_backend(name), 0
    with torch.no_grad():
        for point in graph.points[:-1]:
            head, tail = Part.head(graph, point), Part.tail(graph, [spec.name for spec in point.tensors])
            boundary = list(head.segment(X))
            for part, tensors in ((head, [X]), (tail, boundary)):
                model = slices.cut(part)
                if model is None:
                    continue
                cut += 1
                run = backend.load_onnx(model, part)
                assert run is not None
                for found, wanted in zip(run(*tensors), part.segment(*tensors), strict=True):
                    assert deviation(found, wanted) < 1e-5, point.name
    assert cut > len(graph.points)


def test_what_is_overwritten_later_is_not_cut_out(graph: ts.LayerGraph, slices: Slices) -> None:
    assert not slices.has(graph.point("stem"))
    assert slices.cut(Part.head(graph, graph.point("stem"))) is None
    assert not slices.has(graph.point("relu")), "the input crosses there, too, which the head passes on"
    assert slices.has(graph.point("add"))
    assert slices.cut(Part.head(graph, graph.point("add"))) is not None


def test_backends_that_read_no_onnx_say_so(graph: ts.LayerGraph) -> None:
    part = Part.head(graph, graph.points[-1])
    assert find_backend("eager").load_onnx(b"", part) is None
    assert find_backend("inductor").load_onnx(b"", part) is None


def test_a_profile_by_onnxruntime_takes_its_parts_from_one_export(
    graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchsurgeon.backends.onnxruntime import OnnxRuntime

    built: list[Part] = []
    monkeypatch.setattr(OnnxRuntime, "build", lambda self, part, example, *, free_batch: built.append(part))
    measured = ts.profile(graph, backend="onnxruntime", inputs=[X], budget_s=60, repeats=3, meter=None)
    assert measured.parts is not None
    assert measured.parts.points
    assert not built
    assert measured.provenance["not_by_backend"] == []


def test_parts_before_a_layer_without_an_operator_are_cut_out_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchsurgeon.backends.onnxruntime import OnnxRuntime

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.modified_bessel_i1(x)

    wide = [module for _ in range(3) for module in (nn.Linear(512, 512), nn.ReLU())]
    net = nn.Sequential(*wide, Odd(), nn.Linear(512, 8)).eval()
    graph = ts.trace(net, torch.rand(1, 512))
    odd = next(layer.index for layer in graph.layers if layer.name.startswith("6"))
    built: list[Part] = []
    monkeypatch.setattr(OnnxRuntime, "build", lambda self, part, example, *, free_batch: built.append(part))
    with pytest.warns(ts.BackendWarning, match="does not take"):
        measured = ts.profile(graph, backend="onnxruntime", budget_s=60, repeats=3, meter=None)
    assert measured.parts is not None
    assert measured.parts.points
    assert all(index <= odd for index in measured.parts.points)
    assert not built
