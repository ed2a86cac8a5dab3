"""Fit one prediction model per kind of layer: its form is chosen by cross-validation.

Every form starts from the same base: seconds per operation, per call (a recurrent layer makes one for each step), per
flop and per byte moved, none of them negative. The form then learns, on a logarithmic scale, by what factor real layers
differ from the base. Outside the sampled range the factor stays what it is at the border, and the base keeps growing.
So predictions grow with the work of a layer, and are never negative.

scikit-learn and scipy are imported where they are used, so that whoever only runs a SplitModule does not wait for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torchsurgeon.prediction.kinds import Array, features
from torchsurgeon.prediction.sampled import SampledRange
from torchsurgeon.prediction.samples import SampleTable

_FOLDS = 5
# The quantiles between which 90 % of errors lie.
_INTERVAL = (0.05, 0.95)
# The most by which predictions are corrected to have the sum of the measured values, and the share of samples that are
# predicted worst: a single long one among them would decide the sum.
_MOST_SMEARING, _OUTLIERS = 2.0, 0.05


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The errors of predictions for samples of networks that the model was not fitted on.

    A model that is fitted to logarithms predicts too little on average, where errors are skewed. So predictions are
    multiplied by a factor that gives them the sum of the measured values (the smearing of Duan, JASA 1983).

    Attributes:
        samples: how many samples were predicted.
        median: the median of the absolute error over the measured value.
        within_10: the share of samples whose error is at most 10 %.
        within_20: the share of samples whose error is at most 20 %.
        low: 90 % of the measured values are from ``low`` to ``high`` times their prediction.
        high: the upper end of that range.
        sum_ratio: the factor by which predictions are multiplied; all figures above include it.
    """

    samples: int
    median: float
    within_10: float
    within_20: float
    low: float
    high: float
    sum_ratio: float = 1.0

    @staticmethod
    def of(truth: Array, predicted: Array, *, smeared: bool = False) -> HeldOut:
        """Return the errors of predictions.

        Args:
            truth: the measured values, shape (samples,).
            predicted: the predictions, shape (samples,).
            smeared: whether the predictions are multiplied to have the sum of the measured values.
        """
        ratio = _sum_ratio(truth, predicted) if smeared else 1.0
        predicted = predicted * ratio
        errors, ratios = np.abs(predicted / truth - 1), truth / predicted
        low, high = np.quantile(ratios, _INTERVAL)
        return HeldOut(
            len(truth),
            float(np.median(errors)),
            float(np.mean(errors <= 0.1)),
            float(np.mean(errors <= 0.2)),
            float(low),
            float(high),
            ratio,
        )


def _sum_ratio(truth: Array, predicted: Array) -> float:
    errors = np.abs(np.log(truth / predicted))
    usual = errors <= np.quantile(errors, 1 - _OUTLIERS)
    return float(np.clip(truth[usual].sum() / predicted[usual].sum(), 1 / _MOST_SMEARING, _MOST_SMEARING))


class KindModel:
    """Predicts the seconds (or joules) of operations of one kind; ``fit_kind()`` returns one.

    Attributes:
        kind: the kind.
        form: the name of the model's form.
        held_out: the model's errors.
        unseen: predictions of the samples, shape (samples,), each by a model that was fitted without samples of its
            network; None for a model that was fitted again in a known form.
    """

    def __init__(self, fitted: _Fitted, form: str, held_out: HeldOut, unseen: Array | None = None) -> None:
        self.kind, self.form, self._fitted = fitted.kind, form, fitted
        self.held_out, self.unseen = held_out, unseen

    @property
    def variants(self) -> frozenset[str]:
        """The variants of the kind that have samples."""
        return frozenset(self._fitted.variants)

    @property
    def sampled(self) -> SampledRange:
        """The operations that the samples cover."""
        return self._fitted.sampled

    def predict(self, table: SampleTable) -> Array:
        """Return a prediction for each operation, shape (operations,).

        Args:
            table: the operations; their seconds and joules are not read.
        """
        return self._fitted.predict(table) * self.held_out.sum_ratio


def fit_kind(table: SampleTable, values: Array) -> KindModel:
    """Fit a model of each form, and return the one whose held-out errors are least.

    Args:
        table: the samples.
        values: what is predicted, their seconds or joules, shape (samples,).
    """
    folds = _folds(table)
    tried = {name: _out_of_fold(make, table, values, folds) for name, make in FORMS.items()}
    best = min(tried, key=lambda name: float(np.mean(np.abs(np.log(values / tried[name])))))
    held_out = HeldOut.of(values, tried[best], smeared=True)
    return KindModel(FORMS[best](table, values), best, held_out, tried[best] * held_out.sum_ratio)


def refit_kind(table: SampleTable, values: Array, form: str, held_out: HeldOut) -> KindModel:
    """Fit again the model that ``fit_kind()`` chose.

    Args:
        table: the samples.
        values: what is predicted, shape (samples,).
        form: the name of the form that was chosen.
        held_out: the errors that were found.
    """
    return KindModel(FORMS[form](table, values), form, held_out)


def out_of_fold(table: SampleTable, values: Array, form: str) -> Array:
    """Return predictions of samples, each by a model that was fitted without samples of its network.

    Args:
        table: the samples.
        values: what is predicted, shape (samples,).
        form: the name of the models' form.

    Returns:
        The predictions, shape (samples,).
    """
    return _out_of_fold(FORMS[form], table, values, _folds(table))


def _folds(table: SampleTable) -> list[tuple[Any, Any]]:
    from sklearn.model_selection import GroupKFold

    groups = table.groups if len(np.unique(table.groups)) >= _FOLDS else np.arange(len(table)) % _FOLDS
    return list(GroupKFold(_FOLDS).split(np.zeros(len(table)), groups=groups))


def _out_of_fold(make: Form, table: SampleTable, values: Array, folds: list[tuple[Any, Any]]) -> Array:
    predicted = np.zeros(len(table))
    for seen, unseen in folds:
        predicted[unseen] = make(table.take(seen), values[seen]).predict(table.take(unseen))
    return predicted


class _Fitted:
    """A base and a learned factor on it; each subclass learns the factor in its own way."""

    def __init__(self, table: SampleTable, values: Array) -> None:
        self.kind, self._table = table.kind, table
        self.variants = sorted(set(table.variants.tolist()))
        self._base = _fit_base(table, values)
        own = features(self.kind, table.sizes, table.item_bytes, table.before_bytes)
        self._low, self._high = own.min(axis=0), own.max(axis=0)
        self._mean, self._scale = own.mean(axis=0), own.std(axis=0) + 1e-9
        self._learn(self._inputs(table, own), np.log(values) - np.log(self._base_of(table)))

    def predict(self, table: SampleTable) -> Array:
        own = features(self.kind, table.sizes, table.item_bytes, table.before_bytes)
        return np.asarray(self._base_of(table) * np.exp(self._factor(self._inputs(table, own))))

    @functools.cached_property
    def sampled(self) -> SampledRange:
        return SampledRange(self._table)

    def _inputs(self, table: SampleTable, own: Array) -> Array:
        inside = (np.clip(own, self._low, self._high) - self._mean) / self._scale
        return np.hstack([inside, table.variants[:, None] == np.array(self.variants)[None, :]])

    def _base_of(self, table: SampleTable) -> Array:
        return np.asarray(_terms(table) @ self._base)

    def _learn(self, inputs: Array, factors: Array) -> None:
        raise NotImplementedError

    def _factor(self, inputs: Array) -> Array:
        raise NotImplementedError


def _terms(table: SampleTable) -> Array:
    """Return what the base is a sum of: one, calls, flops and bytes of each operation, shape (operations, 4)."""
    flops, moved = table.kind.work(table.sizes)
    calls = table.kind.calls_of(table.sizes)
    return np.stack([np.ones(len(table)), calls, flops, moved * table.item_bytes], axis=1)


def _fit_base(table: SampleTable, values: Array) -> Array:
    """Return the non-negative seconds per operation, call, flop and byte that have the least relative error."""
    from scipy.optimize import nnls

    terms = _terms(table) / values[:, None]
    scale = np.maximum(terms.max(axis=0), 1e-300)
    found: Array = nnls(terms / scale, np.ones(len(values)))[0] / scale
    work = terms[:, 2:].max(axis=0) > 0
    if found[2:].any() or not work.any():
        return found if found.any() else np.array([float(np.median(values)), 0.0, 0.0, 0.0])
    # Samples of alike sizes and unlike times would make a base that does not grow with the work at all.
    at = 2 + int(work.argmax())
    found = np.zeros(4)
    found[at] = float(np.median(1.0 / terms[terms[:, at] > 0, at]))
    return found


class _ConstantFactor(_Fitted):
    """One factor for all operations, so that the model is linear in flops and bytes."""

    def _learn(self, inputs: Array, factors: Array) -> None:
        self._median = float(np.median(factors))

    def _factor(self, inputs: Array) -> Array:
        return np.full(len(inputs), self._median)


class _LogLinearFactor(_Fitted):
    """A factor that is a product of powers of the features."""

    def _learn(self, inputs: Array, factors: Array) -> None:
        from sklearn.linear_model import Ridge

        self._model = Ridge(1e-2).fit(inputs, factors)

    def _factor(self, inputs: Array) -> Array:
        return np.asarray(self._model.predict(inputs))


class _TreeFactor(_Fitted):
    """A factor from gradient-boosted trees, which can follow jumps, such as that at the size of a cache."""

    def _learn(self, inputs: Array, factors: Array) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._model = HistGradientBoostingRegressor(
            max_iter=150, learning_rate=0.08, min_samples_leaf=4, l2_regularization=1.0, random_state=0
        ).fit(inputs, factors)

    def _factor(self, inputs: Array) -> Array:
        return np.asarray(self._model.predict(inputs))


Form = Callable[[SampleTable, Array], _Fitted]
FORMS: Mapping[str, Form] = {"linear": _ConstantFactor, "log-linear": _LogLinearFactor, "trees": _TreeFactor}
"""The forms that a prediction model can have, by name."""
