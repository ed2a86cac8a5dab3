"""A split model on a device without PyTorch: NumPy arrays in and out, ONNX Runtime, and the same server.

``torchsurgeon export`` writes a bundle on a machine with PyTorch. On the device, ``open()`` needs NumPy, ONNX Runtime
and requests. The device part of this package is also a wheel of its own, ``torchsurgeon-edge``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torchsurgeon.edge.bundle import Bundle, read
from torchsurgeon.edge.inference import EdgeInference
from torchsurgeon.edge.message import ArrayTransport
from torchsurgeon.edge.model import EdgeModel
from torchsurgeon.edge.server import EdgeServer
from torchsurgeon.edge.session import Sessions
from torchsurgeon.errors import AdaptError, BackendError, BundleError, CodecError, LinkError, is_finite, short
from torchsurgeon.link import Link
from torchsurgeon.planning.objective import Objective

__all__ = ["ArrayTransport", "Bundle", "EdgeInference", "EdgeModel", "open", "read"]

# An answer may have this many times the bytes of the example's, and at least these. The limit is only there so that a
# hostile server cannot fill the memory.
_LEAST_ANSWER_BYTES, _ANSWER_FACTOR = 64 << 20, 64


def open(
    folder: str | Path,
    server: str | ArrayTransport | None = None,
    *,
    name: str | None = None,
    partition: int | str = "auto",
    fallback: Literal["local", "error"] = "local",
    objective: str | Mapping[str, float] | Objective = "latency",
    codec: str | None = None,
    link: Link | str | None = None,
    timeout_s: float = 30.0,
    threads: int | None = None,
) -> EdgeModel:
    """Open a bundle, and return a model that is called with NumPy arrays and returns NumPy arrays.

    Every file is compared with its SHA-256, and the parts that calls may need are loaded. The server is asked by the
    first call, or by ``prepare()``.

    Args:
        folder: the folder that ``torchsurgeon export`` has written.
        server: the server's URL, or the way to it; None to run everything on the device.
        name: the model's name at the server; by default the one that the bundle was exported for.
        partition: ``"auto"`` to choose the cut at each call, ``"device"``, ``"server"``, or a point of the bundle by
            index or name.
        fallback: ``"local"`` to run the whole model on the device when the server does not answer; ``"error"`` to raise
            then. A bundle without the whole model needs ``"error"``.
        objective: what to minimize, as ``SplitModule`` takes it.
        codec: how to encode boundary arrays, in place of the codecs that the bundle was exported with; for a fitted
            codec of the bundle its name with a rate. Where the server lacks its file, another takes its place.
        link: the link, or its name, such as ``"wifi"``; by default it is measured before the first call.
        timeout_s: the longest wait for an answer.
        threads: threads of one run of a part; by default as many as ONNX Runtime chooses.

    Raises:
        BundleError: a file is missing or damaged, the bundle is of another version, or lacks what is asked for.
        BackendError: ONNX Runtime is missing, too old, or does not take a part.
        PartitionError: the bundle has no such point.
        CodecError: neither a device without PyTorch nor the bundle has such a codec.
        AdaptError: ``timeout_s`` is not a positive number.
        LinkError: there is no such link.
    """
    _check(fallback, codec, link, timeout_s, threads)
    bundle = read(folder)
    transport = ArrayTransport(server, timeout_s) if isinstance(server, str) else server
    limit = max(_LEAST_ANSWER_BYTES, _ANSWER_FACTOR * bundle.costs.answer_bytes)
    known = Link.parse(link) if isinstance(link, str) else link
    asked = None
    if transport is not None:
        asked = EdgeServer(transport, name or bundle.name, bundle, known, limit)
    return EdgeModel(
        bundle,
        asked,
        Sessions(bundle.folder, threads),
        partition=partition,
        fallback=fallback,
        objective=objective,
        codec=codec,
        timeout_s=timeout_s,
    )


def _check(fallback: object, codec: object, link: object, timeout_s: float, threads: object) -> None:
    """Raise where an option is none of its values, which would otherwise show only when a server is asked."""
    if fallback not in ("local", "error"):
        raise BundleError(f"fallback must be 'local' or 'error'; got {short(fallback)}")
    if codec is not None and not isinstance(codec, str):
        raise CodecError(f"codec must be the name of a codec; got {short(codec)}")
    if link is not None and not isinstance(link, str | Link):
        raise LinkError(f'link must be a Link, or a text such as "lte"; got {short(link)}')
    if not (is_finite(timeout_s) and timeout_s > 0):
        raise AdaptError(f"timeout_s must be a positive number of seconds; got {short(timeout_s)}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise BackendError(f"threads must be a whole number from 1 on; got {short(threads)}")
