"""What a SplitModule does when its model is no longer as it was traced: it answers, and splits the model again."""

from __future__ import annotations

import contextvars
import copy
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchsurgeon as ts
from torchsurgeon.runtime import changes, engine
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.transport import InProcessTransport

X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers and an attribute; ``last`` may be called otherwise."""

    def __init__(self, last: str = "last") -> None:
        super().__init__()
        self.first, self.scale, self._name = nn.Linear(4, 4), 1.0, last
        self.add_module(last, nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional.gelu(self.first(x)) * self.scale
        return self.get_submodule(self._name)(y)  # type: ignore[no-any-return]


def net(**changed: Any) -> Net:
    torch.manual_seed(0)
    made = Net(changed.pop("last", "last")).eval().requires_grad_(False)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


class Clock:
    """A clock that stands still until a test moves it."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(changes, "time", made)
    return made


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were traced anew."""
    found: list[nn.Module] = []

    def trace(model: nn.Module, *args: Any, **kwargs: Any) -> ts.LayerGraph:
        found.append(model)
        return ts.trace(model, *args, **kwargs)

    monkeypatch.setattr(engine, "trace", trace)
    return found


class Sides(SimpleNamespace):
    """A split model, and the transport to its server."""

    split: ts.SplitModule
    transport: InProcessTransport

    def answers_as_the_model(self, x: Tensor = X) -> str | None:
        """Check the answer, and return why it is degraded."""
        with torch.no_grad():
            assert torch.equal(self.split(x), self.split.model(x))  # type: ignore[operator]
        assert self.split.last is not None
        return self.split.last.degraded


@pytest.fixture
def between() -> Iterator[Callable[..., Sides]]:
    """Makes a model that is split against a server of ``served``; by default of the same."""
    closing: list[Any] = []

    def make(model: nn.Module, served: nn.Module | None = None, **options: Any) -> Sides:
        registry = ModelRegistry(profiler=None)
        registry.add("net", served or copy.deepcopy(model), X)
        transport = InProcessTransport(create_app(registry))
        options = {"partition": "first", "name": "net", **options}
        split = ts.SplitModule(model, X, server=transport, **options)
        closing.extend((split, transport, registry))
        return Sides(split=split, transport=transport)

    yield make
    for one in closing:
        one.close()


quietly = pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning", "ignore::torchsurgeon.MismatchWarning")


def test_the_model_itself_answers_and_one_warning_says_so(between: Callable[..., Sides]) -> None:
    sides = between(net())
    assert sides.answers_as_the_model() is None
    sides.split.model.scale = 2.0  # type: ignore[assignment]
    with pytest.warns(ts.ChangedModelWarning, match="'scale' of the model was 1.0"):
        assert str(sides.answers_as_the_model()).startswith("changed: attribute 'scale' of the model was 1.0")
    for _ in range(2):  # another warning would be an error
        assert sides.answers_as_the_model() is not None
    assert sides.split.last.sent_bytes == 0
    assert sides.split.stats()["degraded"] == {"changed": 3}


def test_with_fallback_error_calls_raise_until_prepare_traces_the_model_anew(between: Callable[..., Sides]) -> None:
    sides = between(net(), net(scale=2.0), fallback="error", partition="device")
    sides.split.model.scale = 2.0  # type: ignore[assignment]
    sides.split.deadline_s = 60.0
    for _ in range(2):
        with pytest.raises(ts.TraceError, match=r"'scale' .* is 2\.0 now.*call prepare\(\)"):
            sides.split(X)
    sides.split.deadline_s = None
    sides.split.prepare().partition = "first"
    assert sides.answers_as_the_model() is None
    assert sides.split.last.sent_bytes > 0


@quietly
def test_once_the_model_has_stayed_the_same_for_a_second_it_is_split_again(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module]
) -> None:
    sides = between(net(), net(scale=2.0))
    sides.split.model.scale = 2.0  # type: ignore[assignment]
    graph = sides.split.graph
    for _ in range(3):
        assert "changed" in str(sides.answers_as_the_model())
        clock.now_s += 0.3
    assert not traced
    clock.now_s += 0.2
    assert sides.answers_as_the_model() is None
    assert sides.split.last.sent_bytes > 0
    assert traced == [sides.split.model]
    assert sides.split.graph is not graph
    assert sides.split.stats()["inferences"] == 4


@quietly
def test_a_change_that_is_taken_back_needs_no_new_trace(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module]
) -> None:
    sides = between(net())
    for _ in range(3):
        sides.split.model.scale = 2.0  # type: ignore[assignment]
        assert "changed" in str(sides.answers_as_the_model())
        clock.now_s += 5.0
        sides.split.model.scale = 1.0  # type: ignore[assignment]
        assert sides.answers_as_the_model() is None
    assert not traced


@quietly
def test_a_new_hook_around_every_call_does_not_trace_for_ever(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, looked = between(net()), []
    monkeypatch.setattr(changes, "Premises", lambda model: looked.append(model) or ts.models.premises.Premises(model))
    for i in range(500):
        handle = sides.split.model.first.register_forward_hook(lambda module, args, result, i=i: result + i)
        assert "changed" in str(sides.answers_as_the_model())
        handle.remove()
        clock.now_s += 0.4
    assert not traced
    assert len(looked) < 12


@quietly
def test_a_model_that_changes_every_ten_seconds_is_traced_more_and_more_seldom(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module]
) -> None:
    sides = between(net(), partition="first")
    for i in range(300):
        if i % 20 == 0:
            sides.split.model.scale = 2.0 + i  # type: ignore[assignment]
        sides.answers_as_the_model()
        clock.now_s += 0.5
    assert 2 <= len(traced) <= 8


def double(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


@quietly
def test_the_same_hook_that_is_registered_again_is_the_same(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module]
) -> None:
    model, served = net(), net()
    served.first.register_forward_hook(double)
    sides = between(model, served)
    for i in range(6):
        with model.first.register_forward_hook(double):
            assert ("changed" in str(sides.answers_as_the_model())) == (i < 2)
        clock.now_s += 0.6
    assert len(traced) == 1
    assert sides.split.last.sent_bytes > 0


active: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("active", default=None)


def collect(module: nn.Module, args: Any, result: Tensor) -> None:
    """As transformers' hooks do: it keeps what it sees, where somebody asks for that."""
    collected = active.get()
    if collected is not None:
        collected.append(result)


@quietly
@pytest.mark.parametrize("path", ["", "first"])
def test_hooks_that_do_nothing_do_not_keep_the_server_from_being_used(
    between: Callable[..., Sides], clock: Clock, path: str
) -> None:
    sides = between(net())
    fingerprint = sides.split.graph.fingerprint
    sides.split.model.get_submodule(path).register_forward_hook(collect)
    assert "changed" in str(sides.answers_as_the_model())
    clock.now_s += 1.0
    assert sides.answers_as_the_model() is None
    assert sides.split.last.sent_bytes > 0
    assert sides.split.graph.fingerprint == fingerprint


class Keeping:
    """Hooks that keep what they see, each in another way."""

    def __init__(self) -> None:
        self.seen: Any = None
        self.all: list[Tensor] = []

    def method(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.seen = result

    def __call__(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.all.append(result)

    def closure(self) -> Callable[..., None]:
        seen = self.all

        def keep(module: nn.Module, args: Any, result: Tensor) -> None:
            seen[:] = [result]

        return keep


@quietly
@pytest.mark.parametrize("kind", ["method", "object", "closure"])
def test_hooks_that_keep_what_they_see_go_on_until_they_are_removed(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module], kind: str
) -> None:
    sides, keeping = between(net()), Keeping()
    hook = {"method": keeping.method, "object": keeping, "closure": keeping.closure()}[kind]
    handle = sides.split.model.first.register_forward_hook(hook)
    for _ in range(4):
        keeping.seen, keeping.all[:] = None, []
        sides.split(X)
        assert keeping.seen is not None or keeping.all
        clock.now_s += 2.0
    assert not traced
    assert "hooks that keep what they see (" in str(sides.split.last.degraded)
    handle.remove()
    assert sides.answers_as_the_model() is None


class Counting:
    """Counts what a hook sees, in one of the ways in which programs do."""

    def __init__(self) -> None:
        self.count, self.box = 0, [0]

    def __call__(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.count += 1

    def boxed(self) -> Callable[..., None]:
        box = self.box

        def count(module: nn.Module, args: Any, result: Tensor) -> None:
            box[0] += 1

        return count

    def nonlocal_(self) -> Callable[..., None]:
        number = 0

        def count(module: nn.Module, args: Any, result: Tensor) -> None:
            nonlocal number
            number += 1
            self.box[:] = [number]

        return count


@quietly
@pytest.mark.parametrize("kind", ["object", "list", "closure"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_that_count_go_on_counting_every_call(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module], kind: str, everywhere: bool
) -> None:
    sides, counting = between(net()), Counting()
    hook = {"object": counting, "list": counting.boxed(), "closure": counting.nonlocal_()}[kind]
    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = sides.split.model.first.register_forward_hook(hook)
    try:
        for calls in range(4):
            before = counting.count + counting.box[0]
            sides.split(X)
            assert counting.count + counting.box[0] > before, calls
            clock.now_s += 2.0
        assert not traced
    finally:
        handle.remove()
    assert sides.answers_as_the_model() is None


@quietly
def test_a_hook_that_changes_what_a_layer_gives_counts_whichever_side_has_the_layer(
    between: Callable[..., Sides], clock: Clock
) -> None:
    for layer in ("first", "last"):
        sides = between(net())
        handle = getattr(sides.split.model, layer).register_forward_hook(lambda module, args, result: result * 2)
        for _ in range(3):
            # The server's model lacks the hook, so the device answers, also once the model has been traced anew.
            assert sides.answers_as_the_model() is not None
            clock.now_s += 2.0
        handle.remove()


@quietly
def test_under_the_profiler_calls_are_split_as_ever(between: Callable[..., Sides]) -> None:
    sides = between(net())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        assert sides.answers_as_the_model() is None
    assert any(event.key.startswith("aten::") for event in profiled.key_averages())


@quietly
def test_a_model_that_cannot_be_traced_any_more_is_tried_once_and_answers(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module]
) -> None:
    sides = between(net())
    sides.split.model.train()
    for _ in range(4):
        why = sides.answers_as_the_model()
        clock.now_s += 2.0
    assert len(traced) == 1
    assert "not traced anew by itself, because that failed" in str(why)
    with pytest.raises(ts.TraceError, match="training mode"):
        sides.split.prepare()
    sides.split.model.eval()
    assert sides.answers_as_the_model() is None


@quietly
def test_calls_with_a_deadline_and_calls_in_other_threads_trace_nothing(
    between: Callable[..., Sides], clock: Clock, traced: list[nn.Module]
) -> None:
    sides = between(net(), net(scale=2.0))
    sides.answers_as_the_model()
    sides.split.model.scale = 2.0  # type: ignore[assignment]
    for _ in range(3):
        with sides.split.deadline(60.0):
            assert "changed" in str(sides.answers_as_the_model())
        assert torch.equal(sides.split.submit(X).result(), sides.split.model(X))
        clock.now_s += 2.0
    assert not traced
    assert [torch.equal(y, sides.split.model(X)) for y in sides.split.map([X, X, X])] == [True] * 3
    assert len(traced) == 1
    assert sides.split.last.degraded is None
    assert torch.equal(sides.split.submit(X).result(), sides.split.model(X))


@quietly
def test_what_is_known_of_the_server_and_the_threads_outlive_a_new_trace(
    between: Callable[..., Sides], clock: Clock
) -> None:
    sides = between(net(), partition="first")
    sides.answers_as_the_model()
    peer, threads = sides.split._engine.servers.peers[0], threading.active_count()
    answers, link = sides.split.stats()["servers"][0]["answers"], peer.state.link
    sides.split.codec = "zstd"
    for i in range(5):
        sides.split.model.first.register_forward_pre_hook(lambda module, args, i=i: None)
        sides.split.prepare()
        assert sides.answers_as_the_model() is None
    new = sides.split._engine.servers.peers[0]
    assert new is not peer
    assert new.state.link is link
    assert sides.split.stats()["servers"][0]["answers"] > answers
    assert sides.split.stats()["inferences"] == 6
    assert sides.split.codec.name == "zstd"
    assert threading.active_count() <= threads


def test_a_dropped_module_ends_the_threads_of_its_latest_trace() -> None:
    registry = ModelRegistry(profiler=None)
    registry.add("net", net(), X)
    transport = InProcessTransport(create_app(registry))
    split = ts.SplitModule(net(), X, server=transport, name="net", partition="first")
    split(X)
    split.model = net()
    split(X)
    ended = weakref.ref(split._engine)
    threads = [one for one in threading.enumerate() if one.name in ("torchsurgeon-keeper", "torchsurgeon-request")]
    assert threads
    del split
    gc.collect()
    assert ended() is None
    assert not any(one.is_alive() for one in threads)
    transport.close()
    registry.close()


def test_another_model_can_be_assigned(between: Callable[..., Sides]) -> None:
    other = net(scale=3.0)
    other.last.bias.add_(1.0)
    sides = between(net(), copy.deepcopy(other))
    with pytest.warns(ts.MismatchWarning):
        sides.answers_as_the_model()
    sides.split.model = other
    assert sides.answers_as_the_model() is None
    assert sides.split.last.sent_bytes > 0
    assert sides.split.graph.model is other
    assert sides.split.state_dict()


def test_a_model_that_cannot_be_traced_is_not_assigned(between: Callable[..., Sides]) -> None:
    sides = between(net())
    before = sides.split.model
    for wrong, words in (
        (net().train(), "training mode"),
        (None, "split.model must be an nn.Module"),
        (torch.ones(1), "split.model must be an nn.Module"),
        (nn.Linear(7, 7).eval(), "failed on the example"),
    ):
        with pytest.raises(ts.TraceError, match=words):
            sides.split.model = wrong  # type: ignore[assignment]
    with pytest.raises(ts.TorchSurgeonError, match="cannot be without a model"):
        del sides.split.model
    assert sides.split.model is before
    assert sides.answers_as_the_model() is None


def test_a_fixed_cut_is_found_again_by_its_name(between: Callable[..., Sides]) -> None:
    sides = between(net(), partition=1)
    name = sides.split.partition.name
    sides.split.model = nn.Sequential(nn.Identity(), net()).eval()
    assert "no partition point 'first' any more" in str(sides.answers_as_the_model())
    with sides.split.deadline(60.0):
        assert "no partition point 'first' any more" in str(sides.answers_as_the_model())
    sides.split.model = net()
    assert sides.split.partition.name == name
    assert sides.answers_as_the_model() is None
    sides.split.model = net(last="end")
    sides.split.partition = "end"
    assert "changed" not in str(sides.split(X) is not None and sides.split.last.degraded)


def test_without_fallback_a_model_without_the_cut_is_not_taken(between: Callable[..., Sides]) -> None:
    sides = between(net(), fallback="error", partition="first")
    before = sides.split.model
    with pytest.raises(ts.PartitionError, match="no partition point 'first' any more"):
        sides.split.model = nn.Sequential(net()).eval()
    assert sides.split.model is before
    assert sides.answers_as_the_model() is None


class Remembering(Net):
    """Keeps a tensor from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.ones: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ones is None or self.ones.shape != x.shape:
            self.ones = torch.ones_like(x)
        return super().forward(x * self.ones)


@quietly
def test_a_call_in_another_thread_waits_while_the_model_is_traced(
    between: Callable[..., Sides], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Remembering().eval().requires_grad_(False)
    sides = between(model)
    model.scale = 2.0
    assert "changed" in str(sides.answers_as_the_model())
    clock.now_s += 2.0
    answers: list[Tensor] = []
    other = threading.Thread(target=lambda: answers.append(sides.split(X)))
    waited = []

    def trace(*args: Any, **kwargs: Any) -> ts.LayerGraph:
        other.start()
        other.join(0.2)
        waited.append(not answers)
        return ts.trace(*args, **kwargs)

    monkeypatch.setattr(engine, "trace", trace)
    expected = model(X)
    assert torch.equal(sides.split(X), expected)
    other.join(30)
    assert waited == [True]
    assert torch.equal(answers[0], expected)
    assert model.ones is not None
    assert model.ones.device.type == "cpu"


@quietly
@pytest.mark.parametrize("where", [functional, torch, Tensor], ids=["functional", "torch", "tensor"])
def test_a_replaced_function_of_pytorch_is_a_change(
    between: Callable[..., Sides], clock: Clock, monkeypatch: pytest.MonkeyPatch, where: Any
) -> None:
    class Last(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Last(4, 2)).eval()
    sides = between(model, partition=1)
    assert sides.answers_as_the_model() is None
    own = where.relu
    monkeypatch.setattr(where, "relu", lambda x, *_, **__: own(x) + 1)
    for _ in range(4):
        assert sides.answers_as_the_model() is not None
        clock.now_s += 1.0
    monkeypatch.undo()
    assert torch.equal(sides.split(X), model(X))


@quietly
def test_a_tensor_that_decides_the_path_is_a_change_too(between: Callable[..., Sides], clock: Clock) -> None:
    class Deciding(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("doubles", torch.tensor(False))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 if self.doubles else super().forward(x)

    torch.manual_seed(0)
    sides = between(Deciding().eval())
    assert sides.answers_as_the_model() is None
    sides.split.model.doubles.fill_(True)
    for _ in range(6):
        assert sides.answers_as_the_model() is not None
        clock.now_s += 1.0
    assert sides.split.graph.fingerprint != ts.trace(Deciding().eval(), X).fingerprint
    sides.split.model.doubles.fill_(False)
    sides.answers_as_the_model()
    sides.answers_as_the_model()
    clock.now_s += 5.0
    assert sides.answers_as_the_model() is None


def replaced(module: nn.Module) -> None:
    """As accelerate's add_hook_to_module and remove_hook_from_module do, one after the other."""
    before = module.forward
    module.forward = lambda *args: before(*args)  # type: ignore[method-assign, misc]
    module.forward = before  # type: ignore[method-assign]


@quietly
@pytest.mark.parametrize("path", ["", "first"])
def test_a_module_whose_own_forward_is_put_back_is_as_it_was(between: Callable[..., Sides], path: str) -> None:
    sides = between(net())
    fingerprint = sides.split.graph.fingerprint
    assert sides.answers_as_the_model() is None
    replaced(sides.split.model.get_submodule(path))
    assert sides.answers_as_the_model() is None
    assert ts.trace(sides.split.model, X).fingerprint == fingerprint
    sides.split.model.first.register_forward_hook(double)
    sides.split.prepare()
    assert sides.answers_as_the_model() is not None
    before = sides.split.model.get_submodule(path).forward
    sides.split.model.get_submodule(path).forward = lambda x: before(x) * 3  # type: ignore[method-assign]
    assert "forward" in str(sides.answers_as_the_model())
    del sides.split.model.get_submodule(path).forward
    assert "changed" not in str(sides.answers_as_the_model())


@quietly
def test_code_that_is_exchanged_inside_of_a_function_is_a_change(
    between: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = between(net())
    assert sides.answers_as_the_model() is None
    monkeypatch.setattr(Net.forward, "__code__", (lambda self, x: self.last(self.first(x)) * 2).__code__)
    assert "the code of function 'Net.forward' has been replaced" in str(sides.answers_as_the_model())
    monkeypatch.undo()
    assert sides.answers_as_the_model() is None


@quietly
def test_a_method_that_a_class_gains_is_a_change(
    between: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = between(net())
    assert sides.answers_as_the_model() is None
    monkeypatch.setattr(Net, "__call__", lambda self, x: nn.Module.__call__(self, x) * 2, raising=False)
    assert "__call__ of class" in str(sides.answers_as_the_model())
    monkeypatch.undo()
    assert sides.answers_as_the_model() is None


@quietly
def test_a_first_module_in_a_list_is_a_change(between: Callable[..., Sides]) -> None:
    class Listing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList()

        def forward(self, x: Tensor) -> Tensor:
            for one in self.more:
                x = one(x)
            return super().forward(x)

    torch.manual_seed(0)
    sides = between(Listing().eval())
    assert sides.answers_as_the_model() is None
    sides.split.model.more.append(nn.Linear(4, 4).eval())
    assert "submodule 'more.0' of the model has been added" in str(sides.answers_as_the_model())


def test_a_served_split_module_that_has_another_model_now_says_so(between: Callable[..., Sides]) -> None:
    middle = between(net()).split
    registry = ModelRegistry(profiler=None)
    registry.add("net", middle)
    with (
        InProcessTransport(create_app(registry)) as transport,
        ts.SplitModule(net(), X, server=transport, name="net", partition="server") as split,
    ):
        assert torch.equal(split(X), split.model(X))
        middle.model = net(scale=2.0)
        assert torch.equal(split(X), split.model(X))
        assert "add it to a new ModelRegistry" in str(split.last.degraded)
    registry.close()


@quietly
def test_after_attentions_were_asked_for_a_transformer_is_split_again(
    between: Callable[..., Sides], clock: Clock
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, attn_implementation="eager")
    model, x = transformers.ViTModel(config).eval(), torch.rand(1, 3, 16, 16)
    registry = ModelRegistry(profiler=None)
    registry.add("net", copy.deepcopy(model), {"pixel_values": x})
    with (
        torch.no_grad(),
        InProcessTransport(create_app(registry)) as transport,
        ts.SplitModule(model, {"pixel_values": x}, server=transport, name="net", partition=3) as split,
    ):
        for options in ({}, {"output_hidden_states": True}, {"output_attentions": True}, {"output_attentions": True}):
            answer, expected = split(pixel_values=x, **options), model(pixel_values=x, **options)
            assert torch.equal(answer[0], expected[0])
            assert answer.keys() == expected.keys()
        clock.now_s += 2.0
        split(pixel_values=x)
        assert split.last.degraded is None
        assert split.last.sent_bytes > 0
        split(pixel_values=x, output_attentions=True)
        assert "unlike" in str(split.last.degraded)
    registry.close()


def test_a_model_without_a_server_is_prepared_and_traced_anew_like_any_other() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    with ts.SplitModule(model, torch.rand(1, 3), partition="device") as split:
        split.prepare()
        model.append(nn.Linear(3, 2).eval())
        split.prepare()
        x = torch.rand(1, 3)
        assert torch.equal(split(x), model(x))
        assert split.last is not None
        assert split.last.degraded is None


# --- parameters and buffers that come and go ---


class Scaled(nn.Module):
    """Two layers, and between them a tensor that may not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.first(x), getattr(self, "scale", None)
        return self.last(y if scale is None else y * scale)  # type: ignore[no-any-return]


class ScaledBeside(Scaled):
    """The same, with a parameter of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.own)


def put(model: nn.Module, kind: str, state: str) -> nn.Module:
    if hasattr(model, "scale") and (state == "absent" or "scale" not in {**model._parameters, **model._buffers}):
        del model.scale
    if state != "absent" and hasattr(model, "scale"):
        there = torch.full((4,), 3.0)
        model.scale = None if state == "None" else nn.Parameter(there) if kind == "parameter" else there
    elif state != "absent":
        register = model.register_parameter if kind == "parameter" else model.register_buffer
        there = torch.full((4,), 3.0)
        register("scale", None if state == "None" else nn.Parameter(there) if kind == "parameter" else there)  # type: ignore[arg-type]
    return model.requires_grad_(False)


@quietly
@pytest.mark.parametrize("fallback", ["local", "error"])
@pytest.mark.parametrize("too", [False, True])
@pytest.mark.parametrize("made", [Scaled, ScaledBeside])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
@pytest.mark.parametrize(
    ("was", "now"), [("absent", "there"), ("None", "there"), ("there", "None"), ("there", "absent")]
)
def test_a_tensor_that_the_code_asks_for_comes_or_goes(
    between: Callable[..., Sides], clock: Clock, made: Any, kind: str, was: str, now: str, too: bool, fallback: str
) -> None:
    """Whether it does so on the server, too, or not; the model is not traced anew, since the clock stands still."""
    torch.manual_seed(0)
    model = put(made().eval(), kind, was)
    served = copy.deepcopy(model)
    sides = between(model, served, fallback=fallback)
    assert sides.answers_as_the_model() is None
    for one in (model, served)[: 1 + too]:
        put(one, kind, now)
    for _ in range(2):
        if fallback == "error":
            with pytest.raises((ts.TraceError, ts.ModelMismatchError)):
                sides.answers_as_the_model()
        else:
            assert sides.answers_as_the_model() is not None
    put(model, kind, was)
    put(served, kind, was)
    if (was, fallback) != ("there", "error"):
        # Another tensor of the same values is the same weight.
        end = [sides.answers_as_the_model() for _ in range(3)]
        assert end[-1] is None or "changed" in end[-1] or "weights" in end[-1]
    sides.split.prepare()
    assert sides.answers_as_the_model() is None


def test_a_tensor_that_no_code_asks_for_may_come(between: Callable[..., Sides]) -> None:
    sides = between(net())
    assert sides.answers_as_the_model() is None
    sides.split.model.register_buffer("unused", None)
    sides.split.model.get_submodule("first").register_buffer("unused", None)
    for _ in range(2):
        assert sides.answers_as_the_model() is None


# --- what the code reads elsewhere ---

FROM_ELSEWHERE = {
    "import": "import settings_of_a_test; return self.first(x) * settings_of_a_test.SCALE",
    "from": "from settings_of_a_test import SCALE; return self.first(x) * SCALE",
    "globals": "return self.first(x) * globals()['SCALE']",
    "weak reference": "return self.first(x) * self.settings().SCALE",
}


@quietly
@pytest.mark.parametrize("body", FROM_ELSEWHERE.values(), ids=FROM_ELSEWHERE)
def test_a_setting_outside_of_the_model_is_noticed(
    between: Callable[..., Sides], body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = types.ModuleType("settings_of_a_test")
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    space: dict[str, Any] = vars(settings)
    exec(f"def forward(self, x): {body}", space)  # noqa: S102
    settings.SCALE = 1.0  # type: ignore[attr-defined]
    kind = type("Scaling", (Net,), {"forward": space["forward"], "settings": weakref.ref(settings)})
    sides = between(kind().eval(), partition="server")
    assert sides.answers_as_the_model() is None
    settings.SCALE = 2.0  # type: ignore[attr-defined]
    assert "'SCALE'" in str(sides.answers_as_the_model())
    settings.SCALE = 1.0  # type: ignore[attr-defined]
    assert sides.answers_as_the_model() is None


# --- names that are assigned to something else ---


class Noting(nn.Module):
    """Keeps a result in an attribute of the same name as another's setting."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.box = nn.Linear(4, 4), SimpleNamespace(scale=0)

    def forward(self, x: Tensor) -> Tensor:
        self.scale = x.shape[-1]
        self.box.scale += 1
        for part in (self.line, self.line):
            part.scale = self.box.scale  # type: ignore[assignment]
        return self.line(x)  # type: ignore[no-any-return]


class Answer(SimpleNamespace):
    y: Tensor


class Marking(Net):
    """Assigns an attribute of its result, of the same name as its own setting."""

    def forward(self, x: Tensor) -> Tensor:
        out = Answer(y=super().forward(x), table={})
        out.scale = 2.0
        out.table["scale"] = 2.0
        return out.y


class Setting:
    """A descriptor that keeps the values itself."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def __get__(self, owner: Any, kind: Any = None) -> float:
        return self.values.get(id(owner), 1.0)

    def __set__(self, owner: Any, value: float) -> None:
        self.values[id(owner)] = value


class Described(Net):
    described = Setting()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.described


class WithSetter(Net):
    @property
    def wide(self) -> float:
        return self._wide

    @wide.setter
    def wide(self, value: float) -> None:
        self._wide = value

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.wide


UNSEEN_SOURCE = """
def forward(self, x):
    y = self.first(x)
    y[:, 0] = 0
    return y * self.table[0]
"""


def noting_before() -> nn.Module:
    return nn.Sequential(Noting(), net())


def without_source() -> nn.Module:
    space: dict[str, Any] = {}
    exec(UNSEEN_SOURCE, space)  # noqa: S102
    made = type("Unseen", (Net,), space)()
    made.table = [1.0]
    return made


def with_setter() -> nn.Module:
    made = WithSetter()
    made.wide = 1.0
    return made


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any, float], Any]]] = {
    "of another module": (noting_before, lambda model, value: setattr(model[1], "scale", value)),
    "of another object": (Marking, lambda model, value: setattr(model, "scale", value)),
    "by a descriptor": (Described, lambda model, value: setattr(model, "described", value)),
    "by a setter": (with_setter, lambda model, value: setattr(model, "wide", value)),
    "in a list, without source": (without_source, lambda model, value: model.table.__setitem__(0, value)),
}


@quietly
@pytest.mark.parametrize(("made", "put"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_whose_name_other_code_assigns_is_noticed(between: Callable[..., Sides], made: Any, put: Any) -> None:
    model = made().eval()
    put(model, 1.0)
    sides = between(model, copy.deepcopy(model), partition="server")
    for _ in range(2):
        assert sides.answers_as_the_model() is None
    put(model, 2.0)
    assert "changed" in str(sides.answers_as_the_model())
    put(model, 1.0)
    assert sides.answers_as_the_model() is None


class Accounting(Net):
    """Assigns and fills in all ways that change no answer."""

    counted: int = 0
    history: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.cache, self.box, self.parts = 0, {}, SimpleNamespace(calls=0, list=[]), [SimpleNamespace(n=0)]
        self.first.register_forward_hook(self._look)
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value

    def _look(self, module: nn.Module, args: Any, result: Tensor) -> None:
        module.seen = getattr(module, "seen", 0) + 1  # type: ignore[assignment, operator]

    def _read(self) -> int:
        held = (self.calls, self.total, self.box.calls, self.parts[0].n, self.counted, len(self.first.cache))
        return sum(held) + len(self.cache) + len(self.box.list) + len(self.history)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += 1
        self.box.calls += 1
        self.box.list.append(self.calls)
        self.parts[0].n += 1
        self.cache[self.calls] = self.calls
        self.history.append(1)
        type(self).counted += 1
        self.first.cache = {"last": x}  # type: ignore[assignment]
        first = self.last
        first.kept = self.calls  # type: ignore[assignment]
        return super().forward(x) if self._read() >= 0 else x


@pytest.mark.parametrize("warm", [False, True])
def test_what_each_call_assigns_or_fills_is_no_change(between: Callable[..., Sides], warm: bool) -> None:
    model = Accounting().eval()
    model.first.cache = {}  # type: ignore[assignment]
    if warm:
        model(X)
    sides = between(model, copy.deepcopy(model), partition="server")
    for rows in (2, 2, 3, 5, 2):
        assert sides.answers_as_the_model(torch.rand(rows, 4)) is None


# --- what is assigned on a path that the example does not take ---


def mode(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        self.mode = 2.0
    return self.line(x) * self.mode  # type: ignore[no-any-return]


def counter(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        self.mode += 1.0
    return self.line(x) * self.mode  # type: ignore[no-any-return]


def of_a_part(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        self.line.mode = 2.0
    return self.line(x) * self.line.mode  # type: ignore[no-any-return]


def that_was_not_there(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        self.late = 2.0
    return self.line(x) * getattr(self, "late", 1.0)  # type: ignore[no-any-return]


def in_a_method(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        self.switch()
    return self.line(x) * self.mode  # type: ignore[no-any-return]


class Switching(nn.Module):
    """Is in another mode once it has seen a large batch, which some other method may take back."""

    way: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls = nn.Linear(4, 4), 0
        self.reset()

    def reset(self) -> None:
        self.mode = self.line.mode = 1.0  # type: ignore[assignment]
        self.__dict__.pop("late", None)

    def switch(self) -> None:
        self.mode = 2.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return type(self).way(self, x)


@quietly
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("way", [mode, counter, of_a_part, that_was_not_there, in_a_method], ids=lambda f: f.__name__)
def test_what_a_call_of_the_model_itself_leaves_on_another_path_counts_for_the_next(
    between: Callable[..., Sides], clock: Clock, way: Any, whole: bool
) -> None:
    """Whether that call ran there because it was unlike the example, or because that was the cut."""
    model = type("Switched", (Switching,), {"way": way})().eval()
    before = copy.deepcopy(model)
    sides = between(model, copy.deepcopy(model), partition="server")
    large = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for rows in (X, large, X, X):
            sides.split.partition = "device" if whole and rows is large else "server"
            assert torch.equal(sides.split(rows), before(rows))
            assert sides.split.last is not None
        assert "changed" in str(sides.split.last.degraded)
        model.reset()
        assert torch.equal(sides.split(X), X @ model.line.weight.T + model.line.bias)
        assert sides.split.last.degraded is None
        # Once it has stayed so, it is split again as it is then.
        before.reset()
        for rows in (large, X):
            assert torch.equal(sides.split(rows), before(rows))
        clock.now_s += 3.0
        for _ in range(2):
            assert torch.equal(sides.split(X), before(X))
    assert "changed" not in str(sides.split.last.degraded)


# --- functions and modules that the model is called with ---


class Acting(nn.Module):
    """Calls what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        return self.last(act(self.first(x)))  # type: ignore[no-any-return]


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


FACTORS = {"by": 1.0}
times, prelu = Times().eval(), nn.PReLU().eval().requires_grad_(False)
PASSED: dict[str, tuple[Any, Callable[[float], Any]]] = {
    "module": (times, lambda value: setattr(times, "by", value)),
    "method": (times.forward, lambda value: setattr(times, "by", value)),
    "function": (lambda x: x * FACTORS["by"], lambda value: FACTORS.update(by=value)),
    "weight": (prelu, lambda value: prelu.weight.fill_(value)),
    "other weight": (prelu, lambda value: setattr(prelu, "weight", nn.Parameter(torch.tensor([value])))),
}


@quietly
@pytest.mark.parametrize("too", [False, True])
@pytest.mark.parametrize(("act", "put"), PASSED.values(), ids=PASSED)
def test_what_a_function_or_module_reads_that_the_model_is_called_with_is_watched(
    act: Any, put: Any, too: bool
) -> None:
    """Also where the server calls its model with the very same."""
    put(1.0)
    torch.manual_seed(0)
    model = Acting().eval().requires_grad_(False)
    registry = ModelRegistry(profiler=None)
    registry.add("net", copy.deepcopy(model), (X, act if too else copy.deepcopy(act)))
    with InProcessTransport(create_app(registry)) as transport, torch.no_grad():
        split = ts.SplitModule(model, (X, act), server=transport, name="net", partition="server")
        for value in (1.0, 2.0, 3.0):
            if value > 1:
                put(value)
            for _ in range(2):
                assert torch.equal(split(-X, act), model(-X, act))
            assert split.last is not None
            assert value > 1 or split.last.degraded is None
        assert too or split.last.degraded is not None
        split.close()
    registry.close()


def test_a_module_with_other_weights_on_the_server_is_a_mismatch() -> None:
    model, acts = Acting().eval(), [nn.PReLU(init=by).eval() for by in (0.25, 0.75)]
    registry = ModelRegistry(profiler=None)
    registry.add("net", copy.deepcopy(model), (X, acts[1]))
    with InProcessTransport(create_app(registry)) as transport:
        split = ts.SplitModule(model, (X, acts[0]), server=transport, name="net", partition="server")
        with pytest.warns(ts.MismatchWarning, match=r"argument act\.weight"):
            split(X, acts[0])
        split.close()
    registry.close()


class Shaped(nn.Module):
    """Notes the shape of each batch before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.rows, self.line.columns = x.shape  # type: ignore[assignment]
        return self.line(x).reshape(self.rows, self.line.columns)  # type: ignore[no-any-return]


class ShapedBefore(Shaped):
    """Its base's ``forward``, which assigns the attribute that this one reads, is not called."""

    rows: int

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) * self.rows  # type: ignore[no-any-return]


@quietly
def test_what_the_forward_assigns_that_another_has_taken_the_place_of_is_a_setting(
    between: Callable[..., Sides],
) -> None:
    model = ShapedBefore().eval()
    model.rows = 1
    sides = between(model, copy.deepcopy(model), partition="server")
    assert sides.answers_as_the_model() is None
    model.rows = 2
    assert "'rows'" in str(sides.answers_as_the_model())


def test_what_forward_assigns_in_each_call_may_change_where_the_model_had_run_before(
    between: Callable[..., Sides],
) -> None:
    model = Shaped().eval()
    model(X)
    sides = between(model, copy.deepcopy(model), partition="server")
    for rows in (2, 3, 5, 2):
        assert sides.answers_as_the_model(torch.rand(rows, 4)) is None


# --- a model that is moved ---


def test_a_move_that_changes_nothing_keeps_what_is_sent_to_see_whether_servers_answer(
    between: Callable[..., Sides],
) -> None:
    sides = between(net())
    assert sides.answers_as_the_model() is None
    connector = sides.split._engine._connector
    assert connector.ping_tensors
    sides.split.to("cpu")
    assert sides.answers_as_the_model() is None
    assert connector.ping_tensors


@quietly
def test_a_model_that_was_converted_by_itself_answers_after_prepare_too(between: Callable[..., Sides]) -> None:
    sides = between(net())
    assert sides.answers_as_the_model() is None
    sides.split.model.double()
    for _ in range(2):
        assert sides.answers_as_the_model(X.double()) is not None
    sides.split.prepare()
    for _ in range(2):
        assert sides.answers_as_the_model(X.double()) is not None
