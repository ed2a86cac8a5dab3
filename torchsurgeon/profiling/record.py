"""A profile: what each layer of a model costs, what follows from that, and how it is stored as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchsurgeon import _json_file
from torchsurgeon.errors import ProfileError, is_finite, is_whole, short
from torchsurgeon.profiling.energy import Array, LayerEnergy, floats
from torchsurgeon.profiling.parts import PartTimes
from torchsurgeon.tracing.graph import LayerGraph

T = TypeVar("T")

FORMAT = "torchsurgeon.profile/2"

# Outside of these, rates and ratios of times would overflow.
_LEAST_S, _MOST_S = 1e-12, 1e12


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProfile:
    """What each layer of one model costs on one device with one backend, measured or predicted.

    A predicted profile has one row of samples, and says ``"predicted"`` in its provenance.

    Attributes:
        model: the class of the model.
        fingerprint: that of the traced model.
        batch: the batch size.
        layers: the layers' names.
        samples_s: seconds of each layer in each repeat, shape (repeats, layers).
        whole_s: seconds of the whole model run as it is, in the same session and order, shape (repeats,).
        provenance: where the profile comes from: device, versions, threads, date.
        memory_bytes: the most bytes that tensors take while each layer runs, parameters and buffers not counted, shape
            (layers,); None where it was not measured.
        energy: the energy of each layer; None where nothing was metered.
        interval_s: of a predicted profile, the 90 % interval of each layer's seconds, shape (layers, 2); else None.
        whole_interval_s: of a predicted profile, the 90 % interval of the whole model's seconds; else None.
        warned: of a predicted profile, the layers whose times may be off by a factor, each with the reason.
        parts: what heads and tails take, where the backend fuses layers. The samples are then one row of what each
            layer counts for in the whole. None where heads and tails take what their layers take together.

    Raises:
        ProfileError: shapes do not fit the number of layers, or a value is no time, energy, memory or batch size; the
            message names the field.
    """

    model: str
    fingerprint: str
    batch: int
    layers: tuple[str, ...]
    samples_s: Array
    whole_s: Array
    provenance: Mapping[str, Any]
    memory_bytes: NDArray[np.int64] | None = None
    energy: LayerEnergy | None = None
    interval_s: Array | None = None
    whole_interval_s: tuple[float, float] | None = None
    warned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: PartTimes | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.batch) or self.batch < 1:
            raise ProfileError(f"batch must be a whole number from 1 on; got {short(self.batch, 100)}; measure again")
        if len(set(self.layers)) != len(self.layers):
            twice = next(name for name in self.layers if self.layers.count(name) > 1)
            raise ProfileError(f"layers must have names of their own; got {short(twice, 100)} twice; measure again")
        if self.samples_s.ndim != 2 or self.samples_s.shape[1] != len(self.layers) or not len(self.samples_s):
            raise ProfileError(
                f"samples_s must have shape (repeats, {len(self.layers)}), at least one repeat and one column a layer; "
                f"got {self.samples_s.shape}"
            )
        for what, values in (("samples_s", self.samples_s), ("whole_s", self.whole_s)):
            if not values.size or not np.isfinite(values).all() or (values < 0).any():
                raise ProfileError(
                    f"{what} must hold finite, non-negative seconds; got {short(values.tolist(), 100)}; measure again"
                )
        for what, whole in (("samples_s", self.samples_s.sum(axis=1)), ("whole_s", self.whole_s)):
            if self.layers and not _LEAST_S <= np.median(whole) <= _MOST_S:
                raise ProfileError(
                    f"a model must take between {_LEAST_S} and {_MOST_S} s; the median of {what} is {np.median(whole)} "
                    "s; measure it again"
                )
        self._check_sizes()
        if self.memory_bytes is not None and (self.memory_bytes < 0).any():
            raise ProfileError(
                f"memory_bytes must hold bytes from 0 on; got {short(int(self.memory_bytes.min()))}; measure again"
            )
        whole_interval = None if self.whole_interval_s is None else np.array([self.whole_interval_s], dtype=np.float64)
        for what, interval in (("interval_s", self.interval_s), ("whole_interval_s", whole_interval)):
            if interval is not None and not _are_intervals(interval):
                raise ProfileError(
                    f"{what} must hold pairs of seconds, finite and not negative, the lower one first; got "
                    f"{short(interval.tolist(), 100)}; predict the profile again"
                )
        strangers = [name for name in self.warned if name not in set(self.layers)]
        if strangers:
            raise ProfileError(
                f"warned must name layers of the profile; got {short(strangers[0], 100)}; predict the profile again"
            )
        if self.energy is not None:
            self.energy.check()

    def _check_sizes(self) -> None:
        for what, values, shape in (
            ("memory_bytes", self.memory_bytes, ()),
            ("layer_j", None if self.energy is None else self.energy.layer_j, ()),
            ("interval_j", None if self.energy is None else self.energy.interval_j, (2,)),
            ("interval_s", self.interval_s, (2,)),
        ):
            if values is not None and values.shape != (len(self.layers), *shape):
                raise ProfileError(
                    f"{what} must have shape {(len(self.layers), *shape)}, for the {len(self.layers)} layers; got "
                    f"{values.shape}; measure again"
                )
        if self.parts is not None and self.parts.head_s.shape != (len(self.layers) + 1,):
            raise ProfileError(
                f"parts must hold {len(self.layers) + 1} heads, for the {len(self.layers)} layers; got "
                f"{len(self.parts.head_s)}; measure again"
            )

    @property
    def backend(self) -> str:
        """The name of the backend that it is of."""
        return str(self.provenance.get("backend", "eager"))

    @property
    def is_bound(self) -> bool:
        """Whether it was predicted from a data sheet, so that all its times are lower bounds."""
        return bool(self.provenance.get("predicted")) and self.interval_s is None

    @property
    def layer_s(self) -> Array:
        """Median seconds of each layer, shape (layers,)."""
        return np.asarray(np.median(self.samples_s, axis=0))

    def quartiles_s(self) -> tuple[Array, Array]:
        """Return first and third quartile of each layer's seconds, each of shape (layers,)."""
        low, high = np.quantile(self.samples_s, [0.25, 0.75], axis=0)
        return low, high

    @property
    def head_s(self) -> Array:
        """Median seconds from the start until each partition index is reached, shape (layers + 1,), from 0."""
        if self.parts is not None:
            return self.parts.head_s
        reached = np.concatenate([np.zeros((len(self.samples_s), 1)), np.cumsum(self.samples_s, axis=1)], axis=1)
        return np.asarray(np.median(reached, axis=0)) * self._scale

    @property
    def tail_s(self) -> Array:
        """Median seconds from each partition index to the end, shape (layers + 1,), 0 at the last."""
        if self.parts is not None:
            return self.parts.tail_s
        rest = np.cumsum(self.samples_s[:, ::-1], axis=1)[:, ::-1]
        rest = np.concatenate([rest, np.zeros((len(rest), 1))], axis=1)
        return np.asarray(np.median(rest, axis=0)) * self._scale

    @property
    def head_memory_bytes(self) -> NDArray[np.int64] | None:
        """The most bytes that tensors take until each partition index is reached, shape (layers + 1,).

        0 where no layer runs; None where memory was not measured.
        """
        if self.memory_bytes is None:
            return None
        return np.concatenate([np.zeros(1, dtype=np.int64), np.maximum.accumulate(self.memory_bytes)])

    @property
    def head_j(self) -> Array | None:
        """Joules above idle until each partition index is reached, shape (layers + 1,), from 0.

        NaN from the first layer on whose energy is unknown; None where nothing was metered. Layers are metered one by
        one, and the sum is scaled to the metered energy of the whole model where that is known. A layer whose mean is
        below zero by noise counts as zero.
        """
        if self.energy is None:
            return None
        reached = np.concatenate([np.zeros(1), np.cumsum(np.maximum(self.energy.layer_j, 0.0))])
        whole_j = self.energy.whole_j[0]
        return reached * (whole_j / reached[-1]) if whole_j > 0 and reached[-1] > 0 else reached

    @property
    def total_s(self) -> float:
        """Median seconds of the whole model, run as it is."""
        return float(np.median(self.whole_s))

    @property
    def whole_to_sum(self) -> float:
        """The whole model's median time over the sum of its layers' medians."""
        return self.total_s / float(self.layer_s.sum())

    @property
    def sum_to_whole(self) -> float:
        """The sum of the layers over the whole model's time in the same repeat; the median over the repeats.

        It shows what reading the clock between layers costs. ``whole_to_sum`` shows that less well on a busy machine:
        interruptions hit another layer each time, so the layers' medians leave them out, while the whole model's median
        includes them.
        """
        return float(np.median(self.samples_s.sum(axis=1) / self.whole_s)) if self._paired else 1 / self.whole_to_sum

    @property
    def _paired(self) -> bool:
        return len(self.samples_s) == len(self.whole_s)

    @property
    def _scale(self) -> float:
        """The factor for sums of layers with which all layers together take as long as the whole model."""
        return self.total_s / float(np.median(self.samples_s.sum(axis=1)))

    @property
    def spread(self) -> float:
        """The interquartile range of the whole model's seconds over their median."""
        low, high = np.quantile(self.whole_s, [0.25, 0.75])
        return float((high - low) / self.total_s)

    @property
    def drift(self) -> float:
        """How much longer the last third of the runs took than the first, by their medians: 0.1 is 10 %.

        0 for fewer than six runs.
        """
        third = len(self.whole_s) // 3
        if third < 2:
            return 0.0
        return float(np.median(self.whole_s[-third:]) / np.median(self.whole_s[:third])) - 1

    def __str__(self) -> str:
        low_s, high_s = np.quantile(self.whole_s, [0.25, 0.75])
        slowest = int(self.layer_s.argmax())
        device = self.provenance.get("device", "an unnamed device")
        name, slowest_s = self.layers[slowest], self.layer_s[slowest]
        lines = [
            f"{self.model}, {len(self.layers)} layers, batch {self.batch}, on {device}",
            f"  whole    {_ms(self.total_s)} (quartiles {_ms(low_s)} … {_ms(high_s)}) over {len(self.whole_s)} runs",
        ]
        if self.parts is None:
            lines.append(f"  layers   sum to {self.sum_to_whole:.3f} of it; the slowest is {name}, {_ms(slowest_s)}")
        else:
            lines[0] += f" by {self.backend}"
            lines.append(
                f"  parts    heads and tails measured at {len(self.parts.points)} points, and interpolated between; "
                f"before they were measured, these were foreseen to {self.parts.error:.0%} in the median"
            )
        if self.memory_bytes is not None:
            most = int(self.memory_bytes.argmax())
            lines.append(f"  memory   {self.memory_bytes[most] / 1e6:.3g} MB at most, in {self.layers[most]}")
        if self.energy is None:
            lines.append(f"  energy   not metered; meter: {self.provenance.get('meter', 'none')}")
        else:
            mean_j, low_j, high_j = self.energy.whole_j
            interval = f" ({low_j:.3g} … {high_j:.3g})" if math.isfinite(high_j - low_j) else ""
            idle = f"{self.energy.idle_power_w:.3g} W idle"
            lines.append(f"  energy   {mean_j:.3g} J{interval} above {idle}, by {self.energy.meter}")
        return "\n".join(lines)

    def interval_of(self, chosen: Any) -> tuple[float, float] | None:
        """Return the interval of the seconds that some layers take together; None where the profile has none.

        It is that of all these layers being off in the same direction, and at least their share of the interval of the
        whole model.

        Args:
            chosen: the layers, as a mask of shape (layers,) or as indices.
        """
        if self.interval_s is None:
            return None
        low_s, high_s = map(float, self.interval_s[chosen].sum(axis=0) * self._scale)
        if self.whole_interval_s is None:
            return low_s, high_s
        share = float(self.layer_s[chosen].sum() / self.layer_s.sum())
        whole_low_s, whole_high_s = self.whole_interval_s
        return min(low_s, share * whole_low_s), max(high_s, share * whole_high_s)

    def scaled(self, factor: float) -> LayerProfile:
        """Return the profile of an emulated device that takes longer by the same factor for everything.

        Its energy is unknown, so the profile has none.

        Args:
            factor: how many times as long it takes, above 0.

        Raises:
            ProfileError: the factor is not positive and finite.
        """
        if not (is_finite(factor) and factor > 0):
            raise ProfileError(f"factor, how many times as slow the device is, must be positive; got {short(factor)}")
        whole = self.whole_interval_s
        provenance = {**self.provenance, "scaled_by": factor * self.provenance.get("scaled_by", 1.0)}
        return dataclasses.replace(
            self,
            samples_s=self.samples_s * factor,
            whole_s=self.whole_s * factor,
            provenance=provenance,
            energy=None,
            interval_s=None if self.interval_s is None else self.interval_s * factor,
            whole_interval_s=None if whole is None else (whole[0] * factor, whole[1] * factor),
            parts=None if self.parts is None else self.parts.scaled(factor),
        )

    def check(self, graph: LayerGraph) -> None:
        """Check that this is a profile of a traced model.

        Args:
            graph: the traced model.

        Raises:
            ProfileError: it is a profile of another model.
        """
        if self.fingerprint != graph.fingerprint:
            raise ProfileError(
                f"this profile is of {self.model} ({len(self.layers)} layers, fingerprint {self.fingerprint[:12]}), "
                f"not of {type(graph.model).__name__} ({len(graph.layers)} layers, {graph.fingerprint[:12]}); "
                "profile that model"
            )
        names = tuple(layer.name for layer in graph.layers)
        if self.layers != names:
            at = next(i for i, pair in enumerate(itertools.zip_longest(self.layers, names)) if pair[0] != pair[1])
            ours = short(self.layers[at], 100) if at < len(self.layers) else "none"
            theirs = short(names[at], 100) if at < len(names) else "none"
            raise ProfileError(
                f"the profile's layers must be the model's; layer {at} is {ours} in the profile and {theirs} in the "
                "model, so the file was edited; profile that model"
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
            # Follows from the samples; written for whoever reads the file.
            "whole_to_sum": self.whole_to_sum,
            "memory_bytes": None if self.memory_bytes is None else self.memory_bytes.tolist(),
            "energy": None if self.energy is None else self.energy.to_json(),
            "interval_s": None if self.interval_s is None else self.interval_s.tolist(),
            "whole_interval_s": self.whole_interval_s,
            "warned": dict(self.warned),
            "parts": None if self.parts is None else self.parts.to_json(),
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_json(data: Any) -> LayerProfile:
        """Return the profile in plain data.

        Args:
            data: what ``to_json()`` returned.

        Raises:
            ProfileError: it is no profile of this version, or is damaged; the message names the field.
        """
        _json_file.check_format(data, FORMAT, ProfileError, "a profile", "measure the profile again")
        # Files that were written before these fields existed have none of them.
        data = {"interval_s": None, "whole_interval_s": None, "warned": {}, "parts": None, **data}

        def field(name: str, rule: str, make: Callable[[Any], T]) -> T:
            return _json_file.field(data, name, make, rule, ProfileError, "measure the profile again")

        def optional(name: str, rule: str, make: Callable[[Any], T]) -> T | None:
            return field(name, f"{rule}, or null", lambda value: None if value is None else make(value))

        return LayerProfile(
            field("model", "a text", _text),
            field("fingerprint", "a text", _text),
            field("batch", "a whole number from 1 on", _batch),
            field("layers", "a list of names", lambda value: tuple(map(_text, _list(value)))),
            field("samples_s", "a list of seconds for each repeat", floats),
            field("whole_s", "a list of seconds", floats),
            field("provenance", "an object", dict),
            optional("memory_bytes", "a list of whole numbers of bytes", _whole_numbers),
            optional("energy", "an object with the joules of each layer", LayerEnergy.from_json),
            optional("interval_s", "a list of pairs of seconds", lambda value: floats(value).reshape(-1, 2)),
            optional("whole_interval_s", "a pair of seconds", _pair),
            field("warned", "an object with a text for each layer that it names", _texts),
            optional("parts", "an object with the seconds of heads and tails", PartTimes.from_json),
        )

    def save(self, path: str | Path) -> None:
        """Write the profile to a file, as JSON.

        Args:
            path: the file.

        Raises:
            ProfileError: the file cannot be written.
        """
        _json_file.write(path, self.to_json(), ProfileError)

    @staticmethod
    def load(path: str | Path) -> LayerProfile:
        """Read a profile from a file.

        Args:
            path: the file.

        Raises:
            ProfileError: the file cannot be read or holds no profile; the message names the file and what is wrong.
        """
        return _json_file.load(path, LayerProfile.from_json, ProfileError, "measure it again")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError
    return {_text(name): _text(why) for name, why in value.items()}


def _batch(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    if not all(type(value) is int for value in _list(values)):
        raise TypeError
    return np.asarray(values, dtype=np.int64)


def _pair(values: Any) -> tuple[float, float]:
    low, high = floats(_list(values)).tolist()
    return low, high


def _are_intervals(values: Array) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values[:, 0] <= values[:, 1]).all())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
