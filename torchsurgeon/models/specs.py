"""Model SPECs: a line of text that names the same model on a device and on its server.

=======================  =====================================================================================
``torchvision:NAME``     a model of torchvision, with seeded random weights unless weights are given
``package.module:NAME``  a function that returns a Module or ``(module, example)``; it may lie in the working directory
``path/to/model.pt2``    an exported program
=======================  =====================================================================================

Nothing is unpickled: weights are safetensors, or files that PyTorch loads with ``weights_only``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon.errors import SpecError, short
from torchsurgeon.models.exported import load_exported
from torchsurgeon.tracing.call import call_of

_INPUT = re.compile(r"\s*(?:(?P<name>\w+)\s*:\s*)?(?P<dtype>[a-z]\w*)\s*\[(?P<shape>[\d\s,]*)\]\s*(?:[,;]|$)")
_MAX_EXAMPLE_ELEMENTS = 1 << 30
_MAX_EXAMPLE_DIMS = 64
_WEIGHT_FILES = (".pt", ".pth", ".safetensors")
_environment_lock = threading.Lock()


@dataclass(frozen=True)
class Model:
    """A loaded model in evaluation mode, the example that it is traced with, and where it came from."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str


def load(spec: str, *, weights: str | None = None, input_spec: str | None = None, seed: int = 0) -> Model:
    """Load the model that ``spec`` names.

    Args:
        spec: the model, in one of the forms at the top of this module.
        weights: a ``.safetensors`` file, a ``.pt`` or ``.pth`` file of a ``state_dict()``, or ``"default"`` for
            torchvision's trained weights, which are downloaded where they are not cached. None for random weights.
        input_spec: replaces the example that the model comes with. It describes one tensor or several, separated by
            commas, with their names where they are keyword arguments: ``"x:float32[1,3,224,224]"``.
        seed: the same seed gives the same random weights.

    Raises:
        SpecError: there is no such model, its weights or example do not load, or it has no example.
    """
    if not isinstance(spec, str):
        raise SpecError(f'a model SPEC must be a text, such as "torchvision:alexnet"; got {short(spec)}')
    if weights not in (None, "default") and not os.path.isfile(weights):
        raise SpecError(f"the weights must be a file; there is no file {short(weights)}")
    prefix, colon, rest = spec.partition(":")
    example: tuple[tuple[Any, ...], dict[str, Any]] | None
    if prefix == "torchvision" and colon:
        model, example = _torchvision(rest, default=weights == "default", seed=seed)
        source = f"{spec} with {'its own' if weights == 'default' else 'random'} weights"
    elif spec.endswith(".pt2"):
        if not os.path.isfile(spec):
            raise SpecError(f"an exported program must be a file; there is no file {short(spec)}")
        model, args, kwargs = load_exported(Path(spec))
        example = (args, kwargs)
        source = spec
    elif colon and prefix and rest:
        model, example = _factory(prefix, rest, seed)
        source = spec
    else:
        raise SpecError(
            "a model SPEC must be torchvision:NAME, package.module:FACTORY or the path of a .pt2 file; "
            f"got {short(spec)}{_meant(spec)}"
        )
    if weights == "default":
        if prefix != "torchvision":
            raise SpecError(
                f'weights "default" exist for torchvision\'s models only; for {short(spec)} give a file of weights'
            )
    elif weights is not None:
        load_weights(model, weights)
        source = f"{spec} with weights of {weights}"
    if not spec.endswith(".pt2"):
        model.eval()
    if input_spec is not None:
        example = _named_example(model, parse_inputs(input_spec, seed=seed))
    if example is None:
        raise SpecError(
            f"{short(spec)} comes without an example input; let the factory return (module, example), or give an input "
            'such as "x:float32[1,3,224,224]"'
        )
    return Model(model, *example, source)


def short_name(spec: str) -> str:
    """Return the name under which a model is most likely served: the last part of its SPEC."""
    return Path(spec).stem if spec.endswith(".pt2") else spec.rpartition(":")[2]


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict into ``model`` from a ``.safetensors``, ``.pt`` or ``.pth`` file, without unpickling objects.

    Raises:
        SpecError: the file does not load as tensors by name, or they are not this model's.
    """
    try:
        if path.endswith(".safetensors"):
            state: Any = _safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SpecError:
        raise
    except Exception as error:
        # PyTorch's own advice here is to unpickle the file, which would run whatever code is in it.
        if type(error).__name__ == "UnpicklingError":
            what = "a whole pickled model, which is not loaded because a pickle may run code, or is damaged"
        else:
            what = f"damaged ({_first_line(error)})"
        raise SpecError(
            f"weights must be plain tensors by name, and {short(Path(path))} is {what}; where the model was made, save "
            "model.state_dict() with torch.save or safetensors"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SpecError(
            f"weights must be plain tensors by name, and {short(Path(path))} holds a {type(state).__name__}; save "
            "model.state_dict() with torch.save or safetensors"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SpecError(
            f"the weights in {short(Path(path), 100)} are not this model's: {_difference(model, state, error)}"
        ) from error


def _difference(model: nn.Module, state: Mapping[str, Tensor], error: RuntimeError) -> str:
    """Return how the names and shapes of weights differ from a model's, and what to do.

    Args:
        model: the model.
        state: the weights.
        error: what PyTorch said of them, for what is neither.
    """
    own = model.state_dict()
    if state and all(name.startswith("module.") for name in state) and not any(name in own for name in state):
        return "all their names begin with 'module.', as DataParallel names them; save model.module.state_dict()"
    found = []
    for what, names in (
        ("the file lacks", [name for name in own if name not in state]),
        ("the model lacks", [name for name in state if name not in own]),
    ):
        if names:
            found.append(f"{what} {short(', '.join(names[:2]), 100, quote=False)}{_more(names)}")
    shapes = {
        name: (list(value.shape), list(own[name].shape))
        for name, value in state.items()
        if isinstance(own.get(name), Tensor) and value.shape != own[name].shape
    }
    if shapes:
        name, (given, wanted) = next(iter(shapes.items()))
        told = short(name, 100, quote=False)
        found.append(f"{told} is {given} in the file, {wanted} in the model{_more(shapes, 1)}")
    if not found:
        return short(" ".join(line.strip() for line in str(error).splitlines()[1:]), 200, quote=False)
    return f"{'; '.join(found)}; give the file that was saved from this model"


def _more(names: Collection[str], told: int = 2) -> str:
    return f" and {len(names) - told} more" if len(names) > told else ""


def parse_inputs(text: str, *, seed: int = 0) -> list[tuple[str | None, Tensor]]:
    """Return example tensors, with their names where they have any.

    Args:
        text: what to make, such as ``"x:float32[1,3,224,224], mask:bool[1,10]"``.
        seed: of the normally distributed random numbers that floating-point tensors hold. Others hold zeros.

    Raises:
        SpecError: the text does not describe tensors, or one has more than 2³⁰ elements or 64 dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str | None, Tensor]] = []
    position = 0
    while position < len(text):
        match = _INPUT.match(text, position)
        if match is None:
            raise SpecError(f"an input must be written like x:float32[1,3,224,224]; got {short(text[position:])}")
        position = match.end()
        dtype = getattr(torch, match["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise SpecError(f"a dtype must be float32, uint8, int64, …; got {short(match['dtype'])}")
        try:
            shape = [int(dim) for dim in match["shape"].split(",") if dim.strip()]
        except ValueError:
            raise SpecError(f"a shape must be written like [1,3,224,224]; got {short(match['shape'])}") from None
        if len(shape) > _MAX_EXAMPLE_DIMS:
            raise SpecError(f"an example must have at most {_MAX_EXAMPLE_DIMS} dimensions; got {len(shape)}")
        if math.prod(shape) > _MAX_EXAMPLE_ELEMENTS:
            raise SpecError(f"an example must have at most 2³⁰ elements; got the shape {short(shape)}")
        found.append((match["name"], _example_tensor(shape, dtype, generator)))
    if not found:
        raise SpecError(f"an input must be written like x:float32[1,3,224,224]; got {short(text)}")
    return found


def _example_tensor(shape: list[int], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, dtype=drawn, generator=generator or torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def _named_example(model: nn.Module, inputs: list[tuple[str | None, Tensor]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = [tensor for name, tensor in inputs if name is None]
    kwargs = {name: tensor for name, tensor in inputs if name is not None}
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SpecError(
            f"the inputs must be those of {type(model).__name__}.forward, "
            f"{short(str(signature), 200, quote=False)}: {short(error, 100)}"
        ) from None
    return bound.args, bound.kwargs


def _torchvision(name: str, *, default: bool, seed: int) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    try:
        from torchvision import models
    except ImportError as error:
        raise SpecError(
            f"{short(f'torchvision:{name}')} needs torchvision ({error}); pip install 'torchsurgeon[vision]'"
        ) from error
    known = models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"near it: {', '.join(near)}" if near else "torchvision.models.list_models() lists them"
        raise SpecError(f"the model must be one of torchvision's; got {short(name)}; {hint}")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": "DEFAULT" if default else None}
    parameters = inspect.signature(builder).parameters
    if not default and "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if not default and name in ("googlenet", "inception_v3"):
        # Their own initialization takes seconds, and warns that it will change.
        options["init_weights"] = False
    if default:
        try:
            with _plain_tensors_only():
                model = builder(**options)
        except Exception as error:
            raise SpecError(
                f"torchvision's weights of {name} were not loaded ({type(error).__name__}: {short(error)}). They are "
                "downloaded once, which needs internet: leave weights out for random ones, or give a file"
            ) from error
    else:
        model = _seeded(lambda: builder(**options), seed)
    return model.eval(), (_torchvision_example(name, builder, model), {})


def _torchvision_example(name: str, builder: Callable[..., nn.Module], model: nn.Module) -> tuple[Any, ...]:
    from torchvision import models

    family = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    try:
        preset = next(iter(models.get_model_weights(name))).transforms()
    except (ValueError, StopIteration):
        preset = None
    # Without weights a vision transformer is built for another size than its first weights are for.
    built_for = getattr(model, "image_size", None)
    size = built_for or (getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None) or [224])[-1]
    if family == "detection":
        return ([_example_tensor([3, 320, 320], torch.float32)],)
    if family == "optical_flow":
        return (_example_tensor([1, 3, 128, 128], torch.float32), _example_tensor([1, 3, 128, 128], torch.float32))
    if family == "video":
        frames = 32 if name.startswith("swin") else 16
        return (_example_tensor([1, 3, frames, size, size], torch.float32),)
    return (_example_tensor([1, 3, size, size], torch.float32),)


def _meant(spec: str) -> str:
    """Return the end of a message that says what a text that is no SPEC most likely means; empty where nothing does."""
    if spec.endswith(_WEIGHT_FILES):
        return "; such a file holds weights: name the function that makes the model, and give the file as its weights"
    try:
        from torchvision import models
    except ImportError:
        return ""
    return f"; did you mean torchvision:{spec}?" if spec in models.list_models() else ""


def _factory(
    module_name: str, attribute: str, seed: int
) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]] | None]:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        path, is_file, _ = module_name.rpartition(".py")
        hint = f"; write {path.replace('/', '.')[:100]}:{attribute[:50]}, without .py" if is_file else ""
        raise SpecError(
            f"the module of a model SPEC must be importable, and {short(module_name, 100)} is not: "
            f"{type(error).__name__}: {short(error, 200)}{hint}"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise SpecError(
            f"a factory must be a function that returns a model; {short(module_name, 100)} has no factory "
            f"{short(attribute, 100)}{_factories_near(module, attribute)}"
        )
    try:
        made = _seeded(factory, seed)
    except Exception as error:
        raise SpecError(
            f"the factory {short(f'{module_name}:{attribute}', 100)} raised {type(error).__name__}: {short(error, 200)}"
        ) from error
    model, *example = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(example) > 1:
        raise SpecError(
            f"a factory must return a Module or (Module, example); {short(f'{module_name}:{attribute}')} returned "
            f"{type(made).__name__}"
        )
    if not example:
        return model, None
    return model, call_of(tuple(example[0]) if isinstance(example[0], list) else example[0])


def _factories_near(module: ModuleType, name: str) -> str:
    """Return the end of a message that lists the functions and classes that ``module`` defines, the nearest first."""
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
    ]
    near = difflib.get_close_matches(name, own, n=3)
    if near:
        return f"; near it: {', '.join(near)}"
    return f"; it defines {', '.join(own[:5])}{', …' if len(own) > 5 else ''}" if own else "; it defines no function"


def _first_line(error: Exception) -> str:
    return short((str(error).splitlines() or [""])[0], quote=False)


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise SpecError(
            f"{short(Path(path))} needs the package safetensors ({error}); pip install safetensors"
        ) from error
    return load_file(path)


@contextmanager
def _plain_tensors_only() -> Iterator[None]:
    """Make PyTorch load plain tensors only within the context, although torchvision asks for ``weights_only=False``."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _environment_lock:
        before = os.environ.get(variable)
        os.environ[variable] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
