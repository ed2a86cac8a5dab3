"""What a ``SplitModule`` is to the program around it: an ``nn.Module`` that looks like the model that it stands for.

It shares the tables in which the model keeps its parameters, buffers and submodules. So a program that walks through
modules, an optimizer, a checkpoint or ``to()`` finds the model's own tensors under the model's own names. The model
itself is no submodule of it, or every name would begin with ``model.``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import SplitAttributeError, TraceError, short
from torchsurgeon.tracing.admission import SPLIT_MODULE

# Where nn.Module keeps what belongs to it, and the hooks of saving and loading, which the model's own methods call.
_SHARED = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
# Methods that call the model once for each token. They would run whole on this device, and look as if they were split.
_GENERATING = ("generate", "generate_batch")
# What keys began with when the model was a submodule of the SplitModule.
_OLD = "model."
_NOT_COMPILED = f"{SPLIT_MODULE}, or leave out fullgraph=True"


def _not_compiled(function: Any) -> Any:
    """Have torch.compile call a function as it is, between two graphs.

    This sets what ``torch.compiler.disable`` sets. That would import the compiler into every program, which takes more
    than a second.
    """
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = _NOT_COMPILED
    return function


def _in_compiled_code() -> bool:
    """Return whether the calling thread runs a function that torch.compile has compiled, or is compiling."""
    if torch.compiler.is_dynamo_compiling():
        return True
    compiler = sys.modules.get("torch._C._dynamo.eval_frame")
    return compiler is not None and compiler.get_eval_frame_callback() is not None


class _Forward:
    """``module.forward`` of one module: a method as it was written, with the signature of the model's own.

    Args:
        function: the method, as torch.compile is to see it.
        written: the method as it was written.
        module: the module.
    """

    __slots__ = ("__func__", "__self__", "_written")

    def __init__(self, function: FunctionType, written: FunctionType, module: Wrapped) -> None:
        self.__func__, self.__self__, self._written = function, module, written

    @_not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What torch.compiler.disable() returns is called only where it is needed: while another thread exports a part
        # for a backend, it writes into a dict of PyTorch's that all threads share, and may raise a KeyError.
        function = self.__func__ if _in_compiled_code() else self._written
        return function(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__self__.model.forward)

    # torch.export looks for this.
    @property
    def __code__(self) -> CodeType:
        return self.__func__.__code__


class _AsModel:
    """The descriptor that ``signature_of_model()`` makes."""

    def __init__(self, function: FunctionType) -> None:
        self._written = self._called = function
        self._disabled = False

    @_not_compiled
    def __get__(self, module: Wrapped | None, owner: type | None = None) -> Any:
        if module is None:
            return self._written
        if not self._disabled and "torch._dynamo" in sys.modules:
            self._disabled, self._called = True, torch.compiler.disable(self._written, reason=_NOT_COMPILED)
        return _Forward(self._called, self._written, module)


def signature_of_model(run: Any) -> Any:
    """Make a ``forward`` whose signature is that of the model's, for programs that look up the names of arguments."""
    return _AsModel(run)


class Wrapped(nn.Module):
    """A module in the place of a model.

    Attributes that it does not have are the model's. They can be read through it, and are set on the model itself.
    """

    def _wrap(self, model: nn.Module) -> None:
        """Stand in the place of ``model`` from now on. Attributes set before this are the module's own."""
        self.__dict__.update({table: model.__dict__[table] for table in _SHARED}, _model=model)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model  # type: ignore[no-any-return]

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._set_model(model)

    @model.deleter
    def model(self) -> None:
        raise TraceError(
            "a SplitModule cannot be without a model; assign another to split.model, or close and drop the SplitModule"
        )

    def _set_model(self, model: nn.Module) -> None:
        """Do what assigning another model asks for."""
        self._wrap(model)

    # --- its attributes ---

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks every module for this.
        raise TraceError(SPLIT_MODULE)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_model")
        if model is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        try:
            value = getattr(model, name)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, and of its model: {error}",
                name=name,
                obj=self,
            ) from error
        if name in _GENERATING and callable(value):
            return functools.partial(_refuse_generating, name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if "_model" in self.__dict__ and name not in self.__dict__ and not hasattr(type(self), name):
            if self._is_of_model(name):
                raise SplitAttributeError(
                    f"{short(name, 100)} is an attribute of the model, and is set there: {_on_model(name)} = …"
                )
            if self._is_read_by_model(name):
                raise SplitAttributeError(
                    f"the model's code reads attributes called {short(name, 100)}, so it is set on the model: "
                    f"{_on_model(name)} = …"
                )
            if isinstance(value, (nn.Module, nn.Parameter)):
                self._refuse_registering(name)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name not in self.__dict__ and self._is_of_model(name):
            raise SplitAttributeError(
                f"{short(name, 100)} is an attribute of the model, and is deleted there: del {_on_model(name)}"
            )
        object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.__dict__.get("_model"))})

    def _is_of_model(self, name: str) -> bool:
        model = self._model
        tables = model.__dict__, model._parameters, model._buffers, model._modules
        return any(name in table for table in tables) or hasattr(type(model), name)

    def _is_read_by_model(self, name: str) -> bool:
        """Return whether the model's code would read an attribute of this name, which it does not have so far."""
        return False

    def _refuse_registering(self, name: str) -> None:
        raise SplitAttributeError(
            f"a SplitModule has the parameters, buffers and submodules of its model and no others; register "
            f"{short(name, 100)} on split.model, or on the module around it"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a parameter, which belongs on the model."""
        self._refuse_registering(name)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Refuse a buffer, which belongs on the model."""
        self._refuse_registering(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuse a submodule, which belongs on the model."""
        self._refuse_registering(name)

    # --- its tensors and submodules ---

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module in the model's place, and the model's submodules."""
        for path, module in self._model.named_modules(memo, prefix, remove_duplicate):
            yield path, self if module is self._model else module

    def get_submodule(self, target: str) -> nn.Module:
        """Return the model's submodule at a path; this module for the empty path."""
        return self._model.get_submodule(target) if target else self

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Call ``fn`` with the model and with each of its submodules."""
        self._model.apply(fn)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._model._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode, whatever ``mode`` says, as a frozen part of a larger module that is trained."""
        self._model.train(False)
        self.training = False
        return self

    # --- checkpoints ---

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state, with the model's own keys."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state of the model, or one that was saved when keys of a SplitModule began with ``model.``."""
        renamed = self._renamed(state_dict, "")
        if renamed:
            versions = getattr(state_dict, "_metadata", {})
            state_dict = type(state_dict)((renamed[key], value) for key, value in state_dict.items())  # type: ignore[call-arg]
            if isinstance(state_dict, dict) and versions:
                paths = {path: "" if path == "model" else path.removeprefix(_OLD) for path in versions if path}
                state_dict._metadata = type(versions)((paths[path], versions[path]) for path in paths)  # type: ignore[attr-defined]
        return self._model.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Called where the SplitModule is part of another module. This dict is only used for loading.
        for old, new in self._renamed(state_dict, prefix).items():
            state_dict[new] = state_dict.pop(old)
        self._model._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _renamed(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, str]:
        """Return the keys of a state that was saved when the model was a submodule, with what they are called now."""
        keys = [key for key in state_dict if key.startswith(prefix)]
        if not keys or not all(key.startswith(prefix + _OLD) for key in keys):
            return {}
        # A submodule of the model may be called "model", too.
        known = {prefix + key for key in self._model.state_dict(keep_vars=True)}
        renamed = {key: prefix + key.removeprefix(prefix + _OLD) for key in keys}
        return renamed if sum(new in known for new in renamed.values()) > sum(old in known for old in renamed) else {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a SplitModule holds connections, so it is neither copied nor saved; copy or save its .model, and wrap that"
        )

    def extra_repr(self) -> str:
        """Return the model's class and what it says of itself, for ``repr``."""
        own = self._model.extra_repr()
        return f"model={type(self._model).__name__}({own})" if own else f"model={type(self._model).__name__}"


def _on_model(name: str) -> str:
    """Return how an attribute of the model, or a layer of a sequence, is written in Python."""
    return f"split.model.{name[:100]}" if name.isidentifier() else f"split.model[{name[:100]}]"


def _refuse_generating(name: str, *args: Any, **kwargs: Any) -> None:
    raise SplitAttributeError(
        f"{name}() calls the model once for each token, with a cache that a split model does not take. Split a part "
        f"that runs once, as in model.encoder = SplitModule(model.encoder, …), and call model.{name}(); or call "
        f"split.model.{name}() to run all of it here"
    )
