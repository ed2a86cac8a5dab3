"""What the paper's authors measured in 2015, as samples of this package's predictors.

The files are those of the public repository claritylab/djinn, branch mobile (June 2015), ``graph-gen/offloading``. They
hold the milliseconds of every layer of eight networks (the rows), and of single layers of many sizes (the sweeps), on a
Tegra K1's CPU and GPU, and on the CPU and the Tesla K40 of a server. Four things are to be known of them:

- **A GPU's rows were taken without waiting for the GPU.** Only the total of a network counts. ``applications.py``
  spreads it over the layers.
- **The sweeps called CPU sweeps were run on the GPU, too.** They differ from those called GPU sweeps by 1 % in the
  median, and they reach 110 Gflop/s on a CPU whose peak is 74. So the sweeps are samples of the GPUs, and those of a
  CPU are its rows.
- **A sweep includes sending the layer's input to the GPU, and waiting for the GPU**, which no layer in the middle of a
  network pays. Both are taken off: ``Toll`` says how they are found.
- **A kind of layer needs 20 samples, and some have fewer rows on the CPUs.** Then the GPU's sweep stands in, with all
  its times multiplied by one factor: the median of the CPU's rows over the GPU's model of the sweep.

Caffe computed a convolution as one matrix product for each group. So a convolution's time is also a sample of the
product (kind ``linear``) and, twice, of a convolution in two groups of it.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import torchsurgeon as ts
from benchmarks import zoo
from benchmarks.evaluate.applications import APPLICATIONS
from torchsurgeon.prediction.kinds import KINDS, Operation
from torchsurgeon.prediction.operations import operations
from torchsurgeon.prediction.regression import fit_kind
from torchsurgeon.prediction.samples import FEWEST_SAMPLES, Sample, SampleTable

SWEEPS = ("conv", "fc", "local", "pool", "norm", "relu", "sig", "htanh", "softmax", "argmax")
ONE_BY_ONE = 100
"""From this number on, a sample's group is itself: it was not timed in a network."""


@dataclasses.dataclass(frozen=True)
class Toll:
    """What a layer of a sweep pays beside computing.

    Found from the sweep of ReLU, whose time is a line in its bytes. The slope is the time to send a byte, and to read
    and write it on the GPU; the latter is known from the bandwidth. The line at 0 bytes is waiting and one launch. A
    launch alone is the median of ReLU's rows, which were taken without waiting.

    Attributes:
        send_s: seconds for sending one byte to the GPU.
        wait_s: seconds for waiting.
        launch_s: seconds for launching a layer, which remain.
    """

    send_s: float
    wait_s: float
    launch_s: float

    def off(self, seconds: float, input_bytes: float) -> float:
        """Return the seconds that a layer of a sweep takes within a network; at least those of a launch."""
        return max(seconds - self.wait_s - input_bytes * self.send_s, self.launch_s)


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file by their columns."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(folder: Path, machine: str, processor: str) -> dict[str, dict[str, float]]:
    """Return the seconds of each layer of each network.

    Args:
        folder: ``graph-gen/offloading``.
        machine: "mobile" or "server".
        processor: "cpu" or "gpu".
    """
    found: dict[str, dict[str, float]] = {}
    for row in read(folder / "gflops" / f"gflops-{processor}" / f"{machine}-{processor}-layer.csv"):
        found.setdefault(row["model"], {})[row["layer"]] = float(row["lat"]) * 1e-3
    return found


def layer_operations() -> dict[str, dict[str, Operation]]:
    """Return for each network the operation that each of the authors' layers amounts to; dig-10 has 10 digits."""
    found = {}
    for name in (*APPLICATIONS, "dig-10"):
        model, example = zoo.make(name.removesuffix("-10"))
        graph = ts.trace(model, example[:10] if name == "dig-10" else example)
        own: dict[str, Operation] = {}
        for layer, made in zip(graph.layers, operations(graph), strict=True):
            root = layer.name.partition(".")[0]
            # A locally connected layer is several operations, of which the product takes nearly all of the time.
            chosen = [op for op in made if op.kind not in ("view", "copy", "elementwise")]
            if chosen:
                own[root] = chosen[-1]
        found[name] = own
    return found


def sweep_operation(kind: str, row: dict[str, str]) -> Operation:
    """Return the operation that one line of a sweep timed."""
    batch, channels, side = int(row["batch"]), int(row["channel"]), int(row["height"])
    kernel, stride = int(row.get("kernel_size", 1)), int(row.get("stride", 1))
    out = int(row.get("num_output", 1))
    if kind == "conv":
        seen = (side - kernel) // stride + 1
        sizes = (batch, channels, out, 1, side**2, seen**2, kernel**2, stride**2, 1)
        return Operation("convolution", "2d", sizes)
    if kind == "fc":
        return Operation("linear", "linear", (batch, channels, out))
    if kind == "local":
        seen = (side - kernel) // stride + 1
        return Operation("matmul", "matmul", (seen**2, batch, channels * kernel**2, out))
    if kind == "pool":
        seen = math.ceil((side - kernel) / stride) + 1
        return Operation("pooling", "max", (batch * channels, side**2, seen**2, kernel**2))
    if kind == "norm":
        return Operation("normalization", "local_response_norm", (batch * channels, side**2))
    if kind in ("softmax", "argmax"):
        named = {"softmax": ("softmax", "softmax"), "argmax": ("reduction", "argmax")}[kind]
        return Operation(*named, (batch, channels))
    variant = {"relu": "relu", "sig": "sigmoid", "htanh": "relu6"}[kind]
    return Operation("activation", variant, (batch * channels * side**2,))


def toll(folder: Path, machine: str, bandwidth_byte_s: float) -> Toll:
    """Return what the layers of a machine's sweeps pay.

    Args:
        folder: ``graph-gen/offloading``.
        machine: "mobile" or "server".
        bandwidth_byte_s: that of the GPU's memory.
    """
    found = _sweep_rows(folder, machine, "relu")
    size = np.array([float(row["fpops"]) * 4 for row in found])
    slope, at_zero = np.polyfit(size, [float(row["lat"]) * 1e-3 for row in found], 1)
    rows = rows_of(folder, machine, "gpu")
    launch_s = float(np.median([s for own in rows.values() for name, s in own.items() if name.startswith("relu")]))
    return Toll(float(slope) - 2 / bandwidth_byte_s, max(float(at_zero) - launch_s, 0.0), launch_s)


def _sweep_rows(folder: Path, machine: str, kind: str) -> list[dict[str, str]]:
    where = {"mobile": "jetson", "server": "server"}[machine]
    return read(folder / "model-fit" / where / f"{kind}-gpu-gflops.csv")


def sweep_samples(folder: Path, machine: str, paid: Toll, power_w: float = math.nan) -> list[Sample]:
    """Return the sweeps of a machine's GPU as samples, without what their layers paid.

    Args:
        folder: ``graph-gen/offloading``.
        machine: "mobile" or "server".
        paid: what they paid.
        power_w: the power while it computed; NaN where it is not known.
    """
    found = []
    for kind in SWEEPS:
        for row in _sweep_rows(folder, machine, kind):
            size = math.prod(int(row[name]) for name in ("batch", "channel", "height", "width")) * 4
            seconds = paid.off(float(row["lat"]) * 1e-3, size)
            found.append(Sample(sweep_operation(kind, row), seconds, seconds * power_w))
    return [dataclasses.replace(sample, group=ONE_BY_ONE + index) for index, sample in enumerate(found)]


def row_samples(
    made: dict[str, dict[str, Operation]], rows: dict[str, dict[str, float]], power_w: dict[str, float] | None
) -> list[Sample]:
    """Return the layers of networks as samples; the group is the number of the application.

    Args:
        made: the operation of each layer.
        rows: the seconds of each layer.
        power_w: the power of the device by application; None where it is not known.
    """
    found = []
    for name, own in rows.items():
        application = name.removesuffix("-10")
        watts = math.nan if power_w is None else power_w[application]
        group = APPLICATIONS.index(application)
        found += [
            Sample(made[name][layer], seconds, seconds * watts, group=group)
            for layer, seconds in own.items()
            if layer in made[name]
        ]
    return found


def as_products(samples: Iterable[Sample]) -> list[Sample]:
    """Return what samples of convolutions say of matrix products and of convolutions in two groups."""
    found = []
    for sample in samples:
        if sample.operation.kind != "convolution":
            continue
        batch, into, out, _, in_size, out_size, kernel, stride, dilation = sample.operation.sizes
        product = Operation("linear", "linear", (batch * out_size, into * kernel, out))
        sizes = (batch, 2 * into, 2 * out, 2, in_size, out_size, kernel, stride, dilation)
        found.append(dataclasses.replace(sample, operation=product))
        found.append(
            dataclasses.replace(
                sample,
                operation=Operation("grouped convolution", "2d", sizes),
                seconds=2 * sample.seconds,
                joules=2 * sample.joules,
            )
        )
    return found


def with_stand_ins(rows: list[Sample], sweeps: list[Sample]) -> tuple[list[Sample], dict[str, float]]:
    """Return a CPU's rows, with sweeps of a GPU in place of missing ones, and their factors by kind.

    Args:
        rows: the CPU's samples.
        sweeps: the samples of the GPU's sweeps.
    """
    found, factors = list(rows), {}
    ratios: dict[str, list[float]] = {}
    for kind in {sample.operation.kind for sample in sweeps}:
        of_kind = [sample for sample in sweeps if sample.operation.kind == kind]
        table = SampleTable.of(kind, of_kind)
        own = [sample for sample in rows if sample.operation.kind == kind]
        if own:
            predicted = fit_kind(table, table.seconds).predict(SampleTable.of(kind, own))
            ratios[kind] = [sample.seconds / value for sample, value in zip(own, predicted.tolist(), strict=True)]
    anywhere = float(np.median([ratio for some in ratios.values() for ratio in some]))
    for kind in KINDS:
        of_kind = [sample for sample in sweeps if sample.operation.kind == kind]
        if of_kind and sum(sample.operation.kind == kind for sample in rows) < FEWEST_SAMPLES:
            factor = float(np.median(ratios.get(kind, [anywhere])))
            factors[kind] = factor
            watts = float(np.median([sample.joules / sample.seconds for sample in rows]))
            for sample in of_kind:
                seconds = sample.seconds * factor
                found.append(dataclasses.replace(sample, seconds=seconds, joules=seconds * watts))
    return found, factors
