"""transformers' models. Their configurations are small, their architecture is whole, their weights are random."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from benchmarks.coverage.case import Case, Factory, images, tokens

_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_VISION = {**_TEXT, "image_size": 64, "patch_size": 16}
_SPEECH = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 100,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
_WORDS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _text(batch: int = 1, length: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[1, length // 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def _pixels(batch: int = 1, size: int = 64) -> dict[str, torch.Tensor]:
    return {"pixel_values": images(batch, 3, size, size)}


def _hf(class_name: str, config_name: str, first: dict[str, Any], other: dict[str, Any], **options: Any) -> Case:
    import transformers

    torch.manual_seed(0)
    part = class_name.partition(".")[2]
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, class_name.partition(".")[0])(config)
    return Case((getattr(model, part) if part else model).eval(), (), first, ((), other))


def cases() -> dict[str, Factory]:
    words, more_words = _text(), _text(3, 9)
    pixels, more_pixels = _pixels(), _pixels(3)
    sound, more_sound = {"input_values": images(1, 2000)}, {"input_values": images(2, 2600)}
    mel, more_mel = {"input_features": images(1, 80, 100)}, {"input_features": images(2, 80, 100)}
    both = {**words, "decoder_input_ids": tokens(1, 5)}, {**more_words, "decoder_input_ids": tokens(3, 4)}
    small_t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, **_WORDS}
    gqa = {"num_key_value_heads": 2}
    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, **_WORDS}
    text: dict[str, tuple[str, dict[str, Any]]] = {
        "BertModel": ("BertConfig", {**_TEXT, **_WORDS}),
        "BertForSequenceClassification": ("BertConfig", {**_TEXT, **_WORDS}),
        "DistilBertModel": (
            "DistilBertConfig",
            {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100},
        ),
        "RobertaForMaskedLM": ("RobertaConfig", {**_TEXT, **_WORDS}),
        "AlbertModel": ("AlbertConfig", {**_TEXT, **_WORDS, "embedding_size": 32}),
        "ElectraModel": ("ElectraConfig", {**_TEXT, **_WORDS, "embedding_size": 32}),
        "MPNetModel": ("MPNetConfig", {**_TEXT, **_WORDS}),
        "DebertaV2Model": (
            "DebertaV2Config",
            {**_TEXT, **_WORDS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        ),
        "ModernBertModel": ("ModernBertConfig", {**_TEXT, **_WORDS, "num_hidden_layers": 4}),
        "XLNetModel": ("XLNetConfig", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, **_WORDS}),
        "FunnelModel": (
            "FunnelConfig",
            {"d_model": 64, "block_sizes": [1, 1], "n_head": 4, "d_head": 16, "d_inner": 128, "vocab_size": 100},
        ),
        "LongformerModel": ("LongformerConfig", {**_TEXT, **_WORDS, "attention_window": 4}),
        "GPT2LMHeadModel": ("GPT2Config", gpt2),
        "OPTForCausalLM": (
            "OPTConfig",
            {**_TEXT, **_WORDS, "ffn_dim": 128, "word_embed_proj_dim": 64},
        ),
        "BloomForCausalLM": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, **_WORDS}),
        "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**_TEXT, **_WORDS}),
        "LlamaForCausalLM": ("LlamaConfig", {**_TEXT, **_WORDS, **gqa}),
        "MistralForCausalLM": ("MistralConfig", {**_TEXT, **_WORDS, **gqa}),
        "Qwen2ForCausalLM": ("Qwen2Config", {**_TEXT, **_WORDS, **gqa}),
        "Qwen3ForCausalLM": ("Qwen3Config", {**_TEXT, **_WORDS, **gqa, "head_dim": 16}),
        "GemmaForCausalLM": ("GemmaConfig", {**_TEXT, **_WORDS, **gqa, "head_dim": 16}),
        "Gemma2ForCausalLM": ("Gemma2Config", {**_TEXT, **_WORDS, **gqa, "head_dim": 16}),
        "PhiForCausalLM": ("PhiConfig", {**_TEXT, **_WORDS}),
        "MixtralForCausalLM": ("MixtralConfig", {**_TEXT, **_WORDS, **gqa, "num_local_experts": 4}),
        "T5EncoderModel": ("T5Config", small_t5),
    }
    found: dict[str, Factory] = {}
    for name, (config, options) in text.items():
        found[f"transformers:{name}"] = functools.partial(_hf, name, config, words, more_words, **options)

    def add(name: str, config: str, first: dict[str, Any], other: dict[str, Any], **options: Any) -> None:
        found[f"transformers:{name}"] = functools.partial(_hf, name, config, first, other, **options)

    ids, more_ids = {"input_ids": tokens(1, 12)}, {"input_ids": tokens(2, 9)}
    add("MambaForCausalLM", "MambaConfig", ids, more_ids, hidden_size=64, num_hidden_layers=2, state_size=8, **_WORDS)
    add("T5ForConditionalGeneration", "T5Config", *both, **{**small_t5, "decoder_start_token_id": 0})
    add("BartForConditionalGeneration", "BartConfig", *both, **_SEQ2SEQ)
    add("MarianMTModel", "MarianConfig", *both, **_SEQ2SEQ)
    add("WhisperModel.encoder", "WhisperConfig", mel, more_mel, max_source_positions=50, **_SEQ2SEQ)
    whisper = {**mel, "decoder_input_ids": tokens(1, 5)}, {**more_mel, "decoder_input_ids": tokens(2, 7)}
    add("WhisperForConditionalGeneration", "WhisperConfig", *whisper, max_source_positions=50, **_SEQ2SEQ)
    add("Wav2Vec2ForCTC", "Wav2Vec2Config", sound, more_sound, **_TEXT, **_SPEECH, **_WORDS)
    add("HubertModel", "HubertConfig", sound, more_sound, **_TEXT, **_SPEECH, **_WORDS)
    for name in ("ViTForImageClassification", "DeiTModel", "BeitModel", "Dinov2Model", "ViTMSNModel"):
        add(name, f"{re.sub('ForImage.*|Model', '', name)}Config", pixels, more_pixels, **_VISION)
    add("CLIPVisionModel", "CLIPVisionConfig", pixels, more_pixels, **_VISION)
    add("SiglipVisionModel", "SiglipVisionConfig", pixels, more_pixels, **_VISION)
    clip = {"text_config": {**_TEXT, **_WORDS}, "vision_config": _VISION}
    add("CLIPModel", "CLIPConfig", {**words, **pixels}, {**_text(2, 9), **_pixels(2)}, **clip)
    windows = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
    add("SwinModel", "SwinConfig", pixels, more_pixels, **windows, window_size=4)
    add("Swinv2Model", "Swinv2Config", pixels, more_pixels, **windows, window_size=4)
    stages = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32]}
    add("ConvNextModel", "ConvNextConfig", pixels, _pixels(3, 96), **stages)
    add("ConvNextV2Model", "ConvNextV2Config", pixels, _pixels(3, 96), **stages)
    add("ResNetModel", "ResNetConfig", pixels, _pixels(3, 96), **resnet)
    add("RegNetModel", "RegNetConfig", pixels, _pixels(3, 96), **{**resnet, "layer_type": "y", "groups_width": 8})
    add("SegformerForSemanticSegmentation", "SegformerConfig", pixels, _pixels(3, 96), hidden_sizes=[16, 16, 32, 32])
    mobile = {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]}
    add("MobileViTModel", "MobileViTConfig", pixels, more_pixels, **mobile)
    add("YolosForObjectDetection", "YolosConfig", pixels, more_pixels, **{**_VISION, "image_size": [64, 64]})
    add(
        "VideoMAEModel",
        "VideoMAEConfig",
        *({"pixel_values": images(b, 4, 3, 64, 64)} for b in (1, 2)),
        num_frames=4,
        **_VISION,
    )
    add(
        "DPTForDepthEstimation",
        "DPTConfig",
        pixels,
        more_pixels,
        **{
            **_VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 32, 32],
            "is_hybrid": False,
            "fusion_hidden_size": 16,
        },
    )
    found["transformers:SamModel"] = _sam
    found["transformers:DetrForObjectDetection"] = _detr
    found["transformers:Mask2FormerForUniversalSegmentation"] = _mask2former
    return found


def _sam() -> Case:
    import transformers as hf

    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"image_size": 64, "patch_size": 8}
    config = hf.SamConfig(
        vision_config={
            **heads,
            **sizes,
            "hidden_size": 32,
            "mlp_dim": 64,
            "output_channels": 16,
            "num_pos_feats": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
        prompt_encoder_config={**sizes, "hidden_size": 16, "image_embedding_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**heads, "hidden_size": 16, "mlp_dim": 32, "iou_head_hidden_dim": 16},
    )
    torch.manual_seed(0)

    def call(batch: int, points: int) -> dict[str, torch.Tensor]:
        return _pixels(batch) | {
            "input_points": images(batch, 1, points, 2) * 64,
            "input_labels": torch.ones(batch, 1, points, dtype=torch.long),
        }

    return Case(hf.SamModel(config).eval(), (), call(1, 1), ((), call(2, 3)))


def _detr() -> Case:
    import transformers as hf

    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    small = {
        key: _SEQ2SEQ[key] for key in _SEQ2SEQ if key.startswith(("encoder", "decoder_l", "decoder_a", "decoder_f"))
    }
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        backbone=None,
        use_pretrained_backbone=False,
        d_model=64,
        num_queries=10,
        **small,
    )
    torch.manual_seed(0)
    return Case(hf.DetrForObjectDetection(config).eval(), (), _pixels(), ((), _pixels(2)))


def _mask2former() -> Case:
    import transformers as hf

    backbone = hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = hf.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=10,
    )
    torch.manual_seed(0)
    return Case(hf.Mask2FormerForUniversalSegmentation(config).eval(), (), _pixels(), ((), _pixels(2)))
