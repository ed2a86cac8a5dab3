"""Device and server may run different PyTorch versions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from interop_device import Classifier, example, model
from paths import ROOT, SUPPORT

import torchsurgeon as ts
from torchsurgeon.serve import ModelRegistry, Server, create_app


@pytest.mark.interop
def test_another_pytorch_names_and_answers_the_same(interop_python: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = Classifier().eval()
    weights = tmp_path / "weights.pt"
    torch.save(classifier.state_dict(), weights)
    registry = ModelRegistry()
    served = registry.add("net", classifier, (model()[1],))
    with Server(create_app(registry)) as server:
        result = subprocess.run(
            [interop_python, SUPPORT / "interop_device.py", server.url, weights],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    registry.close()
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["torch"] != torch.__version__
    assert told["graph"] == json.loads(json.dumps(served.graph.to_json()))
    assert list(told["answers"]) == [point.name for point in served.graph.points]
    with torch.no_grad():
        truth = classifier(example())
    for name, answer in told["answers"].items():
        torch.testing.assert_close(torch.tensor(answer), truth, rtol=1e-4, atol=1e-6, msg=name)


def test_this_version_gives_the_same_answers_exactly() -> None:
    classifier = Classifier().eval()
    registry = ModelRegistry()
    registry.add("net", classifier, (model()[1],))
    with Server(create_app(registry)) as server, torch.no_grad():
        truth = classifier(example())
        with ts.SplitModule(classifier, model()[1], server=server.url, name="net", partition=0) as split:
            for point in split.graph.points:
                split.partition = point.index
                assert torch.equal(split(example()), truth), point.name
    registry.close()
