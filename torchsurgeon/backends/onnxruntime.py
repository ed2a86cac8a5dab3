"""ONNX Runtime, on the CPU, and on a GPU where its package brings the provider."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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
from torchsurgeon.backends.part import Part
from torchsurgeon.backends.quantizing import quantized
from torchsurgeon.errors import BackendError, short

OPSET = 18
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
        with _quiet_converters():
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
