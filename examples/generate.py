"""Translate with a split encoder: the encoder runs once and is cut; the decoder runs here, once for each token.

python generate.py        # a tiny T5 with random weights, and a server in this process
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf

import torchsurgeon as ts
from torchsurgeon import serve


def called_with(part: torch.nn.Module, run: Any) -> dict[str, Any]:
    """Return the keyword arguments that ``part`` is called with while ``run()`` runs: the example of its calls."""
    seen: list[dict[str, Any]] = []
    handle = part.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run()
    handle.remove()
    return seen[0]


def main() -> None:
    torch.manual_seed(0)  # random weights; with your own, load them on both sides
    config = hf.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = hf.T5ForConditionalGeneration(config).eval()
    sentence = {"input_ids": torch.tensor([[5, 6, 7, 8, 1]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    options = {"max_new_tokens": 8, "num_beams": 2}
    whole = model.generate(**sentence, **options)
    example = called_with(model.encoder, lambda: model.generate(**sentence, **options))
    registry = serve.ModelRegistry()
    registry.add("encoder", copy.deepcopy(model.encoder), example)
    with serve.Server(serve.create_app(registry)) as server:
        split = ts.SplitModule(model.encoder, example, server=server.url, name="encoder")
        split.partition = len(split.graph.layers) // 2
        model.encoder = split
        assert torch.equal(model.generate(**sentence, **options), whole)
        print(f"the same {whole.shape[1]} tokens, with the encoder {split.last.where}")
        print(split.last)
        assert split.last.degraded is None
        split.close()


if __name__ == "__main__":
    main()
