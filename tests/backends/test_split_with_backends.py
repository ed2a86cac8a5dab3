"""A SplitModule and a server whose parts another runtime runs, the answer of the device's own tail included."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from serving import serving
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import NAMES, Backend, Part, deviation, find_backend
from torchsurgeon.cli.completion import BACKENDS
from torchsurgeon.serve import ModelRegistry, Server, create_app

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.stem(x))
        y = self.relu(self.body(y) + y)
        return {"scores": self.head(y.mean((2, 3))).softmax(1), "map": y.amax(1)}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


class Spy(Backend):
    """Runs parts in eager PyTorch, counts what it builds and runs, and gives bits of its own."""

    name = "spy"

    def __init__(self) -> None:
        super().__init__()
        self.built: list[Part] = []
        self.runs = 0

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        assert not part.numbers
        self.built.append(part)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            self.runs += 1
            return [tensor * (1 + 1e-6) if tensor.is_floating_point() else tensor for tensor in part.segment(*tensors)]

        return run


def assert_close(answer: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 3e-4) -> None:
    assert list(answer) == list(wanted)
    for name, tensor in wanted.items():
        assert deviation(answer[name], tensor) <= tolerance, name


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_head_tail_and_fallback_run_by_a_named_backend(name: str, net: nn.Module) -> None:
    with (
        serving(net, X) as server,
        ts.SplitModule(net, X, server=server.url, name="net", partition="relu", backend=name) as split,
    ):
        for x in (X, X[:1], torch.rand(3, 3, 12, 12)):
            assert_close(split(x), net(x))
            assert split.last is not None
            assert split.last.bits == "same to rounding"
            assert any(name in reason for reason in split.last.inexact_because)
        server.stop()
        for x in (X, X[:1]):
            assert_close(split(x), net(x))
            assert split.last is not None
            assert split.last.degraded


def test_nothing_is_built_while_an_answer_is_waited_for(net: nn.Module) -> None:
    spy = Spy()
    with (
        serving(net, X) as server,
        ts.SplitModule(net, X, server=server.url, name="net", partition="relu", backend=spy) as split,
    ):
        assert_close(split(X), net(X))
        assert len(spy.built) == 2, "head and tail"
        split.partition = "body"
        assert_close(split(X), net(X))
        assert len(spy.built) == 4
        server.stop()
        runs = spy.runs
        assert_close(split(X), net(X))
        assert spy.runs == runs + 2
        assert len(spy.built) == 4


def test_a_whole_model_on_the_device_has_the_models_own_structure(net: nn.Module) -> None:
    spy = Spy()
    with ts.SplitModule(net, X, partition="device", backend=spy) as split:
        assert_close(split(X), net(X))
    assert len(spy.built) == 1


def test_a_model_that_changed_or_runs_under_autocast_answers_itself(net: nn.Module) -> None:
    spy = Spy()
    with ts.SplitModule(net, X, partition="device", backend=spy) as split:
        split(X)
        runs = spy.runs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(split(X)["scores"], net(X)["scores"])
        hook = net.get_submodule("head").register_forward_hook(lambda module, args, output: output * 3)
        assert torch.equal(split(X)["scores"], net(X)["scores"])
        hook.remove()
        assert spy.runs == runs
        split(X)
        assert spy.runs == runs + 1


def test_what_a_backend_does_not_take_is_said_once_and_answered(net: nn.Module) -> None:
    class Refusing(Spy):
        def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
            raise ts.BackendError("layer 'stem' has no counterpart")

    with ts.SplitModule(net, X, partition="device", backend=Refusing()) as split:
        with pytest.warns(ts.BackendWarning, match="layer 'stem'"):
            answer = split(X)
        assert all(torch.equal(answer[name], tensor) for name, tensor in net(X).items())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split(X)


def test_exact_takes_only_backends_that_keep_bits(net: nn.Module) -> None:
    for backend in ("onnxruntime", "openvino", Spy()):
        with pytest.raises(ts.BackendError, match="exact=True"):
            ts.SplitModule(net, X, partition="device", backend=backend, exact=True)
    with ts.SplitModule(net, X, partition="device", backend="eager", exact=True) as split:
        assert torch.equal(split(X)["scores"], net(X)["scores"])
        assert split.last is not None
        assert split.last.bits == "same bits"


def test_a_backend_that_does_not_exist_is_refused_at_once(net: nn.Module) -> None:
    with pytest.raises(ts.BackendError, match="onnxruntime"):
        ts.SplitModule(net, X, partition="device", backend="no-such")
    with pytest.raises(ts.BackendError, match="got 3"):
        ts.SplitModule(net, X, partition="device", backend=3)  # type: ignore[arg-type]


def test_a_server_runs_tails_by_a_backend_once_they_are_built(net: nn.Module, patient: None) -> None:
    registry, spy = ModelRegistry(), Spy()
    served = registry.add("net", net, X, backend=spy)
    try:
        from torchsurgeon.serve import Server, create_app

        with (
            Server(create_app(registry)) as server,
            ts.SplitModule(net, X, server=server.url, name="net", partition="relu") as split,
        ):
            end_s = time.monotonic() + 60
            while not spy.runs > 2 and time.monotonic() < end_s:
                assert_close(split(X), net(X))
            assert len(spy.built) == 1
            (builder,) = served.backends.builders.values()
            (built,) = builder.built()
            assert built.free_batch
            assert_close(split(X[:1]), net(X[:1]))
            assert split.last is not None
            assert split.last.bits == "same to rounding"
            assert not split.last.degraded
    finally:
        registry.close()


@pytest.mark.parametrize("asked", [{}, {"server_backend": "eager"}, {"server_backend": "auto"}], ids=str)
def test_an_exact_device_is_answered_in_eager_pytorch_whatever_the_servers_own_choice(
    asked: dict[str, Any], net: nn.Module
) -> None:
    registry, spy = ModelRegistry(), Spy()
    registry.add("net", net, X, backend=spy)
    ways: dict[str, Any] = {"name": "net", "partition": "relu", "fallback": "error"}
    try:
        with Server(create_app(registry)) as server:
            with ts.SplitModule(net, X, server=server.url, exact=True, **asked, **ways) as split:
                for _ in range(3):
                    answer = split(X)
                    assert split.last is not None
                    assert (split.last.bits, split.last.server) == ("same bits", server.url)
                    assert all(torch.equal(answer[name], tensor) for name, tensor in net(X).items())
            assert (spy.built, spy.runs) == ([], 0)
            with ts.SplitModule(net, X, server=server.url, **ways) as split:
                split(X)
                assert split.last is not None
                assert split.last.bits == "same to rounding"
                assert split.last.inexact_because == ("the server runs the model by spy",)
    finally:
        registry.close()


def test_a_device_that_asks_for_eager_pytorch_is_told_that_it_got_the_same_bits(net: nn.Module) -> None:
    registry = ModelRegistry()
    registry.add("net", net, X, backend=Spy())
    try:
        with (
            Server(create_app(registry)) as server,
            ts.SplitModule(
                net, X, server=server.url, name="net", partition="relu", server_backend="eager", fallback="error"
            ) as split,
        ):
            split(X)
            assert split.last is not None
            assert split.last.bits == "same bits"
    finally:
        registry.close()


def test_exact_refuses_a_backend_of_the_server_that_changes_bits(net: nn.Module) -> None:
    with pytest.raises(ts.BackendError, match=r"servers give in eager PyTorch, and server_backend is 'openvino'"):
        ts.SplitModule(net, X, server="http://127.0.0.1:9", server_backend="openvino", exact=True)


def test_a_served_split_module_has_a_backend_of_its_own(net: nn.Module) -> None:
    with ts.SplitModule(net, X, partition="device") as split, pytest.raises(ts.BackendError, match="give backend= to"):
        ModelRegistry().add("net", split, backend="onnxruntime")


def test_a_shell_offers_backends_that_there_are() -> None:
    assert set(BACKENDS) <= set(NAMES)
    assert {"onnxruntime", "openvino"} <= set(BACKENDS)
    assert find_backend("eager").keeps_bits


def test_the_middle_of_a_chain_runs_by_its_backend_once_that_has_built_it(net: nn.Module) -> None:
    spy, wanted = Spy(), net(X)
    registry = ModelRegistry()
    with (
        serving(net, X) as last,
        ts.SplitModule(net, X, server=last.url, name="net", partition="body", backend=spy) as middle,
    ):
        registry.add("net", middle)
        with (
            Server(create_app(registry)) as between,
            ts.SplitModule(net, X, server=between.url, name="net", partition="relu", fallback="error") as split,
        ):
            assert_close(split(X), wanted)
            end_s = time.monotonic() + 60
            while not spy.runs and time.monotonic() < end_s:
                assert_close(split(X), wanted)
        ends = [(part.inputs, part.outputs) for part in spy.built]
        assert (split.graph.point("relu").tensors, split.graph.point("body").tensors) in ends
        assert spy.runs
    registry.close()


FACTORS = torch.ones(4)


class Reading(nn.Module):
    """A model that reads a parameter, a plain tensor and one that stands outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.weight, self.plain = nn.Parameter(torch.rand(4, 4)), torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.first(x) @ self.weight * self.plain * FACTORS
        return found


@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.plain.mul_(2),
        lambda model: FACTORS.mul_(2),
        lambda model: setattr(model, "weight", nn.Parameter(torch.rand(4, 4))),
        # Neither is counted by PyTorch.
        lambda model: model.first.weight.data.mul_(2),
        lambda model: model.plain.numpy().__imul__(2),
    ],
    ids=["a plain tensor", "a tensor outside", "another parameter", "through data", "through NumPy"],
)
def test_a_device_alone_notices_every_write_to_what_its_part_holds(write: Callable[[Any], Any]) -> None:
    model, x, ran = Reading().eval(), torch.rand(2, 4), []
    with ts.SplitModule(model, x, partition="device", backend="onnxruntime") as split:
        for _ in range(2):
            split(x)
            write(model)
            for _ in range(2):
                assert deviation(split(x), model(x)) < 1e-4
                assert split.last is not None
                ran.append(split.last.backend)
    assert ran == ["eager", "onnxruntime"] * 2


def test_a_device_alone_builds_its_part_anew_after_its_weights_have_changed(net: nn.Module) -> None:
    spy, ran = Spy(), []
    with ts.SplitModule(net, X, partition="device", backend=spy) as split, torch.no_grad():
        for _ in range(2):
            net.get_submodule("stem").weight.mul_(2)
            for _ in range(3):
                assert_close(split(X), net(X))
                assert split.last is not None
                ran.append(split.last.backend)
    assert ran == ["spy", "spy", "spy", "eager", "spy", "spy"]
    assert len(spy.built) == 2
