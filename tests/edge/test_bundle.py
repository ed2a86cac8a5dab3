"""Bundles that are damaged, of another version, or name files outside of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchsurgeon as ts
from torchsurgeon import edge
from torchsurgeon.edge.bundle import digest_of

Copy = Callable[[], Path]


def edited(folder: Path, **changes: Any) -> Path:
    """Change the manifest of a bundle; None removes a field that must not be null."""
    null = ("whole", "batches")
    path = folder / "manifest.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None or key in null}))
    return folder


def test_a_folder_that_is_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ts.BundleError, match="torchsurgeon export SPEC"):
        edge.open(tmp_path)
    with pytest.raises(ts.BundleError, match="torchsurgeon export SPEC"):
        edge.open(tmp_path / "none")


def test_another_version_says_so(copy: Copy) -> None:
    with pytest.raises(ts.BundleError, match=r"must be 'torchsurgeon.bundle/3'; got 'torchsurgeon.bundle/0'; export"):
        edge.open(edited(copy(), format="torchsurgeon.bundle/0"))


@pytest.mark.parametrize("file", ["whole.onnx", "whole.onnx.data", "heads/3.onnx", "frontier.json", "fingerprint.json"])
def test_a_missing_file_is_named(file: str, copy: Copy) -> None:
    folder = copy()
    (folder / file).unlink()
    with pytest.raises(ts.BundleError, match=f"lacks its file {file}; copy the whole folder again"):
        edge.open(folder)


@pytest.mark.parametrize("file", ["whole.onnx", "heads/3.onnx.data", "frontier.json"])
def test_a_damaged_file_is_named(file: str, copy: Copy) -> None:
    folder = copy()
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ts.BundleError, match=rf"{file} of the bundle .* has not the SHA-256"):
        edge.open(folder)
    (folder / file).write_bytes(content[:-1])
    with pytest.raises(ts.BundleError, match=rf"{file} of the bundle .* must have {len(content)} bytes; got"):
        edge.open(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "heads/../../secret", "a\\b", "", "x\0y"])
def test_a_file_outside_of_the_bundle_is_refused(name: str, copy: Copy, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = copy()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[name] = {"size_bytes": 6, "sha256": digest_of(tmp_path / "secret")}
    with pytest.raises(ts.BundleError, match="must lie inside of it"):
        edge.open(edited(folder, files=files))


@pytest.mark.parametrize("name", ["\ud800", "x" * 300, "a/" * 3000])
def test_a_name_that_no_file_can_have_is_refused(name: str, copy: Copy) -> None:
    folder = copy()
    files = {**json.loads((folder / "manifest.json").read_text())["files"], name: {"size_bytes": 1, "sha256": ""}}
    with pytest.raises(ts.BundleError, match=r"cannot be read|lacks its file"):
        edge.open(edited(folder, files=files))


def test_parts_that_are_not_those_of_the_manifest_are_refused(copy: Copy) -> None:
    folder = copy()
    data = json.loads((folder / "manifest.json").read_text())
    head = next(point["head"] for point in data["points"] if point["head"] is not None)
    with pytest.raises(ts.BundleError, match=r"heads/1.onnx of the bundle is another part .* does not give 'output'"):
        edge.open(edited(folder, whole=head))
    inputs = [{**one, "name": "other"} for one in data["inputs"]]
    with pytest.raises(ts.BundleError, match=r"whole.onnx of the bundle is another part .* it takes 'x'"):
        edge.open(edited(folder, whole=data["whole"], inputs=inputs))


def test_a_link_that_leads_outside_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    outside = tmp_path / "outside.onnx"
    (folder / "whole.onnx").rename(outside)
    (folder / "whole.onnx").symlink_to(outside)
    with pytest.raises(ts.BundleError, match=r"must lie inside of it; manifest.json lists 'whole.onnx'"):
        edge.open(folder)


def test_a_part_that_is_not_listed_is_refused(copy: Copy) -> None:
    with pytest.raises(ts.BundleError, match=r"does not list the file '/tmp/evil.onnx' that it uses"):
        edge.open(edited(copy(), whole={"file": "/tmp/evil.onnx", "free_batch": True}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": None}, "has no list of files"),
        ({"files": {}}, r"must tell size and SHA-256 of 'frontier.json'"),
        ({"files": {"whole.onnx": 3}}, r"must tell size and SHA-256 of 'whole.onnx'"),
        ({"points": None}, "has no field 'points'"),
        ({"points": [{}]}, "has no field 'layers'"),
        ({"inputs": [3]}, "holds a wrong value"),
        ({"name": 3}, "holds a wrong value: 3 must be a text"),
        ({"inputs": []}, "a model without inputs or outputs"),
        ({"outputs": []}, "a model without inputs or outputs"),
        ({"batches": [[1]]}, "holds a wrong value"),
        ({"example_batch": -1}, "holds a wrong value: -1 must be a whole number"),
    ],
)
def test_an_edited_manifest_says_what_is_wrong(changes: dict[str, Any], said: str, copy: Copy) -> None:
    with pytest.raises(ts.BundleError, match=said):
        edge.open(edited(copy(), **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 3}', "\xff"])
def test_a_manifest_that_is_none_is_refused(text: str, copy: Copy) -> None:
    folder = copy()
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ts.BundleError):
        edge.open(folder)


def test_the_frontier_of_another_model_is_refused(copy: Copy) -> None:
    folder = copy()
    path = folder / "frontier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["frontier.json"] = {"size_bytes": path.stat().st_size, "sha256": digest_of(path)}
    with pytest.raises(ts.BundleError, match="is of another model than its heads"):
        edge.open(edited(folder, files=files))
