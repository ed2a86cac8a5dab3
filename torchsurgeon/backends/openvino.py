"""OpenVINO on the CPU, in float32 or in bfloat16."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends.backend import Backend, Run, parse_option
from torchsurgeon.backends.exporting import export, layer_of
from torchsurgeon.backends.onnxruntime import as_array, as_tensor
from torchsurgeon.backends.part import Part
from torchsurgeon.errors import BackendError

_TOLERANCES = {"": 1e-4, "f32": 1e-4, "bf16": 0.1}


@functools.cache
def _core() -> Any:
    """Return OpenVINO itself, one for the whole process, kept for the rest of its life.

    Each gives the thread another stack for signal handlers, and at its end frees it and puts back the one before. Where
    two live at once and the first ends first, the one put back is free already, and the next signal, such as that of
    Ctrl-C, ends the process with a segmentation fault.
    """
    import openvino

    return openvino.Core()


class OpenVino(Backend):
    """OpenVINO. It takes parts as PyTorch exports them, and uses as many threads as PyTorch has when one is built.

    Args:
        option: ``"bf16"`` to compute in bfloat16, which has 8 bits of mantissa; ``"f32"`` or ``""`` for float32.

    Raises:
        BackendError: the package is missing.
    """

    packages = ("openvino",)
    extra = "openvino"

    def __init__(self, option: str = "") -> None:
        self.tolerance = parse_option("openvino", option, _TOLERANCES)
        self._precision = option or "f32"
        self.name = f"openvino:{option}" if option else "openvino"
        super().__init__()

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Export the part, and compile it with OpenVINO."""
        import openvino

        program = export(part, example, free_batch=free_batch)
        try:
            compiled = _core().compile_model(
                openvino.convert_model(program),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": self._precision,
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "PERFORMANCE_HINT": "LATENCY",
                },
            )
        except Exception as error:
            if by_signal_handler(error):
                raise
            text = str(error)
            layer = layer_of(program, text)
            where = "a layer" if layer is None else f"layer {layer!r}"
            raise BackendError(f"{where} cannot be converted by OpenVINO: {_reason(text)}") from error
        requests = threading.local()  # a request holds the tensors of one call
        size = len(part.outputs)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            request: Any = getattr(requests, "request", None)
            if request is None:
                request = requests.request = compiled.create_infer_request()
            found = request.infer([as_array(tensor) for tensor in tensors], share_inputs=True)
            return [as_tensor(found[i]).to(tensors[0].device) for i in range(size)]

        return run


def _reason(text: str) -> str:
    found = re.search(r"No conversion rule found for operations: ([^\n]+)", text)
    if found:
        return f"it has no rule for {found[1][:200]}"
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "no reason given")
