"""Whether a prediction says so where it knows little: layers unlike those that a calibration samples, measured here.

Forty layers that are larger than any sample, of kinds or variants without samples, or of combinations of sizes that no
sample comes near. Each is predicted and measured on this machine: its time lies in the predicted interval, or the
layer was warned of by name, or both. Writes JSON, and the table of docs/prediction.md.

    python -m benchmarks.unlike_samples                           # calibrates for five minutes first
    python -m benchmarks.unlike_samples --device laptop.json      # a calibration of this machine
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write

OUT = RESULTS / "unlike-samples.json"
PAGE = Path(__file__).parent.parent / "docs" / "prediction.md"
BEGIN, END = "<!-- unlike-samples -->", "<!-- /unlike-samples -->"

Build = Callable[[], nn.Module]


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], *tensors: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"tensor_{index}", tensor)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.buffers())


class First(nn.Module):
    """The first result of a layer that has several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)[0]


def attention(x: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "depthwise convolution 31×31, 64 channels of 56²": (
        lambda: nn.Conv2d(64, 64, 31, padding=15, groups=64), (1, 64, 56, 56)),
    "depthwise convolution 51×51, 32 channels of 56²": (
        lambda: nn.Conv2d(32, 32, 51, padding=25, groups=32), (1, 32, 56, 56)),
    "depthwise convolution 7×7, 256 channels of 112²": (
        lambda: nn.Conv2d(256, 256, 7, padding=3, groups=256), (1, 256, 112, 112)),
    "convolution 31×31, 8 → 16 channels of 64²": (lambda: nn.Conv2d(8, 16, 31, padding=15), (1, 8, 64, 64)),
    "convolution 3×3, one channel of 1024²": (lambda: nn.Conv2d(1, 32, 3, padding=1), (1, 1, 1024, 1024)),
    "convolution 3×3, batch of 32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 28, 28)),
    "convolution 3×3, dilation 12": (lambda: nn.Conv2d(256, 256, 3, padding=12, dilation=12), (1, 256, 32, 32)),
    "convolution 1×1, 8192 channels": (lambda: nn.Conv2d(8192, 1024, 1), (1, 8192, 7, 7)),
    "convolution 1-D over 160,000 samples of sound": (lambda: nn.Conv1d(1, 512, 10, stride=5), (1, 1, 160_000)),
    "convolution 1-D, kernel 128": (lambda: nn.Conv1d(64, 64, 128, padding=64), (1, 64, 2000)),
    "convolution 3-D, 16 frames of 56²": (lambda: nn.Conv3d(16, 32, 3, padding=1), (1, 16, 16, 56, 56)),
    "convolution 3-D, volume of 96³": (lambda: nn.Conv3d(1, 16, 3, padding=1), (1, 1, 96, 96, 96)),
    "depthwise convolution 3-D": (lambda: nn.Conv3d(64, 64, 3, padding=1, groups=64), (1, 64, 8, 28, 28)),
    "transposed convolution 3-D": (lambda: nn.ConvTranspose3d(32, 16, 2, stride=2), (1, 32, 16, 24, 24)),
    "transposed convolution 1-D, stride 8": (lambda: nn.ConvTranspose1d(256, 128, 16, stride=8), (1, 256, 400)),
    "linear, batch of 64 × 512 rows": (lambda: nn.Linear(512, 512), (64, 512, 512)),
    "linear, 100,000 outputs": (lambda: nn.Linear(512, 100_000), (1, 512)),
    "linear of float64": (lambda: nn.Linear(1024, 1024).double(), (64, 1024)),
    "linear of bfloat16": (lambda: nn.Linear(1024, 1024).bfloat16(), (64, 1024)),
    "matrix product of 2048²": (lambda: Call(torch.matmul, torch.rand(2048, 2048)), (1, 2048, 2048)),
    "4,096 matrix products of 8²": (lambda: Call(torch.matmul, torch.rand(4096, 8, 8)), (4096, 8, 8)),
    "attention over 4,096 positions": (lambda: Call(attention), (1, 4, 4096, 64)),
    "attention, 512 heads of 16 positions": (lambda: Call(attention), (1, 512, 16, 32)),
    "GRU, 2,000 steps": (lambda: First(nn.GRU(64, 128, batch_first=True)), (1, 2000, 64)),
    "LSTM, 2,048 hidden": (lambda: First(nn.LSTM(512, 2048, batch_first=True)), (1, 16, 512)),
    "LSTM, batch of 256": (lambda: First(nn.LSTM(64, 64, batch_first=True)), (256, 32, 64)),
    "RNN with ReLU, 5,000 steps": (
        lambda: First(nn.RNN(16, 16, nonlinearity="relu", batch_first=True)), (1, 5000, 16)),
    "layer norm of 65,536 rows": (lambda: nn.LayerNorm(64), (1, 65_536, 64)),
    "instance norm": (lambda: nn.InstanceNorm2d(64), (1, 64, 112, 112)),
    "local response norm": (lambda: nn.LocalResponseNorm(5), (1, 64, 56, 56)),
    "softmax over 250,000 classes": (lambda: nn.Softmax(-1), (8, 250_000)),
    "max pooling 3-D": (lambda: nn.MaxPool3d(3, 2, 1), (1, 64, 16, 56, 56)),
    "average pooling 31×31": (lambda: nn.AvgPool2d(31, 1, 15), (1, 32, 64, 64)),
    "PReLU": (lambda: nn.PReLU(64), (1, 64, 112, 112)),
    "ReLU of 64 million values": (lambda: nn.ReLU(), (1, 64, 1000, 1000)),
    "sine": (lambda: Call(torch.sin), (1, 256, 4096)),
    "trilinear interpolation": (
        lambda: Call(lambda x: functional.interpolate(x, scale_factor=2, mode="trilinear")), (1, 16, 16, 32, 32)),
    "sorting a million values": (lambda: Call(lambda x: torch.sort(x, -1)[0]), (1, 1_000_000)),
    "fast Fourier transform": (lambda: Call(lambda x: torch.fft.rfft(x, dim=-1).abs()), (1, 64, 16_384)),
    "distances of 2,000 points": (lambda: Call(lambda x: torch.cdist(x, x)), (1, 2000, 64)),
}  # fmt: skip


def tried(predictor: ts.Predictor, build: Build, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Predict and measure one layer."""
    torch.manual_seed(0)
    model = build().eval()
    dtype = next((tensor.dtype for tensor in model.parameters()), torch.float32)
    graph = ts.trace(model, torch.rand(shape, dtype=dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ts.PredictionWarning)
        predicted = predictor.predict(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.NoisyProfileWarning)
        measured = ts.profile(graph, repeats=repeats, warmup=2, meter=None)
    low_s, high_s = predicted.whole_interval_s or (0.0, 0.0)
    return {
        "measured_s": measured.total_s,
        "predicted_s": predicted.total_s,
        "interval_s": [low_s, high_s],
        "inside": low_s <= measured.total_s <= high_s,
        "warned": "; ".join(sorted(set(predicted.warned.values()))),
        "warnings": len(caught),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a table for the documentation."""
    inside = sum(row["inside"] for row in results.values())
    silent = sum(not (row["inside"] or row["warned"]) for row in results.values())
    lines = [
        f"{inside} of {len(results)} lie inside their interval; {silent} lie outside of it without a warning.",
        "",
        "| layer | measured | predicted | 90 % interval | inside | warned of |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        interval = " … ".join(map(_ms, row["interval_s"]))
        lines.append(
            f"| {name} | {_ms(row['measured_s'])} ms | {_ms(row['predicted_s'])} ms | {interval} ms "
            f"| {'yes' if row['inside'] else 'no'} | {row['warned'] or 'not'} |"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=Path, help="a calibration of this machine with one thread")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds to calibrate for without --device")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictor = ts.Predictor.load(args.device) if args.device else ts.calibrate("cpu", budget_s=args.budget)
    results = {}
    for name, (build, shape) in LAYERS.items():
        results[name] = row = tried(predictor, build, shape, args.repeats)
        verdict = "inside" if row["inside"] else "warned" if row["warned"] else "WRONG WITHOUT A WORD"
        print(f"{name}: {_ms(row['measured_s'])} ms, predicted {_ms(row['predicted_s'])}, {verdict}", flush=True)
    silent = [name for name, row in results.items() if not (row["inside"] or row["warned"])]
    print(f"{len(results)} layers, {sum(row['inside'] for row in results.values())} inside, {len(silent)} in silence")
    write(args.out, results, calibrated_for_s=predictor.provenance["calibrated_for_s"])
    if args.out == OUT:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
