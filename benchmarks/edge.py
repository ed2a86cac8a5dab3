"""Weigh a device without PyTorch: its wheel, what is installed, its import, and the memory of a head, beside PyTorch.

A fresh virtual environment gets NumPy, ONNX Runtime and the wheel ``torchsurgeon-edge``. In it a process opens a bundle
that holds one head, runs it against a server in this process, and reads its own resident memory. The rival is the same
head by ``SplitModule``, in a process that has PyTorch and the whole model.

    python -m benchmarks.edge                              # results/edge.json; pip needs a package registry
    python -m benchmarks.edge --networks mobilenet_v3_large --share 0.5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchsurgeon as ts
from benchmarks.support import networks, result_file
from torchsurgeon.export import export_bundle
from torchsurgeon.serve import ModelRegistry, Server, create_app

ROOT = Path(__file__).parents[1]
OUT = result_file.RESULTS / "edge.json"
PAGE = ROOT / "docs" / "edge.md"
BEGIN, END = "<!-- figures, by benchmarks.edge -->", "<!-- end of figures, by benchmarks.edge -->"
NETWORKS = ("mobilenet_v3_large", "resnet50")
_IMPORTS = 7
# What a new virtual environment has before anything is installed.
_NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth", "__pycache__")

# Both programs print, as JSON: the bytes that the process holds without a model, with it, and after calls, and what a
# call takes. Pages of files, such as the code of ONNX Runtime and PyTorch, do not count: the system can drop them.
_READS = """
import json, statistics, sys, time

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def measured(make, x, calls=20):
    without = held()
    with make() as model:
        opened, took_s = held(), []
        for _ in range(calls):
            begin_s = time.perf_counter()
            model(x)
            took_s.append(time.perf_counter() - begin_s)
        assert model.last.sent_bytes and not model.last.degraded, model.last
        print(json.dumps({"without_bytes": without, "opened_bytes": opened, "called_bytes": held(),
                          "call_s": statistics.median(took_s)}))
"""
_DEVICE = (
    _READS
    + """
import numpy as np
from torchsurgeon import edge

smallest, small, folder, url, given, point = sys.argv[1:]
# ONNX Runtime and the way to the server, with what they make once, are there before the head is.
kept = edge.open(smallest, url, name="small", partition="server", threads=1)
kept(np.load(small))
x = np.load(given)
measured(lambda: edge.open(folder, url, partition=int(point), fallback="error", threads=1), x)
"""
)
_PYTORCH = (
    _READS
    + """
import numpy as np
import torch
import torchsurgeon as ts
from benchmarks.support import networks

name, point, url, given = sys.argv[1:]
torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.nn.Linear(1, 1)(torch.rand(1, 1))
x = torch.from_numpy(np.load(given))

def split():
    model, _ = networks.network(name, torch.device("cpu"))
    return ts.SplitModule(model, x, server=url, name="net", partition=int(point), fallback="error")

measured(split, x)
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--share", type=float, default=0.5, help="the share of the points at which each is cut")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="torchsurgeon-") as temporary:
        folder = Path(temporary)
        wheel = build_wheel(folder)
        python = environment(folder / "venv", wheel)
        found = {
            "wheel_bytes": wheel.stat().st_size,
            "installed": installed(python),
            "import_s": import_s(python, "torchsurgeon.edge"),
            "pytorch": {
                "installed": {"torch": size_of(Path(torch.__file__).parent)},
                "import_s": import_s(Path(sys.executable), "torch"),
            },
            "heads": [head(name, options.share, python, folder) for name in options.networks],
        }
    result_file.write(options.out, found)
    if options.out == OUT:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{section(found)}\n{END}{rest.partition(END)[2]}")


def section(found: dict[str, Any]) -> str:
    """Return what was measured for the page, as Markdown."""
    sizes, rival = found["installed"], found["pytorch"]
    onnxruntime, zstandard, numpy, all_of_it = (
        f"{sum(sizes.get(name, 0) for name in names) / 1e6:.0f} MB"
        for names in (("onnxruntime",), ("zstandard",), ("numpy", "numpy.libs"), ("all",))
    )
    torch_gb = rival["installed"]["torch"] / 1e9
    columns = "head of", "weights", "tensors at once", "memory, opened", "memory, after calls", "the same by PyTorch"
    rows = [[f"{row['network']}, up to {row['point']}", *map(_megabytes, _memory(row))] for row in found["heads"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])
    return f"""\
The wheel has {found["wheel_bytes"] / 1e3:.0f} kB. Installed with all that it needs it takes {all_of_it}: ONNX Runtime
{onnxruntime}, NumPy {numpy}, Zstandard {zstandard}. The folder of PyTorch alone takes {torch_gb:.1f} GB. Importing
`torchsurgeon.edge` takes {found["import_s"]:.2f} s of processor time, importing PyTorch {rival["import_s"]:.1f} s.

{table}

Memory is what a process holds beyond what it held when ONNX Runtime had run a model of two layers, and a server had
been asked; by PyTorch, beyond what it held when one layer had run. Pages of files, such as a library's code, do not
count. *Tensors at once* are the most bytes that the head's tensors take in PyTorch while it runs. By PyTorch, a device
holds the whole model. Beyond weights and tensors, a session of ONNX Runtime takes about 10 kB for each node. On
processors with AVX it also copies the weights of convolutions into blocks of 8 or 16 channels, filled up with zeros,
and those in the file count no more then.
"""


def _memory(row: dict[str, Any]) -> list[int]:
    ours, theirs = row["edge"], row["pytorch"]
    return [
        row["weights_bytes"],
        row["activation_bytes"],
        ours["opened_bytes"] - ours["without_bytes"],
        ours["called_bytes"] - ours["without_bytes"],
        theirs["called_bytes"] - theirs["without_bytes"],
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the device part."""
    command = ["wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *command, str(ROOT / "packages" / "edge")], check=True, timeout=300)
    (wheel,) = folder.glob("torchsurgeon_edge-*.whl")
    return wheel


def environment(folder: Path, wheel: Path) -> Path:
    """Install the wheel and what it needs into a new virtual environment, and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{wheel}[zstd]"]
    subprocess.run(install, check=True, timeout=600, capture_output=True, text=True)
    return python


def installed(python: Path) -> dict[str, int]:
    """Return the bytes of what is installed by name, without pip, and of all together."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    sizes = {path.name: size_of(path) for path in site.iterdir() if path.suffix != ".dist-info"}
    kept = {name: size for name, size in sizes.items() if name not in _NOT_OURS}
    return {**dict(sorted(kept.items(), key=lambda one: -one[1])), "all": sum(kept.values())}


def import_s(python: Path, module: str) -> float:
    """Return the median of the processor seconds that importing a module takes in a new process.

    Other programs on the machine disturb them less than those of the wall clock.
    """
    program = f"import time; begin = time.process_time(); import {module}; print(time.process_time() - begin)"
    times = [
        float(
            subprocess.run(
                [python, "-I", "-c", program], check=True, capture_output=True, text=True, timeout=120
            ).stdout
        )
        for _ in range(1 + _IMPORTS)
    ]
    return statistics.median(times[1:])  # the first reads the files from the disk


def head(name: str, share: float, python: Path, folder: Path) -> dict[str, Any]:
    """Return what the head of a network takes in a process without PyTorch, and in one with it."""
    model, x = networks.network(name, torch.device("cpu"))
    graph = ts.trace(model, x)
    point = graph.points[round(share * (len(graph.points) - 1))]
    profile, bundle = exported(graph, x, [point], folder / name, whole=False)
    small, least = networks.network("chain of 2", torch.device("cpu"))
    _, smallest = exported(ts.trace(small, least), least, ["server"], folder / f"without {name}", whole=True)
    weights = sum(path.stat().st_size for path in (bundle / "heads").iterdir())
    assert profile.memory_bytes is not None
    registry = ModelRegistry()
    try:
        registry.add("net", model, x)
        registry.add("small", small, least)
        with Server(create_app(registry)) as server:
            given = [f"{folder}.npy" for folder in (smallest, bundle)]
            device = run(
                [python, "-I", "-c", _DEVICE, smallest, given[0], bundle, server.url, given[1], str(point.index)]
            )
            pytorch = run([sys.executable, "-c", _PYTORCH, name, str(point.index), server.url, given[1]])
    finally:
        registry.close()
    return {
        "network": name,
        "point": point.name,
        "weights_bytes": weights,
        "activation_bytes": int(profile.memory_bytes[: point.index].max()),
        "edge": device,
        "pytorch": pytorch,
    }


def exported(
    graph: ts.LayerGraph, x: torch.Tensor, points: list[Any], folder: Path, *, whole: bool
) -> tuple[ts.LayerProfile, Path]:
    """Write a bundle, and its input beside it."""
    costs = ts.profile(graph, inputs=[x], meter=None, repeats=3)
    export_bundle(graph, folder, points=points, device=costs, server=costs, whole=whole, inputs=[x])
    np.save(f"{folder}.npy", x.numpy())
    return costs, folder


def run(command: list[Any]) -> dict[str, Any]:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return (
        path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )


if __name__ == "__main__":
    main()
