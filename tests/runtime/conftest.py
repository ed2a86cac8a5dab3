"""The known speeds and the patience that tests of the runtime share."""

from __future__ import annotations

from typing import Any

import pytest
from classifier import profile
from known_machines import LAYER_S


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is late before a second more than was predicted, instead of 50 ms.

    So an answer that other processes delay is still the server's, for a test of what happens when it is not late.
    """
    monkeypatch.setattr("torchsurgeon.adapting.deadline._LEAST_PATIENCE_S", 1.0)


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    """A device of 30 ms and a server of 0.1 ms a layer."""
    return {"device_profile": profile(LAYER_S), "server_profile": profile(1e-4)}
