"""Measure every layer of a model on the machine at hand.

The traced steps run in one straight line with a clock read between them, which costs well under a microsecond a
layer. Each repeat times the whole run in one pass, so the time to *reach* a partition point is measured too: a sum of
layers' medians is not a block's time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchsurgeon.cut import tail_for
from torchsurgeon.errors import ProfileError
from torchsurgeon.graph import LayerGraph, TensorSpec

FORMAT = "torchsurgeon.profile/1"
_NOISY_SPREAD = 0.25

Array = NDArray[np.float64]


class NoisyProfileWarning(UserWarning):
    """The samples spread so widely that the machine was busy, throttling or changing its clocks."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProfile:
    """What each layer of one model costs on one device with one backend.

    ``samples_s`` has one row a repeat and one column a layer, in seconds; ``whole_s`` holds times of the whole model
    run as it is, in the same session. ``provenance`` says where it comes from (device, versions, threads, date).
    """

    model: str
    fingerprint: str
    batch: int
    layers: tuple[str, ...]
    samples_s: Array
    whole_s: Array
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.samples_s.ndim != 2 or self.samples_s.shape[1] != len(self.layers) or not len(self.samples_s):
            raise ProfileError(
                f"a profile of {len(self.layers)} layers cannot hold samples of shape {self.samples_s.shape}"
            )
        for what, values in (("samples_s", self.samples_s), ("whole_s", self.whole_s)):
            if not len(values) or not np.isfinite(values).all() or (values < 0).any():
                raise ProfileError(f"{what} must hold finite, non-negative seconds")

    @property
    def layer_s(self) -> Array:
        """Median seconds of each layer, shape (layers,)."""
        return np.asarray(np.median(self.samples_s, axis=0))

    def quartiles_s(self) -> tuple[Array, Array]:
        """First and third quartile of each layer's seconds."""
        low, high = np.quantile(self.samples_s, [0.25, 0.75], axis=0)
        return low, high

    @property
    def head_s(self) -> Array:
        """Median seconds from the start until each partition index is reached, shape (layers + 1,), from 0."""
        reached = np.concatenate([np.zeros((len(self.samples_s), 1)), np.cumsum(self.samples_s, axis=1)], axis=1)
        return np.asarray(np.median(reached, axis=0)) * self._scale

    @property
    def tail_s(self) -> Array:
        """Median seconds from each partition index to the end, shape (layers + 1,), 0 at the last."""
        rest = np.cumsum(self.samples_s[:, ::-1], axis=1)[:, ::-1]
        rest = np.concatenate([rest, np.zeros((len(rest), 1))], axis=1)
        return np.asarray(np.median(rest, axis=0)) * self._scale

    @property
    def total_s(self) -> float:
        """Median seconds of the whole model, run as it is."""
        return float(np.median(self.whole_s))

    @property
    def whole_to_sum(self) -> float:
        """Whole model's time over the sum of its layers' medians; heads and tails are scaled by its kin per pass."""
        return self.total_s / float(self.layer_s.sum())

    @property
    def _scale(self) -> float:
        return self.total_s / float(np.median(self.samples_s.sum(axis=1)))

    @property
    def spread(self) -> float:
        """Inter-quartile range of the whole model's seconds over their median."""
        low, high = np.quantile(self.whole_s, [0.25, 0.75])
        return float((high - low) / self.total_s)

    def scaled(self, factor: float) -> LayerProfile:
        """Return the profile of a device that takes ``factor`` times as long for everything (an emulated one)."""
        if not (math.isfinite(factor) and factor > 0):
            raise ProfileError(f"a device cannot be {factor} times as slow: give a positive factor")
        provenance = {**self.provenance, "scaled_by": factor * self.provenance.get("scaled_by", 1.0)}
        return dataclasses.replace(
            self, samples_s=self.samples_s * factor, whole_s=self.whole_s * factor, provenance=provenance
        )

    def check(self, graph: LayerGraph) -> None:
        """Raise :class:`~torchsurgeon.errors.ProfileError` when this is not a profile of ``graph``."""
        if self.fingerprint != graph.fingerprint:
            raise ProfileError(
                f"this profile is of {self.model} ({len(self.layers)} layers, fingerprint {self.fingerprint[:12]}), "
                f"not of {type(graph.model).__name__} ({len(graph.layers)} layers, {graph.fingerprint[:12]}); "
                "profile that model"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain data, with its format's version."""
        return {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "batch": self.batch,
            "layers": list(self.layers),
            "samples_s": self.samples_s.tolist(),
            "whole_s": self.whole_s.tolist(),
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_json(data: Any) -> LayerProfile:
        """Return the profile in ``data``. Raises :class:`~torchsurgeon.errors.ProfileError` naming what is wrong with
        it."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ProfileError(f"not a profile of this version: format is {found!r}, not {FORMAT!r}; measure it again")
        try:
            return LayerProfile(
                str(data["model"]),
                str(data["fingerprint"]),
                int(data["batch"]),
                tuple(map(str, data["layers"])),
                np.asarray(data["samples_s"], dtype=np.float64),
                np.asarray(data["whole_s"], dtype=np.float64),
                dict(data["provenance"]),
            )
        except KeyError as error:
            raise ProfileError(
                f"the profile has no field {error}; it was cut short or edited, measure it again"
            ) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"the profile holds a value that is none: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the profile to ``path`` as JSON."""
        Path(path).write_text(json.dumps(self.to_json()))

    @staticmethod
    def load(path: str | Path) -> LayerProfile:
        """Read a profile. Raises :class:`~torchsurgeon.errors.ProfileError` naming the file and what is wrong with
        it."""
        try:
            return LayerProfile.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ProfileError(f"{path} cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path} is not JSON: {error}") from None
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from None


def example_inputs(graph: LayerGraph) -> list[torch.Tensor]:
    """Return random tensors like the graph's inputs: uniform in [0, 1) for floats, zeros else."""
    return [_random_like(spec) for spec in graph.inputs]


def _random_like(spec: TensorSpec) -> torch.Tensor:
    if spec.dtype.is_floating_point:
        return torch.rand(spec.shape).to(spec.dtype)
    return torch.zeros(spec.shape, dtype=spec.dtype)


def profile(
    graph: LayerGraph,
    *,
    inputs: Sequence[torch.Tensor] | None = None,
    repeats: int = 10,
    warmup: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> LayerProfile:
    """Measure every layer of ``graph`` on the device its model is on.

    ``inputs`` are the model's input tensors (random ones by default, which most models' speed does not depend on).
    Passes of the instrumented and of the plain model alternate, ``repeats`` of each after ``warmup``.
    ``progress(done, total)`` is called after each. Warns with :class:`NoisyProfileWarning` when the machine was not
    quiet.
    """
    if repeats < 1 or warmup < 0:
        raise ProfileError(f"cannot measure {repeats} repeats after {warmup} warm-up runs; give at least 1 and 0")
    tensors = list(inputs) if inputs is not None else example_inputs(graph)
    whole = tail_for(graph, [spec.name for spec in graph.inputs])
    ranks = {step: rank for rank, step in enumerate(graph.flow.layers)}
    # Steps that are no layer (reading a size, taking one of several results) count to the layer that follows them.
    column, columns = len(graph.layers) - 1, []
    for step in reversed(whole.steps):
        column = ranks.get(step, column)
        columns.append(column)
    starts = np.array(columns[::-1])
    samples = np.zeros((repeats, len(graph.layers)))
    plain = np.zeros(repeats)
    with torch.no_grad():
        for done in range(-warmup, repeats):
            stamps = whole.timed(tensors, time.perf_counter_ns)
            begin = time.perf_counter_ns()
            whole(*tensors)
            end = time.perf_counter_ns()
            if done >= 0:
                np.add.at(samples[done], starts, np.diff(np.asarray(stamps, dtype=np.int64)) / 1e9)
                plain[done] = (end - begin) / 1e9
            if progress is not None:
                progress(done + warmup + 1, warmup + repeats)
    result = LayerProfile(
        type(graph.model).__name__,
        graph.fingerprint,
        graph.batch,
        tuple(layer.name for layer in graph.layers),
        samples,
        plain,
        provenance(),
    )
    if repeats >= 4 and result.spread > _NOISY_SPREAD:
        warnings.warn(
            f"the middle half of {repeats} runs spreads over {result.spread:.0%} of their median: the machine is busy "
            "or changes its clocks; quiet it, or take more repeats",
            NoisyProfileWarning,
            stacklevel=2,
        )
    return result


def provenance() -> dict[str, Any]:
    """Return where and with what a measurement is made."""
    return {
        "device": _processor(),
        "backend": "eager",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
