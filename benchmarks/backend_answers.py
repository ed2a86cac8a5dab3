"""Whether heads and tails that a backend runs answer within its tolerance, on 22 networks, at several batch sizes.

Each network is cut at a spread of its points. Head and tail are built for one sample and run on batches of 1, 2 and 5,
and what they give is compared with eager PyTorch. A part that a backend refuses, and a batch that runs in eager PyTorch
since what was built does not take it, are counted apart. Weights are random, and pictures small, which changes nothing
about which operators a network has.

    python -m benchmarks.backend_answers                       # results/backend-answers.json; goes on where it stopped
    python -m benchmarks.backend_answers --networks resnet18   # these anew
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks.support import exports, result_file
from torchsurgeon.backends import BuiltPart, Part, deviation, find_backend

OUT = result_file.RESULTS / "backend-answers.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- answers, by benchmarks.backend_answers -->", "<!-- end of answers -->"
BATCHES = (1, 2, 5)
BACKENDS = ("onnxruntime", "openvino", "openvino:bf16")
COMPILED = ("mobilenet_v3_small", "resnet18", "BERT")
"""The networks whose whole model and heads inductor compiles, too, which takes the longest."""
POINTS = 2
"""How many points of each network are tried, besides the whole model."""

Made = tuple[nn.Module, Callable[[int], Tensor]]
"""A network, and its input for a batch size."""


def _pictures(side: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.rand(batch, 3, side, side)


def _of_torchvision(name: str, side: int = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision.models import get_model

        return get_model(name, weights=None, **options), _pictures(side)

    return make


def _vision_transformer() -> Made:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(64, 16, 4, 3, 96, 192, num_classes=100)
    # torchvision begins with a last layer of zeros, which would hide everything before it.
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model, _pictures(64)


def _tokens(batch: int) -> Tensor:
    return torch.randint(0, 1000, (batch, 24))


_SMALL = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 1000}


def _bert() -> Made:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(intermediate_size=192, **_SMALL)), _tokens


def _distilbert() -> Made:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(dim=96, hidden_dim=192, n_layers=3, n_heads=3, vocab_size=1000)), _tokens


def _gpt2() -> Made:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=96, n_layer=3, n_head=3, vocab_size=1000, use_cache=False)), _tokens


def _whisper() -> Made:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    small = {"d_model": 96, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 192}
    return WhisperEncoder(WhisperConfig(max_source_positions=100, **small)), lambda batch: torch.rand(batch, 80, 200)


NETWORKS: dict[str, Callable[[], Made]] = {
    "alexnet": _of_torchvision("alexnet", 96),
    "vgg11_bn": _of_torchvision("vgg11_bn"),
    "squeezenet1_1": _of_torchvision("squeezenet1_1"),
    "resnet18": _of_torchvision("resnet18"),
    "resnet50": _of_torchvision("resnet50"),
    "resnext50_32x4d": _of_torchvision("resnext50_32x4d"),
    "googlenet": _of_torchvision("googlenet", init_weights=False, aux_logits=False),
    "densenet121": _of_torchvision("densenet121"),
    "mobilenet_v2": _of_torchvision("mobilenet_v2"),
    "mobilenet_v3_small": _of_torchvision("mobilenet_v3_small"),
    "mnasnet0_5": _of_torchvision("mnasnet0_5"),
    "shufflenet_v2_x0_5": _of_torchvision("shufflenet_v2_x0_5"),
    "efficientnet_b0": _of_torchvision("efficientnet_b0"),
    "regnet_y_400mf": _of_torchvision("regnet_y_400mf"),
    "convnext_tiny": _of_torchvision("convnext_tiny"),
    "swin_t": _of_torchvision("swin_t"),
    "vision transformer": _vision_transformer,
    "lraspp_mobilenet_v3_large": _of_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None),
    "BERT": _bert,
    "DistilBERT": _distilbert,
    "GPT-2": _gpt2,
    "Whisper encoder": _whisper,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="try these anew (default: those not tried)")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no network after so many minutes")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = result_file.known(options.out)
    begun_s = time.monotonic()
    for name in options.networks or [name for name in NETWORKS if name not in found]:
        if time.monotonic() - begun_s > 60 * options.minutes:
            break
        found[name] = tried(name)
        print(name, json.dumps(found[name]), flush=True)
        result_file.write(options.out, {name: found[name] for name in NETWORKS if name in found})
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, page(result_file.known(OUT)))


@torch.no_grad()
def tried(name: str) -> dict[str, Any]:
    """Return what each backend does with a network: how far its answers are at most, and what it does not take."""
    begun_s = time.monotonic()
    torch.manual_seed(0)
    model, make = NETWORKS[name]()
    model.eval()
    graph = ts.trace(model, make(1))
    inputs = [x for x in map(make, BATCHES) if _is_taken(graph, x)]
    last = len(graph.points) - 1
    chosen = sorted({round(last * (k + 1) / (POINTS + 1)) for k in range(POINTS)} - {0, last})
    points = [graph.points[k] for k in chosen]
    names = (*BACKENDS, *(("inductor",) if name in COMPILED else ()))
    rows = {backend: _Row(backend) for backend in names}
    for what, part, before in _parts(graph, points):
        calls = [_given(graph, x, before) for x in inputs]
        with exports.made_once():
            for backend, row in rows.items():
                if backend != "inductor" or before is None:
                    row.compare(what, part, calls)
    return {
        "points": [point.name for point in points],
        "of": len(graph.points),
        "batches": [len(x) for x in inputs],
        "backends": {backend: row.found for backend, row in rows.items()},
        "seconds": round(time.monotonic() - begun_s),
    }


def _is_taken(graph: ts.LayerGraph, x: Tensor) -> bool:
    """Return whether the traced model takes a batch; some models take another path for a batch of one."""
    try:
        graph.tensors_of_call((x,), {})
    except TypeError:
        return False
    return True


def _given(graph: ts.LayerGraph, x: Tensor, before: Part | None) -> Sequence[Tensor]:
    tensors = graph.tensors_of_call((x,), {})
    return tensors if before is None else before.segment(*tensors)


def _parts(graph: ts.LayerGraph, points: Sequence[ts.PartitionPoint]) -> Iterable[tuple[str, Part, Part | None]]:
    """Yield each part with its name, and the part that computes its inputs; None where these are the model's."""
    yield "whole", Part.head(graph, graph.points[-1]), None
    for point in points:
        head = Part.head(graph, point)
        yield f"head at {point.name}", head, None
        yield f"tail at {point.name}", Part.tail(graph, [spec.name for spec in point.tensors]), head


class _Row:
    """What one backend does with the parts of one network."""

    def __init__(self, name: str) -> None:
        self._backend = find_backend(name)
        self.found: dict[str, Any] = {
            "tolerance": self._backend.tolerance,
            "deviation": 0.0,
            "parts": 0,
            "any_batch": 0,
            "runs": 0,
            "in_eager": 0,
            "refused": {},
        }

    def compare(self, what: str, part: Part, calls: Sequence[Sequence[Tensor]]) -> None:
        """Build a part for the first call, and compare all calls with eager PyTorch."""
        found = self.found
        found["parts"] += 1
        made = BuiltPart(part, self._backend, None)
        made.build(*calls[0])
        if made.reason is not None:
            found["refused"][what] = made.reason
            return
        found["any_batch"] += made.free_batch
        for tensors in calls:
            if not made.takes(tensors):
                found["in_eager"] += 1
                continue
            far = max(deviation(a, b) for a, b in zip(made(*tensors), part.segment(*tensors), strict=True))
            found["deviation"] = max(found["deviation"], float(f"{far:.2g}"))
            found["runs"] += 1


def page(found: dict[str, Any]) -> str:
    """Return a table of how far answers are from those of eager PyTorch, as Markdown."""
    if not found:
        return "Not measured yet.\n"
    names = (*BACKENDS, "inductor")
    lines = [f"| network | points | batches | {' | '.join(names)} |", f"|---|---|---|{'---|' * len(names)}"]
    for name, row in found.items():
        cells = [_cell(row["backends"].get(backend)) for backend in names]
        batches = ", ".join(map(str, row["batches"]))
        lines.append(f"| {name} | {len(row['points'])} of {row['of']} | {batches} | {' | '.join(cells)} |")
    allowed = ", ".join(f"{name} {find_backend(name).tolerance:.0e}" for name in names)
    return "\n".join(lines) + f"\n\nThe largest deviation of any element is given; allowed are {allowed}.\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    notes = [f"{row['in_eager']} of {row['runs'] + row['in_eager']} runs in eager"] if row["in_eager"] else []
    notes += [f"{len(row['refused'])} of {row['parts']} parts not taken"] if row["refused"] else []
    return f"{row['deviation']:.1e}" + (f" ({', '.join(notes)})" if notes else "")


if __name__ == "__main__":
    main()
