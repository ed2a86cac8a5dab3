"""What an operator says of a Ray Serve deployment; no Ray is needed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchsurgeon.errors import ServerError, is_finite, short

_POSITIVE = "must be a positive number"
_WHOLE = "must be a whole number from 1 on"


@dataclass(frozen=True)
class RayOptions:
    """What is served, and how far it scales. ``RayOptions.parse()`` makes one from a configuration.

    Attributes:
        models: the SPEC of each model by its name.
        weights: weights files by model name, as in ``torchsurgeon.models.specs.load()``. Each machine of the cluster
            reads them, so they lie where all machines have them.
        input_specs: inputs by model name, as in ``torchsurgeon.models.specs.load()``.
        seed: seed of random weights.
        replicas: the fewest replicas.
        max_replicas: the most replicas.
        ongoing: how many requests a replica is meant to have, waiting and running. Ray Serve adds replicas while they
            have more in the mean, and removes them while they have fewer.
        max_ongoing: the most requests that a replica has at a time; others wait in front of all replicas.
        max_queue: how many wait there; another one is answered with 503.
        cpus: processor cores of a replica.
        gpus: GPUs of a replica; 0.25 puts four of them on one, and 0 has models run on the CPU.
        models_per_replica: how many models a replica holds at a time. The one that was asked for least recently makes
            room for another.
        batching: as in ``ModelRegistry``.
        max_batch: as in ``ModelRegistry``.
        max_body_bytes: the most bytes of a request's body.
        token_file: a file of tokens, as in ``torchsurgeon.serve.run()``, where all machines have it.
    """

    models: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    input_specs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    replicas: int = 1
    max_replicas: int = 8
    ongoing: float = 4.0
    max_ongoing: int = 32
    max_queue: int = 256
    cpus: float = 1.0
    gpus: float = 0.0
    models_per_replica: int = 8
    batching: str = "rounded"
    max_batch: int = 64
    max_body_bytes: int = 64 << 20
    token_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "max_replicas", "max_ongoing", "max_queue", "models_per_replica", "max_batch"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, _WHOLE)
        for name in ("ongoing", "cpus", "max_body_bytes"):
            self._check(name, is_finite(getattr(self, name)) and getattr(self, name) > 0, _POSITIVE)
        self._check("gpus", is_finite(self.gpus) and self.gpus >= 0, "must be 0 or a positive number")
        self._check("models", bool(self.models), "must name at least one model, as NAME=SPEC")
        self._check(
            "max_replicas", self.max_replicas >= self.replicas, f"must be at least the {self.replicas} of replicas"
        )
        self._check("batching", self.batching in ("off", "exact", "rounded"), "must be off, exact or rounded")
        for name in ("weights", "input_specs"):
            unknown = [model for model in getattr(self, name) if model not in self.models]
            self._check(name, not unknown, f"must name served models, which are {', '.join(self.models)[:200]}")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ServerError(f"{name} of the Ray deployment {rule}; got {short(getattr(self, name), 100)}")

    @staticmethod
    def parse(given: Mapping[str, Any]) -> RayOptions:
        """Return the options that a configuration holds.

        Args:
            given: values by the names above, as a YAML file of Ray Serve has them under ``args``. On a command line
                all values are texts; then models, weights and inputs are ``NAME=VALUE``, with commas between several.

        Raises:
            ServerError: a name is unknown, or a value is not valid.
        """
        fields = {one.name: one for one in dataclasses.fields(RayOptions)}
        unknown = [name for name in given if name not in fields]
        if unknown:
            raise ServerError(f"the Ray deployment has no option {short(unknown[0], 100)}; it has {', '.join(fields)}")
        if "models" not in given:
            raise ServerError(
                "the Ray deployment must be told which models it serves: "
                "serve run torchsurgeon.serve.ray:app models=alexnet=torchvision:alexnet"
            )
        return RayOptions(**{name: _value(fields[name], value) for name, value in given.items()})


def _value(option: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value in the type of its option, where it is a text that means one."""
    if not isinstance(value, str):
        return value
    kind = str(option.type)
    if kind.startswith("Mapping"):
        pairs = [text.partition("=") for text in value.split(",") if text]
        if not all(name and spec for name, _, spec in pairs):
            raise ServerError(f"{option.name} of the Ray deployment must be NAME=VALUE; got {short(value, 100)}")
        return {name: spec for name, _, spec in pairs}
    if kind in ("int", "float"):
        try:
            return int(value) if kind == "int" else float(value)
        except ValueError:
            raise ServerError(
                f"{option.name} of the Ray deployment must be a number; got {short(value, 100)}"
            ) from None
    return value
