"""Checksums tell whether a tensor's bytes have changed, whatever the tensor is and however it was written to."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchsurgeon.models.checksums import Contents, Sample


def same(contents: Contents) -> bool:
    return all(contents.compare())


def quantized(per_channel: bool) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = torch.rand(64, 70)
        if not per_channel:
            return torch.quantize_per_tensor(values, 0.1, 3, torch.qint8)
        return torch.quantize_per_channel(values, torch.full((64,), 0.1), torch.zeros(64), 0, torch.qint8)


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.rand(300, 300)


def sparse() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.rand(50, 50).to_sparse_csr()


# Each makes a tensor, and returns a tensor through which a single element of it can be overwritten.
TENSORS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "many rows": lambda: ((one := torch.rand(700, 700)), one),
    "a few bytes": lambda: ((one := torch.rand(3)), one),
    "no whole word": lambda: ((one := torch.rand(4101).bfloat16()), one),
    "booleans": lambda: ((one := torch.zeros(9001, dtype=torch.bool)), one),
    "doubles": lambda: ((one := torch.rand(5000, dtype=torch.float64)), one),
    "complex, conjugated": lambda: ((one := torch.rand(5000, dtype=torch.complex64)).conj(), one),
    "channels last": lambda: ((one := torch.rand(2, 32, 32, 32).to(memory_format=torch.channels_last)), one),
    "a slice that begins between two words": lambda: ((one := torch.rand(20001)[1:]), one),
    "with gaps": lambda: ((one := torch.rand(200, 200)[:, ::2]), one),
    "expanded": lambda: ((one := torch.rand(10, 1)).expand(10, 1000), one),
    "quantized": lambda: ((one := quantized(False)), bytes_of(one)),
    "quantized per channel": lambda: ((one := quantized(True)), bytes_of(one)),
    "scales of channels": lambda: ((one := quantized(True)), one.q_per_channel_scales()),
    "sparse": lambda: ((one := sparse()), one.values()),
    "made under inference_mode": lambda: ((one := inference()), bytes_of(one)),
}


def bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("place", [0, -1])
def test_one_element_that_changes_is_noticed_in_a_tensor(name: str, place: int) -> None:
    tensor, source = TENSORS[name]()
    contents = Contents([torch.rand(5000), tensor, torch.rand(7)])
    assert same(contents)
    index = tuple(place % size for size in source.shape)
    source.data[index] = 0 if source[index] else 1
    assert not same(contents)


def test_what_lies_between_the_elements_of_a_tensor_is_not_its_own() -> None:
    whole = torch.rand(200, 200)
    contents = Contents([whole[:, ::2]])
    whole[:, 1::2] = 0
    assert same(contents)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "every sign": lambda one: one.neg_(),
    "every second sign": lambda one: one[1::2].neg_(),
    "two signs": lambda one: one.index_copy_(0, torch.tensor([1, 5001]), -one[[1, 5001]]),
    "powers of two": lambda one: one.mul_(2),
    "two elements swapped": lambda one: one.index_copy_(0, torch.tensor([3, 9]), one[[9, 3]]),
    "all elements moved": lambda one: one.copy_(one.roll(1)),
    "rows swapped": lambda one: one.copy_(one.view(10, -1).flip(0).reshape(-1)),
    "the last bit of an element": lambda one: one.view(torch.uint8)[8 * 4321].bitwise_xor_(1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_leave_plain_sums_alone_are_noticed(name: str, dtype: torch.dtype) -> None:
    one = torch.randn(40960, dtype=torch.float64).to(dtype)
    contents = Contents([one])
    CHANGES[name](one)
    assert not same(contents)


def test_every_bit_counts() -> None:
    one = torch.randn(3000)
    contents = Contents([one])
    bits = one.view(torch.int32)
    for bit in range(32):
        bits[7 * bit] ^= -(1 << 31) if bit == 31 else 1 << bit
        assert not same(contents)
        bits[7 * bit] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert same(contents)


def test_tensors_without_bytes_are_left_out() -> None:
    given_back = torch.rand(1000)
    given_back.untyped_storage().resize_(0)
    tensors = [torch.empty(9, device="meta"), torch.empty(0), given_back]
    assert same(Contents(tensors))
    assert Sample(tensors).same()


def test_not_a_number_is_equal_to_itself() -> None:
    tensors = [torch.full((10,), torch.nan), torch.full((99999,), torch.nan)]
    assert same(Contents(tensors))
    assert Sample(tensors).same()


def test_a_small_sample_is_all_bytes() -> None:
    one, other = torch.rand(100), torch.rand(7).bfloat16()
    sample = Sample([one, other])
    assert sample.whole
    other.data[6] += 1
    assert not sample.same()


def test_a_sample_of_much_shows_what_is_written_everywhere() -> None:
    tensors = [torch.rand(100, 100) for _ in range(50)]
    sample = Sample(tensors)
    assert not sample.whole
    assert sample.same()
    for tensor in tensors:
        tensor.data.mul_(1.01)
    assert not sample.same()
