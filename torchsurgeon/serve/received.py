"""An inference request whose body has arrived, and the id by which logs and answers name it."""

from __future__ import annotations

import ipaddress
import itertools
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from torchsurgeon.serve.failure import ExpiredError, GoneError
from torchsurgeon.serve.fairness import NORMAL

REQUEST_ID = b"x-request-id"
TRACEPARENT = b"traceparent"

# What a client may name its request. Anything else could break a line of the log, or forge one.
_VALID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# In a longer header nothing is looked for that other requests have in common.
_MOST_HEADER_BYTES = 4096
# A member "id" of the header, or of an object in it. No quotation mark inside a JSON string stands behind a brace, a
# comma or a space without being escaped, so this is never a part of a string. What stands before it is looked at last:
# a pattern that begins with given characters is found several times as fast.
_ID = re.compile(rb'"id"(?<=[{,\s]"id")\s*:\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*,?\s*')
# Two processes, or one that was started again, must not give the same ids.
_PREFIX = os.urandom(4).hex()
_numbers = itertools.count(1)


def given_id(value: bytes | None) -> str | None:
    """Return the id that a client gave its request in ``X-Request-Id``; None where there is none, or no valid one."""
    return value.decode() if value is not None and _VALID.fullmatch(value) else None


def new_id() -> str:
    """Return an id for a request whose client gave none."""
    return f"{_PREFIX}-{next(_numbers)}"


def address_text(client: tuple[str, int]) -> str:
    """Return a client's address and port as the log writes them."""
    host, port = client
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@lru_cache(maxsize=1024)
def _host_in(client: str) -> str:
    """Return whose share a client's requests count for, by its address and port."""
    host = client.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4 or address.ipv4_mapped is not None:
        return host
    # Whoever has one address of IPv6 has, as a rule, all that begin with the same 64 bits.
    return str(ipaddress.ip_network((address, 64), strict=False))


@dataclass(eq=False)
class Received:
    """A request's body as it arrived, and what is to be said of the request.

    Attributes:
        body: the body.
        header_bytes: length of its JSON header; None where the whole body is JSON.
        receive_s: seconds from the request's head to the end of its body.
        arrived_s: when the body was complete, in seconds of ``time.perf_counter``.
        client: the client's address and port; empty where they are not known.
        given_id: the id that the client gave it; None where it gave none.
        model: the name of the model that is asked for.
        cut: the names of the tensors that were sent; empty before they have been read.
        due_s: when the answer is due, in seconds of ``time.perf_counter``; infinity where the client gave no deadline.
        gone: whether the client has left.
        queued: whether it was handed to a thread, so that its client can leave while it runs.
        kind: what requests have in common that can run together; None for one that runs alone.
        holder: the name of the token by which its client was let in; empty where no token is asked for.
        level: its priority, as an index of ``wire.PRIORITIES``.
        notes_later: whether whoever sends the answer calls ``note`` once it is on its way, so that it need not wait.
        note: takes notice of what the request took; None where that is done, or where it was not answered.
    """

    body: memoryview
    header_bytes: int | None
    receive_s: float
    arrived_s: float
    client: str = ""
    given_id: str | None = None
    model: str = ""
    cut: str = ""
    due_s: float = math.inf
    gone: bool = False
    queued: bool = False
    kind: bytes | None = None
    holder: str = ""
    level: int = NORMAL
    notes_later: bool = False
    note: Callable[[], None] | None = None
    _made_id: str | None = field(default=None, init=False)
    _alike: bytes | int | None = field(default=None, init=False)

    @property
    def request_id(self) -> str:
        """The id that the client gave the request, or one that is made at the first use."""
        if self.given_id is not None:
            return self.given_id
        if self._made_id is None:
            self._made_id = new_id()
        return self._made_id

    @property
    def alike(self) -> bytes | int:
        """What it has in common with requests for the same tensors, which are run in the same way and take as long.

        That is the text of its JSON header without the request's own "id", or the length of its body where it has no
        such header, or a very long one.
        """
        if self._alike is None:
            size = self.header_bytes
            if size is None or size > _MOST_HEADER_BYTES:
                self._alike = len(self.body)
            else:
                text = bytes(self.body[:size])
                # The header is padded behind the id.
                self._alike = _ID.sub(b"", text).rstrip() if b'"id"' in text else text
        return self._alike

    @property
    def share(self) -> str:
        """Whose share of the server it counts for: the token's name, or else the client's address."""
        return self.holder or _host_in(self.client)

    def over(self) -> bool:
        """Return whether nobody waits for the answer any more. It is called before each layer."""
        return self.gone or time.perf_counter() > self.due_s

    def check(self) -> None:
        """Check that somebody still waits for the answer.

        Raises:
            GoneError: the client has left.
            ExpiredError: the deadline has passed.
        """
        if self.gone:
            raise GoneError("the client left before its answer")
        late_s = time.perf_counter() - self.due_s
        if late_s > 0:
            raise ExpiredError(
                f"the request's deadline passed {late_s:.3g} s ago, before it was answered; ask with a later one, or "
                "ask another server"
            )

    def about(self) -> dict[str, str]:
        """Return what a line of the log says of the request besides its message."""
        return {"client": self.client, "request_id": self.request_id, "model": self.model, "cut": self.cut}
