"""No answer is used that was computed with other weights or other code than the device's, on either side, however they
were changed; and a server that holds the device's weights again is used again."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from classifier import PATIENCE_S, degraded, remote, until
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import InProcessTransport, Transport

pytestmark = [pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning"), pytest.mark.usefixtures("patient")]

X = torch.linspace(-1, 1, 8).reshape(1, 8)
LARGE = 256
STARTED, GO = threading.Event(), threading.Event()


class Net(nn.Module):
    """A parameter of its own besides layers, since a tail holds that itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).relu()) * self.scale
        return y


class Gate(nn.Module):
    """Waits in the middle of a negative input, and so stays one layer."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.min()) < 0:
            STARTED.set()
            GO.wait(PATIENCE_S)
        return x * 1


def net(width: int = 8, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(width).eval().requires_grad_(False)


@contextmanager
def served(model: nn.Module, example: Tensor = X, *, over_http: bool = True) -> Iterator[str | Transport]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", model, example)
    app = create_app(registry)
    try:
        if over_http:
            with Server(app) as server:
                yield server.url
        else:
            with InProcessTransport(app) as transport:
                yield transport
    finally:
        registry.close()


def split_of(model: nn.Module, where: str | Transport, **options: Any) -> ts.SplitModule:
    return ts.SplitModule(model, X, server=where, name="net", partition=1, **options)


def right(split: ts.SplitModule) -> bool:
    return torch.equal(split(X), split.model(X))


def load(model: Any) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def replace(model: Any) -> None:
    model.scale = nn.Parameter(model.scale * 2, False)


def replace_memory(model: Any) -> None:
    model.last.weight.data = model.last.weight.data * 2


def write_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(2)


def write_one_element(model: Any) -> None:
    model.last.weight.numpy()[-1, -1] += 1


CHANGES: dict[str, Callable[[Any], None]] = {
    "load_state_dict": load,
    "a parameter is replaced": replace,
    "a parameter's memory is replaced": replace_memory,
    ".data is written to": write_data,
    "one element is written through numpy": write_one_element,
}


def restored(model: Any, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("over_http", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_on_the_server_are_never_used_and_its_old_ones_are_again(name: str, over_http: bool) -> None:
    model, other = net(), net()
    before = state_of(other)
    with served(other, over_http=over_http) as where, split_of(model, where) as split:
        until(lambda: remote(split), split, right)
        for _ in range(2):
            CHANGES[name](other)
            for _ in range(3):
                assert right(split)
                assert not remote(split)
            assert "other weights on the server" in degraded(split)
            restored(other, before)
            until(lambda: remote(split), split, right)


@pytest.mark.parametrize("name", CHANGES)
def test_a_new_handshake_fails_on_other_weights_in_the_servers_process(name: str) -> None:
    other = net(LARGE)
    with served(other) as where:
        with split_of(net(LARGE), where, fallback="error") as split:
            assert right(split)
        CHANGES[name](other)
        with (
            split_of(net(LARGE), where, fallback="error") as split,
            pytest.raises(ts.ModelMismatchError, match=r"other weights on the server: (scale|last|first)"),
        ):
            split(X)


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_both_sides_change_alike_are_used(name: str) -> None:
    model, other = net(), net()
    with served(other) as where, split_of(model, where) as split:
        until(lambda: remote(split), split, right)
        CHANGES[name](model)
        CHANGES[name](other)
        assert right(split)
        until(lambda: remote(split), split, right)


@pytest.mark.parametrize("fallback", ["local", "error"])
@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_on_the_device_are_noticed_at_the_next_call_of_a_small_model(name: str, fallback: Any) -> None:
    model, other = net(), net()
    with served(other) as where, split_of(model, where, fallback=fallback) as split:
        assert right(split)
        CHANGES[name](model)
        if fallback == "error":
            with pytest.raises(ts.ModelMismatchError, match="other weights"):
                split(X)
        else:
            assert right(split)
            assert not remote(split)
        CHANGES[name](other)
        until(lambda: remote(split), split, right)


@pytest.mark.parametrize("side", ["device", "server"])
def test_one_element_of_a_large_model_is_noticed_in_the_background(side: str) -> None:
    model, other = net(100 * LARGE), net(100 * LARGE)
    with served(other) as where, split_of(model, where) as split:
        split.prepare()
        until(lambda: remote(split), split, lambda split: split(X) is not None)
        write_one_element(model if side == "device" else other)
        until(lambda: not remote(split), split, lambda split: split(X) is not None)
        assert right(split)


@pytest.mark.parametrize("side", ["device", "server"])
@pytest.mark.parametrize("fallback", ["local", "error"])
def test_prepare_reads_all_weights_on_both_sides(side: str, fallback: Any) -> None:
    model, other = net(100 * LARGE), net(100 * LARGE)
    with served(other) as where, split_of(model, where, fallback=fallback) as split:
        split.prepare()
        write_one_element(model if side == "device" else other)
        if fallback == "error":
            with pytest.raises(ts.ModelMismatchError, match=r"last\.weight"):
                split.prepare()
        else:
            split.prepare()
            assert right(split)
            assert not remote(split)


def test_prepare_asks_a_server_again_that_held_other_weights() -> None:
    mine, theirs = net(LARGE), net(LARGE)
    with served(theirs) as server, ts.SplitModule(mine, X, server=server, name="net", partition=1) as split:
        split(X)
        for changed, used in ((mine, False), (theirs, True)):
            changed.last.weight.data.mul_(2)
            split.prepare()
            assert torch.equal(split(X), mine(X))
            assert (not degraded(split)) is used


def test_running_the_whole_model_makes_no_new_epochs() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval().requires_grad_(False)
    with served(model) as where, split_of(model, where) as split:
        assert right(split)
        epoch = split._engine.local.epoch
        for _ in range(5):
            model[1].num_batches_tracked.data += 1
            assert right(split.prepare())
        assert split._engine.local.epoch == epoch


# --- in the middle of a computation ---


@contextmanager
def halted(other: Any) -> Iterator[tuple[ts.SplitModule, Transport, threading.Thread, list[Any]]]:
    """A call whose tail has begun on the server and waits there; what it returns or raises goes to the list."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), Gate(), nn.Linear(8, 4)).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    example = torch.ones(1, 8)
    STARTED.clear()
    GO.set()
    with (
        served(other, example, over_http=False) as where,
        ts.SplitModule(model, example, server=where, name="net", partition=1, fallback="error") as split,
    ):
        split(X)
        STARTED.clear()
        GO.clear()
        outcome: list[Any] = []

        def call() -> None:
            try:
                outcome.append(split(X))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert STARTED.wait(PATIENCE_S)
        try:
            assert isinstance(where, Transport)
            yield split, where, thread, outcome
        finally:
            GO.set()
            thread.join()


def tell(transport: Transport) -> None:
    """Have the server tell the digests of its present weights, as a device does that shakes hands now."""
    assert transport.get_json("/v2/models/net/fingerprint")["weights"]


def gated() -> Any:
    return nn.Sequential(nn.Linear(8, 8), Gate(), nn.Linear(8, 4)).eval().requires_grad_(False)


def test_an_answer_during_which_the_weights_changed_is_refused() -> None:
    other = gated()
    with halted(other) as (_, _, thread, outcome):
        load(other)
        GO.set()
        thread.join()
        assert isinstance(outcome[0], ts.ModelMismatchError)


def test_an_answer_during_which_the_weights_changed_twice_is_asked_for_again() -> None:
    other = gated()
    with halted(other) as (split, transport, thread, outcome):
        before = state_of(other)
        load(other)
        tell(transport)
        restored(other, before)
        GO.set()
        thread.join()
        assert torch.equal(outcome[0], split.model(X))


def test_an_answer_that_began_with_other_weights_is_not_vouched_for_by_a_later_handshake() -> None:
    other = gated()
    with halted(other) as (split, transport, thread, outcome):
        before = state_of(other)
        GO.set()
        thread.join()
        load(other)
        STARTED.clear()
        GO.clear()
        thread = threading.Thread(target=lambda: outcome.append(split(X)))
        thread.start()
        assert STARTED.wait(PATIENCE_S)
        restored(other, before)
        tell(transport)  # the same digests that this device knows
        GO.set()
        thread.join()
        assert torch.equal(outcome[-1], split.model(X))


# --- code ---


def hook(model: Any) -> Callable[[], None]:
    handle = model.last.register_forward_hook(lambda module, args, result: result * 2)
    return lambda: handle.remove()


def forward(model: Any) -> Callable[[], None]:
    model.last.forward = lambda x: x[:, :4]
    return lambda: delattr(model.last, "forward")


def mode(model: Any) -> Callable[[], None]:
    model.train()
    return lambda: model.eval()


CODE: dict[str, tuple[Callable[[Any], Callable[[], None]], str]] = {
    "hook": (hook, "forward hooks of module 'last'"),
    "forward": (forward, "forward of module 'last' has been replaced"),
    "mode": (mode, "training mode"),
}


@pytest.mark.parametrize("over_http", [True, False])
@pytest.mark.parametrize("name", CODE)
def test_code_that_changes_on_the_server_is_not_used_and_named_until_it_is_taken_back(
    name: str, over_http: bool
) -> None:
    change, words = CODE[name]
    other = net()
    with served(other, over_http=over_http) as where, split_of(net(), where) as split:
        assert right(split)
        assert remote(split)
        take_back = change(other)
        assert right(split)
        assert words in degraded(split)
        if over_http:  # a module closes a transport that it was given
            with split_of(net(), where, fallback="error") as fresh, pytest.raises(ts.ModelMismatchError, match=words):
                fresh(X)
        take_back()
        until(lambda: remote(split), split, right)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)
        self.sign: Tensor
        self.register_buffer("sign", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x)
        return y.relu() if self.sign > 0 else -y


@pytest.mark.parametrize("uncounted", [False, True])
def test_a_tensor_on_the_server_that_decides_the_path_is_not_used_while_it_is_another(uncounted: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branch().eval().requires_grad_(False)
    other: Any = Branch().eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    with served(other) as where, split_of(model, where) as split:
        assert split.graph.decided_by
        assert right(split)
        assert remote(split)
        (other.sign.data if uncounted else other.sign).neg_()
        assert right(split)
        assert "sign" in degraded(split)
        with split_of(model, where, fallback="error") as fresh, pytest.raises(ts.ModelMismatchError, match="sign"):
            fresh(X)
        (other.sign.data if uncounted else other.sign).neg_()
        until(lambda: remote(split), split, right)


PROGRAM = """
import atexit, threading
def left():
    print([one.name for one in threading.enumerate() if one.name == "torchsurgeon-weights"])
atexit.register(left)  # runs after what is registered later
import torch, torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.transport import InProcessTransport
model, registry, x = torch.nn.Linear(2000, 2000).eval(), ModelRegistry(profiler=None), torch.rand(1, 2000)
registry.add("m", model, x)
split = ts.SplitModule(model, x, server=InProcessTransport(create_app(registry)), name="m", partition="server")
split(x)
left()
"""


def test_a_program_that_closes_nothing_ends_without_a_thread_in_the_middle_of_an_operator() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.splitlines() == ["['torchsurgeon-weights', 'torchsurgeon-weights']", "[]"], ended.stderr
