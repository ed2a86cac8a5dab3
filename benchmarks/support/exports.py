"""Exports of parts of a model, of which each is made once for all backends, since that takes most of building."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from torchsurgeon.backends import Part, exporting, onnx, openvino
from torchsurgeon.backends import onnxruntime as ort


@contextlib.contextmanager
def made_once() -> Iterator[None]:
    """Export a part once for all backends; to be entered anew for each part.

    What it is exported to is kept, and given to all who export it with the same freedom of the batch.
    """
    export, convert = (functools.cache(_by_freedom(make)) for make in (_export, openvino.converted))
    write = ort.write_onnx
    with tempfile.TemporaryDirectory() as folder:

        def written(
            part: Part, example: Sequence[Tensor], path: Path, *, free_batch: bool, one_file: bool = False
        ) -> None:
            assert not one_file
            # Of a part in which a layer is refused, what comes before is exported, too.
            ends = hashlib.sha256(repr(part.output_names).encode()).hexdigest()
            kept = Path(folder, f"{free_batch}-{ends}")
            if not kept.exists():
                with tempfile.TemporaryDirectory(dir=folder) as made:
                    write(part, example, Path(made) / path.name, free_batch=free_batch)
                    shutil.copytree(made, kept)
            for file in kept.iterdir():
                os.link(file, path.parent / file.name)

        def exported(part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Any:
            return export(_Example(part, example), free_batch)

        def converted(part: Part, example: Sequence[Tensor], free_batch: bool) -> Any:
            return convert(_Example(part, example), free_batch)

        with (
            mock.patch.object(onnx, "export", exported),
            mock.patch.object(openvino, "export", exported),
            mock.patch.object(ort, "write_onnx", written),
            mock.patch.object(openvino, "converted", converted),
        ):
            yield


class _Example:
    """A part with an example, which is taken for equal to any other of the part."""

    def __init__(self, part: Part, tensors: Sequence[Tensor]) -> None:
        self.part, self.tensors = part, tensors

    def __hash__(self) -> int:
        return hash(self.part)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Example) and other.part is self.part


def _export(part: Part, example: Sequence[Tensor], free_batch: bool) -> Any:
    return exporting.export(part, example, free_batch=free_batch)


def _by_freedom(convert: Callable[[Part, Sequence[Tensor], bool], Any]) -> Callable[[_Example, bool], Any]:
    return lambda example, free_batch: convert(example.part, example.tensors, free_batch)
