"""Whether a server's model is the one on this side: the same graph, the same weights; without a tensor library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchsurgeon.errors import ModelMismatchError, ProtocolError, RequestRefusedError, short
from torchsurgeon.transport.base import ByteTransport

_LISTED = 5


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
            f"the server cannot tell fingerprints of a model {name!r} ({error}); "
            f"start it with: torchsurgeon serve {name}=SPEC"
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
    rows = []
    for tensor in dict.fromkeys([*ours.tensors, *theirs]):
        here = ours.tensors.get(tensor)
        there = theirs.get(tensor)
        if here != there:
            rows.append(f"{tensor} ({_described(here)} here, {_described(there)} on the server)")
    more = f", and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
    return (
        f"model {name!r} has other weights on the server: {', '.join(rows[:_LISTED])}{more}. "
        "Serve the weights this model was loaded with"
    )


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Mapping):
        return "absent"
    shape = tensor.get("shape")
    sizes = "×".join(map(str, shape)) if isinstance(shape, list) else str(shape)
    return f"{str(tensor.get('dtype'))[:16]}[{sizes[:64]}] {str(tensor.get('digest'))[:8]}"
