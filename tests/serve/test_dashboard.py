"""The Grafana dashboard asks for what a server tells, by the names and labels under which it tells it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from prometheus_client.parser import text_string_to_metric_families
from tcp import reserved_port
from torch import nn

from torchsurgeon.errors import RequestRefusedError
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.metrics import Metrics
from torchsurgeon.transport import HttpTransport

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/torchsurgeon.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
# Prometheus itself adds the server that it has read.
ADDED = {"instance", "job"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with some of everything to tell."""
    registry = ModelRegistry(profiler=None)
    registry.add("net", nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.ones(1, 4))
    app = create_app(registry)
    with Server(app) as server, HttpTransport(server.url) as transport:
        counts = Metrics(registry, lambda: len(server.connections))
        app.listeners.append(counts)
        app.metrics = counts.text
        ask(transport)
        yield server
    registry.close()


def ask(transport: HttpTransport) -> None:
    for name in ("input", "0"):
        transport.infer("net", {name: torch.ones(1, 4)}, max_answer_bytes=1000)
    with pytest.raises(RequestRefusedError):
        transport.infer("net", {"nothing": torch.ones(1, 4)}, max_answer_bytes=1000)


def test_every_query_asks_for_metrics_and_labels_that_there_are(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set(ADDED)).update(sample.labels)
    assert QUERIES
    queries = [*QUERIES, *((one["name"], one["definition"]) for one in DASHBOARD["templating"]["list"][1:])]
    for title, query in queries:
        names = re.findall(r"torchsurgeon_\w+", query)
        assert names, title
        assert set(names) <= set(labels), title
        there = set.union(*(labels[name] for name in names))
        filtered = re.findall(r"(\w+)(?:=|!=|=~|!~)\"", query)
        grouped = re.findall(r"\bby \(([^)]*)\)", query)
        assert {*filtered, *(one.strip() for group in grouped for one in group.split(","))} <= there, title


def test_every_metric_but_single_ones_is_shown() -> None:
    source = (ROOT / "torchsurgeon" / "serve" / "metrics.py").read_text()
    told = set(re.findall(r'MetricFamily\(\s*"(torchsurgeon_\w+)"', source))
    assert told
    shown = " ".join(query for _, query in QUERIES)
    assert [name for name in sorted(told) if name not in shown] == []


def test_panels_do_not_overlap_and_have_different_ids() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_a_real_prometheus_answers_every_query(server: Server, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus: apt-get install prometheus")
    with reserved_port() as port:
        pass
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs:\n"
        f"- {{job_name: torchsurgeon, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}\n"
    )
    command = [program, f"--config.file={configuration}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    end = threading.Event()

    def load() -> None:
        with HttpTransport(server.url) as transport:
            while not end.wait(0.05):
                ask(transport)

    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    loading = threading.Thread(target=load)
    loading.start()
    try:
        missing = dict.fromkeys(query for _, query in QUERIES)
        end_s = time.monotonic() + 60
        while missing:
            assert time.monotonic() < end_s, f"Prometheus has no answer to {list(missing)}"
            time.sleep(0.3)
            for query in list(missing):
                if answer_to(query, port):
                    del missing[query]
    finally:
        end.set()
        loading.join()
        process.terminate()
        process.wait(30)


def answer_to(query: str, port: int) -> list[Any]:
    """What Prometheus answers to a query of the dashboard, with everything chosen and a range that is a few seconds."""
    text = query.replace("$__rate_interval", "2s").replace("$instance", ".*").replace("$model", ".*")
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            told = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []  # it is still starting
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:
        return []
    assert told["status"] == "success", told
    return [one for one in told["data"]["result"] if one["value"][1] != "NaN"]
