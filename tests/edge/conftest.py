"""A bundle of the small classifier, exported once, and copies of it that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import DEVICE_S, SERVER_S, flat_profile
from classifier import EXAMPLE, GRAPH

from torchsurgeon.export import export_bundle

COSTS = {"device": flat_profile(GRAPH, DEVICE_S), "server": flat_profile(GRAPH, SERVER_S)}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with heads for all on the server, the first convolution and the activation, and the whole model."""
    folder = tmp_path_factory.mktemp("edge") / "bundle"
    export_bundle(GRAPH, folder, points=["server", "stem", "act"], inputs=[EXAMPLE], **COSTS)
    return folder


@pytest.fixture(scope="session")
def heads_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one head and without the whole model."""
    folder = tmp_path_factory.mktemp("edge") / "heads"
    export_bundle(GRAPH, folder, points=["act"], whole=False, inputs=[EXAMPLE], **COSTS)
    return folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies the bundle."""

    def made() -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copy"))

    return made
