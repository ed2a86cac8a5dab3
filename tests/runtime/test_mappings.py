"""Any mapping stands for a call's keyword arguments, as an example, in a stream and on the server."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from serving import serving
from torch import nn

import torchsurgeon as ts
from torchsurgeon.models import specs
from torchsurgeon.tracing.call import call_of


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu() * scale


class Takes(nn.Module):
    """Takes a mapping as its only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(batch["x"]).relu() * batch["scale"]


class Readable:
    """What only has keys() and is read by them, as tables of tensors do in some libraries."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        self._items = dict(items)

    def keys(self) -> Any:
        return self._items.keys()

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]


class Custom(Mapping[str, torch.Tensor]):
    def __init__(self, items: Mapping[str, torch.Tensor]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def a_default_dict(items: Mapping[str, torch.Tensor]) -> defaultdict[str, torch.Tensor]:
    return defaultdict(lambda: torch.zeros(1), items)


def of_transformers(name: str) -> Callable[[Mapping[str, torch.Tensor]], Any]:
    def made(items: Mapping[str, torch.Tensor]) -> Any:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, name)(dict(items))

    return made


KINDS: dict[str, Callable[[Mapping[str, torch.Tensor]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "UserDict": UserDict,
    "defaultdict": a_default_dict,
    "ChainMap": lambda items: ChainMap(dict(items)),
    "MappingProxyType": lambda items: MappingProxyType(dict(items)),
    "Mapping": Custom,
    "BatchEncoding": of_transformers("BatchEncoding"),
    "BatchFeature": of_transformers("BatchFeature"),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.rand(2, 8, generator=generator), "scale": torch.rand(2, 1, generator=generator)}


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


@pytest.mark.parametrize(
    "kind", [*KINDS.values(), Readable, of_transformers("BatchFeature")], ids=[*KINDS, "keys() alone", "BatchFeature"]
)
def test_it_is_an_example_and_a_call_on_both_sides(kind: Callable[[Mapping[str, torch.Tensor]], Any]) -> None:
    model = make(Pair)
    with (
        serving(make(Pair), kind(inputs())) as server,
        ts.SplitModule(
            model, kind(inputs()), server=server.url, name="net", partition="layer", fallback="error"
        ) as split,
    ):
        wanted = [model(**inputs(seed)) for seed in range(3)]
        assert torch.equal(split(**kind(inputs())), wanted[0])
        answers = list(split.map(kind(inputs(seed)) for seed in range(3)))
        assert all(map(torch.equal, answers, wanted))
        assert torch.equal(split.submit(**kind(inputs(1))).result(), wanted[1])
        with pytest.raises(TypeError, match="an iterable of calls; got one"):
            split.map(kind(inputs()))


@kinds
def test_it_may_be_an_argument_itself(kind: Callable[[Mapping[str, torch.Tensor]], Any]) -> None:
    model = make(Takes)
    with (
        serving(make(Takes), (kind(inputs()),)) as server,
        ts.SplitModule(
            model, (kind(inputs()),), server=server.url, name="net", partition="layer", fallback="error"
        ) as split,
    ):
        assert torch.equal(split(kind(inputs(1))), model(kind(inputs(1))))
        frame = inputs(2)
        wanted = model(kind(frame))
        # The caller may overwrite what it submitted.
        future = split.submit(kind(frame))
        frame["x"].zero_()
        assert torch.equal(future.result(), wanted)


def test_moving_a_split_moves_an_example_inside_a_mapping() -> None:
    split = ts.SplitModule(make(Takes), (UserDict(inputs()),), partition="device").double()
    (example,), _ = split._engine.times.example
    assert isinstance(example, UserDict)
    assert {tensor.dtype for tensor in example.values()} == {torch.float64}


def test_a_result_object_is_an_example() -> None:
    outputs = pytest.importorskip("transformers.utils")

    @dataclasses.dataclass
    class Features(outputs.ModelOutput):  # type: ignore[misc, name-defined]
        x: torch.Tensor | None = None
        scale: torch.Tensor | None = None
        more: torch.Tensor | None = None

    assert call_of(Features(**inputs()))[1].keys() == {"x", "scale"}


def test_keys_that_name_no_argument_are_refused() -> None:
    for example in ({0: torch.ones(1)}, Readable({("a", "b"): torch.ones(1)})):
        with pytest.raises(TypeError, match=r"keys must be texts; got .*; give a tuple with the mapping in it"):
            ts.SplitModule(make(Takes), example, partition="device")


def test_a_factory_may_give_any_mapping(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mapped.py").write_text(
        "import torch\n"
        "from collections import UserDict\n"
        "def make():\n    return torch.nn.Linear(8, 8), UserDict(input=torch.ones(1, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = specs.load("mapped:make")
    assert loaded.args == ()
    assert loaded.kwargs.keys() == {"input"}
