"""The programs in examples/ run as they are, against servers of their own and against one that a user started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("torchvision")

EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SERVED = ["photo=split_photo:classifier", "squeezenet=torchvision:squeezenet1_1"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """HOST:PORT of ``torchsurgeon serve``, started in the examples' folder."""
    command = [sys.executable, "-m", "torchsurgeon", "serve", *SERVED, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=EXAMPLES, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.match(r"ready: .* at http://(.*)\n", line):
                yield found[1]
                return
        raise AssertionError(f"the server ended with {process.wait()}:\n{said}")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def run(name: str, *arguments: str) -> str:
    """What an example prints; it asserts by itself that the answers are the model's own."""
    command = [sys.executable, f"{name}.py", *arguments]
    done = subprocess.run(
        command, cwd=EXAMPLES, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_split_photo_with_a_server_of_its_own() -> None:
    said = run("split_photo")
    assert "all on the device" in said
    assert "cut after net.features.5" in said
    assert re.search(r"all on the server; .* 15[01]\d{3} bytes sent", said), (
        "all on the server sends the photograph's bytes"
    )


def test_split_photo_with_a_server_started_in_its_folder(server: str) -> None:
    assert "cut after net.features.5" in run("split_photo", "--server", f"http://{server}")


def test_cut_and_profile() -> None:
    said = run("cut_and_profile")
    assert "partition points" in said
    assert re.search(r"lte: (cut after \S+|all on the \w+), \d+ ms predicted", said)
    assert "bytes cross, fewer than anywhere before: all on the server" in said
    assert "all on the device" not in said.partition("on this machine")[0], "nothing crosses there"
    assert "bit for bit" in said


def test_any_client_gets_a_tail_by_naming_a_tensor(server: str) -> None:
    pytest.importorskip("tritonclient.http")
    said = run(
        "any_client",
        *("--server", server, "--model", "squeezenet", "--spec", "torchvision:squeezenet1_1", "--cut", "features.5"),
    )
    assert "inputs: x FP32 [-1, 3, 224, 224]" in said
    assert "sent features.5: 373248 bytes" in said
    assert "the same answer" in said


def test_detection() -> None:
    said = run("detection")
    assert "equal to the unsplit model's bit for bit" in said
    assert "backbone.features.0.10.add" in said


def test_video_stream() -> None:
    said = run("video_stream", "--link", "wifi", "--frames", "8")
    assert re.search(r"one by one \S+ frames/s, as a stream \S+", said)
    assert "in the order of the frames" in said


def test_pipelines() -> None:
    pytest.importorskip("transformers")
    said = run("pipelines")
    for kind in ("image-classification", "object-detection", "text-classification", "feature-extraction"):
        assert re.search(rf"^{kind}: the whole model's answer, cut after \S+\.0\.", said, re.MULTILINE)


def test_generate() -> None:
    pytest.importorskip("transformers")
    assert re.search(r"the same \d+ tokens, with the encoder cut after block\.0\.", run("generate"))


def test_every_example_is_run_here_and_is_short() -> None:
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tested, f"{path.name} is not run by any test"
        assert len(path.read_text().splitlines()) < 70, f"{path.name} is too long for an example"
