"""How well a calibrated device's predictions meet what is measured on it, layer by layer, model by model, cut by cut.

Thirteen models that no calibration has seen are profiled in turns with a calibration, in the same process on the same
threads: a shared machine's speed drifts by more than predictions are off. Beside the package's own models stand, fitted
to the same samples, the linear regression that public re-implementations of Neurosurgeon use and a random forest as
nn-Meter's (Zhang et al., MobiSys 2021). Writes JSON.

    python -m benchmarks.prediction --out benchmarks/results/prediction.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GroupKFold
from torch import nn
from torchvision.models import get_model

import torchsurgeon as ts
from torchsurgeon.link import PRESETS
from torchsurgeon.prediction.kinds import KINDS
from torchsurgeon.prediction.operations import moved_bytes, operations
from torchsurgeon.prediction.regression import HeldOut
from torchsurgeon.prediction.samples import Sample, SampleTable
from torchsurgeon.profiling import provenance

TORCHVISION = (
    "alexnet", "vgg16", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
    "googlenet", "squeezenet1_1", "vit_b_16", "swin_t",
)  # fmt: skip
LINKS, SPEED_UPS, LOADS = ("3g", "lte", "wifi", "5g-low", "5g-mmwave"), (1, 5, 20, 60), (1, 2, 5)
# This machine as the device, and one ten times as slow, as phones are: there cuts inside a model win.
SLOWNESS = (1.0, 10.0)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a model with random weights and an example."""
    torch.manual_seed(0)
    if name == "bert":
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(), add_pooling_layer=False).eval(), torch.zeros(1, 128, dtype=torch.long)
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return get_model(name, weights=None, **extra).eval(), torch.rand(1, 3, 224, 224)


def measured(graphs: dict[str, ts.LayerGraph]) -> dict[str, list[ts.LayerProfile]]:
    """Profile every model once."""
    found: dict[str, list[ts.LayerProfile]] = {}
    for name, graph in graphs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ts.NoisyProfileWarning)
            found[name] = [ts.profile(graph, repeats=5, warmup=2, meter=None)]
        print(".", end="", flush=True)
    print()
    return found


def joined(profiles: Sequence[ts.LayerProfile]) -> ts.LayerProfile:
    """Return the profiles of one model as one, with the samples of all."""
    first = profiles[0]
    samples_s, whole_s = (np.concatenate([getattr(p, key) for p in profiles]) for key in ("samples_s", "whole_s"))
    return ts.LayerProfile(
        first.model, first.fingerprint, first.batch, first.layers, samples_s, whole_s, first.provenance
    )


def paper_regressors(table: SampleTable) -> Any:
    columns = table.kind.named(table.sizes)
    return np.stack([*table.kind.paper(columns), np.ones(len(table))], axis=1)


def plain_columns(table: SampleTable) -> Any:
    flops, moved = table.kind.work(table.sizes)
    kinds = np.unique(table.variants, return_inverse=True)[1]
    return np.column_stack([table.sizes, flops, moved, kinds])


Rival = tuple[Callable[[], Any], Callable[[SampleTable], Any]]
RIVALS: dict[str, Rival] = {
    "linear regression": (LinearRegression, paper_regressors),
    "random forest": (lambda: RandomForestRegressor(100, random_state=0, n_jobs=1), plain_columns),
}


def held_out(table: SampleTable, rival: Rival) -> Any:
    """Return a rival's predictions of samples of networks it has not seen; seconds below a nanosecond are one."""
    make, features_of = rival
    inputs, predicted = features_of(table), np.zeros(len(table))
    groups = table.groups if len(np.unique(table.groups)) >= 5 else np.arange(len(table)) % 5
    for seen, unseen in GroupKFold(5).split(inputs, groups=groups):
        predicted[unseen] = make().fit(inputs[seen], table.seconds[seen]).predict(inputs[unseen])
    return np.maximum(predicted, 1e-9)


def kind_errors(predictor: ts.Predictor) -> dict[str, dict[str, Any]]:
    """Held-out errors on the calibration's samples, of ours and of the rivals."""
    found: dict[str, dict[str, Any]] = {}
    for kind, known in sorted(predictor.fitted.items()):
        if not KINDS[kind].columns:
            continue
        table = predictor.samples[kind]
        own = known.held_out
        row: dict[str, Any] = {
            "form": known.form,
            "samples": own.samples,
            "ours": [own.median, own.within_10, own.within_20],
        }
        for name, rival in RIVALS.items():
            errors = HeldOut.of(table.seconds, held_out(table, rival))
            row[name] = [errors.median, errors.within_10, errors.within_20]
        found[kind] = row
    return found


def layer_errors(
    predictor: ts.Predictor, graphs: dict[str, ts.LayerGraph], truths: dict[str, ts.LayerProfile]
) -> dict[str, dict[str, Any]]:
    """Errors on the real models' layers that are one operation each, of ours and of the rivals."""
    samples: dict[str, list[Sample]] = {}
    for name, graph in graphs.items():
        before, network = 0, sum(moved_bytes(layer) for layer in graph.layers)
        for layer, found, seconds in zip(graph.layers, operations(graph), truths[name].layer_s, strict=True):
            if len(found) == 1 and found[0].kind in predictor.fitted and KINDS[found[0].kind].columns:
                sample = Sample(found[0], float(seconds), before_bytes=before, network_bytes=network)
                samples.setdefault(found[0].kind, []).append(sample)
            before = moved_bytes(layer)
    rows: dict[str, dict[str, Any]] = {}
    for kind, chosen in sorted(samples.items()):
        model = predictor.model(kind)
        assert model is not None
        chosen = [sample for sample in chosen if sample.operation.variant in model.variants]
        table, fitted = SampleTable.of(kind, chosen), predictor.samples[kind]
        predictions = {"ours": model.predict(table)}
        both = SampleTable.of(kind, [*fitted.samples(), *chosen])
        for name, (make, features_of) in RIVALS.items():
            inputs = features_of(both)
            rival = make().fit(inputs[: len(fitted)], fitted.seconds)
            predictions[name] = np.maximum(rival.predict(inputs[len(fitted) :]), 1e-9)
        rows[kind] = {"layers": len(table)}
        for name, predicted in predictions.items():
            errors = HeldOut.of(table.seconds, predicted)
            rows[kind][name] = [errors.median, errors.within_10, errors.within_20]
    return rows


def costs(graph: ts.LayerGraph, profile: ts.LayerProfile, link: ts.Link, speed_up: float, load: float) -> Any:
    """Latency of every partition point, seconds, where the server is the same machine made faster."""
    head_s, tail_s = profile.head_s, profile.tail_s
    answer = sum(spec.size_bytes for spec in graph.outputs)
    last = len(graph.layers)
    return np.array(
        [
            head_s[p.index] if p.index == last
            else head_s[p.index] + link.request_s(p.size_bytes, answer) + tail_s[p.index] / speed_up * load
            for p in graph.points
        ]
    )  # fmt: skip


def regrets(graph: ts.LayerGraph, predicted: ts.LayerProfile, truth: ts.LayerProfile) -> list[tuple[float, int]]:
    """How much longer the cut chosen from predictions takes than the best, 0.01 for 1 %, and the best's index."""
    found = []
    for slow, name, speed_up, load in itertools.product(SLOWNESS, LINKS, SPEED_UPS, LOADS):
        real = costs(graph, truth.scaled(slow), PRESETS[name], speed_up, load)
        chosen = int(np.argmin(costs(graph, predicted.scaled(slow), PRESETS[name], speed_up, load)))
        found.append((float(real[chosen] / real.min() - 1), graph.points[int(real.argmin())].index))
    return found


def prediction_s(predictor: ts.Predictor) -> tuple[int, list[float]]:
    """Seconds that predicting a model of about a thousand layers takes, traced before."""
    # Shapes are all that counts, so the graph may be of the CPU's model.
    graph = ts.trace(get_model("maxvit_t", weights=None).eval(), torch.rand(1, 3, 224, 224))
    taken = []
    for _ in range(12):
        begin = time.perf_counter()
        predictor.predict(graph)
        taken.append(time.perf_counter() - begin)
    return len(graph.layers), taken[2:]


def share(values: Sequence[float]) -> str:
    return " ".join(f"{value:7.1%}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="use this calibration of this machine instead of a new one")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds to calibrate for")
    parser.add_argument(
        "--turns", type=int, default=5, help="parts that calibrating is done in, models profiled between"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=[*TORCHVISION, "bert"])
    parser.add_argument("--keep", type=Path, help="write the calibration here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ts.PredictionWarning)
    graphs = {}
    for name in options.models:
        model, example = build(name)
        graphs[name] = ts.trace(model.to(options.device), example.to(options.device))
    profiles = measured(graphs)
    begin, calibrated_s = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        kept = options.keep or Path(folder) / "device.json"
        for turn in range(1, options.turns + 1):
            begin = time.perf_counter()
            if options.calibration:
                predictor = ts.Predictor.load(options.calibration)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ts.ThrottledWarning)
                    budget_s = options.budget * turn / options.turns
                    predictor = ts.calibrate(options.device, budget_s=budget_s, out=kept, meter=None)
            calibrated_s += time.perf_counter() - begin
            for name, more in measured(graphs).items():
                profiles[name] += more
    truths = {name: joined(found) for name, found in profiles.items()}
    print(f"calibrated in {calibrated_s:.0f} s\n{predictor}\n")

    kinds = kind_errors(predictor)
    layers = layer_errors(predictor, graphs, truths)
    for title, rows, count in (
        ("samples of networks held out", kinds, "samples"),
        ("layers of the real models", layers, "layers"),
    ):
        print(f"{title}: median error, share within 10 %, within 20 %")
        print(f"{'':<24}{'':>8}  " + "  ".join(f"{name:^23}" for name in ("ours", *RIVALS)))
        for kind, row in rows.items():
            cells = "  ".join(share(row[name]) for name in ("ours", *RIVALS))
            print(f"{kind:<24}{row[count]:>8}  {cells}")
        print()

    models: dict[str, dict[str, Any]] = {}
    all_regrets: list[float] = []
    print(
        "whole models: measured, predicted, error; regret of the cut chosen from predictions: mean and worst; how "
        "often the best cut is inside"
    )
    for name, graph in graphs.items():
        predicted, truth = predictor.predict(graph), truths[name]
        error = predicted.total_s / truth.total_s - 1
        chosen = regrets(graph, predicted, truth)
        found = [regret for regret, _ in chosen]
        inside = sum(0 < index < len(graph.layers) for _, index in chosen)
        all_regrets += found
        spread = [float(np.median(p.whole_s)) for p in profiles[name]]
        low_s, high_s = predicted.whole_interval_s or (0.0, 0.0)
        models[name] = {
            "measured_s": truth.total_s,
            "measured_rounds_s": spread,
            "predicted_s": predicted.total_s,
            "predicted_interval_s": [low_s, high_s],
            "error": error,
            "mean_regret": statistics.mean(found),
            "worst_regret": max(found),
            "cut_inside": inside,
        }
        print(
            f"{name:<20}{truth.total_s * 1e3:9.2f} ms ({min(spread) * 1e3:.2f} … {max(spread) * 1e3:.2f}) "
            f"{predicted.total_s * 1e3:9.2f} ms {error:+7.1%}   {statistics.mean(found):6.2%} {max(found):7.2%} "
            f"{inside:4d} of {len(found)}"
        )
    within = sum(abs(row["error"]) <= 0.1 for row in models.values())
    above = sum(regret > 0.01 for regret in all_regrets)
    print(
        f"within 10 %: {within} of {len(models)}; regret: mean {statistics.mean(all_regrets):.2%}, worst "
        f"{max(all_regrets):.2%}, above 1 %: {above} of {len(all_regrets)}"
    )
    layers_count, taken = prediction_s(predictor)
    low_s, median_s, high_s = np.quantile(taken, [0.25, 0.5, 0.75])
    print(f"predicting {layers_count} layers takes {median_s * 1e3:.1f} ms ({low_s * 1e3:.1f} … {high_s * 1e3:.1f})")
    if options.out:
        result = {
            "environment": provenance(options.device),
            "calibrated_s": calibrated_s,
            "throttled": predictor.provenance.get("throttled"),
            "held_out_samples": kinds,
            "real_layers": layers,
            "models": models,
            "within_10": within,
            "regret": {
                "mean": statistics.mean(all_regrets),
                "worst": max(all_regrets),
                "above_1_percent": above,
                "cases": len(all_regrets),
            },
            "prediction": {"layers": layers_count, "median_s": median_s, "quartiles_s": [low_s, high_s]},
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
