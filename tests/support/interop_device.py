"""The device's side of the interoperability test: run under another PyTorch than the server.

``python interop_device.py URL WEIGHTS`` asks the server for every partition point's answer and prints JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from torchsurgeon.module import SplitModule


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        x = x + y
        return self.act(x)


class Classifier(nn.Module):
    """Convolutions, a residual sum, attention, sizes read off tensors: what versions might name differently."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h * w).permute(0, 2, 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.fc(self.gelu(x).mean(dim=1)).softmax(-1)


def example() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def model() -> tuple[nn.Module, torch.Tensor]:
    """The factory that the server loads; weights come from a file on both sides."""
    return Classifier(), example()[:1]


def main(url: str, weights: str) -> None:
    classifier = Classifier().eval()
    classifier.load_state_dict(torch.load(weights, weights_only=True))
    answers = {}
    with SplitModule(classifier, example()[:1], server=url, name="net", partition="server") as split:
        for point in split.graph.points:
            split.partition = point.index
            answers[point.name] = split(example()).tolist()
        print(json.dumps({"torch": torch.__version__, "graph": split.graph.to_json(), "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
