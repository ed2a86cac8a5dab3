"""How a boundary tensor lies in memory, when that is not its values one after the other in row-major order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import mul

import torch

# PyTorch's allocators begin memory at multiples of this, and no kernel on a CPU looks at more.
_ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """The strides of a tensor with gaps between its elements, at any batch size.

    A kernel may sum a slice of a larger tensor in another order than its compact copy, so the tail gives the same bits
    as the model only for the same strides.

    Attributes:
        shape: the shape at the example's batch.
        batch_step: by how much each dimension grows with every further sample.
        strides: the strides at the example's batch, in elements.
        grows: by how much each stride grows with every further sample.
    """

    shape: tuple[int, ...]
    batch_step: tuple[int, ...]
    strides: tuple[int, ...]
    grows: tuple[int, ...]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` in this layout: a copy where it has another, itself where its shape fits no batch size."""
        strides = self._strides_of(tensor.shape)
        if strides is None or tensor.stride() == strides:
            return tensor
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def restores(self, tensor: torch.Tensor) -> bool:
        """Return whether a compact copy of a tensor gets the tensor's own strides.

        It does not where the gaps depend on sizes in another way than by so many elements for every sample.
        """
        strides = self._strides_of(tensor.shape)
        return not has_gaps(tensor) if strides is None else tensor.stride() == strides

    def _strides_of(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        dim = next((d for d, step in enumerate(self.batch_step) if step), None)
        more = 0 if dim is None else (shape[dim] - self.shape[dim]) // self.batch_step[dim]
        if tuple(shape) != tuple(n + step * more for n, step in zip(self.shape, self.batch_step, strict=True)):
            return None
        strides = tuple(stride + grow * more for stride, grow in zip(self.strides, self.grows, strict=True))
        return strides if _fits(shape, strides) else None


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Makes a tensor lazily conjugated or negated again, which crossed as its values.

    ``y.conj()`` computes nothing until a kernel reads it, and the kernel may then take another path, with other last
    bits, than for a tensor whose values are conjugated in memory.

    Attributes:
        layout: the strides of a tensor with gaps between its elements; None without gaps.
        conjugated: whether the tensor is conjugated when it is read.
        negated: whether it is negated when it is read.
    """

    layout: Layout | None
    conjugated: bool
    negated: bool

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a lazy tensor of the same values."""
        if self.layout is not None:
            tensor = self.layout(tensor)
        if self.negated:
            tensor = torch._neg_view(torch.neg(tensor))
        return torch.conj_physical(tensor).conj() if self.conjugated else tensor


def restores(layout: Layout | Lazy | None, tensor: torch.Tensor) -> bool:
    """Return whether a tensor gets its own strides back after it crossed, if what is known of its layout is this."""
    strides = layout.layout if isinstance(layout, Lazy) else layout
    return not has_gaps(tensor) if strides is None else strides.restores(tensor)


def _fits(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether no two elements share memory."""
    extent = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent = stride * (size - 1) + extent
    return True


def has_gaps(tensor: torch.Tensor) -> bool:
    """Return whether foreign memory lies between the tensor's elements, and no two elements share memory."""
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return extent > tensor.numel() > 0 and _fits(tensor.shape, tensor.stride())


def same_layout(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides that begins at the same place between two multiples of 64 bytes.

    Kernels choose code paths by both, so a model gives the same bits for the copy. A tensor whose elements share
    memory, or that is not strided, is copied as PyTorch copies it.
    """
    copy = tensor.clone()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return copy
    if copy.stride() == tensor.stride() and (tensor.data_ptr() - copy.data_ptr()) % _ALIGNMENT_BYTES == 0:
        return copy
    if not tensor.numel() or not _fits(tensor.shape, tensor.stride()):
        return copy
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    memory = tensor.new_empty(extent + _ALIGNMENT_BYTES // tensor.itemsize)
    past = (tensor.data_ptr() - memory.data_ptr()) % _ALIGNMENT_BYTES
    if past % tensor.itemsize:
        return copy
    return memory.as_strided(tensor.shape, tensor.stride(), past // tensor.itemsize).copy_(tensor)


def dense(tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...] | None, torch.Tensor]:
    """Return a tensor as it lies in memory, so that its bytes can be sent one after the other.

    Args:
        tensor: any tensor; one with gaps between its elements is copied row-major, and one that is lazily conjugated
            or negated as its values.
        shape: the tensor's own shape.

    Returns:
        The order in which its dimensions are stored, outermost first (None for row-major), and a row-major tensor of
        the same memory.
    """
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    strides = tensor.stride()
    if strides == _row_major(shape) or (tensor.is_contiguous() and _descending(strides)):
        return None, tensor
    # Equal strides mean a dimension of size one beside a larger one; the larger one lies outside.
    order = tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], shape[dim] == 1)))
    permuted = tensor.permute(order)
    if 0 not in shape and permuted.is_contiguous() and order != tuple(range(len(shape))):
        return order, permuted
    return None, tensor.contiguous()


def logical(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return a view with the dimensions in their own order.

    Args:
        tensor: a row-major tensor, as ``dense()`` returns it.
        order: the order in which its dimensions are stored, as ``dense()`` returns it.
    """
    return tensor if order is None else tensor.permute(sorted(range(len(order)), key=order.__getitem__))


def _descending(strides: Sequence[int]) -> bool:
    # Of a contiguous tensor: only the strides of dimensions of size one differ from row-major, and mean nothing.
    return all(outer > inner for outer, inner in pairwise(strides))


@lru_cache(maxsize=1024)
def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else ()
