"""Checks of what a ``SplitModule`` is made with, before the model is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchsurgeon.adapting import check_deadline
from torchsurgeon.backends import NAMES, find_backend, installed_backends
from torchsurgeon.backends import Backend as NamedBackend
from torchsurgeon.backends.eager import Eager
from torchsurgeon.codec import Codec, CodecTable, FittedCodec, find_codec
from torchsurgeon.codec.names import FITTED
from torchsurgeon.errors import (
    AdaptError,
    BackendError,
    CodecError,
    LinkError,
    PlanError,
    ServerUnavailableError,
    is_finite,
    short,
)
from torchsurgeon.link import Link
from torchsurgeon.runtime import Backend
from torchsurgeon.runtime.auto import AutoBackend
from torchsurgeon.runtime.compiled import compiler
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.transport import Transport
from torchsurgeon.wire.header import PRIORITIES

# The URL of a server, or a transport to it.
ServerAddress = str | Transport


def addresses_of(servers: object) -> Sequence[ServerAddress]:
    """Return the servers that were given, the preferred one first.

    Raises:
        ServerUnavailableError: they are neither URLs nor transports.
    """
    if isinstance(servers, (str, Transport)):
        return [servers]
    found: Any = [] if servers is None else servers
    if isinstance(found, bytes) or not isinstance(found, Sequence):
        several = False
    else:
        several = all(isinstance(one, (str, Transport)) for one in found)
    if not several:
        raise ServerUnavailableError(
            'server must be a URL such as "http://127.0.0.1:8000", a Transport, or a list of these; got '
            f"{short(servers)}"
        )
    addresses: Sequence[ServerAddress] = found
    return addresses


def check_options(
    fallback: object, deadline_s: float | None, timeout_s: float, compile: object, backend: object
) -> None:
    """Raise where an option is none of its values, or two of them contradict each other."""
    if fallback not in ("local", "error"):
        raise PlanError(
            f'fallback must be "local", for the device to answer, or "error", to raise; got {short(fallback)}'
        )
    if compile and backend is not None:
        raise BackendError("compile= and backend= both say what runs the heads and tails; give only one of them")
    if deadline_s is not None:
        check_deadline(deadline_s, 0.0, "")
    if not (is_finite(timeout_s) and timeout_s > 0):
        raise AdaptError(f"timeout_s must be a positive number of seconds; got {short(timeout_s)}")


def check_priority(priority: object) -> None:
    """Raise where a priority is none that servers know."""
    if priority is not None and priority not in PRIORITIES:
        raise AdaptError(f"priority must be one of {', '.join(PRIORITIES)}, or None; got {short(priority)}")


def backend_of(
    wanted: str | Backend | Sequence[str | Backend] | None, compile: bool | str, tolerance: float
) -> Backend | None:
    """Return what runs heads and tails: a function, or a backend of torchsurgeon that was given or named.

    Args:
        wanted: what was given as ``backend=``.
        compile: what was given as ``compile=``.
        tolerance: how far the backends that ``"auto"`` may choose deviate at most.

    Returns:
        None for eager PyTorch.

    Raises:
        BackendError: there is no such backend here.
    """
    if compile:
        return compiler(compile)
    if wanted == "auto":
        return AutoBackend([one for one in installed_backends() if one.tolerance <= tolerance])
    if isinstance(wanted, list | tuple):
        named = [find_backend(one) for one in wanted]
        return AutoBackend([one for one in named if not isinstance(one, Eager)])
    if isinstance(wanted, str | NamedBackend):
        found = find_backend(wanted)
        return None if isinstance(found, Eager) else found
    if wanted is None or callable(wanted):
        return wanted
    raise BackendError(
        f"backend must be one of {', '.join(NAMES)}, auto, a Backend, several of these, or a function from a module to "
        f"what runs it; got {short(wanted)}; compile= takes the name of a backend of torch.compile"
    )


def check_server_backend(wanted: object, tolerance: float, backend: object) -> None:
    """Raise where the backend to ask servers for is not named by a text, or the tolerance is none, or of no use."""
    if not isinstance(wanted, str | None):
        raise BackendError(
            f'server_backend must be the name of a backend, or "auto"; got {short(wanted)}; the server runs it'
        )
    if not (is_finite(tolerance) and tolerance >= 0):
        raise BackendError(f"tolerance must be a share of the largest magnitude, from 0 on; got {short(tolerance)}")
    if tolerance and "auto" not in (wanted, backend if isinstance(backend, str) else None):
        raise BackendError(
            'tolerance= says which backends "auto" may choose, and neither backend nor server_backend is "auto"; leave '
            'it out, or give one of them as "auto"'
        )


def link_of(wanted: object) -> Link | None:
    """Return the link that was given as itself or as a text that ``Link.parse()`` understands; None for none.

    Raises:
        LinkError: it is neither, or there is no such link.
    """
    if isinstance(wanted, str):
        return Link.parse(wanted)
    if not isinstance(wanted, Link | None):
        raise LinkError(f'link must be a Link, or a text such as "lte"; got {short(wanted)}')
    return wanted


def check_codecs(codecs: object) -> None:
    """Raise where measured codecs are of another type, or name a codec that is not here."""
    if not isinstance(codecs, CodecTable | None):
        raise CodecError(f"codecs must be a measured CodecTable; got {short(codecs)}; codec= takes the name of a codec")
    if isinstance(codecs, CodecTable):
        # A table may name fitted codecs whose files this process has not loaded.
        for name in {row.cost.codec for row in codecs.rows if row.cost.within_budget}:
            if name.startswith(FITTED):
                find_codec(name)


def check_exact(
    names: Sequence[str], table: CodecTable | None, *, compiled: bool, server_backend: str | None = None
) -> None:
    """Raise where an argument changes the bits of answers, although the module is to be exact."""
    if server_backend not in (None, "auto", Eager.name):
        raise BackendError(
            f"exact=True asks for the model's own bits, which servers give in eager PyTorch, and server_backend is "
            f'{short(server_backend, 60)}; leave it out, or give "eager", or leave out exact=True'
        )
    if compiled:
        raise BackendError(
            "compile= and backend= run the heads and tails in another way than the model, so that answers are the same "
            "to rounding only; leave them out, or leave out exact=True"
        )
    lossy = [name for name in names if name != Lossless.name and not find_codec(name).lossless]
    if table is not None:
        lossy += {row.cost.codec for row in table.rows if row.cost.within_budget and not row.cost.lossless}
    if lossy:
        raise CodecError(
            f"exact=True asks for the model's own bits, and codecs change them: {', '.join(sorted(lossy))[:200]}. "
            'Take "raw", "zstd" or "auto", a table measured without an accuracy budget, or leave out exact=True'
        )


def codec_name(wanted: str | Codec | Lossless) -> str:
    """Return the name of a codec that was given as itself or by its name, of which there may be no codec.

    Raises:
        CodecError: something else was given.
    """
    if isinstance(wanted, CodecTable):
        raise CodecError('codec takes a name such as "int8+zstd"; give a measured table as codecs=')
    if isinstance(wanted, FittedCodec):
        raise CodecError(f"{wanted.name} must be given at a rate in bits per value; take .at(rate), such as .at(2)")
    if isinstance(wanted, Codec | Lossless):
        return wanted.name
    if not isinstance(wanted, str):
        raise CodecError(f'a codec is named by a text, such as "int8+zstd"; got {short(wanted)}')
    return wanted


def codec_of(name: str) -> Codec | Lossless:
    """Return the codec of a name.

    Raises:
        CodecError: there is none of this name.
    """
    return Lossless() if name == Lossless.name else find_codec(name)
