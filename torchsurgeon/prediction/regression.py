"""One prediction model per kind of layer: fitted in log space, chosen by cross-validation, sane outside its samples.

Every form starts from the same base, a sum of non-negative multiples of one call, of flops and of bytes moved, and
learns by what factor real layers differ from it. Outside the sampled range that factor stays what it is at the border
and the base goes on, so that predictions grow with work and are never negative.

scikit-learn and scipy are imported where they are used: who only runs a SplitModule does not wait for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torchsurgeon.prediction.kinds import Array, features
from torchsurgeon.prediction.samples import SampleTable

_FOLDS = 5
_INTERVAL = (0.05, 0.95)
_MOST_SMEARING = 2.0


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How far predictions were off for samples not fitted on, of networks not fitted on.

    ``median`` is the median of the absolute error over the truth, ``within_10`` and ``within_20`` the shares of samples
    nearer than 10 and 20 %. 90 % of truths lie between ``low`` and ``high`` times their prediction. What is fitted to
    logarithms is low in the mean where errors are lopsided; ``sum_ratio`` brings the sum of predictions to the sum of
    truths (the smearing of Duan, JASA 1983), and is within the other figures.
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
        """Return the errors of predictions of ``truth``, both shape (samples,), brought to its sum if ``smeared``."""
        ratio = float(np.clip(truth.sum() / predicted.sum(), 1 / _MOST_SMEARING, _MOST_SMEARING)) if smeared else 1.0
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


class KindModel:
    """Predicts seconds (or joules) of operations of one kind. Made by :func:`fit_kind`.

    ``held_out`` are its errors, ``unseen`` its predictions of the samples, shape (samples,), each by a model that saw
    no sample of its network; None where the form and its errors were known.
    """

    def __init__(self, fitted: _Fitted, form: str, held_out: HeldOut, unseen: Array | None = None) -> None:
        self.kind, self.form, self._fitted = fitted.kind, form, fitted
        self.held_out, self.unseen = held_out, unseen

    @property
    def variants(self) -> frozenset[str]:
        """What of the kind has been sampled."""
        return frozenset(self._fitted.variants)

    def predict(self, table: SampleTable) -> Array:
        """Return a prediction of each operation's seconds, shape (operations,); the table's own are not looked at."""
        return self._fitted.predict(table) * self.held_out.sum_ratio

    def stretch(self, table: SampleTable) -> Array:
        """Return by how many octaves each operation lies outside the samples, shape (operations,): 0 inside."""
        return np.asarray(self._fitted.outside(table) / np.log(2))


def fit_kind(table: SampleTable, values: Array) -> KindModel:
    """Return the model of ``values`` (seconds, or joules), shape (samples,), of the form with least held-out error."""
    folds = _folds(table)
    tried = {name: _out_of_fold(make, table, values, folds) for name, make in FORMS.items()}
    best = min(tried, key=lambda name: float(np.mean(np.abs(np.log(values / tried[name])))))
    held_out = HeldOut.of(values, tried[best], smeared=True)
    return KindModel(FORMS[best](table, values), best, held_out, tried[best] * held_out.sum_ratio)


def refit_kind(table: SampleTable, values: Array, form: str, held_out: HeldOut) -> KindModel:
    """Return the model that :func:`fit_kind` chose, from its form and errors."""
    return KindModel(FORMS[form](table, values), form, held_out)


def out_of_fold(table: SampleTable, values: Array, form: str) -> Array:
    """Return predictions of samples by models that saw no sample of their networks, shape (samples,)."""
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
    """A base and a learnt factor on it; the subclasses say how the factor is learnt."""

    def __init__(self, table: SampleTable, values: Array) -> None:
        self.kind = table.kind
        self.variants = sorted(set(table.variants.tolist()))
        self._base = _fit_base(table, values)
        own = features(self.kind, table.sizes, table.item_bytes, table.before_bytes)
        self._low, self._high = own.min(axis=0), own.max(axis=0)
        self._mean, self._scale = own.mean(axis=0), own.std(axis=0) + 1e-9
        self._learn(self._inputs(table, own), np.log(values) - np.log(self._base_of(table)))

    def predict(self, table: SampleTable) -> Array:
        own = features(self.kind, table.sizes, table.item_bytes, table.before_bytes)
        return np.asarray(self._base_of(table) * np.exp(self._factor(self._inputs(table, own))))

    def outside(self, table: SampleTable) -> Array:
        own = features(self.kind, table.sizes, table.item_bytes, table.before_bytes)[:, :-1]
        over = np.maximum(own - self._high[:-1], 0) + np.maximum(self._low[:-1] - own, 0)
        return np.asarray(over.max(axis=1))

    def _inputs(self, table: SampleTable, own: Array) -> Array:
        inside = (np.clip(own, self._low, self._high) - self._mean) / self._scale
        return np.hstack([inside, table.variants[:, None] == np.array(self.variants)[None, :]])

    def _base_of(self, table: SampleTable) -> Array:
        flops, moved = self.kind.work(table.sizes)
        return np.asarray(self._base[0] + self._base[1] * flops + self._base[2] * moved * table.item_bytes)

    def _learn(self, inputs: Array, factors: Array) -> None:
        raise NotImplementedError

    def _factor(self, inputs: Array) -> Array:
        raise NotImplementedError


def _fit_base(table: SampleTable, values: Array) -> Array:
    """Non-negative seconds per call, per flop and per byte, with the least relative error."""
    from scipy.optimize import nnls

    flops, moved = table.kind.work(table.sizes)
    terms = np.stack([np.ones(len(values)), flops, moved * table.item_bytes], axis=1) / values[:, None]
    scale = np.maximum(terms.max(axis=0), 1e-300)
    found: Array = nnls(terms / scale, np.ones(len(values)))[0] / scale
    return found if found.any() else np.array([float(np.median(values)), 0.0, 0.0])


class _Constant(_Fitted):
    """The base alone: what a linear model in flops and bytes says."""

    def _learn(self, inputs: Array, factors: Array) -> None:
        self._median = float(np.median(factors))

    def _factor(self, inputs: Array) -> Array:
        return np.full(len(inputs), self._median)


class _LogLinear(_Fitted):
    """A factor that is a product of powers of the features."""

    def _learn(self, inputs: Array, factors: Array) -> None:
        from sklearn.linear_model import Ridge

        self._model = Ridge(1e-2).fit(inputs, factors)

    def _factor(self, inputs: Array) -> Array:
        return np.asarray(self._model.predict(inputs))


class _Trees(_Fitted):
    """A factor from gradient-boosted trees, which know cliffs such as that of a cache's size."""

    def _learn(self, inputs: Array, factors: Array) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._model = HistGradientBoostingRegressor(
            max_iter=150, learning_rate=0.08, min_samples_leaf=4, l2_regularization=1.0, random_state=0
        ).fit(inputs, factors)

    def _factor(self, inputs: Array) -> Array:
        return np.asarray(self._model.predict(inputs))


Form = Callable[[SampleTable, Array], _Fitted]
FORMS: Mapping[str, Form] = {"linear": _Constant, "log-linear": _LogLinear, "trees": _Trees}
"""The forms a prediction model can have."""
