"""ONNX Runtime, on the CPU, and on a GPU where its package brings the provider."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.accuracy.budget import Budget
from torchsurgeon.backends.arrays import as_array, as_tensors
from torchsurgeon.backends.backend import Backend, Run, parse_option
from torchsurgeon.backends.judging import Sample
from torchsurgeon.backends.onnx import OPSET, write_onnx
from torchsurgeon.backends.part import Part
from torchsurgeon.backends.quantizing import quantized
from torchsurgeon.errors import BackendError, short

# The first release that reads what torch.onnx writes: IR version 10, and with it every opset up to 21.
_OLDEST = (1, 18)
_PROVIDERS = {
    "": "CPUExecutionProvider",
    "int8": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# What a GPU cannot run goes to the next provider.
_NEXT = {"cuda": ("cuda", ""), "tensorrt": ("tensorrt", "cuda", "")}


class OnnxRuntime(Backend):
    """ONNX Runtime. A part is exported by ``torch.onnx`` with its named boundary tensors.

    It uses as many threads as PyTorch has when a part is built. With a provider for GPUs, tensors are handed over
    through the main memory.

    Args:
        option: ``""`` for the CPU, ``"int8"`` to compute in whole numbers of 8 bits there, ``"cuda"`` or
            ``"tensorrt"`` for that provider.
        sample: as in ``Backend``.
        budget: as in ``Backend``.

    Raises:
        BackendError: a package is missing, ONNX Runtime is older than the opset, or has no such provider here; or a
            sample or budget is missing.
        CodecError: the sample is no list of calls, and no folder.
    """

    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnxruntime"

    def __init__(self, option: str = "", *, sample: Sample | None = None, budget: Budget | None = None) -> None:
        wanted = parse_option("onnxruntime", option, _PROVIDERS)
        self.name = f"onnxruntime:{option}" if option else "onnxruntime"
        self.calibrates = option == "int8"
        super().__init__(sample=sample, budget=budget)
        import onnxruntime

        check_version(onnxruntime.__version__)
        known = onnxruntime.get_available_providers()
        if wanted not in known:
            raise BackendError(
                f"backend {self.name!r} needs ONNX Runtime's {wanted}, and the installed ONNX Runtime has only "
                f"{', '.join(known)}; install onnxruntime-gpu in place of onnxruntime, or choose another backend"
            )
        on_gpu = option in _NEXT
        self._providers = [_PROVIDERS[one] for one in _NEXT.get(option, ("",)) if _PROVIDERS[one] in known]
        self.device = "cuda" if on_gpu else "cpu"
        # GPUs multiply in TF32, with 10 bits of mantissa. In whole numbers, only the budget decides.
        self.tolerance = 1e-2 if on_gpu else 1.0 if self.calibrates else 1e-4

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Export the part to ONNX, and load it into a session."""
        with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as folder:
            path = Path(folder) / "part.onnx"
            self.write(part, example, path, free_batch=free_batch)
            session = open_session(path, self._providers)
        return _runs(session, part)

    def write(self, part: Part, example: Sequence[Tensor], path: Path, *, free_batch: bool) -> None:
        """Write the part as the ONNX model that a session of this backend runs.

        Args:
            part: the part.
            example: its tensors, numbers included.
            path: the file; weights in floats stand in another beside it.
            free_batch: whether the model takes any batch size.

        Raises:
            BackendError: a layer cannot be exported, which the message names, or the part cannot be quantized.
        """
        if not self.calibrates:
            write_onnx(part, example, path, free_batch=free_batch)
            return
        assert self.judge is not None
        with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as folder:
            floats = Path(folder) / "part.onnx"
            write_onnx(part, example, floats, free_batch=free_batch, one_file=True)
            shutil.move(quantized(floats, part, example, self.judge.calibrating(part)), path)

    def load_onnx(self, model: bytes, part: Part) -> Run | None:
        """Load a part into a session; None for whole numbers, for which ``build()`` calibrates each part."""
        return None if self.calibrates else _runs(open_session(model, self._providers), part)


def _runs(session: Any, part: Part) -> Run:
    """Return what runs a part in a session of it."""
    # The exporter drops inputs that nothing reads, if any.
    places = {spec.name: i for i, spec in enumerate(part.computed_inputs)}
    given = [(one.name, places[one.name]) for one in session.get_inputs()]
    names = list(part.output_names)

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        found = session.run(names, {name: as_array(tensors[i]) for name, i in given})
        return as_tensors(found, tensors)

    return run


def check_version(version: str) -> None:
    """Raise where a version of ONNX Runtime is too old for what is exported.

    Raises:
        BackendError: it is.
    """
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise BackendError(
            f"onnxruntime {version} is older than the format of exported parts (opset {OPSET}, IR version 10), which "
            f"needs {oldest}; pip install 'onnxruntime>={oldest}'"
        )


def open_session(model: Path | bytes, providers: Sequence[str]) -> Any:
    """Return ONNX Runtime's session of a model.

    Args:
        model: the model's file, or its bytes.
        providers: what runs it, the preferred one first.

    Raises:
        BackendError: ONNX Runtime does not take the model; the message says so where its opset is too new.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings are of nodes that it leaves on the CPU
    try:
        given = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(given, options, providers=list(providers))
    except Exception as error:
        if by_signal_handler(error):
            raise
        old = re.search(r"opset|IR version", str(error))
        remedy = f"; onnxruntime {onnxruntime.__version__} is older than the model: install a newer one" if old else ""
        raise BackendError(f"ONNX Runtime does not take it: {short(error, quote=False)}{remedy}") from error
