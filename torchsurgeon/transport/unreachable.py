"""Why a server was not reached, in words, and what to do about each cause: its name, its scheme, its certificate."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from urllib.parse import urlsplit

from torchsurgeon.errors import short
from torchsurgeon.transport.route import Route

_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
# What OpenSSL appends to its messages.
_PLACE = re.compile(r" \(_ssl\.c:\d+\)$")
# OpenSSL's codes of why a certificate is refused, X509_V_ERR_…: not yet valid, and expired.
_OUT_OF_DATE = (9, 10)
# A certificate for another name, e-mail address or IP address.
_OF_ANOTHER_NAME = (62, 63, 64)
# What the other end says where it speaks no TLS, by the version of OpenSSL.
_NO_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
_WANTS_A_CERTIFICATE = ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_CERTIFICATE_REQUIRED")


def unreachable(error: BaseException | None, route: Route, shown: str) -> str:
    """Return why a server was not reached and what to do, for the message of an error.

    Args:
        error: what was raised; None where the server has closed the connection.
        route: the way that was taken.
        shown: the server's URL as messages quote it.
    """
    inner, reason = _systems(error), in_words(error)
    if isinstance(inner, OSError) and inner.errno in _OUT_OF_FILES:
        return (
            f"{shown} could not be asked: {reason} in this process; close files or sockets, or raise its limit "
            "(ulimit -n)"
        )
    if isinstance(inner, ssl.SSLError) and route.url.startswith("https:"):
        said = _of_encryption(inner, reason, shown)
        if said is not None:
            return said
    if route.proxy is not None:
        return (
            f"{shown} cannot be reached{route.through}, or broke off ({reason}); are proxy and server running? "
            "no_proxy in the environment names hosts to reach without it"
        )
    if isinstance(inner, socket.gaierror):
        host = short(urlsplit(route.url).hostname or "", 100)
        if inner.errno == socket.EAI_AGAIN:
            return f"the host {host} of {shown} cannot be looked up now ({reason}); check its name and the network"
        return f"there is no host {host} ({reason}); check the name in {shown}"
    advice = "is the server running?"
    if isinstance(inner, ConnectionResetError | BrokenPipeError):
        if route.url.startswith("http:"):
            advice += f" If it serves https, write https{shown[4:]}"
        else:
            advice += " If it lets in only clients with a certificate, give cert="
    return f"{shown} does not answer, or broke off ({reason}); {advice}"


def _of_encryption(error: ssl.SSLError, reason: str, shown: str) -> str | None:
    """Return what to do about an error of TLS; None where nothing better is known than to look at the server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OUT_OF_DATE:
            return (
                f"the certificate of {shown} is out of date ({reason}); serve a newer one, or set this machine's clock"
            )
        if error.verify_code in _OF_ANOTHER_NAME:
            return (
                f"the certificate of {shown} is for another host ({reason}); write the name that it is for in the URL"
            )
        return (
            f"the certificate of {shown} is not trusted here ({reason}); give the file of the one that signed it: ca= "
            "of SplitModule, verify= of HttpTransport, --ca on the command line"
        )
    if error.reason in _NO_TLS:
        return f"{shown} answers, but not in https ({reason}); if it serves http, write http{shown[5:]}"
    if error.reason in _WANTS_A_CERTIFICATE:
        return f"{shown} lets in only clients with a certificate ({reason}); give cert= with one that it trusts"
    return None


def in_words(error: BaseException | None) -> str:
    """Return what went wrong, in the words of the system where they are known.

    requests and urllib3 wrap the system's error in several of their own, whose texts name internal objects.
    """
    inner = _systems(error)
    said = inner.strerror if isinstance(inner, OSError) and inner.strerror else inner
    return f"{type(inner).__name__}: {_PLACE.sub('', short(said, quote=False))}"


def _systems(error: BaseException | None) -> BaseException | None:
    """Return the system's error that others wrap; where there is none, the innermost."""
    inner = error
    for _ in range(8):
        if inner is None or (isinstance(inner, OSError) and inner.strerror):
            break
        wrapped = [getattr(inner, "reason", None), *inner.args, inner.__cause__]
        within = next((one for one in wrapped if isinstance(one, BaseException)), None)
        if within is None:
            break
        inner = within
    return inner
