"""Checksums of tensors' bytes, by which a process notices that its own tensors have been written to.

PyTorch counts the writes to a tensor, but not those through ``tensor.data``, through NumPy or through a storage, nor
any to a tensor that was made under ``inference_mode``. Only the bytes tell of these.

The checksum of a row of 64-bit words is the sum of the words, each multiplied by a random key, modulo 2^64. The upper
half of a word reaches only the upper bits of its product, so there is a second sum, of the upper halves alone. If a
row's bytes change, both sums stay the same with a probability of at most 2^-33 (multilinear hashing: Lemire and Kaser,
Strongly universal string hashing is fast, 2014). This guards against accidents, not against attackers: what two
machines compare are SHA-256 digests.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WORD_BYTES = 8
_ROW_WORDS = 1024
_ROW_BYTES = _ROW_WORDS * _WORD_BYTES
# PyTorch runs operators on so many elements in the calling thread, so that comparing disturbs no other core.
_SERIAL_ELEMENTS = 32 << 10
# A GPU compares larger pieces, so that starting its kernels takes little of the time.
_GPU_ELEMENTS = 4 << 20
# Comparing so many bytes takes about 10 µs. Of larger models, a few bytes of some tensors are compared at every call.
_SAMPLE_BYTES = 64 << 10
_SAMPLED_TENSORS = 32
_RUN_BYTES = 64


class Contents:
    """The bytes of tensors at the moment when this is made, as checksums.

    Args:
        tensors: tensors of any dtype and layout, in the memory of the CPU or of a CUDA device. Others are left out, and
            so are those without bytes of their own: wrappers of other tensors, and tensors on the meta device.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for part in _parts(tensors):
            by_device.setdefault(part.device, []).append(part)
        self._pieces: list[_Piece] = []
        for device, parts in by_device.items():
            if device.type == "cuda":
                # What streams have still to write belongs to these bytes.
                torch.cuda.synchronize(device)
            summing = _Summing(device)
            elements = _SERIAL_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
            self._pieces += [_Piece(piece, summing.sums(piece)) for piece in _pieces(parts, elements)]

    def compare(self) -> Iterator[bool]:
        """Yield for one piece of the bytes after the other whether it is the same. Thread-safe."""
        summing: dict[torch.device, _Summing] = {}
        for parts, known in self._pieces:
            device = known.device
            if device not in summing:
                summing[device] = _Summing(device)
            yield summing[device].same(parts, known)


class Sample:
    """Some of the bytes of tensors in the CPU's memory: all of them where there are few, or a few of some tensors.

    Args:
        tensors: as for ``Contents``.

    Attributes:
        whole: whether it is all bytes of all tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        parts = list(_parts(tensors))
        near = [part for part in parts if part.device.type == "cpu" and _is_flat(part)]
        self.whole = len(near) == len(parts) and sum(map(len, near)) <= _SAMPLE_BYTES
        if not self.whole:
            step = max(1, -(-len(near) // _SAMPLED_TENSORS))
            near = [_middle(part) for part in near[::step]]
        # The views are of the memory that these hold.
        self._kept = near
        self._views = list(map(_memory, near))
        self._known = b"".join(self._views)

    def same(self) -> bool:
        """Return whether these bytes are the same. It is called at every inference.

        To be called after ``Snapshot.same_weights()``: the memory of a tensor that has been given other memory may no
        longer be there.
        """
        return b"".join(self._views) == self._known


class _Piece(NamedTuple):
    parts: list[Tensor]
    sums: Tensor


class _Summing:
    """Computes checksums on one device; for one thread, since it has a buffer of its own.

    On a GPU it uses a stream of its own, so that nobody waits for it, and it waits for nobody.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        keys = torch.randint(-(1 << 63), (1 << 63) - 1, (2, _ROW_WORDS), generator=generator, device="cpu")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._streaming():
            self._keys = keys.to(device)
            self._zeros = torch.zeros(_ROW_BYTES, dtype=torch.uint8, device=device)
            self._halves = self._keys.new_empty(0)

    def same(self, parts: list[Tensor], known: Tensor) -> bool:
        """Return whether the checksums of ``parts`` are those that are ``known``."""
        with self._streaming():
            return torch.equal(self._sums(parts), known)

    def sums(self, parts: list[Tensor]) -> Tensor:
        """Return the checksums of the bytes of ``parts``, two for each row."""
        with self._streaming():
            return self._sums(parts)

    def _streaming(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _sums(self, parts: list[Tensor]) -> Tensor:
        words = parts[0] if parts[0].dtype is torch.int64 else self._joined(parts)
        if len(self._halves) < len(words):
            self._halves = words.new_empty(len(words))
        halves = torch.bitwise_right_shift(words, 8 * _WORD_BYTES // 2, out=self._halves[: len(words)])
        return torch.stack([self._by_keys(words, self._keys[0]), self._by_keys(halves, self._keys[1])])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        flat = list(map(_flat, parts))
        return torch.cat([*flat, self._zeros[: -sum(map(len, flat)) % _ROW_BYTES]]).view(torch.int64)

    def _by_keys(self, words: Tensor, keys: Tensor) -> Tensor:
        rows = words.view(-1, _ROW_WORDS)
        # PyTorch multiplies matrices of integers on the CPU only.
        return torch.mv(rows, keys) if rows.device.type == "cpu" else (rows * keys).sum(1)


def _pieces(parts: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Cut parts into pieces of at most so many elements: whole rows as they lie in memory, and the bytes between them.

    What has gaps between its elements is a piece by itself, which has to be copied.
    """
    loose: list[Tensor] = []
    room = elements
    for part in parts:
        if not _is_flat(part):
            yield [part]
            continue
        aligned = part.storage_offset() % _WORD_BYTES == 0 and part.data_ptr() % _WORD_BYTES == 0
        body = len(part) // _ROW_BYTES * _ROW_BYTES if aligned else 0
        if body:
            yield from ([words] for words in part[:body].view(torch.int64).split(elements))
        rest = part[body:]
        while len(rest):
            loose.append(rest[:room])
            room -= len(loose[-1])
            rest = rest[len(loose[-1]) :]
            if not room:
                yield loose
                loose, room = [], elements
    if loose:
        yield loose


def _parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Return the memory of tensors, as vectors of bytes; a tensor with gaps between its elements as it is."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__") or tensor.device.type not in ("cpu", "cuda") or not tensor.numel():
            continue
        tensor = tensor.detach()
        if tensor.layout is torch.sparse_coo:
            yield from _parts((tensor._indices(), tensor._values()))
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from _parts((tensor.crow_indices(), tensor.col_indices(), tensor.values()))
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from _parts((tensor.ccol_indices(), tensor.row_indices(), tensor.values()))
        elif tensor.layout is torch.strided:
            if tensor.is_quantized and tensor.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                yield from _parts((tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()))
            yield from _strided(tensor)


def _strided(tensor: Tensor) -> Iterator[Tensor]:
    # Along a dimension of stride 0, all elements are the same memory.
    tensor = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    storage, element_bytes = tensor.untyped_storage(), tensor.element_size()
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    start_bytes, size_bytes = tensor.storage_offset() * element_bytes, extent * element_bytes
    if storage.device.type == "meta" or start_bytes + size_bytes > storage.nbytes():
        # A stand-in for a tensor, or one whose memory has been given back.
        return
    if extent > tensor.numel() and not tensor.is_quantized:
        # What lies between its elements may be written to by others.
        yield tensor
        return
    yield torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start_bytes, (size_bytes,), (1,))


def _is_flat(part: Tensor) -> bool:
    return part.dtype is torch.uint8 and part.dim() == 1


def _flat(part: Tensor) -> Tensor:
    return part if _is_flat(part) else part.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _memory(part: Tensor) -> memoryview:
    """Return the memory of a vector of bytes, which Python joins and compares without PyTorch's dispatch.

    ``Tensor.numpy()`` would forbid the tensor to be resized from then on.
    """
    return memoryview((ctypes.c_char * len(part)).from_address(part.data_ptr())).cast("B")


def _middle(part: Tensor) -> Tensor:
    return part[max(len(part) - _RUN_BYTES, 0) // 2 :][:_RUN_BYTES]
