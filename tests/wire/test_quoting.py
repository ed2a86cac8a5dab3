"""Errors about hostile messages: however large what they quote is, the error stays short."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsurgeon import serve, wire
from torchsurgeon.errors import ProtocolError
from torchsurgeon.transport import InProcessTransport
from torchsurgeon.transport.deadline import Deadline

SKULL = "☠"
MOST_CHARACTERS, MOST_QUOTED = 1000, 300

VALUES: list[Callable[[int], Any]] = [
    lambda size: SKULL * size,
    lambda size: "\udcff" * size,
    lambda size: [SKULL * 30] * size,
    lambda size: {SKULL * size: SKULL * size},
    lambda size: {f"{SKULL * 30}{at}": SKULL * 30 for at in range(min(size, 1000))},
    lambda size: bushy(SKULL * 30, 5),
    lambda size: [7] * size,
    lambda size: int("7" * min(size, 4000)),
    lambda size: -1,
    lambda size: 1.5,
    lambda size: None,
    lambda size: True,
]


def bushy(leaf: str, depth: int) -> Any:
    """Lists of six in lists of six, which reprlib's defaults would quote whole."""
    return [bushy(leaf, depth - 1)] * 6 if depth else leaf


def message() -> dict[str, Any]:
    tensor = {
        "name": "x",
        "datatype": "UINT8",
        "shape": [2, 1],
        "parameters": {"binary_data_size": 2, "codec": "zstd", "dim_order": [1, 0], "quantized": {"scale": 1.0}},
    }
    return {
        "id": "1",
        "model_name": "net",
        "model_version": "1",
        "parameters": {"binary_data_output": True, "dim_order": True, "crc32": False, "output_codec": "zstd"},
        "inputs": [tensor, {**tensor, "name": "y", "data": [[1], [2]]}],
        "outputs": [tensor, {"name": "z", "parameters": {"binary_data": True, "classification": 0}}],
    }


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything in a message."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(path for key, item in below for path in places(item, (*at, key)))]


def put(message: dict[str, Any], path: tuple[Any, ...], value: Any, *, drop: bool) -> None:
    *above, last = path
    target: Any = message
    with contextlib.suppress(LookupError, TypeError):  # something above it may have been replaced before
        for key in above:
            target = target[key]
        if drop:
            del target[last]
        else:
            target[last] = value


CHANGES = st.tuples(
    st.sampled_from(places(message())), st.sampled_from(VALUES), st.sampled_from([1, 150, 5000, 50_000]), st.booleans()
)


@settings(deadline=None, max_examples=400)
@given(st.lists(CHANGES, min_size=1, max_size=4), st.binary(max_size=8), st.booleans())
def test_no_error_is_longer_or_quotes_more_than_a_reader_can_use(
    changes: list[tuple[tuple[Any, ...], Callable[[int], Any], int, bool]], payload: bytes, binary: bool
) -> None:
    sent = message()
    for path, value, size, drop in changes:
        put(sent, path, value(size), drop=drop)
    text = json.dumps(sent).encode()
    for decode in (wire.decode_request, wire.decode_response):
        refusal = ""
        try:
            decode(text + payload, len(text) if binary else None)
        except ProtocolError as error:
            refusal = str(error)
        assert len(refusal) <= MOST_CHARACTERS
        assert sum(refusal.count(piece) for piece in (SKULL, "7", "udcff")) <= MOST_QUOTED


@pytest.mark.parametrize("field", ["name", "datatype", "shape", "codec"])
def test_a_field_of_500_kb_is_quoted_short(field: str) -> None:
    entry: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [-1], "parameters": {"binary_data_size": 4}}
    if field == "codec":
        entry["shape"], entry["parameters"]["codec"] = [1], SKULL * 90_000
    else:
        entry[field] = SKULL * 90_000
    text = json.dumps({"inputs": [entry]}).encode()
    assert len(text) > 500_000
    with pytest.raises(ProtocolError, match=SKULL) as refused:
        wire.decode_request(text + bytes(4), len(text))
    assert len(str(refused.value)) <= MOST_CHARACTERS


@pytest.mark.parametrize("field", ["output", "codec", "id", "model", "path"])
def test_a_server_answers_a_hostile_request_with_a_short_error(field: str) -> None:
    registry = serve.ModelRegistry()
    registry.add("net", torch.nn.Linear(2, 2).eval(), torch.zeros(1, 2))
    long = SKULL * 60_000
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    sent: dict[str, Any] = {"inputs": [tensor], "parameters": {}}
    if field == "output":
        sent["outputs"] = [{"name": long}]
    elif field == "codec":
        sent["parameters"]["output_codec"] = long
    elif field == "id":
        sent["id"] = [long]
    text = json.dumps(sent).encode()
    headers = {wire.HEADER_LENGTH: str(len(text))}
    path = {"model": f"/v2/models/{long}/infer", "path": f"/v2/{long}"}.get(field, "/v2/models/net/infer")
    with InProcessTransport(serve.create_app(registry)) as transport:
        raw = transport._call("POST", path, headers, [text + bytes(8)], 1 << 20, Deadline(30.0))
    assert raw.status in (400, 404)
    answer = json.loads(bytes(raw.body))["error"]
    assert len(answer) <= MOST_CHARACTERS
    assert answer.count(SKULL) <= MOST_QUOTED
