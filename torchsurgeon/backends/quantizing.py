"""Parts in whole numbers of 8 bits: ONNX models whose values ONNX Runtime has calibrated and quantized."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends.arrays import as_array
from torchsurgeon.backends.part import Part
from torchsurgeon.errors import BackendError, short


def quantized(path: Path, part: Part, example: Sequence[Tensor], calls: Iterator[Sequence[Tensor]]) -> Path:
    """Quantize a part that was exported to ONNX, and return the file of the result, which lies beside it.

    Weights get a scale for each channel, and all other values the range that they have in the calls. The graph keeps
    its inputs and outputs in floats. It holds a pair of ``QuantizeLinear`` and ``DequantizeLinear`` where a value is
    rounded to 8 bits, which ONNX Runtime and OpenVINO take as an order to compute in whole numbers there.

    Args:
        path: the ONNX model, in one file.
        part: the part.
        example: the tensors for which it was exported, whose numbers are fixed in the model.
        calls: tensors of the part, numbers included. Those with other numbers are left out.

    Raises:
        BackendError: it cannot be quantized.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, result = path.with_name("prepared.onnx"), path.with_name("quantized.onnx")
    try:
        with _quiet(), torch.no_grad():
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(result),
                _Calls(_inputs_of(prepared), part, example, calls),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    except Exception as error:
        if by_signal_handler(error):
            raise
        raise BackendError(f"ONNX Runtime does not quantize it: {short(error, 200, quote=False)}") from error
    return result


class _Calls:
    """Gives calls one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(
        self, names: Sequence[str], part: Part, example: Sequence[Tensor], calls: Iterator[Sequence[Tensor]]
    ) -> None:
        self._names, self._part, self._example, self._left = names, part, example, calls

    def __iter__(self) -> _Calls:
        return self

    def __next__(self) -> dict[str, Any]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found

    def get_next(self) -> dict[str, Any] | None:
        """Return the arrays of the next call by name; None after the last one."""
        part = self._part
        for tensors in self._left:
            if all(torch.equal(tensors[i], self._example[i]) for i in part.numbers):
                named = zip(part.computed_inputs, part.computed(tensors), strict=True)
                return {spec.name: as_array(tensor) for spec, tensor in named if spec.name in self._names}
        return None


def _inputs_of(path: Path) -> list[str]:
    import onnx

    return [one.name for one in onnx.load(str(path), load_external_data=False).graph.input]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep ONNX Runtime's tools from advising what is done already."""
    # They write to the root logger. What others write there meanwhile stays.
    advice = _NotFrom("onnxruntime")
    logging.getLogger().addFilter(advice)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(advice)


class _NotFrom(logging.Filter):
    """Leaves out what the code of one package writes to a logger, below the level of errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or self.name not in Path(record.pathname).parts
