"""The models of the coverage table: torchvision's, transformers' and timm's own, and small ones of awkward habits.

Weights are random, nothing is downloaded. Configurations of transformers are small, their architecture is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchsurgeon.models import specs

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the call it is traced with, and a call of other sizes (or None to double the batch)."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    other: Arguments | None = None
    note: str = ""


Factory = Callable[[], Case]

# Inputs smaller than the model's own, where it takes any and its own would take minutes on a CPU.
_SMALLER = (
    (r"torchvision:(deeplab|fcn|lraspp)", "float32[1,3,128,128]"),
    (r"torchvision:(convnext|densenet|efficientnet|regnet|vgg|wide_resnet|resnext)", "float32[1,3,96,96]"),
    (r"torchvision:resnet(50|101|152)", "float32[1,3,96,96]"),
    (r"torchvision:(swin3d|r3d|r2plus1d|mc3)", "float32[1,3,16,64,64]"),
)


def cases() -> dict[str, Factory]:
    """Return every model of the table by name."""
    from torchvision import models

    found: dict[str, Factory] = {}
    for name in models.list_models():
        found[f"torchvision:{name}"] = functools.partial(_torchvision, f"torchvision:{name}")
    for name in models.list_models(module=models.quantization):
        found[f"torchvision:{name} (int8)"] = functools.partial(_int8, name)
    found |= _transformers() | {f"timm:{name}": functools.partial(_timm, name) for name in _TIMM} | _OWN
    return found


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _torchvision(spec: str) -> Case:
    smaller = next((inputs for pattern, inputs in _SMALLER if re.match(pattern, spec)), None)
    loaded = specs.load(spec, input_spec=smaller)
    other: Arguments | None = None
    note = ""
    if isinstance(loaded.args[0], list):
        # Random weights are sure of nothing: without this there would be no boxes to compare.
        for part in (loaded.model, getattr(loaded.model, "roi_heads", None)):
            if hasattr(part, "score_thresh"):
                part.score_thresh = 0.0
        resize = loaded.model.transform
        if min(resize.min_size) > 320 and resize.fixed_size is None:
            resize.min_size, resize.max_size, note = (160,), 256, "resized to 160 … 256"
        if hasattr(loaded.model, "rpn"):
            loaded.model.rpn._post_nms_top_n["testing"], loaded.model.roi_heads.detections_per_img = 50, 10
        loaded.args[0][:] = [images(3, 240, 320), images(3, 300, 200)]
        other = (([images(3, 200, 260), images(3, 280, 280)],), {})
    return Case(loaded.model, loaded.args, loaded.kwargs, other, note)


def _int8(name: str) -> Case:
    from torchvision import models

    example = specs.load(f"torchvision:{name}").args
    torch.manual_seed(0)
    options = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    return Case(models.get_model(name, weights=None, quantize=True, **options).eval(), example)


# --- transformers ---

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


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _text(batch: int = 1, length: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[1, length // 2 :] = 0
    return {"input_ids": _tokens(batch, length), "attention_mask": mask}


def _pixels(batch: int = 1, size: int = 64) -> dict[str, torch.Tensor]:
    return {"pixel_values": images(batch, 3, size, size)}


def _hf(class_name: str, config_name: str, first: dict[str, Any], other: dict[str, Any], **options: Any) -> Case:
    import transformers

    torch.manual_seed(0)
    part = class_name.partition(".")[2]
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, class_name.partition(".")[0])(config)
    return Case((getattr(model, part) if part else model).eval(), (), first, ((), other))


def _transformers() -> dict[str, Factory]:
    words, more_words = _text(), _text(3, 9)
    pixels, more_pixels = _pixels(), _pixels(3)
    sound, more_sound = {"input_values": images(1, 2000)}, {"input_values": images(2, 2600)}
    mel, more_mel = {"input_features": images(1, 80, 100)}, {"input_features": images(2, 80, 100)}
    both = {**words, "decoder_input_ids": _tokens(1, 5)}, {**more_words, "decoder_input_ids": _tokens(3, 4)}
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

    ids, more_ids = {"input_ids": _tokens(1, 12)}, {"input_ids": _tokens(2, 9)}
    add("MambaForCausalLM", "MambaConfig", ids, more_ids, hidden_size=64, num_hidden_layers=2, state_size=8, **_WORDS)
    add("T5ForConditionalGeneration", "T5Config", *both, **{**small_t5, "decoder_start_token_id": 0})
    add("BartForConditionalGeneration", "BartConfig", *both, **_SEQ2SEQ)
    add("MarianMTModel", "MarianConfig", *both, **_SEQ2SEQ)
    add("WhisperModel.encoder", "WhisperConfig", mel, more_mel, max_source_positions=50, **_SEQ2SEQ)
    whisper = {**mel, "decoder_input_ids": _tokens(1, 5)}, {**more_mel, "decoder_input_ids": _tokens(2, 7)}
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
    found["transformers:DetrForObjectDetection"] = _detr
    found["transformers:Mask2FormerForUniversalSegmentation"] = _mask2former
    return found


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


# --- timm ---

_TIMM = """
resnetv2_50 seresnet50 skresnet18 res2net50_26w_4s resnest14d dla34 dpn68 vovnet39a hrnet_w18_small xception41
cs3darknet_s regnetx_002 tf_efficientnet_lite0 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_050 repvgg_a0
mobileone_s0 fastvit_t8 repvit_m0_9 starnet_s1 convnextv2_atto mambaout_femto edgenext_xx_small focalnet_tiny_srf
eca_nfnet_l0 vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
xcit_nano_12_p16_224 convit_tiny crossvit_tiny_240 twins_svt_small volo_d1_224 tnt_s_patch16_224 pit_ti_224 levit_128s
swinv2_cr_tiny_ns_224 coatnet_nano_rw_224 mobilevit_xxs efficientformer_l1 efficientvit_b0 tiny_vit_5m_224 pvt_v2_b0
poolformer_s12 davit_tiny gcvit_xxtiny nest_tiny hiera_tiny_224 mixer_s32_224 gmlp_s16_224 sequencer2d_s
lambda_resnet26t halonet26t botnet26t_256
""".split()  # noqa: SIM905


def _timm(name: str) -> Case:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    return Case(model, (images(1, *model.pretrained_cfg["input_size"]),))


# --- small models of awkward habits ---

_OWN: dict[str, Factory] = {}


def _own(make: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(0)
        case = make()
        case.model.eval()
        return case

    _OWN[f"own:{make.__name__.replace('_', ' ')}"] = seeded
    return make


def _model(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            setattr(made, name, part)
        else:
            made.register_buffer(name, part)
    return made


@_own
def stages_in_Sequential() -> Case:
    def stage(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.GELU())

    body = nn.Sequential(stage(3, 8), nn.Sequential(stage(8, 16), stage(16, 16)))
    return Case(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), (images(1, 3, 32, 32),))


@_own
def LSTM() -> Case:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y, (h, _) = self.lstm(x)
        return self.head(y[:, -1] + h[-1])

    lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True)
    model = _model(lambda self, x: self.head(self.lstm(x)[0][:, -1]), lstm=lstm, head=nn.Linear(32, 4))
    return Case(model, (images(1, 7, 8),), other=((images(3, 5, 8),), {}))


@_own
def GRU_with_a_state_in_and_out() -> Case:
    def forward(self: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
        y, h = self.gru(x, h)
        return self.head(y), h

    model = _model(forward, gru=nn.GRU(8, 16), head=nn.Linear(16, 4))
    return Case(model, (images(7, 1, 8), images(1, 1, 16)), other=((images(5, 3, 8), images(1, 3, 16)), {}))


@_own
def LSTM_then_GRU_states_used() -> Case:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y, (h, c) = self.lstm(x)
        z, g = self.gru(y)
        return {"last": self.head(z[:, -1]), "states": (h, c, g)}

    lstm, gru = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
    return Case(_model(forward, lstm=lstm, gru=gru, head=nn.Linear(16, 4)), (images(1, 7, 8),))


@_own
def MultiheadAttention_with_weights() -> Case:
    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y, weights = self.attention(x, x, x, key_padding_mask=mask)
        return self.head(y + x), weights

    model = _model(forward, attention=nn.MultiheadAttention(16, 4, batch_first=True), head=nn.Linear(16, 4))
    mask = torch.zeros(1, 6, dtype=torch.bool)
    return Case(model, (images(1, 6, 16), mask), other=((images(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)), {}))


@_own
def TransformerEncoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return Case(nn.TransformerEncoder(layer, 2), (images(1, 6, 16),), other=((images(3, 9, 16),), {}))


@_own
def Transformer() -> Case:
    model = nn.Transformer(16, 4, 2, 2, 32, batch_first=True)
    return Case(model, (images(1, 6, 16), images(1, 4, 16)), other=((images(3, 9, 16), images(3, 5, 16)), {}))


@_own
def tied_weights_and_integer_input() -> Case:
    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens))))

    embed, out = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    out.weight = embed.weight
    model = _model(forward, embed=embed, mix=nn.Linear(16, 16), out=out)
    return Case(model, (_tokens(1, 8) % 50,), other=((_tokens(3, 5) % 50,), {}))


@_own
def several_inputs_and_a_dict_of_outputs() -> Case:
    def forward(self: Any, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        a, b = self.see(image).mean((2, 3)), self.read(text)
        joint = a * b if scale is None else a * b * scale
        return {"joint": joint, "parts": [a, b], "score": (joint.sum(1), torch.sigmoid(joint))}

    model = _model(forward, see=nn.Conv2d(3, 8, 3), read=nn.Linear(6, 8))
    return Case(model, (images(1, 3, 16, 16), images(1, 6)), {"scale": images(1, 8)})


@_own
def buffers_and_a_mask() -> Case:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        scores = (x @ x.transpose(1, 2)).masked_fill(~self.causal[:length, :length], float("-inf"))
        return self.out(scores.softmax(-1) @ (x + self.positions[:length]))

    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    model = _model(forward, causal=causal, positions=images(32, 16), out=nn.Linear(16, 4))
    return Case(model, (images(1, 6, 16),), other=((images(2, 11, 16),), {}))


@_own
def UNet_with_skips_and_interpolation() -> Case:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.one(x))
        b = torch.relu(self.two(nn.functional.max_pool2d(a, 2)))
        up = nn.functional.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([up, a], 1))

    convs = {"one": nn.Conv2d(3, 8, 3, padding=1), "two": nn.Conv2d(8, 8, 3, padding=1), "out": nn.Conv2d(16, 2, 1)}
    return Case(_model(forward, **convs), (images(1, 3, 33, 47),), other=((images(2, 3, 20, 30),), {}))


@_own
def compiled_by_torch() -> Case:
    inner = stages_in_Sequential()
    return Case(torch.compile(inner.model, backend="eager"), inner.args)  # type: ignore[arg-type]


@_own
def a_part_compiled_by_torch() -> Case:
    part = torch.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)), backend="eager")
    return Case(nn.Sequential(part, nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3)), (images(1, 3, 12, 12),))


@_own
def bfloat16_with_float32_statistics() -> Case:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.conv(x.to(torch.bfloat16))
        return self.out(y.float().mean((2, 3))), y.argmax(1), y > 0

    model = _model(forward, conv=nn.Conv2d(3, 8, 3).bfloat16(), out=nn.Linear(8, 3))
    return Case(model, (images(1, 3, 16, 16),))


@_own
def complex_numbers_by_FFT() -> Case:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.rfft2(self.inside(x)) * self.filter
        return self.outside(torch.fft.irfft2(y, s=x.shape[-2:]))

    convs = {"inside": nn.Conv2d(3, 4, 3, padding=1), "outside": nn.Conv2d(4, 2, 1)}
    weights = torch.complex(images(4, 16, 9), images(4, 16, 9))
    return Case(_model(forward, **convs, filter=weights), (images(1, 3, 16, 16),))


@_own
def branch_on_values_inside_a_part() -> Case:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.mean() > 0.5 else x - 1

    layers = (nn.Conv2d(3, 8, 3), Gate(), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return Case(nn.Sequential(*layers), (images(1, 3, 12, 12),))
