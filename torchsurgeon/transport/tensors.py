"""The base class of transports: named tensors to a server, and its answer back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.codec import Codec
from torchsurgeon.transport.base import ByteTransport, Timing
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps, complete
from torchsurgeon.wire.body import Encoded


class Answer(NamedTuple):
    """The answer to one inference.

    Attributes:
        tensors: the outputs by name.
        parameters: the answer's parameters, such as the server's times ``queue_s`` and ``compute_s``.
        timing: when it happened.
    """

    tensors: dict[str, Tensor]
    parameters: Mapping[str, Any]
    timing: Timing


class Transport(ByteTransport):
    """The way of tensors to one tail server. Thread-safe, and a context manager that closes it.

    Args:
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
    """

    def infer(
        self,
        model: str,
        tensors: Mapping[str, Tensor],
        *,
        max_answer_bytes: int,
        version: str | None = None,
        outputs: Collection[str] = (),
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        codecs: Mapping[str, Codec] | None = None,
        output_codec: Codec | None = None,
        timeout_s: float | None = None,
        deadline: Deadline | None = None,
        crc32: bool = False,
    ) -> Answer:
        """Send named tensors and return the outputs of the rest of the model.

        Args:
            model: the model's name at the server.
            tensors: the tensors by name.
            max_answer_bytes: the most bytes that the output tensors have together. A longer answer is not read.
            version: the model's version; the server's default without one.
            outputs: names of the outputs to return; all of them by default.
            request_id: an id that the answer repeats.
            parameters: further parameters of the request.
            codecs: the codec of each tensor that is not sent as it lies in memory.
            output_codec: the codec to ask for in the answer.
            timeout_s: seconds that the call may take; the transport's by default.
            deadline: in place of ``timeout_s``: a deadline that another thread can cancel.
            crc32: whether both messages carry a checksum. torchsurgeon's servers understand that; others may not.

        Raises:
            EncodingError: the tensors could not be encoded; nothing was sent.
            ServerUnavailableError: no complete answer came in time.
            RequestRefusedError: the server answered with an error.
            ProtocolError: the answer is not one of this protocol, or larger than ``max_answer_bytes`` allows.
        """
        deadline = deadline or Deadline(self.timeout_s if timeout_s is None else timeout_s)
        encode = functools.partial(
            wire.encode_request,
            tensors,
            outputs=outputs,
            request_id=request_id,
            parameters=parameters,
            codecs=codecs,
            output_codec=output_codec,
            crc32=crc32,
        )
        return complete(self._inferring(model, version, tensors, encode, max_answer_bytes, deadline), deadline)

    def inferring(
        self,
        model: str,
        tensors: Mapping[str, Tensor],
        *,
        max_answer_bytes: int,
        parameters: Mapping[str, Any] | None,
        codecs: Mapping[str, Codec],
        output_codec: Codec | None,
        deadline: Deadline,
    ) -> Steps[Answer]:
        """Do what ``infer()`` does, with checksums and in steps; a ``SplitModule`` calls this.

        A subclass with an ``infer()`` of its own is asked by that, in one step.

        Args:
            model: as ``infer()`` takes it, like all that follow.
            tensors: the tensors by name.
            max_answer_bytes: the most bytes that the output tensors have together.
            parameters: further parameters of the request.
            codecs: the codec of each tensor.
            output_codec: the codec to ask for in the answer.
            deadline: when the call has to be over.
        """
        options: dict[str, Any] = {"parameters": parameters, "codecs": codecs, "output_codec": output_codec}
        if getattr(self.infer, "__func__", None) is not _INFER:
            yield None
            options |= {"max_answer_bytes": max_answer_bytes, "deadline": deadline}
            return self.infer(model, tensors, crc32=True, **options)
        encode = functools.partial(wire.encode_request, tensors, crc32=True, **options)
        return (yield from self._inferring(model, None, tensors, encode, max_answer_bytes, deadline))

    def _inferring(
        self,
        model: str,
        version: str | None,
        tensors: Mapping[str, Tensor],
        encode: Callable[[], Encoded],
        max_answer_bytes: int,
        deadline: Deadline,
    ) -> Steps[Answer]:
        asking = self._asking(model, version, tensors, encode, max_answer_bytes, deadline)
        body, header_bytes, timing = yield from asking
        response = wire.decode_response(body, header_bytes, max_decoded_bytes=max_answer_bytes)
        return Answer(response.tensors, response.parameters, timing)


# Kept, to notice where a subclass, or whoever replaces the method, has another.
_INFER = Transport.infer
