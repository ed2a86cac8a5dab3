"""The wheel of the device part, in an environment that has neither PyTorch nor the checkout."""

from __future__ import annotations

import json
import runpy
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import pictures
from classifier import EXAMPLE, truth
from paths import ROOT
from torch import Tensor

from benchmarks import edge as weighed
from torchsurgeon import _native
from torchsurgeon.codec import FittedCodec
from torchsurgeon.serve import Server

_RUNS = """
import json, sys, time
begin = time.perf_counter()
import torchsurgeon.edge
took_s = time.perf_counter() - begin
import numpy as np
from importlib.util import find_spec

folder, url, codec, given, found = sys.argv[1:]
x = np.load(given)
# Without a fallback, the server's answer is waited for, however busy the machine is.
with torchsurgeon.edge.open(folder, url, partition="act", codec=codec, fallback="error") as model:
    split = model(x)
    assert (model.last.server, model.last.codec) == (url, codec), model.last
with torchsurgeon.edge.open(folder) as model:
    alone = model(x)
np.save(found, np.concatenate([split, alone]))
print(json.dumps({"import_s": took_s, "from": torchsurgeon.__file__, "torch": find_spec("torch") is not None}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weighed.build_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_holds_what_a_device_imports_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    needed = runpy.run_path(str(ROOT / "packages" / "edge" / "setup.py"))["needed"]()
    assert sorted(names) == sorted([*(path.as_posix() for path in needed), "torchsurgeon/py.typed"])
    assert "torchsurgeon/edge/model.py" in names
    assert not [name for name in names if name.startswith(("torchsurgeon/tracing", "torchsurgeon/cli"))]
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("LICENSE")]
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which the wheel is installed."""
    try:
        return weighed.environment(tmp_path_factory.mktemp("installed") / "venv", wheel)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot install NumPy and ONNX Runtime here: {str(error.stderr).strip()[-300:]}")


def run_alone(python: Path, bundle: Path, url: str, codec: str, x: Tensor, tmp_path: Path) -> dict[str, Any]:
    """Run a bundle in the environment, compare its answers with the model's, and return what the program has said."""
    given, found = tmp_path / "x.npy", tmp_path / "found.npy"
    np.save(given, x.numpy())
    # -I: neither the folder it is run from nor PYTHONPATH is searched, so the package is the wheel's.
    command = [str(python), "-I", "-c", _RUNS, str(bundle), url, codec, str(given), str(found)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    assert Path(told["from"]).is_relative_to(python.parents[1])
    assert not told["torch"]
    split, alone = np.load(found)
    expected = truth(x).numpy()[0]
    assert np.allclose(split, expected, atol=0.05)
    assert np.allclose(alone, expected, atol=1e-4)
    return told


def test_it_runs_a_bundle_in_an_environment_without_pytorch(
    wheel: Path, python: Path, bundle: Path, server: Server, tmp_path: Path
) -> None:
    told = run_alone(python, bundle, server.url, "int8+zstd", EXAMPLE, tmp_path)
    sizes = weighed.installed(python)
    assert sizes["all"] <= 200e6, sizes
    print(f"wheel {wheel.stat().st_size} bytes, installed {sizes['all']} bytes, import {told['import_s']:.3f} s")


@pytest.mark.skipif(not _native.available(), reason="no compiled extension: make setup")
def test_it_encodes_with_a_fitted_codec_there(
    python: Path, fitted: FittedCodec, fitted_bundle: Path, serves: Any, tmp_path: Path
) -> None:
    with serves(fitted) as server:
        run_alone(python, fitted_bundle, server.url, fitted.at(3).name, pictures(1, 4)[0], tmp_path)
