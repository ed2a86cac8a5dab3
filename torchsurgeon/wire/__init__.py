"""Open Inference Protocol v2 (REST) with the binary tensor data extension: bytes to named tensors and back.

A message is a JSON header, padded with spaces to a multiple of 64 bytes, followed by the tensors' memory, little
endian, in the order the header lists them. Encoding copies no tensor that lies densely in CPU memory: it returns the
header and views of the tensors' own memory. Decoding returns tensors that are views of the message's buffer; only one
that does not lie on a 64-byte boundary there is copied, because kernels choose code paths, and with them the last
bits, by alignment.

A tensor whose dimensions are stored in another order than row-major (``channels_last`` and the like) travels as its
physical memory with the tensor parameter ``"dim_order"``: the permutation from the outermost to the innermost
dimension. A request says with the parameter ``"dim_order": true`` that its sender understands the same in the answer;
others get row-major answers. A tensor quantized per tensor travels as its integers (``UINT8``, ``INT8``, ``INT32``)
with the tensor parameter ``"quantized": {"scale": …, "zero_point": …}``. A tensor in fewer bytes names its
:class:`~torchsurgeon.wire.Codec` in the tensor parameter ``"codec"``; the request's parameter ``"output_codec"`` asks
for one in the answer.

The request's parameter ``"crc32": true`` says that its body ends in four bytes more, and asks for the same in a binary
answer: the CRC-32 of all before them (RFC 1952), least significant byte first. A TCP checksum misses one damaged packet
in 65,536, and no other part of a message would tell that a tensor's bytes are not those that were sent.

Specification: https://github.com/kserve/open-inference-protocol and the binary tensor data extension of
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
Every malformed message is a :class:`~torchsurgeon.wire.ProtocolError` that says what is wrong with it.
"""

from __future__ import annotations

from torchsurgeon.wire.header import HEADER_LENGTH, MAX_HEADER_BYTES, Buffer, RequestedOutput, header_length, parse_json
from torchsurgeon.wire.message import (
    Encoded,
    InferRequest,
    InferResponse,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from torchsurgeon.wire.tensors import datatype_of

__all__ = [
    "HEADER_LENGTH",
    "MAX_HEADER_BYTES",
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
