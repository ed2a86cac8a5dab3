"""What the last bits of a model's answer rest on besides the model and its inputs, and how two machines compare it.

Kernels add numbers up in an order that depends on the processor, the number of threads, the library's version and some
settings. Sums of floating-point numbers depend on that order. So two machines give the same bits for certain only where
all of this is the same on both. Where it differs, their answers are the same to rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import opt_einsum

from torchsurgeon.errors import short
from torchsurgeon.models.threads import ThreadSettings, flushes_denormal

# Fields of /proc/cpuinfo that tell one kind of core from another: the first four on x86, the others on ARM.
_CORE = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
)
# Environment variables by which the libraries below PyTorch choose other kernels.
_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "KMP_DETERMINISTIC_REDUCTION",
    "MKL_CBWR", "MKL_DOMAIN_NUM_THREADS", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUDNN_V8_API_DISABLED",
)  # fmt: skip
# What a server may tell at most; it says less than a tenth of it.
_MOST_FACTS, _MOST_CHARACTERS = 128, 8192
_MOST_KEPT = 64
_LISTED = 5


class Difference(NamedTuple):
    """A fact that is not the same on both sides.

    Attributes:
        fact: its name in ``Arithmetic.facts``.
        here: what it is on this side; None where it is not known.
        there: what it is on the other side; None where that does not tell.
    """

    fact: str
    here: str | None
    there: str | None

    def __str__(self) -> str:
        here, there = self.here, self.there
        if self.fact == "backend":
            return f"the server runs the model by {_said(there)}"
        if self.fact == "batching" and there is not None:
            return f"the server may run requests together ({_said(there)}) unless started with --exact or --no-batching"
        if self.fact == "cpu_features" and here is not None and there is not None:
            ours, theirs = set(here.split()), set(there.split())
            here, there = _listed(ours - theirs), _listed(theirs - ours)
        return f"{_NAMES.get(self.fact, self.fact)} ({_said(here)} here, {_said(there)} on the server)"

    @property
    def remedy(self) -> str | None:
        """What makes it the same on both sides, in words; None where that takes another machine."""
        if self.fact == "threads" and self.here is not None and self.there is not None:
            return (
                f"start the server with --threads {short(self.here, 20, quote=False)}, or call torch.set_num_threads("
                f"{short(self.there, 20, quote=False)}) here"
            )
        if self.fact in ("torch", "build"):
            return "install the same PyTorch on both sides"
        if self.fact == "batching":
            return "start the server with --exact or --no-batching"
        if self.fact == "backend":
            return 'give server_backend="eager"'
        if self.fact in _STATIC:
            return None
        return f"set {_NAMES.get(self.fact, self.fact)} to the same on both sides"


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """What one side computes with.

    Attributes:
        facts: each fact as text, by its name; ``docs/runtime.md`` lists them.
        digest: a short digest of the facts. A server puts it into its answers.
    """

    facts: Mapping[str, str]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(dict(self.facts), sort_keys=True)
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest()[:16])

    def compare(self, there: Arithmetic | None) -> tuple[Difference, ...]:
        """Return what differs on the other side; nothing where both give the same bits.

        Args:
            there: what the other side computes with; None where it does not tell, which is a difference, too.
        """
        if there is None:
            return (Difference("arithmetic", "told", None),)
        names = dict.fromkeys([*self.facts, *sorted(there.facts)])
        pairs = ((name, self.facts.get(name), there.facts.get(name)) for name in names)
        return tuple(Difference(*pair) for pair in pairs if pair[1] != pair[2])

    def in_eager(self) -> Arithmetic:
        """Return what this is where eager PyTorch runs the model, and no backend."""
        return Arithmetic({name: fact for name, fact in self.facts.items() if name != "backend"})

    @staticmethod
    def from_json(told: Any) -> Arithmetic | None:
        """Return what a server has told of ``facts``; None where it has told nothing, or nothing that makes sense."""
        if not isinstance(told, dict) or not 0 < len(told) <= _MOST_FACTS:
            return None
        if not all(isinstance(text, str) and len(text) <= _MOST_CHARACTERS for text in (*told, *told.values())):
            return None
        return Arithmetic(told)


class ArithmeticReader:
    """Reads what the calling thread computes one model with. Thread-safe.

    Args:
        model: the model.
        also: further facts, by name.

    Attributes:
        last: what ``now()`` returned last, in any thread; None before that.
    """

    def __init__(self, model: nn.Module, also: Mapping[str, str] = MappingProxyType({})) -> None:
        self._model, self._also = model, also
        self.last: Arithmetic | None = None
        self.forget()

    def forget(self) -> None:
        """Look at the model's devices again: its tensors have been replaced."""
        # The newest first, with what the getters returned. Comparing these takes less than hashing them.
        self._known: tuple[tuple[list[Any], Arithmetic], ...] = ()
        self._getters: tuple[Callable[[], Any], ...] = ()

    def now(self) -> Arithmetic:
        """Return what the calling thread computes with now; the same object where nothing has changed.

        It is called at every inference, so it reads only what a program can change.
        """
        getters = self._getters
        if getters:
            values = [torch.get_num_threads(), flushes_denormal(), *[read() for read in getters]]
            for known, found in self._known:
                if known == values:
                    self.last = found
                    return found
        self.last = found = self._read_all()
        return found

    def _read_all(self) -> Arithmetic:
        named = dict((*self._model.named_parameters(), *self._model.named_buffers()))
        tensors, layout = named.values(), _layout(named)
        places = {tensor.device for tensor in tensors} or {torch.device("cpu")}
        settings = (*_SETTINGS, *_einsum(), *(_CUDA_SETTINGS if any(place.type == "cuda" for place in places) else ()))
        here = ThreadSettings.here()
        values = [read() for _, read in settings]
        found = Arithmetic(
            {
                **_machine(),
                "devices": ", ".join(sorted({_device(place) for place in places})),
                "threads": str(here.threads),
                "flush_denormal": str(here.flush_denormal),
                **({"layout": layout} if layout else {}),
                **{name: str(value) for (name, _), value in zip(settings, values, strict=True)},
                **self._also,
            }
        )
        self._getters = tuple(read for _, read in settings)
        self._known = (([*here, *values], found), *self._known[: _MOST_KEPT - 1])
        return found


_NAMES = {
    "arithmetic": "what the server computes with",
    "torch": "PyTorch's version",
    "build": "PyTorch's build",
    "processor": "the processor",
    "cpu_capability": "the CPU kernels",
    "cpu_features": "the CPU's features",
    "environment": "environment variables",
    "devices": "the model's device",
    "threads": "CPU threads",
    "flush_denormal": "torch.set_flush_denormal",
    "layout": "the weights' layout in memory",
    "deterministic_algorithms": "torch.use_deterministic_algorithms",
    "default_dtype": "torch.set_default_dtype",
    "batching": "running requests together in batches",
}
_STATIC = ("arithmetic", "processor", "cpu_capability", "cpu_features", "devices")


def _layout(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of how weights lie in memory, by which kernels are chosen; empty where all are contiguous."""
    strides = [
        f"{name} {tensor.stride()}"
        for name, tensor in tensors.items()
        if tensor.layout is torch.strided and not tensor.is_contiguous()
    ]
    return hashlib.sha256("\n".join(strides).encode()).hexdigest()[:16] if strides else ""


def _said(text: str | None) -> str:
    return "not told" if text is None else short(text, 100, quote=False) or "none"


def _listed(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else "")


# --- the facts that stay while the process runs ---


@cache
def _machine() -> Mapping[str, str]:
    core, flags = _core()
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    # The sizes of caches are among them, by which libraries cut matrices into blocks.
    features = {name if value is True else f"{name}={value}" for name, value in found.items() if _counts(name, value)}
    return {
        "torch": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "processor": core,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": " ".join(sorted(features or flags)),
        "environment": ", ".join(f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ),
    }


def _counts(name: str, value: object) -> bool:
    return value is True or name.endswith("_cache_size")


def _core() -> tuple[str, list[str]]:
    """Return what the first core is, in words, and its flags."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine(), []
    rows = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    core = ", ".join(f"{name} {rows[name]}" for name in _CORE if name in rows)
    return core or platform.machine(), (rows.get("flags") or rows.get("Features") or "").split()


def _device(place: torch.device) -> str:
    if place.type != "cuda":
        return place.type
    properties = torch.cuda.get_device_properties(place)
    cudnn = torch.backends.cudnn.version()
    return f"{properties.name} with {properties.multi_processor_count} multiprocessors and cuDNN {cudnn}"


# --- the settings that a program can change ---


def _c(name: str, *args: Any) -> Callable[[], Any]:
    """Return the getter of a setting: PyTorch's own, since its properties take ten times as long.

    A version of PyTorch without it does not have the setting.
    """
    getter = getattr(torch._C, name, None)
    return _absent if getter is None else partial(getter, *args) if args else getter


def _absent() -> None:
    return None


_SETTINGS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("deterministic_algorithms", _c("_get_deterministic_algorithms")),
    ("default_dtype", torch.get_default_dtype),
    ("mkldnn.enabled", _c("_get_mkldnn_enabled")),
    ("mkldnn.deterministic", _c("_get_mkldnn_deterministic")),
    ("mkldnn.matmul.fp32_precision", _c("_get_fp32_precision_getter", "mkldnn", "matmul")),
    ("mkldnn.conv.fp32_precision", _c("_get_fp32_precision_getter", "mkldnn", "conv")),
    ("mkldnn.rnn.fp32_precision", _c("_get_fp32_precision_getter", "mkldnn", "rnn")),
    ("nnpack", _c("_get_nnpack_enabled")),
    ("quantized.engine", _c("_get_qengine")),
    ("cpu.allow_fp16_reduced_precision_reduction", _c("_get_cpu_allow_fp16_reduced_precision_reduction")),
    ("sdp.flash", _c("_get_flash_sdp_enabled")),
    ("sdp.mem_efficient", _c("_get_mem_efficient_sdp_enabled")),
    ("sdp.math", _c("_get_math_sdp_enabled")),
    ("sdp.math_reduction", _c("_get_math_sdp_allow_fp16_bf16_reduction")),
    ("sdp.priority", _c("_get_sdp_priority_order")),
    ("mha.fastpath", torch.backends.mha.get_fastpath_enabled),
)
_CUDA_SETTINGS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("cuda.matmul.fp32_precision", _c("_get_fp32_precision_getter", "cuda", "matmul")),
    ("cudnn.conv.fp32_precision", _c("_get_fp32_precision_getter", "cuda", "conv")),
    ("cudnn.rnn.fp32_precision", _c("_get_fp32_precision_getter", "cuda", "rnn")),
    ("cuda.matmul.fp16_reduction", _c("_get_cublas_allow_fp16_reduced_precision_reduction")),
    ("cuda.matmul.bf16_reduction", _c("_get_cublas_allow_bf16_reduced_precision_reduction")),
    ("cuda.matmul.fp16_accumulation", _c("_get_cublas_allow_fp16_accumulation")),
    ("cuda.blas", _c("_get_blas_preferred_backend")),
    ("cuda.linalg", _c("_get_linalg_preferred_backend")),
    ("cudnn.enabled", _c("_get_cudnn_enabled")),
    ("cudnn.benchmark", _c("_get_cudnn_benchmark")),
    ("cudnn.deterministic", _c("_get_cudnn_deterministic")),
    ("sdp.cudnn", _c("_get_cudnn_sdp_enabled")),
)


@cache
def _einsum() -> tuple[tuple[str, Callable[[], Any]], ...]:
    """Return the settings of opt_einsum, which orders the products of an einsum; none where it is not installed."""
    if not opt_einsum.is_available():
        return ()
    chosen = torch.backends.opt_einsum
    return (("einsum", lambda: (chosen.enabled, chosen.strategy)),)
