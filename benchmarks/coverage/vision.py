"""torchvision's and timm's models. Their weights are random."""

from __future__ import annotations

import functools
import re

import torch

from benchmarks.coverage.case import Arguments, Case, Factory, images
from torchsurgeon.models import specs

# Inputs smaller than the model's own, where it takes any and its own would take minutes on a CPU.
_SMALLER = (
    (r"torchvision:(deeplab|fcn|lraspp)", "float32[1,3,128,128]"),
    (r"torchvision:(convnext|densenet|efficientnet|regnet|vgg|wide_resnet|resnext)", "float32[1,3,96,96]"),
    (r"torchvision:resnet(50|101|152)", "float32[1,3,96,96]"),
    (r"torchvision:(swin3d|r3d|r2plus1d|mc3)", "float32[1,3,16,64,64]"),
)


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


_TIMM = """
resnetv2_50 seresnet50 skresnet18 res2net50_26w_4s resnest14d dla34 dpn68 vovnet39a hrnet_w18_small xception41
cs3darknet_s regnetx_002 tf_efficientnet_lite0 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_050 repvgg_a0
mobileone_s0 fastvit_t8 repvit_m0_9 starnet_s1 convnextv2_atto mambaout_femto edgenext_xx_small focalnet_tiny_srf
eca_nfnet_l0 vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
xcit_nano_12_p16_224 convit_tiny crossvit_tiny_240 twins_svt_small volo_d1_224 tnt_s_patch16_224 pit_ti_224 levit_128s
swinv2_cr_tiny_ns_224 coatnet_nano_rw_224 mobilevit_xxs efficientformer_l1 efficientvit_b0 tiny_vit_5m_224 pvt_v2_b0
poolformer_s12 davit_tiny gcvit_xxtiny nest_tiny hiera_tiny_224 mixer_s32_224 gmlp_s16_224 sequencer2d_s
lambda_resnet26t halonet26t botnet26t_256 mvitv2_tiny efficientvit_m0
""".split()  # noqa: SIM905


def _timm(name: str) -> Case:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    return Case(model, (images(1, *model.pretrained_cfg["input_size"]),))


def torchvision_cases() -> dict[str, Factory]:
    from torchvision import models

    found: dict[str, Factory] = {}
    for name in models.list_models():
        found[f"torchvision:{name}"] = functools.partial(_torchvision, f"torchvision:{name}")
    for name in models.list_models(module=models.quantization):
        found[f"torchvision:{name} (int8)"] = functools.partial(_int8, name)
    return found


def timm_cases() -> dict[str, Factory]:
    return {f"timm:{name}": functools.partial(_timm, name) for name in _TIMM}
