"""How well a table of measured layers is fitted: ours beside plain regressors, on the same rows held out.

The tables are made up by a generator with a fixed seed, so that anyone gets the same ones: times that jump between the
kernels a library chooses from, times that other programs disturbed, times that follow the sizes of caches, and times
that follow none of our formulas. Any CSV file that ``torchsurgeon calibrate --from-csv`` takes can be added, and so can
the public tables of https://github.com/Tjyy-1223/Neurosurgeon, which measured layers of six kinds on two machines:
give the folder ``predictor/dataset`` of a copy. None of their rows is kept here.

Every model is fitted to two thirds of the operations of a table and predicts the others, three times. The rivals get
the columns of the table, and learn the logarithm of the seconds. Writes JSON, and the table of docs/prediction.md.

    python -m benchmarks.csv_import
    python -m benchmarks.csv_import --public Neurosurgeon/predictor/dataset
    python -m benchmarks.csv_import --csv conv=conv.csv --out mine.json
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.prediction.kinds import Operation
from torchsurgeon.prediction.regression import HeldOut, fit_kind
from torchsurgeon.prediction.samples import Sample, SampleTable, read_csv

OUT = RESULTS / "csv-import.json"
PAGE = Path(__file__).parent.parent / "docs" / "prediction.md"
BEGIN, END = "<!-- csv-import -->", "<!-- /csv-import -->"
SEED, SPLITS = 17, 3
PUBLIC = "https://github.com/Tjyy-1223/Neurosurgeon"

RIVALS: Mapping[str, Callable[[], Any]] = {
    "boosting, 100 trees": lambda: HistGradientBoostingRegressor(random_state=0),
    "boosting, 1000 trees": lambda: HistGradientBoostingRegressor(max_iter=1000, random_state=0),
    "random forest": lambda: RandomForestRegressor(100, random_state=0, n_jobs=1),
}


def convolutions(rng: random.Random, count: int) -> Iterator[Operation]:
    """Draw convolutions on a grid, as sweeps of devices have them."""
    for _ in range(count):
        side, stride = rng.choice((7, 8, 13, 14, 27, 28, 32, 56, 112, 224)), rng.choice((1, 1, 2, 4))
        channels = [rng.choice((3, 6, 16, 24, 32, 64, 96, 128, 256, 512)) for _ in range(2)]
        out = math.ceil(side / stride)
        sizes = (1, *channels, 1, side**2, out**2, rng.choice((1, 3, 5, 7)) ** 2, stride**2, 1)
        yield Operation("convolution", "2d", sizes)


def kernels_s(operation: Operation) -> float:
    """A library that has three kernels and takes the quickest.

    A matrix product by tiles of 32 × 128, a direct convolution by 8 output channels at a time, and for 3 × 3 without a
    stride one that needs less than half of the multiplications but transforms its inputs first.
    """
    _, into, out, _, _, positions, kernel, stride, _ = operation.sizes
    inner = into * kernel
    tiles = math.ceil(out / 32) * math.ceil(positions / 128)
    product = 2 * tiles * 32 * 128 * inner / 60e9 + 8 * inner * positions / 20e9 + 9e-6
    direct = 2 * math.ceil(out / 8) * 8 * positions * inner / (25e9 if positions % 8 == 0 else 14e9) + 3e-6
    transformed = 2 * out * positions * inner / 2.25 / 40e9 + 16 * (into + out) * positions / 12e9 + 30e-6
    return min(product, direct, transformed if (kernel, stride) == (9, 1) and into >= 16 else math.inf)


def caches_s(operation: Operation) -> float:
    """Weights are read from the second cache, the last one or memory."""
    rows, into, out = operation.sizes
    weight_bytes = 4 * into * out
    rate = 90e9 if weight_bytes < 1e6 else 40e9 if weight_bytes < 24e6 else 13e9
    return 2e-6 + max(weight_bytes / rate, 2 * rows * weight_bytes / 4 / 50e9)


def no_formula_s(operation: Operation) -> float:
    """A driver that runs every depthwise convolution as a dense one on padded channels, in chunks of the input."""
    _, channels, _, _, in_size, _, kernel, _, _ = operation.sizes
    padded = 64 * math.ceil(channels / 64)
    return 4e-5 * math.ceil(in_size / 1024) + 2 * padded**2 * kernel * 1024 / 900e9


def made_up(quick: bool = False) -> dict[str, tuple[str, SampleTable]]:
    """Return the tables of the generator, each with where it comes from."""
    rng = random.Random(SEED)
    many, some, few = (800, 800, 400) if quick else (12_000, 6000, 3000)

    def clean() -> float:
        return math.exp(rng.gauss(0, 0.02))

    def disturbed() -> float:
        return math.exp(rng.gauss(0, 0.08)) * (rng.uniform(1.2, 3.0) if rng.random() < 0.25 else 1.0)

    found = {
        "kernels": [Sample(op, kernels_s(op) * clean()) for op in convolutions(rng, many)],
        "kernels, disturbed": [Sample(op, kernels_s(op) * disturbed()) for op in convolutions(rng, some)],
        "caches": [
            Sample(op, caches_s(op) * clean())
            for op in (
                Operation("linear", "linear", (rng.choice((1, 1, 1, 8, 64)), 8 * round(2 ** rng.uniform(1, 10)), out))
                for out in (8 * round(2 ** rng.uniform(1, 10)) for _ in range(few))
            )
        ],
        "no formula": [
            Sample(op, no_formula_s(op) * clean())
            for op in (
                Operation("depthwise convolution", "2d", (1, wide, wide, wide, side**2, side**2, kernel**2, 1, 1))
                for wide, side, kernel in (
                    (rng.randrange(8, 512, 8), rng.choice((7, 14, 28, 56, 112)), rng.choice((3, 5, 7)))
                    for _ in range(few)
                )
            )
        ],
    }
    return {name: ("made up", grouped(samples)) for name, samples in found.items()}


def grouped(samples: list[Sample]) -> SampleTable:
    """Return samples of one kind as a table, in which rows of the same operation have the same group."""
    groups: dict[Operation, int] = {}
    rows = [dataclasses.replace(s, group=groups.setdefault(s.operation, len(groups))) for s in samples]
    return SampleTable.of(rows[0].operation.kind, rows)


def public(folder: Path) -> dict[str, tuple[str, SampleTable]]:
    """Return the public tables in our columns."""
    found = {}
    for machine in ("edge", "cloud"):
        for name, operation in PUBLIC_COLUMNS.items():
            with (folder / machine / f"{name}_lat.csv").open(newline="") as file:
                rows = [{key: float(cell) for key, cell in row.items()} for row in csv.DictReader(file)]
            samples = [Sample(operation(row), row["latency"] * 1e-3) for row in rows]
            found[f"{machine} {name}"] = (PUBLIC, grouped(samples))
    return found


def _convolution(row: Mapping[str, float]) -> Operation:
    kernel, into, out = int(row["kernel"]) ** 2, int(row["Cin"]), int(row["Cout"])
    positions = round(row["FLOPs"] / (2 * kernel * into * out))
    sizes = (1, into, out, 1, int(row["HW"]) ** 2, positions, kernel, int(row["stride"]) ** 2, 1)
    return Operation("convolution", "2d", sizes)


def _depthwise(row: Mapping[str, float]) -> Operation:
    side, stride, wide = int(row["HW"]), int(row["stride"]), int(row["Cin"])
    positions = math.ceil(side / stride) ** 2
    sizes = (1, wide, wide, wide, side**2, positions, int(row["kernel"]) ** 2, stride**2, 1)
    return Operation("depthwise convolution", "2d", sizes)


def _max_pooling(row: Mapping[str, float]) -> Operation:
    side, kernel, stride = int(row["HW"]), int(row["kernel"]), int(row["stride"])
    out = max((side - kernel) // stride + 1, 1)
    return Operation("pooling", "max", (int(row["Cin"]), side**2, out**2, kernel**2))


def _average_pooling(row: Mapping[str, float]) -> Operation:
    side, out = int(row["HW"]), int(row["output"])
    return Operation("pooling", "adaptive average", (int(row["Cin"]), side**2, out**2, math.ceil(side / out) ** 2))


PUBLIC_COLUMNS: Mapping[str, Callable[[Mapping[str, float]], Operation]] = {
    "conv": _convolution,
    "dw_conv": _depthwise,
    "linear": lambda row: Operation("linear", "linear", (1, int(row["in_features"]), int(row["out_features"]))),
    "maxpool": _max_pooling,
    "avgpool": _average_pooling,
    "batchnorm": lambda row: Operation("normalization", "batch_norm", (int(row["Cin"]), int(row["HW"]) ** 2)),
}


def compared(table: SampleTable) -> dict[str, Any]:
    """Return the errors of ours and of the rivals on operations held out, and the seconds that fitting takes."""
    predicted = {name: np.zeros(len(table)) for name in ("ours", *RIVALS)}
    inputs = np.log(np.column_stack([table.sizes, table.item_bytes]))
    inputs = np.column_stack([inputs, np.unique(table.variants, return_inverse=True)[1]])
    groups = np.random.default_rng(SEED).permutation(table.groups.max() + 1)[table.groups]
    forms = []
    for seen, unseen in GroupKFold(SPLITS).split(inputs, groups=groups):
        model = fit_kind(table.take(seen), table.seconds[seen])
        forms.append(model.form)
        predicted["ours"][unseen] = model.predict(table.take(unseen))
        for name, make in RIVALS.items():
            rival = make().fit(inputs[seen], np.log(table.seconds[seen]))
            predicted[name][unseen] = np.exp(rival.predict(inputs[unseen]))
    # Fitting uses one thread, whose seconds of a processor do not depend on what else runs.
    begin = time.process_time()
    fit_kind(table, table.seconds)
    fit_s = time.process_time() - begin
    errors = {name: HeldOut.of(table.seconds, values) for name, values in predicted.items()}
    return {
        "kind": table.kind.name,
        "rows": len(table),
        "forms": forms,
        "fit_s": fit_s,
        "errors": {name: [own.median, own.within_10, own.within_20] for name, own in errors.items()},
    }


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as tables for the documentation."""
    names = ("ours", *RIVALS)
    longest = max(row["fit_s"] for row in results.values())
    large = max(row["rows"] for row in results.values())
    as_good = sum(
        row["errors"]["ours"][2] >= max(row["errors"][name][2] for name in RIVALS) - 0.005 for row in results.values()
    )
    summary = (
        f"In {as_good} of {len(results)} tables, ours predicts as many held-out rows within 20 % as the best rival "
        f"does, or more, where half a percent of the rows counts as equal.\nFitting all rows of a table took at most "
        f"{longest:.0f} s of one processor; the largest has {large:,} rows."
    )
    lines = [
        summary,
        "",
        f"| table | rows | {' | '.join(names)} | form that was chosen |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    for name, row in results.items():
        cells = " | ".join(f"{row['errors'][one][0]:.1%}, {row['errors'][one][2]:.1%}" for one in names)
        usual = max(sorted(set(row["forms"])), key=row["forms"].count)
        lines.append(f"| {name} | {row['rows']:,} | {cells} | {usual} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, metavar="FOLDER", help=f"the folder predictor/dataset of {PUBLIC}")
    parser.add_argument("--csv", action="append", default=[], metavar="KIND=FILE", help="a table of yours")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = made_up()
    if args.public:
        chosen |= public(args.public)
    for kind, _, path in (pair.partition("=") for pair in args.csv):
        samples = read_csv(kind, path)
        chosen[Path(path).stem] = ("a file", SampleTable.of(samples[0].operation.kind, samples))
    results = {}
    # The rivals' threads would wait for each other by spinning where other programs use the processors.
    with threadpool_limits(1):
        for name, (source, table) in chosen.items():
            results[name] = row = {"source": source, **compared(table)}
            cells = ", ".join(f"{one} {of[0]:.1%} {of[2]:.1%}" for one, of in row["errors"].items())
            print(f"{name}: {row['rows']} rows, {cells}; {row['forms']}, {row['fit_s']:.1f} s", flush=True)
    write(args.out, results)
    if args.out == OUT:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{page(results)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
