"""How much later answers come by Ray Serve than by one server, for a network that takes no time worth mentioning.

``torchsurgeon serve`` and the same model on a local Ray with one replica are up the whole time, and are asked in turns
over one connection that sends its next request once it has the answer. It needs an environment with Ray.

    python -m benchmarks.ray_latency [--rounds 10] [--seconds 2]
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluate.markdown import table
from benchmarks.support import result_file
from benchmarks.support.load_networks import mlp_and_input
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.side_by_side import spread
from torchsurgeon.loadtest import Target, cut_requests, drive
from torchsurgeon.loadtest.result import quantile
from torchsurgeon.serve.ray_options import RayOptions
from torchsurgeon.tracing import trace

OUT = RESULTS / "ray_latency.json"
PAGE = RESULTS.parents[1] / "docs" / "deployment.md"
BEGIN, END = "<!-- ray, by benchmarks.ray_latency -->", "<!-- end of ray -->"
SPEC = "benchmarks.support.load_networks:mlp_and_input"
PLAIN, RAY = "one server", "Ray Serve"


@contextmanager
def plain() -> Iterator[str]:
    """Run ``torchsurgeon serve``; yields its URL once it is ready."""
    command = [sys.executable, "-m", "torchsurgeon", "serve", f"net={SPEC}", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield next(line for line in process.stdout if line.startswith("ready: ")).split()[-1]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def by_ray() -> Iterator[str]:
    """Serve by a local Ray; yields the URL."""
    import ray

    from torchsurgeon.serve import ray as on_ray

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"PYTHONPATH": os.environ.get("PYTHONPATH", str(Path.cwd()))}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        on_ray.run(RayOptions({"net": SPEC}, max_replicas=1), port=port, blocking=False)
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()


def compare(rounds: int, seconds: float) -> dict[str, Any]:
    """Return by server the spreads of the median and of the 99th percentile of the time to an answer."""
    model, args = mlp_and_input()
    graph = trace(model.eval(), *args)
    samples: dict[str, list[tuple[float, float]]] = {PLAIN: [], RAY: []}
    with ExitStack() as stack:
        urls = {PLAIN: stack.enter_context(plain()), RAY: stack.enter_context(by_ray())}
        for index in range(rounds + 1):
            for label in sorted(urls, reverse=bool(index % 2)):
                target = Target.at(urls[label])
                run = drive(target, cut_requests(target, "net", graph, args), None, devices=1, seconds=seconds)
                if run.errors:
                    raise RuntimeError(f"{dict(run.errors)} {dict(run.reasons)}")
                if index:  # the first round is the warm-up
                    samples[label].append((quantile(run.latencies_s, 50), quantile(run.latencies_s, 99)))
    rows: dict[str, Any] = {
        label: {"median_s": spread([one for one, _ in of_each]), "p99_s": spread([one for _, one in of_each])}
        for label, of_each in samples.items()
    }
    pairs = zip(samples[RAY], samples[PLAIN], strict=True)
    rows["added_s"] = spread([slow[0] - quick[0] for slow, quick in pairs])
    print(rows, flush=True)
    return rows


def page(results: Mapping[str, Any]) -> str:
    """Return the table of both, as Markdown."""
    lines = [(label, *(_milliseconds(results[label][key]) for key in ("median_s", "p99_s"))) for label in (PLAIN, RAY)]
    lines.append(("added by Ray Serve", _milliseconds(results["added_s"]), ""))
    return table(("one request after the other, by", "median, ms", "99th percentile, ms"), lines) + "\n"


def _milliseconds(row: Mapping[str, float]) -> str:
    return f"{row['median'] * 1e3:.2f} ({row['q1'] * 1e3:.2f} … {row['q3'] * 1e3:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(options.rounds, options.seconds)
    write(options.out, rows, ray=metadata.version("ray"), rounds=options.rounds, seconds=options.seconds)
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, page(rows))


if __name__ == "__main__":
    main()
