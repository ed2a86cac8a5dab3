"""Why a server's answer was not used, and whether that speaks against the server."""

from __future__ import annotations

import dataclasses

from torchsurgeon._interrupts import NoThreadError
from torchsurgeon.errors import (
    CodecError,
    EncodingError,
    ModelMismatchError,
    ProtocolError,
    RequestRefusedError,
    ServerUnavailableError,
    short,
)


class MeteredError(ServerUnavailableError):
    """The request would be above what may be sent in this hour, so it was not sent, and no server is at fault."""


# HTTP statuses that blame the content of one request, not the server.
_REQUESTS_FAULT = (400, 413, 415, 422)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a server's answer was not used.

    Attributes:
        kind: one word, under which ``stats()`` counts it.
        text: what happened, for people.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

    @staticmethod
    def of(error: BaseException) -> Failure:
        """Return the failure that an error stands for."""
        for kinds, word in _WORDS:
            if isinstance(error, kinds):
                return Failure(word, str(error))
        return Failure("failed", f"{type(error).__name__}: {error}")

    @staticmethod
    def of_part(error: Exception) -> Failure:
        """Return the failure of a part of the model that has raised ``error`` on this device."""
        if isinstance(error, TypeError):
            return Failure("unlike", str(error))
        return Failure("unlike", f"a part of the model raised {type(error).__name__}: {short(error, 300)}")


_WORDS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((EncodingError,), "encoding"),
    ((NoThreadError,), "threads"),
    ((MeteredError,), "metered"),
    ((ModelMismatchError,), "mismatch"),
    ((RequestRefusedError,), "refused"),
    ((ServerUnavailableError, OSError), "unavailable"),
    ((ProtocolError, CodecError), "damaged"),
)


def is_requests_fault(error: BaseException) -> bool:
    """Return whether the server refused a request because of its content, so that the server itself may be well."""
    return isinstance(error, RequestRefusedError) and error.status in _REQUESTS_FAULT
