"""A part of a model as an ONNX file that was compared with the part itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends.arrays import as_array, as_tensors
from torchsurgeon.backends.built import check, first_line
from torchsurgeon.backends.onnxruntime import OnnxRuntime, open_session
from torchsurgeon.backends.part import Part
from torchsurgeon.edge.bundle import DATATYPES, ArraySpec
from torchsurgeon.errors import BackendError, short
from torchsurgeon.tracing.specs import TensorSpec
from torchsurgeon.wire.tensors import datatype_of


def write_part(part: Part, tensors: Sequence[Tensor], path: Path, backend: OnnxRuntime | None = None) -> bool:
    """Write a part, run it by ONNX Runtime, and compare that with the part itself.

    Args:
        part: the part.
        tensors: its tensors, numbers included.
        path: the file; its weights stand in another beside it, or in whole numbers in itself.
        backend: ONNX Runtime in floats or in whole numbers; in floats by default.

    Returns:
        Whether it takes any batch size; if not, only that of ``tensors``.

    Raises:
        BackendError: a layer cannot be exported, which the message names; ONNX Runtime does not take the part, or its
            results deviate, or change more answers than its budget allows.
    """
    backend = backend or OnnxRuntime()
    free_batch = _write_checked(part, tensors, path, backend)
    if backend.judge is not None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                backend.judge.judge(part, _runs(part, path), tensors)
        except BaseException:
            _remove(path)
            raise
    return free_batch


def _write_checked(part: Part, tensors: Sequence[Tensor], path: Path, backend: OnnxRuntime) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False), torch.no_grad():
        tensors = [tensor.detach().clone() for tensor in tensors]
        expected = part.segment(*tensors)
        if part.batch_free and any(any(spec.batch_step) for spec in part.inputs):
            # An exporter takes a batch of one for a size that is always one, so it is given another.
            more = part.with_another_sample(tensors)
            try:
                backend.write(part, more, path, free_batch=True)
                run = _runs(part, path)
                check(part, backend, run, more, part.segment(*more))
                check(part, backend, run, tensors, expected)
                return True
            except Exception as error:
                if by_signal_handler(error):
                    raise
                _remove(path)
        try:
            backend.write(part, tensors, path, free_batch=False)
            check(part, backend, _runs(part, path), tensors, expected)
            return False
        except BackendError:
            _remove(path)
            raise
        except Exception as error:
            _remove(path)
            if by_signal_handler(error):
                raise
            raise BackendError(f"{type(error).__name__}: {first_line(error)}") from error


def files_of(path: Path) -> list[Path]:
    """Return the files that ``write_part()`` has written for a path."""
    return sorted(path.parent.glob(f"{path.name}*"))


def array_specs(specs: Sequence[TensorSpec], names: Sequence[str]) -> list[ArraySpec]:
    """Return tensors as a device without PyTorch knows them.

    Args:
        specs: the tensors.
        names: their names in the ONNX file.

    Raises:
        BackendError: a tensor has a dtype that NumPy does not have.
    """
    found = []
    for spec, name in zip(specs, names, strict=True):
        datatype = datatype_of(spec.dtype)
        if datatype not in DATATYPES:
            raise BackendError(
                f"tensor {short(spec.name, 100)} is {datatype}, which NumPy does not have, so a device without PyTorch "
                "cannot send it; cut elsewhere, or convert it in the model"
            )
        found.append(ArraySpec(spec.name, datatype, spec.shape, spec.batch_step, spec.example_batch, name))
    return found


def _runs(part: Part, path: Path) -> Any:
    session = open_session(path, ["CPUExecutionProvider"])
    places = {spec.name: i for i, spec in enumerate(part.computed_inputs)}
    names = list(part.output_names)

    def run(*tensors: Tensor) -> list[Tensor]:
        given = {one.name: as_array(tensors[places[one.name]]) for one in session.get_inputs()}
        return as_tensors(session.run(names, given), tensors)

    return run


def _remove(path: Path) -> None:
    for file in files_of(path):
        file.unlink()
