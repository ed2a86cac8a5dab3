"""How ``run`` and ``doctor`` are let in by a server that asks for a token, over HTTPS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import signed_by_itself
from tcp import reserved_port

from torchsurgeon import cli
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.tokens import Tokens

SPEC = "factories:tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate, its key, and a token."""
    made = signed_by_itself(tmp_path_factory.mktemp("access"))
    (made / "tokens.txt").write_text("# devices\ntoken-0123456789 name=one\n")
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    registry = ModelRegistry()
    registry.load("tiny", SPEC)
    app = create_app(registry)
    app.tokens = Tokens(folder / "tokens.txt")
    with Server(app, ssl_certfile=str(folder / "cert.pem"), ssl_keyfile=str(folder / "key.pem")) as server:
        yield server.url
    registry.close()


@pytest.mark.parametrize(
    "arguments", [["run", "--count", "1", "--partition", "server", "--fallback", "error"], ["doctor"]]
)
def test_a_command_is_let_in_with_a_token_over_https(
    arguments: list[str], url: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [arguments[0], SPEC, "--server", url, "--ca", str(folder / "cert.pem"), *arguments[1:]]
    shown = ["--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem")]
    assert cli.main([*line, *shown, "--token-file", str(folder / "tokens.txt")]) == 0
    assert cli.main(line) == 2
    assert "asks for a token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--token-file absent", "the token in absent cannot be read"),
        ("--ca absent", "--ca must be a file of certificates in PEM format; there is no file 'absent'"),
        ("--tls-cert absent", "--tls-cert must be a file in PEM format; there is no file 'absent'"),
        ("--tls-cert {}/cert.pem --tls-key absent", "--tls-key must be a file in PEM format; there is no file"),
        ("--tls-cert {}/cert.pem", "holds none; give --tls-key FILE"),
        ("--tls-key {}/key.pem", "give --tls-cert FILE, too"),
    ],
)
@pytest.mark.parametrize("name", ["run", "doctor"])
def test_a_wrong_file_is_told_before_the_model_is_loaded(
    name: str, arguments: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [name, "absent:f", "--server", "https://127.0.0.1:9", *arguments.replace("{}", str(folder)).split()]
    assert cli.main(line) == 2
    assert says in capsys.readouterr().err


def test_doctor_asks_a_server_before_it_examines_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchsurgeon.models.specs.load", lambda *args, **options: pytest.fail("it was loaded"))
    with reserved_port() as port:
        assert cli.main(["doctor", SPEC, "--server", f"http://127.0.0.1:{port}"]) == 2
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "bench-server", "plan"])
def test_an_unknown_option_shows_the_usage_of_its_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"run": [SPEC, "--server", "a"], "bench-server": ["a", "b"]}
    line = [name, *given.get(name, [SPEC, "--device", "a", "--server", "b"]), "--unheard-of", "x"]
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"usage: torchsurgeon {name} ")
    assert told.endswith(f"torchsurgeon {name}: error: unrecognized arguments: --unheard-of x\n")
