"""Predict what every layer of a model costs on a calibrated device, without running the model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon import _json_file
from torchsurgeon.errors import CalibrationError, PredictionWarning, short
from torchsurgeon.prediction.damage import DAMAGE, damaged, numbers
from torchsurgeon.prediction.doubts import (
    Predicted,
    as_known_variant,
    by_layer,
    judged,
    whole_interval,
    without_model,
)
from torchsurgeon.prediction.factors import BackendFactors
from torchsurgeon.prediction.fitted import BlockCorrection, FittedKind
from torchsurgeon.prediction.kinds import KINDS, Array, Operation
from torchsurgeon.prediction.operations import live_bytes, moved_bytes, operations
from torchsurgeon.prediction.regression import KindModel, fit_kind, refit_kind
from torchsurgeon.prediction.roofline import Roofline, fit_roofline
from torchsurgeon.prediction.samples import FEWEST_SAMPLES, Sample, SampleTable, read_csv, tables
from torchsurgeon.profiling import LayerEnergy, LayerProfile
from torchsurgeon.tracing.graph import LayerGraph

FORMAT = "torchsurgeon.predictor/1"


class Predictor:
    """Predicts layers' seconds on one device, and joules where the device was metered.

    Attributes:
        provenance: the device, versions, date and how it was calibrated; ``"reconstructed_from"`` lists data sheets
            where it was not.
        samples: by kind, the timed operations. A model is fitted to them at its first use.
        fitted: by kind, the form of the model and its held-out errors.
        roofline: the bound for operations without a model.
        block: the correction from a sum of layers to a whole model.
        backends: for each backend that was calibrated besides eager PyTorch, how its times follow from that's.
    """

    def __init__(
        self,
        provenance: Mapping[str, Any],
        samples: Mapping[str, SampleTable],
        fitted: Mapping[str, FittedKind],
        roofline: Roofline,
        block: BlockCorrection | None = None,
        backends: Mapping[str, BackendFactors] | None = None,
    ) -> None:
        self.backends = dict(backends or {})
        self.provenance, self.samples, self.fitted = dict(provenance), dict(samples), dict(fitted)
        self.roofline, self.block = roofline, block or BlockCorrection()
        self._models: dict[tuple[str, str], KindModel] = {}

    @staticmethod
    def fit(
        samples: Sequence[Sample] | Mapping[str, SampleTable],
        provenance: Mapping[str, Any],
        block: BlockCorrection | None = None,
    ) -> Predictor:
        """Fit a predictor to samples.

        Args:
            samples: the samples, or one table a kind. A kind with fewer than 20 gets no model.
            provenance: where they come from.
            block: the correction from a sum of layers to a whole model; by default none.

        Raises:
            CalibrationError: no kind has 20 samples.
        """
        by_kind = dict(samples) if isinstance(samples, Mapping) else tables(samples)
        enough = {kind: table for kind, table in by_kind.items() if len(table) >= FEWEST_SAMPLES}
        if not enough:
            counts = ", ".join(f"{len(table)} of {kind}" for kind, table in by_kind.items()) or "none"
            raise CalibrationError(
                f"too few samples to fit a model: {counts}; a kind needs at least {FEWEST_SAMPLES}, give calibration "
                "more time or the files more rows"
            )
        roofline = fit_roofline(list(enough.values()))
        predictor = Predictor(provenance, enough, {}, roofline, block)
        for kind, table in enough.items():
            model = fit_kind(table, table.seconds)
            predictor._models[kind, "seconds"] = model
            known = FittedKind(model.form, model.held_out)
            metered = table.take(np.isfinite(table.joules))
            if len(metered) >= FEWEST_SAMPLES:
                energy = fit_kind(metered, metered.joules)
                predictor._models[kind, "joules"] = energy
                known = dataclasses.replace(known, energy_form=energy.form, energy_held_out=energy.held_out)
            predictor.fitted[kind] = known
        return predictor

    @staticmethod
    def from_csv(files: Mapping[str, str | Path], name: str = "an unnamed device") -> Predictor:
        """Fit a predictor to measurements in CSV files, such as those made with another tool.

        Args:
            files: by kind of layer, the file; ``read_csv()`` says what it holds.
            name: the name of the device.

        Raises:
            CalibrationError: a file is not as it must be; the message names file and line.
        """
        found = [sample for kind, path in files.items() for sample in read_csv(kind, path)]
        return Predictor.fit(found, {"device": name, "imported_from": [Path(path).name for path in files.values()]})

    def model(self, kind: str, what: str = "seconds") -> KindModel | None:
        """Return the model of a kind; None where there is none.

        Args:
            kind: the name of the kind.
            what: what the model predicts, ``"seconds"`` or ``"joules"``.
        """
        known = self.fitted.get(kind)
        if known is None:
            return None
        form, held_out = (
            (known.form, known.held_out) if what == "seconds" else (known.energy_form, known.energy_held_out)
        )
        if form is None or held_out is None:
            return None
        if (kind, what) not in self._models:
            table = self.samples[kind]
            table = table.take(np.isfinite(getattr(table, what)))
            self._models[kind, what] = refit_kind(table, getattr(table, what), form, held_out)
        return self._models[kind, what]

    def missing(self) -> tuple[str, ...]:
        """Return the kinds of layers without a model, which the roofline predicts."""
        return tuple(kind for kind in KINDS if kind not in self.fitted)

    def predict(self, graph: LayerGraph, backend: str = "eager") -> LayerProfile:
        """Predict the profile of a model: seconds of each layer and of the whole, with 90 % intervals.

        It has energies where the device was metered. Its memory is that of the tensors that are alive at each layer.
        Where there is no model at all (``is_bound``), every time is a lower bound without an interval.

        Args:
            graph: the traced model.
            backend: what runs it, one of ``backends`` or ``"eager"``. By another than the latter, no joules and no
                memory are known.

        Raises:
            CalibrationError: the device was not calibrated by this backend.

        Warns:
            PredictionWarning: layers are unlike the samples, so that their times may be off by a factor; the message
                names them and says why, and so does ``warned`` of the profile.
        """
        if backend != "eager":
            factors = self.backends.get(backend)
            if factors is None:
                raise CalibrationError(
                    f"this device was not calibrated by backend {short(backend, 100)}, but by "
                    f"{', '.join(['eager', *self.backends])}; calibrate it with backend={short(backend, 100)}"
                )
            return factors.applied(graph, self.predict(graph), backend)
        found = operations(graph)
        layers = np.array([index for index, operations_of in enumerate(found) for _ in operations_of], dtype=np.int64)
        flat = [operation for operations_of in found for operation in operations_of]
        moved = [moved_bytes(layer) for layer in graph.layers]
        before = [moved[index - 1] if index else 0 for index in layers.tolist()]
        contexts = [(bytes_before, sum(moved)) for bytes_before in before]
        names = tuple(layer.name for layer in graph.layers)
        predicted = self._predicted(flat, contexts, "seconds")
        seconds, low_s, high_s = (
            _summed(part, layers, len(found)) for part in (predicted.value, predicted.low, predicted.high)
        )
        # A layer that computes nothing still takes the time of a call.
        seconds = np.maximum(seconds, self.roofline.overhead_s / 10)
        low_s, high_s = np.minimum(low_s, seconds), np.maximum(high_s, seconds)
        sum_s = float(seconds.sum())
        whole_s = sum_s * self.block.factor(sum_s, len(found))
        if self.block.is_fitted and flat:
            whole_interval_s = whole_interval(
                flat, layers.tolist(), predicted, whole_s, self.block.low, self.block.high
            )
        else:
            # How much layers' errors cancel is unknown, so the interval is that of all layers being off the same way.
            whole_interval_s = float(low_s.sum()), float(high_s.sum())
        warned, sentences = ({}, []) if self.is_bound else by_layer(names, layers.tolist(), predicted, whole_s)
        for sentence in sentences:
            warnings.warn(sentence, PredictionWarning, stacklevel=2)
        return LayerProfile(
            type(graph.model).__name__,
            graph.fingerprint,
            graph.batch,
            names,
            seconds[None, :],
            np.array([whole_s]),
            {**self.provenance, "predicted": True},
            live_bytes(graph),
            self._energy(flat, contexts, layers, len(found), whole_s / sum_s),
            None if self.is_bound else np.stack([low_s, high_s], axis=1),
            None if self.is_bound else whole_interval_s,
            warned,
        )

    @property
    def is_bound(self) -> bool:
        """Whether only the device's roofline is known, so that all predictions are lower bounds."""
        return not self.fitted

    def bounded(self, graph: LayerGraph) -> tuple[bool, ...]:
        """Return for each layer whether all or part of its prediction is the roofline's, for lack of a model."""
        return tuple(any(op.kind not in self.fitted for op in found) for found in operations(graph))

    def mismatches(self, measured: LayerProfile) -> tuple[str, ...]:
        """Return what differs between this device and the one on which a profile was measured.

        Args:
            measured: the profile.

        Returns:
            The differences in words; empty where predictions and measurements can be compared.
        """
        theirs = measured.provenance
        found = ["it is itself predicted"] if theirs.get("predicted") else []
        found += [
            f"its {name} is {short(theirs.get(name), 100)}, this device's is {short(self.provenance[name], 100)}"
            for name in ("device", "threads", "backend")
            if name in self.provenance and theirs.get(name) != self.provenance[name]
        ]
        found += ["it was scaled to emulate another device"] if "scaled_by" in theirs else []
        return tuple(found)

    def _energy(
        self,
        flat: list[Operation],
        contexts: list[tuple[int, int]],
        layers: NDArray[np.int64],
        count: int,
        scale: float,
    ) -> LayerEnergy | None:
        if not any(known.energy_form for known in self.fitted.values()):
            return None
        predicted = self._predicted(flat, contexts, "joules")
        layer_j, low_j, high_j = (
            _summed(part, layers, count) for part in (predicted.value, predicted.low, predicted.high)
        )
        whole_j = tuple(float(part.sum() * scale) for part in (layer_j, low_j, high_j))
        meter, idle_w = self.provenance.get("meter", "unknown"), self.provenance.get("idle_power_w", 0.0)
        intervals = np.stack([low_j, high_j], axis=1)
        return LayerEnergy(f"predicted from {meter}", idle_w, layer_j, intervals, (whole_j[0], whole_j[1], whole_j[2]))

    def _predicted(self, flat: list[Operation], contexts: list[tuple[int, int]], what: str) -> Predicted:
        """Return the predictions of operations.

        Args:
            flat: the operations.
            contexts: of each, the bytes that the layer before it moved, and those that all layers of the model move.
            what: "seconds" or "joules".
        """
        result = np.zeros((3, len(flat)))
        doubts = [""] * len(flat)
        rows_of: dict[str, list[int]] = {}
        for row, operation in enumerate(flat):
            rows_of.setdefault(operation.kind, []).append(row)
        for kind, rows in rows_of.items():
            model = self.model(kind, what)
            chosen = [flat[row] for row in rows]
            if model is None:
                result[:, rows] = self._bounded(kind, chosen, what)
                why = [without_model(operation) for operation in chosen]
            else:
                errors = model.held_out
                placed = [as_known_variant(operation, model.variants) for operation in chosen]
                around = [contexts[row] for row in rows]
                table = SampleTable.of(
                    kind,
                    [
                        Sample(op, 1.0, before_bytes=before, network_bytes=network)
                        for op, (before, network) in zip(placed, around, strict=True)
                    ],
                )
                below, above, why = judged(chosen, table, model.sampled)
                value = model.predict(table)
                result[0, rows] = value
                result[1, rows] = value * min(errors.low, 1.0) / 2.0**below
                result[2, rows] = value * max(errors.high, 1.0) * 2.0**above
            for row, doubt in zip(rows, why, strict=True):
                doubts[row] = doubt
        return Predicted(result[0], result[1], result[2], doubts)

    def _bounded(self, kind: str, chosen: list[Operation], what: str) -> Array:
        """Return the roofline's prediction of operations of one kind, and both ends of its interval."""
        known = KINDS.get(kind)
        if known is None:
            # Of an operation without a description, the only size is how many elements it reads and writes.
            moved, flops = np.array([float(op.sizes[0]) for op in chosen]), np.zeros(len(chosen))
        else:
            sizes = np.array([op.sizes for op in chosen], dtype=np.float64).reshape(len(chosen), len(known.columns))
            flops, moved = known.work(sizes)
        value = self.roofline.seconds(flops, moved * np.array([op.item_bytes for op in chosen]))
        if what == "joules":
            value = value * self._mean_power_w()
        return np.stack([value, value / self.roofline.scatter, value * self.roofline.scatter])

    def _mean_power_w(self) -> float:
        joules = np.concatenate([table.joules for table in self.samples.values()])
        seconds = np.concatenate([table.seconds for table in self.samples.values()])
        metered = np.isfinite(joules)
        return float(joules[metered].sum() / seconds[metered].sum())

    def to_json(self) -> dict[str, Any]:
        """Return samples, forms and errors as plain data, with the version of the format."""
        by_backend = {name: factors.to_json() for name, factors in self.backends.items()}
        return {
            "format": FORMAT,
            "provenance": self.provenance,
            "roofline": self.roofline.to_json(),
            "block": dataclasses.asdict(self.block),
            "fitted": {kind: dataclasses.asdict(known) for kind, known in self.fitted.items()},
            "samples": {kind: table.to_json() for kind, table in self.samples.items()},
            **({"backends": by_backend} if by_backend else {}),
        }

    @staticmethod
    def from_json(data: Any) -> Predictor:
        """Return the predictor in plain data.

        Args:
            data: what ``to_json()`` returned.

        Raises:
            CalibrationError: it is no calibration of this version, unfinished or damaged; the message says what is
                wrong.
        """
        _json_file.check_format(data, FORMAT, CalibrationError, "a calibration", "calibrate the device again")
        if data.get("unfinished"):
            raise CalibrationError(
                "the calibration was interrupted; run torchsurgeon calibrate with the same --out to continue it"
            )
        try:
            fitted = {str(kind): FittedKind.from_json(known) for kind, known in data["fitted"].items()}
            samples = {str(kind): SampleTable.from_json(kind, table) for kind, table in data["samples"].items()}
            roofline = numbers(Roofline, data["roofline"], least=1e-15)
            block = BlockCorrection.from_json(data["block"])
            provenance = dict(data["provenance"])
            # Only there where the device was calibrated by any.
            backends = {str(name): BackendFactors.from_json(one) for name, one in data.get("backends", {}).items()}
        except DAMAGE as error:
            raise damaged(error) from None
        for kind, known in fitted.items():
            table = samples.get(kind)
            seconds = 0 if table is None else len(table)
            joules = 0 if table is None else int(np.isfinite(table.joules).sum())
            if seconds < FEWEST_SAMPLES or (known.energy_form is not None and joules < FEWEST_SAMPLES):
                raise CalibrationError(
                    f"the models of {short(kind, 100)} need at least {FEWEST_SAMPLES} samples; the calibration holds "
                    f"{seconds} samples of {short(kind, 100)[1:-1]}, {joules} of them with joules; calibrate again"
                )
        return Predictor(provenance, samples, fitted, roofline, block, backends)

    def save(self, path: str | Path) -> None:
        """Write the predictor to a file, as JSON.

        Args:
            path: the file.

        Raises:
            CalibrationError: the file cannot be written.
        """
        _json_file.write(path, self.to_json(), CalibrationError)

    @staticmethod
    def load(path: str | Path) -> Predictor:
        """Read a predictor from a file.

        Args:
            path: the file.

        Raises:
            CalibrationError: the file cannot be read or holds no calibration; the message names the file and what is
                wrong.
        """
        return _json_file.load(path, Predictor.from_json, CalibrationError, "calibrate again")

    def __str__(self) -> str:
        device = self.provenance.get("device", "an unnamed device")
        peak, bandwidth = self.roofline.peak_flop_s / 1e9, self.roofline.bandwidth_byte_s / 1e9
        lines = [f"{device}: reaches {peak:.3g} Gflop/s (multiply and add count as two), {bandwidth:.3g} GB/s"]
        lines += [
            f"  {kind:<24}{own.samples:>6} samples  {known.form:<11} median error {own.median:.1%}"
            for kind, known in sorted(self.fitted.items())
            for own in [known.held_out]
        ]
        lines += [f"  by {name}: {factors}" for name, factors in self.backends.items()]
        return "\n".join(lines)


def _summed(values: Array, layers: NDArray[np.int64], count: int) -> Array:
    """Return the sum of the operations' values in each layer, shape (layers,)."""
    return np.bincount(layers, values, count).astype(np.float64)
