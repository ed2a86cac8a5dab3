"""Models and calls that cannot be traced are refused by name, before anything of them runs."""

from __future__ import annotations

import dataclasses
import enum
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchsurgeon as ts
from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.admission import admit, refuse_changed_arguments
from torchsurgeon.tracing.call import Call


class Taking(nn.Module):
    """Takes anything beside its input, and leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 4)

    def forward(self, x: Any, beside: Any = None) -> torch.Tensor:
        return self.l(x)


class Around(nn.Module):
    """Calls another module behind a layer of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.l, self.inner = nn.Linear(8, 8), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.l(x))


def _refused(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(TraceError) as raised:
        ts.trace(model.eval(), *args, **kwargs)
    return str(raised.value)


def _script(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module.eval())


def _jit_trace(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module.eval(), torch.randn(2, 8))


@pytest.mark.parametrize("compiled", [_script, _jit_trace])
def test_modules_of_torch_jit_are_refused_alone_and_inside(compiled: Any) -> None:
    module = compiled(nn.Linear(8, 8))
    assert "the model (Linear) was compiled or loaded by torch.jit" in _refused(module, torch.randn(2, 8))
    assert "module 'inner' of Around was compiled" in _refused(Around(module), torch.randn(2, 8))
    with pytest.raises(TraceError, match=r"torch\.jit"):
        ts.SplitModule(Around(module).eval(), torch.randn(2, 8), partition="device")


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 8)),
        (Around(nn.LazyConv1d(4, 3)), torch.randn(2, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), torch.randn(1, 3, 8, 8)),
    ],
    ids=["linear", "inside", "batch norm"],
)
def test_lazy_modules_are_refused_and_stay_lazy(model: nn.Module, example: torch.Tensor) -> None:
    assert "has no shape before the first call" in _refused(model, example)
    assert any(isinstance(t, nn.UninitializedParameter) for t in model.parameters())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(
    ("made", "form"),
    [
        (torch.Tensor.to_sparse, r"a sparse tensor (torch.sparse_coo)"),
        (torch.Tensor.to_sparse_csr, r"a sparse tensor (torch.sparse_csr)"),
        (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), "a nested tensor"),
    ],
    ids=["coo", "csr", "nested"],
)
def test_weights_and_arguments_that_are_not_dense_are_refused(made: Any, form: str) -> None:
    model, matrix = Taking(), made(torch.eye(3))
    message = _refused(model, torch.randn(2, 8), beside=[matrix])
    assert message.startswith(f"argument 'beside' of the example for Taking is {form}")
    model.register_buffer("graph", matrix)
    assert _refused(model, torch.randn(2, 8)).startswith(f"buffer 'graph' of Taking is {form}")


def test_sparse_parameters_are_refused() -> None:
    model = Taking()
    model.weights = nn.Parameter(torch.eye(3).to_sparse())
    assert "parameter 'weights' of Taking is a sparse tensor" in _refused(model, torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_modules_with_packed_weights_are_refused_as_arguments_only() -> None:
    packed = torch.ao.nn.quantized.dynamic.Linear(8, 8).eval()
    with pytest.raises(TraceError, match=r"argument 1 .* is a Linear that keeps its weights packed.*a submodule"):
        admit(nn.Identity().eval(), (torch.ones(1, 8), packed), {})
    admit(nn.Sequential(packed).eval(), (torch.ones(1, 8), nn.Linear(8, 8)), {})


def test_packed_sequences_are_refused() -> None:
    packed = pack_padded_sequence(torch.randn(3, 5, 8), torch.tensor([5, 3, 2]), batch_first=True)
    assert isinstance(packed, PackedSequence)
    message = _refused(Taking(), packed)
    assert "argument 0 of the example for Taking is a PackedSequence" in message
    assert "pack_padded_sequence in forward" in message


def test_caches_of_transformers_are_refused() -> None:
    cache = pytest.importorskip("transformers").DynamicCache()
    assert "argument 1 of the example for Taking is a DynamicCache" in _refused(Taking(), torch.randn(2, 8), cache)
    assert "use_cache=False" in _refused(Taking(), torch.randn(2, 8), beside={"past": (cache,)})


class _OwnCache:
    def __init__(self, held: torch.Tensor | None = None) -> None:
        self.held = held

    def update(self, more: torch.Tensor) -> torch.Tensor:
        self.held = more if self.held is None else torch.cat([self.held, more])
        return self.held


@pytest.mark.parametrize(
    "beside", [_OwnCache(), types.SimpleNamespace(scale=2.0), {1, 2}, [_OwnCache()], object()], ids=lambda v: type(v)
)
def test_objects_whose_state_is_not_sent_are_refused(beside: Any) -> None:
    assert "an object without tensors" in _refused(Taking(), torch.randn(2, 8), beside)


@dataclasses.dataclass
class _Options:
    scale: float
    shift: torch.Tensor


class _Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "beside",
    [
        *(None, 1, 2.0, 1j, "text", ..., slice(1), range(3), (1, [{"a": None}]), int, torch.relu),
        *(torch.float32, torch.Size([1]), torch.channels_last, _Colour.RED, _Options(1.0, torch.ones(2))),
    ],
    ids=lambda one: str(getattr(one, "__name__", one)),
)
def test_values_that_stay_the_same_are_admitted(beside: Any) -> None:
    admit(Taking().eval(), (torch.randn(2, 8), beside), {})


def test_wrappers_that_spread_a_model_are_refused() -> None:
    message = _refused(nn.DataParallel(nn.Sequential(nn.Linear(8, 4))), torch.randn(2, 8))
    assert message.startswith("the model (DataParallel) is a DataParallel")
    assert "its attribute 'module'" in message


def test_distributed_wrappers_are_refused() -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(nn.Linear(8, 4))
        assert "is a DistributedDataParallel" in _refused(wrapped, torch.randn(2, 8))
        assert "module 'inner' of Around is a" in _refused(Around(wrapped), torch.randn(2, 8))
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = fully_shard(nn.Linear(8, 4), mesh=mesh)
        assert "is a FSDPModule" in _refused(sharded, torch.randn(2, 8))
    finally:
        dist.destroy_process_group()


def test_models_without_values_are_refused_where_the_trace_is_verified() -> None:
    with torch.device("meta"):
        empty = Taking().eval()
    with pytest.raises(TraceError, match=r"parameter 'l\.weight' of Taking is on the meta device and has no values"):
        ts.trace(empty, torch.randn(2, 8))
    assert ts.trace(empty, torch.randn(2, 8), verify=False).layers
    with pytest.raises(TraceError, match="argument 0 of the example for Taking is on the meta device"):
        admit(Taking().eval(), (torch.empty(2, 8, device="meta"),), {}, verify=True)


class Filling(nn.Module):
    """Computes, and fills a cache among its arguments."""

    def __init__(self, fill: Any) -> None:
        super().__init__()
        self.l, self.fill = nn.Linear(8, 8), fill

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        return self.fill(self.l(x), cache)  # type: ignore[no-any-return]


def _fill_object(x: torch.Tensor, cache: Any) -> torch.Tensor:
    return cache.update(x)  # type: ignore[no-any-return]


def _fill_dict(x: torch.Tensor, cache: Any) -> torch.Tensor:
    cache["held"] = x
    return x


def _fill_list(x: torch.Tensor, cache: Any) -> torch.Tensor:
    cache.append(x)
    return x


@pytest.mark.parametrize(
    ("fill", "cache"),
    [
        *(
            (_fill_object, _OwnCache(torch.ones(1, 8))),
            (_fill_dict, {}),
            (_fill_dict, {"held": None}),
            (_fill_list, []),
        ),
        (_fill_dict, {"held": torch.ones(2)}),
    ],
    ids=["object", "empty dict", "key of a dict", "list", "tensor of a dict"],
)
def test_arguments_that_the_model_changes_are_refused(fill: Any, cache: Any) -> None:
    model, x = Taking().eval(), torch.randn(2, 8)
    call = Call(model, (x, cache), {})
    given = call.tensors((x, cache), {})
    refuse_changed_arguments(model, call, (x, cache), {}, given)
    with pytest.raises(TraceError, match="changes a list, dict or object among its arguments"):
        ts.trace(Filling(fill).eval(), x, cache)
    fill(x, cache)
    with pytest.raises(TraceError, match="changes a list, dict or object among its arguments"):
        refuse_changed_arguments(model, call, (x, cache), {}, given)
