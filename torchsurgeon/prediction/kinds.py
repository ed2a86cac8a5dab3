"""The kinds of layers that have a prediction model, and the features from which each model predicts.

An ``Operation`` is one call that takes time, described by a few whole numbers (its *columns*): a convolution by its
channels, sizes and kernel, an activation by its elements. Fitting and predicting compute the features from the columns
by the same function, ``features()``. Among them are those of Kang et al., Neurosurgeon (ASPLOS 2017), section 4.1:
input feature maps, (filter size / stride)² · filters, neurons in and out, and so on. The others are flops, bytes moved
and the columns themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Formula = Callable[[Any], Any]
"""Takes the columns of operations by name, arrays of shape (operations,), and returns an array of that shape."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One call that takes time.

    Attributes:
        kind: the name of its kind.
        variant: what of that kind it is ("relu", "max").
        sizes: the values of the kind's columns, in their order.
        item_bytes: bytes of one element.
    """

    kind: str
    variant: str
    sizes: tuple[int, ...]
    item_bytes: int = 4


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        name: its name.
        usual: the variant where none is given.
        columns: the names of the whole numbers that describe an operation of this kind.
        flops: computes the floating-point operations from the columns; multiply and add count as two.
        moved: computes the elements that are read and written.
        paper: computes the regressors of the paper's linear model.
        optional: the columns that are 1 where they are not given.
        more: computes further quantities that speed depends on.
        calls: computes how many calls of the device's library an operation makes one after another.
        has_weights: whether an operation reads weights, which may still be in the caches from the call before.
    """

    name: str
    usual: str
    columns: tuple[str, ...]
    flops: Formula
    moved: Formula
    paper: Callable[[Any], Sequence[Any]]
    optional: tuple[str, ...] = ()
    more: Callable[[Any], Sequence[Any]] = lambda c: ()
    calls: Formula = lambda c: 1
    has_weights: bool = False

    def named(self, sizes: Array) -> SimpleNamespace:
        """Return the columns of operations by name; ``sizes`` has shape (operations, columns)."""
        return SimpleNamespace(**{name: sizes[:, i] for i, name in enumerate(self.columns)})

    def work(self, sizes: Array) -> tuple[Array, Array]:
        """Return flops and elements moved of each operation, both of shape (operations,).

        Args:
            sizes: the operations' columns, shape (operations, columns).
        """
        columns, zero = self.named(sizes), np.zeros(len(sizes))
        return self.flops(columns) + zero, self.moved(columns) + zero

    def calls_of(self, sizes: Array) -> Array:
        """Return how many calls each operation makes, shape (operations,).

        Args:
            sizes: the operations' columns, shape (operations, columns).
        """
        return np.asarray(self.calls(self.named(sizes)) + np.zeros(len(sizes)))


def features(kind: Kind, sizes: Array, item_bytes: Array, before_bytes: Array, network_bytes: Array) -> Array:
    """Return the features of operations of one kind.

    They are natural logarithms: of the columns; of flops, bytes moved and their ratio; of the kind's own quantities
    (the paper's among them); of the bytes that the layer before moved, since these are in the caches; and, where there
    are weights, of the bytes that the whole network moves, since these put the weights out of the caches.

    Args:
        kind: the kind.
        sizes: the operations' columns, shape (operations, columns).
        item_bytes: bytes of one element, shape (operations,).
        before_bytes: bytes that the layer before each operation read and wrote, shape (operations,).
        network_bytes: bytes that all layers of each operation's network read and write, shape (operations,).

    Returns:
        An array of shape (operations, features).
    """
    columns = kind.named(sizes)
    flops, moved = kind.work(sizes)
    flops, moved_bytes = np.maximum(flops, 1.0), np.maximum(moved * item_bytes, 1.0)
    own = [sizes[:, i] for i in range(len(kind.columns))]
    parts = [*own, *kind.paper(columns), *kind.more(columns), flops, moved_bytes, flops / moved_bytes]
    parts += [item_bytes, np.maximum(before_bytes, 1024.0)]
    if kind.has_weights:
        parts.append(np.maximum(network_bytes, 1024.0))
    logarithms: Array = np.log(np.stack([np.maximum(part, 1e-9) for part in parts], axis=1))
    return logarithms


def _weights(c: Any) -> Any:
    return c.out_channels * c.in_channels / c.groups * c.kernel


def _input_maps(c: Any) -> Any:
    return c.batch * c.in_channels * c.in_size


def _padded(c: Any) -> Any:
    """Return how many times the work is done by vector units, which also take 16 channels where fewer are left."""
    into, out = c.in_channels / c.groups, c.out_channels / c.groups
    return np.ceil(into / 16) * np.ceil(out / 16) * 256 / (into * out)


def _convolution(name: str) -> Kind:
    # A transposed convolution applies its kernel at every input position, any other at every output position.
    at = "in_size" if name.startswith("transposed") else "out_size"
    return Kind(
        name,
        "2d",
        ("batch", "in_channels", "out_channels", "groups", "in_size", "out_size", "kernel", "stride", "dilation"),
        flops=lambda c: 2 * c.batch * getattr(c, at) * _weights(c),
        moved=lambda c: _input_maps(c) + c.batch * c.out_channels * c.out_size + _weights(c),
        paper=lambda c: (_input_maps(c), c.kernel / c.stride * c.out_channels),
        optional=("batch", "groups", "stride", "dilation"),
        more=lambda c: (_padded(c), _weights(c), c.batch * c.out_channels * c.out_size),
        has_weights=True,
    )


def _recurrent_weights(c: Any) -> Any:
    return c.passes * c.gates * c.hidden * (c.inputs + c.hidden)


_KINDS = (
    *map(_convolution, ("convolution", "depthwise convolution", "grouped convolution", "transposed convolution")),
    Kind(
        "linear",
        "linear",
        ("rows", "in_features", "out_features"),
        flops=lambda c: 2 * c.rows * c.in_features * c.out_features,
        moved=lambda c: c.in_features * c.out_features + c.rows * (c.in_features + c.out_features),
        paper=lambda c: (c.rows * c.in_features, c.rows * c.out_features),
        optional=("rows",),
        more=lambda c: (c.in_features * c.out_features,),
        has_weights=True,
    ),
    Kind(
        "matmul",
        "matmul",
        ("batch", "rows", "inner", "columns"),
        flops=lambda c: 2 * c.batch * c.rows * c.inner * c.columns,
        moved=lambda c: c.batch * (c.rows * c.inner + c.inner * c.columns + c.rows * c.columns),
        paper=lambda c: (c.batch * c.rows * c.inner, c.batch * c.inner * c.columns),
        optional=("batch",),
        more=lambda c: (c.batch * c.rows * c.columns,),
    ),
    Kind(
        "attention",
        "plain",
        ("heads", "queries", "keys", "width"),
        flops=lambda c: 4 * c.heads * c.queries * c.keys * c.width,
        moved=lambda c: 2 * c.heads * c.width * (c.queries + c.keys),
        paper=lambda c: (c.heads * c.queries * c.keys, c.heads * c.queries * c.width),
    ),
    Kind(
        "pooling",
        "max",
        ("maps", "in_size", "out_size", "kernel"),
        flops=lambda c: c.maps * c.out_size * c.kernel,
        moved=lambda c: c.maps * (c.in_size + c.out_size),
        paper=lambda c: (c.maps * c.in_size, c.maps * c.out_size),
    ),
    Kind(
        "activation",
        "relu",
        ("elements",),
        flops=lambda c: c.elements,
        moved=lambda c: 2 * c.elements,
        paper=lambda c: (c.elements,),
    ),
    Kind(
        "elementwise",
        "add",
        ("elements", "read"),
        flops=lambda c: c.elements,
        moved=lambda c: c.elements + c.read,
        paper=lambda c: (c.elements,),
    ),
    Kind(
        "normalization",
        "batch_norm",
        ("rows", "length"),
        flops=lambda c: 4 * c.rows * c.length,
        moved=lambda c: 2 * c.rows * c.length,
        paper=lambda c: (c.rows * c.length,),
    ),
    Kind(
        "softmax",
        "softmax",
        ("rows", "length"),
        flops=lambda c: 5 * c.rows * c.length,
        moved=lambda c: 2 * c.rows * c.length,
        paper=lambda c: (c.rows * c.length,),
    ),
    Kind(
        "reduction",
        "argmax",
        ("rows", "length"),
        flops=lambda c: c.rows * c.length,
        moved=lambda c: c.rows * (c.length + 1),
        paper=lambda c: (c.rows * c.length,),
    ),
    Kind(
        "embedding",
        "embedding",
        ("rows", "width", "table"),
        flops=lambda c: 0,
        moved=lambda c: 2 * c.rows * c.width,
        paper=lambda c: (c.rows * c.width,),
        has_weights=True,
    ),
    Kind(
        "recurrent",
        "lstm",
        ("steps", "batch", "inputs", "hidden", "gates", "passes"),
        flops=lambda c: 2 * c.steps * c.batch * _recurrent_weights(c),
        moved=lambda c: _recurrent_weights(c) + c.steps * c.batch * c.passes * (c.inputs + c.hidden),
        paper=lambda c: (c.steps * c.batch * c.inputs, c.steps * c.batch * c.hidden),
        optional=("batch", "passes"),
        more=lambda c: (c.steps * c.passes, _recurrent_weights(c)),
        calls=lambda c: c.steps * c.passes,
        has_weights=True,
    ),
    Kind(
        "copy",
        "cat",
        ("elements", "pieces", "run"),
        flops=lambda c: 0,
        moved=lambda c: 2 * c.elements,
        paper=lambda c: (c.elements,),
        optional=("pieces",),
    ),
    Kind(
        "interpolation",
        "bilinear",
        ("maps", "in_size", "out_size"),
        flops=lambda c: 8 * c.maps * c.out_size,
        moved=lambda c: c.maps * (c.in_size + c.out_size),
        paper=lambda c: (c.maps * c.in_size, c.maps * c.out_size),
    ),
    Kind("view", "view", (), flops=lambda c: 0, moved=lambda c: 0, paper=lambda c: ()),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
"""Every kind by name. ``view`` reads and writes nothing, and costs what a call costs."""
