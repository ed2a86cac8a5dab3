"""Whether a server's model is this model: the same graph, the same weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from torchsurgeon.errors import ModelMismatchError, is_finite, short
from torchsurgeon.models.arithmetic import Arithmetic, ArithmeticReader
from torchsurgeon.models.premises import REMEDY, Premises
from torchsurgeon.models.watching import Patrol, WatchedWeights
from torchsurgeon.models.weights import WeightDigests, weight_digests
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.reading import plain_tensors
from torchsurgeon.transport import Transport
from torchsurgeon.transport.fingerprint import Fingerprint, fetch

# What is asked at every inference, looked up once.
_count_function_modes = torch._C._len_torch_function_stack
_count_dispatch_modes = torch._C._len_torch_dispatch_stack


class Agreed(NamedTuple):
    """What a server told at a handshake.

    Attributes:
        identity: the identity that its answers carry.
        arithmetic: what it computes with; None where it does not tell.
        fitted: the digests of the fitted codecs that it has for this model, by name.
        backends: what may run tails there, its own choice first, each with how far its answers may be from eager
            PyTorch's; empty where it does not tell.
    """

    identity: str | None
    arithmetic: Arithmetic | None
    fitted: Mapping[str, str]
    backends: Mapping[str, float]


class LocalModel:
    """The model on this side: whether it may run, whether it has changed, and its weights' digests. Thread-safe.

    Attributes:
        graph: the traced model.
        epoch: how often its weights have changed, or something else asked for another handshake (``again()``). A
            handshake holds only for the epoch in which it was made.
        arithmetic: reads what this device computes the model with.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self.epoch = 0
        self._reading = graph.reading
        self._premises = Premises(graph.model, self._reading)
        self._other_path: str | None = None
        self._weights = self._watched()
        self._digests: WeightDigests | None = None
        self._patrol = Patrol(self._weights_now)
        self.arithmetic = ArithmeticReader(graph.model)
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the locks, which threads of the parent may hold."""
        self._lock, self._digesting = threading.RLock(), threading.Lock()

    def _watched(self) -> WatchedWeights:
        return WatchedWeights(self.graph.model, plain_tensors(self.graph.model, self._reading).values())

    def _weights_now(self) -> WatchedWeights:
        return self._weights

    def departed(self) -> str | None:
        """Return in a sentence what has changed since the model was traced, besides weights; None if nothing has.

        It may be a submodule, hook, mode, function, an attribute that the model reads, or a tensor whose elements
        decide which path the model takes. It is called at every inference.
        """
        premises = self._premises
        if self._other_path is None and premises.hold():
            return None
        broken = premises.broken()
        if broken is None and not premises.hold():
            # Other objects of the same meaning, or attributes that compute nothing: from now on those are compared.
            self._premises = Premises(self.graph.model, self._reading.again())
        if self._other_path is not None:
            self._other_path = self._path_changed()
        return broken or self._other_path

    def used(self) -> None:
        """Note that the model is in use, so that its weights are worth watching."""
        self._patrol.used()

    def close(self) -> None:
        """End the thread that watches the weights. Closing twice is harmless."""
        self._patrol.close()

    def watch(self) -> WatchedWeights:
        """Return the weights of the present epoch, whose bytes a thread compares from now on while they are in use."""
        weights = self._weights
        weights.remember()
        self._patrol.start()
        return weights

    @property
    def weights(self) -> WatchedWeights:
        """The weights of the present epoch. They are another object once a change has been noticed."""
        return self._weights

    def changed(self, since: WatchedWeights) -> bool:
        """Return whether the weights have changed since they were ``since``, as far as that shows at once."""
        return since is not self._weights or not since.same()

    def renew(self, *, in_full: bool = False) -> bool:
        """Begin another epoch if the weights have changed, and return whether they have.

        If tensors have changed that decide which path the model takes, or are gone, ``departed()`` says so from now on.

        Args:
            in_full: True to read all weights.
        """
        weights = self._weights
        if weights.same_in_full() if in_full else weights.same(quickly=True):
            return False
        with self._lock:
            if self._weights is weights:
                self._other_path = self._path_changed()
                self._weights = self._watched()
                self._digests = None
                self.epoch += 1
        return True

    def _path_changed(self) -> str | None:
        name = self.graph.decides_anew()
        if name is None:
            changed = self._premises.tensor_gained_or_lost() or self.graph.reformed()
            return None if changed is None else f"{changed}; {REMEDY}"
        return (
            f"{short(name)} has changed since the model was traced, and its elements decide which path the model "
            "takes; set it back, or call prepare() on the SplitModule, which traces the model anew"
        )

    def again(self) -> None:
        """Begin another epoch, although the weights have not changed."""
        with self._lock:
            self.epoch += 1

    def digests(self) -> tuple[int, WeightDigests]:
        """Return the epoch and the digests of its weights, which are computed when first asked for.

        From then on, a background thread compares the weights' bytes while the model is in use.
        """
        # Calls never wait for this lock, unlike the other one.
        with self._digesting:
            with self._lock:
                epoch, weights, digests = self.epoch, self._weights, self._digests
            if digests is None:
                weights.remember()
                self._other_path = self._path_changed()
                digests = weight_digests(self.graph.model, self._reading)
                with self._lock:
                    if self._weights is weights:
                        self._digests = digests
        self._patrol.start()
        return epoch, digests


def autocast_mismatch() -> ModelMismatchError | None:
    """Return the error to raise while autocast is on, since servers run the model without it; None while it is off."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return None
    return ModelMismatchError(
        "autocast is on here, and the server runs the model without it; call the SplitModule outside autocast, "
        "or have the model itself in the lower precision on both sides"
    )


def changed_midway() -> ModelMismatchError:
    """Return the error to raise where weights have changed during a call that the device does not answer by itself."""
    return ModelMismatchError("this model's weights have changed since this call began; call it again")


def mode_here() -> str | None:
    """Return what to say of a mode that acts on each operator in this thread, which no server runs; None for none."""
    if not (_count_function_modes() or _count_dispatch_modes()):
        return None
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    # That of torch.set_default_device() and "with torch.device(…)" only says where new tensors are made.
    names = [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]
    if not names:
        return None
    named = short(names[-1], 100, quote=False)
    return f"{named} is active here, a mode that may see or change each operator, and no server runs it"


def shake_hands(
    transport: Transport, name: str, graph: LayerGraph, ours: WeightDigests, timeout_s: float | None = None
) -> Agreed:
    """Check that the server's model is this model, and return what else the server told.

    Args:
        transport: how to reach the server.
        name: the model's name there.
        graph: the model on this side.
        ours: the digests of its weights.
        timeout_s: the longest wait; the transport's own by default.

    Raises:
        ModelMismatchError: the server holds another model, or one whose code has changed since the server traced it;
            the message names what differs first.
        ServerError: the server does not answer, or refuses.
        ProtocolError: its fingerprint is not one of torchsurgeon's.
    """
    fingerprint = functools.partial(fingerprint_of, graph, ours)
    theirs = fetch(transport, name, ours.combined, graph.fingerprint, fingerprint, timeout_s)
    fitted = theirs.get("fitted_codecs")
    return Agreed(
        theirs.get("identity"),
        Arithmetic.from_json(theirs.get("arithmetic")),
        {str(k): str(v) for k, v in fitted.items()} if isinstance(fitted, dict) else {},
        _backends(theirs.get("backends")),
    )


def _backends(told: object) -> dict[str, float]:
    """Return the backends that a server has told of, by name, in its order; those that make no sense are left out."""
    found: dict[str, float] = {}
    for one in told if isinstance(told, list) else []:
        name, far = (one.get("name"), one.get("tolerance")) if isinstance(one, dict) else (None, None)
        if isinstance(name, str) and isinstance(far, int | float) and is_finite(far) and far >= 0:
            found[name] = float(far)
    return found


def fingerprint_of(graph: LayerGraph, weights: WeightDigests) -> Fingerprint:
    """Return what identifies a model and its weights.

    Args:
        graph: the traced model.
        weights: the digests of its weights.
    """
    digests = {name: one.to_json() for name, one in weights.tensors.items()}
    order = [name for name in graph.model.state_dict(keep_vars=True) if name in digests]
    return Fingerprint(
        graph=graph.fingerprint,
        weights=weights.combined,
        tensors={name: digests[name] for name in dict.fromkeys([*order, *digests])},
        layers=graph.configuration.layers(),
        inputs=tuple(map(str, graph.inputs)),
        whole=tuple(graph.opaque),
    )
