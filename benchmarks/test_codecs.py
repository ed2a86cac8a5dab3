"""Making a tensor smaller and a tensor again, beside zstd alone, PyTorch's quantization and a plain copy.

Tensors are what AlexNet and ResNet-18 hold at cuts of a photograph, which scikit-learn ships, and the photograph
itself for the image codecs. Weights are random, so ratios are of no trained model. The entropy coder and zstd get the
same integers: coefficients of 7×7 blocks of such a tensor, quantized with a step of half their deviation. The entropy
coder is also timed as a device without PyTorch has it, in NumPy and a loop of Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy
import pytest
import scipy.fft
import torch
from pytest_benchmark.stats import Metadata
from sklearn.datasets import load_sample_image
from torch import Tensor

import torchsurgeon as ts
from benchmarks.support.networks import Network
from benchmarks.support.side_by_side import SideBySide
from torchsurgeon import _native
from torchsurgeon.codec import find_codec, range_coder, zstd
from torchsurgeon.codec.codec import EncodedTensor
from torchsurgeon.codec.range_fit import fit_tables
from torchsurgeon.demo import photo
from torchsurgeon.edge import range_encoder

CUTS = ("alexnet, features.0", "alexnet, features.5", "resnet18, bn1", "resnet18, layer3.1.relu_1")
CODECS = ("zstd", "float16", "int8", "int4", "int8+zstd")
INTEGER_CUTS = ("resnet18, bn1", "resnet18, layer3.1.relu_1")
IMAGE_CODECS = ("png", "jpeg-90", "webp-90")

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")


@pytest.fixture(scope="module")
def crossing(network: Network, device: torch.device) -> Callable[[str, Tensor], Tensor]:
    """crossing("alexnet, features.0", pictures) is what crosses there."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def crossing(cut: str, pictures: Tensor) -> Tensor:
        images = ((pictures / 255 - mean) / deviation).to(device)
        name, point = cut.split(", ")
        model, _ = network(name)
        return ts.cut(ts.trace(model, images), point).head(images)[0].clone()

    return crossing


@pytest.fixture(scope="module")
def boundary(crossing: Callable[[str, Tensor], Tensor]) -> Callable[[str], Tensor]:
    """boundary("alexnet, features.0") is what crosses there of the photograph."""
    return functools.cache(lambda cut: crossing(cut, photo()))


def without_extension(way: Callable[[], object]) -> Callable[[], object]:
    """The same where the compiled extension is not built: PyTorch's operators do it."""
    built, missing = _native.available, lambda: False

    def run() -> object:
        _native.available = missing
        try:
            return way()
        finally:
            _native.available = built

    return run


def by_place(tensor: Tensor) -> bytes:
    """Bytes of equal place in their values put together first, as some compressors of floats do, and then zstd."""
    rows = tensor.cpu().reshape(-1).view(torch.uint8).numpy().reshape(-1, tensor.element_size())
    return zstd.compress(numpy.ascontiguousarray(rows.T).data, integers=False)


def quantized(tensor: Tensor) -> Tensor:
    """PyTorch's own, with the range it needs found first."""
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    scale = (high - low) / 255
    return torch.quantize_per_tensor(tensor, scale, round(-low / scale), torch.quint8)


def encoders(tensor: Tensor, codecs: tuple[str, ...]) -> dict[str, Callable[[], EncodedTensor]]:
    return {name: functools.partial(find_codec(name).encode, tensor) for name in codecs}


def decoders(tensor: Tensor, codecs: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    def decoder(name: str) -> Callable[[], Tensor]:
        codec = find_codec(name)
        encoded = codec.encode(tensor)
        assert encoded.codec == name
        data = bytes(encoded.data)
        return lambda: codec.decode(data, tensor.dtype, tensor.shape, encoded.order, max_bytes=tensor.nbytes)

    return {name: decoder(name) for name in codecs}


@pytest.mark.benchmark(group="encoding", max_time=0.4)
@pytest.mark.parametrize("cut", CUTS)
def test_encoding(cut: str, side_by_side: SideBySide, boundary: Callable[[str], Tensor]) -> None:
    tensor = boundary(cut)
    ours = encoders(tensor, CODECS)
    found = side_by_side(
        {
            "zstd": ours["zstd"],
            "zstd, bytes by place": lambda: by_place(tensor),
            "copy": lambda: tensor.cpu().clone(),
            "torch.quantize_per_tensor": lambda: quantized(tensor),
            "int8, PyTorch's operators": without_extension(ours["int8"]),
            **ours,
        }
    )
    add_sizes(found, tensor, {"zstd, bytes by place": len(by_place(tensor)), **sizes(ours)})


@pytest.mark.benchmark(group="decoding", max_time=0.4)
@pytest.mark.parametrize("cut", CUTS)
def test_decoding(cut: str, side_by_side: SideBySide, boundary: Callable[[str], Tensor]) -> None:
    tensor = boundary(cut).cpu()
    whole, ours = quantized(tensor), decoders(tensor, ("zstd", "float16", "int8", "int8+zstd"))
    side_by_side(
        {
            "zstd": ours["zstd"],
            "copy": tensor.clone,
            "torch: dequantize": whole.dequantize,
            "int8, PyTorch's operators": without_extension(ours["int8"]),
            **ours,
        }
    )


@pytest.mark.benchmark(group="a photograph", max_time=0.4)
def test_encoding_a_photograph(side_by_side: SideBySide) -> None:
    pixels = photo()
    ours = encoders(pixels, ("zstd", *IMAGE_CODECS))
    found = side_by_side({"zstd": ours["zstd"], "copy": pixels.clone, **ours})
    add_sizes(found, pixels, sizes(ours))


def views() -> Tensor:
    """Parts of scikit-learn's other photograph: uint8[12, 3, 224, 224]."""
    picture = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    parts = [picture[:, y : y + 224, x : x + 224] for y in (0, 200) for x in (0, 200, 400)]
    return torch.stack([*parts, *(part.flip(2) for part in parts)])


def coefficients(tensor: Tensor) -> numpy.ndarray:
    """Of 7×7 blocks of (N, C, H, W): [N, 49 × C, H // 7, W // 7], lower frequencies first."""
    count, channels, height, width = tensor.shape
    blocks = tensor.cpu().numpy().reshape(count, channels, height // 7, 7, width // 7, 7).transpose(0, 1, 2, 4, 3, 5)
    found = scipy.fft.dctn(blocks, axes=(4, 5), norm="ortho")
    order = sorted(((u, v) for u in range(7) for v in range(7)), key=sum)
    return numpy.stack([found[..., u, v] for u, v in order], axis=1).reshape(count, -1, height // 7, width // 7)


@pytest.mark.benchmark(group="entropy coding", max_time=0.4)
@pytest.mark.parametrize("cut", INTEGER_CUTS)
def test_entropy_coding(cut: str, side_by_side: SideBySide, crossing: Callable[[str, Tensor], Tensor]) -> None:
    if not _native.available():
        pytest.skip("no compiled extension: make setup")
    sample, own = (coefficients(crossing(cut, pictures)) for pictures in (views(), photo()))
    step = sample.std() / 2
    samples, values = (torch.from_numpy(numpy.rint(found / step).astype(numpy.int32)) for found in (sample, own[0]))
    groups = numpy.arange(len(values))
    channels = len(values) // 49
    parents = numpy.stack([groups - 1, groups - channels, groups - 2 * channels], axis=1).clip(-1).astype(numpy.int32)
    tables = fit_tables(samples, parents)
    stream = range_coder.encode(values, tables)
    # A byte for each would be enough, so zstd gets no more.
    as_bytes = values.clamp(-128, 127).to(torch.int8).numpy().data
    frame = zstd.compress(as_bytes, integers=False)
    found = side_by_side(
        {
            "zstd": lambda: zstd.compress(as_bytes, integers=False),
            "decode zstd": lambda: zstd.decompress(memoryview(frame), values.numel()),
            "range coder": lambda: range_coder.encode(values, tables),
            "decode range coder": lambda: range_coder.decode(stream, values.shape, tables),
            "range coder without PyTorch": lambda: range_encoder.encode(values.numpy(), tables),
        }
    )
    assert range_encoder.encode(values.numpy(), tables) == stream
    assert torch.equal(range_coder.decode(stream, values.shape, tables), values)
    ideal = float(range_coder.bits(values, tables).sum()) / 8
    for name, stats in found.items():
        stats.extra_info |= {
            "integers": values.numel(),
            "ns_each": 1e9 * stats.stats.median / values.numel(),
            "size_bytes": len(stream if "range" in name else frame),
            "ideal_bytes": ideal,
        }


def sizes(encoders: dict[str, Callable[[], EncodedTensor]]) -> dict[str, int]:
    return {name: len(encode().data) for name, encode in encoders.items()}


def add_sizes(found: dict[str, Metadata], tensor: Tensor, left: dict[str, int]) -> None:
    """Say of each encoder how many bytes it leaves to send."""
    for name, stats in found.items():
        if name in left:
            stats.extra_info |= {"size_bytes": left[name], "times_smaller": tensor.nbytes / left[name]}
