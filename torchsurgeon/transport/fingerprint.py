"""Whether a server's model is the one on this side: the same graph, the same weights; without a tensor library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from torchsurgeon.errors import ModelMismatchError, ProtocolError, RequestRefusedError, short
from torchsurgeon.transport.base import ByteTransport

_LISTED = 5
# So many tensors tell what differs; a line in an account of a call holds no more.
_NAMED = 2
_CASTS = {"float16": ".half()", "bfloat16": ".bfloat16()", "float32": ".float()", "float64": ".double()"}


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What identifies a model and its weights on this side.

    Attributes:
        graph: the graph's fingerprint.
        weights: the digest of all weights.
        tensors: by name of each weight its dtype, shape and digest, in the order in which differences are named.
        layers: by name of each layer its type, and digests of what it computes.
        inputs: the model's inputs, in words.
        whole: the layers that were kept whole.
    """

    graph: str
    weights: str
    tensors: Mapping[str, Mapping[str, Any]]
    layers: Mapping[str, Mapping[str, Any]]
    inputs: tuple[str, ...]
    whole: tuple[str, ...]


def fetch(
    transport: ByteTransport,
    name: str,
    weights: str,
    graph: str,
    ours: Callable[[], Fingerprint],
    timeout_s: float | None = None,
) -> Mapping[str, Any]:
    """Return a server's fingerprint, after checking that its model is this one.

    Args:
        transport: how to reach the server.
        name: the model's name there.
        weights: the digest of all weights on this side.
        graph: the graph's fingerprint on this side.
        ours: returns the whole fingerprint, from which the message of an error names what differs.
        timeout_s: the longest wait; the transport's own by default.

    Raises:
        ModelMismatchError: the server holds another model, or one whose code has changed since the server traced it;
            the message names what differs first.
        ServerError: the server does not answer, or refuses.
        ProtocolError: its fingerprint is not one of torchsurgeon's.
    """
    try:
        theirs = transport.get_json(f"/v2/models/{name}/fingerprint", timeout_s=timeout_s)
    except RequestRefusedError as error:
        if error.status != 404:
            raise
        raise ModelMismatchError(
            f"the server cannot tell fingerprints of a model {name!r} ({error}); {_where_else(transport, name)}"
        ) from None
    if not isinstance(theirs, dict) or not isinstance(theirs.get("tensors"), dict):
        raise ProtocolError("the server's fingerprint is not what torchsurgeon's servers answer")
    if theirs.get("changed") is not None:
        changed = short(str(theirs["changed"]), 1000, quote=False)
        raise ModelMismatchError(f"model {name!r} has changed on the server since it was traced there: {changed}")
    if theirs.get("weights") != weights:
        raise ModelMismatchError(_differing_weights(name, ours(), theirs["tensors"]))
    if theirs.get("graph") != graph:
        raise ModelMismatchError(_differing_graph(name, ours(), theirs))
    if not isinstance(theirs.get("layers"), dict):
        raise ModelMismatchError(
            f"the server tells no digests of model {name!r} layer by layer: its torchsurgeon is older, and does not "
            "compare functions, hooks and packed weights. Install the same torchsurgeon on both sides"
        )
    return theirs


def _where_else(transport: ByteTransport, name: str) -> str:
    """Return what to do where a server does not have the path of a model's fingerprint."""
    path = urlsplit(str(getattr(transport, "url", ""))).path.strip("/")
    start = f"start it with: torchsurgeon serve {name}=SPEC"
    if not path:
        return start
    # Only a proxy before the server can take a path away that precedes every path of the server.
    return (
        f"leave the path {short('/' + path, 100)} out of server=, unless a proxy before the server needs it, and then "
        f"{start}"
    )


def _differing_graph(name: str, ours: Fingerprint, theirs: Mapping[str, Any]) -> str:
    whole = ", ".join(ours.whole[:_LISTED]) or "none"
    return (
        f"model {name!r} has the same weights on both sides, but another graph: {ours.graph[:12]} here, "
        f"{str(theirs.get('graph'))[:12]} on the server. {_differing_layer(ours, theirs)}. Trace both with the same "
        f"example ({', '.join(ours.inputs)} here), the same leaf_modules (kept whole here: {whole}) and the "
        "same source of the model, with the same hooks"
    )


def _differing_layer(fingerprint: Fingerprint, theirs: Mapping[str, Any]) -> str:
    """Return in words which layer differs first, and in what."""
    ours, there = fingerprint.layers, theirs.get("layers")
    if not isinstance(there, dict):
        return "Which layer differs the server's older torchsurgeon does not say"
    for layer, mine in ours.items():
        other = there.get(layer)
        called = f"The first that differs is {short(layer)} ({mine['type']})"
        if not isinstance(other, dict) or not isinstance(other.get("aspects"), dict):
            return f"{called}, which the server's model does not have"
        if other.get("type") != mine["type"]:
            return f"{called}, which is {short(str(other.get('type')), 100)} on the server"
        aspects = {**mine["aspects"], **other["aspects"]}
        names = [key for key in aspects if mine["aspects"].get(key) != other["aspects"].get(key)]
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            return (
                f"{called}, in: {', '.join(short(key, 100) for key in names[:_LISTED])}{more}{_python(names, theirs)}"
            )
    missing = next((layer for layer in there if layer not in ours), None)
    if missing is not None:
        return f"The first that differs is {short(missing)} of the server, which the model here does not have"
    return "All layers are alike, but they are in another order, or differ after the first 10,000"


def _python(names: Sequence[str], theirs: Mapping[str, Any]) -> str:
    """Return the remark that functions without source differ between two versions of Python; mostly nothing."""
    here, there = sys.implementation.cache_tag, theirs.get("python")
    if here == there or not any(name.startswith("function") for name in names):
        return ""
    return f" (Python is {here} here and {short(str(there), 40)} there; functions without source differ between them)"


def _differing_weights(name: str, ours: Fingerprint, theirs: Mapping[str, Any]) -> str:
    """Return which tensors differ, and what to do: another model, other dtypes, or other values."""
    pairs = [
        (tensor, ours.tensors.get(tensor), theirs.get(tensor)) for tensor in dict.fromkeys([*ours.tensors, *theirs])
    ]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    shapes = [(_field(here, "shape"), _field(there, "shape")) for _, here, there in differing]
    unlike = [pair for pair, (here, there) in zip(differing, shapes, strict=True) if here is None or here != there]
    if unlike:
        # Names and shapes that are alike say little, so those that tell the models apart are named.
        return (
            f"model {name!r} of the server is another model: {_listed(unlike, digests=False)}. Give the name= under "
            f"which this model is served, or serve it as {name!r}"
        )
    here, there = (str(_field(differing[0][side], "dtype"))[:16] if differing else "" for side in (1, 2))
    if here != there and here in _CASTS and there in _CASTS:
        return (
            f"model {name!r} is in {here} here and in {there} on the server: {_listed(differing, digests=False)}. Call "
            f"{_CASTS[there]} on the model here, or {_CASTS[here]} where the server makes it"
        )
    return (
        f"model {name!r} has other weights on the server: {_listed(differing)}. Serve the weights this model was "
        "loaded with"
    )


def _field(tensor: Any, name: str) -> Any:
    return tensor.get(name) if isinstance(tensor, Mapping) else None


def _listed(differing: Sequence[tuple[str, Any, Any]], *, digests: bool = True) -> str:
    rows = [
        f"{short(tensor, 100, quote=False)} ({_described(here, digests)} here, {_described(there, digests)} on the "
        "server)"
        for tensor, here, there in differing[:_NAMED]
    ]
    more = f", and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return f"{', '.join(rows)}{more}"


def _described(tensor: Any, digest: bool) -> str:
    if not isinstance(tensor, Mapping):
        return "absent"
    shape = tensor.get("shape")
    sizes = "×".join(map(str, shape)) if isinstance(shape, list) else str(shape)
    said = f"{str(tensor.get('dtype'))[:16]}[{sizes[:64]}]"
    return f"{said} {str(tensor.get('digest'))[:8]}" if digest else said
