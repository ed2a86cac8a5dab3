"""Fit one prediction model per kind of layer: its form is chosen by cross-validation.

Nearly every form starts from the same base: seconds per operation, per call (a recurrent layer makes one for each
step), per flop and per byte moved, none of them negative. The form then learns, on a logarithmic scale, by what factor
real layers differ from the base. Outside the sampled range the factor stays what it is at the border, and the base
keeps growing. So predictions grow with the work of a layer, and are never negative.

Which form predicts best depends on the device and on how it was measured. A library that chooses among kernels needs
trees, because times jump where the choice changes. Where samples lie on a grid and times are clean, trees that are told
nothing but the columns do best. Noisy times need trees that follow medians, because a few slow measurements would pull
a mean upwards. A device whose times follow none of the formulas in ``kinds`` needs a form without a base. So all forms
are tried on samples held out.

scikit-learn and scipy are imported where they are used, so that whoever only runs a SplitModule does not wait for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from torchsurgeon.prediction.kinds import Array, features
from torchsurgeon.prediction.sampled import SampledRange
from torchsurgeon.prediction.samples import SampleTable

# A table of more samples than the second number is fitted in fewer folds, so that 12,000 rows take a few seconds.
_FOLDS, _MANY, _FOLDS_OF_MANY = 5, 2000, 3
# The first fold of a table of at least so many samples shows which forms are worth trying on the other folds.
_ENOUGH, _WORTH = 150, 2
# The quantiles between which 90 % of errors lie.
_INTERVAL = (0.05, 0.95)
# The most by which predictions are corrected to have the sum of the measured values, and the share of samples that are
# predicted worst: a single long one among them would decide the sum.
_MOST_SMEARING, _OUTLIERS = 2.0, 0.05


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The errors of predictions for samples of networks that the model was not fitted on.

    A model that is fitted to logarithms predicts too little on average, where errors are skewed. A factor can give
    predictions the sum of the measured values (the smearing of Duan, JASA 1983). Where a few long samples decide the
    sum, that factor would spoil the predictions of all others; so it is only used where it makes errors smaller.

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
            smeared: whether the predictions are multiplied to have the sum of the measured values, if that makes the
                errors smaller.
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
    """Return the factor by which predictions are multiplied; 1 where another makes errors larger."""
    errors = np.abs(np.log(truth / predicted))
    usual = errors <= np.quantile(errors, 1 - _OUTLIERS)
    ratio = float(np.clip(truth[usual].sum() / predicted[usual].sum(), 1 / _MOST_SMEARING, _MOST_SMEARING))
    return ratio if _error(truth, predicted * ratio) <= float(errors.mean()) else 1.0


def _error(truth: Array, predicted: Array) -> float:
    """Return what forms are compared by: the mean of the absolute logarithms of predicted over measured."""
    return float(np.mean(np.abs(np.log(predicted / truth))))


class KindModel:
    """Predicts the seconds (or joules) of operations of one kind; ``fit_kind()`` returns one.

    Attributes:
        kind: the kind.
        form: the name of the model's form.
        held_out: the model's errors.
        unseen: predictions of the samples, shape (samples,), each by a model that was fitted without samples of its
            network; None for a model that was fitted again in a known form.
    """

    def __init__(
        self, table: SampleTable, values: Array, form: str, held_out: HeldOut, unseen: Array | None = None
    ) -> None:
        self.kind, self.form, self._table = table.kind, form, table
        self._fitted = [_Fitted(table, values, learner) for learner in FORMS[form]]
        self.held_out, self.unseen = held_out, unseen

    @property
    def variants(self) -> frozenset[str]:
        """The variants of the kind that have samples."""
        return frozenset(self._table.variants.tolist())

    @functools.cached_property
    def sampled(self) -> SampledRange:
        """The operations that the samples cover."""
        return SampledRange(self._table)

    def predict(self, table: SampleTable) -> Array:
        """Return a prediction for each operation, shape (operations,).

        Args:
            table: the operations; their seconds and joules are not read.
        """
        return _mean_of(self._fitted, table) * self.held_out.sum_ratio


def fit_kind(table: SampleTable, values: Array) -> KindModel:
    """Fit a model of each form, and return the one whose held-out errors are least.

    Args:
        table: the samples.
        values: what is predicted, their seconds or joules, shape (samples,).
    """
    tried = {name: np.zeros(len(table)) for name in FORMS}
    for seen, unseen in _folds(table):
        # A mean of two forms is fitted once with each of them.
        fit = functools.cache(functools.partial(_Fitted, table.take(seen), values[seen]))
        rows = table.take(unseen)
        for name, predicted in tried.items():
            predicted[unseen] = _mean_of([fit(learner) for learner in FORMS[name]], rows)
        ranked = sorted(tried, key=lambda name: _error(values[unseen], tried[name][unseen]))
        if len(table) >= _ENOUGH:
            tried = {name: tried[name] for name in tried if name in ranked[:_WORTH]}
    best = min(tried, key=lambda name: _error(values, tried[name]))
    held_out = HeldOut.of(values, tried[best], smeared=True)
    return KindModel(table, values, best, held_out, tried[best] * held_out.sum_ratio)


def refit_kind(table: SampleTable, values: Array, form: str, held_out: HeldOut) -> KindModel:
    """Fit again the model that ``fit_kind()`` chose.

    Args:
        table: the samples.
        values: what is predicted, shape (samples,).
        form: the name of the form that was chosen.
        held_out: the errors that were found.
    """
    return KindModel(table, values, form, held_out)


def out_of_fold(table: SampleTable, values: Array, form: str) -> Array:
    """Return predictions of samples, each by a model that was fitted without samples of its network.

    Args:
        table: the samples.
        values: what is predicted, shape (samples,).
        form: the name of the models' form.

    Returns:
        The predictions, shape (samples,).
    """
    predicted = np.zeros(len(table))
    for seen, unseen in _folds(table):
        part, seconds = table.take(seen), values[seen]
        predicted[unseen] = _mean_of([_Fitted(part, seconds, learner) for learner in FORMS[form]], table.take(unseen))
    return predicted


def _folds(table: SampleTable) -> list[tuple[Any, Any]]:
    """Return the rows to fit on and the rows to predict, several times; groups are never divided."""
    from sklearn.model_selection import GroupKFold

    folds = _FOLDS if len(table) <= _MANY else _FOLDS_OF_MANY
    names, groups = np.unique(table.groups, return_inverse=True)
    if len(names) < folds:
        groups = np.arange(len(table))
    # Rows of a table are often sorted along a grid. If every fifth one were held out, that might be all rows of one
    # size, so groups get new numbers in random order.
    groups = np.random.default_rng(0).permutation(groups.max() + 1)[groups]
    return list(GroupKFold(folds).split(np.zeros(len(table)), groups=groups))


class _Fitted:
    """A base, and a factor on it that was learned from samples."""

    def __init__(self, table: SampleTable, values: Array, learner: Learner) -> None:
        self.kind, self._learner = table.kind, learner
        self._variants = np.unique(table.variants)
        self._base = _fit_base(table, values)
        base = _terms(table) @ self._base
        self._shortest, self._longest = base.min(), base.max()
        own = self._features(table)
        self._low, self._high = own.min(axis=0), own.max(axis=0)
        self._mean, self._scale = own.mean(axis=0), own.std(axis=0) + 1e-9
        self._factor = learner.learn(self._inputs(table, own), np.log(values) - np.log(self._base_of(table)))

    def predict(self, table: SampleTable) -> Array:
        factors = self._factor(self._inputs(table, self._features(table)))
        return np.asarray(self._base_of(table) * np.exp(factors))

    def _features(self, table: SampleTable) -> Array:
        if self._learner.columns_only:
            return np.asarray(np.log(np.column_stack([np.maximum(table.sizes, 1e-9), table.item_bytes])))
        return features(self.kind, table.sizes, table.item_bytes, table.before_bytes, table.network_bytes)

    def _inputs(self, table: SampleTable, own: Array) -> Array:
        inside = (np.clip(own, self._low, self._high) - self._mean) / self._scale
        return np.hstack([inside, table.variants[:, None] == self._variants[None, :]])

    def _base_of(self, table: SampleTable) -> Array:
        base = np.asarray(_terms(table) @ self._base)
        # Without a base, predictions must still grow beyond the samples.
        return base if self._learner.has_base else base / np.clip(base, self._shortest, self._longest)


def _mean_of(fitted: Sequence[_Fitted], table: SampleTable) -> Array:
    """Return the geometric mean of predictions, in which the errors of different forms partly cancel."""
    return np.asarray(np.exp(np.mean([np.log(one.predict(table)) for one in fitted], axis=0)))


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


Factor = Callable[[Array], Array]
"""Takes inputs of operations, shape (operations, inputs), and returns the logarithms of their factors."""
Learn = Callable[[Array, Array], Factor]
"""Takes the inputs of samples and the logarithms of their factors, and learns to predict these."""


@dataclasses.dataclass(frozen=True)
class Learner:
    """One way to learn how real layers differ from the base.

    Attributes:
        learn: learns the factor on the base.
        columns_only: whether it is told nothing but the columns, without the features computed from them.
        has_base: whether there is a base; otherwise the base only says how fast predictions grow beyond the samples.
    """

    learn: Learn
    columns_only: bool = False
    has_base: bool = True


def _constant(inputs: Array, factors: Array) -> Factor:
    """Learn one factor for all operations, so that the model is linear in flops and bytes."""
    median = float(np.median(factors))
    return lambda inputs: np.full(len(inputs), median)


def _log_linear(inputs: Array, factors: Array) -> Factor:
    """Learn a factor that is a product of powers of the features."""
    from sklearn.linear_model import Ridge

    model = Ridge(1e-2).fit(inputs, factors)
    return lambda inputs: np.asarray(model.predict(inputs))


def _boosted(**settings: Any) -> Learn:
    """Return what learns a factor from gradient-boosted trees, which follow jumps, such as that at the size of a cache.

    Args:
        settings: the arguments of scikit-learn's regressor.
    """

    def learn(inputs: Array, factors: Array) -> Factor:
        from sklearn.ensemble import HistGradientBoostingRegressor

        with _one_thread():
            model = HistGradientBoostingRegressor(random_state=0, **settings).fit(inputs, factors)

        def factor(inputs: Array) -> Array:
            with _one_thread():
                return np.asarray(model.predict(inputs))

        return factor

    return learn


def _forest(inputs: Array, factors: Array) -> Factor:
    """Learn a factor from trees that split at random, whose mean follows clean measurements closely."""
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(60, min_samples_leaf=2, random_state=0).fit(inputs, factors)
    # The forest's own predict() starts a pool of threads, which takes longer than the trees do for a model's layers.
    trees = [tree.tree_ for tree in forest.estimators_]

    def factor(inputs: Array) -> Array:
        single = np.ascontiguousarray(inputs, dtype=np.float32)
        return np.asarray(sum(tree.predict(single)[:, 0] for tree in trees) / len(trees))

    return factor


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let scikit-learn use one thread.

    Its threads wait for each other by spinning. Where other programs use the processors, fitting by two threads was
    seen to take ten times as long as by one.
    """
    with _threads().limit(limits=1, user_api="openmp"):
        yield


@functools.cache
def _threads() -> Any:
    # Finding the libraries takes 15 ms, so they are remembered. They must be loaded before they are looked for.
    import sklearn.ensemble  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


_TREES = Learner(_boosted(max_iter=150, learning_rate=0.08, min_samples_leaf=4, l2_regularization=1.0))
_MEDIAN_TREES = Learner(_boosted(loss="absolute_error", max_iter=200, min_samples_leaf=4))
_FOREST = Learner(_forest)
_COLUMN_TREES = Learner(
    _boosted(max_iter=300, learning_rate=0.12, min_samples_leaf=4, l2_regularization=1.0), columns_only=True
)
_PLAIN_TREES = Learner(_boosted(max_iter=150, learning_rate=0.25), columns_only=True, has_base=False)
FORMS: Mapping[str, tuple[Learner, ...]] = {
    "linear": (Learner(_constant),),
    "log-linear": (Learner(_log_linear),),
    "trees": (_TREES,),
    "median trees": (_MEDIAN_TREES,),
    "column trees": (_COLUMN_TREES,),
    "forest": (_FOREST,),
    "trees, forest": (_TREES, _FOREST),
    "column trees, forest": (_COLUMN_TREES, _FOREST),
    "plain trees": (_PLAIN_TREES,),
}
"""The forms that a prediction model can have, by name: what is learned, or several whose predictions are averaged."""
