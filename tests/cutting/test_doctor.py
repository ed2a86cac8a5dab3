"""The doctor tells the truth about a model."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from torchsurgeon import cli
from torchsurgeon.cutting import doctor
from torchsurgeon.errors import TraceError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.conv(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Forgetful(nn.Module):
    """Answers differently each time, by a state outside of the model."""

    calls: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.layer(x) * self.calls[0]


def net() -> tuple[nn.Module, torch.Tensor]:
    return Net().eval(), torch.rand(1, 3, 16, 16)


def test_a_convolutional_model() -> None:
    found = doctor.examine(*net())
    assert found.graph.traced_by == "recorded"
    assert found.points_per_block == {"(top level)": 2, "blocks.0": 2, "blocks.1": 2}
    # The input is 3·16·16 floats; blocks.0 gives 8·8·8, blocks.1 8·4·4, the mean 8.
    assert [point.name for point in found.worthwhile] == ["blocks.0.conv", "blocks.1.conv", "mean"]
    assert found.too_big == 1
    assert found.free_sizes == {"x": (True, False, True, True)}
    assert found.repeatable
    assert found.trace_s > 0


def test_an_answer_that_depends_on_earlier_calls_is_refused() -> None:
    with pytest.raises(TraceError, match=r"keeps state between calls.*'Forgetful\.calls'"):
        doctor.examine(Forgetful().eval(), torch.rand(2, 4))


def test_random_numbers_are_told() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    found = doctor.examine(Noisy().eval(), torch.rand(2, 4))
    assert not found.repeatable
    assert any("random" in note for note in found.notes)


def test_the_command_says_it_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", f"{__name__}:net"]) == 0
    out = capsys.readouterr().out
    for words in (
        "recording its calls of PyTorch",
        "kept whole",
        "1 (free)×3×16 (free)×16 (free)",
        "the same bits in two runs",
        "the same bits as the model's: the example, other values, one more sample",
        "blocks.1",
        "mean",
    ):
        assert words in out, words
