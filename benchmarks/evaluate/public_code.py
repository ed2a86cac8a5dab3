"""Run public code that divides networks between two machines, over emulated links, for its own figures.

The code is not part of this repository. It is run as it is, from clones in one folder:

- ``Neurosurgeon`` of github.com/Tjyy-1223/Neurosurgeon: ``cloud_api.py`` and ``edge_api.py``;
- ``ParetoPipe`` of github.com/cloudsyslab/ParetoPipe: ``custom_implementation/partition1.py`` and ``partition2.py``.

The side of the device runs as ``benchmarks.support.slow_script`` says. What the two need beside PyTorch has to be
importable (speedtest-cli, apscheduler, xlrd, xlwt, xlutils, pandas, scikit-learn; psutil).

    python -m benchmarks.evaluate.public_code CLONES   # results/evaluation/public-code.json, about eight minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.evaluate.study import LINKS, SLOWER
from benchmarks.support import result_file, tail_process
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import PRESETS, Link

OUT = result_file.RESULTS / "evaluation" / "public-code.json"
CHAINS = {"alex_net": "AlexNet", "mobile_net": "MobileNetV2"}
"""Networks of Neurosurgeon's chains, as it calls them."""
SPLITS = {"AlexNet": 6, "MobileNetV2": 14}
"""Networks of ParetoPipe, and after how many of its blocks they are cut."""
_SERVER = "127.0.0.2"
_CALL_PORT, _RATE_PORT, _PUSH_PORT = 9999, 9922, 5555
_PROBE_BYTES = 602_541
_PATIENCE_S = 400.0
_SILENT_S = 120.0
"""After so long without a line of output a script is ended."""
_PACKAGES = ("torch", "torchvision", "scikit-learn", "joblib", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="a folder with the clones Neurosurgeon and ParetoPipe")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=LINKS)
    parser.add_argument("--commits", nargs=2, required=True, metavar="COMMIT", help="of Neurosurgeon and of ParetoPipe")
    options = parser.parse_args()
    search, push = options.clones / "Neurosurgeon", options.clones / "ParetoPipe" / "custom_implementation"
    found: dict[str, Any] = {
        "commits": dict(zip(("Neurosurgeon", "ParetoPipe"), options.commits, strict=True)),
        "Neurosurgeon": {},
        "ParetoPipe": {},
    }
    for link in options.links:
        for chain, name in CHAINS.items():
            row = found["Neurosurgeon"].setdefault(name, {})[link] = searched(search, chain, PRESETS[link])
            print(name, link, row, flush=True)
        for name, index in SPLITS.items():
            row = found["ParetoPipe"].setdefault(name, {})[link] = pushed(push, name, index, PRESETS[link])
            print(name, link, row, flush=True)
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    result_file.write(OUT, found, packages=packages)


def searched(folder: Path, chain: str, link: Link) -> dict[str, Any]:
    """Return what one request of Neurosurgeon's code takes, by what it prints."""
    with ExitStack() as stack:
        for port in (_CALL_PORT, _RATE_PORT):
            stack.enter_context(LinkEmulator(port, _SERVER, port, link))
        own, other = tail_process.two_cores()
        cloud = ("-i", _SERVER, "-p", str(_CALL_PORT), "-d", "cpu")
        stack.enter_context(_running(1.0, other, folder / "cloud_api.py", cloud, 0.0))
        _await(_RATE_PORT)
        edge = ("-i", "127.0.0.1", "-p", str(_CALL_PORT), "-d", "cpu", "-t", chain)
        lines = list(
            _lines(stack.enter_context(_running(SLOWER, own, folder / "edge_api.py", edge, link.round_trip_s)))
        )
    at_s = {key: _stamp(lines, key) for key in ("get bandwidth value", "best latency", "Inference Finished")}
    text = "\n".join(line for _, line in lines)
    rate = _number(r"get bandwidth value : ([\d.]+)", text)
    parts = [float(value) / 1e3 for value in re.findall(r"- ([\d.]+) ms", text)]
    head_s, crossing_s, tail_s = parts
    return {
        "probe_s": round(_PROBE_BYTES / (rate * 1024 * 1024), 4),
        "search_s": round(at_s["best latency"] - at_s["get bandwidth value"], 4),
        "cut": re.findall(r"best partition point : (\d+)", text)[0],
        "head_s": head_s,
        "crossing_s": crossing_s,
        "tail_s": tail_s,
        "latency_s": round(sum(parts), 4),
        "request_s": round(at_s["Inference Finished"] - at_s["get bandwidth value"], 4),
    }


def pushed(folder: Path, name: str, index: int, link: Link) -> dict[str, Any]:
    """Return what ParetoPipe's two scripts measure of a cut, in batches of eight."""
    # Its receiver, which is the server here, connects to the device, so that the uplink is the connection's downlink.
    turned = dataclasses.replace(link, uplink_bit_s=link.downlink_bit_s, downlink_bit_s=link.uplink_bit_s)
    own, other = tail_process.two_cores()
    with ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(LinkEmulator(_PUSH_PORT, _SERVER, _PUSH_PORT, turned))
        first = ("--model-name", name, "--split-index", str(index))
        stack.enter_context(_running(SLOWER, own, folder / "partition1.py", first, 0.0))
        _await(_PUSH_PORT)
        second = (*first, "--host", "127.0.0.1", "--output-dir", out)
        for _ in _lines(stack.enter_context(_running(1.0, other, folder / "partition2.py", second, link.round_trip_s))):
            pass
        measured = json.loads(Path(out, f"{name}_split_{index}_metrics.json").read_text())
    mean = measured["average_metrics_per_batch"]
    return {
        "cut": str(index),
        "batch_latency_s": round(mean["end_to_end_latency_s"], 4),
        "batch_head_s": round(mean["part1_inference_time_s"], 4),
        "batch_tail_s": round(mean["part2_inference_time_s"], 4),
        "frames_s": round(measured["system_inference_throughput_imgs_per_s"], 4),
        "bytes_per_frame": round(mean["intermediate_data_size_bytes"] / 8),
    }


@contextmanager
def _running(
    factor: float, core: int | None, script: Path, arguments: Sequence[str], round_trip_s: float
) -> Iterator[subprocess.Popen[str]]:
    """Run a script on a core, so many times as slow, with connections that take a round trip; kill it at the end."""
    where = "any" if core is None else str(core)
    slowed = ("benchmarks.support.slow_script", str(factor), where, _SERVER, str(round_trip_s), str(script))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *slowed, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        # With its children, which would go on listening on its ports, and take the connections of the next run.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(process: subprocess.Popen[str]) -> Iterator[tuple[float, str]]:
    """Yield what a process prints, with the time of each line; kill it once it has printed nothing for long."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(_SILENT_S, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            return
        yield time.perf_counter(), line.rstrip()


def _await(port: int) -> None:
    """Wait until the server's side listens, without connecting to it, since it serves one connection only."""
    # 0A is a socket that listens. Connections of the run before have the same address for a minute.
    wanted = f"{socket.inet_aton(_SERVER)[::-1].hex().upper()}:{port:04X} 00000000:0000 0A"
    end_s = time.monotonic() + _PATIENCE_S
    while wanted not in Path("/proc/net/tcp").read_text():
        if time.monotonic() > end_s:
            raise TimeoutError(f"nothing listens on {_SERVER}:{port} after {_PATIENCE_S:g} s")
        time.sleep(0.1)


def _stamp(lines: Sequence[tuple[float, str]], key: str) -> float:
    for when, line in lines:
        if key in line:
            return when
    raise RuntimeError(f"the script has ended without {key!r}, or was ended after {_SILENT_S:g} s without a line")


def _number(pattern: str, text: str) -> float:
    return float(re.findall(pattern, text)[0])


if __name__ == "__main__":
    main()
