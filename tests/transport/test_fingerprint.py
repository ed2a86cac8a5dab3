"""What differs between a device's model and a server's is named in a line, with what to do about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from torchsurgeon.errors import ModelMismatchError, RequestRefusedError
from torchsurgeon.transport.base import ByteTransport
from torchsurgeon.transport.fingerprint import Fingerprint, fetch

NAMES = ("stem.weight", "stem.bias", "head.weight", "head.bias")


def tensors(dtype: str = "float32", shape: tuple[int, ...] = (4, 3), digest: str = "a") -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": list(shape), "digest": digest * 64} for name in NAMES}


OURS = Fingerprint("graph", "ours", tensors(), {}, (), ())


class Says(ByteTransport):
    """A way to a server that tells a fingerprint, or refuses to."""

    def __init__(self, told: dict[str, Any] | Exception, url: str = "http://127.0.0.1:8000") -> None:
        super().__init__()
        self.told, self.url = told, url

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        if isinstance(self.told, Exception):
            raise self.told
        return self.told

    def _post(self, *_: Any) -> Any:
        raise AssertionError

    def close(self) -> None:
        pass


def mismatch(there: dict[str, Any], ours: Fingerprint = OURS) -> str:
    """What a device says of a server whose model has these tensors."""
    with pytest.raises(ModelMismatchError) as caught:
        fetch(Says({"weights": "theirs", "graph": "graph", "tensors": there}), "net", "ours", "graph", lambda: ours)
    return str(caught.value)


def test_other_values_are_other_weights_and_two_tensors_are_named() -> None:
    assert mismatch(tensors(digest="b")) == (
        "model 'net' has other weights on the server: stem.weight (float32[4×3] aaaaaaaa here, float32[4×3] bbbbbbbb "
        "on the server), stem.bias (float32[4×3] aaaaaaaa here, float32[4×3] bbbbbbbb on the server), and 2 more. "
        "Serve the weights this model was loaded with"
    )


def test_other_names_or_shapes_are_another_model() -> None:
    advice = "Give the name= under which this model is served, or serve it as 'net'"
    said = mismatch(tensors(digest="b") | {"head.weight": {"dtype": "float32", "shape": [5, 3], "digest": "c"}})
    assert said == (
        "model 'net' of the server is another model: head.weight (float32[4×3] here, float32[5×3] on the server). "
        + advice
    )
    said = mismatch({"features.0.weight": tensors()["stem.weight"]})
    assert said == (
        "model 'net' of the server is another model: stem.weight (float32[4×3] here, absent on the server), stem.bias "
        "(float32[4×3] here, absent on the server), and 3 more. " + advice
    )


@pytest.mark.parametrize(
    ("here", "there", "casts"),
    [("float16", "float32", (".float()", ".half()")), ("float32", "bfloat16", (".bfloat16()", ".float()"))],
)
def test_another_precision_is_named_with_the_calls_that_change_it(
    here: str, there: str, casts: tuple[str, str]
) -> None:
    ours = dataclasses.replace(OURS, tensors=tensors(here, digest="b"))
    said = mismatch(tensors(there), ours)
    assert said.startswith(f"model 'net' is in {here} here and in {there} on the server: stem.weight ({here}[4×3] here")
    assert said.endswith(f"and 2 more. Call {casts[0]} on the model here, or {casts[1]} where the server makes it")


@pytest.mark.parametrize(
    "told",
    [{}, {"x": 3}, {"x": {"shape": {}, "dtype": []}}, {"x" * 10_000: {"dtype": "d" * 10_000, "shape": "s" * 10_000}}],
)
def test_whatever_a_server_tells_of_its_tensors_is_a_mismatch_in_a_line(told: dict[str, Any]) -> None:
    assert len(mismatch(told)) < 700
    nothing = dataclasses.replace(OURS, tensors={})
    assert len(mismatch(told, nothing)) < 700


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("http://127.0.0.1:8000", "(no); start it with: torchsurgeon serve net=SPEC"),
        ("http://127.0.0.1:8000/net/", "(no); leave the path '/net' out of server=, unless a proxy before the server"),
    ],
)
def test_a_path_that_no_server_has_is_not_taken_for_a_model_that_is_not_served(url: str, advice: str) -> None:
    with pytest.raises(ModelMismatchError) as caught:
        fetch(Says(RequestRefusedError("no", 404), url), "net", "ours", "graph", lambda: OURS)
    assert advice in str(caught.value)
