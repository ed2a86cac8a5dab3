"""Open Inference Protocol v2 (REST) with the binary tensor data extension: named tensors to bytes and back.

A message is a JSON header, padded with spaces to a multiple of 64 bytes, followed by the tensors' memory, little
endian, in the order in which the header lists them. Encoding copies no tensor that lies densely in CPU memory: it
returns the header and views of the tensors' own memory. Decoding returns tensors that are views of the message's
buffer. A tensor that does not start at a 64-byte boundary of that buffer is copied to one, because kernels choose their
code path, and so the last bits of their results, by alignment.

A tensor whose dimensions are stored in another order than row-major (``channels_last`` and the like) travels as its
physical memory with the tensor parameter ``"dim_order"``: the permutation from the outermost to the innermost
dimension. With the request parameter ``"dim_order": true`` a client declares that it understands this parameter in the
answer; other clients get row-major answers. A tensor quantized per tensor travels as its integers (``UINT8``, ``INT8``,
``INT32``) with the tensor parameter ``"quantized": {"scale": …, "zero_point": …}``. A tensor that is encoded to fewer
bytes names its ``Codec`` in the tensor parameter ``"codec"``. The request parameter ``"output_codec"`` asks for a codec
in the answer.

With the request parameter ``"crc32": true`` the body ends in four more bytes, and so does a binary answer: the CRC-32
(RFC 1952) of everything before them, least significant byte first. It is there because a TCP checksum misses one
damaged packet in 65,536, and nothing else in a message shows that a tensor's bytes were damaged.

Specification: https://github.com/kserve/open-inference-protocol and the binary tensor data extension of
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md. Every malformed
message raises ``ProtocolError``, which says what is wrong with the message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

__all__ = [
    "DEADLINE",
    "HEADER_LENGTH",
    "MAX_HEADER_BYTES",
    "PRIORITIES",
    "PRIORITY",
    "Buffer",
    "Encoded",
    "InferRequest",
    "InferResponse",
    "RequestedOutput",
    "datatype_of",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
    "header_length",
    "parse_json",
]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "header": (
                "DEADLINE",
                "HEADER_LENGTH",
                "MAX_HEADER_BYTES",
                "PRIORITIES",
                "PRIORITY",
                "Buffer",
                "RequestedOutput",
                "header_length",
                "parse_json",
            ),
            "body": ("Encoded",),
            "message": (
                "InferRequest",
                "InferResponse",
                "decode_request",
                "decode_response",
                "encode_request",
                "encode_response",
            ),
            "tensors": ("datatype_of",),
        },
    )
else:
    from torchsurgeon.wire.body import Encoded as Encoded
    from torchsurgeon.wire.header import DEADLINE as DEADLINE
    from torchsurgeon.wire.header import HEADER_LENGTH as HEADER_LENGTH
    from torchsurgeon.wire.header import MAX_HEADER_BYTES as MAX_HEADER_BYTES
    from torchsurgeon.wire.header import PRIORITIES as PRIORITIES
    from torchsurgeon.wire.header import PRIORITY as PRIORITY
    from torchsurgeon.wire.header import Buffer as Buffer
    from torchsurgeon.wire.header import RequestedOutput as RequestedOutput
    from torchsurgeon.wire.header import header_length as header_length
    from torchsurgeon.wire.header import parse_json as parse_json
    from torchsurgeon.wire.message import InferRequest as InferRequest
    from torchsurgeon.wire.message import InferResponse as InferResponse
    from torchsurgeon.wire.message import decode_request as decode_request
    from torchsurgeon.wire.message import decode_response as decode_response
    from torchsurgeon.wire.message import encode_request as encode_request
    from torchsurgeon.wire.message import encode_response as encode_response
    from torchsurgeon.wire.tensors import datatype_of as datatype_of
