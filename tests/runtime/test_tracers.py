"""A SplitModule refuses to be traced, alone or inside another module, and torch.compile calls it between two graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from serving import serving
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torchsurgeon as ts

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")

EXAMPLE = torch.linspace(-1, 1, 8).reshape(1, 8)
SENTENCE = "a SplitModule cannot be traced; trace its .model"


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval().requires_grad_(False)


class Around(nn.Module):
    """Calls a module, which is its submodule or is only held."""

    def __init__(self, inside: nn.Module, held: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8).requires_grad_(False)
        self.inside = nn.Identity() if held else inside
        self._held = [inside] if held else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inside(self.stem(x))
        for module in self._held:
            y = module(y)
        return y * 2


@pytest.fixture(scope="module", params=["device", 1])
def split(request: pytest.FixtureRequest) -> Iterator[ts.SplitModule]:
    with (
        serving(make(), EXAMPLE) as server,
        ts.SplitModule(make(), EXAMPLE, server=server.url, name="net", partition=request.param) as made,
    ):
        yield made


@pytest.fixture(params=["alone", "inside", "held"])
def program(request: pytest.FixtureRequest, split: ts.SplitModule) -> nn.Module:
    return split if request.param == "alone" else Around(split, request.param == "held").eval()


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.jit.trace": lambda module: torch.jit.trace(module, EXAMPLE),
    "torch.jit.trace unchecked": lambda module: torch.jit.trace(module, EXAMPLE, check_trace=False),
    "torch.jit.trace of a function": lambda module: torch.jit.trace(lambda x: module(x) + 1, EXAMPLE),
    "torch.export": lambda module: torch.export.export(module, (EXAMPLE,)),
    "torch.export by keyword": lambda module: torch.export.export(module, (), {_name(module): EXAMPLE}),
    "make_fx": lambda module: make_fx(module)(EXAMPLE),
    "make_fx before dispatch": lambda module: make_fx(module, pre_dispatch=True)(EXAMPLE),
    "make_fx with fake tensors": lambda module: make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(
        EXAMPLE
    ),
    "torchsurgeon.trace": lambda module: ts.trace(module, EXAMPLE),
    "another SplitModule": lambda module: ts.SplitModule(module, EXAMPLE, partition="device"),
}


def _name(module: nn.Module) -> str:
    return "input" if isinstance(module, ts.SplitModule) else "x"


@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers_are_refused_while_they_trace(program: nn.Module, tracer: str) -> None:
    with pytest.raises(ts.TraceError, match=SENTENCE):
        TRACERS[tracer](program)


def test_fx_is_refused(split: ts.SplitModule) -> None:
    for module in (split, Around(split)):
        with pytest.raises(ts.TraceError, match=SENTENCE):
            torch.fx.symbolic_trace(module)


def test_script_is_refused(split: ts.SplitModule) -> None:
    for module in (split, Around(split)):
        with pytest.raises(ts.TraceError, match=SENTENCE):
            torch.jit.script(module)


def test_strict_export_and_whole_graphs_say_why(program: nn.Module) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=SENTENCE):
        torch.export.export(program, (EXAMPLE,), strict=True)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{SENTENCE}, or leave out fullgraph=True"):
        torch.compile(program, backend="eager", fullgraph=True)(EXAMPLE)


def test_submitted_calls_and_streams_are_refused_as_well(split: ts.SplitModule) -> None:
    for call in (lambda x: split.submit(x).result(), lambda x: next(split.map([x]))):
        with pytest.raises(ts.TraceError, match=SENTENCE):
            torch.jit.trace(call, EXAMPLE)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda module: torch.func.vmap(module)(EXAMPLE),
        lambda module: torch.func.grad(lambda x: module(x).sum())(EXAMPLE),
        lambda module: torch.func.jvp(module, (EXAMPLE,), (EXAMPLE,)),
        lambda module: torch.func.jacrev(module)(EXAMPLE),
        lambda module: torch.func.functionalize(module)(EXAMPLE),
    ],
    ids=["vmap", "grad", "jvp", "jacrev", "functionalize"],
)
def test_transforms_of_functions_are_refused(program: nn.Module, transformed: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ts.TraceError, match=r"transforms of torch\.func; transform its \.model"):
        transformed(program)


def test_tensors_without_values_are_refused(split: ts.SplitModule) -> None:
    with pytest.raises(ts.TraceError, match=r"on the meta device has no values.*call its \.model"):
        split(EXAMPLE.to("meta"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(EXAMPLE)
    for args in ((fake,), ([fake],), ({"x": fake},)):
        with pytest.raises(ts.TraceError, match=SENTENCE):
            split(*args)
    with mode, pytest.raises(ts.TraceError, match=SENTENCE):
        split(EXAMPLE)


class Watching(TorchDispatchMode):
    """Counts operators and changes nothing."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_modes_that_only_watch_are_no_tracers(split: ts.SplitModule) -> None:
    with Watching() as mode, torch.device("cpu"):
        answer = split(EXAMPLE)
    assert torch.equal(answer, split.model(EXAMPLE))
    assert mode.count


@pytest.mark.parametrize("program", ["inside"], indirect=True)
def test_compiled_around_a_split_it_is_called_between_two_graphs(split: ts.SplitModule, program: nn.Module) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(program, backend=backend)
    for x in (EXAMPLE, EXAMPLE * 3):
        answer, last = compiled(x), split.last
        assert torch.equal(answer, program(x))
        assert last is not None
        assert last.degraded is None
        assert split.partition is not None
        assert last.partition == split.partition
    # What comes before the split, and what comes after it; nothing of the runtime.
    assert [len([node for node in graph.graph.nodes if node.op == "call_function"]) for graph in graphs] == [1, 1]


def test_compiled_itself_it_runs_as_it_is(split: ts.SplitModule) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(split, backend=lambda graph, inputs: pytest.fail("compiled a part of the runtime"))
    assert torch.equal(compiled(EXAMPLE * 3), split.model(EXAMPLE * 3))
    assert torch.equal(torch.compile(split.forward, backend="eager")(EXAMPLE), split.model(EXAMPLE))


def test_a_call_is_answered_while_another_thread_exports_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo  # an export imports it
    from torch.fx import traceback

    def build(module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            # An export that ends in another thread puts back what it has found.
            monkeypatch.setattr(traceback, "current_meta", {})
            return module(*args)

        return run

    with ts.SplitModule(make(), EXAMPLE, partition="device", backend=build) as split:
        monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
        assert torch.equal(split(EXAMPLE), split.model(EXAMPLE))
