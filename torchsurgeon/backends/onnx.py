"""Parts of a model as ONNX models, which ONNX Runtime and OpenVINO read."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends.exporting import export, layer_of
from torchsurgeon.backends.part import Part
from torchsurgeon.errors import BackendError

OPSET = 18
# Which functions of ONNX Script torch.onnx writes each of PyTorch's operators with, by what they depend on.
_translations: dict[Any, Any] = {}


def write_onnx(part: Part, example: Sequence[Tensor], path: Path, *, free_batch: bool, one_file: bool = False) -> None:
    """Write a part as an ONNX model, whose inputs and outputs have the names of the part's tensors.

    Args:
        part: the part.
        example: its tensors, numbers included.
        path: the file to write.
        free_batch: whether the model takes any batch size.
        one_file: whether the weights stand in the same file. The format holds no more than 2 GB in one.

    Raises:
        BackendError: a layer cannot be exported; the message names it.
    """
    program = export(part, example, free_batch=free_batch)
    try:
        with _quiet_converters(), _translations_kept():
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in part.computed_inputs],
                output_names=list(part.output_names),
                verbose=False,
            )
    except Exception as error:
        if by_signal_handler(error):
            raise
        raise _refusal(program, error) from error
    assert made is not None
    _name_apart(made.model.graph)
    _strip(made.model)
    made.save(path, external_data=not one_file)


@contextlib.contextmanager
def _quiet_converters() -> Iterator[None]:
    """Keep the converters from telling each constant that they leave as it is, which changes no answer."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _translations_kept() -> Iterator[None]:
    """Have torch.onnx look up how it translates PyTorch's operators once, and not for every part inside the block.

    It reads the source of a thousand functions for that, which takes longer than the rest of a small part's export.
    Where a release of PyTorch has no such function, every export takes that long. Other threads of the program that
    export meanwhile get the same, in objects of their own.
    """
    registry: Any = None
    with contextlib.suppress(ImportError, AttributeError):
        registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    looked_up = getattr(registry, "from_torchlib", None)
    if looked_up is None:
        yield
        return

    def kept(*args: Any, **kwargs: Any) -> Any:
        # Operators of torchvision are translated only if it has been imported.
        key = args, tuple(sorted(kwargs.items())), "torchvision" in sys.modules
        if key not in _translations:
            _translations[key] = looked_up(*args, **kwargs)
        known = _translations[key]
        own = copy.copy(known)
        own.functions = {operator: list(functions) for operator, functions in known.functions.items()}
        return own

    before = vars(registry)["from_torchlib"]
    registry.from_torchlib = staticmethod(kept)
    try:
        yield
    finally:
        registry.from_torchlib = before


def _name_apart(graph: Any) -> None:
    """Rename the values inside a graph of ``onnx_ir``, of which some may have the name of a boundary tensor."""
    outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for i, node in enumerate(graph.all_nodes()):
        for j, value in enumerate(node.outputs):
            if id(value) not in outer:
                value.name = f"value:{i}:{j}"


def _strip(model: Any) -> None:
    """Remove what the exporter notes of every node: the lines of Python and the folders that it comes from.

    A runtime reads none of it, keeps it in memory, and a file that is given away should not tell it.
    """
    graph = model.graph
    for one in (model, graph, *graph.inputs, *graph.initializers.values()):
        one.metadata_props.clear()
    for node in graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _refusal(program: torch.export.ExportedProgram, error: BaseException) -> BackendError:
    """Return an error that says which layer ``torch.onnx`` does not convert, and why."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(messages) < 10:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(messages)
    layer = layer_of(program, text)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    where = "a layer" if layer is None else f"layer {layer!r}"
    what = f"{operator[1]} has no counterpart in ONNX" if operator else f"{type(error).__name__}: {_last(text)}"
    return BackendError(f"{where} cannot be exported to ONNX: {what}", layer)


def _last(text: str) -> str:
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "no reason given")
