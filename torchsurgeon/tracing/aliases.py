"""Which calls give memory of their arguments, where the layout of tensors decides that and the model writes to it.

``reshape``, ``contiguous`` and the like copy a tensor only where they must, which its strides and sizes decide. Where
the model overwrites the tensor or the copy afterwards, it computes something else in the one case than in the other. A
trace holds for calls in which these calls copy where they did in the example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchsurgeon.tracing.shapes import MetaModel, Shapes, dry_run, storage_of, tensors_in, without_elements
from torchsurgeon.tracing.step import Environment, Step

# By their plain names, as functions, methods, modules and operators of ATen.
_MAY_COPY = frozenset(
    """
    reshape reshape_as contiguous flatten ravel unflatten einsum resolve_conj resolve_neg Flatten Unflatten
    to type type_as float double half bfloat16 cpu
    """.split()  # noqa: SIM905
)
_MOST_KNOWN = 256


class Aliases:
    """Which steps shared memory with what they read in the example, where the model overwrites that memory later.

    Args:
        steps: the traced program, settled.
        shapes: what its steps gave for the example.
        source: the model with meta tensors.
    """

    def __init__(self, steps: Sequence[Step], shapes: Shapes, source: MetaModel) -> None:
        self._steps, self._source = steps, source
        written: set[int] = set()
        # By the step that may copy and the step whose value it may copy: whether they share memory.
        self._pairs: dict[tuple[int, int], bool] = {}
        for step in reversed(steps):
            if step.kind == "call" and step.type_name in _MAY_COPY:
                for used in step.uses():
                    memory = [_memory(shapes.values[index]) for index in (step.index, used)]
                    if (memory[0] | memory[1]) & written:
                        self._pairs[step.index, used] = bool(memory[0] & memory[1])
            written |= shapes.overwrites[step.index]
        wanted = {index for pair in self._pairs for index in pair}
        for step in reversed(steps):
            if step.index in wanted:
                wanted.update((*step.uses(), *step.after))
        self._needed = [step for step in steps if step.index in wanted and step.kind in ("call", "attr")]
        example = [shapes.values[step.index] for step in steps if step.kind == "input"]
        self._known: dict[object, str] = {_key(example): ""}

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check that the steps would share memory as they did in the example.

        Args:
            tensors: the model's input tensors, of which only sizes and strides matter.

        Raises:
            TypeError: one of them would copy what it did not, or the other way round.
        """
        key = _key(tensors)
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._wrong(tensors)
        if self._known[key]:
            raise TypeError(self._known[key])

    def _wrong(self, tensors: Sequence[torch.Tensor]) -> str:
        values: Environment = [None] * len(self._steps)
        given = iter(tensors)
        for step in self._steps:
            if step.kind == "input":
                values[step.index] = without_elements(next(given))
        end = "trace it again with an example of these sizes and this layout in memory"
        try:
            dry_run(self._needed, values, self._source)
        except Exception as error:
            return f"it is not known what the model overwrites in tensors of this form ({error}); {end}"
        for (index, used), shared in self._pairs.items():
            if bool(_memory(values[index]) & _memory(values[used])) is not shared:
                how = "copies its tensor" if shared else "shares the memory of its tensor"
                return (
                    f"with tensors of these sizes and this layout in memory, {self._steps[index].name!r} {how}, unlike "
                    f"in the example, and the model overwrites one of the two afterwards; {end}"
                )
        return ""


def _key(tensors: Sequence[torch.Tensor]) -> object:
    return tuple((t.shape, t.stride() if t.layout is torch.strided else None) for t in tensors)


def _memory(value: object) -> set[int]:
    return {storage_of(tensor) for tensor in tensors_in(value)}
