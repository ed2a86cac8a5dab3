"""A served model from one change of its weights to the next, and what its answers say of it.

Clients shake hands on a fingerprint, and every answer carries the fingerprint's identity. So an answer may carry it
only if it was computed with the weights and the code that the fingerprint tells of.
"""

from __future__ import annotations

import operator
import sys
import threading
import time
from typing import Any

import torch

from torchsurgeon.errors import ModelNotReadyError, short
from torchsurgeon.models.premises import Premises
from torchsurgeon.models.watching import Patrol, WatchedWeights
from torchsurgeon.models.weights import identity, weight_digests
from torchsurgeon.serve.recent import Recent
from torchsurgeon.serve.tails import RequestPlan, Tails
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.reading import plain_tensors

# The identity in answers that were computed with other weights or other code than the fingerprint tells of. Clients
# then ask for the fingerprint again, which never has this identity itself.
CHANGED = "changed"
_TRAINING = operator.attrgetter("training")
# How often digests are computed for one fingerprint, where the weights change meanwhile.
_TRIES = 3
_REMEDY = "take that back on the server, or serve the model anew"


class Edition:
    """A served model between two changes of its weights.

    Attributes:
        tails: its tails. They may hold parameters of the model that are replaced in the next edition.
        plans: how requests are run, by what they have in common. A plan keeps its tail alive, so there are not more
            plans than tails.
        weights: its weights; None before anybody has asked for the fingerprint.
        fingerprint: the digests of graph, layers and weights; empty before anybody has asked for it.
        compared_s: when its weights were last compared in full (``time.monotonic``).
    """

    def __init__(self, graph: LayerGraph, max_tails: int) -> None:
        self.tails = Tails(graph, max_tails)
        self.plans: Recent[object, RequestPlan] = Recent(max_tails)
        self.weights: WatchedWeights | None = None
        self.fingerprint: dict[str, Any] = {}
        self.compared_s = 0.0

    @property
    def known_weights(self) -> str | None:
        """The digest of its weights; None before anybody has asked for the fingerprint."""
        return self.fingerprint.get("weights")

    def holds(self, asked_s: float) -> bool:
        """Return whether its fingerprint still tells of the weights, as they were at ``asked_s`` or later."""
        if self.weights is None:
            return False
        if self.compared_s >= asked_s:
            return self.weights.same()
        self.compared_s = time.monotonic()
        return self.weights.same_in_full()


class Editions:
    """The editions of one served model, of which one is present. Thread-safe.

    Args:
        name: the model's name.
        graph: the traced model, which has not changed since it was traced.
        max_tails: how many tails to keep.

    Attributes:
        present: the present edition. A request has to take it before it begins, and to ask for the identity of the same
            edition after its answer is computed.
    """

    def __init__(self, name: str, graph: LayerGraph, max_tails: int) -> None:
        self._name, self._graph, self._max_tails = name, graph, max_tails
        self.present = Edition(graph, max_tails)
        self._modules = list(graph.model.modules())
        self._premises = Premises(graph.model, graph.reading)
        self._patrol = Patrol(self._weights_now)
        self._lock = threading.Lock()

    def _weights_now(self) -> WatchedWeights | None:
        return self.present.weights

    def refuse_training(self) -> None:
        """Raise while the program trains the model: a request would then count in its batch statistics.

        Raises:
            ModelNotReadyError: a part of the model is in training mode.
        """
        if any(map(_TRAINING, self._modules)):
            raise ModelNotReadyError(
                f"model {self._name!r} is in training mode, in which a request would change its batch statistics; call "
                "its eval() on the server"
            )

    def identity(self, edition: Edition) -> str | None:
        """Return the identity for an answer that was computed in this edition; None where nobody has asked for one."""
        if edition.weights is None:
            return None
        self._patrol.used()
        same = edition.weights.same(quickly=True) and self._premises.hold()
        return str(edition.fingerprint["identity"]) if same else CHANGED

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the model as it is now. All weights are read, and digested if they have changed.

        From then on, a background thread compares the weights' bytes while the model is in use.

        Raises:
            ModelNotReadyError: the weights change again and again while they are read.
        """
        asked_s = time.monotonic()
        with self._lock:
            changed = self._changed()
            if changed is not None:
                # Older clients do not read "changed", and find neither the weights nor the graph that they look for.
                return {"changed": changed, "weights": None, "tensors": {}, "graph": None}
            if not self.present.holds(asked_s):
                self.present = self._next()
            self._patrol.start()
            return self.present.fingerprint

    def close(self) -> None:
        """End the thread that watches the weights."""
        self._patrol.close()

    def _next(self) -> Edition:
        graph = self._graph
        for _ in range(_TRIES):
            edition = Edition(graph, self._max_tails)
            edition.compared_s = time.monotonic()
            edition.weights = WatchedWeights(graph.model, plain_tensors(graph.model, graph.reading).values())
            edition.weights.remember()
            digests = weight_digests(graph.model, graph.reading)
            edition.fingerprint = {
                "identity": identity(graph.fingerprint, digests.combined),
                "graph": graph.fingerprint,
                "layers": graph.configuration.layers(),
                "torch": torch.__version__,
                "python": sys.implementation.cache_tag,
                **digests.to_json(),
            }
            if edition.weights.same():
                return edition
        raise ModelNotReadyError(f"the weights of model {self._name!r} are being changed; try again when that is over")

    def _changed(self) -> str | None:
        """Return in a sentence what has changed since the model was traced, besides weights; None if nothing has."""
        graph = self._graph
        if not self._premises.hold():
            broken = self._premises.broken(_REMEDY)
            if broken is not None:
                return broken
            # Other objects of the same meaning, or attributes that compute nothing: from now on those are compared.
            self._premises = Premises(graph.model, graph.reading.again())
        changed = self._premises.tensor_gained_or_lost()
        if changed is not None:
            return f"{changed}; {_REMEDY}"
        name = graph.decides_anew()
        if name is None:
            return None
        return f"{short(name)} has other elements, and they decide which path the model takes; {_REMEDY}"
