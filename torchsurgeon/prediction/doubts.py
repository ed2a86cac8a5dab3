"""What is known badly of a prediction: operations unlike the samples, and how that widens a whole model's interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from torchsurgeon.prediction.kinds import KINDS, Array, Operation
from torchsurgeon.prediction.sampled import FEWEST_OF_VARIANT, SampledRange
from torchsurgeon.prediction.samples import SampleTable

# From this many octaves outside of the samples on, an operation is named.
_FAR = 1.0
# An operation of another variant, or of elements of another size, may be this much slower or quicker.
_OTHER_VARIANT, _OTHER_ITEMS = 1.0, 2.0
# Layers that together take less than this share of the model are not named: they may be off, and the model is not.
_NAMED_SHARE = 0.01
_NAMES = 3
_REMEDY = "so the time may be off by a factor; profile such layers, or calibrate with samples of them (--from-csv)"


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The predictions of a model's operations.

    Attributes:
        value: what is predicted, shape (operations,).
        low: the low ends of the intervals.
        high: the high ends.
        doubts: why an operation is known badly; empty where it is like the samples.
    """

    value: Array
    low: Array
    high: Array
    doubts: Sequence[str]


def judged(
    operations: Sequence[Operation], placed: SampleTable, sampled: SampledRange
) -> tuple[Array, Array, list[str]]:
    """Return how far operations of one kind are from the samples, and why they are known badly.

    Twice the work may take between as long and four times as long, so an interval becomes twice as wide to either side
    for each octave. An operation with less work than the samples takes no longer than these.

    Args:
        operations: the operations.
        placed: the same as the variants that they are predicted as.
        sampled: what the samples cover.

    Returns:
        The octaves by which the interval of each is widened downwards, and upwards, and the reason; empty where the
        operation is like the samples.
    """
    below, slight = sampled.outside(placed)
    above, doubts = np.where(slight, 0.0, below), []
    for row, operation in enumerate(operations):
        what = operation.kind if operation.variant == operation.kind else f"{operation.kind} {operation.variant!r}"
        count, doubt, more = sampled.samples_of(operation.variant), "", 0.0
        if above[row] >= _FAR:
            doubt = f"{what} has {sampled.why(placed, row)}"
        if not sampled.has_items_of(operation.item_bytes):
            more += _OTHER_ITEMS
            doubt = f"there are no samples of {what} with elements of {operation.item_bytes} bytes"
        if count < FEWEST_OF_VARIANT:
            more += _OTHER_VARIANT
            number = "is one sample" if count == 1 else f"are {count or 'no'} samples"
            known = "" if count else f": predicted as {str(placed.variants[row])!r}"
            doubt = f"there {number} of {what}{known}"
        below[row] += more
        above[row] += more
        doubts.append(doubt)
    return below, above, doubts


def without_model(operation: Operation) -> str:
    """Return why an operation of a kind without a model is known badly."""
    what = f"{operation.kind} ({operation.variant})" if operation.kind in KINDS else operation.variant
    return f"no model was fitted for {what}: predicted by the device's roofline"


def whole_interval(
    operations: Sequence[Operation], layers: Sequence[int], found: Predicted, whole_s: float, low: float, high: float
) -> tuple[float, float]:
    """Return the interval of a whole model's seconds.

    It is as wide as that of the networks of the calibration, as that of each layer, and as that of the operations
    together. Operations of the same configuration are off by the same factor, and so may be all operations of one kind
    that are unlike the samples; errors of different ones are independent and partly cancel.

    Args:
        operations: the model's operations.
        layers: the layer of each operation.
        found: their predictions.
        whole_s: the prediction of the whole model.
        low: 90 % of the networks of the calibration took at least this many times their prediction.
        high: and at most this many times.
    """
    scale = max(whole_s / float(found.value.sum()), 1.0)
    below: dict[object, float] = {}
    above: dict[object, float] = {}
    for operation, doubt, down, up in zip(
        operations, found.doubts, found.value - found.low, found.high - found.value, strict=True
    ):
        together = (operation.kind,) if doubt else operation
        below[together] = below.get(together, 0.0) + down
        above[together] = above.get(together, 0.0) + up
    widest_down, widest_up = (
        float(np.bincount(layers, part).max()) for part in (found.value - found.low, found.high - found.value)
    )
    down_s = max(whole_s * (1 - low), scale * math.hypot(*below.values()), widest_down)
    up_s = max(whole_s * (high - 1), scale * math.hypot(*above.values()), widest_up)
    least_s = min(low, 1.0) * min(whole_s, float(found.low.sum()))
    return max(whole_s - down_s, least_s), whole_s + up_s


def by_layer(
    names: Sequence[str], layers: Sequence[int], found: Predicted, whole_s: float
) -> tuple[dict[str, str], list[str]]:
    """Return why layers are known badly, by name, and the same as sentences that warn.

    Args:
        names: the layers' names.
        layers: the layer of each operation.
        found: the operations' predictions.
        whole_s: the prediction of the whole model.
    """
    doubts: dict[int, str] = {}
    most_s: dict[int, float] = {}
    for layer, doubt, most in zip(layers, found.doubts, found.high, strict=True):
        if doubt:
            doubts.setdefault(layer, doubt)
            most_s[layer] = most_s.get(layer, 0.0) + most
    spared_s = 0.0
    for layer in sorted(most_s, key=lambda layer: most_s[layer]):
        spared_s += most_s[layer]
        if spared_s < _NAMED_SHARE * whole_s and not doubts[layer].startswith("no model"):
            del doubts[layer]
    together: dict[str, list[str]] = {}
    for layer, doubt in sorted(doubts.items()):
        together.setdefault(doubt, []).append(names[layer])
    sentences = [f"{listed(named)}: {doubt}, {_REMEDY}" for doubt, named in together.items()]
    return {names[layer]: doubts[layer] for layer in sorted(doubts)}, sentences


def listed(names: Sequence[str]) -> str:
    """Return names in a few words."""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def as_known_variant(operation: Operation, known: frozenset[str]) -> Operation:
    """Return the operation as the variant that has samples and whose name shares most words with its own."""
    if operation.variant in known:
        return operation
    words = set(operation.variant.split())
    nearest = max(sorted(known), key=lambda name: (len(words & set(name.split())), -len(name)))
    usual = KINDS[operation.kind].usual
    if not words & set(nearest.split()) and usual in known:
        nearest = usual
    return dataclasses.replace(operation, variant=nearest)
