"""Codecs: seconds to encode and decode, and what is left to send, beside PyTorch's own ways and a plain copy.

Tensors are what AlexNet and ResNet-18 hold at four cuts of a photograph (scikit-learn ships it), normal numbers as the
worst case, and the photograph itself for the image codecs. Weights are random, so ratios are of no trained model; pass
``--weights default`` for torchvision's own where they are cached.

All ways run one after the other in every round, in a new random order, on one thread. Printed are medians, quartiles,
gigabytes of the plain tensor a second, and the medians of the rounds' ratios to ``zstd`` of the same tensor's bytes and
to PyTorch's ``quantize_per_tensor``, or for decoding to their counterparts. Beside the codecs:

* ``copy``: the tensor's memory copied once, which no sender does without.
* ``torch: quantize_per_tensor``: PyTorch's, with the range it needs found by ``aminmax``; deprecated in PyTorch 2.15.
* ``… by PyTorch's operators``: the same codec where the compiled extension is not built.
* ``zstd, bytes by place``: bytes of equal place in their values put together first, as some float compressors do.

    python -m benchmarks.codec [--rounds 60] [--out benchmarks/results/codec.json]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
import zstandard
from sklearn.datasets import load_sample_image
from torch import Tensor

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.side_by_side import in_turns, median_ratio, spread, text
from torchsurgeon import _native
from torchsurgeon.codec import codec_names, find_codec, zstd

CUTS = {"alexnet": ("features.0", "features.5"), "resnet18": ("bn1", "layer3.1.relu_1")}


def photograph() -> Tensor:
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, :, :, 100:527]
    return torch.nn.functional.interpolate(pixels.float(), size=(224, 224), mode="area").round().to(torch.uint8)


def tensors(weights: str | None) -> dict[str, Tensor]:
    photo = photograph()
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = (photo / 255 - mean) / deviation
    found = {"photograph": photo, "normal numbers": torch.randn(1, 64, 56, 56)}
    for name, points in CUTS.items():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=weights and weights.upper()).eval()
        graph = ts.trace(model, image)
        with torch.no_grad():
            for point in points:
                found[f"{name} {point}"] = ts.cut(graph, point).head(image)[0].clone()
    return found


def without_extension(way: Callable[[], object]) -> Callable[[], object]:
    """``way`` as it is where the extension is not built."""
    built, missing = _native.available, lambda: False

    def run() -> object:
        _native.available = missing
        try:
            return way()
        finally:
            _native.available = built

    return run


def by_place(tensor: Tensor) -> bytes:
    rows = tensor.reshape(-1).view(torch.uint8).numpy().reshape(-1, tensor.element_size())
    return zstd.compress(numpy.ascontiguousarray(rows.T).data)


def quantized(tensor: Tensor) -> Tensor:
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    scale = (high - low) / 255
    return torch.quantize_per_tensor(tensor, scale, round(-low / scale), torch.quint8)


def ways_of(tensor: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What is timed for a tensor, and the bytes that each encoder leaves."""
    ways: dict[str, Callable[[], object]] = {"copy": tensor.clone}
    sizes: dict[str, int] = {}
    for name in codec_names():
        codec = find_codec(name)
        if name == "raw" or not codec.suits(tensor.dtype, tensor.shape):
            continue
        encoded = codec.encode(tensor)
        if encoded.codec != name:
            continue
        data = bytes(encoded.data)

        def encode(codec: Any = codec) -> object:
            return codec.encode(tensor)

        def decode(codec: Any = codec, data: bytes = data, order: Any = encoded.order) -> object:
            return codec.decode(data, tensor.dtype, tensor.shape, order, max_bytes=tensor.nbytes)

        ways |= {name: encode, f"decode {name}": decode}
        sizes[name] = len(data)
        if name in ("int8", "int4", "int8+zstd"):
            ways[f"{name} by PyTorch's operators"] = without_extension(encode)
            ways[f"decode {name} by PyTorch's operators"] = without_extension(decode)
    if tensor.dtype == torch.float32:
        whole = quantized(tensor)
        ways["torch: quantize_per_tensor"] = lambda: quantized(tensor)
        ways["torch: dequantize"] = whole.dequantize
        ways["zstd, bytes by place"] = lambda: by_place(tensor)
        sizes["zstd, bytes by place"] = len(by_place(tensor))
    return ways, sizes


def measure(ways: dict[str, Callable[[], object]], size_bytes: int, rounds: int) -> dict[str, dict[str, float]]:
    taken = in_turns(ways, rounds)
    rows = {}
    for name, times in taken.items():
        decoding = name.startswith(("decode", "torch: dequantize"))
        row = spread(times)
        row["gb_s"] = size_bytes / row["median_s"] / 1e9
        for key, base in (
            ("time_to_zstd", "decode zstd" if decoding else "zstd"),
            ("time_to_torch", "torch: dequantize" if decoding else "torch: quantize_per_tensor"),
        ):
            if base in taken:
                row[key] = median_ratio(times, taken[base])
        rows[name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--weights", choices=["default"], help="torchvision's own instead of random ones")
    parser.add_argument("--out", type=Path, default=RESULTS / "codec.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor.*deprecated")
    results: dict[str, Any] = {}
    for title, tensor in tensors(options.weights).items():
        ways, sizes = ways_of(tensor)
        rows: dict[str, dict[str, float]] = measure(ways, tensor.nbytes, options.rounds)
        for name, size in sizes.items():
            rows[name] |= {"size_bytes": size, "ratio": tensor.nbytes / size}
        results[title] = {"size_bytes": tensor.nbytes, "shape": list(tensor.shape), "ways": rows}
        print(f"{title}: {tensor.dtype} {list(tensor.shape)}, {tensor.nbytes} bytes")
        for name, row in rows.items():
            sent = f"{row['ratio']:6.2f} times smaller" if "ratio" in row else ""
            torch_ratio = f"{row['time_to_torch']:6.2f} × torch" if "time_to_torch" in row else ""
            zstd_ratio = f"{row['time_to_zstd']:5.2f} × zstd"
            speed = f"{row['gb_s']:6.2f} GB/s"
            print(f"  {name:40}{text(row, 'µs')} {speed} {zstd_ratio} {torch_ratio}  {sent}", flush=True)
    write(
        options.out,
        results,
        zstandard=zstandard.__version__,
        zstd=".".join(map(str, zstandard.ZSTD_VERSION)),
        extension=_native.available(),
    )


if __name__ == "__main__":
    main()
