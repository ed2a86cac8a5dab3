"""Models that test the values of whole or truth-valued inputs are recorded; only calls like the example are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import requests
import torch
from partitions import assert_same
from serving import check_split, serving, split
from small_models import model
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.errors import TraceError

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
FULL = torch.ones(2, 6, dtype=torch.bool)
PADDED = FULL.clone().index_fill(1, torch.tensor([4, 5]), False)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


TESTS: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda mask: mask.all(),
    "any": lambda mask: not (~mask).any(),
    "item": lambda mask: mask.all().item(),
    "bool": lambda mask: bool(torch.all(mask)),
    "is_nonzero": lambda mask: torch.is_nonzero(mask.all()),
    "sum": lambda mask: mask.sum() == mask.shape[0] * mask.shape[1],
    "equal": lambda mask: torch.equal(mask, torch.ones_like(mask)),
    "in": lambda mask: 0 not in mask.long(),
    "comparison of an item": lambda mask: mask.sum().item() >= mask.shape[0] * mask.shape[1],
    "arithmetic of items": lambda mask: 2 * int(mask.long().min()) - 1 > 0,
    "item as a number": lambda mask: {1: True, 0: False}[mask.long().min().item()],
    "of rows": lambda mask: all(mask.long().prod(1)[i] for i in (0, -1)),
    "of a difference": lambda mask: not (mask.long().cumsum(1) - torch.arange(1, mask.shape[1] + 1)).any(),
}


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("example", [FULL, PADDED], ids=["full", "padded"])
def test_a_call_with_other_values_is_answered_by_the_model_itself(name: str, example: Tensor) -> None:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x if TESTS[name](mask) else x * mask[..., None] + 100)

    made = model(forward, first=linear(), last=linear())
    other = PADDED if example is FULL else FULL
    with split(made, X, example) as module:
        assert (module.graph.traced_by, module.graph.opaque) == ("recorded", {})
        check_split(module, module.graph.points, ((X + 1, example), {}), ((X[:1], example[:1]), {}))
        for point in module.graph.points[:-1]:
            module.partition = point.index
            with torch.no_grad():
                assert_same(module(X, other), made(X, other), point.name)
            assert module.last is not None
            assert "for values like these the model takes another path" in str(module.last.degraded)
            with pytest.raises(TypeError, match=r"another path.*the test of .* must be"):
                ts.cut(module.graph, point).head(X, other)


def test_a_server_refuses_inputs_whose_values_take_another_path() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        return self.first(x) * (2 if mask.all() else 3)

    with serving(model(forward, first=linear()), (X, FULL)) as server:

        def asked(mask: Tensor) -> requests.Response:
            given = [("x", "FP32", X), ("mask", "BOOL", mask)]
            inputs = [
                {"name": name, "datatype": kind, "shape": list(t.shape), "data": np.asarray(t).flatten().tolist()}
                for name, kind, t in given
            ]
            return requests.post(f"{server.url}/v2/models/net/infer", json={"inputs": inputs}, timeout=30)

        assert asked(FULL).status_code == 200
        refused = asked(PADDED)
        assert refused.status_code == 400
        assert "takes another path" in refused.json()["error"]
        assert asked(FULL).status_code == 200


def masking(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    """As transformers do: the mask is left out where it hides nothing, unless the model is compiled."""
    x = self.first(x)
    bias = None
    if torch.compiler.is_compiling() or not mask.all():
        bias = mask[:, None, :].expand(-1, x.shape[1], -1)
    return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=bias)


@pytest.mark.parametrize("example", [FULL, PADDED], ids=["full", "padded"])
def test_a_model_that_tests_no_values_where_it_is_compiled_is_recorded_so_and_takes_all_values(example: Tensor) -> None:
    with split(model(masking, first=linear()), X, example) as module:
        assert (module.graph.traced_by, module.graph.check_values) == ("recorded", None)
        longer = torch.cat([X, X], 1)
        check_split(
            module,
            module.graph.points,
            ((X, FULL), {}),
            ((X, PADDED), {}),
            ((longer, torch.cat([FULL, PADDED], 1)), {}),
        )


def test_a_model_that_answers_otherwise_where_it_is_compiled_is_recorded_with_its_test() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        return x * 2 if not torch.compiler.is_compiling() and not mask.all() else x

    # On the example both give the same; the verification tries other masks.
    graph = ts.trace(model(forward, first=linear()), X, FULL)
    assert graph.check_values is not None
    with pytest.raises(TypeError, match="another path"):
        graph.tensors_of_call((X, PADDED), {})


def clamping(self: Any, x: Tensor) -> Tensor:
    """As models do for half precision: large values are rare, and no example shows them."""
    y = self.first(x)
    if not torch.compiler.is_compiling() and (y.abs() > 100).any():
        y = y.clamp(-100, 100)
    return y  # type: ignore[no-any-return]


def test_a_test_of_fractions_that_is_left_out_where_the_model_is_compiled_keeps_its_module_whole() -> None:
    made = model(lambda self, x: self.last(self.part(x)), part=model(clamping, first=linear()), last=linear())
    graph = ts.trace(made, X)
    assert (graph.traced_by, list(graph.opaque)) == ("hierarchical", ["part"])
    for point in graph.points:
        part = ts.cut(graph, point)
        with torch.no_grad():
            assert_same(part.tail(*part.head(X * 1e4)), made(X * 1e4), point.name)


def test_a_mask_that_is_tested_at_the_root_stays_free_beside_a_part_that_tests_fractions() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not mask.all():
            x = x * mask[..., None]
        return self.last(self.part(x))  # type: ignore[no-any-return]

    made = model(forward, part=model(clamping, first=linear()), last=linear())
    graph = ts.trace(made, X, FULL)
    assert (graph.traced_by, list(graph.opaque), graph.check_values) == ("hierarchical", ["part"], None)
    for point in graph.points:
        part = ts.cut(graph, point)
        for given in (X * 1e4, FULL), (X * 1e4, PADDED), (X, PADDED):
            with torch.no_grad():
                assert_same(part.tail(*part.head(*given)), made(*given), point.name)


def test_a_test_of_fractions_at_the_root_that_is_left_out_where_the_model_is_compiled_is_refused() -> None:
    with pytest.raises(TraceError, match="where it is compiled, the model leaves out a test of the values of a tensor"):
        ts.trace(model(clamping, first=linear()), X)


def test_a_test_of_what_is_computed_from_whole_inputs_and_weights_is_one_of_fractions() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.last(self.part(self.embed(ids)))  # type: ignore[no-any-return]

    made = model(forward, embed=nn.Embedding(4, 8), part=model(clamping, first=linear()), last=linear())
    assert list(ts.trace(made, torch.tensor([[0, 3]])).opaque) == ["part"]


def test_a_number_that_is_read_either_way_is_no_test_that_is_left_out() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x) * x.mean().item()
        return x * mask[..., None] if torch.compiler.is_compiling() or mask.float().mean() != 1 else x

    graph = ts.trace(model(forward, first=linear()), X, FULL)
    assert (graph.traced_by, graph.check_values) == ("recorded", None)


def test_whether_the_process_compiles_is_as_before_after_tracing() -> None:
    before = torch.compiler.is_compiling
    ts.trace(model(masking, first=linear()), X, FULL)
    assert torch.compiler.is_compiling is before


def test_tests_of_floats_are_no_guards() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(x) * (2 if (x > 0).any() else 3)

    with pytest.raises(TraceError, match="the values of a tensor are read in Python"):
        ts.trace(model(forward, first=linear()), X)


def test_a_test_of_the_models_own_numbers_and_the_input_watches_both() -> None:
    def forward(self: Any, x: Tensor, ids: Tensor) -> Tensor:
        return self.first(x) * (2 if (ids < self.limit).all() else 3)

    made = model(forward, first=linear())
    made.register_buffer("limit", torch.tensor(5))
    graph = ts.trace(made, X, torch.tensor([1, 2]))
    assert "limit" in graph.decided_by
    with pytest.raises(TypeError, match="another path"):
        graph.tensors_of_call((X, torch.tensor([1, 7])), {})
    graph.tensors_of_call((X, torch.tensor([0, 4])), {})
