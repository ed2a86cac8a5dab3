"""The networks of the evaluation are those of the paper, and its costs are used as the pages say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from torch.nn import functional

import torchsurgeon as ts
from benchmarks import zoo
from benchmarks.evaluate import configurations, devices, samples
from benchmarks.evaluate.applications import APPLICATIONS
from torchsurgeon.prediction import costs_on


@pytest.mark.parametrize("name", zoo.PARAMETERS)
def test_a_network_has_as_many_parameters_as_in_the_paper(name: str) -> None:
    model, _ = zoo.make(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(zoo.PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize("name", ["imc", "face", "dig", "asr", "pos", "ner", "chk"])
def test_a_network_hands_on_as_many_bytes_after_each_layer_as_the_authors_counted(name: str) -> None:
    model, example = zoo.make(name)
    graph = ts.trace(model, example)
    application = configurations.Application.read(name)
    at = configurations.timed_layers(graph, application)
    assert tuple(at) == application.layers
    assert graph.points[0].size_bytes == application.sizes_bytes[0]
    sizes = {point.index: point.size_bytes for point in graph.points}
    last = len(application.layers) - 1
    for rank, layer in enumerate(application.layers):
        # What the last layer hands on is the answer, which is a number of another type in each framework.
        if rank < last and at[layer] + 1 in sizes:
            assert sizes[at[layer] + 1] == pytest.approx(application.sizes_bytes[rank + 1], abs=1), layer


def test_lenet_has_learned_to_read() -> None:
    model, right = zoo.trained_lenet()
    assert right > 0.9
    pixels, wanted = zoo.digits()
    assert float((model(pixels[1500:]) == wanted[1500:]).float().mean()) == right


@pytest.mark.parametrize("stride", [1, 2])
def test_a_locally_connected_layer_with_equal_weights_everywhere_is_a_convolution(stride: int) -> None:
    layer = zoo.LocallyConnected2d(3, 5, 11, 4, stride)
    kernel, bias, x = torch.rand(5, 3, 4, 4), torch.rand(5), torch.rand(2, 3, 11, 11)[:1]
    with torch.no_grad():
        layer.weight.copy_(kernel.flatten(1).T.expand_as(layer.weight))
        layer.bias.copy_(bias[:, None, None].expand_as(layer.bias))
        found = layer(x)
    torch.testing.assert_close(found, functional.conv2d(x, kernel, bias, stride))


@pytest.mark.parametrize("name", ["dig", "pos"])
def test_at_measured_costs_every_choice_is_the_best(name: str) -> None:
    application = configurations.Application.read(name)
    graph = ts.trace(*zoo.make(name))
    measured = {
        where: dict(zip(application.layers, own.tolist(), strict=True)) for where, own in application.seconds.items()
    }
    rows = [
        configurations.configuration(graph, application, processor, link, {configurations.MEASURED: measured})
        for processor in configurations.PROCESSORS
        for link in configurations.LINKS
    ]
    found = configurations.summary(rows, configurations.MEASURED)
    assert found["latency_regret_most"] == found["energy_regret_most"] == 1
    assert found["latency_optimal"] == found["energy_optimal"] == 6


def test_a_held_out_application_has_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    own = APPLICATIONS.index("vgg")
    for name in ("tegra-k1-cpu", "tegra-k1-gpu"):
        known = {sample.group for sample in devices.all_samples(name)}
        assert own in known
        assert {sample.group for sample in devices.samples_without(name, "vgg")} == known - {own}
    # Fitting takes a minute, and is tested elsewhere.
    monkeypatch.setattr(devices.Predictor, "fit", lambda samples, _: samples)
    monkeypatch.setattr(devices, "with_factors", lambda _, rows, sweeps: [*rows, *sweeps])
    for name in ("tegra-k1-cpu", "tegra-k1-gpu"):
        known = {sample.group for sample in devices.all_samples(name)}
        groups = {sample.group for sample in devices.held_out(name, "vgg")}
        assert known - {own} <= groups
        assert own not in groups


def test_the_total_of_a_network_on_a_gpu_is_kept_when_it_is_spread() -> None:
    application = configurations.Application.read("imc")
    shares = {where: list(np.arange(1.0, len(application.layers) + 1)) for where in ("gpu", "server")}
    spread = configurations.respread(application, shares)
    for where in shares:
        assert spread.seconds[where].sum() == pytest.approx(application.seconds[where].sum())
        assert spread.seconds[where][1] == pytest.approx(2 * spread.seconds[where][0])
    assert spread.seconds["cpu"] is application.seconds["cpu"]


def test_what_a_sweep_pays_is_found_from_its_relus(tmp_path: Path) -> None:
    send_s, wait_s, launch_s, bandwidth = 5e-10, 2e-4, 3e-5, 1e10
    sweep = tmp_path / "model-fit" / "jetson" / "relu-gpu-gflops.csv"
    rows = tmp_path / "gflops" / "gflops-gpu" / "mobile-gpu-layer.csv"
    for path in (sweep, rows):
        path.parent.mkdir(parents=True)
    lines = [
        f"relu,1,{n},1,1,{n},{1e3 * (wait_s + launch_s + 4 * n * (send_s + 2 / bandwidth))},0" for n in (10, 1000, 9000)
    ]
    sweep.write_text("\n".join(["layer,batch,channel,height,width,fpops,lat,gflops", *lines]))
    rows.write_text(f"model,layer,lat\nimc,relu1,{1e3 * launch_s}\nimc,conv1,7\n")
    paid = samples.toll(tmp_path, "mobile", bandwidth)
    assert [paid.send_s, paid.wait_s, paid.launch_s] == pytest.approx([send_s, wait_s, launch_s], rel=1e-6)
    assert paid.off(1e-3, 1e5) == pytest.approx(1e-3 - wait_s - 1e5 * send_s)
    assert paid.off(1e-5, 1e5) == paid.launch_s


def test_the_plan_in_the_readme_is_a_split_that_wins() -> None:
    line = re.search(r"^torchsurgeon (plan .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line is not None
    words = shlex.split(line[1])
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["plan", "torchvision:alexnet"]
    import torchvision

    graph = ts.trace(torchvision.models.alexnet(weights=None).eval(), torch.rand(1, 3, 224, 224))
    with pytest.warns(ts.PredictionWarning):
        device, server = (costs_on(graph, given[f"--{side}"]) for side in ("device", "server"))
    plan = ts.plan(graph, device=device, server=server, link=given["--link"])
    assert plan.server_only is not None
    assert plan.row.name == "features.12"
    assert plan.value < min(plan.server_only.latency_s, plan.device_only.latency_s)
