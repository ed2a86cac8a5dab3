"""Confidence bounds: what a sample shows about all calls, and how large a sample has to be.

Of 32 pictures none changed its answer. That does not show that none ever will: it shows, with 95 % confidence, that
fewer than 9 in 100 do. For shares the bounds are exact (Clopper and Pearson's, from the binomial distribution), for
means they come from the bootstrap.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

# The bootstrap of fewer values says little: it knows only how the values of the sample differ.
LEAST_FOR_BOOTSTRAP = 30

_RESAMPLES = 9999


def share_bound(events: int, count: int, confidence: float) -> float:
    """Return the upper confidence bound of a share: an exact one, one-sided.

    Args:
        events: how many of the sample are counted, such as changed answers.
        count: how large the sample is.
        confidence: how surely the share is at most the bound, from 0 to 1.
    """
    from scipy.special import betaincinv

    return 1.0 if events >= count else float(betaincinv(events + 1, count - events, confidence))


def most_events(count: int, share: float, confidence: float) -> int:
    """Return how many events a sample may hold for the bound of their share to be at most ``share``; -1 for none."""
    low, high = -1, count
    while low < high:
        middle = (low + high + 1) // 2
        if share_bound(middle, count, confidence) <= share:
            low = middle
        else:
            high = middle - 1
    return low


def least_count(share: float, confidence: float, events: int = 0) -> int | None:
    """Return the size of the smallest sample that can show a share; None where none can.

    Args:
        share: the bound to be shown, from 0 to 1.
        confidence: how surely, from 0 to 1.
        events: how many events that sample holds.
    """
    if share <= 0:
        return None
    high = events + 1
    while share_bound(events, high, confidence) > share:
        high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        if middle > events and share_bound(events, middle, confidence) <= share:
            high = middle
        else:
            low = middle + 1
    return high


def mean_bound(values: Sequence[float], confidence: float) -> float:
    """Return the lower confidence bound of a mean, by the bootstrap (bias-corrected and accelerated), one-sided.

    The same values always give the same bound. Where all values are equal, it is that value.

    Args:
        values: one value of each call.
        confidence: how surely the mean of all calls is at least the bound, from 0 to 1.
    """
    from scipy import stats

    array = np.asarray(values, dtype=np.float64)
    if array.min() == array.max():
        return float(array[0])
    # Values close to their maximum are skewed, which this kind of bootstrap corrects. It gives NaN, and warns, where
    # the values differ by no more than rounding.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (array,),
            np.mean,
            confidence_level=confidence,
            alternative="greater",
            n_resamples=_RESAMPLES,
            batch=500,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(interval.low) if np.isfinite(interval.low) else float(array.min())
