"""What an access log, metrics and tokens cost a server: its processor time a request, with each of them and without.

The servers are up in one process the whole time, each with one of these, and answer for the same network: an MLP whose
requests take no time worth mentioning, so that a cost shows as much as it can. A round has the servers answer in a new
random order, for a fraction of a second each, to connections of another process that send the next request once they
have the answer. What is compared is the processor time of the server's process, round by round: that is not longer
where other programs use the cores.

    python -m benchmarks.server_costs [--rounds 60] [--seconds 0.3] [--connections 20]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.evaluate.markdown import table
from benchmarks.server_rivals import request
from benchmarks.support import result_file
from benchmarks.support.load_client import serve_client
from benchmarks.support.load_networks import network
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.servers import begin
from benchmarks.support.side_by_side import spread
from benchmarks.support.tail_process import apart
from torchsurgeon import wire
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.access import AccessLog, access
from torchsurgeon.serve.app import TailApp
from torchsurgeon.serve.logs import log_handler
from torchsurgeon.serve.metrics import Metrics
from torchsurgeon.serve.tokens import Tokens

OUT = RESULTS / "server_costs.json"
PAGE = RESULTS.parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- costs, by benchmarks.server_costs -->", "<!-- end of costs -->"
NETWORK = "an MLP of three layers"
BARE, AGAIN = "none of these", "none of these, once more"
LOG, METRICS, TOKEN = "an access log", "metrics", "a token"
BOTH = "metrics and a token"
WAYS = (BARE, AGAIN, LOG, METRICS, TOKEN, BOTH)
_SECRET = "a-token-of-this-benchmark"


def serve(told: Any) -> None:
    """Serve the network in all ways, and tell each one's process, port and request."""
    begin(None)
    found = network(NETWORK)
    message = wire.encode_request(found.tensors)
    body = b"".join(bytes(one) for one in message.buffers)
    length = f"{wire.HEADER_LENGTH}: {message.header_bytes}\r\n"
    registry = ModelRegistry(profiler=None, batching="rounded")
    registry.add("net", found.model, found.x)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        access.addHandler(log_handler(stack.enter_context(open(folder / "log", "w")), "text"))
        (folder / "tokens").write_text(_SECRET)
        ports = {}
        for way in WAYS:
            app = create_app(registry)
            _add(way, app, folder)
            token = f"Authorization: Bearer {_SECRET}\r\n" if way in (TOKEN, BOTH) else ""
            port = stack.enter_context(Server(app)).port
            ports[way] = (os.getpid(), port, request("/v2/models/net/infer", body, length + token))
        told.send(ports)
        signal.pause()


def _add(way: str, app: TailApp, folder: Path) -> None:
    if way == LOG:
        app.listeners.append(AccessLog())
    if way in (METRICS, BOTH):
        app.listeners.append(Metrics(app.registry, lambda: 0))
    if way in (TOKEN, BOTH):
        app.tokens = Tokens(folder / "tokens")


def compare(rounds: int, seconds: float, connections: int) -> dict[str, Any]:
    """Return by way the spread of the processor time a request, and of how much more than without that is."""
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    with apart(serve) as server, apart(serve_client) as client:
        ports = server.recv()
        order = list(WAYS)
        for index in range(rounds + 2):
            random.Random(index).shuffle(order)
            for way in order:
                client.send((*ports[way], connections, seconds))
                found = client.recv()
                if index >= 2:  # before that it is warm-up
                    samples[way].append(found["processor_s"])
    rows = {}
    for way, taken_s in samples.items():
        more = [one / bare - 1 for one, bare in zip(taken_s, samples[BARE], strict=True)]
        rows[way] = {"processor_s": spread(taken_s), "more": spread(more)}
        print(f"{way}: {rows[way]['processor_s']['median'] * 1e6:.1f} µs, {rows[way]['more']}", flush=True)
    return rows


def page(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the table of what each costs, as Markdown."""
    lines = []
    for way, row in results.items():
        took, more = row["processor_s"], row["more"]
        shown = f"{more['median']:+.1%} ({more['q1']:+.1%} … {more['q3']:+.1%})" if way != BARE else ""
        lines.append((way, f"{took['median'] * 1e6:.0f}", shown))
    return table(("with", "processor time a request, µs", "more than without"), lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = compare(options.rounds, options.seconds, options.connections)
    write(options.out, rows, rounds=options.rounds, seconds=options.seconds, connections=options.connections)
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, page(rows))


if __name__ == "__main__":
    main()
