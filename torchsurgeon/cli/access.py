"""Arguments that say how a command is let in by a server: its token, and certificates."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from torchsurgeon.cli.arguments import file_argument
from torchsurgeon.errors import TorchSurgeonError, short


class Access(NamedTuple):
    """How a command is let in by a server.

    Attributes:
        token: sent with every request; None for none.
        ca: how the server's certificate is checked: True for as the system does, or the file with those that are
            trusted.
        cert: the command's own certificate: a file that holds its key too, or both files; None for none.
    """

    token: str | None
    ca: bool | str
    cert: str | tuple[str, str] | None


def access_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that ``access()`` reads."""
    file_argument(parser, "--token-file", "a file whose first token is sent with each request", "none is sent")
    parser.add_argument("--ca", metavar="FILE", help="the certificates that are trusted (default: the system's)")
    parser.add_argument("--tls-cert", metavar="FILE", help="a certificate to show to the server (default: none)")
    parser.add_argument("--tls-key", metavar="FILE", help="its key (default: in the certificate's file)")


def access(options: argparse.Namespace) -> Access:
    """Return what the arguments mean.

    Raises:
        TorchSurgeonError: a file cannot be read, a file has no token, or a certificate has no key.
    """
    token = None if options.token_file is None else _first_token(options.token_file)
    ca = options.ca
    if ca is not None and not Path(ca).exists():  # a folder of certificates is allowed, too
        raise TorchSurgeonError(f"--ca must be a file of certificates in PEM format; there is no file {short(ca)}")
    cert = None if options.tls_cert is None and options.tls_key is None else _cert(options.tls_cert, options.tls_key)
    return Access(token, True if ca is None else ca, cert)


def _first_token(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TorchSurgeonError(f"the token in {short(path)} cannot be read: {short(error)}") from error
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            return line.split()[0]  # a name and a priority may follow
    raise TorchSurgeonError(f"{short(path)} must hold a token in a line; it holds none")


def _cert(cert: str | None, key: str | None) -> str | tuple[str, str]:
    if cert is None:
        raise TorchSurgeonError("--tls-key is the key of a certificate, and none is given; give --tls-cert FILE, too")
    for option, file in (("--tls-cert", cert), ("--tls-key", key)):
        if file is not None and not Path(file).is_file():
            raise TorchSurgeonError(f"{option} must be a file in PEM format; there is no file {short(file)}")
    if key is not None:
        return cert, key
    if b"PRIVATE KEY-" not in Path(cert).read_bytes():
        raise TorchSurgeonError(f"a certificate needs its key, and {short(cert)} holds none; give --tls-key FILE")
    return cert
