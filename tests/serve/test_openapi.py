"""The OpenAPI description says what the server answers, and the server answers what the description says."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.routing import Route
from torch import nn

from torchsurgeon import serve
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.app import MAX_PROBE_BYTES
from torchsurgeon.serve.metrics import Metrics

EXAMPLES = 20
METHODS = ("get", "post", "put", "delete", "patch", "head", "options")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.ones(1, 4))
    app = create_app(registry)
    with Server(app) as server:
        app.metrics = Metrics(registry, lambda: len(server.connections)).text
        yield server
    registry.close()


@pytest.fixture(scope="module")
def description(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10) as answer:
        assert answer.headers["content-type"] == "application/json"
        return dict(json.load(answer))


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in description["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                yield path, method, operation


def test_it_lists_the_servers_routes_and_no_others(server: Server, description: dict[str, Any]) -> None:
    routes = server.app._rest.app.routes
    assert all(isinstance(route, Route) for route in routes)
    there = {(route.path, method.lower()) for route in routes for method in route.methods or () if method != "HEAD"}
    assert {(path, method) for path, method, _ in operations(description)} == there


def test_every_reference_leads_somewhere_and_everything_named_is_used(description: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref": "#/components/(\w+)/(\w+)"', json.dumps(description)))
    named = {(kind, name) for kind, names in description["components"].items() for name in names}
    assert references == {one for one in named if one[0] != "securitySchemes"}


def test_every_operation_says_what_it_answers_and_names_its_parameters(description: dict[str, Any]) -> None:
    for path, method, operation in operations(description):
        assert operation["summary"], path
        assert "200" in operation["responses"], path
        for status, answer in operation["responses"].items():
            assert re.fullmatch(r"[2-5]\d\d", status)
            assert "$ref" in answer or answer["description"]
        in_path = {one["$ref"].rpartition("/")[2] for one in description["paths"][path].get("parameters", [])}
        assert in_path == set(re.findall(r"\{(\w+)\}", path)), (path, method)


def test_limits_and_datatypes_are_the_servers(description: dict[str, Any]) -> None:
    from torchsurgeon.wire.tensors import dtype_of

    (down,) = description["paths"]["/v2/probe"]["post"]["parameters"]
    assert down["schema"]["maximum"] == MAX_PROBE_BYTES
    tensor = description["components"]["schemas"]["InferRequest"]["properties"]["inputs"]["items"]["properties"]
    for name in tensor["datatype"]["enum"]:
        assert isinstance(dtype_of(name), torch.dtype)
    assert serve.__doc__


def test_schemathesis_finds_no_answer_that_is_not_described(server: Server, description: dict[str, Any]) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis: pip install schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import checks

    schema = schemathesis.openapi.from_dict(description)
    checks.load_all_checks()
    # Which tensors a model takes is no matter of a schema, so not everything that fits the schema is accepted.
    excluded = [checks.CHECKS.get_one("positive_data_acceptance")]
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        def check(case: Any) -> None:
            nonlocal tried
            case.call_and_validate(base_url=server.url, excluded_checks=excluded)
            tried += 1

        check()
    assert tried >= 100
