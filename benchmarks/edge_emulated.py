"""Run the device part on a 64-bit ARM processor that QEMU emulates: Debian's Python, and the wheels for that processor.

A root of Debian for arm64 is unpacked into a temporary folder, beside the wheel ``torchsurgeon-edge`` with the NumPy,
ONNX Runtime and Zstandard that pip has for aarch64. In it a process opens bundles and runs them, alone and against a
server in this process. Its answers are compared with the models', and its encoded bytes with those of PyTorch here. An
emulator says nothing about speed, so no time is kept.

    apt-get install qemu-user-static mmdebstrap
    python -m benchmarks.edge_emulated        # results/edge-emulated.json; needs both package registries
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchsurgeon as ts
from benchmarks.edge import ROOT, build_wheel, exported, size_of
from benchmarks.support import networks, result_file
from torchsurgeon.codec import find_codec
from torchsurgeon.serve import ModelRegistry, Server, create_app

OUT = result_file.RESULTS / "edge-emulated.json"
PAGE = ROOT / "docs" / "edge.md"
BEGIN, END = "<!-- emulated, by benchmarks.edge_emulated -->", "<!-- end of emulated, by benchmarks.edge_emulated -->"
NETWORKS = ("mobilenet_v3_large", "resnet50")
SHARE = 0.5
_CODEC = "int8+zstd"
_PYTHON = "python3.11"
# What Debian's Python needs, and what the wheels for aarch64 take from the system.
_PACKAGES = f"{_PYTHON},{_PYTHON}-minimal,libpython3.11-stdlib,libstdc++6,libffi8,libssl3,zlib1g,libbz2-1.0,liblzma5"
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# QEMU shows programs the real machine's /proc/cpuinfo. ONNX Runtime reads there which processor it runs on, and ends
# with a segmentation fault where it finds an x86 one. This is what two Cortex-A72, as in a Raspberry Pi 4, show there.
_CPU = "cortex-a72"
_CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
_DEVICE = """
import hashlib, json, platform, sys
site, folder, url, given, point, arrays, out = sys.argv[1:]
sys.path.insert(0, site)
import numpy as np
import onnxruntime
from torchsurgeon import edge
from torchsurgeon.edge.codec import NAMES, find_codec

x, answers = np.load(given), {}
for where, partition in (("device", "device"), ("server", "server"), ("split", int(point))):
    for codec in ("raw",) if partition == "device" else ("raw", sys.argv[0]):
        with edge.open(folder, url, name="net", partition=partition, codec=codec, timeout_s=300, threads=1,
                       **({} if partition == "device" else {"fallback": "error"})) as model:
            answers[f"{where} {codec}"] = model(x)
            assert (model.last.server is None) == (partition == "device") and not model.last.degraded, model.last
np.savez(out, **answers)
encoded = {}
for name in NAMES:
    digest = hashlib.sha256()
    for array in np.load(arrays).values():
        used, data = find_codec(name).encode(array)
        digest.update(used.encode() + bytes(data))
    encoded[name] = digest.hexdigest()
print(json.dumps({"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__,
                  "onnxruntime": onnxruntime.__version__, "encoded": encoded}))
""".replace("sys.argv[0]", repr(_CODEC))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as temporary:
        folder = Path(temporary)
        root, site = system(folder / "root"), packages(folder / "site", build_wheel(folder))
        found = {
            "processor": _CPU,
            "installed_bytes": size_of(site),
            "rows": [row(name, root, site, folder) for name in options.networks],
        }
    result_file.write(options.out, found)
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, section(found))


def section(found: dict[str, Any]) -> str:
    """Return what was found for the page, as Markdown."""
    told = found["rows"][0]["told"]
    ways = list(found["rows"][0]["deviation"])
    columns = ["network, head up to", *(_WORDS[way] for way in ways), "encoded bytes as by PyTorch"]
    rows = [
        [
            f"{row['network']}, {row['point']}",
            *(f"{row['deviation'][way]:.1e}" for way in ways),
            f"{sum(row['same_bytes'].values())} of {len(row['same_bytes'])} codecs",
        ]
        for row in found["rows"]
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])
    return f"""\
On a 64-bit ARM processor ({told["machine"]}, a {found["processor"]} as in a Raspberry Pi 4) that QEMU emulates, the
wheel runs with Python {told["python"]}, NumPy {told["numpy"]} and ONNX Runtime {told["onnxruntime"]}. Installed with
all that it needs it takes {found["installed_bytes"] / 1e6:.0f} MB. Handshakes succeed, and this is how far answers are
from the model's, as a share of the largest value:

{table}

An emulator says nothing about speed. Real boards were not at hand.
"""


_WORDS = {
    "device raw": "all on the device",
    "server raw": "all on the server",
    f"server {_CODEC}": f"all on the server, `{_CODEC}`",
    "split raw": "split",
    f"split {_CODEC}": f"split, `{_CODEC}`",
}


def system(root: Path) -> Path:
    """Unpack Debian's Python for 64-bit ARM, and return the folder."""
    command = ["mmdebstrap", "--architectures=arm64", "--variant=extract", f"--include={_PACKAGES}", "bookworm"]
    subprocess.run([*command, str(root)], check=True, timeout=600, capture_output=True)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text("".join(_CPUINFO.format(number=number) for number in range(2)))
    return root


def packages(site: Path, wheel: Path) -> Path:
    """Put the wheel and what it needs on 64-bit ARM into a folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(site)]
    command += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
    command += [f"--platform={one}" for one in _PLATFORMS]
    subprocess.run([*command, f"{wheel}[zstd]"], check=True, timeout=600)
    return site


def row(name: str, root: Path, site: Path, folder: Path) -> dict[str, Any]:
    """Return what a network's bundle answers there, beside the model's answer here."""
    model, x = networks.network(name, torch.device("cpu"))
    graph = ts.trace(model, x)
    point = graph.points[round(SHARE * (len(graph.points) - 1))]
    _, bundle = exported(graph, x, ["server", point], folder / name, whole=True)
    arrays, out = folder / f"{name}.arrays.npz", folder / f"{name}.answers.npz"
    with torch.inference_mode():
        expected = model(x).numpy()
        head = [tensor.numpy() for tensor in ts.cut(graph, point).head(x)]
    # Boundary tensors as they are, in three dtypes, and values that do not fit into bytes by themselves.
    given = [one.astype(dtype) for one in (*head, x.numpy(), 1e3 * x.numpy()) for dtype in ("f2", "f4", "f8")]
    np.savez(arrays, *given)
    registry = ModelRegistry()
    try:
        registry.add("net", model, x)
        with Server(create_app(registry)) as server:
            told = run(root, [site, bundle, server.url, f"{bundle}.npy", point.index, arrays, out])
    finally:
        registry.close()
    largest = float(np.abs(expected).max())
    return {
        "network": name,
        "point": point.name,
        "deviation": {way: float(np.abs(one - expected).max()) / largest for way, one in np.load(out).items()},
        "same_bytes": {codec: digest == _encoded(codec, given) for codec, digest in told.pop("encoded").items()},
        "told": told,
    }


def _encoded(name: str, arrays: list[np.ndarray[Any, Any]]) -> str:
    """Return the digest of arrays as PyTorch's codec of this name encodes them here."""
    digest = hashlib.sha256()
    for array in arrays:
        found = find_codec(name).encode(torch.from_numpy(array.copy()))
        digest.update(found.codec.encode() + bytes(found.data))
    return digest.hexdigest()


def run(root: Path, arguments: list[Any]) -> dict[str, Any]:
    """Run the program there, and return what it prints."""
    command = ["qemu-aarch64-static", "-cpu", _CPU, "-L", str(root), str(root / "usr" / "bin" / _PYTHON), "-I", "-c"]
    ended = subprocess.run(
        [*command, _DEVICE, *map(str, arguments)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


if __name__ == "__main__":
    main()
