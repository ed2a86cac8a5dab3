"""What a server says that only checks what it would do: ``torchsurgeon serve --check``."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from torchsurgeon.errors import ServerError, short
from torchsurgeon.serve.certificates import Certificates
from torchsurgeon.serve.connections import Connections
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.server import is_loopback, listen
from torchsurgeon.serve.tokens import Tokens

Say = Callable[[str], None]

_JOINED = {
    "off": "each request runs alone",
    "exact": "requests that wait run together as far as answers keep their bits",
    "rounded": "requests that wait run together, also where answers are the same to rounding only",
}


def tell_entrance(say: Say, url: str, host: str, tokens: Tokens | None, certificates: Certificates | None) -> None:
    """Tell where the server would listen, and whom it would let in."""
    say(f"would listen on {url}")
    if tokens is not None:
        say(f"clients need one of the {len(tokens)} tokens in {short(tokens.path)}")
    else:
        say(f"clients need no token: everyone on {'this machine' if is_loopback(host) else 'the network'} is let in")
    if certificates is not None:
        key = f" with the key in {short(certificates.key)}" if certificates.key is not None else ""
        say(f"the certificate is {short(certificates.cert)}{key}")
        if certificates.client_ca is not None:
            say(f"clients need a certificate that {short(certificates.client_ca)} has signed")


def tell_address(say: Say, host: str, port: int) -> bool:
    """Tell whether the address is free, and return it. The server that is to be replaced may still listen there.

    Raises:
        ServerError: this machine has no such address, or the port is not allowed.
    """
    try:
        listen(host, port).close()
    except ServerError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EADDRINUSE:
            raise
        say(f"another process listens on port {port} now; it has to end first")
        return False
    return True


def tell_limits(say: Say, registry: ModelRegistry, connections: Connections, grace_s: float) -> None:
    """Tell the limits that hold for all models."""
    say(
        f"a request has at most {registry.max_batch} samples; {registry.max_queue} of one model may wait; "
        f"{_JOINED[registry.batching]}"
    )
    say(
        f"at most {connections.limit} connections, {connections.most_per_address} of them from one address; requests "
        f"have {grace_s:g} s to end after SIGTERM"
    )


def tell_priorities(say: Say, tokens: Tokens | None, highest: str) -> None:
    """Tell whose share a request counts for, and which priorities clients may ask for."""
    whose = "address" if tokens is None else "token"
    say(f"while requests wait, each {whose} has an equal share; clients may ask for priorities up to {highest}")
    for name, own in () if tokens is None else sorted(tokens.own_priorities().items()):
        say(f"clients with the token {name} may ask for priorities up to {own}")


def tell_extras(say: Say, extras: Sequence[str]) -> None:
    """Tell what else the server would do, if anything."""
    if extras:
        say(f"also: {', '.join(extras)}")


def tell_models(say: Say, registry: ModelRegistry, *, is_free: bool) -> None:
    """Tell the limits that hold for each of the models, once they are loaded, and that the server can be started.

    Args:
        say: prints a line.
        registry: the models.
        is_free: whether the address is free.
    """
    for name, served in sorted(registry.loaded().items()):
        if served is not None:
            joined = f", up to {served.together} samples together" if served.together > 1 else ""
            say(
                f"requests of {name} have at most {served.max_body_bytes(binary=True)} bytes; "
                f"{served.worker.concurrency} run at once{joined}; tails run by {served.backends}"
            )
    when = "" if is_free else " once its port is free"
    say(f"this server can be started{when}: {', '.join(registry.names())}")
