"""Hugging Face's pipelines and models find in a SplitModule what they look for in the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import serving

import torchsurgeon as ts

hf = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}


def make() -> Any:
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(**_VISION)).eval()


PIXELS = hf.ViTImageProcessor(size={"height": 32, "width": 32})
PHOTO = Image.new("RGB", (40, 40), "red")


@pytest.fixture(scope="module")
def split() -> Iterator[ts.SplitModule]:
    example = PIXELS(PHOTO, return_tensors="pt")
    with (
        serving(make(), example) as server,
        ts.SplitModule(make(), example, server=server.url, name="net", partition=9) as made,
    ):
        yield made


@pytest.mark.parametrize("form", ["made with it", "given it later"])
def test_a_pipeline_runs_on_a_split_model(split: ts.SplitModule, form: str) -> None:
    pipe = hf.pipeline("image-classification", model=make(), image_processor=PIXELS, device="cpu")
    wanted = pipe(PHOTO)
    if form == "made with it":
        pipe = hf.pipeline("image-classification", model=split, image_processor=PIXELS, device="cpu")
    else:
        pipe.model = split
    before = split.stats()["inferences"]
    assert pipe(PHOTO) == wanted
    assert pipe([PHOTO, PHOTO], batch_size=2) == [wanted, wanted]
    assert split.stats()["inferences"] == before + 2
    assert split.last is not None
    assert split.last.degraded is None
    assert split.last.sent_bytes


def test_it_has_what_transformers_asks_of_a_model(split: ts.SplitModule) -> None:
    model = split.model
    for name in ("config", "device", "dtype", "main_input_name"):
        assert getattr(split, name) == getattr(model, name)
    assert split.num_parameters() == model.num_parameters()
    assert not split.can_generate()
    assert list(inspect.signature(split.forward).parameters) == list(inspect.signature(model.forward).parameters)


def test_a_split_model_is_saved_as_the_model_is(tmp_path: Path) -> None:
    pixels = PIXELS(PHOTO, return_tensors="pt")
    split = ts.SplitModule(make(), pixels, partition="device")
    wanted = split(**pixels).logits
    split.save_pretrained(tmp_path)
    again = hf.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == split.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(**pixels).logits, wanted)


def test_generate_says_what_to_split_instead() -> None:
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(hf.T5Config(**_SEQ2SEQ, decoder_start_token_id=0)).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    wanted = model.generate(ids, max_new_tokens=5)
    example = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    split = ts.SplitModule(model, example, partition="device")
    assert hasattr(split, "generate")
    with pytest.raises(ts.SplitAttributeError, match=r"model\.encoder = SplitModule\(model\.encoder, …\)"):
        split.generate(ids, max_new_tokens=5)
    assert torch.equal(split.model.generate(ids, max_new_tokens=5), wanted)
