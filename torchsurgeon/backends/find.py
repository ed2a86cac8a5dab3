"""Backends by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torchsurgeon.accuracy.budget import Budget
from torchsurgeon.backends.aot import Aot
from torchsurgeon.backends.backend import Backend, parse_option
from torchsurgeon.backends.eager import Eager
from torchsurgeon.backends.inductor import Inductor
from torchsurgeon.backends.judging import Sample
from torchsurgeon.backends.onnxruntime import OnnxRuntime
from torchsurgeon.backends.openvino import OpenVino
from torchsurgeon.backends.tensorrt import TensorRT
from torchsurgeon.errors import BackendError, short

_WITH_OPTION: dict[str, Callable[..., Backend]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
_PLAIN: dict[str, Callable[..., Backend]] = {"eager": Eager, "inductor": Inductor, "aot": Aot, "tensorrt": TensorRT}
NAMES = (
    *("eager", "inductor", "aot", "onnxruntime", "onnxruntime:int8", "onnxruntime:cuda", "onnxruntime:tensorrt"),
    *("openvino", "openvino:bf16", "openvino:int8", "tensorrt"),
)
"""The names by which backends are asked for."""
# TorchInductor takes tens of seconds for a part, and its packages no less, so these are taken only where asked for.
_CHOSEN_AMONG = ("onnxruntime", "onnxruntime:cuda", "onnxruntime:tensorrt", "openvino", "openvino:bf16", "tensorrt")


def find_backend(wanted: str | Backend, *, sample: Sample | None = None, budget: Budget | None = None) -> Backend:
    """Return a backend by its name, or itself.

    Args:
        wanted: the backend, or its name, such as ``"onnxruntime"`` or ``"openvino:bf16"``.
        sample: calls of your own, each like the traced example, or a folder of images. They judge what the backend
            builds. Backends in whole numbers (``"onnxruntime:int8"``, ``"openvino:int8"``) need one, since half of it
            calibrates them, and the other half judges.
        budget: how much the model's answers may change where the backend runs one of its parts. A part that changes
            them more runs in eager PyTorch. It goes with ``sample``.

    Raises:
        BackendError: there is no backend of this name, it cannot run here, or it lacks a sample or a budget.
        CodecError: the sample is no list of calls, and no folder.
    """
    if isinstance(wanted, Backend):
        if sample is not None or budget is not None:
            raise BackendError(
                f"sample= and budget= go with the name of a backend; got {wanted}; give them where you make it"
            )
        return wanted
    name, _, option = wanted.partition(":") if isinstance(wanted, str) else ("", "", "")
    if name in _WITH_OPTION:
        return _WITH_OPTION[name](option, sample=sample, budget=budget)
    if name in _PLAIN:
        parse_option(name, option, {"": None})
        return _PLAIN[name](sample=sample, budget=budget)
    raise BackendError(f"a backend is one of {', '.join(NAMES)}, or a Backend; got {short(wanted)}")


def find_backends(
    wanted: str | Backend | Sequence[str | Backend] | None,
    *,
    sample: Sample | None = None,
    budget: Budget | None = None,
) -> list[Backend]:
    """Return several backends.

    Args:
        wanted: backends or their names; a text may hold several names with commas between them; None for no backend.
        sample: as ``find_backend()`` takes it, for each of them.
        budget: as ``find_backend()`` takes it, for each of them.

    Raises:
        BackendError: there is no backend of one of the names, it cannot run here, or it lacks a sample or a budget.
        CodecError: the sample is no list of calls, and no folder.
    """
    if isinstance(wanted, str):
        wanted = [name.strip() for name in wanted.split(",")]
    found = [wanted] if isinstance(wanted, Backend) else wanted or ()
    return [find_backend(one, sample=sample, budget=budget) for one in found]


def installed_backends() -> list[Backend]:
    """Return the backends that can run here and are not eager PyTorch, one for each name that needs nothing else."""
    found = []
    for name in _CHOSEN_AMONG:
        with contextlib.suppress(BackendError):
            found.append(find_backend(name))
    return found
