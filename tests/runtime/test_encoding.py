"""A boundary that cannot be encoded here is answered by the device, and never counts against a server."""

from __future__ import annotations

from typing import Any

import pytest
from classifier import EXAMPLE, degraded, remote, right, split_of

from torchsurgeon import wire
from torchsurgeon.errors import CodecError, EncodingError
from torchsurgeon.serve import Server


@pytest.fixture(
    params=[EncodingError("no datatype of the protocol is that"), CodecError("pip it"), MemoryError("full")]
)
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While the list holds True, no request can be encoded."""
    on: list[bool] = []
    encode = wire.encode_request

    def fail(*args: Any, **kwargs: Any) -> wire.Encoded:
        if on:
            raise request.param
        return encode(*args, **kwargs)

    monkeypatch.setattr(wire, "encode_request", fail)
    return on


def test_the_device_answers_and_the_server_stays_in_use(server: Server, failing: list[bool]) -> None:
    with split_of(server, partition="stem") as split:
        assert right(split)
        assert remote(split)
        failing.append(True)
        for _ in range(6):
            assert right(split)
            assert degraded(split).startswith("encoding: "), degraded(split)
        assert split.stats()["degraded"] == {"encoding": 6}
        (known,) = split.stats()["servers"]
        assert (known["breaker"], known["opened"], known["usable"]) == ("closed", 0, True)
        assert known["failure"] is None
        failing.clear()
        assert right(split)
        assert remote(split)


def test_without_a_fallback_the_error_is_what_it_is(server: Server, failing: list[bool]) -> None:
    with split_of(server, partition="stem", fallback="error") as split:
        assert right(split)
        failing.append(True)
        for _ in range(6):
            with pytest.raises(EncodingError):
                split(EXAMPLE)
        failing.clear()
        assert right(split)
        assert remote(split)


def test_streams_go_on(server: Server, failing: list[bool]) -> None:
    with split_of(server, partition="stem") as split:
        assert right(split)
        failing.append(True)
        assert len(list(split.map([EXAMPLE] * 8))) == 8
        failing.clear()
        assert right(split)
        assert remote(split)
