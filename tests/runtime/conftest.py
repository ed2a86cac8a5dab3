"""A server and the known speeds that tests of the runtime share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from known_machines import EXAMPLE, net, profile

from torchsurgeon.serve import ModelRegistry, Server, create_app


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    registry = ModelRegistry()
    registry.add("net", net(), (EXAMPLE,))
    with Server(create_app(registry)) as running:
        yield running
    registry.close()


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """A device of 10 ms and a server of 0.1 ms a layer."""
    return {"device_profile": profile(0.01), "server_profile": profile(1e-4)}
