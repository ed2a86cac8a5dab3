"""The handshake sees everything that computes, names what differs, and sees no difference where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kin import EXAMPLE, KINDS, WIDTH, InDict, Plain, Settings, TensorAttribute, WithObject, made
from paths import SUPPORT, environment
from serving import serving
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.transport import InProcessTransport

# Words of the refusal, for kinds whose weights do not differ.
NAMED = {
    "activation": "'1.0' (TransformerEncoderLayer), in: 'value of activation closure variant'",
    "forward hook": "'1.0.mul' (mul), in: 'arguments'",
    "forward replaced": "'1.0' (Linear), which the server's model does not have",
    "global name": "'1' (Calling), in: 'value of FACTOR'",
    "call: lambda with other code": "'1' (Calling), in: 'function act'",
    "call: callable object": "1.act.offset",
    "tensor in a dict": "1.tables['scales'][0] (float32[8]",
    "dynamic int8": "1.0._packed_params._packed_params.0 (qint8[8×8]",
    "static int8, other scale": "1.2.scale (float",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_computes_something_else_is_refused(name: str) -> None:
    model = made(name, 1)
    with (
        serving(made(name, 2), (EXAMPLE,), profiler=None) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0, fallback="error") as module,
        pytest.raises(ts.ModelMismatchError, match=re.escape(NAMED.get(name, "model 'net'"))),
    ):
        module(EXAMPLE)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_model_is_accepted_also_after_it_has_run(name: str) -> None:
    model, other = made(name, 1), made(name, 1)
    with torch.no_grad():
        expected = model(EXAMPLE)
    with (
        serving(other, (EXAMPLE,), profiler=None) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0, fallback="error") as module,
        torch.no_grad(),
    ):
        for point in module.graph.points:
            module.partition = point.index
            # The server's thread may use more threads than this one, and then differs in the last bits.
            torch.testing.assert_close(module(EXAMPLE), expected)
            model(EXAMPLE)


def digests(python: str | Path, **variables: str) -> list[str]:
    """What kin_digests.py prints under an interpreter."""
    command = [str(python), "-W", "ignore", str(SUPPORT / "kin_digests.py")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(**variables)).stdout
    assert told.count("\n") == len(KINDS)
    return told.splitlines()


def test_digests_are_the_same_in_every_process() -> None:
    assert digests(sys.executable, PYTHONHASHSEED="1") == digests(sys.executable, PYTHONHASHSEED="2")


@pytest.mark.interop
def test_digests_are_the_same_under_another_pytorch(interop_python: Path) -> None:
    assert digests(interop_python) == digests(sys.executable)


# --- an older torchsurgeon on the other side ---


class Older(InProcessTransport):
    """Tells fingerprints as servers did that knew no layers."""

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        told = super().get_json(path, timeout_s=timeout_s)
        return {key: value for key, value in told.items() if key not in ("layers", "python")}


@pytest.mark.parametrize(("variant", "words"), [(1, "older.*same torchsurgeon"), (2, "another graph.*older")])
def test_a_server_that_tells_no_layers_is_refused_in_plain_words(variant: int, words: str) -> None:
    registry = ModelRegistry(profiler=None)
    registry.add("net", made("forward hook", variant), EXAMPLE)
    with (
        Older(create_app(registry)) as transport,
        ts.SplitModule(made("forward hook", 1), EXAMPLE, server=transport, name="net", partition=0) as module,
        pytest.warns(ts.MismatchWarning, match=words),
    ):
        assert torch.equal(module(EXAMPLE), module.model(EXAMPLE))
    registry.close()


def test_the_fingerprint_tells_layers_in_few_bytes() -> None:
    registry = ModelRegistry(profiler=None)
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))).eval()
    registry.add("net", deep, torch.zeros(1, 2))
    with InProcessTransport(create_app(registry)) as transport:
        told = transport.get_json("/v2/models/net/fingerprint")
    registry.close()
    assert told["layers"]["7"]["type"] == "Linear"
    assert set(told["layers"]["7"]["aspects"]) == {"shapes", "arguments", "settings"}
    assert len(str(told["layers"])) < 300 * 200


# --- changes on the device, after tracing ---


class Model(nn.Module):
    """Reads each kind of thing that is no parameter."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.by = TensorAttribute(1.0)
        self.whole = InDict(tables={"scales": [torch.ones(WIDTH)]})
        self.object = WithObject(settings=Settings(1.0))
        self.private = Plain(_by=1.0)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, activation=lambda t: t.relu(), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.private(self.object(self.whole(self.by(self.first(x))))))
        return y * self.factor


def _forward(model: Any) -> Any:
    model.first.forward = lambda x: 2 * x
    return lambda: model.first.__dict__.pop("forward")


def _class(model: Any) -> Any:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.first.__class__ = Doubling
    return lambda: setattr(model.first, "__class__", nn.Linear)


def _method(model: Any) -> Any:
    then = InDict.then
    InDict.then = lambda self, y: then(self, y) + 1  # type: ignore[method-assign]
    return lambda: setattr(InDict, "then", then)


def _linear(model: Any) -> Any:
    forward = nn.Linear.forward
    nn.Linear.forward = lambda self, x: forward(self, x)  # type: ignore[method-assign]
    return lambda: setattr(nn.Linear, "forward", forward)


def _set(path: str, name: str, value: Any) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        owner: Any = model
        for part in path.split(".") if path else ():
            owner = getattr(owner, part)
        was = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, was)

    return change


def _element(model: Any) -> Any:
    was = model.whole.tables["scales"][0]
    model.whole.tables["scales"][0] = torch.zeros(WIDTH)
    return lambda: model.whole.tables["scales"].__setitem__(0, was)


def _key(model: Any) -> Any:
    model.whole.tables["more"] = torch.zeros(WIDTH)
    return lambda: model.whole.tables.pop("more")


def _hook(register: Callable[..., Any], *arguments: Any) -> Any:
    return register(lambda *_: None, *arguments).remove


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor": (_set("by", "by", torch.zeros(WIDTH)), r"attribute 'by' of module 'by' was a tensor \[8\]"),
    "equal tensor": (_set("by", "by", torch.ones(WIDTH)), "is another tensor"),
    "tensor in a list in a dict": (_element, r"what .whole\.tables.* of the model holds"),
    "key of a dict": (_key, "what 'whole.tables' of the model holds"),
    "dict": (_set("whole", "tables", {"scales": [torch.ones(WIDTH)]}), "attribute 'tables' of module 'whole'"),
    "object": (_set("object", "settings", Settings(1.0)), "attribute 'settings' of module 'object'"),
    "attribute of an object": (_set("object.settings", "by", 2.0), "attribute 'by' of 'object.settings' was 1.0"),
    "private attribute": (_set("private", "_by", 2.0), "attribute '_by' of module 'private' was 1.0"),
    "activation": (_set("encoder", "activation", lambda t: t), "attribute 'activation' of module 'encoder'"),
    "shadowed attribute of the class": (_set("", "factor", 3.0), "attribute 'factor' of the model was 1.0"),
    "forward": (_forward, "forward of module 'first' has been replaced"),
    "forward of PyTorch's class": (_linear, "forward of module '.*' has been replaced"),
    "method of a class": (_method, "attribute 'then' of module 'whole'"),
    "class": (_class, "module 'first' was of class 'Linear' .* is of class 'Doubling' now"),
    "global hook": (
        lambda _: _hook(nn.modules.module.register_module_forward_hook),
        r"hooks of all modules \(global hooks\)",
    ),
    "global pre-hook": (
        lambda _: _hook(nn.modules.module.register_module_forward_pre_hook),
        r"hooks of all modules \(global hooks\)",
    ),
    "hook": (lambda model: _hook(model.first.register_forward_hook), "hooks of module 'first'"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_after_a_change_the_model_itself_answers_until_it_is_taken_back(name: str) -> None:
    change, words = CHANGES[name]
    torch.manual_seed(0)
    model = Model().eval()
    with (
        serving(Model().eval(), (EXAMPLE,), profiler=None) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0, deadline_s=60) as module,
        torch.no_grad(),
    ):
        module.partition = "device"
        expected = module(EXAMPLE)
        take_back = change(model)
        try:
            assert torch.equal(module(EXAMPLE), model(EXAMPLE))
            assert re.search(f"changed: .*{words}", str(module.last.degraded))
        finally:
            take_back()
        assert torch.equal(module(EXAMPLE), expected)
        assert module.last.degraded is None


def test_a_plain_tensor_written_in_place_counts_as_a_changed_weight() -> None:
    model, other = made("tensor in a dict", 1), made("tensor in a dict", 1)
    with (
        serving(other, (EXAMPLE,), profiler=None) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0) as module,
        torch.no_grad(),
    ):
        module(EXAMPLE)
        assert module.last.degraded is None
        model[1].tables["scales"][0].mul_(3)
        assert torch.equal(module(EXAMPLE), model(EXAMPLE))
        with pytest.warns(ts.MismatchWarning, match=r"1\.tables\['scales'\]\[0\]"):
            assert torch.equal(module(EXAMPLE), model(EXAMPLE))
        assert module.last.degraded


def test_new_packed_weights_count_as_changed_weights() -> None:
    model, other = made("dynamic int8", 1), made("dynamic int8", 2)
    with (
        serving(made("dynamic int8", 1), (EXAMPLE,), profiler=None) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0) as module,
        torch.no_grad(),
    ):
        module(EXAMPLE)
        assert module.last.degraded is None
        model.load_state_dict(other.state_dict())
        assert torch.equal(module(EXAMPLE), other(EXAMPLE))
        with pytest.warns(ts.MismatchWarning, match="_packed_params"):
            assert torch.equal(module(EXAMPLE), other(EXAMPLE))


def test_a_global_hook_counts_in_the_fingerprint() -> None:
    model = made("forward hook", 1)
    before = ts.trace(model, EXAMPLE).fingerprint
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: result * 1)
    try:
        graph = ts.trace(model, EXAMPLE)
        assert graph.fingerprint != before
    finally:
        handle.remove()
    assert ts.trace(model, EXAMPLE).fingerprint == before
