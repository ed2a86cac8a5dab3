"""The file of a fitted codec: named arrays and a JSON header, sealed by a digest. Nothing in it is ever executed.

Layout: ``TSFITTED``, the header's length in bytes (8 bytes, little endian), the header, the arrays one after another
in the header's order (little endian, row-major), and the SHA-256 of everything before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from torchsurgeon import _whole_file
from torchsurgeon.errors import CodecError, short

FORMAT = "torchsurgeon.fitted/1"

_MAGIC = b"TSFITTED"
_LENGTH_BYTES, _DIGEST_BYTES = 8, 32
_MOST_HEADER_BYTES, _MOST_FILE_BYTES = 4 << 20, 1 << 30
_DTYPES = {name: numpy.dtype(name) for name in ("uint8", "uint16", "int32", "float32")}
_REMEDY = "fit the codec again, or copy the file again"


def pack(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of a file.

    Args:
        header: plain data.
        arrays: arrays by name, of the dtypes ``uint8``, ``uint16``, ``int32`` and ``float32``.
    """
    listed = [{"name": name, "dtype": array.dtype.name, "shape": array.shape} for name, array in arrays.items()]
    text = json.dumps({"format": FORMAT, **header, "arrays": listed}, separators=(",", ":"), allow_nan=False).encode()
    parts = [_MAGIC, len(text).to_bytes(_LENGTH_BYTES, "little"), text]
    parts += [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays.values()]
    content = b"".join(parts)
    return content + hashlib.sha256(content).digest()


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]], str]:
    """Return header, arrays and digest (in hex) of a file's bytes.

    Raises:
        CodecError: the file is damaged, is none of a fitted codec, or is one of another version of the format.
    """
    begin = len(_MAGIC) + _LENGTH_BYTES
    if len(data) < begin + _DIGEST_BYTES or not data.startswith(_MAGIC):
        raise CodecError(f"a fitted codec's file must begin with {_MAGIC.decode()}; got {short(data[:16])}; {_REMEDY}")
    content, sealed = memoryview(data)[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != sealed:
        raise CodecError(f"the file is damaged or was cut short: it must end in the SHA-256 of the rest; {_REMEDY}")
    length = int.from_bytes(content[len(_MAGIC) : begin], "little")
    if length > min(_MOST_HEADER_BYTES, len(content) - begin):
        raise CodecError(f"the header must lie within the file; got a length of {length} bytes; {_REMEDY}")
    try:
        header = json.loads(bytes(content[begin : begin + length]))
        if header["format"] != FORMAT:
            raise CodecError(
                f"the format of a fitted codec must be {FORMAT!r}; got {short(header['format'])}; {_REMEDY}"
            )
        arrays, offset = {}, begin + length
        for one in header["arrays"]:
            dtype, shape = _DTYPES[one["dtype"]], tuple(map(int, one["shape"]))
            size = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or size > len(content) - offset:
                raise ValueError(f"array {short(one['name'])} does not lie within the file")
            array = numpy.frombuffer(content[offset : offset + size], dtype.newbyteorder("<")).reshape(shape)
            arrays[str(one["name"])] = array.astype(dtype)
            offset += size
        if offset != len(content):
            raise ValueError(f"{len(content) - offset} bytes follow the last array")
    except CodecError:
        raise
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CodecError(f"the header of the fitted codec is not valid: {short(error)}; {_REMEDY}") from None
    return header, arrays, sealed.hex()


def write(path: str | Path, data: bytes) -> None:
    """Write a file as a whole or not at all.

    Raises:
        CodecError: the file cannot be written.
    """
    _whole_file.write(path, data, CodecError)


def read(path: str | Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        CodecError: the file cannot be read, or is larger than any fitted codec.
    """
    try:
        with Path(path).open("rb") as opened:
            data = opened.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise CodecError(f"{short(Path(path))} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_FILE_BYTES:
        raise CodecError(f"{short(Path(path))} must have at most {_MOST_FILE_BYTES} bytes to be a fitted codec")
    return data
