"""Eager PyTorch, as every part runs without a backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchsurgeon.backends.backend import Backend, Run
from torchsurgeon.backends.part import Part


class Eager(Backend):
    """Eager PyTorch: the same operators as in the model, and so the same bits."""

    name = "eager"
    device = "where the weights are"
    keeps_bits = True
    tolerance = 0.0
    copies_weights = False
    keeps_nan = True

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Return the part itself."""
        if not part.numbers:
            return part.segment
        fixed = {i: tensor for i, tensor in enumerate(example) if i in part.numbers}

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            given = iter(tensors)
            return part.segment(*[fixed[i] if i in fixed else next(given) for i in range(len(example))])  # type: ignore[no-any-return]

        return run
