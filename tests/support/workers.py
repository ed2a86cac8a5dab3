"""What worker processes run. A worker that is spawned imports it by name, so it needs little else.

``Answers``  a collate function that splits a model in the worker that calls it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Answers:
    """Answers a batch with a model split against a server, and says which server answered.

    A SplitModule is not pickled, so the model is, and each worker makes its own SplitModule at its first batch.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, **options: Any) -> None:
        self.model, self.example, self.options = model, example, options
        self.split: Any = None

    def __call__(self, samples: list[torch.Tensor]) -> tuple[torch.Tensor, str | None]:
        import torchsurgeon as ts

        if self.split is None:
            self.split = ts.SplitModule(self.model, self.example, **self.options)
        answer = self.split(torch.stack(samples))
        return answer, self.split.last.server
