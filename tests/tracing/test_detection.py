"""Detectors, from images of any size to boxes, through a server: the boxes are the model's own, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import check_split, points_in, split

import torchsurgeon as ts

detection = pytest.importorskip("torchvision.models.detection")

# Random weights are sure of nothing: every box counts, and few are kept.
_SMALL = {"weights": None, "weights_backbone": None}
_ONE_STAGE = {**_SMALL, "score_thresh": 0.0, "detections_per_img": 8}
_TWO_STAGE = {**_SMALL, "box_score_thresh": 0.0, "box_detections_per_img": 8, "rpn_post_nms_top_n_test": 40}
_SIZES = {"min_size": 64, "max_size": 96}

MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ssdlite320_mobilenet_v3_large": (_ONE_STAGE, ("transform", "backbone", "head")),
    "retinanet_resnet50_fpn": (_ONE_STAGE | _SIZES, ("transform", "backbone.body", "backbone.fpn", "head")),
    "fcos_resnet50_fpn": (_ONE_STAGE | _SIZES, ("transform", "backbone.body", "backbone.fpn", "head")),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        _TWO_STAGE | _SIZES,
        ("transform", "backbone.body", "backbone.fpn", "rpn", "roi_heads"),
    ),
    # Each box takes a second.
    "keypointrcnn_resnet50_fpn": (
        _TWO_STAGE | _SIZES | {"box_detections_per_img": 2},
        ("transform", "backbone.body", "rpn", "roi_heads"),
    ),
    "maskrcnn_resnet50_fpn": (_TWO_STAGE | _SIZES, ("transform", "backbone.fpn", "roi_heads")),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(detection, name)(**MODELS[name][0]).eval()


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("name", MODELS)
def test_boxes_of_images_of_any_sizes_are_the_models_own(name: str) -> None:
    model = make(name)
    with split(model, images((60, 80), (90, 70))) as module:
        points = points_in(module.graph, *MODELS[name][1])
        check_split(
            module,
            points,
            ((images((60, 80), (90, 70)),), {}),
            ((images((70, 70), (50, 95)),), {}),
        )
        with torch.no_grad():
            found = model(images((70, 70), (50, 95)))
        assert all(len(image["boxes"]) for image in found), "a comparison of no boxes would show nothing"


class OfOneImage(torch.nn.Module):
    """A detector for images of one size, whose sizes need not cross."""

    def __init__(self, detector: torch.nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> Any:
        return self.detector([image])


@pytest.mark.parametrize("count", [1, 0])
def test_a_server_may_answer_with_fewer_boxes_than_there_can_be(count: int) -> None:
    detector = make("ssdlite320_mobilenet_v3_large")
    # One class is far more probable than the others at every place of the first level.
    bias = detector.head.classification_head.module_list[0][1].bias.data
    bias[::91], bias[1::91] = -9.0, 9.0
    detector.topk_candidates, detector.score_thresh = 1, 0.5 if count else 1.0
    model, (image,) = OfOneImage(detector).eval(), images((60, 80))
    with torch.no_grad():
        assert len(model(image)[0]["scores"]) == count < detector.detections_per_img
    with split(model, image) as module:
        assert module.graph.sizes_vary
        assert not module.graph.value_dependent
        check_split(module, [module.graph.points[0], *points_in(module.graph, "detector.head")], ((image,), {}))


def test_what_stays_whole_is_said_with_the_reason() -> None:
    graph = ts.trace(make("fasterrcnn_mobilenet_v3_large_320_fpn"), images((60, 80)))
    assert graph.traced_by == "recorded"
    assert set(graph.opaque) == {"transform", "rpn", "roi_heads"}
    assert "values" in graph.opaque["rpn"]
    assert not [layer.name for layer in graph.layers if layer.name == "backbone"]


def test_a_detector_inside_another_model_is_followed_too() -> None:
    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = make("ssdlite320_mobilenet_v3_large")

        def forward(self, pictures: list[torch.Tensor]) -> Any:
            return {"boxes": self.detector([picture * 0.5 for picture in pictures])}

    model = Counted().eval()
    with split(model, images((60, 80))) as module:
        assert set(module.graph.opaque) == {"detector.transform"}
        check_split(module, points_in(module.graph, "detector.backbone"), ((images((60, 80)),), {}))


def test_another_number_of_images_is_refused_by_what_the_call_looks_like() -> None:
    graph = ts.trace(make("ssdlite320_mobilenet_v3_large"), images((60, 80)))
    with pytest.raises(TypeError, match="another structure than the example"):
        graph.bind(images((60, 80), (60, 80)))
