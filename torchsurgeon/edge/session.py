"""Parts of a model, as ONNX Runtime runs them on the device's processor."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon._allocator import give_freed_memory_back
from torchsurgeon.edge.bundle import OnnxPart
from torchsurgeon.errors import BackendError, BundleError, short

# The first release that reads what is exported: IR version 10, and with it every opset up to 21.
_OLDEST = (1, 18)


class Sessions:
    """The parts of one bundle. Each is loaded when it is first used, and kept. Thread-safe.

    Args:
        folder: the bundle's folder.
        threads: threads of one run; None for as many as ONNX Runtime chooses.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self._folder, self._threads = folder, threads
        self._sessions: dict[str, Any] = {}
        self._loading = threading.Lock()

    def load(self, part: OnnxPart) -> Any:
        """Return the session of a part.

        Raises:
            BackendError: ONNX Runtime is missing, too old, or does not take the part.
        """
        found = self._sessions.get(part.file)
        if found is None:
            with self._loading:
                found = self._sessions.get(part.file)
                if found is None:
                    found = self._sessions[part.file] = open_session(self._folder / part.file, self._threads)
        return found

    def prepare(self, part: OnnxPart, taken: Collection[str], given: Collection[str]) -> None:
        """Load a part, and check that it is one of the bundle's model.

        Args:
            part: the part.
            taken: the names of the model's inputs.
            given: the names under which its file must have its outputs.

        Raises:
            BundleError: it takes other arrays, or gives others.
            BackendError: as ``load()`` raises it.
        """
        session = self.load(part)
        strange = [one.name for one in session.get_inputs() if one.name not in taken]
        missing = sorted(set(given) - {one.name for one in session.get_outputs()})
        if strange or missing:
            what = f"takes {short(strange[0], 60)}" if strange else f"does not give {short(missing[0], 60)}"
            raise BundleError(
                f"{part.file} of the bundle is another part than the manifest says: it {what}; export the bundle again"
            )

    def run(
        self, part: OnnxPart, arrays: Mapping[str, np.ndarray[Any, Any]], names: Sequence[str]
    ) -> list[np.ndarray[Any, Any]]:
        """Return the named outputs of a part.

        Args:
            part: the part.
            arrays: its inputs by name; those that it does not read are left out.
            names: the outputs, as the ONNX file names them.

        Raises:
            BackendError: ONNX Runtime fails to run it; whatever ``load()`` raises.
        """
        session = self.load(part)
        try:
            return session.run(list(names), {one.name: arrays[one.name] for one in session.get_inputs()})  # type: ignore[no-any-return]
        except _errors() as error:
            raise BackendError(f"ONNX Runtime fails to run {part.file}: {short(error, quote=False)}") from error


def open_session(path: Path, threads: int | None) -> Any:
    """Return ONNX Runtime's session of a file.

    Args:
        path: the file.
        threads: threads of one run; None for as many as ONNX Runtime chooses.

    Raises:
        BackendError: ONNX Runtime is missing, too old, or does not take the file.
    """
    runtime = runtime_of_device()
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # With the pattern, memory is taken for all tensors of a run at once, and a device that holds a head has little.
    options.enable_mem_pattern = False
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _errors() as error:
        old = re.search(r"opset|IR version", str(error))
        remedy = f"; onnxruntime {runtime.__version__} is older than the file: install a newer one" if old else ""
        raise BackendError(f"ONNX Runtime does not take {path.name}: {short(error, quote=False)}{remedy}") from error
    # Loading it has freed memory that the C library would keep.
    give_freed_memory_back()
    return session


def runtime_of_device() -> Any:
    """Return the package onnxruntime.

    Raises:
        BackendError: it is missing, or older than what is exported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"a bundle is run by ONNX Runtime, and onnxruntime does not import ({short(error, 100)}); "
            "pip install onnxruntime"
        ) from None
    found = tuple(map(int, re.findall(r"\d+", onnxruntime.__version__)[:2]))
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise BackendError(
            f"a bundle needs onnxruntime {oldest} or newer, which reads its opset; got {onnxruntime.__version__}; "
            f"pip install 'onnxruntime>={oldest}'"
        )
    return onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    """Return the classes of errors that ONNX Runtime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    known = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*known, RuntimeError, ValueError)
