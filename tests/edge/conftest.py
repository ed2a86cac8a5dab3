"""Bundles of the small classifier, exported once, and copies of one that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from bundles import DEVICE_S, SERVER_S, flat_profile, pictures, table_of
from classifier import EXAMPLE, GRAPH, MODEL

import torchsurgeon as ts
from torchsurgeon.codec import FittedCodec
from torchsurgeon.export import export_bundle
from torchsurgeon.serve import ModelRegistry, Server, create_app

COSTS = {"device": flat_profile(GRAPH, DEVICE_S), "server": flat_profile(GRAPH, SERVER_S)}

Serves = Callable[..., AbstractContextManager[Server]]


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


@pytest.fixture(scope="session")
def fitted() -> FittedCodec:
    """A codec that is fitted to what crosses behind the activation."""
    return ts.fit_codec(GRAPH, "act", pictures(12, 1), name="edge")


@pytest.fixture(scope="session")
def fitted_bundle(fitted: FittedCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that holds the fitted codec, which was measured at two rates."""
    folder = tmp_path_factory.mktemp("edge") / "fitted"
    table = table_of(GRAPH, "act", ["raw", "int8", fitted.at(1).name, fitted.at(3).name])
    inputs = pictures(1, 2)
    export_bundle(GRAPH, folder, points=["act"], codecs=table, fitted=[fitted], inputs=inputs, **COSTS)
    return folder


@pytest.fixture(scope="session")
def serves(tmp_path_factory: pytest.TempPathFactory) -> Serves:
    """Serves the classifier, or another model, with the files of fitted codecs."""

    @contextmanager
    def served(
        *codecs: FittedCodec, model: torch.nn.Module = MODEL, x: torch.Tensor = EXAMPLE, port: int = 0
    ) -> Iterator[Server]:
        registry = ModelRegistry()
        try:
            there = registry.add("net", model, x)
            for codec in codecs:
                path = tmp_path_factory.mktemp("codecs") / "one.fitted"
                codec.save(path)
                there.add_codec(path)
            with Server(create_app(registry), port=port) as server:
                yield server
        finally:
            registry.close()

    return served
