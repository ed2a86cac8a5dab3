"""Writes the shapes of a web search service, as torchsurgeon/simulate/shapes.json holds them.

BigHouse comes with two cumulative distributions of Google's web search (workloads/search.arrival.cdf and
search.service.cdf in the public repository meisner/BigHouse). Of each one this keeps the quantiles at a few hundred
probabilities, divided by the mean, so that only the shape remains.

    python -m benchmarks.evaluate.web_search DIRECTORY
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from torchsurgeon import simulate

OUT = Path(simulate.__file__).parent / "shapes.json"
SOURCE = (
    "Google web search, {what}: quantiles of workloads/search.{what}.cdf in the public repository meisner/BigHouse "
    "(Meisner et al., BigHouse, ISPASS 2012), divided by the mean of {mean_ms:.4g} ms"
)
PROBABILITIES = np.concatenate([np.linspace(0, 0.95, 191), 1 - np.geomspace(0.05, 1e-6, 110)[1:], [1.0]])
"""Evenly spread to 95 %, then evenly on a logarithmic scale of what remains."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where search.arrival.cdf and search.service.cdf lie")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    shapes = {}
    for what, name in (("arrival", "web-search-arrivals"), ("service", "web-search-service")):
        seconds, share = np.loadtxt(options.directory / f"search.{what}.cdf").T
        # Where the distribution stays level there is no value, so a share counts where it is first reached.
        first = np.append(True, np.diff(share) > 0)
        values = np.interp(PROBABILITIES, share[first], seconds[first])
        mean = float(np.diff(PROBABILITIES) @ (values[:-1] + values[1:])) / 2
        shapes[name] = {
            "source": SOURCE.format(what=what, mean_ms=mean * 1e3),
            "probabilities": [round(float(p), 9) for p in PROBABILITIES],
            "values": [round(float(v / mean), 5) for v in values],
        }
    options.out.write_text(json.dumps({"format": "torchsurgeon.shapes/1", "shapes": shapes}, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
