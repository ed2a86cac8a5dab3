"""Transformers as their own library makes them: keywords, masks, result objects and caches, at other sizes too."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from partitions import assert_same
from serving import check_split, split, spread
from torch import nn

import torchsurgeon as ts

hf = pytest.importorskip("transformers")

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "pad_token_id": 0,
}
_VISION = {
    **{k: v for k, v in _TEXT.items() if "_id" not in k and k != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 60,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids and a mask in which later samples are padded more."""
    ids = torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for i in range(1, batch):
        mask[i, length - 2 * i :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


def mel(batch: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.rand(batch, 80, 20, generator=torch.Generator().manual_seed(batch))}


def bert() -> Any:
    return hf.BertModel(hf.BertConfig(**_TEXT))


def distilbert() -> Any:
    return hf.DistilBertModel(hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=60))


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**_VISION))


def clip_vision() -> Any:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**_VISION))


def whisper_encoder() -> Any:
    return hf.WhisperModel(hf.WhisperConfig(**_SEQ2SEQ, max_source_positions=10)).encoder


def t5_encoder() -> Any:
    return hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60))


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=2))


MODELS = {
    bert: (tokens(1, 10), tokens(3, 7)),
    distilbert: (tokens(1, 10), tokens(3, 7)),
    vit: (pixels(1), pixels(3)),
    clip_vision: (pixels(1), pixels(2)),
    whisper_encoder: (mel(1), mel(2)),
    t5_encoder: (tokens(2, 8), tokens(3, 11)),
    llama: (tokens(1, 10), tokens(3, 7)),
}


def made(factory: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = factory().eval()
    return model


@pytest.mark.parametrize("factory", MODELS, ids=lambda f: f.__name__)
def test_calls_by_keyword_of_any_batch_and_length_give_the_models_result_object(factory: Any) -> None:
    example, other = MODELS[factory]
    with split(made(factory), **example) as module:
        assert len(module.graph.points) > 20
        assert not module.graph.opaque
        check_split(module, spread(module.graph, 6), ((), example), ((), other))
        with torch.no_grad():
            assert type(module(**other)) is type(module.model(**other))


def test_a_prefill_returns_its_cache() -> None:
    model = made(llama)
    example = tokens(1, 10)
    graph = ts.trace(model, **example)
    partition = ts.cut(graph, graph.points[len(graph.points) // 2])
    with torch.no_grad():
        result, expected = partition.tail(*partition.head(**example)), model(**example)
        # The cache is a whole one: the next token can be computed from it.
        following = {"input_ids": torch.tensor([[5]]), "past_key_values": result.past_key_values}
        assert_same(result.past_key_values.layers[0].keys, expected.past_key_values.layers[0].keys, "keys")
        own = model(input_ids=torch.tensor([[5]]), past_key_values=expected.past_key_values).logits
        assert torch.equal(model(**following).logits, own)


def test_flags_are_fixed_at_the_examples_values() -> None:
    example = tokens(1, 10)
    graph = ts.trace(made(llama), **example, use_cache=False)
    assert [spec.name for spec in graph.outputs] == ["logits"]
    with pytest.raises(TypeError, match="use_cache"):
        graph.bind(**example, use_cache=True)


def test_sizes_that_the_trace_built_in_are_refused_by_name() -> None:
    graph = ts.trace(made(vit), **pixels(1))
    with pytest.raises(TypeError, match=r"(another path|does not run).*\[1, 3, 64, 64\]"):
        graph.bind(pixel_values=torch.rand(1, 3, 64, 64))


class Branching(nn.Module):
    """Takes a path by the length of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.long(x).relu() if x.shape[1] > 16 else self.short(x).relu()


def test_a_call_that_takes_another_branch_than_the_example_is_answered_by_the_model_itself() -> None:
    model, other = made(Branching), torch.rand(1, 17, 8)
    with split(model, torch.rand(1, 8, 8)) as module:
        assert module.graph.traced_by == "recorded"
        check_split(module, module.graph.points, ((torch.rand(2, 16, 8),), {}))
        for point in module.graph.points[:-1]:
            module.partition = point.index
            assert torch.equal(module(other), model(other).detach())
            assert module.last is not None
            assert re.search("another path.*dimension 1 of 'x' must be <= 16, and is 17", str(module.last.degraded))
            with pytest.raises(TypeError, match="another path"):
                ts.cut(module.graph, point).head(other)


class Padded(nn.Module):
    """PyTorch's own encoder and decoder inside a model, called with every kind of mask."""

    def __init__(self, pads: bool) -> None:
        super().__init__()
        self.pads = pads
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(words)
        if self.pads:
            y = self.encoder(x, src_key_padding_mask=words == 0)
        else:
            y = self.encoder(x, mask=mask)
        return self.decoder(x, y, mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("pads", [False, True], ids=["masked", "padded"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_pytorchs_own_transformers_are_cut_between_their_layers(pads: bool, kind: torch.dtype) -> None:
    words = torch.tensor([[3, 4, 5, 6, 0, 0]])
    above = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mask = above if kind is torch.bool else torch.zeros(6, 6).masked_fill(above, float("-inf"))
    with split(made(lambda: Padded(pads)), words, mask) as module:
        names = {layer.name for layer in module.graph.layers}
        assert {"decoder.layers.0", "decoder.layers.1"} <= names
        assert "encoder" in names if pads else {"encoder.layers.0", "encoder.layers.2"} <= names
        check_split(module, module.graph.points, ((words, mask), {}))


def test_an_exported_encoder_runs_the_kernels_that_it_runs_itself() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.attend = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.layer(x * 2 if x.shape[1] > 4 else x)
            return y, self.attend(y, y, y)[0]

    with split(made(Odd), torch.rand(1, 6, 16)) as module:
        assert module.graph.traced_by == "recorded"
        check_split(module, module.graph.points, ((torch.rand(2, 9, 16),), {}))
