"""Write what ``run.sh`` found on a GPU into docs/profiling.md: ``python -m benchmarks.device.figures``.

It reads the files in benchmarks/results/device/, which are kept from a run on a GPU.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.device.measure import CHAIN
from benchmarks.support.result_file import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "profiling.md"
BEGIN, END = "<!-- figures, by benchmarks.device.figures -->", "<!-- end of figures -->"
WAYS = ("cuda-events", "torch.cuda.Event", "torch.profiler")


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page()}\n{END}{rest.partition(END)[2]}")


def page() -> str:
    """The tables, as Markdown."""
    return "\n".join(part() for part in (origin, times, overhead, energy))


def read(name: str) -> Any:
    return json.loads((RESULTS / "device" / f"{name}.json").read_text())


def origin() -> str:
    where, tests = read("kernels")["environment"], read("tests")["results"]
    passed = sum(outcome == "passed" for outcome in tests.values())
    return (
        f"One {where['device']}, PyTorch {where['torch']}, CUDA {where['cuda']}, driver "
        f"{where['driver'].partition(',')[0]}, {where['date'][:10]}, commit {where['commit']}. {passed} of the "
        f"{len(tests)} tests marked `cuda` passed.\n"
    )


def times() -> str:
    clocks, kernels, layers = (read(name)["results"] for name in ("clocks", "kernels", "layers"))
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


def overhead() -> str:
    found = read("overhead")["results"]
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


def energy() -> str:
    lines = []
    for name, found in read("layers")["results"].items():
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
