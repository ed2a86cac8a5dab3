"""What is written for devices without PyTorch and for other servers, and what cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import flat_profile
from classifier import EXAMPLE, GRAPH, serve, truth
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import cli, edge
from torchsurgeon.accuracy import Budget
from torchsurgeon.backends import Backend, find_backend
from torchsurgeon.backends.onnxruntime import OnnxRuntime
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable
from torchsurgeon.export import best_points, export_bundle, export_openvino, export_triton

COSTS = {"device": flat_profile(GRAPH, 2e-3), "server": flat_profile(GRAPH, 1e-5)}


class Odd(nn.Module):
    """A model with a layer that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(4, 4), Bessel(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x)))


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.modified_bessel_i1(x)


def traced(model: nn.Module, *example: Tensor) -> tuple[ts.LayerGraph, dict[str, Any]]:
    graph = ts.trace(model.eval(), *example)
    return graph, {"device": flat_profile(graph, 1e-4), "server": flat_profile(graph, 1e-4)}


def test_a_layer_that_onnx_does_not_have_is_named(tmp_path: Path) -> None:
    graph, costs = traced(Odd(), torch.rand(2, 4))
    with pytest.raises(ts.BackendError, match=r"layer 'odd\.special_\w+' cannot be exported to ONNX: aten\.special"):
        export_bundle(graph, tmp_path / "whole", points=["first"], **costs)
    assert not list(tmp_path.iterdir())
    export_bundle(graph, tmp_path / "head", points=["first"], whole=False, **costs)
    with pytest.raises(ts.BackendError, match=r"layer 'odd\."):
        export_triton(graph, tmp_path / "triton", point="first")
    assert not list((tmp_path / "triton").iterdir())
    export_triton(graph, tmp_path / "triton", point=2)


def test_what_numpy_does_not_have_is_refused(tmp_path: Path) -> None:
    graph, costs = traced(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).bfloat16(), torch.rand(2, 4).bfloat16())
    with pytest.raises(ts.BackendError, match="is BF16, which NumPy does not have"):
        export_bundle(graph, tmp_path / "bundle", points=[1], **costs)


class Masked(nn.Module):
    """A model that skips its mask where that hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        return x.relu() if mask.all() else (x * mask).relu() - 1


def test_a_model_whose_path_values_decide_is_refused_since_a_device_would_not_notice(tmp_path: Path) -> None:
    x, mask = torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    graph, costs = traced(Masked(), x, mask)
    for whole in (True, False):
        with pytest.raises(ts.BackendError, match="Masked tests the values of 'mask' and goes on by what it finds"):
            export_bundle(graph, tmp_path / "bundle", points=["first"], whole=whole, **costs)
    for write in (export_triton, export_openvino):
        with pytest.raises(ts.BackendError, match="tests the values of 'mask'"):
            write(graph, tmp_path / "tails", point="first")


class ManyDiffer(nn.Module):
    """A model that computes something else for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.first(x)
        return found * 2 if x.shape[0] >= 64 else found


def test_batches_for_which_the_model_takes_another_path_are_refused_on_a_device(tmp_path: Path) -> None:
    model = ManyDiffer()
    graph, costs = traced(model, torch.rand(2, 4))
    assert graph.batch_free
    export_bundle(graph, tmp_path / "bundle", points=["server"], **costs)
    few, many = torch.rand(63, 4), torch.rand(64, 4)
    with edge.open(tmp_path / "bundle") as device:
        with torch.no_grad():
            assert np.allclose(device(few.numpy()), model(few).numpy(), atol=1e-5)
        with pytest.raises(TypeError, match=r"a batch of 64 .* it takes the same for 1 to 63; export it"):
            device(many.numpy())


def test_a_tail_for_other_servers_takes_one_batch_size_where_the_model_does_not_treat_all_alike(tmp_path: Path) -> None:
    graph, _ = traced(ManyDiffer(), torch.rand(2, 4))
    assert "dims: [ 2, 4 ]" in (export_triton(graph, tmp_path, point="server") / "config.pbtxt").read_text()
    graph, _ = traced(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.rand(2, 4))
    assert "dims: [ -1, 4 ]" in (export_triton(graph, tmp_path, point=1, name="alike") / "config.pbtxt").read_text()


@pytest.mark.parametrize("counted", [True, False])
def test_weights_that_change_while_a_bundle_is_written_are_noticed(
    counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    graph, costs = traced(model, torch.rand(2, 4))
    write = OnnxRuntime.write

    def trained(self: OnnxRuntime, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        with torch.no_grad():
            (model[1].weight if counted else model[1].weight.data).mul_(2)

    monkeypatch.setattr(OnnxRuntime, "write", trained)
    with pytest.raises(ts.BundleError, match="written to while the bundle was made"):
        export_bundle(graph, tmp_path / "bundle", points=[1], whole=False, **costs)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_and_a_point_without_a_tail_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ts.BundleError, match="holds something already"):
        export_bundle(GRAPH, tmp_path, points=["stem"], **COSTS)
    with pytest.raises(ts.BundleError, match="needs at least one point where something crosses"):
        export_bundle(GRAPH, tmp_path / "new", points=["device"], **COSTS)
    with pytest.raises(ts.PartitionError, match="stam"):
        export_bundle(GRAPH, tmp_path / "new", points=["stam"], **COSTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_codecs_that_a_device_without_pytorch_does_not_have_are_left_out(tmp_path: Path) -> None:
    point = GRAPH.point("act")
    rows = tuple(
        CodecRow(point.index, point.name, point.size_bytes, CodecCost(name, 100.0, 1e-5, 1e-5, True, True), None, ())
        for name in ("raw", "zstd", "png", "fitted:mine-01234567@1")
    )
    table = CodecTable("Net", GRAPH.fingerprint, 1, 10, "", rows)
    written = export_bundle(GRAPH, tmp_path / "bundle", points=["act"], codecs=table, **COSTS)
    assert written.left_out == ("fitted:mine-01234567@1",)
    assert {row.codec for row in edge.read(tmp_path / "bundle").costs.rows if not row.on_device} == {
        "raw",
        "zstd",
        "png",
    }
    with edge.open(tmp_path / "bundle") as model:
        assert np.allclose(model(EXAMPLE.numpy()), truth(EXAMPLE).numpy(), atol=1e-4)


def _int8(**limits: Any) -> Backend:
    generator = torch.Generator().manual_seed(2)
    sample = [torch.rand(EXAMPLE.shape, generator=generator) for _ in range(60)]
    return find_backend("onnxruntime:int8", sample=sample, budget=Budget(**limits))


def test_parts_in_whole_numbers_keep_their_budget_and_are_small(tmp_path: Path) -> None:
    floats = export_bundle(GRAPH, tmp_path / "floats", points=["act"], **COSTS)
    written = export_bundle(GRAPH, tmp_path / "int8", points=["act"], backend=_int8(min_cosine=0.95), **COSTS)
    assert written.in_floats == ()
    assert floats.in_floats == ()
    for file in ("whole.onnx", "heads/3.onnx"):
        operators = {node.op_type for node in onnx.load(tmp_path / "int8" / file).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= operators
        assert not (tmp_path / "int8" / f"{file}.data").exists()
    with edge.open(tmp_path / "int8") as model:
        for batch in (1, 3):
            x = torch.rand(batch, *EXAMPLE.shape[1:])
            found, wanted = model(x.numpy()), truth(x).numpy()
            assert not np.allclose(found, wanted, atol=1e-5)
            assert np.allclose(found, wanted, atol=0.1 * np.abs(wanted).max())
    with serve() as server, edge.open(tmp_path / "int8", server.url, partition="act", fallback="error") as model:
        found = model(EXAMPLE.numpy())
        assert not np.allclose(found, truth(EXAMPLE).numpy(), atol=1e-5)
        assert np.allclose(found, truth(EXAMPLE).numpy(), atol=0.1 * np.abs(truth(EXAMPLE).numpy()).max())


def test_parts_that_break_the_budget_in_whole_numbers_stay_in_floats(tmp_path: Path) -> None:
    written = export_bundle(GRAPH, tmp_path / "bundle", points=["act"], backend=_int8(min_cosine=1.0), **COSTS)
    head, whole = written.in_floats
    assert head.startswith("the head up to act: between 'x' and 'act' it changes more answers than the accuracy budget")
    assert whole.startswith("the whole model: ")
    with edge.open(tmp_path / "bundle") as model:
        assert np.allclose(model(EXAMPLE.numpy()), truth(EXAMPLE).numpy(), atol=1e-4)


def test_a_bundle_takes_no_other_backend(tmp_path: Path) -> None:
    with pytest.raises(ts.BackendError, match="run by onnxruntime or onnxruntime:int8; got openvino"):
        export_bundle(GRAPH, tmp_path / "bundle", points=["act"], backend="openvino", **COSTS)
    with pytest.raises(ts.BackendError, match="missing: sample and budget"):
        export_bundle(GRAPH, tmp_path / "bundle", points=["act"], backend="onnxruntime:int8", **COSTS)
    with pytest.raises(ts.SampleSizeError, match="299 calls are needed"):
        export_bundle(GRAPH, tmp_path / "bundle", points=["act"], backend=_int8(max_top1_change=0.01), **COSTS)
    assert not list(tmp_path.iterdir())


def test_the_best_points_are_those_of_links_that_have_names() -> None:
    slow = {"device": flat_profile(GRAPH, 10.0), "server": flat_profile(GRAPH, 1e-6)}
    assert [point.name for point in best_points(GRAPH, **slow)] == ["input"]
    assert best_points(GRAPH, **COSTS)


# --- other servers ---


def boundary_of(point: str) -> dict[str, np.ndarray[Any, Any]]:
    head = ts.cut(GRAPH, point).head
    with torch.no_grad():
        tensors = head(EXAMPLE)
    return {spec.name: tensor.numpy() for spec, tensor in zip(GRAPH.point(point).tensors, tensors, strict=True)}


@pytest.mark.parametrize("point", ["input", "stem", "act"])
def test_triton_gets_a_tail_with_the_same_names_and_answer(point: str, tmp_path: Path) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    where = "server" if point == "input" else point
    model = export_triton(GRAPH, tmp_path, point=where, name="tail", inputs=[EXAMPLE])
    assert model == tmp_path / "tail"
    boundary = {"x": EXAMPLE.numpy()} if point == "input" else boundary_of(point)
    session = onnxruntime.InferenceSession(str(model / "1" / "model.onnx"))
    found = session.run(["output"], boundary)[0]
    assert np.allclose(found, truth(EXAMPLE).numpy(), atol=1e-4)
    # The text is read by the schema that NVIDIA publishes, as Triton reads it.
    config = text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.platform, config.max_batch_size) == ("tail", "onnxruntime_onnx", 0)
    for kind, ends in (("input", session.get_inputs()), ("output", session.get_outputs())):
        told = {one.name: one for one in getattr(config, kind)}
        assert set(told) == {one.name for one in ends}
        for one in ends:
            assert schema.DataType.Name(told[one.name].data_type) == "TYPE_FP32"
            assert list(told[one.name].dims) == [-1 if isinstance(dim, str) else dim for dim in one.shape]


def test_a_name_that_needs_escaping_is_a_string_of_the_text_format() -> None:
    from torchsurgeon.export.servers import _quoted

    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    for text in ('a"b\\c', "weights µ", "line\nbreak", "features.12"):
        assert text_format.Parse(f"name: {_quoted(text)}", schema.ModelConfig()).name == text


def test_openvinos_server_gets_a_tail_with_the_same_names_and_answer(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    for name in ("first", "second"):
        assert export_openvino(GRAPH, tmp_path, point="act", name=name, inputs=[EXAMPLE]) == tmp_path / name
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_config_list": [
            {"config": {"name": "first", "base_path": "/models/first"}},
            {"config": {"name": "second", "base_path": "/models/second"}},
        ]
    }
    compiled = openvino.compile_model(str(tmp_path / "first" / "1" / "model.onnx"), "CPU")
    boundary = boundary_of("act")
    assert {one.get_any_name() for one in compiled.inputs} == set(boundary)
    assert {one.get_any_name() for one in compiled.outputs} == {"output"}
    assert np.allclose(compiled(boundary)["output"], truth(EXAMPLE).numpy(), atol=1e-3)


@pytest.mark.parametrize("write", [export_triton, export_openvino])
def test_what_other_servers_cannot_take_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ts.BundleError, match="there is no tail"):
        write(GRAPH, tmp_path, point="device")
    for name in ("a/b", "..", "", "a b"):
        with pytest.raises(ts.BundleError, match="a model's name is a folder of letters"):
            write(GRAPH, tmp_path, point="act", name=name)
    (tmp_path / "net").mkdir()
    with pytest.raises(ts.BundleError, match="exists already"):
        write(GRAPH, tmp_path, point="act")


def test_numbers_that_cross_are_refused(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y.mean((2, 3))) * x.shape[2]

    graph, _ = traced(Sized(), torch.rand(1, 1, 8, 8))
    point = next((one for one in graph.points if any(graph.value(spec.name).restore for spec in one.tensors)), None)
    if point is None:
        pytest.skip("this PyTorch's trace has no number that crosses")
    with pytest.raises(ts.BackendError, match="numbers of the model's code cross"):
        export_triton(graph, tmp_path, point=point)


def test_a_config_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ts.BundleError, match="has no model_config_list"):
        export_openvino(GRAPH, tmp_path, point="act")
    assert (tmp_path / "config.json").read_text() == "[]"


# --- the command ---


def test_the_command_writes_a_bundle_and_tails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, triton, ovms = (str(tmp_path / name) for name in ("bundle", "triton", "ovms"))
    spec = ["export", "factories:tiny", "--point", "1", "--name", "tiny"]
    assert cli.main([*spec, "--out", out, "--triton", triton, "--ovms", ovms]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^{re.escape(out)}: [1-9][\d.]* kB, heads up to ", said, re.MULTILINE)
    assert (tmp_path / "triton" / "tiny" / "config.pbtxt").exists()
    assert (tmp_path / "ovms" / "config.json").exists()
    with edge.open(out) as model:
        assert model.bundle.name == "tiny"
        assert model(np.zeros((2, 3, 8, 8), np.float32)).shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --out DIR, --triton DIR or --ovms DIR"),
        (["--triton", "x"], "give --point POINT"),
        (["--points", "1", "2", "--ovms", "x"], "give --point POINT"),
        (["--out", "x", "--backend", "openvino"], "run by onnxruntime or onnxruntime:int8; got --backend openvino"),
        (["--out", "x", "--backend", "onnxruntime:int8"], "missing: sample and budget"),
        (["--out", "x", "--backend-sample", "none"], "--backend-sample must be a folder of images; there is no folder"),
        (["--out", "x", "--backend-limits", "min-cos=1"], "did you mean min-cosine?"),
        (["--out", "x", "--points", "nowhere"], "nowhere"),
    ],
)
def test_the_command_says_what_is_missing(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "factories:tiny", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
