"""The known speeds that tests of the runtime share."""

from __future__ import annotations

from typing import Any

import pytest
from classifier import profile
from known_machines import LAYER_S


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    """A device of 30 ms and a server of 0.1 ms a layer."""
    return {"device_profile": profile(LAYER_S), "server_profile": profile(1e-4)}
