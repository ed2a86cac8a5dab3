"""The command line under careless users, missing extras, closed pipes and signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import environment

from torchsurgeon import cli


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("serve net=factories:small --port 99999", "0 to 65535"),
        ("serve net=factories:small --port -1", "-1"),
        ("serve net=factories:small --threads 0", "from 1 to 1024"),
        ("serve net=factories:small --max-batch 0", "from 1 on"),
        ("serve net=factories:small --weights other=x.pt", "'other'"),
        ("serve net=factories:small --input other=x:float32[1,4]", "'other'"),
        ("serve net=factories:small --leaf other=0", "'other'"),
        ("serve net=factories:small --leaf 0", "--leaf must be NAME=MODULE"),
        ("serve net=factories:small --port 0 --leaf net=9", "'9'"),
        ("link --listen 0 --to 127.0.0.1:99999 --profile lte", "1 to 65535"),
        ("link --listen 0 --to ²:² --profile lte", "HOST:PORT"),
        ("link --listen 70000 --to 127.0.0.1:80 --profile lte", "0 to 65535"),
        ("demo --repeats 0", "from 1 on"),
        ("demo --slow 0.5", "0.5"),
        ("demo --slow nan", "nan"),
        ("demo --out /dev/null", "/dev/null"),
        ("profile factories:small --no-energy --threads -3", "from 1 to 1024"),
        ("profile factories:small --no-energy --threads 100000000", "from 1 to 1024; got '100000000'"),
    ],
)
def test_a_number_or_a_name_that_cannot_be_is_told_at_once(
    arguments: str, reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments.split())
    except SystemExit as stop:
        status = int(str(stop.code))
    said = capsys.readouterr().err
    assert status == 2
    assert "torchsurgeon" in said
    assert reason in said
    assert "Traceback" not in said


_EDGE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {"rich", "matplotlib", "starlette", "uvicorn", "httptools", "torchvision", "PIL", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)
sys.meta_path.insert(0, Missing())
import torch, torchsurgeon as ts
from torchsurgeon import cli
from torch import nn
import warnings
# The machine may be busy with other tests.
warnings.simplefilter("ignore", ts.NoisyProfileWarning)
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
with ts.SplitModule(model, torch.ones(1, 4), partition="device") as split:
    assert torch.equal(split(torch.ones(2, 4)), model(torch.ones(2, 4)))
warnings.simplefilter("ignore", ts.NoServerWarning)
split = ts.SplitModule(model, torch.ones(1, 4), server="http://127.0.0.1:9", timeout_s=1)
assert torch.equal(split(torch.ones(1, 4)), model(torch.ones(1, 4)))
for line in ("trace SPEC --json", "trace SPEC", "serve m=SPEC", "demo", "trace torchvision:alexnet"):
    print(cli.main(line.replace("SPEC", "test_faults_factory:make").split()), file=sys.stderr)
"""


def test_an_edge_install_works_without_the_extras_and_names_the_missing_one(tmp_path: Path) -> None:
    factory = "import torch\ndef make(): return torch.nn.Linear(2, 2), torch.ones(1, 2)\n"
    (tmp_path / "test_faults_factory.py").write_text(factory)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _EDGE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "torchsurgeon.graph/1"
    said = done.stderr.splitlines()
    assert said[0] == "0"
    assert [line for line in said if line == "2"] == ["2"] * 4
    assert "needs rich: pip install 'torchsurgeon[cli]'" in said[1]
    assert "pip install 'torchsurgeon[server]'" in said[3]
    assert "pip install 'torchsurgeon[cli]'" in said[5]
    assert "torchsurgeon[vision]" in said[7]


def test_output_that_nobody_reads_or_cannot_show_is_no_traceback() -> None:
    command = [sys.executable, "-m", "torchsurgeon", "trace", "factories:small"]
    options = environment(COLUMNS="60")
    shown = subprocess.run(
        command, capture_output=True, timeout=60, check=False, env={**options, "PYTHONIOENCODING": "ascii"}
    )
    assert shown.returncode == 0, shown.stderr
    assert b"ReLU" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 60
    for more in ([], ["--json"]):
        unread = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=options)
        assert unread.stdout is not None
        unread.stdout.close()
        assert unread.wait(60) == 128 + signal.SIGPIPE
        assert unread.stderr is not None
        assert b"Traceback" not in unread.stderr.read()
        unread.stderr.close()


def test_a_width_of_no_columns_is_an_unknown_one() -> None:
    command = [sys.executable, "-m", "torchsurgeon", "trace", "factories:small"]
    shown = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment(COLUMNS="0"))
    assert b"ReLU" in shown.stdout


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_ended_leaves_no_process_behind(tmp_path: Path, sent: signal.Signals) -> None:
    code = (
        # A background job of a shell is started with the signal ignored.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        # Its codecs are fitted to few photographs, so that its processes start soon.
        "from torchsurgeon import cli, demo; demo.run.__kwdefaults__['fitting'] = 8; sys.exit(cli.main(sys.argv[1:]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert child.stderr is not None
    end_s = time.monotonic() + 240
    while not (started := _children(child.pid)) and time.monotonic() < end_s:
        time.sleep(0.05)
    child.send_signal(sent)
    assert child.wait(60) == 128 + sent
    assert b"Traceback" not in child.stderr.read()
    child.stderr.close()
    assert started
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        # Others are started while packages are imported, and end soon.
        if int(fields[1]) == pid and b"-m\0torchsurgeon" in command:
            found.append(int(stat.parent.name))
    return found
