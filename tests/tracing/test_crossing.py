"""What cannot cross is at no point that is offered; what can, complex and float8 among it, crosses to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from partitions import bits, check
from serving import check_split, split
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import codec
from torchsurgeon.errors import PartitionError, TraceError
from torchsurgeon.planning.rows import LayerCosts

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
EYE = torch.eye(8)
# Why an answer was not the server's, if it is not that this machine was busy.
SPOILT = {"encoding", "refused", "damaged", "failed", "unserved"}


class Between(nn.Module):
    """A layer, then something that cannot cross and what is computed from it, then a layer."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.first, self.beside, self.last, self.way = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.last(self.way(y, self.beside))


def coo(y: Tensor, beside: nn.Module) -> Tensor:
    s = y.to_sparse()
    z = beside(y)
    return torch.sparse.mm(s, EYE) + z


def coo_overwritten(y: Tensor, beside: nn.Module) -> Tensor:
    s = y.to_sparse()
    z = beside(y)
    s._values().mul_(3)
    return s.to_dense() + z


def csr(y: Tensor, beside: nn.Module) -> Tensor:
    s = y.to_sparse_csr()
    z = beside(y)
    return s.to_dense() + z


def mkldnn(y: Tensor, beside: nn.Module) -> Tensor:
    s = y.to_mkldnn()
    z = beside(y)
    return s.to_dense() + z


def per_channel(y: Tensor, beside: nn.Module) -> Tensor:
    q = torch.quantize_per_channel(y, torch.full((8,), 0.1), torch.zeros(8, dtype=torch.long), 1, torch.qint8)
    z = beside(y)
    return q.dequantize() + z


WAYS = [coo, coo_overwritten, csr, mkldnn, per_channel]


class Nest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(x)


class Pad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(x, 0.0)


class Unusual:
    """An object whose class says nothing of how to send it."""

    def __init__(self, factor: int) -> None:
        self.factor = factor


class Give(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Unusual, None, Tensor]:
        return x + 1, Unusual(3), None, x.to_sparse()


class Take(nn.Module):
    def forward(self, given: tuple[Tensor, Unusual, None, Tensor], beside: Tensor) -> Tensor:
        assert given[2] is None
        return given[0] * given[1].factor + given[3].to_dense() + beside


class Objects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.give, self.beside = nn.Linear(8, 8), Give(), nn.Linear(8, 8)
        self.take, self.last = Take(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        given = self.give(self.first(x))
        return self.last(self.take(given, self.beside(given[0])))


def withheld(graph: ts.LayerGraph) -> set[int]:
    return set(range(len(graph.layers) + 1)) - {point.index for point in graph.points}


@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_cut_is_offered_where_something_would_have_to_cross_that_cannot(way: Any) -> None:
    graph = check(Between(way), X)
    assert withheld(graph), graph.points
    assert withheld(graph) == set(graph.flow.withheld)
    name = graph.layers[min(withheld(graph)) - 1].name
    with pytest.raises(PartitionError, match=rf"there is no cut after '{name}', because '{name}' is a .*not sent"):
        graph.point(name)
    with pytest.raises(PartitionError, match=rf"no cut at point {min(withheld(graph))}, because '{name}' is a"):
        ts.cut(graph, min(withheld(graph)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_stay_on_one_side() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Nest(), nn.Linear(8, 4), Pad(), nn.Linear(4, 2))
    graph = check(model, torch.randn(2, 3, 8), leaf_modules=[Nest, Pad])
    assert withheld(graph) == {2, 3}
    assert graph.flow.withheld[2] == "'1' is a nested tensor"


def test_objects_that_a_layer_gives_stay_on_the_side_of_their_reader() -> None:
    graph = check(Objects(), X, leaf_modules=[Give, Take])
    names = {graph.layers[k - 1].name for k in withheld(graph)}
    assert {"give", "beside"} <= names
    assert "take" not in names


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (lambda y, _: y.to_sparse(), "a sparse tensor"),
        (lambda y, _: torch.nested.as_nested_tensor(list(y)), "a nested tensor"),
    ],
    ids=["sparse", "nested"],
)
def test_models_whose_result_cannot_be_sent_are_refused(forward: Any, what: str) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.end = nn.Linear(8, 8), _End(forward)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.layer(x))

    with pytest.raises(TraceError, match=f"the model returns {what}.*as 'output'"):
        ts.trace(Ends().eval(), X, leaf_modules=[_End])


class _End(nn.Module):
    def __init__(self, way: Any) -> None:
        super().__init__()
        self.way = way

    def forward(self, y: Tensor) -> Tensor:
        return self.way(y, None)


def test_nothing_that_is_chosen_from_holds_a_point_that_is_not_offered() -> None:
    graph = ts.trace(Between(coo).eval(), X)
    missing = withheld(graph)
    profile = ts.profile(graph, repeats=2, warmup=1, meter=None)
    table = codec.measure(graph, [X], ["raw", "zstd", "int8"])
    frontier = ts.Frontier.build(graph, profile, profile, table)
    assert not missing & {row.index for row in frontier.rows}
    assert not missing & {row.index for row in LayerCosts(graph, profile, profile).rows(table)}
    assert not missing & {row.point for row in table.rows}
    assert not missing & {point.index for point in codec.promising(graph)}
    assert not missing & {point["index"] for point in graph.to_json()["points"]}
    assert graph.closure.prefixes_only
    for point in missing:
        with pytest.raises(PartitionError):
            graph.point_of(range(point))


# --- complex and float8 boundaries ---


class Spectrum(nn.Module):
    """Works on spectra; of some only lazy conjugates are read."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(64, 64, dtype=dtype))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(torch.complex(x, x + 1))
        z = y.conj()
        w = torch.exp(z * 0.1)
        u = w[:, ::2].conj() @ self.weight[:32]
        n = u.conj().imag
        return {"real": torch.mm(n, n.t()) + torch.mm(z, z.mH).real, "complex": torch.mm(z.t(), u)}


@pytest.mark.parametrize("codec_name", ["raw", "zstd", "int8"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_boundaries_give_the_models_own_bits(dtype: torch.dtype, codec_name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64, dtype=dtype.to_real())
    with split(Spectrum(dtype).eval(), x) as module:
        crossing = {spec.dtype for point in module.graph.points[1:-1] for spec in point.tensors}
        assert crossing == {dtype, dtype.to_real()}
        module.codec = codec_name
        if codec_name == "int8":
            # What is complex crosses without loss, but the real tensors beside it do not.
            points = [p for p in module.graph.points if all(spec.dtype == dtype for spec in p.tensors)]
        else:
            points = list(module.graph.points)
        check_split(module, points, ((x,), {}), ((x[:3],), {}))
        assert not SPOILT & set(module.stats()["degraded"])


class Eighths(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(8, 8), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).to(self.dtype).transpose(0, 1).float().transpose(0, 1))


EIGHTHS = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("codec_name", ["raw", "zstd", "int8", "int4+zstd"])
@pytest.mark.parametrize("dtype", EIGHTHS)
def test_float8_boundaries_give_the_models_own_bits(dtype: str, codec_name: str) -> None:
    kind = getattr(torch, dtype)
    with split(Eighths(kind).eval(), X) as module:
        module.codec = codec_name
        points = [p for p in module.graph.points if [spec.dtype for spec in p.tensors] == [kind]]
        assert points
        check_split(module, points, ((X,), {}))
        assert not SPOILT & set(module.stats()["degraded"])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.float8_e5m2], ids=str)
def test_inputs_and_outputs_may_be_complex_or_float8(dtype: torch.dtype) -> None:
    class Flips(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.transpose(0, 1).contiguous(), x[:, 1:]

    x = torch.randint(0, 256, (3, 4 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    with split(Flips().eval(), x) as module, torch.no_grad():
        for point in module.graph.points:
            module.partition = point.index
            for got, wanted in zip(module(x), module.model(x), strict=True):
                assert torch.equal(bits(got), bits(wanted))
        assert not SPOILT & set(module.stats()["degraded"])


def test_codecs_are_measured_and_profiles_taken_of_complex_and_float8_boundaries() -> None:
    model = Spectrum(torch.complex64).eval()
    x = torch.randn(8, 64)
    graph = ts.trace(model, x)
    budget = codec.Budget(min_cosine=0.5, decide_by="estimate")
    table = codec.measure(graph, [x], points=[p.index for p in graph.points[:-1]], budget=budget)
    for point in graph.points[:-1]:
        # Lossy codecs are offered only where they encode something.
        lossy = {row.cost.codec for row in table.at(point.index) if not row.cost.lossless}
        assert bool(lossy) == any(spec.dtype == torch.float32 for spec in point.tensors)
    assert ts.profile(graph, repeats=1, warmup=1, meter=None).layers
    eighths = ts.trace(Eighths(torch.float8_e4m3fn).eval(), X)
    rows = codec.measure(eighths, [X], points=["to"]).at(eighths.point("to").index)
    assert {row.cost.codec for row in rows} == {"raw", "zstd"}
