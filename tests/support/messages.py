"""Messages of the wire format there and back, as if they had been sent.

``joined``      the one body that a message's buffers are
``asked``       a request as the server has it once it has arrived; it takes what ``wire.encode_request`` does
``answered``    an answer as the device has it once it has arrived; it takes what ``wire.encode_response`` does
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchsurgeon import wire


def joined(message: wire.Encoded) -> bytearray:
    body = bytearray(b"".join(message.buffers))
    assert len(body) == message.size_bytes
    return body


def asked(tensors: Mapping[str, Tensor], **options: Any) -> wire.InferRequest:
    message = wire.encode_request(tensors, **options)
    return wire.decode_request(joined(message), message.header_bytes)


def answered(tensors: Mapping[str, Tensor], version: str = "1", **options: Any) -> wire.InferResponse:
    message = wire.encode_response("m", version, tensors, **options)
    return wire.decode_response(joined(message), message.header_bytes)
