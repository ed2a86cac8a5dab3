"""SIGHUP, at which a server reads its tokens and certificates again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from torchsurgeon.errors import ServerError
from torchsurgeon.serve.certificates import Certificates
from torchsurgeon.serve.tokens import Tokens


def reload_on_hangup(tokens: Tokens | None, certificates: Certificates | None, say: Callable[[str], None]) -> None:
    """Read files again whenever the process gets SIGHUP. In another thread than the main one, do nothing.

    Args:
        tokens: the tokens; None for a server without.
        certificates: the certificates; None for a server without.
        say: called with a line that says what was read, or why it was not.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def reload(signum: int, frame: object) -> None:
        if tokens is not None:
            try:
                say(f"reloaded {tokens.reload()} tokens")
            except ServerError as error:
                say(f"the tokens stay as they were: {error}")
        if certificates is not None:
            try:
                certificates.reload()
                say("reloaded the certificates, for new connections")
            except ServerError as error:
                say(f"the certificates stay as they were: {error}")

    signal.signal(signal.SIGHUP, reload)
