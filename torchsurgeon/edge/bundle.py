"""A bundle: the folder that ``torchsurgeon export`` writes for a device without PyTorch, and its checks.

``manifest.json`` lists every other file with its size and SHA-256. The parts of the model are ONNX files, whose weights
stand in files beside them. The files of fitted codecs are those that servers have. ``frontier.json`` holds what each
cut costs, ``fingerprint.json`` what is compared with the server.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torchsurgeon import _json_file
from torchsurgeon.errors import BundleError, PartitionError, PlanError, short
from torchsurgeon.planning.costs import CostTable
from torchsurgeon.transport.fingerprint import Fingerprint
from torchsurgeon.wire.fields import ITEM_BYTES

FORMAT = "torchsurgeon.bundle/3"
MANIFEST, FRONTIER, FINGERPRINT = "manifest.json", "frontier.json", "fingerprint.json"

DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
"""The datatypes that NumPy has, with its names for them; a bundle's tensors are of these."""

_AGAIN = "export the bundle again, with the torchsurgeon that opens it"
_PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array that goes into a part of the model or comes out of it.

    Attributes:
        name: its name in the graph, and on the wire.
        datatype: its element type, as the protocol names it.
        shape: its shape in the traced example.
        batch_step: by how much each dimension grows with every further sample in the batch.
        example_batch: the batch size of the traced example.
        onnx: its name as an output of an ONNX file, which differs where an input has the same name.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    batch_step: tuple[int, ...]
    example_batch: int
    onnx: str

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """Return the shape for a batch of ``batch`` samples."""
        extra = batch - self.example_batch
        return tuple(size + step * extra for size, step in zip(self.shape, self.batch_step, strict=True))

    @property
    def size_bytes(self) -> int:
        """Bytes of the array in the traced example."""
        return math.prod(self.shape) * ITEM_BYTES[self.datatype]

    def __str__(self) -> str:
        sizes = "×".join(
            "N" if s == 1 else f"{s}N" if s else str(n) for n, s in zip(self.shape, self.batch_step, strict=True)
        )
        return f"{self.name} {DATATYPES.get(self.datatype, self.datatype)}[{sizes}]"


@dataclasses.dataclass(frozen=True)
class OnnxPart:
    """A part of the model as an ONNX file.

    Attributes:
        file: its path in the bundle.
        free_batch: whether it takes any batch size, or only the example's.
    """

    file: str
    free_batch: bool


@dataclasses.dataclass(frozen=True)
class BundleCodec:
    """A fitted codec of a bundle.

    Attributes:
        name: its name without a rate.
        file: its path in the bundle.
        student: what runs in place of the model's own layers before its cut; None for these layers.
    """

    name: str
    file: str
    student: OnnxPart | None


@dataclasses.dataclass(frozen=True)
class BundlePoint:
    """A point at which the bundle can cut the model.

    Attributes:
        index: the partition point's index in the traced model.
        name: its name.
        layers: the device's layers where these are not simply the first ``index``; None where they are.
        tensors: the boundary tensors.
        head: the head; None at the point where all layers run on the server.
    """

    index: int
    name: str
    layers: tuple[int, ...] | None
    tensors: tuple[ArraySpec, ...]
    head: OnnxPart | None


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """What a device has of a model.

    Attributes:
        folder: where it lies.
        name: the name under which servers have the model, unless the device is told another.
        model: the model's class.
        inputs: the model's inputs.
        outputs: the model's outputs.
        example_batch: the batch size of the traced example.
        batches: the batch sizes for which the model takes the traced path, as the first and last of each run of them;
            None where it does for any.
        valued: whether shapes of outputs depend on values, so that only their number of dimensions is known.
        points: where it can be cut.
        whole: the whole model; None where the device holds only heads.
        codecs: the fitted codecs.
        costs: what each cut costs.
        graph: the graph's fingerprint.
        weights: the digest of all weights.
    """

    folder: Path
    name: str
    model: str
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    example_batch: int
    batches: tuple[tuple[int, int], ...] | None
    valued: bool
    points: tuple[BundlePoint, ...]
    whole: OnnxPart | None
    codecs: tuple[BundleCodec, ...]
    costs: CostTable
    graph: str
    weights: str

    @property
    def parts(self) -> tuple[OnnxPart, ...]:
        """All parts of the model."""
        students = (codec.student for codec in self.codecs)
        every = (self.whole, *(point.head for point in self.points), *students)
        return tuple(part for part in every if part is not None)

    def fingerprint(self) -> Fingerprint:
        """Return what tells a model that differs on the server from this one.

        It is read when a difference is to be named, since it takes more memory than all else that a bundle tells.

        Raises:
            BundleError: its file has been damaged since the bundle was opened.
        """
        path = self.folder / FINGERPRINT
        data = _json_file.read(path, BundleError, _AGAIN)
        try:
            return Fingerprint(
                graph=self.graph,
                weights=self.weights,
                tensors=dict(data["tensors"]),
                layers=dict(data["layers"]),
                inputs=tuple(map(_text, data["inputs"])),
                whole=tuple(map(_text, data["whole"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{short(path)} does not describe a model ({short(error)}); {_AGAIN}") from None

    def point(self, ref: int | str) -> BundlePoint:
        """Return a point of the bundle.

        Args:
            ref: its index, its name, or ``"server"`` for the point where all layers run on the server.

        Raises:
            PartitionError: the bundle has no such point.
        """
        for point in self.points:
            if ref in (point.index, point.name) or (ref == "server" and point.index == 0):
                return point
        there = ", ".join(f"{point.index} ({point.name})" for point in self.points)
        raise PartitionError(
            f"the bundle has heads for the points {short(there, 300, quote=False)}; got {short(ref, 100)}; give one of "
            'these, "device" or "auto", or export the bundle with this point'
        )


def to_json(value: Any) -> Any:
    """Return a spec, part or point of a bundle as plain data."""
    return dataclasses.asdict(value)


def read(folder: str | Path) -> Bundle:
    """Return the bundle in a folder, once every file was found to be as the manifest says.

    Args:
        folder: the folder that ``torchsurgeon export`` has written.

    Raises:
        BundleError: a file is missing or damaged, the bundle is of another version, or the manifest names a file
            outside of it.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"a bundle is a folder with {MANIFEST}, and there is none in {short(folder)}; write it with torchsurgeon "
            "export SPEC --points P --out FOLDER"
        )
    data = _json_file.read(path, BundleError, _AGAIN)
    _json_file.check_format(data, FORMAT, BundleError, f"the bundle {short(folder, 100)}", _AGAIN)
    files = _checked_files(folder, data)
    try:
        costs = CostTable.load(folder / FRONTIER)
    except PlanError as error:
        raise BundleError(f"the bundle's frontier cannot be read: {error}") from None
    try:
        found = Bundle(
            folder=folder,
            name=_text(data["name"]),
            model=_text(data["model"]),
            inputs=tuple(map(_spec, data["inputs"])),
            outputs=tuple(map(_spec, data["outputs"])),
            example_batch=_whole(data["example_batch"]),
            batches=_runs(data["batches"]),
            valued=bool(data["valued"]),
            points=tuple(map(_point, data["points"])),
            whole=_part(data["whole"]),
            codecs=tuple(map(_codec, data["codecs"])),
            costs=costs,
            graph=_text(data["graph"]),
            weights=_text(data["weights"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        what = f"has no field {short(error)}" if isinstance(error, KeyError) else f"holds a wrong value: {short(error)}"
        raise BundleError(f"{short(path)} {what}; {_AGAIN}") from None
    if not found.inputs or not found.outputs:
        raise BundleError(f"{short(path)} tells of a model without inputs or outputs; {_AGAIN}")
    used = [*(part.file for part in found.parts), *(codec.file for codec in found.codecs)]
    missing = next((file for file in used if file not in files), None)
    if missing is not None:
        raise BundleError(f"{short(path)} does not list the file {short(missing)} that it uses; {_AGAIN}")
    if costs.fingerprint != found.graph:
        raise BundleError(f"the frontier in {short(folder)} is of another model than its heads; {_AGAIN}")
    return found


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _checked_files(folder: Path, data: Mapping[str, Any]) -> set[str]:
    """Return the files that the manifest lists, once each was found to be as it says."""
    listed = data.get("files")
    if not isinstance(listed, dict):
        raise BundleError(f"{short(folder / MANIFEST)} has no list of files; {_AGAIN}")
    for name in (*listed, *(one for one in (FRONTIER, FINGERPRINT) if one not in listed)):
        try:
            _check_file(folder, name, listed.get(name))
        except (OSError, ValueError) as error:
            if isinstance(error, BundleError):
                raise
            # One that may not be read, or a name that no file can have.
            raise BundleError(
                f"{short(name, 100)} of the bundle {short(folder, 100)} cannot be read: {short(error, 100)}"
            ) from None
    return set(listed)


def _check_file(folder: Path, name: str, said: Any) -> None:
    """Check that a file lies in the bundle, and is as the manifest says."""
    path = PurePosixPath(name)
    inside = name and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
    if not inside or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"the files of a bundle must lie inside of it; {MANIFEST} lists {short(name, 100)}")
    if not isinstance(said, dict):
        raise BundleError(f"{MANIFEST} must tell size and SHA-256 of {short(name, 100)}; {_AGAIN}")
    there = folder / path
    if not there.is_file():
        raise BundleError(f"the bundle {short(folder, 100)} lacks its file {name}; copy the whole folder again")
    size = there.stat().st_size
    if size != said.get("size_bytes"):
        raise BundleError(
            f"{name} of the bundle {short(folder, 100)} must have {short(said.get('size_bytes'), 30)} bytes; got "
            f"{size}; copy it again"
        )
    if digest_of(there) != said.get("sha256"):
        raise BundleError(
            f"{name} of the bundle {short(folder, 100)} has not the SHA-256 that the manifest tells: it was damaged or "
            "edited; copy it again"
        )


def _spec(data: Mapping[str, Any]) -> ArraySpec:
    spec = ArraySpec(
        _text(data["name"]),
        _text(data["datatype"]),
        tuple(map(_whole, data["shape"])),
        tuple(map(_whole, data["batch_step"])),
        _whole(data["example_batch"]),
        _text(data["onnx"]),
    )
    if spec.datatype not in DATATYPES or len(spec.shape) != len(spec.batch_step):
        raise ValueError(f"{spec.name} is {spec.datatype} of shape {list(spec.shape)}")
    return spec


def _runs(data: Any) -> tuple[tuple[int, int], ...] | None:
    return None if data is None else tuple((_whole(first), _whole(last)) for first, last in data)


def _part(data: Mapping[str, Any] | None) -> OnnxPart | None:
    return None if data is None else OnnxPart(_text(data["file"]), bool(data["free_batch"]))


def _codec(data: Mapping[str, Any]) -> BundleCodec:
    return BundleCodec(_text(data["name"]), _text(data["file"]), _part(data["student"]))


def _point(data: Mapping[str, Any]) -> BundlePoint:
    layers = data["layers"]
    return BundlePoint(
        _whole(data["index"]),
        _text(data["name"]),
        None if layers is None else tuple(map(_whole, layers)),
        tuple(map(_spec, data["tensors"])),
        _part(data["head"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{short(value, 100)} must be a text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{short(value, 100)} must be a whole number")
    return value
