"""Pairs of models that differ in one thing beside their parameters; ``KINDS[name](variant)`` makes either of a pair."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

WIDTH = 8
EXAMPLE = torch.linspace(-1, 1, 2 * 3 * WIDTH).reshape(2, 3, WIDTH)


class Whole(nn.Module):
    """Stays one layer, since a branch depends on a value; computes with what it is given."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        return self.then(y) if y.sum() > -1e9 else y

    def then(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class TensorAttribute(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)
        self.by = torch.full((WIDTH,), by)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) * self.by


class InDict(Whole):
    def then(self, y: Tensor) -> Tensor:
        return y * self.tables["scales"][0]


class Plain(Whole):
    def then(self, y: Tensor) -> Tensor:
        return y * self._by


class InArray(Whole):
    def then(self, y: Tensor) -> Tensor:
        return y * torch.from_numpy(self.array)


class Calling(Whole):
    def then(self, y: Tensor) -> Tensor:
        return self.act(y)


class Settings:
    def __init__(self, by: float) -> None:
        self.by = by
        self.offset = torch.tensor([by])

    def scaled(self, y: Tensor) -> Tensor:
        return y * self.by

    def __call__(self, y: Tensor) -> Tensor:
        return y + self.offset


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by


class WithObject(Whole):
    def then(self, y: Tensor) -> Tensor:
        return y * self.settings.by


class HiddenModules(Whole):
    def then(self, y: Tensor) -> Tensor:
        return self.hidden[0](y)


class WeightOnly(nn.Module):
    """Integers and scales in plain attributes, as wrappers for weight-only quantization have them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.integers = torch.randint(-128, 127, (WIDTH, WIDTH), dtype=torch.int8, generator=generator)
        self.scales = torch.rand(WIDTH, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.integers * self.scales)


class Times(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.by


def _in_class(variant: int) -> nn.Module:
    cls = type("InClass", (Plain,), {"_by": torch.tensor(float(variant)), "__module__": __name__})
    return cls()


def _global(variant: int) -> nn.Module:
    """A function whose global names are its own, as if its file stood in another version on the other machine."""
    space = {"__name__": "elsewhere", "FACTOR": float(variant)}
    return Calling(act=types.FunctionType(_by_factor.__code__, space))


def _by_factor(y: Tensor) -> Tensor:
    return y * FACTOR  # type: ignore[name-defined]  # noqa: F821


def _default(y: Tensor, by: float = 1.0) -> Tensor:
    return y * by


def _with_default(by: float) -> Any:
    return types.FunctionType(_default.__code__, globals(), argdefs=(by,))


def _decorated(by: float) -> Any:
    def around(function: Any) -> Any:
        @functools.wraps(function)
        def call(y: Tensor) -> Tensor:
            return by * function(y)

        return call

    @around
    def act(y: Tensor) -> Tensor:
        return y.relu()

    return act


def _in_autocast(dtype: torch.dtype) -> Any:
    @torch.autocast("cpu", dtype=dtype)
    def act(y: Tensor) -> Tensor:
        return (y @ y.mT).float()

    return act


def _lambda(variant: int) -> Any:
    return (lambda y: y.relu() * 1, lambda y: y.relu() * 2)[variant - 1]


def _hooked(variant: int, register: str, **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    hooks: dict[str, Any] = {
        "register_forward_hook": lambda module, args, result: result * variant,
        "register_forward_pre_hook": lambda module, args: (args[0] * variant,),
    }
    if options:
        hooks = {
            "register_forward_hook": lambda module, args, kwargs, result: result * variant,
            "register_forward_pre_hook": lambda module, args, kwargs: ((args[0] * variant,), kwargs),
        }
    getattr(model[0], register)(hooks[register], **options)
    return model


def _forward_replaced(variant: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    if variant == 2:
        layer = model[0]
        layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    return model


@contextlib.contextmanager
def without_warnings() -> Any:
    """PyTorch's own quantization warns that it will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dynamic(variant: int) -> nn.Module:
    torch.manual_seed(variant)
    with without_warnings():
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval(), {nn.Linear})


def _static(variant: int, *, scale: bool = False) -> nn.Module:
    from torch.ao import quantization

    torch.manual_seed(1 if scale else variant)
    stub, back = quantization.QuantStub(), quantization.DeQuantStub()
    model = nn.Sequential(stub, nn.Conv1d(3, 3, 1), nn.Linear(WIDTH, WIDTH), back).eval()
    with without_warnings():
        model.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(model)
        prepared(EXAMPLE)
        made = quantization.convert(prepared)
    if scale:
        made[2].scale *= variant
    return made


def _old_weight_norm(variant: int) -> nn.Module:
    with without_warnings():
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH), dim=variant - 1))


def _parametrized(variant: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    parametrize.register_parametrization(model[0], "weight", Times(variant))
    return model


def _spectral(variant: int) -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH), eps=1e-12 * variant))


def _encoder(variant: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, activation=lambda t: t.relu() * variant, batch_first=True)
    return nn.Sequential(layer)


_CALLS: dict[str, Callable[[int], Any]] = {
    "lambda with other code": _lambda,
    "partial": lambda variant: functools.partial(torch.mul, other=variant),
    "bound method": lambda variant: Settings(variant).scaled,
    "bound method of a tensor": lambda variant: torch.full((WIDTH,), float(variant)).mul,
    "callable object": Settings,
    "default": _with_default,
    "decorated": _decorated,
    "autocast": lambda variant: _in_autocast((torch.bfloat16, torch.float16)[variant - 1]),
    "module in a closure": lambda variant: (lambda times: lambda y: times(y))(Times(variant)),
    "cached": lambda variant: functools.lru_cache(lambda y: y * variant),
}

KINDS: dict[str, Callable[[int], nn.Module]] = {
    "dynamic int8": _dynamic,
    "static int8": _static,
    "static int8, other scale": lambda variant: _static(variant, scale=True),
    "tensor attribute": TensorAttribute,
    "tensors of a weight-only wrapper": WeightOnly,
    "tensor in a dict": lambda variant: InDict(tables={"scales": [torch.full((WIDTH,), float(variant))]}),
    "number in a private attribute": lambda variant: Plain(_by=variant),
    "tensor of a class": _in_class,
    "array": lambda variant: InArray(array=np.full(WIDTH, variant, dtype=np.float32)),
    "object": lambda variant: WithObject(settings=Settings(variant)),
    "object with slots": lambda variant: WithObject(settings=Slotted(variant)),
    "module in a list": lambda variant: HiddenModules(hidden=[Times(variant)]),
    "global name": _global,
    "activation": _encoder,
    "forward replaced": _forward_replaced,
    "forward hook": lambda variant: _hooked(variant, "register_forward_hook"),
    "forward pre-hook": lambda variant: _hooked(variant, "register_forward_pre_hook"),
    "forward hook with kwargs": lambda variant: _hooked(variant, "register_forward_hook", with_kwargs=True),
    "forward pre-hook with kwargs": lambda variant: _hooked(variant, "register_forward_pre_hook", with_kwargs=True),
    "parametrization": _parametrized,
    "spectral norm": _spectral,
    "weight norm": _old_weight_norm,
    **{f"call: {name}": lambda variant, make=make: Calling(act=make(variant)) for name, make in _CALLS.items()},
}


def made(name: str, variant: int) -> nn.Module:
    """The model of a kind, ``variant`` 1 or 2, with the same parameters for both."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), KINDS[name](variant)).eval()
