"""By what factors a device takes longer by a backend than in eager PyTorch, or less long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchsurgeon.errors import CalibrationError, short
from torchsurgeon.prediction.damage import numbers
from torchsurgeon.prediction.kinds import Array
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.profiling.parts import WORKS, fitted_factors, works
from torchsurgeon.tracing.graph import LayerGraph

_FEWEST_NETS = 8
_FOLDS = 5

Net = tuple[Any, Array, float]
"""A timed network: the kinds of its layers, their seconds in eager PyTorch, and its seconds by the backend."""


@dataclasses.dataclass(frozen=True)
class BackendFactors:
    """By what factors a device takes longer by a backend than in eager PyTorch, or less long.

    Attributes:
        factors: the factor of each kind of work in ``profiling.parts.WORKS``.
        networks: how many networks they were fitted to.
        median: the median relative error of networks that were held out.
        low: 90 % of these took at least this many times what was predicted.
        high: and at most this many times.
    """

    factors: tuple[float, ...]
    networks: int
    median: float
    low: float
    high: float

    @staticmethod
    def fit(nets: list[Net]) -> BackendFactors:
        """Fit the factors to timed networks.

        Raises:
            CalibrationError: they are too few.
        """
        if len(nets) < _FEWEST_NETS:
            raise CalibrationError(
                f"at least {_FEWEST_NETS} networks must be timed by a backend; there was time for {len(nets)}; give it "
                "more seconds"
            )
        folds = np.random.default_rng(0).permutation(len(nets)) % _FOLDS
        ratios = np.zeros(len(nets))
        for fold in range(_FOLDS):
            factors = _fit([net for net, part in zip(nets, folds, strict=True) if part != fold])
            for i in np.flatnonzero(folds == fold):
                kinds, seconds, measured_s = nets[i]
                ratios[i] = measured_s / float((seconds * factors[kinds]).sum())
        low, high = np.quantile(ratios, (0.05, 0.95))
        return BackendFactors(
            tuple(_fit(nets).tolist()),
            len(nets),
            float(np.median(np.abs(1 / ratios - 1))),
            min(float(low), 1.0),
            max(float(high), 1.0),
        )

    def applied(self, graph: LayerGraph, eager: LayerProfile, backend: str) -> LayerProfile:
        """Return the profile of a model by the backend.

        Args:
            graph: the traced model.
            eager: its predicted profile in eager PyTorch.
            backend: the backend's name.
        """
        factors = np.array(self.factors)[works(graph)]
        seconds = eager.layer_s * (eager.total_s / float(eager.layer_s.sum())) * factors
        interval = None if eager.interval_s is None else eager.interval_s * factors[:, None] * [self.low, self.high]
        whole_s, whole = float(seconds.sum()), eager.whole_interval_s
        return dataclasses.replace(
            eager,
            samples_s=seconds[None, :],
            whole_s=np.array([whole_s]),
            provenance={**eager.provenance, "backend": backend},
            memory_bytes=None,
            energy=None,
            interval_s=interval,
            whole_interval_s=None
            if whole is None
            else (
                whole[0] / eager.total_s * whole_s * self.low,
                whole[1] / eager.total_s * whole_s * self.high,
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the factors as plain data."""
        fields = dataclasses.asdict(self)
        return {**fields, "factors": dict(zip(WORKS, self.factors, strict=True))}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BackendFactors:
        """Return the factors in plain data.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is something else.
        """
        factors = data["factors"]
        if set(factors) != set(WORKS):
            raise ValueError(f"the factors must be those of {', '.join(WORKS)}; got {short(', '.join(factors), 100)}")
        one_by_one = [numbers(_Factor, {"factor": factors[work]}, least=1e-6).factor for work in WORKS]
        rest = {name: data[name] for name in ("networks", "median", "low", "high")}
        found = numbers(_Rest, rest, least=0.0)
        return BackendFactors(tuple(one_by_one), int(found.networks), found.median, found.low, found.high)

    def __str__(self) -> str:
        each = ", ".join(f"{work} {factor:.2f}" for work, factor in zip(WORKS, self.factors, strict=True))
        return (
            f"{each} of eager PyTorch's time, from {self.networks} networks; held out, the median error was "
            f"{self.median:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class _Factor:
    factor: float


@dataclasses.dataclass(frozen=True)
class _Rest:
    networks: float
    median: float
    low: float
    high: float


def _fit(nets: list[Net]) -> Array:
    return fitted_factors(nets, [measured_s for _, _, measured_s in nets])
