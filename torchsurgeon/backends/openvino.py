"""OpenVINO on the CPU, in float32, in bfloat16, or in whole numbers of 8 bits."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.accuracy.budget import Budget
from torchsurgeon.backends.arrays import as_array, as_tensors
from torchsurgeon.backends.backend import Backend, Run, parse_option
from torchsurgeon.backends.exporting import export, layer_of
from torchsurgeon.backends.judging import Sample
from torchsurgeon.backends.onnx import write_onnx
from torchsurgeon.backends.onnxruntime import OnnxRuntime
from torchsurgeon.backends.part import Part
from torchsurgeon.backends.quantizing import quantized
from torchsurgeon.errors import BackendError

_logger = logging.getLogger(__name__)

# In whole numbers, only the budget decides.
_TOLERANCES = {"": 1e-4, "f32": 1e-4, "bf16": 0.1, "int8": 1.0}


@functools.cache
def core() -> Any:
    """Return OpenVINO itself, one for the whole process, kept for the rest of its life.

    Each gives the thread another stack for signal handlers, and at its end frees it and puts back the one before. Where
    two live at once and the first ends first, the one put back is free already, and the next signal, such as that of
    Ctrl-C, ends the process with a segmentation fault.
    """
    import openvino

    return openvino.Core()


@functools.cache
def computes_bfloat16() -> bool:
    """Return whether the processor computes in bfloat16; elsewhere OpenVINO computes in float32 in its place."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def _say_without_bfloat16() -> None:
    _logger.warning(
        "this processor does not compute in bfloat16, so OpenVINO computes in float32 for the backend openvino:bf16: "
        "name the backend openvino, which takes as long and promises more exact answers"
    )


class OpenVino(Backend):
    """OpenVINO. It takes parts as PyTorch exports them, and uses as many threads as PyTorch has when one is built.

    Args:
        option: ``"bf16"`` to compute in bfloat16, which has 8 bits of mantissa; ``"int8"`` to compute in whole numbers
            of 8 bits, which ONNX Runtime calibrates; ``"f32"`` or ``""`` for float32.
        sample: as in ``Backend``.
        budget: as in ``Backend``.

    Raises:
        BackendError: a package is missing, or a sample or budget is.
        CodecError: the sample is no list of calls, and no folder.
    """

    packages: tuple[str, ...] = ("openvino",)
    extra = "openvino"

    def __init__(self, option: str = "", *, sample: Sample | None = None, budget: Budget | None = None) -> None:
        self.tolerance = parse_option("openvino", option, _TOLERANCES)
        self.name = f"openvino:{option}" if option else "openvino"
        self.calibrates = option == "int8"
        if self.calibrates:
            self.packages, self.extra = (*OpenVino.packages, *OnnxRuntime.packages), "openvino,onnxruntime"
        self._precision = "bf16" if option == "bf16" else "f32"
        super().__init__(sample=sample, budget=budget)

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Export the part, and compile it with OpenVINO."""
        if self.calibrates:
            model, given = self._quantized(part, example, free_batch)
        else:
            model, given = converted(part, example, free_batch), list(range(len(part.computed_inputs)))
        return self._compiled(model, given)

    def load_onnx(self, model: bytes, part: Part) -> Run | None:
        """Compile a part; None for whole numbers, for which ``build()`` calibrates each part."""
        if self.calibrates:
            return None
        read = core().read_model(model)
        return self._compiled(read, _places(read, part))

    def _compiled(self, model: Any, given: Sequence[int]) -> Run:
        """Return what runs a model.

        Args:
            model: the model.
            given: for each of its inputs, which of the part's tensors it is.
        """
        import openvino

        if self._precision == "bf16" and not computes_bfloat16():
            _say_without_bfloat16()
        settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core().compile_model(model, "CPU", settings)
        wrap = openvino.Tensor
        requests = threading.local()  # a request holds the tensors of one call

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            request: Any = getattr(requests, "request", None)
            if request is None:
                request = requests.request = compiled.create_infer_request()
            arrays = [as_array(tensors[i]) for i in given]
            # Arrays that are wrapped here spare OpenVINO's own inspection of them, which takes several times as long.
            wrapped = {i: one if not one.ndim or not one.size else wrap(one, True) for i, one in enumerate(arrays)}
            return as_tensors(request.infer(wrapped, share_inputs=True).values(), tensors)

        return run

    def _quantized(self, part: Part, example: Sequence[Tensor], free_batch: bool) -> tuple[Any, list[int]]:
        """Return the part in whole numbers as OpenVINO's model, and the places of the tensors that it takes."""
        assert self.judge is not None
        with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as folder:
            path = Path(folder) / "part.onnx"
            write_onnx(part, example, path, free_batch=free_batch, one_file=True)
            path = quantized(path, part, example, self.judge.calibrating(part))
            model = core().read_model(str(path))
        return model, _places(model, part)


def _places(model: Any, part: Part) -> list[int]:
    """Return for each input of a model that was read from ONNX which of the part's tensors it is."""
    places = {spec.name: i for i, spec in enumerate(part.computed_inputs)}
    # Inputs that nothing reads are left out.
    return [next(places[name] for name in one.get_names() if name in places) for one in model.inputs]


def converted(part: Part, example: Sequence[Tensor], free_batch: bool) -> Any:
    """Return a part as OpenVINO's model.

    Raises:
        BackendError: OpenVINO does not take a layer; the message names it.
    """
    import openvino

    program = export(part, example, free_batch=free_batch)
    root = logging.getLogger()
    level = root.level
    try:
        return openvino.convert_model(program)
    except Exception as error:
        if by_signal_handler(error):
            raise
        text = str(error)
        layer = layer_of(program, text)
        where = "a layer" if layer is None else f"layer {layer!r}"
        raise BackendError(f"{where} cannot be converted by OpenVINO: {_reason(text)}", layer) from error
    finally:
        # OpenVINO's converter has the whole program's log keep errors only.
        root.setLevel(level)


def _reason(text: str) -> str:
    found = re.search(r"No conversion rule found for operations: ([^\n]+)", text)
    if found:
        return f"it has no rule for {found[1][:200]}"
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "no reason given")
