"""The configuration file of ``torchsurgeon serve``, and ``--check``."""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import Block, blocks

from torchsurgeon import cli, serve
from torchsurgeon.errors import ServerError

TOKEN = "a-token-0123456789"
WHOLE = """
host = "0.0.0.0"
port = 8123
seed = 3
threads = 2
max-batch = 16
concurrency = 4
batching = true
exact = true
max-queue = 9
max-connections = 99
max-connections-per-address = 9
grace-s = 2.5
token-file = "tokens.txt"
insecure = true
max-priority = "high"
tls-cert = "cert.pem"
tls-key = "key.pem"
tls-client-ca = "ca.pem"
log-format = "json"
access-log = true
metrics = true
allow-load = true
page = false
no-verify = true
ray = true
replicas = 2
max-replicas = 4
ongoing = 3
cpus = 2.5
gpus = 0.25
models-per-replica = 5

[models]
short = "factories:small"

[models.long]
spec = "factories:nested"
weights = "long.safetensors"
input = "x:float32[1,4]"
leaf = ["0", "1"]
codec = "long.fitted"
backend = "onnxruntime"
backend-sample = "photos"
backend-limits = "max-top1-change=0.01,min-cosine=0.99"
"""


def parsed(path: Path, text: str, arguments: Sequence[str] = ()) -> argparse.Namespace:
    """The options of ``torchsurgeon serve`` with a file of this text and more arguments."""
    path.write_text(text)
    return cli.parser().parse_args(["serve", "--config", str(path), *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.toml"


def test_a_file_has_all_options_and_the_models(file: Path) -> None:
    options = parsed(file, WHOLE)
    assert options.file_models == {"short": "factories:small", "long": "factories:nested"}
    expected: dict[str, Any] = {
        "host": "0.0.0.0", "port": 8123, "seed": 3, "threads": 2, "max_batch": 16, "concurrency": 4, "batching": True,
        "exact": True, "max_queue": 9, "max_connections": 99, "max_connections_per_address": 9, "grace_s": 2.5,
        "token_file": "tokens.txt", "insecure": True, "max_priority": "high", "tls_cert": "cert.pem",
        "tls_key": "key.pem", "tls_client_ca": "ca.pem", "log_format": "json", "access_log": True, "metrics": True,
        "allow_load": True,
        "page": False, "verify": False, "weights": ["long=long.safetensors"], "input": ["long=x:float32[1,4]"],
        "leaf": ["long=0", "long=1"], "codec": ["long=long.fitted"], "backend": ["long=onnxruntime"],
        "backend_sample": ["long=photos"], "backend_limits": ["long=max-top1-change=0.01,min-cosine=0.99"],
        "ray": True, "replicas": 2, "max_replicas": 4, "ongoing": 3, "cpus": 2.5, "gpus": 0.25, "models_per_replica": 5,
    }  # fmt: skip
    found = {name: getattr(options, name) for name in expected}
    assert found == expected
    # Every option can stand in a file: one that is added to the command line has to be added here.
    assert set(vars(options)) - set(expected) == {"run", "models", "file_models", "config", "check"}


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_a_file_on_a_page_is_valid(file: Path, block: Block) -> None:
    assert parsed(file, block.text).file_models


def test_the_command_line_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(serve, "run", lambda *given, **options: asked.append((given, options)))
    left_out = ("threads", "token-file", "tls-", "backend-")
    file.write_text("".join(line for line in WHOLE.splitlines(True) if not line.startswith(left_out)))
    more = ["third=factories:small", "long=factories:tiny", "--port", "8000", "--no-metrics", "--no-exact"]
    more += ["--weights", "long=other.pt", "--leaf", "long=2", "--log-format=text", "--no-ray"]
    assert cli.main(["serve", *more, "--config", str(file)]) == 0
    ((models, host, port), options) = asked[0]
    assert models == {"short": "factories:small", "long": "factories:tiny", "third": "factories:small"}
    assert (host, port) == ("0.0.0.0", 8000)
    assert (options["metrics"], options["batching"], options["log_format"]) == (False, "rounded", "text")
    assert options["weights"] == {"long": "other.pt"}
    assert options["leaf_modules"] == {"long": ["0", "1", "2"]}
    assert options["allow_load"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_btach = 3", r"unknown key max_btach; did you mean max-batch\?"),
        ("max_batch = 3", r"unknown key max_batch; did you mean max-batch\?"),
        ("[model]", r"unknown key model; did you mean models\?"),
        ("[models.net]\nwieghts = 'a'", r"unknown key models.net.wieghts; did you mean models.net.weights\?"),
        ("no-batching = true", r"unknown key no-batching; did you mean batching\?"),
        ("config = 'x'", "unknown key config"),
        ("qwertyuiop = 1", "unknown key qwertyuiop; there are access-log, allow-load"),
        ("port = '8000'", "port in .* must be a number; got '8000'"),
        ("port = true", "port in .* must be a number; got True"),
        ("port = 70000", "port in .* must be a port number from 0 to 65535; got '70000'"),
        ("max-batch = 0", "max-batch in .* must be a whole number from 1 on; got '0'"),
        ("max-batch = 1.5", "max-batch in .* must be a whole number"),
        ("grace-s = inf", "grace-s in .* must be a finite number"),
        ("host = 7", "host in .* must be a text; got 7"),
        ("metrics = 1", "metrics in .* must be true or false; got 1"),
        ("log-format = 'xml'", "log-format in .* must be one of text, json; got 'xml'"),
        ("models = 3", r"models in .* must be a table, as \[models\] begins one; got 3"),
        ("models.net = 3", "models.net in .* must be a table"),
        ("models.net.spec = 3", "models.net.spec in .* must be a text; got 3"),
        ("models.net.spec = ['a']", "models.net.spec in .* must be a text"),
        ("models.net.leaf = [1]", "models.net.leaf in .* must be a text, or a list of texts"),
        ("a = ", "is not valid TOML"),
        ("port = 1\nport = 2", "is not valid TOML"),
    ],
)
def test_a_file_that_is_not_valid_is_refused_with_the_key_the_rule_and_the_nearest_key(
    file: Path, text: str, message: str
) -> None:
    with pytest.raises(ServerError, match=message):
        parsed(file, text)


def test_a_file_that_cannot_be_read_is_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--config", str(tmp_path / "absent.toml")]) == 2
    assert "absent.toml' cannot be read" in capsys.readouterr().err
    with pytest.raises(ServerError, match="--config takes one file; it is given 2 times"):
        parsed(file, "", ["--config", "other"])
    file.write_text("")
    assert cli.main(["serve", "--config", str(file)]) == 2
    assert "name at least one model as NAME=SPEC" in capsys.readouterr().err


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    status = cli.main(["serve", "--check", *arguments])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


@pytest.mark.filterwarnings("error")
def test_check_says_what_would_be_served(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    file.write_text("[models]\nnet = 'factories:small'\n")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = str(other.getsockname()[1])
        status, said, wrong = checked(capsys, "--config", str(file), "--port", port, "--metrics", "--allow-load")
    assert (status, wrong) == (0, "")
    assert said[0] == f"would listen on http://127.0.0.1:{port}"
    assert said[1] == "clients need no token: everyone on this machine is let in"
    assert said[2] == f"another process listens on port {port} now; it has to end first"
    assert "a request has at most 64 samples; 256 of one model may wait;" in said[3]
    assert "at most 512 connections, 256 of them from one address" in said[4]
    assert said[5] == (
        "while requests wait, each address has an equal share; clients may ask for priorities up to normal"
    )
    assert said[6] == "also: a page at /, /metrics, clients may load and unload models"
    assert said[7].startswith("loaded net from factories:small in ")
    assert said[8].startswith("requests of net have at most ")
    assert said[9] == "this server can be started once its port is free: net"
    tokens.write_text(f"{TOKEN} name=door priority=high\n")
    status, said, wrong = checked(capsys, "net=factories:small", "--host", "0.0.0.0", "--token-file", str(tokens))
    assert (status, wrong) == (0, "")
    assert said[1] == f"clients need one of the 1 tokens in {tokens}"
    assert "each token has an equal share; clients may ask for priorities up to normal" in said[4]
    assert said[5] == "clients with the token door may ask for priorities up to high"
    assert said[-1] == "this server can be started: net"
    assert TOKEN not in "".join(said)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of eight small pictures."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(8):
        pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    return folder


def test_a_file_gives_a_backend_in_whole_numbers_its_sample_and_its_limits(
    file: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(
        "[models.net]\nspec = 'factories:tiny'\nbackend = 'onnxruntime:int8'\n"
        f"backend-sample = '{photos}'\nbackend-limits = 'max-top1-change=0.25,decide-by=estimate'\n"
    )
    status, said, wrong = checked(capsys, "--config", str(file), "--port", "0")
    assert (status, wrong) == (0, "")
    assert said[-2].endswith(
        "tails run by onnxruntime:int8 where it keeps the budget (at most 25.00% of predictions change; in the sample "
        "itself)"
    )


_INT8 = ("--backend", "net=onnxruntime:int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*_INT8], "missing: sample and budget"),
        ([*_INT8, "--backend-sample", "net=PHOTOS"], "missing: budget"),
        (["--backend-sample", "net=PHOTOS"], "'net' has none; give --backend net=NAME"),
        (["--backend-limits", "other=min-cosine=0.9"], "take the name of a served model; got 'other'"),
        (
            [*_INT8, "--backend-sample", "net=absent", "--backend-limits", "net=min-cosine=1"],
            "--backend-sample must be a folder of images; there is no folder 'absent'",
        ),
        (
            [*_INT8, "--backend-sample", "net=PHOTOS", "--backend-limits", "net=min-cos=1"],
            "did you mean min-cosine?",
        ),
        (
            [*_INT8, "--backend-sample", "net=PHOTOS", "--backend-limits", "net=max-top1-change=0.01"],
            "299 calls are needed",
        ),
    ],
)
def test_check_says_what_is_wrong_with_the_sample_of_a_backend(
    arguments: list[str], message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one.replace("PHOTOS", str(photos)) for one in arguments]
    status, said, wrong = checked(capsys, "net=factories:tiny", "--port", "0", *given)
    assert status == 2
    assert message in wrong
    assert not any(line.startswith("this server can be started") for line in said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net=factories:absent"], "factories"),
        (["net=factories:small", "--weights", "net=absent.pt"], "absent.pt"),
        (["net=factories:small", "--token-file", "absent"], "the tokens in absent cannot be read"),
        (["net=factories:small", "--tls-cert", "absent"], "the certificates in 'absent' cannot be used"),
        (["net=factories:small", "--host", "203.0.113.1", "--insecure"], "cannot listen on 203.0.113.1"),
        (["net=factories:small", "--host", "0.0.0.0"], "needs a token"),
        (["net=factories:small", "--backend", "net=absent"], "absent"),
    ],
)
@pytest.mark.filterwarnings("ignore:listening on")
def test_check_ends_with_the_error_that_the_server_would_end_with(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, wrong = checked(capsys, *arguments)
    assert status == 2
    assert message in wrong
    assert not any(line.startswith("this server can be started") for line in said)
