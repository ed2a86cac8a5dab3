"""Write the reference devices that the paper's authors measured, from their files.

    python -m benchmarks.evaluate.devices DIRECTORY   # graph-gen/offloading of claritylab/djinn, branch mobile

``samples.py`` says what the files hold and what is made of them. The devices are those of torchsurgeon/prediction/
devices, so that whoever has the package needs no file of the authors'. ``held_out()`` returns a device as it would be
had an application never been timed on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import torchsurgeon as ts
from benchmarks.evaluate import samples
from benchmarks.evaluate.applications import APPLICATIONS, PEAKS, POWER_W
from benchmarks.evaluate.samples import ONE_BY_ONE, as_products, with_stand_ins
from torchsurgeon.prediction import Predictor
from torchsurgeon.prediction.operations import Operation
from torchsurgeon.prediction.regression import fit_kind
from torchsurgeon.prediction.samples import Sample, SampleTable, tables

DEVICES = Path(ts.__file__).parent / "prediction" / "devices"
SOURCE = "claritylab/djinn, branch mobile, graph-gen/offloading (June 2015): measured by the authors of Neurosurgeon"
NAMES = {
    ("mobile", "cpu"): "tegra-k1-cpu",
    ("mobile", "gpu"): "tegra-k1-gpu",
    ("server", "cpu"): "k40-server-cpu",
    ("server", "gpu"): "k40-gpu",
}
WHAT = {
    "tegra-k1-cpu": "NVIDIA Tegra K1, four Cortex-A15 at 2.3 GHz, with Caffe",
    "tegra-k1-gpu": "NVIDIA Tegra K1, 192 Kepler cores at 852 MHz, with Caffe",
    "k40-server-cpu": "the CPU of the paper's server with a Tesla K40, with Caffe",
    "k40-gpu": "NVIDIA Tesla K40, with Caffe",
}
OF_SWEEPS = (
    "single layers of many sizes, timed by the authors; from their times the sending of the input to the GPU and the "
    "waiting are taken off"
)
OF_TOTALS = (
    "layers of eight networks: the authors' total of each network, which alone can be believed of a GPU whose layers "
    "were timed without waiting for it, in proportion to what a model of the single layers predicts"
)
OF_ROWS = "layers of eight networks, timed by the authors"
OF_PRODUCTS = (
    "each convolution is also a sample of the matrix product by which Caffe computed it, and of a convolution in two "
    "groups of it, which takes twice as long"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the folder graph-gen/offloading of the authors' repository")
    parser.add_argument("--out", type=Path, default=DEVICES, help="the folder of the devices (default: the package's)")
    options = parser.parse_args()
    made = samples.layer_operations()
    for machine in ("mobile", "server"):
        gpu = gpu_device(options.directory, machine, made)
        for predictor in (gpu, cpu_device(options.directory, machine, made, sweeps_of(gpu))):
            name = next(name for name, what in WHAT.items() if what == predictor.provenance["device"])
            predictor.save(options.out / f"{name}.json")
            print(predictor, flush=True)


def gpu_device(folder: Path, machine: str, made: dict[str, dict[str, Operation]]) -> Predictor:
    """Return the GPU of a machine: its sweeps, and its networks' totals spread by what the sweeps predict.

    Args:
        folder: ``graph-gen/offloading``.
        machine: "mobile" or "server".
        made: the operation of each layer of each network.
    """
    power_w = with_mean(POWER_W["gpu"]) if machine == "mobile" else None
    paid = samples.toll(folder, machine, PEAKS["gpu" if machine == "mobile" else "server"][1])
    watts = float("nan") if power_w is None else statistics.fmean(power_w.values())
    sweeps = samples.sweep_samples(folder, machine, paid, watts)
    sweeps += as_products(sweeps)
    rows = {}
    for network, own in samples.rows_of(folder, machine, "gpu").items():
        layers = [layer for layer in own if layer in made[network]]
        shares = np.maximum(seconds_of(sweeps, [made[network][layer] for layer in layers]), paid.launch_s)
        rows[network] = dict(zip(layers, (sum(own.values()) * shares / shares.sum()).tolist(), strict=True))
    known = samples.row_samples(made, rows, power_w)
    return fitted(NAMES[machine, "gpu"], [*sweeps, *known, *as_products(known)], [OF_SWEEPS, OF_TOTALS, OF_PRODUCTS])


def cpu_device(folder: Path, machine: str, made: dict[str, dict[str, Operation]], sweeps: list[Sample]) -> Predictor:
    """Return the CPU of a machine: its networks' layers, and for kinds with too few of these the GPU's sweeps, slower.

    Args:
        folder: ``graph-gen/offloading``.
        machine: "mobile" or "server".
        made: the operation of each layer of each network.
        sweeps: the samples of the sweeps of the machine's GPU.
    """
    power_w = with_mean(POWER_W["cpu"]) if machine == "mobile" else None
    rows = samples.row_samples(made, samples.rows_of(folder, machine, "cpu"), power_w)
    return with_factors(NAMES[machine, "cpu"], rows + as_products(rows), sweeps)


def with_factors(name: str, rows: list[Sample], sweeps: list[Sample]) -> Predictor:
    """Return a CPU from its rows and the sweeps of a GPU."""
    found, factors = with_stand_ins(rows, sweeps)
    slower = ", ".join(f"{kind} × {factor:.3g}" for kind, factor in sorted(factors.items()))
    stand_ins = (
        "the authors' sweeps of the CPU were run on the GPU; so where there are fewer than 20 layers of a kind, the "
        f"GPU's sweep stands in, with all times multiplied by the median of the layers over its model: {slower}"
    )
    return fitted(name, found, [OF_ROWS, stand_ins, OF_PRODUCTS])


def fitted(name: str, found: list[Sample], made_of: list[str]) -> Predictor:
    """Return the predictor of a device that is fitted to samples, with where they come from."""
    origin: dict[str, Any] = {
        "device": WHAT[name],
        "device_type": "cpu" if name.endswith("cpu") else "cuda",
        "framework": "Caffe, 2015",
        "measured_by": SOURCE,
        "samples": made_of,
        "applications": list(APPLICATIONS),
    }
    if any(np.isfinite(sample.joules) for sample in found):
        origin |= {
            "meter": "the authors' mean power for each application; for LeNet, which has none, the mean of the others",
            "idle_power_w": 0.0,
        }
    exact = [
        dataclasses.replace(sample, seconds=float(f"{sample.seconds:.5g}"), joules=float(f"{sample.joules:.5g}"))
        for sample in found
    ]
    return Predictor.fit(exact, origin)


def held_out(name: str, application: str) -> Predictor:
    """Return a reference device as it would be had an application never been timed on it, without its joules.

    Args:
        name: the device.
        application: one of the paper's applications.
    """
    without = samples_without(name, application)
    if not name.endswith("cpu"):
        return Predictor.fit(without, {"device": f"{WHAT[name]}, but for {application}"})
    gpu = {"tegra-k1-cpu": "tegra-k1-gpu", "k40-server-cpu": "k40-gpu"}[name]
    rows = [sample for sample in without if sample.group < ONE_BY_ONE]
    return with_factors(name, rows, sweeps_of(ts.reference_device(gpu)))


def samples_without(name: str, application: str) -> list[Sample]:
    """Return the samples of a reference device that are not of an application, without their joules."""
    known = [dataclasses.replace(sample, joules=float("nan")) for sample in all_samples(name)]
    return [sample for sample in known if sample.group != APPLICATIONS.index(application)]


def sweeps_of(predictor: Predictor) -> list[Sample]:
    """Return the samples of a GPU that were timed one by one."""
    return [s for table in predictor.samples.values() for s in table.samples() if s.group >= ONE_BY_ONE]


def all_samples(name: str) -> list[Sample]:
    """Return all samples of a reference device."""
    return [sample for table in ts.reference_device(name).samples.values() for sample in table.samples()]


def seconds_of(known: list[Sample], chosen: list[Operation]) -> Any:
    """Return what the samples of a sweep say of operations, in seconds, shape (operations,).

    Args:
        known: the samples, of each kind that is asked for.
        chosen: the operations.
    """
    # A sweep of convolutions has fewer samples than a Predictor wants, so the models are fitted one by one.
    of_kinds = tables(known)
    models = {kind: fit_kind(of_kinds[kind], of_kinds[kind].seconds) for kind in {op.kind for op in chosen}}
    asked = [(models[op.kind], SampleTable.of(op.kind, [Sample(op, 1.0)])) for op in chosen]
    return np.array([model.predict(table)[0] for model, table in asked])


def with_mean(power_w: dict[str, float]) -> dict[str, float]:
    """Return the power of all applications: of one without a figure, the mean of the others."""
    mean_w = statistics.fmean(power_w.values())
    return {name: power_w.get(name, mean_w) for name in APPLICATIONS}


if __name__ == "__main__":
    main()
