"""Who is let in: the tokens by which a server knows its clients."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import NamedTuple

from torchsurgeon.errors import ServerError, short

_LEAST_CHARACTERS = 16
_SCHEME = b"bearer "


class Tokens:
    """The tokens in a file, one a line. Blank lines, and lines that begin with ``#``, are left out.

    Args:
        path: the file.

    Raises:
        ServerError: the file cannot be read, holds no token, or one that is too short or no ASCII.

    Attributes:
        path: as given.
        generation: how often the file was read. What was allowed by an earlier generation must be asked again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.generation = 0
        self._tokens: tuple[bytes, ...] = ()
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
            token = line.strip()
            if not token or token.startswith("#"):
                continue
            if len(token) < _LEAST_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
                # The token itself is not quoted.
                raise ServerError(
                    f"a token must have at least {_LEAST_CHARACTERS} printable ASCII characters and no space; that in "
                    f"line {number} of {short(self.path)} is another. python -c 'import secrets; "
                    "print(secrets.token_urlsafe())' makes one"
                )
            found.append(token.encode())
        if not found:
            raise ServerError(f"{short(self.path)} must hold at least one token, one a line; it holds none")
        self._tokens = tuple(found)
        self.generation += 1
        return len(found)

    def allow(self, authorization: bytes | None) -> bool:
        """Return whether the value of a request's ``Authorization`` is ``Bearer`` and one of the tokens.

        How long that takes does not depend on where a wrong token differs, nor on which token it is.
        """
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        given = authorization[len(_SCHEME) :].strip()
        same = [hmac.compare_digest(given, token) for token in self._tokens]
        return any(same)


class Allowed(NamedTuple):
    """The tokens by which a request was allowed, and which generation of them; None where none were asked for."""

    tokens: Tokens | None
    generation: int

    def holds(self) -> bool:
        """Return whether the tokens are still the same."""
        return self.tokens is None or self.tokens.generation == self.generation
