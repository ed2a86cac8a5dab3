"""Traces a random model, cuts it, and says whether its answers are the model's own.

``judge(model)`` makes the model twice with equal weights. One is traced and cut; the other gives the true answers, and
is called as often. What differs without a word is a silent difference, the one thing that must never be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_models import RandomModel, as_process, difference, reseed, surroundings
from torch import nn

import torchsurgeon
from torchsurgeon.cutting.partition import EmptyTail, Partition, cut, tail_for
from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.layout import has_gaps, restores
from torchsurgeon.tracing.tracer import trace

EQUAL, REFUSED, WARNED = "equal", "refused", "warned"
DIFFERENT, RAW_ERROR, CHANGED = "different", "raw error", "changed by tracing"
FAILURES = (DIFFERENT, RAW_ERROR, CHANGED)
_PACKAGE = str(Path(torchsurgeon.__file__).parent)


@dataclasses.dataclass
class Verdict:
    """What became of one model.

    Attributes:
        outcome: the worst that happened. ``refused`` is a refusal by name when the model is traced; ``warned`` means
            other answers after a warning of torchsurgeon's.
        detail: what differs, or the error.
        traced_by: how the model was followed; empty where it was refused.
        calls: how often a call was answered, refused by name, or answered where the model itself raises, by input.
        trace_s: seconds that tracing took.
    """

    outcome: str = EQUAL
    detail: str = ""
    traced_by: str = ""
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    trace_s: float = 0.0

    def worsen(self, outcome: str, detail: str) -> None:
        """Take over a failure, unless there was one before."""
        if self.outcome not in FAILURES:
            self.outcome, self.detail = outcome, detail


_PART = "part of a larger tensor"
_GRADIENTS, _INFERENCE = "requires gradients", "under inference mode"


def inputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The calls of a judged model: the example first, other values, other sizes, then other memory and settings."""
    more = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(11))
    return {
        "example": x,
        "other values": more[:2, :5] * 2,
        "negative": -x - 1,
        "zeros": torch.zeros_like(x),
        "large": x * 40,
        "one more sample": torch.cat([more[:1, :5], x]),
        "one sample": more[1:2, :5].clone(),
        "longer": more[1:3, :7].clone(),
        "shorter": more[:2, :4].clone(),
        "length of one": more[:2, :1].clone(),
        "four long samples": more,
        "other strides": more[:2, :5].mT.contiguous().mT,
        _PART: more[1:3, 2:7],
        "double": x.double(),
        _GRADIENTS: more[2:, 4:].clone(),
        _INFERENCE: more[2:, 4:].clone(),
        **dict.fromkeys(_SETTINGS, more[2:, 4:].clone()),
    }


_SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "recording gradients": torch.enable_grad,
    "under autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
"""What a call may stand in. It holds on the device only, since a server does not know of it, and changes the dtypes or
kernels of many models; so answers that differ under it are counted, and are no fault of one model or another."""


def judge(model: RandomModel) -> Verdict:
    """Return whether the model's answers are its own at the first, a middle and the last cut, for all ``inputs``."""
    verdict = Verdict()
    module, other = model.load(), model.load()
    with surroundings(), as_process(module), torch.no_grad():
        here, reference = module.make(), other.make()
        graph = _traced(here, module, verdict)
        if graph is None:
            return verdict
        try:
            partitions = _partitions(graph, _servers(graph, model), verdict)
        except Exception as error:
            verdict.worsen(RAW_ERROR, _described(error))
            return verdict
        for name, x in inputs(module.base()).items():
            for partition in partitions:
                _compare(graph, partition, reference, module, x, name, verdict)
    return verdict


def _traced(model: nn.Module, module: types.ModuleType, verdict: Verdict) -> LayerGraph | None:
    """Trace the model, and note in the verdict whether it was refused, warned of, or changed."""
    before, settings = _snapshot(model), _settings()
    module.traced = model
    args, kwargs = module.call(module.base())
    reseed()
    begin = time.perf_counter()
    graph = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            graph = trace(model, *args, **kwargs)
            verdict.traced_by = graph.traced_by
        except Exception as error:
            verdict.outcome, verdict.detail = (REFUSED if _is_by_name(error) else RAW_ERROR), _described(error)
    verdict.trace_s = time.perf_counter() - begin
    ours = [str(w.message) for w in caught if w.category.__module__.startswith("torchsurgeon")]
    if ours and graph is not None:
        verdict.outcome, verdict.detail = WARNED, ours[0]
    if settings != _settings():
        verdict.worsen(CHANGED, f"settings {settings} became {_settings()}")
    after = _snapshot(model)
    changes = [key for key in {**before, **after} if _other(before.get(key), after.get(key))]
    if changes:
        verdict.worsen(CHANGED, f"tracing changes {', '.join(changes[:3])}")
    if left := _left_behind(module):
        verdict.worsen(CHANGED, f"tracing leaves a tensor without values in {left}")
    return None if verdict.outcome in FAILURES else graph


def _left_behind(module: types.ModuleType) -> str:
    """Where a global, a default argument, a class or a closure holds a tensor of a trace, with which no call works."""
    waiting: list[tuple[str, Any]] = [(name, value) for name, value in vars(module).items() if name != "__builtins__"]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or path.count(".") > 5:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and (value.is_meta or type(value).__name__ == "FakeTensor"):
            return path
        parts: Any = ()
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, list | tuple):
            parts = enumerate(value)
        elif isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            parts = enumerate([*cells, *(value.__defaults__ or ())])
        elif getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__dict__"):
            parts = vars(value).items()
        waiting += [(f"{path}.{key}", part) for key, part in parts]
    return ""


def _servers(graph: LayerGraph, model: RandomModel) -> LayerGraph:
    """The graph of the server's own model, where something that is kept whole may hold state; else the same graph."""
    if not graph.opaque and not any(name.startswith("state") for name in model.uses):
        return graph
    module = model.load()
    return _traced(module.make(), module, Verdict()) or graph


def _partitions(graph: LayerGraph, there: LayerGraph, verdict: Verdict) -> list[Partition]:
    """The first, a middle and the last cut, with the device's head and the server's tail."""
    if there.fingerprint != graph.fingerprint:
        verdict.worsen(RAW_ERROR, "two equal models have different fingerprints")
        return []
    last = len(graph.points) - 1
    partitions = [cut(graph, graph.points[place]) for place in sorted({0, len(graph.points) // 2, last})]
    if there is graph:
        return partitions
    names = [[spec.name for spec in partition.point.tensors] for partition in partitions]
    return [
        partition
        if partition.point is graph.points[last]
        else dataclasses.replace(partition, tail=tail_for(there, own))
        for partition, own in zip(partitions, names, strict=True)
    ]


def _compare(
    graph: LayerGraph,
    partition: Partition,
    reference: nn.Module,
    module: types.ModuleType,
    x: torch.Tensor,
    name: str,
    verdict: Verdict,
) -> None:
    ours: Any = None
    failed: Exception | None = None
    setting = torch.inference_mode if name == _INFERENCE else _SETTINGS.get(name, contextlib.nullcontext)

    def given() -> torch.Tensor:
        return _alike(x).requires_grad_(name == _GRADIENTS)

    try:
        with setting():
            args, kwargs = module.call(given())
            reseed()
            boundary = partition.head(*args, **kwargs)
        with setting() if isinstance(partition.tail, EmptyTail) else contextlib.nullcontext():
            # Of boundary tensors with gaps that the example has not, a SplitModule says that bits are not kept.
            specs = partition.point.tensors
            layouts = (graph.layouts.get(spec.name) for spec in specs)
            if not all(restores(one, t) for one, t in zip(layouts, boundary, strict=True) if one is not None):
                verdict.calls[f"{name}: said to be the same to rounding"] += 1
                return
            told = [name == _PART or (has_gaps(t) and t.shape != s.shape) for t, s in zip(boundary, specs, strict=True)]
            ours = partition.tail(
                *(_alike(t) if gaps else _received(t) for t, gaps in zip(boundary, told, strict=True))
            )
    except Exception as error:
        if _is_by_name(error):
            verdict.calls[f"{name}: refused"] += 1
            return
        failed = error
    try:
        with setting():
            args, kwargs = module.call(given())
            reseed()
            theirs = reference(*args, **kwargs)
    except Exception:
        verdict.calls[f"{name}: {'raised by both' if failed else 'answered where the model raises'}"] += 1
        return
    what = _described(failed) if failed else difference(ours, theirs)
    if what and name in _SETTINGS:
        verdict.calls[f"{name}: another answer"] += 1
        return
    verdict.calls[f"{name}: {'raised' if failed else 'answered'}"] += 1
    if what and (failed or verdict.outcome != WARNED):
        where = f"{name}, cut {partition.point.index} ({partition.point.name}): "
        verdict.worsen(RAW_ERROR if failed else DIFFERENT, where + what)


def _alike(x: torch.Tensor) -> torch.Tensor:
    """``x`` in memory of its own, with the same gaps between its elements, for a model may overwrite its input."""
    if x.is_contiguous():
        return x.clone()
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def _received(tensor: torch.Tensor) -> torch.Tensor:
    """What arrives on the other side: the same in memory of its own."""
    return tensor.detach().clone()


def _is_by_name(error: BaseException) -> bool:
    """Whether torchsurgeon itself refuses, rather than a model or PyTorch that runs into something."""
    if isinstance(error, TorchSurgeonError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, TypeError | ValueError) and last.startswith(_PACKAGE)


def _described(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {text[:400]}"


def _settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch.get_num_threads(),
    )


@dataclasses.dataclass
class _Bits:
    tensor: torch.Tensor


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by its path, with what lists, dicts and plain objects in them hold."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(path: str, value: Any, depth: int) -> None:
        found[path] = value
        if id(value) in seen or depth > 5:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if not value.is_sparse and not value.is_quantized:
                found[f"{path} (its bits)"] = _Bits(value.detach().clone())
            return
        if isinstance(value, dict):
            parts: Any = list(value.items())
        elif isinstance(value, list | tuple) or type(value).__name__ == "deque":
            parts = list(enumerate(value))
        elif type(value).__module__ == "random_model" or isinstance(value, types.SimpleNamespace):
            parts = [] if isinstance(value, nn.Module) else list(vars(value).items())
        else:
            return
        found[f"{path} (its keys)"] = str([key for key, _ in parts])
        for key, part in parts:
            look(f"{path}.{key}", part, depth + 1)

    for path, module in model.named_modules(remove_duplicate=True):
        for key, value in vars(module).items() if not isinstance(module, torch.jit.ScriptModule) else ():
            look(f"{path or 'model'}.{key}", value, 0)
    return found


def _other(before: Any, after: Any) -> bool:
    if isinstance(before, _Bits) and isinstance(after, _Bits):
        return bool(difference(after.tensor, before.tensor))
    # What cannot change is equal or not; the parts of a tuple have entries of their own. All else is the same object.
    plain = int | float | str | torch.dtype
    if isinstance(before, plain) and isinstance(after, plain):
        return before != after
    return type(before) is not type(after) if isinstance(before, tuple) else before is not after
