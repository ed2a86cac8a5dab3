"""AOTInductor: a part of a model compiled into a package, which runs without PyTorch's Python code."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from torchsurgeon.backends.backend import Backend, Run
from torchsurgeon.backends.exporting import export
from torchsurgeon.backends.part import Part


class Aot(Backend):
    """AOTInductor, which needs a C++ compiler, and takes any batch size without compiling anew."""

    name = "aot"
    device = "where the weights are"
    keeps_nan = True

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Compile the part into a package, and load it."""
        from torch import _inductor as inductor

        program = export(part, example, free_batch=free_batch)
        with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as folder:
            path = inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "part.pt2"))
            loaded = inductor.aoti_load_package(path)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            found = loaded(*[tensor.contiguous() for tensor in tensors])
            return found if isinstance(found, tuple | list) else (found,)

        return run
