"""What the pages tell a reader to type works as it stands there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pages import PAGES, Block, blocks, commands, run, spans
from paths import ROOT, environment

from torchsurgeon import cli

pytest.importorskip("torchvision")

LIMIT_S = 240.0
ADDRESS = "http://127.0.0.1:8000"
HTTPS = "https://192.168.0.2:8000"


def address_in(server: subprocess.Popen[str]) -> str:
    """The address that a started server says it is ready at."""
    assert server.stdout is not None
    ready = (re.match(r"ready: .* at (https?://.*)\n", line) for line in server.stdout)
    return next(found[1] for found in ready if found)


@pytest.fixture(scope="module")
def address_of() -> Iterator[Callable[[str], str]]:
    """The address of the server that a command on a page starts, here at a free port; one for each command."""
    with ExitStack() as stack:
        addresses: dict[str, str] = {}

        def start(command: str) -> str:
            if command not in addresses:
                arguments = [sys.executable, "-m", *command.split(), "--port", "0", "--threads", "1"]
                server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment())
                stack.enter_context(server)
                stack.callback(server.terminate)
                addresses[command] = address_in(server)
            return addresses[command]

        yield start


@pytest.mark.parametrize("block", [block for block in blocks("python") if HTTPS not in block.text], ids=str)
def test_python_runs_alone_as_pasted(block: Block, tmp_path: Path, address_of: Callable[[str], str]) -> None:
    text = block.text
    if ADDRESS in text:
        serve = re.search(r"torchsurgeon serve [^`\n]*", block.page.read_text())
        assert serve is not None, f"{block.page.name} does not say how its server is started"
        text = text.replace(ADDRESS, address_of(serve[0]))
    status, printed = run(text, tmp_path, LIMIT_S)
    assert status == 0, f"{block} ended with {status}:\n{printed}"


def test_the_commands_for_a_token_and_a_certificate_serve_the_program_below_them(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl: apt-get install openssl")
    (program,) = (block.text for block in blocks("python") if HTTPS in block.text)
    # Where the token or the certificate is not taken, it raises instead of answering on the device.
    program = program.replace('ca="cert.pem"', 'ca="cert.pem", fallback="error", timeout_s=60')
    (typed,) = (block.text for block in blocks("bash") if "--tls-cert cert.pem" in block.text)
    made, serve = typed.replace("\\\n", " ").replace("192.168.0.2", "127.0.0.1").split("torchsurgeon serve ")
    subprocess.run(["bash", "-e", "-c", made], cwd=tmp_path, check=True, capture_output=True)
    words = [*shlex.split(serve.replace("0.0.0.0", "127.0.0.1")), "--port", "0", "--threads", "1"]
    command = [sys.executable, "-m", "torchsurgeon", "serve", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            address = address_in(server)
            assert address.startswith("https://")
            status, printed = run(program.replace(HTTPS, address), tmp_path, LIMIT_S)
        finally:
            server.terminate()
    assert status == 0, printed
    assert "'usable': True" in printed


def test_blocks_say_what_they_are() -> None:
    """A block that names no language would be tested neither as Python nor as commands.

    Those of TOML are read in tests/serve/test_configuration.py.
    """
    said = {block.language for block in blocks()}
    assert said <= {"python", "bash", "csv", "http", "text", "toml"}


def typed() -> list[tuple[str, str, list[str]]]:
    """Where a command stands, its program and its arguments, for all on the pages; in running text only ours."""
    found = [(str(block), words) for block in blocks("bash") for words in commands(block)]
    for page, span in spans():
        if re.match(r"torchsurgeon [a-z]+ |python (-m )?(benchmarks|docs|examples)", span):
            found.append((page.relative_to(ROOT).as_posix(), span.split()))
    return [(where, words[0], words[1:]) for where, words in found]


@pytest.mark.parametrize(
    ("where", "arguments"),
    [(where, arguments) for where, program, arguments in typed() if program == "torchsurgeon"],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_parser_takes_the_command(where: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status: object
    try:
        status = cli.main(arguments) if is_cheap(arguments) else bool(cli.parser().parse_args(arguments)) - 1
    except SystemExit as ended:
        status = ended.code
    assert status == 0, f"{where}: {capsys.readouterr().err}"


def is_cheap(arguments: list[str]) -> bool:
    """Whether a command neither waits nor writes, and needs no server and nothing of the reader's."""
    command, *rest = arguments
    return command == "--version" or (command in ("trace", "doctor") and rest[0].startswith("torchvision:"))


def test_other_commands_name_what_there_is() -> None:
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for where, program, arguments in typed():
        said = f"{where}: {program} {' '.join(arguments)}"
        if program == "make":
            targets = [target for target in arguments if "=" not in target]
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), said
        elif program == "python" and arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]) is not None, said
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), said
        elif program == "pip":
            extras = [extra for found in re.findall(r"\[([\w,]+)\]", " ".join(arguments)) for extra in found.split(",")]
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras), said


def test_pages_link_what_there_is() -> None:
    """mkdocs checks docs/ as a site; this checks every page where it lies, for readers of the repository."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links {link}"


def test_links_into_a_page_name_one_of_its_headings() -> None:
    """mkdocs checks this for docs/; the README and other pages beside it are not a part of the site's navigation."""
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#\s:]+\.md)#([^)\s]+)\)", page.read_text()):
            text = re.sub(r"```.*?```", "", (page.parent / link).read_text(), flags=re.DOTALL)
            headings = [
                re.sub(r"[^\w\s-]", "", heading).strip() for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE)
            ]
            known = {re.sub(r"\s+", "-", heading.lower()) for heading in headings}
            assert anchor in known, f"{page.relative_to(ROOT)} links {link}#{anchor}"
