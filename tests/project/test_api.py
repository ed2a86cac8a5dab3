"""What the package exports is what it says it exports."""

from __future__ import annotations

import inspect
import subprocess
import sys

from paths import ROOT

import torchsurgeon


def test_all_is_exactly_what_is_public() -> None:
    public = {
        name
        for name, value in vars(torchsurgeon).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert set(torchsurgeon.__all__) == public


def test_every_error_of_the_package_is_exported() -> None:
    from torchsurgeon import errors

    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined <= set(torchsurgeon.__all__)


def test_importing_the_package_imports_no_server_and_no_plotting() -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, torchsurgeon; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.split()
    assert not {"uvicorn", "starlette", "matplotlib", "rich", "torchvision", "torchsurgeon.serve"} & set(listed)
