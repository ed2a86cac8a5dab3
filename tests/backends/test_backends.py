"""Parts of a model that another runtime runs answer what eager PyTorch does, within the tolerance that is stated."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import NAMES, Backend, BuiltPart, Part, deviation, find_backend
from torchsurgeon.backends.onnx import OPSET, write_onnx
from torchsurgeon.backends.onnxruntime import check_version, open_session

HERE = ("eager", "onnxruntime", "openvino", "openvino:bf16")
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A model with a branch, a layer in place, a residual connection and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.body(y) + y)
        return {"scores": self.head(y.mean((2, 3))).softmax(1), "map": y.amax(1)}


class Spectral(nn.Module):
    """A model with a layer for which neither ONNX nor OpenVINO has an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.odd = _Odd()
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x).relu()))


class _Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.modified_bessel_i1(x)


ODD = "odd.special_modified_bessel_i1"
"""The layer of ``Spectral`` for which there is no operator."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture
def net() -> nn.Module:
    return seeded(Net)


def built(part: Part, backend: str | Backend, tensors: Sequence[Tensor]) -> BuiltPart:
    made = BuiltPart(part, find_backend(backend), set())
    made.build(*tensors)
    return made


def assert_close(made: BuiltPart, tensors: Sequence[Tensor]) -> None:
    for spec, found, wanted in zip(made.part.outputs, made(*tensors), made.part.segment(*tensors), strict=True):
        assert deviation(found, wanted) <= made.backend.tolerance, spec.name


def head_and_tail(graph: ts.LayerGraph, point: ts.PartitionPoint) -> tuple[Part, Part]:
    return Part.head(graph, point), Part.tail(graph, [spec.name for spec in point.tensors])


@pytest.mark.parametrize("name", HERE)
def test_cuts_answer_within_the_tolerance_at_every_batch_size(name: str, net: nn.Module) -> None:
    graph = ts.trace(net, X)
    # Building takes seconds, so most backends get a spread of cuts.
    for point in graph.points[1:-1] if name == "eager" else graph.points[2:-1:4]:
        head, tail = head_and_tail(graph, point)
        first = built(head, name, [X])
        second = built(tail, name, head.segment(X))
        assert first.reason is second.reason is None
        for x in (X, X[:1], torch.cat([X, X + 0.5])):
            assert_close(first, [x])
            assert_close(second, head.segment(x))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_free_batch_needs_no_second_build_and_no_eager_run(name: str, net: nn.Module) -> None:
    graph = ts.trace(net, X)
    head = Part.head(graph, graph.point("body"))
    counted = Counted(find_backend(name))
    made = built(head, counted, [X])
    assert made.free_batch
    runs = counted.runs
    for count in (1, 2, 3, 7):
        made(torch.rand(count, 3, 16, 16))
    assert (counted.builds, counted.runs) == (1, runs + 4)


class Counted(Backend):
    """Another backend, with how often it built and how often what it built ran."""

    def __init__(self, inner: Backend) -> None:
        super().__init__()
        self._inner, self.builds, self.runs = inner, 0, 0
        self.name, self.tolerance = inner.name, inner.tolerance

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        run = self._inner.build(part, example, free_batch=free_batch)
        self.builds += 1

        def counted(*tensors: Tensor) -> Sequence[Tensor]:
            self.runs += 1
            return run(*tensors)

        return counted


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_networks_of_torchvision_answer_within_the_tolerance(name: str) -> None:
    from torchvision.models import get_model

    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = seeded(lambda: get_model(name, weights=None))
    graph = ts.trace(model, x)
    head, tail = head_and_tail(graph, graph.points[len(graph.points) // 2])
    first, second = built(head, "onnxruntime", [x]), built(tail, "onnxruntime", head.segment(x))
    assert first.reason is second.reason is None
    assert first.free_batch
    # A batch size that crosses as a number is fixed in what is built.
    assert second.free_batch or tail.numbers
    for call in (x, torch.cat([x, x + 0.5, x - 0.5])):
        assert_close(first, [call])
        assert_close(second, head.segment(call))


@pytest.mark.parametrize("name", ["inductor", "aot"])
def test_compilers_of_pytorch_answer_within_the_tolerance(name: str, net: nn.Module) -> None:
    graph = ts.trace(net, X)
    head = Part.head(graph, graph.point("relu"))
    made = built(head, name, [X])
    assert made.reason is None
    for x in (X, X[:1]):
        assert_close(made, [x])


HARD = (
    "relu_in_place_on_a_tensor_that_also_crosses",
    "augmented_add",
)


def cases() -> list[str]:
    """Small models of every sort, spread over the list, and those named above."""
    names = list(small_models.CASES)
    return sorted({*HARD, *names[::8]} & set(names))


@pytest.mark.parametrize("case", cases())
def test_models_that_are_hard_to_cut_answer_as_in_eager(case: str) -> None:
    model, *rest = seeded_case(case)
    kwargs = rest.pop() if isinstance(rest[-1], dict) else {}
    others = rest.pop() if len(rest) == 2 and isinstance(rest[-1], list) else []
    graph = ts.trace(model, *rest, **kwargs)
    tensors = graph.tensors_of_call(tuple(rest), kwargs)
    head, tail = head_and_tail(graph, graph.points[len(graph.points) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.BackendWarning)  # it then runs in eager, and must answer all the same
        first, second = built(head, "onnxruntime", tensors), built(tail, "onnxruntime", head.segment(*tensors))
    for call in (tensors, *([other] for other in others)):
        assert_close(first, call)
        assert_close(second, head.segment(*call))


def seeded_case(case: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return small_models.CASES[case]()


def test_numbers_that_cross_are_fixed_and_other_numbers_run_in_eager() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.shape[0]
            return self.last(self.first(x).relu() / rows) * rows

    model = seeded(Scaled)
    x = torch.rand(3, 4)
    graph = ts.trace(model, x)
    with_numbers = [p for p in graph.points[1:-1] if Part.tail(graph, [s.name for s in p.tensors]).numbers]
    for point in with_numbers or graph.points[1:-1]:
        head, tail = head_and_tail(graph, point)
        made = built(tail, "onnxruntime", head.segment(x))
        assert made.reason is None
        for count in (3, 5, 1):
            assert_close(made, head.segment(torch.rand(count, 4)))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_from_a_layer_on_that_a_backend_does_not_take_eager_pytorch_runs(name: str) -> None:
    model, x = seeded(Spectral), torch.rand(2, 6)
    graph = ts.trace(model, x)
    said: set[str] = set()
    whole = BuiltPart(Part.head(graph, graph.points[-1]), find_backend(name), said)
    with pytest.warns(ts.BackendWarning, match=r"up to the layer .* layer '?odd") as told:
        whole.build(x)
    assert len(told) == 1
    assert (whole.reason, whole.rest, whole.free_batch) == (None, ODD, True)
    for given in (x, torch.rand(3, 6)):
        assert whole.takes([given])
        torch.testing.assert_close(whole(given)[0], model(given))
    tail = BuiltPart(Part.tail(graph, [spec.name for spec in graph.points[1].tensors]), find_backend(name), said)
    boundary = Part.head(graph, graph.points[1]).segment(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tail.build(*boundary)
    assert (tail.reason, tail.rest) == (None, ODD)
    torch.testing.assert_close(tail(*boundary)[0], model(x))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_part_that_begins_with_a_layer_that_a_backend_does_not_take_runs_in_eager(name: str) -> None:
    model, x = seeded(Spectral), torch.rand(2, 6)
    graph = ts.trace(model, x)
    before = graph.point(graph.layers[[layer.name for layer in graph.layers].index(ODD) - 1].name)
    part = Part.tail(graph, [spec.name for spec in before.tensors])
    boundary = Part.head(graph, before).segment(x)
    with pytest.warns(ts.BackendWarning, match=r"does not run a part .* layer '?odd"):
        tail = built(part, name, boundary)
    assert tail.reason is not None
    assert torch.equal(tail(*boundary)[0], model(x))
    whole = Part.head(graph, graph.points[-1])
    with pytest.raises(ts.BackendError, match="odd"):
        find_backend(name).build(whole, [x], free_batch=False)


def test_a_layer_that_torch_export_does_not_follow_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    class Choosing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x - 1

    model = nn.Sequential(nn.Linear(4, 4), Choosing()).eval()
    x = torch.rand(2, 4)
    graph = ts.trace(model, x, leaf_modules=("1",))
    made = BuiltPart(Part.head(graph, graph.points[-1]), find_backend("onnxruntime"), set())
    with pytest.warns(ts.BackendWarning, match="layer '1' cannot be exported: Guard.* data-dependent"):
        made.build(x)
    assert "def forward" not in "".join(capfd.readouterr()), "the graph is not printed"
    for call in (x, -x):
        torch.testing.assert_close(made(call)[0], model(call))


def test_answers_that_deviate_are_not_used(net: nn.Module) -> None:
    class Wrong(Backend):
        name = "wrong"

        def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
            return lambda *tensors: [tensor * 1.01 for tensor in part.segment(*tensors)]

    graph = ts.trace(net, X)
    made = BuiltPart(Part.head(graph, graph.point("relu")), Wrong(), set())
    with pytest.warns(ts.BackendWarning, match=r"deviates.*1\.0e-02.*1e-04 is allowed"):
        made.build(X)
    assert torch.equal(made(X)[0], made.part.segment(X)[0])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_nan_is_passed_on_as_by_pytorch(name: str) -> None:
    graph = ts.trace(nn.Sequential(nn.MaxPool1d(2), nn.ReLU()).eval(), torch.rand(1, 2, 8))
    part = Part.head(graph, graph.points[-1])
    made = built(part, name, [torch.rand(1, 2, 8)])
    x = torch.rand(1, 2, 8)
    x[0, 1, 2] = torch.nan
    assert not made.takes([x])
    assert made.takes([x.nan_to_num()])
    assert torch.equal(made(x)[0].isnan(), part.segment(x)[0].isnan())


def test_changed_weights_are_followed_in_eager(net: nn.Module) -> None:
    graph = ts.trace(net, X)
    made = built(Part.head(graph, graph.point("stem")), "onnxruntime", [X])
    net.get_submodule("stem").weight.mul_(2)
    assert torch.equal(made(X)[0], made.part.segment(X)[0])


def test_other_threads_may_run_the_model_while_a_part_is_built(net: nn.Module) -> None:
    expected, over, wrong = net(X)["scores"], threading.Event(), []

    def run() -> None:
        with torch.no_grad():
            while not over.is_set():
                if not torch.equal(net(X)["scores"], expected):
                    wrong.append(True)

    graph = ts.trace(net, X)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        built(Part.head(graph, graph.points[-1]), "onnxruntime", [X])
    finally:
        over.set()
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_several_threads_may_call_one_part(name: str, net: nn.Module) -> None:
    graph = ts.trace(net, X)
    made = built(Part.head(graph, graph.point("body")), name, [X])
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            with torch.no_grad():
                for i in range(20):
                    assert_close(made, [X * (seed + i)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_onnx_model_has_the_names_of_the_boundary_tensors(net: nn.Module, tmp_path: Path) -> None:
    graph = ts.trace(net, X)
    point = max(graph.points[1:-1], key=lambda point: len(point.tensors))
    assert len(point.tensors) > 1
    head, tail = head_and_tail(graph, point)
    names = [spec.name for spec in point.tensors]
    for part, tensors, file in ((head, [X], "head.onnx"), (tail, head.segment(X), "tail.onnx")):
        write_onnx(part, tensors, tmp_path / file, free_batch=False)
        session = open_session(tmp_path / file, ["CPUExecutionProvider"])
        assert [one.name for one in session.get_inputs()] == [spec.name for spec in part.inputs]
        assert [one.name for one in session.get_outputs()] == [spec.name for spec in part.outputs]
    assert [spec.name for spec in tail.inputs] == names


def test_the_onnx_model_does_not_tell_where_it_comes_from(net: nn.Module, tmp_path: Path) -> None:
    graph = ts.trace(net, X)
    write_onnx(Part.head(graph, graph.points[-1]), [X], tmp_path / "part.onnx", free_batch=False, one_file=True)
    content = (tmp_path / "part.onnx").read_bytes()
    for told in (b"stack_trace", b".py", b"fx_node", str(Path(__file__).parents[2]).encode()):
        assert told not in content, told


# --- what is refused ---


def test_an_unknown_backend_lists_those_that_there_are() -> None:
    with pytest.raises(ts.BackendError, match=r"onnxruntime.*openvino.*got 'no-such'"):
        find_backend("no-such")
    with pytest.raises(ts.BackendError, match="openvino:bf16, openvino:int8; got openvino:fp4"):
        find_backend("openvino:fp4")
    assert set(HERE) <= set(NAMES)


@pytest.mark.parametrize(("name", "package"), [("onnxruntime", "onnxscript"), ("openvino", "openvino")])
def test_a_backend_that_is_not_installed_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *rest: None if one == package else real(one, *rest))
    with pytest.raises(ts.BackendError, match=rf"not installed are: {package}; pip install 'torchsurgeon\[{name}\]'"):
        find_backend(name)


def test_torch_tensorrt_is_asked_for_only_where_it_is_installed() -> None:
    if "torch_tensorrt" in sys.modules:
        pytest.skip("it is installed here")
    with pytest.raises(ts.BackendError, match="torch_tensorrt"):
        find_backend("tensorrt")


def test_a_provider_that_is_not_here_is_refused_with_those_that_are() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(ts.BackendError, match=r"needs ONNX Runtime's CUDAExecutionProvider.*CPUExecutionProvider"):
        find_backend("onnxruntime:cuda")


def test_an_onnxruntime_older_than_the_opset_is_refused(tmp_path: Path, net: nn.Module) -> None:
    check_version("1.18.0")
    check_version("1.32.0")
    with pytest.raises(ts.BackendError, match=rf"onnxruntime 1\.9\.0 is older.*opset {OPSET}.*1\.18"):
        check_version("1.9.0")
    import onnx

    graph = ts.trace(net, X)
    write_onnx(Part.head(graph, graph.point("stem")), [X], tmp_path / "part.onnx", free_batch=False)
    model = onnx.load(str(tmp_path / "part.onnx"))
    model.opset_import[0].version = 99
    onnx.save(model, str(tmp_path / "newer.onnx"))
    with pytest.raises(ts.BackendError, match="older than the model: install a newer one"):
        open_session(tmp_path / "newer.onnx", ["CPUExecutionProvider"])


class _Alone(Backend):
    """Notes whether so many threads build at once."""

    name = "alone"

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._together = threading.Barrier(threads)
        self.met = False

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._together.wait(0.2)
            self.met = True
        return part.segment


def test_two_threads_build_one_after_the_other_since_exporters_share_their_state(net: nn.Module) -> None:
    graph, backend = ts.trace(net, X), _Alone(2)
    parts = [BuiltPart(Part.head(graph, graph.points[-1]), backend, None) for _ in range(2)]
    threads = [threading.Thread(target=part.build, args=(X,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [part.reason for part in parts] == [None, None]
    assert not backend.met


def test_no_model_is_traced_while_a_part_is_built_since_both_patch_pytorch(net: nn.Module) -> None:
    graph, traced, own = ts.trace(net, X), threading.Event(), nn.Module.__call__

    def trace() -> None:
        ts.trace(net, X)
        traced.set()

    tracing = threading.Thread(target=trace)

    class Beside(_Alone):
        def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
            if tracing.ident is None:
                tracing.start()
            self.met = self.met or traced.wait(1.0)
            return part.segment

    backend = Beside(1)
    BuiltPart(Part.head(graph, graph.points[-1]), backend, None).build(X)
    tracing.join()
    assert not backend.met
    assert traced.is_set()
    assert nn.Module.__call__ is own


def test_the_log_says_once_that_a_processor_does_not_compute_in_bfloat16(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    from torchsurgeon.backends import openvino

    graph = ts.trace(net, X)
    for computes, said in ((True, 0), (False, 1)):
        monkeypatch.setattr(openvino, "computes_bfloat16", lambda computes=computes: computes)
        openvino._say_without_bfloat16.cache_clear()
        for name in ("openvino", "openvino:bf16", "openvino:bf16"):
            BuiltPart(Part.head(graph, graph.points[1]), find_backend(name), None).build(X)
        assert sum("does not compute in bfloat16" in record.message for record in caplog.records) == said
