"""SPECs: the same text gives the same model on two machines, and no file runs code."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from torchsurgeon.errors import SpecError
from torchsurgeon.models import specs
from torchsurgeon.models.weights import weight_digests
from torchsurgeon.tracing.digests import tensor_digest


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory with factories of every kind."""
    (tmp_path / "my_models_of_test.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def plain(): return nn.Linear(3, 2)\n"
        "def with_tensor(): return nn.Linear(3, 2), torch.zeros(1, 3)\n"
        "def with_tuple(): return nn.Bilinear(3, 4, 2), (torch.zeros(1, 3), torch.zeros(1, 4))\n"
        "def with_dict(): return nn.Linear(3, 2), {'input': torch.zeros(1, 3)}\n"
        "def text(): return 'no model'\n"
        "def broken(): raise RuntimeError('no luck')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_models_of_test", raising=False)
    return "my_models_of_test"


def test_a_torchvision_model_has_the_same_random_weights_everywhere() -> None:
    state = torch.get_rng_state()
    one = specs.load("torchvision:squeezenet1_1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    two = specs.load("torchvision:squeezenet1_1")
    other = specs.load("torchvision:squeezenet1_1", seed=1)
    assert weight_digests(one.model) == weight_digests(two.model)
    assert weight_digests(one.model).combined != weight_digests(other.model).combined
    assert not one.model.training
    assert [tuple(arg.shape) for arg in one.args] == [(1, 3, 224, 224)]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("inception_v3", [(1, 3, 342, 342), (1, 3, 299, 299)]),
        ("lraspp_mobilenet_v3_large", [(1, 3, 520, 520)]),
        ("mc3_18", [(1, 3, 16, 112, 112)]),
        ("raft_small", [(1, 3, 128, 128)]),
    ],
)
def test_the_example_suits_the_model(name: str, shapes: list[tuple[int, ...]]) -> None:
    loaded = specs.load(f"torchvision:{name}")
    assert tuple(loaded.args[0].shape) in shapes
    if name != "raft_small":
        with torch.no_grad():
            loaded.model(*loaded.args)


def test_an_unknown_torchvision_model_lists_the_near_ones() -> None:
    with pytest.raises(SpecError, match="resnet50"):
        specs.load("torchvision:resent50")


def test_torchvisions_own_weights_need_internet_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(SpecError, match="internet"):
        specs.load("torchvision:squeezenet1_1", weights="default")


def test_torchvisions_own_weights_are_not_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(*args: Any, **kwargs: Any) -> Any:
        return torch.load(tmp_path / "evil.pth", weights_only=False)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(SpecError):
        specs.load("torchvision:squeezenet1_1", weights="default")
    assert not Evil.ran


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [("with_tensor", [(1, 3)], {}), ("with_tuple", [(1, 3), (1, 4)], {}), ("with_dict", [], {"input": (1, 3)})],
)
def test_a_factory_may_bring_its_example(
    factory: str, name: str, args: list[tuple[int, ...]], kwargs: dict[str, tuple[int, ...]]
) -> None:
    loaded = specs.load(f"{factory}:{name}")
    assert [tuple(arg.shape) for arg in loaded.args] == args
    assert {key: tuple(value.shape) for key, value in loaded.kwargs.items()} == kwargs


def test_an_input_spec_stands_in_for_the_example(factory: str) -> None:
    loaded = specs.load(f"{factory}:plain", input_spec="input:float32[2,3]")
    assert tuple(loaded.args[0].shape) == (2, 3)
    assert weight_digests(loaded.model) == weight_digests(specs.load(f"{factory}:with_tensor").model)
    pair = specs.load(f"{factory}:with_tuple", input_spec="float64[5,3], input2: uint8 [5, 4]")
    assert [(arg.dtype, tuple(arg.shape)) for arg in pair.args] == [(torch.float64, (5, 3)), (torch.uint8, (5, 4))]


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("{}:plain", {}, "without an example"),
        ("{}:plane", {}, "no factory 'plane'; near it: plain$"),
        ("{}:number", {}, "no factory 'number'; it defines plain, with_tensor"),
        ("{}:torch", {}, "no factory 'torch'; it defines plain, with_tensor"),
        ("errno:x", {}, "no factory 'x'; it defines no function"),
        ("{}:text", {}, "must return a Module or .* returned str"),
        ("{}:broken", {}, "no luck"),
        ("no_such_module_at_all:f", {}, "'no_such_module_at_all' is not: ModuleNotFoundError"),
        ("resnet50", {}, r"must be torchvision:NAME.* got 'resnet50'; did you mean torchvision:resnet50\?$"),
        ("whole.pt", {}, "got 'whole.pt'; such a file holds weights: name the function that makes the model"),
        ("my/missing.py:f", {}, "'my/missing.py' is not: .*; write my.missing:f, without .py$"),
        ("", {}, "must be torchvision:NAME.* got ''"),
        ("a:", {}, "must be torchvision:NAME.* got 'a:'"),
        ("x" * 1000, {}, "got 'x+…x+'$"),
        ("missing.pt2", {}, "no file 'missing.pt2'"),
        ("x" * 1000 + ".pt2", {}, "no file 'x+…x+.pt2'$"),
        ("{}:with_tensor", {"weights": "default"}, "torchvision's models only"),
        ("{}:with_tensor", {"weights": "missing.safetensors"}, "no file 'missing.safetensors'"),
        ("{}:with_tensor", {"input_spec": "x:float32[1,3]"}, "must be those of Linear.forward"),
        ("{}:with_tensor", {"input_spec": "input:float33[1,3]"}, "got 'float33'"),
        ("{}:with_tensor", {"input_spec": "input float32[1,3]"}, "must be written like .* got 'input float32"),
        ("{}:with_tensor", {"input_spec": "input:float32[1,,3,a]"}, "must be written like .* got 'input:float32"),
        ("{}:with_tensor", {"input_spec": "  "}, "must be written like .* got '  '"),
        (
            "{}:with_tensor",
            {"input_spec": "input:float32[99999999,99999999]"},
            "at most 2³⁰ elements; got the shape .99999999, 99999999",
        ),
    ],
)
def test_a_spec_that_cannot_be_loaded_says_why(factory: str, spec: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        specs.load(spec.format(factory), **options)


class Evil:
    """Unpickling one sets ``ran``."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_run_evil, ())


def _run_evil() -> None:
    Evil.ran = True


def test_weights_from_files(factory: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    safetensors.save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pt", "w.pth"):
        loaded = specs.load(f"{factory}:with_tensor", weights=str(tmp_path / name))
        assert torch.equal(loaded.model.weight, state["weight"])


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("whole.pt", lambda path: torch.save(nn.Linear(3, 2), path), "whole pickled model.* save model.state_dict()"),
        ("evil.pt", lambda path: torch.save({"weight": Evil()}, path), "plain tensors"),
        ("raw.pth", lambda path: path.write_bytes(pickle.dumps(Evil())), "plain tensors"),
        ("noise.pt", lambda path: path.write_bytes(b"\x80" * 100), "plain tensors"),
        ("noise.safetensors", lambda path: path.write_bytes(b"\xff" * 100), "plain tensors"),
        ("list.pt", lambda path: torch.save([torch.ones(1)], path), "holds a list; save model.state_dict()"),
        (
            "other.pt",
            lambda path: torch.save({"other": torch.ones(1)}, path),
            "file lacks weight, bias; the model lacks other; g",
        ),
        (
            "shape.pt",
            lambda path: torch.save({"weight": torch.ones(1), "bias": torch.ones(2)}, path),
            r"not this model's: weight is \[1\] in the file, \[2, 3\] in the model; give",
        ),
        (
            "large.pt",
            lambda path: torch.save({f"{i}.weight": torch.ones(1) for i in range(9)}, path),
            r"lacks weight, bias; the model lacks 0.weight, 1.weight and 7 more; give",
        ),
        (
            "parallel.pt",
            lambda path: torch.save(nn.DataParallel(nn.Linear(3, 2)).state_dict(), path),
            r"begin with 'module\.', as DataParallel names them; save model\.module\.state_dict\(\)$",
        ),
    ],
)
def test_weights_that_are_not_plain_tensors_of_this_model_are_refused(
    factory: str, tmp_path: Path, name: str, write: Callable[[Path], Any], says: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(SpecError, match=says):
        specs.load(f"{factory}:with_tensor", weights=str(tmp_path / name))
    assert not Evil.ran


def test_a_whole_pickled_model_is_not_told_to_be_loaded_without_weights_only(factory: str, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "whole.pt")
    with pytest.raises(SpecError) as caught:
        specs.load(f"{factory}:with_tensor", weights=str(tmp_path / "whole.pt"))
    assert "weights_only" not in str(caught.value)
    assert "a pickle may run code" in str(caught.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Small().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def test_an_exported_program_gives_its_own_answer(exported: Path) -> None:
    loaded = specs.load(str(exported))
    torch.manual_seed(0)
    model = Small().eval()
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(loaded.model(x), model(x))
    assert tuple(loaded.args[0].shape) == (2, 3, 8, 8)


def changed(path: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """The archive with one record changed (or added, where there was none)."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        root = source.namelist()[0].partition("/")[0]
        for entry in source.namelist():
            data = source.read(entry)
            copy.writestr(entry, change(data) if entry == f"{root}/{name}" else data)
        if f"{root}/{name}" not in source.namelist():
            copy.writestr(f"{root}/{name}", change(b""))
    return target


def in_json(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return apply


def evil_bytes(_: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    torch.save((Evil(),), buffer)
    return buffer.getvalue()


def nodes(value: Any) -> Any:
    return value["graph_module"]["graph"]["nodes"]


def first_expression(value: Any, text: str) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if "expr_str" in item:
                item["expr_str"] = text
                return
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    raise AssertionError("no expression in the program")


MODEL = "models/model.json"
EXPORTED_ATTACKS: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("pickled example", "data/sample_inputs/model.pt", evil_bytes),
    ("legacy weights", "data/weights/model.pt", evil_bytes),
    ("custom object", "data/constants/custom_obj_0", evil_bytes),
    ("compiled library", "data/aotinductor/model/a.so", lambda data: b"\x7fELF"),
    (
        "pickled weight",
        "data/weights/model_weights_config.json",
        in_json(lambda value: next(iter(value["config"].values())).update(use_pickle=True)),
    ),
    ("operator os.system", MODEL, in_json(lambda v: nodes(v)[0].update(target="torch.serialization.os.system"))),
    ("operator dunder", MODEL, in_json(lambda v: nodes(v)[0].update(target="torch.ops.aten.__class__.mro"))),
    ("operator call", MODEL, in_json(lambda v: nodes(v)[0].update(target="_operator.methodcaller"))),
    ("operator load_library", MODEL, in_json(lambda v: nodes(v)[0].update(target="torch.ops.load_library"))),
    ("operator from_file", MODEL, in_json(lambda v: nodes(v)[0].update(target="torch.ops.aten.from_file.default"))),
    ("expression", MODEL, in_json(lambda v: first_expression(v, "__import__('os').system('true')"))),
    ("expression nested", MODEL, in_json(lambda v: first_expression(v, "Max('__import__(1)', 2)"))),
    ("expression lambda", MODEL, in_json(lambda v: first_expression(v, "(lambda: 1)()"))),
    ("expression attribute", MODEL, in_json(lambda v: first_expression(v, "Symbol('s').__class__"))),
    ("guard", MODEL, in_json(lambda v: v.update(guards_code=["__import__('os').system('true') == 0"]))),
    ("name", MODEL, in_json(lambda v: nodes(v)[0].update(name="x); import os; (x"))),
]


@pytest.mark.parametrize(("record", "change"), [a[1:] for a in EXPORTED_ATTACKS], ids=[a[0] for a in EXPORTED_ATTACKS])
def test_an_exported_program_that_could_run_code_is_refused(
    exported: Path, tmp_path: Path, record: str, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the file reached torch.export.load")

    monkeypatch.setattr(torch.export, "load", loaded)
    with pytest.raises(SpecError, match="is refused"):
        specs.load(str(changed(exported, tmp_path / "evil.pt2", record, change)))
    assert not Evil.ran


def test_an_archive_written_anew_loads_and_a_damaged_one_does_not(exported: Path, tmp_path: Path) -> None:
    specs.load(str(changed(exported, tmp_path / "same.pt2", MODEL, lambda data: data)))
    with pytest.raises(SpecError, match="no exported program"):
        specs.load(str(changed(exported, tmp_path / "damaged.pt2", MODEL, lambda data: b"{")))


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pt2").write_bytes(b"PK" + bytes(100))
    with pytest.raises(SpecError, match="no exported program"):
        specs.load(str(tmp_path / "noise.pt2"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_a_digest_depends_on_values_dtype_and_shape_and_not_on_layout(dtype: torch.dtype) -> None:
    tensor = (torch.arange(48) % 2).to(dtype).view(2, 3, 4, 2)
    same = tensor.contiguous(memory_format=torch.channels_last)
    assert tensor_digest(same) == tensor_digest(tensor)
    changed = tensor.clone()
    changed[1, 2, 3, 0] = 1 - changed[1, 2, 3, 0].to(torch.int64)
    digests = {tensor_digest(one).digest for one in (tensor, changed, tensor.view(3, 2, 4, 2), tensor.double())}
    assert len(digests) == 4


def test_weight_digests_name_shared_and_hidden_tensors() -> None:
    model = nn.Module()
    model.a = nn.Linear(2, 2, bias=False)
    model.b = nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    model.register_buffer("hidden", torch.ones(3), persistent=False)
    before = weight_digests(model)
    assert list(before.tensors) == ["a.weight", "b.weight", "hidden"]
    model.hidden[0] = 2
    assert weight_digests(model).combined != before.combined


def test_a_transformers_example_has_the_size_it_is_built_for() -> None:
    # vit_b_16's first weights are for 224, vit_h_14's for 518; both are built for 224 without weights.
    model = specs.load("torchvision:vit_b_16")
    (example,) = model.args
    assert example.shape[-2:] == (model.model.image_size, model.model.image_size)
    sized = specs._torchvision_example("vit_h_14", torchvision.models.vit_h_14, model.model)
    assert sized[0].shape[-2:] == (224, 224)
