"""Who is let in: the tokens by which a server knows its clients."""

from __future__ import annotations

import hmac
import re
from pathlib import Path
from typing import NamedTuple

from torchsurgeon.errors import ServerError, short
from torchsurgeon.wire.header import PRIORITIES

_LEAST_CHARACTERS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEME = b"bearer "


class Holder(NamedTuple):
    """A client, as far as the server knows it.

    Attributes:
        name: whose share of the server its requests count for; empty for that of its address.
        highest: the highest priority that it may ask for, as an index of ``wire.PRIORITIES``; None for the highest
            that everyone may ask for.
    """

    name: str = ""
    highest: int | None = None


class Tokens:
    """The tokens in a file, one a line. Blank lines, and lines that begin with ``#``, are left out.

    Behind a token, its line may say ``name=NAME``, for tokens whose clients have one share of the server together, and
    ``priority=high``, ``normal`` or ``low``, the highest priority that its client may ask for.

    Args:
        path: the file.

    Raises:
        ServerError: the file cannot be read, holds no token, one that is too short or no ASCII, or one with a name or
            a priority that is not valid.

    Attributes:
        path: as given.
        generation: how often the file was read. What was allowed by an earlier generation must be asked again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.generation = 0
        self._tokens: tuple[tuple[bytes, Holder], ...] = ()
        self.reload()

    def __len__(self) -> int:
        return len(self._tokens)

    def reload(self) -> int:
        """Read the file again, and return how many tokens it holds. An error leaves the tokens as they were.

        Raises:
            ServerError: as above.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(f"the tokens in {short(self.path)} cannot be read: {short(error)}") from error
        found = []
        for number, line in enumerate(lines, 1):
            token, *rest = line.split() or [""]
            if not token or token.startswith("#"):
                continue
            if len(token) < _LEAST_CHARACTERS or not token.isascii() or not token.isprintable():
                # The token itself is not quoted.
                raise ServerError(
                    f"a token must have at least {_LEAST_CHARACTERS} printable ASCII characters and no space; that in "
                    f"line {number} of {short(self.path)} is another. python -c 'import secrets; "
                    "print(secrets.token_urlsafe())' makes one"
                )
            found.append((token.encode(), self._holder(rest, number)))
        if not found:
            raise ServerError(f"{short(self.path)} must hold at least one token, one a line; it holds none")
        self._tokens = tuple(found)
        self.generation += 1
        return len(found)

    def holder_of(self, authorization: bytes | None) -> Holder | None:
        """Return whose token is in a request's ``Authorization``; None where it is not ``Bearer`` and a known token.

        How long that takes does not depend on where a wrong token differs, nor on which token it is.
        """
        if authorization is None or not is_bearer(authorization):
            return None
        given = authorization[len(_SCHEME) :].strip()
        same = [holder for token, holder in self._tokens if hmac.compare_digest(given, token)]
        return same[0] if same else None

    def own_priorities(self) -> dict[str, str]:
        """Return the highest priority of each client for which the file says one, by the client's name."""
        holders = [holder for _, holder in self._tokens]
        return {one.name: PRIORITIES[one.highest] for one in holders if one.highest is not None}

    def _holder(self, words: list[str], number: int) -> Holder:
        """Return what a line says of a token's client.

        Args:
            words: what stands behind the token.
            number: the line's number, which names a client that has no other name.
        """
        said = dict(word.partition("=")[::2] for word in words)
        name, priority = said.pop("name", f"line-{number}"), said.pop("priority", None)
        if said or not _NAME.fullmatch(name) or priority not in (None, *PRIORITIES):
            # They are not quoted, since they may be a part of a token.
            raise ServerError(
                "behind a token there may be name=NAME, of letters, digits, '.', '_' and '-', and priority= with one "
                f"of {', '.join(PRIORITIES)}; line {number} of {short(self.path)} has something else"
            )
        return Holder(name, None if priority is None else PRIORITIES.index(priority))


def is_bearer(authorization: bytes) -> bool:
    """Return whether a request's ``Authorization`` holds a token, known or not."""
    return authorization[: len(_SCHEME)].lower() == _SCHEME


class Allowed(NamedTuple):
    """The tokens by which a request was allowed, and which generation of them; None where none were asked for."""

    tokens: Tokens | None
    generation: int

    def holds(self) -> bool:
        """Return whether the tokens are still the same."""
        return self.tokens is None or self.tokens.generation == self.generation
