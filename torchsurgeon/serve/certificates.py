"""The certificates of a server, which are read anew without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from torchsurgeon.errors import ServerError, short


class Certificates:
    """The files of certificates, and the TLS context that they make.

    Args:
        cert: the certificate.
        key: its key; None where that stands in the certificate's file.
        client_ca: the certificates of those whose clients are let in; None to ask clients for no certificate.

    Raises:
        ServerError: a file cannot be read, or the key is not the certificate's.

    Attributes:
        cert: as given.
        key: as given.
        client_ca: as given.
        context: the context for the server's listening socket.
    """

    def __init__(self, cert: str, key: str | None = None, client_ca: str | None = None) -> None:
        self.cert, self.key, self.client_ca = cert, key, client_ca
        self.context = _Changeable(ssl.PROTOCOL_TLS_SERVER)
        self.reload()

    def reload(self) -> None:
        """Read the files again; they hold for new connections. An error leaves everything as it was.

        Raises:
            ServerError: as above.
        """
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            named = ", ".join(short(one) for one in (self.cert, self.key, self.client_ca) if one is not None)
            reason = "the first holds no key; give --tls-key FILE" if self._lacks_key() else short(error)
            raise ServerError(f"the certificates in {named} cannot be used: {reason}") from error
        self.context.present = context

    def _lacks_key(self) -> bool:
        cert = Path(self.cert)
        return self.key is None and cert.is_file() and b"PRIVATE KEY-" not in cert.read_bytes()


class _Changeable(ssl.SSLContext):
    """A context that leaves new connections to another one.

    Certificates could be loaded into one context again and again. But one that was taken out of the file of those whose
    clients are let in would stay in it.
    """

    present: ssl.SSLContext

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Begin a connection; called by asyncio."""
        return self.present.wrap_bio(*args, **kwargs)


def certificates_of(cert: str | None, key: str | None, client_ca: str | None) -> Certificates | None:
    """Return the certificates of a server; None for one without.

    Raises:
        ServerError: a file cannot be read, the key is not the certificate's, or a certificate is missing.
    """
    if cert is not None:
        return Certificates(cert, key, client_ca)
    if key is not None or client_ca is not None:
        raise ServerError("--tls-key and --tls-client-ca belong to a certificate; give --tls-cert FILE, too")
    return None
