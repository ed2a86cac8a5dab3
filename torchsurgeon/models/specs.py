"""Model SPECs: one line of text that names a model, the same on a device and on its server.

=======================  =====================================================================================
``torchvision:NAME``     a model of torchvision's, with seeded random weights unless weights are given
``package.module:NAME``  a factory of a Module or ``(module, example)``; the working directory is importable
``path/to/model.pt2``    an exported program
=======================  =====================================================================================

Nothing is unpickled: weights are safetensors, or files that load with ``weights_only``.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon.errors import SpecError
from torchsurgeon.models.exported import load_exported

_INPUT = re.compile(r"\s*(?:(?P<name>\w+)\s*:\s*)?(?P<dtype>[a-z]\w*)\s*\[(?P<shape>[\d\s,]*)\]\s*(?:[,;]|$)")
_MAX_EXAMPLE_ELEMENTS = 1 << 30
_environment_lock = threading.Lock()


@dataclass(frozen=True)
class Model:
    """A loaded model in eval mode, the example it is traced with, and where it came from."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str


def load(spec: str, *, weights: str | None = None, input_spec: str | None = None, seed: int = 0) -> Model:
    """Load the model that ``spec`` names.

    ``weights`` is a ``.safetensors`` file, a ``.pt``/``.pth`` file that loads with ``weights_only``, or ``"default"``
    for torchvision's own (downloaded when not cached). Without it weights are random, the same for the same ``seed``.
    ``input_spec`` replaces the example: ``"x:float32[1,3,224,224]"``, several separated by commas, names optional.
    Raises SpecError.
    """
    prefix, colon, rest = spec.partition(":")
    example: tuple[tuple[Any, ...], dict[str, Any]] | None
    if prefix == "torchvision" and colon:
        model, example = _torchvision(rest, default=weights == "default", seed=seed)
        source = f"{spec} with {'its own' if weights == 'default' else 'random'} weights"
    elif spec.endswith(".pt2"):
        if not Path(spec).is_file():
            raise SpecError(f"there is no file {spec!r}")
        model, args, kwargs = load_exported(Path(spec))
        example = (args, kwargs)
        source = spec
    elif colon and prefix and rest:
        model, example = _factory(prefix, rest, seed)
        source = spec
    else:
        raise SpecError(
            f"{spec!r} is no model SPEC; write torchvision:NAME, package.module:factory or a path to a .pt2 file"
        )
    if weights == "default":
        if prefix != "torchvision":
            raise SpecError(f'weights "default" are torchvision\'s own; {spec!r} has none, name a file')
    elif weights is not None:
        load_weights(model, weights)
        source = f"{spec} with weights of {weights}"
    if not spec.endswith(".pt2"):
        model.eval()
    if input_spec is not None:
        example = _named_example(model, parse_inputs(input_spec, seed=seed))
    if example is None:
        raise SpecError(
            f"{spec!r} comes without an example input; let the factory return (module, example), or give an input spec "
            'like "x:float32[1,3,224,224]"'
        )
    return Model(model, *example, source)


def short_name(spec: str) -> str:
    """Return the name that a model is most likely served under: the last part of its SPEC."""
    return Path(spec).stem if spec.endswith(".pt2") else spec.rpartition(":")[2]


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict from a ``.safetensors`` file, or from a ``.pt``/``.pth`` file without unpickling objects."""
    if not Path(path).is_file():
        raise SpecError(f"there is no weights file {path!r}")
    try:
        if path.endswith(".safetensors"):
            state: Any = _safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SpecError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise SpecError(
            f"{path} cannot be loaded as plain tensors ({type(error).__name__}: {reason}); save the model's "
            "state_dict() with safetensors or torch.save"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SpecError(f"{path} does not hold a state dict (tensors by name)")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[:4]]
        raise SpecError(f"the weights in {path} are not this model's: {' '.join(lines)[:500]}") from error


def parse_inputs(text: str, *, seed: int = 0) -> list[tuple[str | None, Tensor]]:
    """Example tensors from ``"x:float32[1,3,224,224], mask:bool[1,10]"``: seeded normal numbers, zeros for integers."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str | None, Tensor]] = []
    position = 0
    while position < len(text):
        match = _INPUT.match(text, position)
        if match is None:
            raise SpecError(f"{text[position:]!r} is no input spec; write it like x:float32[1,3,224,224]")
        position = match.end()
        dtype = getattr(torch, match["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise SpecError(f"{match['dtype']!r} is no dtype; use float32, uint8, int64, …")
        try:
            shape = [int(dim) for dim in match["shape"].split(",") if dim.strip()]
        except ValueError:
            raise SpecError(f"[{match['shape']}] is no shape; write it like [1,3,224,224]") from None
        if math.prod(shape) > _MAX_EXAMPLE_ELEMENTS:
            raise SpecError(f"an example of shape {shape} is too large")
        found.append((match["name"], _example_tensor(shape, dtype, generator)))
    if not found:
        raise SpecError("the input spec is empty; write it like x:float32[1,3,224,224]")
    return found


def _example_tensor(shape: list[int], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator or torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def _named_example(model: nn.Module, inputs: list[tuple[str | None, Tensor]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = [tensor for name, tensor in inputs if name is None]
    kwargs = {name: tensor for name, tensor in inputs if name is not None}
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SpecError(f"{type(model).__name__}.forward{signature} does not take these inputs: {error}") from None
    return bound.args, bound.kwargs


def _torchvision(name: str, *, default: bool, seed: int) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    try:
        from torchvision import models
    except ImportError as error:
        raise SpecError(f"torchvision:{name} needs torchvision ({error}); pip install torchsurgeon[vision]") from error
    known = models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise SpecError(f"torchvision has no model {name!r}; near it: {', '.join(near) or ', '.join(known[:5])}")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": "DEFAULT" if default else None}
    parameters = inspect.signature(builder).parameters
    if not default and "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if not default and name in ("googlenet", "inception_v3"):
        # Their own initialisation takes seconds and warns that it will change.
        options["init_weights"] = False
    if default:
        try:
            with _plain_tensors_only():
                model = builder(**options)
        except Exception as error:
            raise SpecError(
                f"torchvision's weights of {name} cannot be had ({type(error).__name__}: {error}); they are downloaded "
                "once and need internet: leave weights out for random ones, or give a file"
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
    # Without weights a vision transformer is built for another size than the weights listed first.
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


def _factory(
    module_name: str, attribute: str, seed: int
) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]] | None]:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise SpecError(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, [name for name in dir(module) if not name.startswith("_")], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise SpecError(f"module {module_name!r} has no factory {attribute!r}{hint}")
    try:
        made = _seeded(factory, seed)
    except Exception as error:
        raise SpecError(f"{module_name}:{attribute} failed: {type(error).__name__}: {error}") from error
    model, *example = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(example) > 1:
        raise SpecError(f"{module_name}:{attribute} returned {type(made).__name__}; return Module or (Module, example)")
    if not example:
        return model, None
    if isinstance(example[0], dict):
        return model, ((), dict(example[0]))
    return model, (tuple(example[0]) if isinstance(example[0], list | tuple) else (example[0],), {})


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise SpecError(f"{path} needs the safetensors package ({error}); pip install safetensors") from error
    return load_file(path)


@contextmanager
def _plain_tensors_only() -> Iterator[None]:
    """torchvision reads its downloads with ``weights_only=False``; this makes torch read plain tensors all the same."""
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
