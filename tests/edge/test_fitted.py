"""Fitted codecs on a device without PyTorch: the streams of the compiled extension, and who has which file."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import DEVICE_S, SERVER_S, WITHOUT_TORCH, flat_profile, pictures, table_of
from classifier import EXAMPLE, GRAPH, PATIENCE_S, truth
from coder_tables import random_tables
from hypothesis import given
from hypothesis import strategies as st
from paths import environment
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import _native, cli, edge
from torchsurgeon.codec import FittedCodec, range_coder
from torchsurgeon.codec.fitted.transform import TensorGrid
from torchsurgeon.codec.range_fit import fit_tables
from torchsurgeon.edge import range_encoder
from torchsurgeon.edge.bundle import digest_of
from torchsurgeon.edge.codec import find_codec
from torchsurgeon.edge.fitted import ArrayFitted, ArrayTransform
from torchsurgeon.edge.model import EdgeModel
from torchsurgeon.errors import MissingCodecWarning
from torchsurgeon.export import export_bundle

pytestmark = pytest.mark.skipif(not _native.available(), reason="no compiled extension: make setup")

COSTS = {"device": flat_profile(GRAPH, DEVICE_S), "server": flat_profile(GRAPH, SERVER_S)}
X = pictures(1, 9)[0]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is late before two seconds more than was predicted, on a machine that does other things as well."""
    monkeypatch.setattr("torchsurgeon.adapting.deadline._LEAST_PATIENCE_S", 2.0)


def boundary(x: Tensor = X, point: str = "act") -> Tensor:
    with torch.no_grad():
        (tensor,) = ts.cut(GRAPH, point).head(x)
    return tensor


def last(model: EdgeModel) -> edge.EdgeInference:
    assert model.last is not None
    return model.last


def near(found: Any, x: Tensor = X, share: float = 0.1) -> bool:
    expected = truth(x).numpy()
    return bool(np.abs(found - expected).max() <= share * np.abs(expected).max())


# --- streams ---


@given(st.integers(0, 2**32), st.sampled_from([2, 3, 16, 17, 64]), st.integers(0, 8), st.data())
def test_a_stream_is_byte_for_byte_that_of_the_compiled_extension(
    seed: int, symbols: int, parents: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(data.draw(st.integers(0, most)) for most in (150, 4, 20))
    tables = random_tables(rng, shape[0], parents, symbols)
    spread = rng.choice([0, 0, 1, 5, 100, 2**31 - 1], shape)
    values = (rng.uniform(-1, 1, shape) * spread).astype(np.int32)
    assert range_encoder.encode(values, tables) == range_coder.encode(torch.from_numpy(values), tables)
    folded = range_coder.fold(torch.from_numpy(values)).numpy()
    assert np.array_equal(
        range_encoder.levels(folded, tables), range_coder.levels(torch.from_numpy(values), tables).numpy()
    )


@pytest.mark.parametrize("shape", [(24, 1, 1), (24, 33, 17), (24, 0, 4), (24, 4, 0), (24, 60, 60)])
@pytest.mark.parametrize("far", [0, 31, 2**31 - 1, -(2**31)])
def test_streams_of_fitted_tables_are_the_same_too(shape: tuple[int, ...], far: int) -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.exp(-torch.arange(24) / 6).view(-1, 1, 1) * 4
    sample = (torch.randn(16, 24, 5, 6, generator=generator) * spread).round().int()
    parents = np.stack([np.arange(24) - 1, np.arange(24) - 2], axis=1).clip(-1).astype(np.int32)
    tables = fit_tables(sample, parents, symbols=16)
    values = (torch.randn(shape, generator=generator) * spread).round().int()
    if values.numel():
        values[3, -1, 0] = values[-1, 0, -1] = far
    assert range_encoder.encode(values.numpy(), tables) == range_coder.encode(values, tables)
    everywhere = torch.full((24, 2, 3), far, dtype=torch.int32)
    assert range_encoder.encode(everywhere.numpy(), tables) == range_coder.encode(everywhere, tables)


# --- coefficients ---


@pytest.mark.parametrize(
    ("shape", "channels_at", "block"),
    [
        ((2, 5, 16, 24), 1, (8, 8)),
        ((1, 5, 13, 9), 1, (6, 4)),
        ((3, 11, 5), 2, (1, 1)),
        ((2, 5, 7), 1, (1, 7)),
        ((4, 5), 1, (1, 1)),
        ((1, 5, 3, 4, 6), 1, (5, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_coefficients_are_those_of_tensors(
    shape: tuple[int, ...], channels_at: int, block: tuple[int, int], dtype: Any
) -> None:
    from torchsurgeon.codec.fitted.transform import Transform

    rng = np.random.default_rng(0)
    grid = TensorGrid(len(shape), channels_at, 5, block)
    held = (
        np.stack([np.eye(5) + 0.2 * rng.standard_normal((5, 5)) for _ in range(min(2, grid.frequencies))]),
        rng.integers(0, min(2, grid.frequencies), grid.frequencies),
        rng.uniform(0.5, 2, (grid.frequencies, 5)),
        rng.standard_normal((grid.frequencies, 5)),
    )
    arrays = [one.astype(np.uint16 if one.dtype == np.int64 else np.float32) for one in held]
    array = rng.standard_normal(shape).astype(dtype)
    ours = ArrayTransform(grid, *arrays).forward(array)
    theirs = Transform(grid, *arrays).forward(torch.from_numpy(array)).numpy()
    assert ours.dtype == np.float32
    assert np.allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def arrays(fitted: FittedCodec, tmp_path_factory: pytest.TempPathFactory) -> ArrayFitted:
    path = tmp_path_factory.mktemp("codec") / "edge.fitted"
    fitted.save(path)
    return ArrayFitted.load(path)


@pytest.fixture(scope="module")
def other(fitted: FittedCodec) -> FittedCodec:
    """A codec of the same cut that was fitted to other pictures."""
    made = ts.fit_codec(GRAPH, "act", pictures(6, 3), name="edge")
    assert made.name != fitted.name
    return made


def test_what_an_array_encodes_decodes_as_what_a_tensor_encodes(fitted: FittedCodec, arrays: ArrayFitted) -> None:
    assert (arrays.name, arrays.digest) == (fitted.name, fitted.digest)
    for rate in (fitted.rates[-1], 0.5, 1, 2.345, fitted.rates[0]):
        by_torch, by_numpy = fitted.at(rate), arrays.at(rate)
        assert by_numpy.name == by_torch.name
        for x in (X, torch.cat(pictures(3, 5)), pictures(1, 6, side=45)[0]):
            tensor = boundary(x)
            errors, sizes = [], []
            used, data = by_numpy.encode(tensor.numpy(), "act")
            assert used == by_torch.name
            for one in (by_torch.encode(tensor, "act").data, data):
                decoded = by_torch.decode(one, tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)
                errors.append(float((decoded - tensor).square().mean().sqrt()))
                sizes.append(len(one))
            assert errors[1] == pytest.approx(errors[0], rel=1e-3)
            assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_several_tensors_are_found_by_their_names(tmp_path: Path) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.fine, self.coarse = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1, stride=2)
            self.box = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            fine = self.fine(x).relu()
            return self.box(fine), self.box(self.coarse(fine).relu())

    x = pictures(1, 0)[0]
    graph = ts.trace(Pyramid().eval(), x)
    place = next(point for point in graph.points if len(point.tensors) == 2 and point.index < len(graph.layers))
    several = ts.fit_codec(graph, place, pictures(8, 1))
    several.save(tmp_path / "several.fitted")
    codec, arrays = several.at(2), ArrayFitted.load(tmp_path / "several.fitted").at(2)
    with torch.no_grad():
        crossing = ts.cut(graph, place).head(x)
    for spec, tensor in zip(place.tensors, crossing, strict=True):
        used, data = arrays.encode(tensor.numpy(), spec.name)
        assert used == codec.name
        assert data[0] == codec.encode(tensor, spec.name).data[0]
        decoded = codec.decode(data, tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)
        assert torch.cosine_similarity(decoded.flatten(), tensor.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("zstandard", [True, False])
def test_what_it_was_not_fitted_to_is_sent_without_loss(
    zstandard: bool, arrays: ArrayFitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not zstandard:
        monkeypatch.setattr("torchsurgeon.edge.codec.importlib.util.find_spec", lambda name: None)
    codec, usual = arrays.at(2), boundary().numpy()
    nan, infinite = usual.copy(), usual.copy()
    nan[0, 3, 2, 2], infinite[0, 0, 0, 0] = np.nan, np.inf
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float16) * 100
    for array, name in (
        (nan, "act"),
        (infinite, "act"),
        (usual * 1e30, "act"),
        (usual.astype(np.float64) * 1e300, "act"),
        (noise, "act"),
        (usual[:, :3], "act"),
        (usual[:, :, :5], "act"),
        (usual[:0], "act"),
        (usual.astype(np.int32), "act"),
        (usual, "stem"),
    ):
        used, data = codec.encode(np.ascontiguousarray(array), name)
        assert used in ("raw", "zstd")[: 1 + zstandard]
        if used == "raw":
            assert bytes(data) == array.tobytes()
    assert codec.encode(usual)[0] == codec.name


def test_a_device_does_not_decode(arrays: ArrayFitted) -> None:
    used, data = arrays.at(2).encode(boundary().numpy(), "act")
    with pytest.raises(ts.CodecError, match=f"encodes with {used} and does not decode"):
        arrays.at(2).decode(data, np.dtype("float32"), (1, 4, 32, 32))


@pytest.mark.parametrize("content", [b"", b"TSFITTED", b"\0" * 100])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "none.fitted").write_bytes(content)
    with pytest.raises(ts.CodecError, match=r"none\.fitted: "):
        ArrayFitted.load(tmp_path / "none.fitted")
    with pytest.raises(ts.CodecError, match="cannot be read"):
        ArrayFitted.load(tmp_path / "missing.fitted")


# --- bundles ---


def test_the_bundle_holds_the_file_and_says_what_encoding_takes(fitted: FittedCodec, fitted_bundle: Path) -> None:
    found = edge.read(fitted_bundle)
    (held,) = found.codecs
    assert (held.name, held.student) == (fitted.name, None)
    assert ArrayFitted.load(fitted_bundle / held.file).digest == fitted.digest
    assert held.file in json.loads((fitted_bundle / "manifest.json").read_text())["files"]
    rows = {row.codec: row for row in found.costs.rows if not row.on_device}
    assert set(rows) == {"raw", "int8", fitted.at(1).name, fitted.at(3).name}
    # The table says 10 µs for each, by the compiled extension. A loop in Python takes longer, and int8 does not.
    assert rows["int8"].encode_s == 1e-5
    assert rows[fitted.at(3).name].encode_s > 1.5e-5


def test_a_codec_that_was_not_given_is_left_out(fitted: FittedCodec, tmp_path: Path) -> None:
    table = table_of(GRAPH, "act", ["raw", fitted.at(2).name])
    written = export_bundle(GRAPH, tmp_path / "bundle", points=["act"], codecs=table, inputs=[EXAMPLE], **COSTS)
    assert written.left_out == (fitted.at(2).name,)
    assert edge.read(tmp_path / "bundle").codecs == ()


def test_a_codec_of_another_model_or_point_is_refused(fitted: FittedCodec, tmp_path: Path) -> None:
    with pytest.raises(ts.CodecError, match=r"crosses at 'act', and the bundle has other points: stem; add this point"):
        export_bundle(GRAPH, tmp_path / "bundle", points=["stem"], fitted=[fitted], **COSTS)
    with pytest.raises(ts.CodecError, match=r"fitted must be codecs that load_codec\(\) or .*; got .*edge\.fitted"):
        export_bundle(GRAPH, tmp_path / "bundle", points=["act"], fitted=[tmp_path / "edge.fitted"], **COSTS)  # type: ignore[list-item]
    graph = ts.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2)).eval(), EXAMPLE)
    costs = flat_profile(graph, 1e-4)
    with pytest.raises(ts.CodecError, match=f"{fitted.name} was fitted to Net"):
        export_bundle(graph, tmp_path / "other", points=[1], fitted=[fitted], device=costs, server=costs)
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_codec_from_its_file(
    fitted: FittedCodec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))
    fitted.save(tmp_path / "edge.fitted")
    flat_profile(GRAPH, DEVICE_S).save(tmp_path / "device.json")
    flat_profile(GRAPH, SERVER_S).save(tmp_path / "server.json")
    table_of(GRAPH, "act", ["raw", fitted.at(2).name, "fitted:mine-01234567@1"]).save(tmp_path / "codecs.json")
    options = ["classifier:net", "--input", "x:float32[1,3,32,32]", "--point", "act", "--out", str(tmp_path / "bundle")]
    for option, file in (("device", "device.json"), ("server", "server.json"), ("codecs", "codecs.json")):
        options += [f"--{option}", str(tmp_path / file)]
    assert cli.main(["export", *options, "--fitted", str(tmp_path / "edge.fitted")]) == 0
    assert "does not have these codecs: fitted:mine-01234567@1" in capsys.readouterr().err
    found = edge.read(tmp_path / "bundle")
    assert [one.name for one in found.codecs] == [fitted.name]
    assert fitted.at(2).name in {row.codec for row in found.costs.rows}


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_a_damaged_file_of_a_codec_is_named(damage: str, fitted_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fitted_bundle, tmp_path / "copy"))
    (file,) = (folder / "codecs").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "missing":
        file.unlink()
    said = {"flipped": "has not the SHA-256", "short": "must have .* bytes; got", "missing": "lacks its file"}[damage]
    with pytest.raises(ts.BundleError, match=said) as raised:
        edge.open(folder)
    assert f"codecs/{file.name}" in str(raised.value)


def sealed(folder: Path, **changes: Any) -> Path:
    """Write the sizes and digests of a bundle's files into its manifest, as somebody would who has edited them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"size_bytes": path.stat().st_size, "sha256": digest_of(path)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return folder


def test_a_file_that_holds_another_codec_is_refused(other: FittedCodec, fitted_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fitted_bundle, tmp_path / "copy"))
    (file,) = (folder / "codecs").iterdir()
    other.save(file)
    with pytest.raises(ts.BundleError, match=rf"must be fitted:edge-\w+, fitted to .*; it is '{other.name}'"):
        edge.open(sealed(folder))
    file.write_bytes(b"something else")
    with pytest.raises(ts.BundleError, match="the bundle's codec cannot be read"):
        edge.open(sealed(folder))
    held = [{"name": "fitted:x-1", "file": "codecs/none.fitted", "student": None}]
    with pytest.raises(ts.BundleError, match=r"does not list the file 'codecs/none\.fitted' that it uses"):
        edge.open(sealed(folder, codecs=held))


# --- with a server ---

_SLOW = ts.Link("slow", 1e5, 1e9, 1e-3)


def test_the_answer_comes_from_what_was_encoded(fitted: FittedCodec, fitted_bundle: Path, serves: Any) -> None:
    sizes = []
    with serves(fitted) as server:
        for rate in (0.5, 1, 3):
            name = fitted.at(rate).name
            with edge.open(fitted_bundle, server.url, partition="act", codec=name, fallback="error") as model:
                assert near(model(X.numpy()))
                assert near(model(torch.cat(pictures(3, 4)).numpy()), torch.cat(pictures(3, 4)))
            assert (last(model).codec, last(model).server, last(model).degraded) == (name, server.url, None)
            sizes.append(last(model).sent_bytes)
    assert sizes == sorted(sizes)


def test_a_codec_is_chosen_only_where_the_server_has_it(
    fitted: FittedCodec, other: FittedCodec, tmp_path: Path, serves: Any
) -> None:
    costs = {**COSTS, "device": flat_profile(GRAPH, 0.1)}
    table, inputs = table_of(GRAPH, "act", [fitted.at(1).name]), pictures(1, 2)
    export_bundle(GRAPH, tmp_path / "bundle", points=["act"], codecs=table, fitted=[fitted], inputs=inputs, **costs)
    for has, codec in (((fitted,), fitted.at(1).name), ((), None), ((other,), None)):
        with (
            serves(*has) as server,
            edge.open(tmp_path / "bundle", server.url, link=_SLOW) as model,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            assert near(model(X.numpy()))
            # Without the codec, the raw tensor takes longer over this link than the last layer on the device.
            assert (last(model).codec, last(model).server) == (codec, codec and server.url)


def test_a_server_without_the_file_gets_another_codec_said_once(
    fitted: FittedCodec, other: FittedCodec, fitted_bundle: Path, serves: Any
) -> None:
    for has in ((), (other,)):
        name = fitted.at(1).name
        with (
            serves(*has) as server,
            edge.open(fitted_bundle, server.url, partition="act", codec=name, fallback="error") as model,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            assert near(model(X.numpy()))
            assert near(model(X.numpy()))
        (warning,) = said
        assert warning.category is MissingCodecWarning
        assert warning.filename == __file__
        assert (
            f"does not have the codec {name}, so int8 is used in its place; start the server with --codec net=FILE"
            in (str(warning.message))
        )
        assert last(model).codec == "int8"


def test_a_codec_whose_package_is_missing_takes_no_other_ones_place(
    fitted: FittedCodec, tmp_path: Path, serves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(GRAPH, "act", ["int8+zstd", "int8", fitted.at(1).name])
    export_bundle(GRAPH, tmp_path / "bundle", points=["act"], codecs=table, fitted=[fitted], **COSTS)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else find_spec(name))
    find_codec.cache_clear()
    ways: dict[str, Any] = {"partition": "act", "codec": fitted.at(1).name, "fallback": "error"}
    with serves() as server, edge.open(tmp_path / "bundle", server.url, **ways) as model:
        with pytest.warns(MissingCodecWarning, match="so int8 is used in its place"):
            assert near(model(X.numpy()))
        assert last(model).codec == "int8"
    find_codec.cache_clear()


def test_a_server_that_was_started_anew_without_the_file_is_noticed(
    fitted: FittedCodec, fitted_bundle: Path, serves: Any
) -> None:
    with serves(fitted) as server:
        port = server.port
        model = edge.open(fitted_bundle, server.url, partition="act", codec=fitted.at(1).name)
        assert near(model(X.numpy()))
        assert last(model).codec == fitted.at(1).name
    with model, serves(port=port), warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingCodecWarning)
        end_s = time.monotonic() + PATIENCE_S
        # It refuses what is encoded so, and is asked again after a while, with a handshake.
        while last(model).codec != "int8":
            assert time.monotonic() < end_s, model.last
            assert near(model(X.numpy()))
            time.sleep(0.05)


def test_rates_and_codecs_that_the_bundle_does_not_have_are_refused(fitted: FittedCodec, fitted_bundle: Path) -> None:
    with pytest.raises(ts.CodecError, match=rf"the rate of {fitted.name} must be from"):
        edge.open(fitted_bundle, codec=f"{fitted.name}@100")
    with pytest.raises(ts.CodecError, match=rf"the rate of {fitted.name} must be from"):
        edge.open(fitted_bundle, codec=fitted.name)
    with pytest.raises(ts.CodecError, match=rf"holds the fitted codecs {fitted.name}; got 'fitted:mine-01234567'"):
        edge.open(fitted_bundle, codec="fitted:mine-01234567@1")


_ALONE = (
    WITHOUT_TORCH
    + """
import numpy as np
from torchsurgeon import edge

folder, url, given, codec, found = sys.argv[1:]
with edge.open(folder, url, partition="act", codec=codec, fallback="error") as model:
    np.save(found, model(np.load(given)))
    assert (model.last.server, model.last.codec) == (url, codec), model.last
"""
)


def test_no_pytorch_is_imported(fitted: FittedCodec, fitted_bundle: Path, serves: Any, tmp_path: Path) -> None:
    given_, found = tmp_path / "x.npy", tmp_path / "found.npy"
    np.save(given_, X.numpy())
    with serves(fitted) as server:
        arguments = [str(fitted_bundle), server.url, str(given_), fitted.at(2).name, str(found)]
        command = [sys.executable, "-c", _ALONE, *arguments]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert near(np.load(found))


# --- students ---


@pytest.fixture(scope="module")
def student() -> FittedCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 5),
        ).eval()  # fmt: skip
    graph = ts.trace(wide, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ts.distill(graph, "5", pictures(16, 1), share=0.2, training_s=1, name="small")
    made.traced = graph  # type: ignore[attr-defined]
    return made


def test_a_student_is_a_head_of_its_own(student: FittedCodec, serves: Any, tmp_path: Path) -> None:
    graph: ts.LayerGraph = student.traced  # type: ignore[attr-defined]
    costs = {"device": flat_profile(graph, DEVICE_S), "server": flat_profile(graph, SERVER_S)}
    name = student.at(student.rates[len(student.rates) // 2]).name
    table = table_of(graph, "5", [name], head_share=0.1)
    written = export_bundle(
        graph, tmp_path / "bundle", points=["5"], codecs=table, fitted=[student], inputs=pictures(1, 2), **costs
    )
    assert written.left_out == ()
    (held,) = edge.read(tmp_path / "bundle").codecs
    assert held.student is not None
    assert held.student.file.startswith("students/small-")
    x = pictures(1, 8)[0]
    assert student.student is not None
    with torch.no_grad():
        own = graph.model(x).numpy()
        (crossing,) = student.student.module(graph, graph.point("5").index)(x)
        rated = student.at(name.partition("@")[2])
        sent = rated.encode(crossing, "5")
        decoded = rated.decode(sent.data, crossing.dtype, crossing.shape, sent.order, max_bytes=crossing.nbytes)
        expected = ts.cut(graph, "5").tail(decoded).numpy()
    assert not np.allclose(own, expected, atol=1e-5)
    for options in ({"link": _SLOW}, {"partition": "5", "codec": name}):
        with (
            serves(student, model=graph.model, x=X) as server,
            edge.open(tmp_path / "bundle", server.url, **options) as model,
        ):
            assert np.allclose(model(x.numpy()), expected, atol=0.02 * np.abs(own).max())
            assert (last(model).codec, last(model).server) == (name, server.url)
        # When the server is gone, the whole model answers.
        assert np.allclose(model(x.numpy()), own, atol=1e-4)
        assert last(model).server is None
    with (
        serves(model=graph.model, x=X) as server,
        edge.open(tmp_path / "bundle", server.url, partition="5", codec=name, fallback="error") as model,
    ):
        # A server without the codec gets what the model's own layers compute.
        with pytest.warns(MissingCodecWarning, match="so zstd is used in its place"):
            found = model(x.numpy())
        assert np.allclose(found, own, atol=1e-4)
