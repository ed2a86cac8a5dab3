"""Write the figures of docs/prediction.md from several runs of ``python -m benchmarks.prediction``.

python -m benchmarks.prediction_page run1.json run2.json run3.json    # keeps them in results/prediction.json
python -m benchmarks.prediction_page                                  # from what is kept
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.support.result_file import RESULTS

OUT = RESULTS / "prediction.json"
PAGE = Path(__file__).parent.parent / "docs" / "prediction.md"
BEGIN, END = "<!-- prediction -->", "<!-- /prediction -->"
_RIVALS = ("ours", "linear regression", "random forest")


def section(runs: list[dict[str, Any]]) -> str:
    """Return the part of the page that holds figures."""
    columns = " | ".join(f"run {i + 1}" for i in range(len(runs)))
    lines = [
        f"| model, never seen in fitting | measured | {columns} | worst regret of the cut |",
        "|---" * (3 + len(runs)) + "|",
    ]
    for name in runs[0]["models"]:
        rows = [run["models"][name] for run in runs]
        rounds = [seconds for row in rows for seconds in row["measured_rounds_s"]]
        errors = " | ".join(f"{row['error']:+.1%}" for row in rows)
        lines.append(
            f"| {name} | {statistics.median(row['measured_s'] for row in rows) * 1e3:.1f} ms "
            f"({min(rounds) * 1e3:.1f} … {max(rounds) * 1e3:.1f}) | {errors} "
            f"| {max(row['worst_regret'] for row in rows):.2%} |"
        )
    within = ", ".join(f"{run['within_10']}" for run in runs)
    mean = statistics.mean(run["regret"]["mean"] for run in runs)
    above, cases = (sum(run["regret"][key] for run in runs) for key in ("above_1_percent", "cases"))
    taken_s = statistics.median(run["prediction"]["median_s"] for run in runs)
    layers, worst = runs[0]["prediction"]["layers"], max(run["regret"]["worst"] for run in runs)
    lines += [
        "",
        f"In the {len(runs)} runs, {within} of {len(runs[0]['models'])} models are within 10 %. The cut chosen from",
        "predictions, over five links, four server speeds, three loads and a device as it is and ten times as slow,",
        f"takes {mean:.2%} longer in the mean than the one chosen from measurements; {above} of {cases} cases are more",
        f"than 1 % off, the worst {worst:.1%}. Predicting a model of {layers} layers takes {taken_s * 1e3:.0f} ms.",
        "",
        "Layers of these models that are one operation each, median error and share within 20 %, medians of the runs,",
        "beside the linear regression of public re-implementations and a random forest as nn-Meter's, all fitted to",
        "the same samples:",
        "",
        f"| kind | layers | {' | '.join(_RIVALS)} |",
        "|---|---|---|---|---|",
    ]
    for kind, row in runs[0]["real_layers"].items():
        cells = []
        for rival in _RIVALS:
            error, share = (statistics.median(run["real_layers"][kind][rival][i] for run in runs) for i in (0, 2))
            cells.append(f"{error:.0%}, {share:.0%}")
        lines.append(f"| {kind} | {row['layers']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="what benchmarks.prediction wrote")
    options = parser.parse_args()
    if options.runs:
        OUT.write_text(json.dumps({"runs": [json.loads(path.read_text()) for path in options.runs]}, indent=1) + "\n")
    begin, rest = PAGE.read_text().split(BEGIN)
    _, end = rest.split(END)
    runs = json.loads(OUT.read_text())["runs"]
    PAGE.write_text(f"{begin}{BEGIN}\n\n{section(runs)}\n\n{END}{end}")


if __name__ == "__main__":
    main()
