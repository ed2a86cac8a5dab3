"""Compiled parts of a model answer what the model does, within what is documented, and never fail where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from serving import serving
from torch import nn

import torchsurgeon as ts
from torchsurgeon.runtime.compiled import Compiled, compiler
from torchsurgeon.serve import Server

# What docs/streams.md promises of inductor in float32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.body(y) + y)
        return {"scores": self.head(y.mean((2, 3))).softmax(1), "map": y.amax(1)}


@pytest.fixture(autouse=True)
def _without_gradients_or_leftovers() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture
def backend() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Register a compiler under a name of its own, as a vendor's package does when it is imported."""
    from torch._dynamo.backends import registry

    def register(function: Callable[..., Any]) -> str:
        torch._dynamo.register_backend(function, name="of-a-test")
        return "of-a-test"

    yield register
    registry._COMPILER_FNS.pop("of-a-test", None)
    registry._BACKENDS.pop("of-a-test", None)


def parts(net: nn.Module, at: str) -> ts.Partition:
    return ts.cut(ts.trace(net, X), at)


def compiled(build: Callable[[nn.Module], Compiled], module: nn.Module, *args: Any) -> Compiled:
    made = build(module)
    made.compile(*args)
    return made


def test_inductor_answers_what_the_model_does_within_the_documented_tolerance(net: Net) -> None:
    part = parts(net, "relu")
    head = compiled(compiler(True), part.head, X)
    tail = compiled(compiler(True), part.tail, *head(X))
    for x in (X, torch.rand(2, 3, 16, 16)):
        answer = tail(*head(x))
        assert head.reason is tail.reason is None
        for name, tensor in net(x).items():
            torch.testing.assert_close(answer[name], tensor, **TOLERANCE)


class Recorder:
    """A compiler that keeps what it was given and how often what it made ran."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*args: torch.Tensor) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def test_one_graph_is_made_and_only_calls_like_the_first_run_it(net: Net, backend: Callable[..., str]) -> None:
    recorder = Recorder()
    head = compiled(compiler(backend(recorder)), parts(net, "relu").head, X)
    head.compile(X)
    for x in (X, X + 1, X[:1], X.to(memory_format=torch.channels_last), X):
        for got, wanted in zip(head(x), parts(net, "relu").head(x), strict=True):
            assert torch.equal(got, wanted)
    assert len(recorder.graphs) == 1
    assert recorder.runs == 1 + 3


def test_many_cuts_of_one_model_are_all_compiled(backend: Callable[..., str]) -> None:
    recorder = Recorder()
    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)]).eval()
    graph, build, x = ts.trace(deep, torch.ones(1, 4)), compiler(backend(recorder)), torch.ones(1, 4)
    for point in graph.points[1:-1]:
        part = ts.cut(graph, point)
        head = compiled(build, part.head, x)
        assert torch.equal(compiled(build, part.tail, *head(x))(*head(x)), deep(x))
    assert len(recorder.graphs) == 2 * 11


def test_changed_weights_are_followed(net: Net) -> None:
    head = compiled(compiler("eager"), parts(net, "relu").head, X)
    before = head(X)[0]
    net.stem.weight.mul_(2)
    assert torch.equal(head(X)[0], parts(net, "relu").head(X)[0])
    assert not torch.equal(head(X)[0], before)


def test_a_compiler_that_fails_is_named_once_and_the_model_answers(net: Net, backend: Callable[..., str]) -> None:
    def failing(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        raise OSError("no space left for kernels")

    head = compiler(backend(failing))(parts(net, "relu").head)
    with pytest.warns(RuntimeWarning, match=r"of-a-test.*OSError: no space left for kernels"):
        head.compile(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.compile(X)
        assert torch.equal(head(X)[0], parts(net, "relu").head(X)[0])


def test_inductor_without_a_working_compiler_warns_and_the_model_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as config

    # Neither finds what was compiled before, nor leaves anything behind.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Linear(7, 7), nn.Softsign()).eval()
    head, x = compiler(True)(model), torch.rand(3, 7)
    broken = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with broken, pytest.warns(RuntimeWarning, match="could not be compiled"):
        head.compile(x)
    assert torch.equal(head(x), model(x))


def test_what_one_graph_cannot_hold_runs_as_it_is() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x - 1

    part = compiler("eager")(Branching())
    with pytest.warns(RuntimeWarning, match="runs as it is"):
        part.compile(X)
    assert torch.equal(part(X), X * 2)
    assert torch.equal(part(-X), -X - 1)


def test_what_the_model_refuses_is_refused_in_its_own_words(net: Net) -> None:
    head = compiled(compiler("eager"), parts(net, "relu").head, X)
    wrong = torch.rand(2, 4, 16, 16)
    with pytest.raises(Exception, match=r"channels|shape") as refused:
        head(wrong)
    with pytest.raises(type(refused.value)):
        parts(net, "relu").head(wrong)
    assert head.reason is None


@pytest.mark.parametrize(("wanted", "match"), [("no-such", "inductor"), ("tensorrt", "torch_tensorrt")])
def test_a_backend_that_is_not_here_is_refused_at_once(wanted: str, match: str) -> None:
    with pytest.raises(ts.BackendError, match=match):
        ts.SplitModule(nn.ReLU().eval(), X, partition="device", compile=wanted)


def test_a_backend_and_a_compiler_are_one_too_many() -> None:
    with pytest.raises(ts.BackendError, match="one of them"):
        ts.SplitModule(nn.ReLU().eval(), X, partition="device", compile=True, backend=lambda module: module)


# --- in a SplitModule ---


@pytest.fixture
def server(net: Net) -> Iterator[Server]:
    with serving(net, X) as running:
        yield running


def test_head_and_tail_are_compiled_when_a_cut_is_first_used(
    net: Net, server: Server, backend: Callable[..., str]
) -> None:
    recorder = Recorder()
    with ts.SplitModule(net, X, server=server.url, name="net", partition="relu", compile=backend(recorder)) as split:
        for x in (X, X * 2):
            assert torch.equal(split(x)["scores"], net(x)["scores"])
        assert len(recorder.graphs) == 2
        split.partition = "body"
        split(X)
        assert len(recorder.graphs) == 4
        server.stop()
        runs = recorder.runs
        assert torch.equal(split(X)["scores"], net(X)["scores"])
        assert split.last is not None
        assert split.last.degraded
        assert recorder.runs == runs + 2, "head and tail, compiled before the server went"
        assert len(recorder.graphs) == 4, "and nothing is compiled while an answer is waited for"


def test_a_whole_model_on_the_device_is_compiled(net: Net, backend: Callable[..., str]) -> None:
    recorder = Recorder()
    with ts.SplitModule(net, X, partition="device", compile=backend(recorder)) as split:
        assert torch.equal(split(X)["scores"], net(X)["scores"])
    assert len(recorder.graphs) == 1


def test_a_backend_that_cannot_compile_still_answers(net: Net, server: Server, backend: Callable[..., str]) -> None:
    def failing(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        raise OSError("no space left for kernels")

    with ts.SplitModule(net, X, server=server.url, name="net", partition="relu", compile=backend(failing)) as split:
        with pytest.warns(RuntimeWarning, match="no space left"):
            answer = split(X)
        assert torch.equal(answer["scores"], net(X)["scores"])
        assert torch.equal(split(X)["scores"], net(X)["scores"])


def test_nothing_to_compile_is_no_trouble(net: Net, server: Server, backend: Callable[..., str]) -> None:
    recorder = Recorder()
    with ts.SplitModule(net, X, server=server.url, name="net", partition="server", compile=backend(recorder)) as split:
        assert torch.equal(split(X)["scores"], net(X)["scores"])
    assert len(recorder.graphs) == 1, "the tail's, which is the whole model"


def test_hooks_that_come_later_run_where_all_of_a_compiled_model_is_on_the_device() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval().requires_grad_(False), torch.rand(1, 8)
    with ts.SplitModule(model, x, partition="device", compile="eager") as split:
        split.prepare()
        assert torch.equal(split(x), model(x))
        model[0].register_forward_hook(lambda module, args, output: output * 2)
        assert torch.equal(split(x), model(x))
