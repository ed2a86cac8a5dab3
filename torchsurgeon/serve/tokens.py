"""Who is let in: the tokens by which a server knows its clients, and the files of certificates."""

from __future__ import annotations

import hmac
import signal
import ssl
import threading
from collections.abc import Callable
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
        generation: how often the file was read. What was allowed by an earlier generation must be asked again.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.generation = 0
        self._tokens: tuple[bytes, ...] = ()
        self.reload()

    def reload(self) -> int:
        """Read the file again, and return how many tokens it holds. An error leaves the tokens as they were.

        Raises:
            ServerError: as above.
        """
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(f"the tokens in {short(self._path)} cannot be read: {short(error)}") from error
        found = []
        for number, line in enumerate(lines, 1):
            token = line.strip()
            if not token or token.startswith("#"):
                continue
            if len(token) < _LEAST_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
                # The token itself is not quoted.
                raise ServerError(
                    f"a token must have at least {_LEAST_CHARACTERS} printable ASCII characters and no space; that in "
                    f"line {number} of {short(self._path)} is another. python -c 'import secrets; "
                    "print(secrets.token_urlsafe())' makes one"
                )
            found.append(token.encode())
        if not found:
            raise ServerError(f"{short(self._path)} must hold at least one token, one a line; it holds none")
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


def reload_on_hangup(tokens: Tokens, say: Callable[[str], None]) -> None:
    """Read the file of tokens again whenever the process gets SIGHUP. In another thread than the main one, do nothing.

    Args:
        tokens: the tokens.
        say: called with a line that says what was read, or why it was not.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def reload(signum: int, frame: object) -> None:
        try:
            say(f"reloaded {tokens.reload()} tokens")
        except ServerError as error:
            say(f"the tokens stay as they were: {error}")

    signal.signal(signal.SIGHUP, reload)


def check_certificates(cert: str | None, key: str | None, client_ca: str | None) -> None:
    """Check that the files of certificates can be used, before anything is loaded.

    Raises:
        ServerError: a file cannot be read, the key is not the certificate's, or a certificate is missing.
    """
    if cert is None:
        if key is not None or client_ca is not None:
            raise ServerError("--tls-key and --tls-client-ca belong to a certificate; give --tls-cert FILE, too")
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except (OSError, ssl.SSLError) as error:
        named = ", ".join(short(one) for one in (cert, key, client_ca) if one is not None)
        raise ServerError(f"the certificates in {named} cannot be used: {short(error)}") from error
