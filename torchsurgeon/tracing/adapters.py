"""Traceable forms of models whose own forward cannot be followed, by model class; users can add theirs.

An adapter is a function that is traced in place of the model class's ``forward``. It calls the same submodules, so the
names of layers and the answers stay the model's own. What depends on values goes through ``opaque()``, which makes one
layer of a function.

This file has adapters for torchvision's detectors, so that a cut can lie inside backbone, feature pyramid and heads,
and for ``torch.nn``'s transformers, so that it can lie between their layers.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchsurgeon.tracing.following import follower_here
from torchsurgeon.tracing.shape_rules import META, Outcome, register_shape_rule
from torchsurgeon.tracing.structure import flatten


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How to trace models of one class.

    Attributes:
        forward: what is traced in place of the model's own ``forward``; it takes the model and the same arguments.
        whole: the submodules to keep as one layer each, by path, and why.
        applies: takes a call's arguments and returns whether ``forward`` can stand in; None means always.
    """

    forward: Callable[..., Any]
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    applies: Callable[..., bool] | None = None


_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(model_class: type[nn.Module] | str, adapter: Adapter) -> None:
    """Trace models of this class by ``adapter``, on their own and inside other models.

    Args:
        model_class: the class, or its qualified name (``"package.module.Class"``), so that it need not be imported. A
            subclass that does not define its own ``forward`` is traced by the adapter, too.
        adapter: how to trace it.
    """
    name = model_class if isinstance(model_class, str) else _qualified(model_class)
    _ADAPTERS[name] = adapter


def adapter_for(model: nn.Module) -> Adapter | None:
    """Return the adapter for a module; None where there is none."""
    for base in type(model).__mro__:
        if _qualified(base) in _ADAPTERS:
            return _ADAPTERS[_qualified(base)]
        if "forward" in vars(base):
            return None
    return None


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def opaque(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function; while tracing, record the call as one layer instead of following it.

    Args:
        function: what is called; its name is the layer's. A ``shape_rule`` attribute takes the same arguments with meta
            tensors and returns an ``Outcome``.
        *args: its arguments.
    """
    follower = follower_here()
    return function(*args) if follower is None else follower.call(function, args, {})


# --- torch.nn's transformers, which would be one layer each; a cut should lie between the layers inside ---


def _is_causal(mask: torch.Tensor | None, given: bool | None, length: int) -> bool:
    return bool(nn.modules.transformer._detect_is_causal_mask(mask, given, length))


# Decided by the mask's values; no shape depends on it.
_is_causal.shape_rule = lambda *_: Outcome(False)  # type: ignore[attr-defined]


def _causal(self: Any, x: Any, mask: Any, given: bool | None) -> Any:
    if mask is None or given is not None:
        return given is True
    return opaque(_is_causal, mask, given, x.size(1 if self.layers[0].self_attn.batch_first else 0))


def _float_mask(mask: torch.Tensor, like: torch.Tensor) -> Any:
    return F._canonical_mask(mask, "mask", None, "", like.dtype, check_other=False)


def _encoder(self: Any, src: Any, mask: Any = None, src_key_padding_mask: None = None, is_causal: Any = None) -> Any:
    mask = None if mask is None else opaque(_float_mask, mask, src)
    causal = _causal(self, src, mask, is_causal)
    for layer in self.layers:
        src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=None)
    return src if self.norm is None else self.norm(src)


def _encodes(src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> bool:
    # Padded sequences are packed by the values of their mask.
    return src_key_padding_mask is None


def _decoder(
    self: Any, tgt: Any, memory: Any, tgt_mask: Any = None, *masks: Any, tgt_is_causal: Any = None, **named: Any
) -> Any:
    causal = _causal(self, tgt, tgt_mask, tgt_is_causal)
    for layer in self.layers:
        tgt = layer(tgt, memory, tgt_mask, *masks, tgt_is_causal=causal, **named)
    return tgt if self.norm is None else self.norm(tgt)


def _encoder_decoder(
    self: Any,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: bool | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


register_adapter(nn.TransformerEncoder, Adapter(_encoder, applies=_encodes))
register_adapter(nn.TransformerDecoder, Adapter(_decoder))
register_adapter(nn.Transformer, Adapter(_encoder_decoder))

# --- torchvision's detectors ---

_DETECTION = "torchvision.models.detection"
_VALUES = "what it keeps depends on the values of its tensors"


class _Given:
    """Stands for a submodule whose result is already known; its attributes are the submodule's own."""

    def __init__(self, module: nn.Module, result: Any) -> None:
        self._module, self._result = module, result

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Resumed:
    """Stands for a model some of whose submodules have run: its class's forward on it does the rest."""

    def __init__(self, model: nn.Module, results: Mapping[str, Any]) -> None:
        self._model, self._results = model, results

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return _Given(value, self._results[name]) if name in self._results else value


class _Outline:
    """Stands for a batch of images where only their sizes are read, so that the images need not cross for these."""

    def __init__(self, shape: torch.Size, image_sizes: list[tuple[int, int]]) -> None:
        self.tensors = SimpleNamespace(shape=shape)
        self.image_sizes = image_sizes


class _Postprocess:
    """What a detector's own forward does after its last submodule: it turns results into boxes on the images."""

    __name__ = "postprocess"

    def __init__(self, model: nn.Module, last: str) -> None:
        self._model, self._last = model, last

    def __call__(
        self, sizes: list[torch.Size], outline: _Outline, levels: Mapping[str, torch.Size], result: Any
    ) -> Any:
        images = [torch.empty((3, *size), device=META) for size in sizes]
        like = next(leaf for _, leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor))
        # Of the feature maps, too, only shapes, dtype and device are read.
        features = OrderedDict((key, like.new_empty(1).expand(shape)) for key, shape in levels.items())
        results = {"transform": (outline, None), "backbone": features, "rpn": ([], {}), self._last: result}
        return type(self._model).forward(_Resumed(self._model, results), images)

    def shape_rule(self, sizes: list[torch.Size], outline: _Outline, levels: Any, result: Any) -> Outcome:
        if self._last != "roi_heads":
            count: Any = self._model.detections_per_img
            found = [_boxes(count, "boxes", "scores", "labels") for _ in sizes]
            return Outcome(found, uncounted=("postprocess",), bound=True)
        detections = result[0]
        for image, size in zip(detections, sizes, strict=True):
            if "masks" in image:
                image["masks"] = torch.empty((len(image["boxes"]), 1, *size), device=META)
        return Outcome(detections, uncounted=("postprocess",), bound=True)


def _boxes(count: int, *fields: str) -> dict[str, torch.Tensor]:
    shapes = {
        "boxes": ((count, 4), torch.float32),
        "scores": ((count,), torch.float32),
        "labels": ((count,), torch.int64),
    }
    return {field: torch.empty(shapes[field][0], dtype=shapes[field][1], device=META) for field in fields}


def _as_levels(features: Any) -> Any:
    return features if isinstance(features, dict) else OrderedDict([("0", features)])


def _two_stage(self: Any, images: list[torch.Tensor], targets: None = None) -> Any:
    sizes = [image.shape[-2:] for image in images]
    batch = self.transform(images, None)[0]
    outline = opaque(_Outline, batch.tensors.shape, batch.image_sizes)
    features = _as_levels(self.backbone(batch.tensors))
    proposals = self.rpn(outline, features, None)[0]
    detections = self.roi_heads(features, proposals, batch.image_sizes, None)
    return opaque(_Postprocess(self, "roi_heads"), sizes, outline, {}, detections)


def _one_stage(self: Any, images: list[torch.Tensor], targets: None = None) -> Any:
    sizes = [image.shape[-2:] for image in images]
    batch = self.transform(images, None)[0]
    outline = opaque(_Outline, batch.tensors.shape, batch.image_sizes)
    features = _as_levels(self.backbone(batch.tensors))
    heads = self.head(list(features.values()))
    levels = {key: feature.shape for key, feature in features.items()}
    return opaque(_Postprocess(self, "head"), sizes, outline, levels, heads)


_TRANSFORM = {"transform": "it loops over images of different sizes"}
register_adapter(
    f"{_DETECTION}.generalized_rcnn.GeneralizedRCNN",
    Adapter(_two_stage, {**_TRANSFORM, "rpn": _VALUES, "roi_heads": _VALUES}),
)
for _name in ("retinanet.RetinaNet", "fcos.FCOS", "ssd.SSD"):
    register_adapter(f"{_DETECTION}.{_name}", Adapter(_one_stage, _TRANSFORM))


def _proposals(module: Any, images: Any, features: Any, targets: None = None) -> Outcome:
    count = module.post_nms_top_n()
    found = [torch.empty((count, 4), device=META) for _ in images.image_sizes]
    return Outcome((found, {}), uncounted=("rpn",), bound=True)


def _found(module: Any, features: Any, proposals: Any, image_shapes: Any, targets: None = None) -> Outcome:
    count = module.detections_per_img
    found = [_boxes(count, "boxes", "labels", "scores") for _ in proposals]
    for image in found:
        if module.has_mask():
            image["masks"] = torch.empty((count, 1, 28, 28), device=META)
        if module.has_keypoint():
            points = module.keypoint_predictor.kps_score_lowres.out_channels
            image["keypoints"] = torch.empty((count, points, 3), device=META)
            image["keypoints_scores"] = torch.empty((count, points), device=META)
    return Outcome((found, {}), uncounted=("roi_heads",), bound=True)


register_shape_rule(f"{_DETECTION}.rpn.RegionProposalNetwork", _proposals)
register_shape_rule(f"{_DETECTION}.roi_heads.RoIHeads", _found)
