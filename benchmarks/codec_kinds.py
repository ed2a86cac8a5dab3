"""Fitted codecs on boundaries of other kinds than a classifier's: tokens, several tensors of a detector, sound.

The weights are random, so nothing is said about answers: only bytes, and how like the outputs stay (mean cosine). Each
codec is fitted to one half of the inputs and measured on the other, at the lowest of its rates whose outputs are at
least as like the model's own as those behind ``int8+zstd``, which is the rival, and behind ``int4+zstd``.

    python -m benchmarks.codec_kinds   # results/codec-kinds.json and the table in docs/codecs.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks.support import pictures, result_file
from torchsurgeon.accuracy.scores import likeness
from torchsurgeon.codec import Codec, find_codec, fit_codec, halves
from torchsurgeon.cutting.partition import cut
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

OUT = result_file.RESULTS / "codec-kinds.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "codecs.md"
BEGIN, END = "<!-- kinds, by benchmarks.codec_kinds -->", "<!-- end of kinds -->"
RIVALS = ("int8+zstd", "int4+zstd")
_RATES = 24


class Pyramid(nn.Module):
    """A detector's backbone with a feature pyramid, and a small head on each level."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        self.backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        self.boxes = nn.Sequential(nn.Conv2d(256, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.boxes(level) for level in self.backbone(x).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=96)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, make in KINDS.items():
        torch.manual_seed(0)
        results[name] = _measured(*make(options.inputs))
        print(name, results[name], flush=True)
    result_file.write(options.out, results, **pictures.packages())
    if options.out == OUT:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{page(results)}\n{END}{rest.partition(END)[2]}")


def _photographs(count: int, side: int) -> list[Tensor]:
    found = pictures.photographs(side, views=-(-count // 157)).sample[:count]
    return list(pictures.normalized(found).split(1))


def _tokens(count: int) -> tuple[nn.Module, list[Tensor], Callable[[LayerGraph], PartitionPoint]]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=128, patch_size=16, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768)
    # Its scores would be zero, since torchvision begins with a last layer of zeros.
    model.heads = nn.Identity()
    return model.eval(), _photographs(count, 128), lambda graph: _named(graph, "encoder.layers.encoder_layer_2")


def _pyramid(count: int) -> tuple[nn.Module, list[Tensor], Callable[[LayerGraph], PartitionPoint]]:
    def point(graph: LayerGraph) -> PartitionPoint:
        # The first at which several levels cross and no earlier layer is still needed.
        return max((one for one in graph.points if one.index < len(graph.layers)), key=_levels)

    return Pyramid().eval(), _photographs(count, 128), point


def _levels(point: PartitionPoint) -> tuple[int, int]:
    return sum(spec.shape[1:2] == (256,) for spec in point.tensors), -point.index


def _sound(count: int) -> tuple[nn.Module, list[Tensor], Callable[[LayerGraph], PartitionPoint]]:
    layers = [nn.TransformerEncoderLayer(192, 3, 768, batch_first=True, activation="gelu") for _ in range(4)]

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(80, 192, 3, padding=1), nn.Conv1d(192, 192, 3, stride=2, padding=1)
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.gelu(self.second(nn.functional.gelu(self.first(x))))
            return self.layers(x.transpose(1, 2)).mean(1)  # type: ignore[no-any-return]

    # Bands of noise that swell and fade, as the energies of speech do.
    smooth = nn.functional.interpolate(torch.randn(count, 20, 25), size=400, mode="linear")
    sounds = nn.functional.interpolate(smooth.transpose(1, 2), size=80, mode="linear").transpose(1, 2)
    calls = list((sounds + 0.3 * torch.randn(count, 80, 400)).split(1))
    return Encoder().eval(), calls, lambda graph: _named(graph, "layers.1")


def _named(graph: LayerGraph, name: str) -> PartitionPoint:
    """Return the last point inside a layer of this name at which a single tensor crosses."""
    inside = [one for one in graph.points if one.name.startswith(name) and len(one.tensors) == 1]
    return max(inside, key=lambda one: one.index)


KINDS = {
    "tokens of a vision transformer": _tokens,
    "levels of a detector's feature pyramid": _pyramid,
    "frames of a sound encoder": _sound,
}


@torch.no_grad()
def _measured(
    model: nn.Module, calls: Sequence[Tensor], where: Callable[[LayerGraph], PartitionPoint]
) -> dict[str, Any]:
    graph = ts.trace(model, calls[0])
    point = where(graph)
    setup, judging = halves(calls)
    fitted = fit_codec(graph, point, setup, answers="values", name="kind")
    part = cut(graph, point)
    found: dict[str, Any] = {
        "point": point.name,
        "tensors": [str(spec) for spec in point.tensors],
        "raw_bytes": sum(spec.size_bytes for spec in point.tensors),
        "rivals": {},
    }
    boundaries = [part.head(call) for call in judging]
    own = [_outputs(part.tail(*boundary)) for boundary in boundaries]
    low, high = fitted.rates[-1], fitted.rates[0]
    rates = [low * (high / low) ** (k / (_RATES - 1)) for k in range(_RATES)]
    for rival in RIVALS:
        size_bytes, cosine = _coded(find_codec(rival), point, part.tail, boundaries, own)
        ours = None
        for rate in rates:
            tried = _coded(fitted.at(min(max(rate, low), high)), point, part.tail, boundaries, own)
            if tried[1] >= cosine:
                ours = tried
                break
        found["rivals"][rival] = {
            "size_bytes": size_bytes,
            "cosine": cosine,
            "fitted_bytes": None if ours is None else ours[0],
            "fitted_cosine": None if ours is None else ours[1],
        }
    return found


def _coded(
    codec: Codec,
    point: PartitionPoint,
    tail: nn.Module,
    boundaries: Sequence[Sequence[Tensor]],
    own: Sequence[list[Tensor]],
) -> tuple[float, float]:
    """Return the mean bytes of boundaries, and how like the outputs behind them are to the model's own."""
    sizes, likes = [], []
    for boundary, wanted in zip(boundaries, own, strict=True):
        encoded = [codec.encode(one, spec.name) for one, spec in zip(boundary, point.tensors, strict=True)]
        decoded = [
            find_codec(e.codec).decode(e.data, one.dtype, one.shape, e.order, max_bytes=one.nbytes)
            for e, one in zip(encoded, boundary, strict=True)
        ]
        sizes.append(sum(len(e.data) for e in encoded))
        likes.append(likeness(wanted, _outputs(tail(*decoded))))
    return statistics.mean(sizes), statistics.mean(likes)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def page(results: dict[str, Any]) -> str:
    """Return a table of bytes at the likeness of each rival, as Markdown."""
    lines = ["| what crosses | tensors | rival | its bytes | cosine | fitted, as like |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        for rival, row in found["rivals"].items():
            ours = row["fitted_bytes"]
            cell = "at no rate" if ours is None else f"{ours / 1e3:.1f} kB, 1/{row['size_bytes'] / ours:.1f}"
            count = len(found["tensors"])
            size = f"{row['size_bytes'] / 1e3:.1f} kB"
            lines.append(f"| {name} | {count} | {rival} | {size} | {row['cosine']:.5f} | {cell} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
