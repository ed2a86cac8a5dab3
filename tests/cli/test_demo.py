"""The demo runs its processes, tells the truth about them, and leaves readable results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console

from torchsurgeon import demo


def test_the_photograph_is_one() -> None:
    image = demo.photo()
    assert image.shape == (1, 3, 224, 224)
    assert image.dtype == torch.uint8
    assert image.float().std() > 30


def test_the_factories_take_the_photograph_as_bytes() -> None:
    for name in demo.MODELS:
        model, example = getattr(demo, name)()
        assert not model.training
        with torch.no_grad():
            assert model(example).shape == (1, 1000)


def test_the_demo_measures_every_setting_and_every_answer_is_equal(tmp_path: Path) -> None:
    said = io.StringIO()
    rows = demo.run(tmp_path, slow=2, repeats=1, console=Console(file=said, width=100))
    assert {(row.model, row.link, row.where) for row in rows} == {
        (model, link, where) for model in demo.MODELS for link in ("3g", "lte", "wifi") for where in demo._WHERE
    }
    assert all(row.equal for row in rows)
    for row in rows:
        assert row.measured_s > 0
        assert row.predicted_s > 0
        if row.where == "server":
            assert 150_528 < row.sent_bytes < 152_000
        if row.where == "device":
            assert row.sent_bytes == 0
        if row.where == "split":
            alike = [r for r in rows if (r.model, r.link) == (row.model, row.link)]
            assert sorted(r.chosen for r in alike) == [False, False, True]
            assert next(r for r in alike if r.chosen).predicted_s == min(r.predicted_s for r in alike)
            assert row.sent_bytes > 0
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(rows)
    for name in demo.MODELS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = said.getvalue()
    assert "alexnet" in text
    assert "NO" not in text
    assert "Weights are" in text
