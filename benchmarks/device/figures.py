"""Write what ``run.sh`` found on GPUs into docs/profiling.md, and what servers did there into docs/serving.md.

It reads the folders in benchmarks/results/device/, each kept from the runs on one kind of GPU.

    python -m benchmarks.device.figures                             # write the page
    python -m benchmarks.device.figures --keep OUTPUT_FOLDER h100   # first keep what run.sh left there as h100
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import server_rivals
from benchmarks.device.measure import CHAIN
from benchmarks.support.result_file import RESULTS, known, show

PAGE = Path(__file__).parents[2] / "docs" / "profiling.md"
BEGIN, END = "<!-- figures, by benchmarks.device.figures -->", "<!-- end of figures -->"
KEPT = RESULTS / "device"
FILES = ("kernels", "clocks", "overhead", "layers", "serving", "split")
SERVING = KEPT / "h200" / "serving.json"
SERVING_BEGIN, SERVING_END = "<!-- on a GPU, by benchmarks.device.figures -->", "<!-- end of on a GPU -->"
WAYS = ("cuda-events", "torch.cuda.Event", "torch.profiler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, metavar=("OUTPUT_FOLDER", "NAME"), help="keep what run.sh left there")
    options = parser.parse_args()
    if options.keep:
        keep(Path(options.keep[0]), KEPT / options.keep[1])
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page()}\n{END}{rest.partition(END)[2]}")
    show(server_rivals.PAGE, SERVING_BEGIN, SERVING_END, server_rivals.page(known(SERVING)))


def page() -> str:
    """The tables, as Markdown."""
    return "\n".join(part(folder) for folder in sorted(KEPT.iterdir()) for part in (origin, times, overhead, energy))


def keep(output: Path, folder: Path) -> None:
    """Keep the files of a run without the serial number of its GPU, and the outcomes that ``tests.txt`` shows.

    Files of steps that have not run stay as they are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: output / f"{name}.json" for name in FILES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    tests = output / "tests.txt"
    if tests.exists():
        told = re.findall(r"^(tests/\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)", tests.read_text(), re.M)
        outcomes = {name: outcome.lower() for name, outcome in told}
        found["tests"] = {"environment": found["kernels"]["environment"], "results": outcomes}
    for name, what in found.items():
        text = json.dumps(what, indent=None if name == "layers" else 1)
        (folder / f"{name}.json").write_text(re.sub(r" GPU-[0-9a-f-]+", "", text) + "\n")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def origin(folder: Path) -> str:
    where, tests = read(folder, "kernels")["environment"], read(folder, "tests")["results"]
    passed = sum(outcome == "passed" for outcome in tests.values())
    return (
        f"One {where['device']}, PyTorch {where['torch']}, CUDA {where['cuda']}, driver "
        f"{where['driver'].partition(',')[0]}, {where['date'][:10]}, commit {where['commit']}. {passed} of the "
        f"{len(tests)} tests marked `cuda` passed.\n"
    )


def times(folder: Path) -> str:
    clocks, kernels, layers = (read(folder, name)["results"] for name in ("clocks", "kernels", "layers"))
    lines = []
    for name, found in clocks.items():
        whole_s = statistics.median(layers[name]["profile"]["whole_s"])
        ratio = found["event_to_kernel"]
        lines.append(
            [
                name,
                f"{len(found['event_s'])}, {len(found['kernel_s'])}",
                f"{kernels[name]['kernels']}, {kernels[name]['outside_layers']}",
                ms(whole_s),
                f"{layers[name]['sum_to_whole']:.2f}",
                ms(found["sum_kernel_s"]),
                f"{found['sum_kernel_s'] / whole_s:.0%}",
                f"{ratio['median']:.1f} ({ratio['low_quartile']:.1f} … {ratio['high_quartile']:.1f})",
                str(found["below_kernels"]),
            ]
        )
    head = ["model, batch 1", "layers, with kernels", "kernels, of no layer", "whole model", "sum of layers over it"]
    head += ["sum of kernels", "GPU busy", "a layer over its kernels", "below them"]
    return table(head, lines)


def overhead(folder: Path) -> str:
    found = read(folder, "overhead")["results"]
    lines = [
        [
            f"chain of {CHAIN}" if name == "chain" else name,
            ms(ways["eager"]["seconds"]["median"]),
            *(f"{ways[way]['extra_us_per_layer']:.1f} µs" if way in ways else "" for way in WAYS),
            f"{ways['cuda-events']['ratio_to_eager']['median']:.2f}",
        ]
        for name, ways in found.items()
    ]
    head = ["extra time a layer", "not timed", *WAYS, "model timed by cuda-events over not timed"]
    return table(head, lines)


def energy(folder: Path) -> str:
    lines = []
    for name, found in read(folder, "layers")["results"].items():
        row, whole_s = found["profile"]["energy"], statistics.median(found["profile"]["whole_s"])
        whole_j, low_j, high_j = row["whole_j"]
        known = [(low, high) for low, high in row["interval_j"] if low is not None]
        lines.append(
            [
                name,
                f"{row['idle_power_w']:.0f} W",
                f"{whole_j:.3f} J ({low_j:.2f} … {high_j:.2f})",
                f"{whole_j / whole_s:.0f} W",
                f"{sum(low <= 0 <= high for low, high in known)} of {len(known)}",
                str(sum(layer_j < 0 for layer_j in row["layer_j"])),
            ]
        )
    head = ["energy by NVML", "idle", "whole model (95 % interval)", "above idle", "layers whose interval includes 0"]
    return table([*head, "layers below 0 J"], lines)


def table(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines)) + "\n"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    main()
