"""To the program around it, a SplitModule is the model: names, checkpoints, moves and attributes are the model's."""

from __future__ import annotations

import copy
import inspect
import io
import multiprocessing
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import serving
from torch import nn
from torch.nn.utils import parametrize, prune

import torchsurgeon as ts

# Servers go on holding the weights that the device's model had before.
pytestmark = pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")

EXAMPLE = torch.linspace(-1, 1, 8).reshape(1, 8)


class Layers(nn.Module):
    """A model whose root has a parameter, buffers of both kinds and submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.rand(8))
        self.register_buffer("passing", torch.ones(8), persistent=False)
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.unused: nn.Module | None = None
        self.tags = ["a"]

    def forward(self, x: torch.Tensor, *, doubled: bool = False) -> torch.Tensor:
        y = self.norm(self.layer(x * self.scale + self.shift + self.passing))
        return y * 2 if doubled else y

    @property
    def width(self) -> int:
        return self.layer.in_features

    def weights(self) -> list[torch.Tensor]:
        return list(self.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Extra(nn.Module):
    """Keeps more than tensors in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.epoch = nn.Linear(8, 8), 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


class Renaming(nn.Module):
    """Saves its root's parameter under another name, and its hooks move a key about."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)
        self._register_state_dict_hook(_moved_out)
        self.register_load_state_dict_pre_hook(_moved_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}gain"] = destination.pop(f"{prefix}scale")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}gain" in state_dict:
            state_dict[f"{prefix}scale"] = state_dict.pop(f"{prefix}gain")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _moved_out(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    state[f"{prefix}offset"] = state.pop(f"{prefix}layer.bias")


def _moved_in(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
    if f"{prefix}offset" in state:
        state[f"{prefix}layer.bias"] = state.pop(f"{prefix}offset")


class Inner(nn.Module):
    """Has a submodule that is called "model"."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def sequence() -> nn.Module:
    return nn.Sequential(OrderedDict(layer=nn.Linear(8, 8), act=nn.ReLU(), top=nn.Linear(8, 8)))


KINDS: list[Callable[[], nn.Module]] = [sequence, linear, Layers, Tied, Extra, Renaming, Inner]
kinds = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])


class Parent(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.stem, self.backbone, self.head = nn.Linear(8, 8), backbone, nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(self.stem(x)))


def made(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def wrapped(model: nn.Module) -> ts.SplitModule:
    return ts.SplitModule(model, EXAMPLE, partition="device")


def pair(kind: Callable[[], nn.Module], seeds: tuple[int, int] = (0, 0)) -> tuple[Parent, Parent]:
    """The same parent around a plain model and around a SplitModule of one."""
    torch.manual_seed(9)
    plain = Parent(made(kind, seeds[0])).eval()
    split = copy.deepcopy(plain)
    split.backbone = wrapped(made(kind, seeds[1]))
    return plain, split


def answers_alike(one: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(EXAMPLE), other(EXAMPLE))


def old_state(parent: Parent) -> dict[str, Any]:
    """The parent's state as it was saved when the model was a submodule of the SplitModule."""
    return {key.replace("backbone.", "backbone.model.", 1): value for key, value in parent.state_dict().items()}


# --- names ---


@kinds
def test_parents_have_the_names_that_they_have_around_the_plain_model(kind: Callable[[], nn.Module]) -> None:
    plain, split = pair(kind)
    assert list(split.state_dict()) == list(plain.state_dict())
    assert split.state_dict()._metadata == plain.state_dict()._metadata
    for names in ("named_parameters", "named_buffers", "named_modules"):
        for unique in (True, False):
            there = [name for name, _ in getattr(plain, names)(remove_duplicate=unique)]
            assert [name for name, _ in getattr(split, names)(remove_duplicate=unique)] == there
    assert list(split.state_dict(prefix="net.")) == list(plain.state_dict(prefix="net."))
    into: dict[str, Any] = {"epoch": 3}
    split.state_dict(destination=into)
    assert list(into) == ["epoch", *plain.state_dict()]
    assert [name for name, _ in split.backbone.named_children()] == [n for n, _ in plain.backbone.named_children()]
    assert "(backbone): SplitModule(" in repr(split)


def test_submodules_are_reached_by_the_models_own_paths() -> None:
    _, split = pair(Layers)
    assert split.get_submodule("backbone.layer") is split.backbone.model.layer
    assert split.get_parameter("backbone.layer.weight") is split.backbone.model.layer.weight
    assert split.backbone.get_submodule("") is split.backbone
    assert dict(split.named_modules())["backbone"] is split.backbone
    assert wrapped(made(Inner)).get_submodule("model.0") is not None


def test_a_model_that_is_assigned_brings_its_own_names() -> None:
    split = wrapped(made(sequence))
    parent = Parent(split)
    split.model = other = made(Layers)
    assert list(split.state_dict()) == list(other.state_dict())
    assert parent.get_parameter("backbone.layer.weight") is other.layer.weight
    assert split.width == 8
    assert answers_alike(split, other)
    with pytest.raises(ts.TraceError, match="cannot be without a model"):
        del split.model
    assert answers_alike(split, other)


# --- checkpoints ---


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_go_both_ways(kind: Callable[[], nn.Module], assign: bool) -> None:
    plain, split = pair(kind, (0, 1))
    assert not answers_alike(plain, split)
    split.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert answers_alike(plain, split)
    plain, split = pair(kind, (0, 1))
    plain.load_state_dict(split.state_dict(), strict=True, assign=assign)
    assert answers_alike(plain, split)
    state = made(kind, 2).state_dict()
    split.backbone.load_state_dict(state, strict=True, assign=assign)
    plain.backbone.load_state_dict(state)
    assert answers_alike(plain, split)


@kinds
def test_checkpoints_of_before_are_loaded(kind: Callable[[], nn.Module]) -> None:
    plain, split = pair(kind, (0, 1))
    split.load_state_dict(old_state(plain), strict=True)
    assert answers_alike(plain, split)
    alone = nn.Module()
    alone.model = made(kind, 4)
    split.backbone.load_state_dict(alone.state_dict(), strict=True)
    plain.backbone.load_state_dict(made(kind, 4).state_dict())
    assert answers_alike(plain, split)


def test_a_checkpoint_goes_through_a_file() -> None:
    plain, split = pair(Extra, (0, 1))
    split.backbone.model.epoch = 7
    file = io.BytesIO()
    torch.save(split.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file))
    assert answers_alike(plain, split)
    assert plain.backbone.epoch == 7


def test_keys_that_do_not_fit_are_named_as_the_models() -> None:
    _, split = pair(sequence)
    state = split.state_dict()
    state["backbone.more.weight"] = state.pop("backbone.layer.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.layer\.bias") as caught:
        split.load_state_dict(state)
    assert "backbone.more.weight" in str(caught.value)
    assert split.load_state_dict(state, strict=False).missing_keys == ["backbone.layer.bias"]


def test_hooks_of_saving_and_loading_can_be_registered_on_the_split() -> None:
    _, split = pair(sequence)
    seen: list[str] = []
    split.backbone.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(f"saving {prefix}"))
    split.backbone.register_load_state_dict_post_hook(lambda module, keys: seen.append("loaded"))
    split.load_state_dict(split.state_dict())
    assert seen == ["saving backbone.", "loaded"]


def test_loaded_weights_are_those_that_the_next_call_uses() -> None:
    model = made(sequence)
    with (
        serving(made(sequence), EXAMPLE) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=1) as split,
    ):
        assert answers_alike(split, model)
        for assign in (False, True):
            state = made(sequence, 3 + assign).state_dict()
            nn.Sequential(split).load_state_dict({f"0.{key}": value for key, value in state.items()}, assign=assign)
            assert answers_alike(split, made(sequence, 3 + assign))


def test_weights_can_be_given_for_one_call() -> None:
    other = dict(made(sequence, 5).named_parameters())
    with (
        serving(made(sequence), EXAMPLE) as server,
        ts.SplitModule(made(sequence), EXAMPLE, server=server.url, name="net", partition=1) as split,
    ):
        split(EXAMPLE)
        given = torch.func.functional_call(split, other, (EXAMPLE,))
        assert torch.equal(given, made(sequence, 5)(EXAMPLE))
        assert answers_alike(split, made(sequence))


# --- what is done to all modules of a program ---


@kinds
def test_an_optimizer_over_the_parents_parameters_has_them_once(kind: Callable[[], nn.Module]) -> None:
    plain, split = pair(kind)
    assert [p.shape for p in split.parameters()] == [p.shape for p in plain.parameters()]
    torch.optim.SGD(split.parameters(), lr=0.1)
    split.requires_grad_(False)
    assert not any(p.requires_grad for p in split.backbone.model.parameters())


@kinds
def test_moving_the_parent_moves_the_model_once(kind: Callable[[], nn.Module]) -> None:
    plain, split = pair(kind)
    moved = []
    for parent in (plain, split):
        seen = Counter[int]()
        own = {id(tensor) for tensor in (*parent.parameters(), *parent.buffers())}
        parent._apply(lambda tensor, seen=seen: (seen.update([id(tensor)]), tensor)[1])
        moved.append(sorted(count for tensor, count in seen.items() if tensor in own))
    assert moved[0] == moved[1]
    split.double()
    assert split.backbone.model.state_dict().keys() == plain.backbone.state_dict().keys()
    assert {p.dtype for p in split.backbone.model.parameters()} == {torch.float64}
    with torch.no_grad():
        assert torch.equal(split.backbone(EXAMPLE.double()), split.backbone.model(EXAMPLE.double()))


def test_a_function_is_applied_to_the_model_and_not_to_the_split() -> None:
    plain, split = pair(linear)
    seen: list[list[type]] = []
    for parent in (plain, split):
        seen.append([])
        parent.apply(lambda module: seen[-1].append(type(module)))
    assert seen[0] == seen[1]


def test_training_the_parent_leaves_the_model_in_evaluation_mode() -> None:
    _, split = pair(Layers)
    split.train()
    assert split.training
    assert not any(module.training for module in (*split.backbone.modules(), *split.backbone.model.modules()))
    split.backbone.model.train()
    split.eval()
    assert not split.backbone.model.training


def test_hooks_registered_on_the_split_run() -> None:
    _, split = pair(sequence)
    seen: list[str] = []
    split.backbone.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = split.backbone.register_forward_hook(lambda module, args, output: output + 1)
    before = split.backbone(EXAMPLE)
    handle.remove()
    assert torch.equal(before, split.backbone(EXAMPLE) + 1)
    assert seen == ["before"] * 2


# --- attributes ---


def test_attributes_of_the_model_are_read_through_the_split() -> None:
    model = made(Layers)
    split = wrapped(model)
    assert split.width == 8
    assert split.layer is model.layer
    assert split.scale is model.scale
    assert split.weights() == model.weights()
    assert split.tags is model.tags
    assert hasattr(split, "width")
    assert not hasattr(split, "height")
    assert {"width", "layer", "shift", "partition", "stats"} <= set(dir(split))
    with pytest.raises(AttributeError, match="'SplitModule' object has no attribute 'height', and of its model: 'Lay"):
        split.height  # noqa: B018


def test_forward_has_the_models_signature() -> None:
    split = wrapped(made(Layers))
    assert inspect.signature(split.forward) == inspect.signature(split.model.forward)
    assert "doubled" in inspect.signature(split.forward).parameters
    assert torch.equal(split.forward(EXAMPLE), split(EXAMPLE))


def test_an_unfinished_split_has_no_attributes_of_a_model() -> None:
    split = ts.SplitModule.__new__(ts.SplitModule)
    assert not hasattr(split, "layer")
    with pytest.raises(ts.TraceError):
        ts.SplitModule(made(Layers).train(), EXAMPLE, partition="device")


def test_attributes_of_the_model_are_set_on_the_model() -> None:
    split = wrapped(made(Layers))
    for name in ("layer", "scale", "shift", "tags", "width", "weights"):
        with pytest.raises(ts.SplitAttributeError, match=f"split.model.{name} = …"):
            setattr(split, name, getattr(split, name))
        with pytest.raises(ts.SplitAttributeError, match=f"del split.model.{name}"):
            delattr(split, name)
    for register in (split.register_buffer, split.register_parameter, split.register_module, split.add_module):
        with pytest.raises(ts.SplitAttributeError, match=r"register 'more' on split\.model"):
            register("more", None)
    with pytest.raises(ts.SplitAttributeError, match=r"set there: split\.model\[0\] = …"):
        setattr(wrapped(nn.Sequential(nn.Linear(8, 8)).eval()), "0", nn.ReLU())
    with pytest.raises(ts.SplitAttributeError, match=r"register 'more' on split\.model"):
        split.more = nn.Linear(8, 8)
    assert list(split.state_dict()) == list(split.model.state_dict())
    split.note = "mine"
    split.deadline_s = 2.0
    del split.note
    assert not hasattr(split.model, "note")


class Doubling(nn.Linear):
    """Reads an attribute that it need not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if getattr(self, "doubles", False) else 1)


def test_what_the_models_code_would_read_is_not_set_on_the_split() -> None:
    split = wrapped(Doubling(8, 8).eval())
    with pytest.raises(ts.SplitAttributeError, match=r"reads attributes called 'doubles'.*split\.model\.doubles = …"):
        split.doubles = True
    split.model.doubles = True
    assert answers_alike(split, split.model)


def test_tools_that_replace_a_weight_of_the_split_are_refused_before_they_change_anything() -> None:
    split = wrapped(made(linear))
    before = list(split.state_dict())
    with pytest.raises(ts.SplitAttributeError, match=r"split\.model"):
        parametrize.register_parametrization(split, "weight", nn.Identity())
    with pytest.raises(ts.SplitAttributeError, match=r"split\.model"):
        prune.l1_unstructured(split, "weight", amount=0.5)
    assert type(split) is ts.SplitModule
    assert list(split.state_dict()) == before
    assert answers_alike(split, split.model)


# --- copies ---


@pytest.mark.parametrize(
    "save", [copy.copy, copy.deepcopy, pickle.dumps, lambda module: torch.save(module, io.BytesIO())]
)
@pytest.mark.parametrize("inside", [False, True])
def test_it_is_neither_copied_nor_saved(save: Callable[[Any], Any], inside: bool) -> None:
    split = wrapped(made(sequence))
    if inside and save is copy.copy:
        assert copy.copy(Parent(split)).backbone is split
        return
    with pytest.raises(TypeError, match=r"copy or save its \.model, and wrap that"):
        save(Parent(split) if inside else split)


def test_it_is_not_sent_to_another_process() -> None:
    process = multiprocessing.get_context("spawn").Process(target=print, args=(wrapped(made(sequence)),))
    with pytest.raises(TypeError, match=r"copy or save its \.model, and wrap that"):
        process.start()
