"""Messages of the wire format, with NumPy arrays in place of tensors, and the transport that carries them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from torchsurgeon.edge.bundle import DATATYPES
from torchsurgeon.edge.codec import ArrayCodec, find_codec
from torchsurgeon.errors import BodyTooLargeError, CodecError, ProtocolError
from torchsurgeon.transport.base import Timing
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.http_bytes import HttpBytes
from torchsurgeon.transport.steps import complete
from torchsurgeon.wire.body import Encoded, assembled, described, json_text, places, read_answer, request_header
from torchsurgeon.wire.header import Buffer, Entry

Array = np.ndarray[Any, Any]
_DTYPES = {datatype: np.dtype(name) for datatype, name in DATATYPES.items()}
_NAMES = {dtype: datatype for datatype, dtype in _DTYPES.items()}


class ArrayAnswer(NamedTuple):
    """The answer to one inference.

    Attributes:
        arrays: the outputs by name.
        parameters: the answer's parameters, such as the server's times ``queue_s`` and ``compute_s``.
        timing: when it happened.
    """

    arrays: dict[str, Array]
    parameters: Mapping[str, Any]
    timing: Timing


class ArrayTransport(HttpBytes):
    """The way of arrays to a tail server over HTTP or HTTPS; ``HttpTransport`` is that of tensors."""

    def infer(
        self, model: str, arrays: Mapping[str, Array], codec: ArrayCodec, *, max_answer_bytes: int, deadline: Deadline
    ) -> ArrayAnswer:
        """Send named arrays and return the outputs of the rest of the model.

        Args:
            model: the model's name at the server.
            arrays: the arrays by name.
            codec: how to encode them.
            max_answer_bytes: the most bytes that the outputs have together. A longer answer is not read.
            deadline: when the call has to be over.

        Raises:
            EncodingError: the arrays could not be encoded; nothing was sent.
            ServerUnavailableError: no complete answer came in time.
            RequestRefusedError: the server answered with an error.
            ProtocolError: the answer is not one of this protocol, or larger than ``max_answer_bytes`` allows.
        """
        encode = functools.partial(encode_request, arrays, codec)
        asking = self._asking(model, None, arrays, encode, max_answer_bytes, deadline)
        body, header_bytes, timing = complete(asking, deadline)
        return ArrayAnswer(*decode_answer(body, header_bytes, max_bytes=max_answer_bytes), timing)


def encode_request(arrays: Mapping[str, Array], codec: ArrayCodec) -> Encoded:
    """Encode named arrays as an inference request with a checksum, which asks for binary outputs.

    Args:
        arrays: the arrays by name.
        codec: how to encode each.
    """
    entries, views = [], []
    for name, array in arrays.items():
        array = np.ascontiguousarray(array).reshape(array.shape)
        used, data = codec.encode(array, name)
        known = None if used == "raw" else used
        entries.append(json_text(described(name, _NAMES[array.dtype], array.shape, len(data), codec=known)))
        if array.size:
            views.append(data)
    return assembled(request_header(",".join(entries), crc32=True), views, True, crc32=True)


def decode_answer(
    body: Buffer, header_bytes: int | None, *, max_bytes: int
) -> tuple[dict[str, Array], Mapping[str, Any]]:
    """Return the arrays of an answer by name, and its parameters. The arrays are views of ``body`` where they can be.

    Args:
        body: the whole body.
        header_bytes: the value of ``Inference-Header-Content-Length``; None where it was not sent.
        max_bytes: the most bytes that arrays sent with a codec have together once they are decoded.

    Raises:
        ProtocolError: the body is no valid answer, or holds a tensor that NumPy has no dtype for.
        BodyTooLargeError: the header, or the decoded arrays, are larger than allowed.
    """
    head, parameters, payload = read_answer(body, header_bytes)
    arrays = {}
    for entry, offset in places(head.entries, payload):
        dtype = _DTYPES.get(entry.datatype)
        if dtype is None or entry.size_bytes is None or entry.quantization is not None:
            raise ProtocolError(
                f"{entry.where} must be binary data of a datatype that NumPy has ({', '.join(_DTYPES)}); got "
                f"{entry.datatype}{'' if entry.size_bytes is None else ' as bytes'}"
            )
        if entry.codec is not None:
            if entry.tensor_bytes > max_bytes:
                raise BodyTooLargeError(
                    f"{entry.where} has {entry.tensor_bytes} bytes once {entry.codec} is decoded; at most {max_bytes} "
                    "are accepted"
                )
            max_bytes -= entry.tensor_bytes
        arrays[entry.name] = _array(entry, dtype, payload, offset)
    return arrays, parameters


def _array(entry: Entry, dtype: np.dtype[Any], payload: memoryview | None, offset: int) -> Array:
    order = entry.order
    stored = entry.shape if order is None else tuple(entry.shape[dim] for dim in order)
    data = memoryview(b"" if payload is None else payload)[offset : offset + (entry.size_bytes or 0)]
    if entry.codec is not None:
        try:
            array = find_codec(entry.codec).decode(data, dtype, entry.shape, order)
        except CodecError as error:
            raise ProtocolError(f"{entry.where} does not decode as {entry.codec}: {error}") from None
    elif math.prod(stored) == 0:
        array = np.empty(stored, dtype)
    else:
        whole = np.frombuffer(data, np.uint8)
        if dtype == np.bool_ and whole.max() > 1:
            raise ProtocolError(
                f"the bytes of a BOOL tensor must be 0 or 1; {entry.where} holds a byte other than 0 and 1"
            )
        array = (whole if whole.ctypes.data % dtype.itemsize == 0 else whole.copy()).view(dtype).reshape(stored)
    return array if order is None else array.transpose(sorted(range(len(order)), key=order.__getitem__))
