"""What a graph's layers cost on one machine, by each of the backends that it may run them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from torchsurgeon.errors import ProfileError, short
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.profiling.energy import Array
from torchsurgeon.tracing.graph import LayerGraph

Profiles = LayerProfile | Sequence[LayerProfile]
"""What layers cost on a machine: one profile, or one for each backend."""


class Cost(NamedTuple):
    """What a head or a tail takes on a machine, by the backend that is quickest there.

    Attributes:
        seconds: its seconds.
        place: which of the machine's profiles says so.
    """

    seconds: float
    place: int


class Side:
    """The device's heads or the server's tails, each by the backend that runs it quickest.

    Args:
        graph: the traced model.
        profiles: what the layers cost on this machine.
        what: the machine, for the message of an error.
        tails: whether it runs tails, and not heads.

    Attributes:
        profiles: the profiles, one for each backend.
        usual: the place of the backend that runs the whole model quickest.

    Raises:
        ProfileError: there is none, one is of another graph or batch size, or two are of the same backend.
    """

    def __init__(self, graph: LayerGraph, profiles: Profiles, what: str, *, tails: bool) -> None:
        self.profiles = as_profiles(profiles, what)
        for profile in self.profiles:
            profile.check(graph)
            if profile.batch != graph.batch:
                raise ProfileError(
                    f"the {what}'s profile must be of the graph's batch size {graph.batch}; got {profile.batch}; "
                    "profile the graph that you plan for"
                )
        self._tails = tails
        self.reach_s: Array = np.stack([profile.tail_s if tails else profile.head_s for profile in self.profiles])
        """Seconds of each tail or head by each backend, shape (profiles, layers + 1)."""
        self.layer_s: Array = np.stack([self._layers_s(i) for i in range(len(self.profiles))])
        """Seconds that each layer counts for by each backend, shape (profiles, layers)."""
        self.usual = int(self.reach_s.max(axis=1).argmin())

    def _layers_s(self, place: int) -> Array:
        parts = self.profiles[place].parts
        if parts is not None:
            # Measured heads need not grow from layer to layer: fusing may make a longer one quicker.
            return self.profiles[place].layer_s
        return -np.diff(self.reach_s[place]) if self._tails else np.diff(self.reach_s[place])

    def backend(self, place: int) -> str:
        """Return the name of the backend of a profile."""
        return self.profiles[place].backend

    def at(self, index: int) -> Cost:
        """Return what the head up to an index takes, or the tail from there on."""
        place = int(self.reach_s[:, index].argmin())
        return Cost(float(self.reach_s[place, index]), place)

    def of(self, layers: Sequence[int]) -> Cost:
        """Return what the head of some layers takes, or the tail of all others."""
        seconds = self.layer_s[:, np.array(layers, dtype=np.intp)].sum(axis=1)
        if self._tails:
            seconds = self.reach_s[:, 0] - seconds
        place = int(seconds.argmin())
        return Cost(float(seconds[place]), place)


def as_profiles(profiles: object, what: str) -> tuple[LayerProfile, ...]:
    """Return one profile or several as a tuple.

    Args:
        profiles: what was given.
        what: the machine, for the message of an error.

    Raises:
        ProfileError: it is neither a profile nor several, or two are of the same backend.
    """
    found = (profiles,) if isinstance(profiles, LayerProfile) else profiles
    if not isinstance(found, Sequence) or not found or not all(isinstance(one, LayerProfile) for one in found):
        raise ProfileError(
            f"the {what}'s profile must be a LayerProfile, or several of different backends; got {short(profiles)}; "
            f"{_made_by(profiles)}"
        )
    backends = [profile.backend for profile in found]
    if len(set(backends)) < len(backends):
        twice = next(name for name in backends if backends.count(name) > 1)
        raise ProfileError(
            f"the {what}'s profiles must be of different backends; got {short(twice, 100)} twice; leave one of them out"
        )
    return tuple(found)


def _made_by(given: object) -> str:
    """Return how what was given in place of a profile leads to one."""
    if hasattr(given, "predict"):
        return "its predict(graph) makes one"
    if isinstance(given, str) and not given.endswith(".json"):
        return (
            f"torchsurgeon.reference_device({short(given, 100)}).predict(graph) makes one where that is a device's name"
        )
    return "LayerProfile.load() reads one, and profile(graph) measures one"


def with_joules(profiles: Sequence[LayerProfile]) -> list[LayerProfile]:
    """Return the profiles that tell the energy of every layer, or all of them where none does.

    A backend whose joules are unknown cannot be compared where energy counts.
    """
    known = [profile for profile in profiles if profile.head_j is not None and np.isfinite(profile.head_j).all()]
    return known or list(profiles)
