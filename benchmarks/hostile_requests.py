"""A running server against requests that were damaged at random, and connections that are slow or say nothing.

The server is a process of its own, as ``torchsurgeon serve`` starts it. First, valid requests of every kind are
damaged: bytes and lines are changed, left out, doubled and moved, numbers are made extreme, bodies are cut off. Each is
sent, and then the sending side of the connection is closed, so that the server has to answer or close at once.
Meanwhile a good client is answered, bit for bit, after every hundred of them. Memory, descriptors and threads of the
server are read after a tenth of the requests, and at the end.

Then very many connections are opened: a third of them say nothing, a third send the head of a request and a third its
body, a byte at a time. A client that was there before, and health checks on new connections, go on all the while.

    python -m benchmarks.hostile_requests [--requests 100000] [--connections 1000] [--seconds 20]

Printed and written are the answers by status, what the server's process grew by, and how long the good client and the
health checks waited.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hostile_bytes
from benchmarks.support.result_file import RESULTS, known, show, write
from torchsurgeon import wire
from torchsurgeon.codec import find_codec
from torchsurgeon.transport import HttpTransport

OUT = RESULTS / "hostile_requests.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "load.md"
BEGIN, END = "<!-- begin hostile -->", "<!-- end hostile -->"
_THREADS = 4
_PATIENCE_S = 10.0
_EXTREME = (b"0", b"-1", b"1e999", b"NaN", b"99999999999999999999", b"4294967296", b"0x10", b"", b"true", b"[]", b'"a"')


def model() -> tuple[nn.Module, Tensor]:
    """The served model; torchsurgeon serve names it benchmarks.hostile_requests:model."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), torch.rand(1, 3, 8, 8)


@contextlib.contextmanager
def server() -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its process and its port."""
    command = [sys.executable, "-m", "torchsurgeon", "serve", "net=benchmarks.hostile_requests:model"]
    command += ["--port", "0", "--threads", "1", "--metrics"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = re.match(r"ready: .*:(\d+)\n", line)
                if found:
                    yield process.pid, int(found[1])
                    break
            if process.poll() is not None:
                raise SystemExit(f"the server ended by itself with {process.returncode}")
        finally:
            process.terminate()


def usage(pid: int) -> dict[str, int]:
    """Resident memory, descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib, threads = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads"))
    return {"resident_bytes": kib << 10, "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": threads}


def valid() -> list[bytes]:
    """Valid requests of every kind."""
    x = torch.rand(1, 3, 8, 8)
    found = [
        b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2/models/net/versions/1 HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n\r\n",
        b"GET /v2/models/net/fingerprint HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2/probe?down=1000 HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n" + b"a" * 20,
    ]
    for tensors, codec in (
        ({"input": x}, "raw"),
        ({"input": x}, "int8+zstd"),
        ({"1": torch.rand(2, 4, 6, 6)}, "raw"),
        ({"2": torch.rand(1, 144)}, "int4"),
    ):
        encoded = wire.encode_request(tensors, codecs=dict.fromkeys(tensors, find_codec(codec)), crc32=codec == "raw")
        body = b"".join(bytes(part) for part in encoded.buffers)
        lines = f"Content-Length: {len(body)}\r\nInference-Header-Content-Length: {encoded.header_bytes}\r\n"
        found.append(b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n" + lines.encode() + b"\r\n" + body)
    told = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": x.flatten().tolist()}]}
    body = json.dumps(told).encode()
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n"
    found.append(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:99], body[99:]))
    found.append(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    found.append(head + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return found


def damaged(data: bytes, others: list[bytes], source: random.Random) -> bytes:
    """Return a request with a few random changes."""
    text = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(text) + 1)
        end = min(len(text), at + source.choice((1, 2, 8, 64, 1024)))
        kind = source.randrange(8)
        if kind == 0 and at < len(text):
            text[at] = source.randrange(256)
        elif kind == 1:
            del text[at:end]
        elif kind == 2:
            text[at:at] = text[at:end]
        elif kind == 3:
            text[at:at] = source.randbytes(end - at)
        elif kind == 4:
            del text[at:]
        elif kind == 5:
            other = source.choice(others)
            text[at:end] = other[source.randrange(len(other)) :][: end - at]
        elif kind == 6:
            numbers = list(re.finditer(rb"\d+", text[:1500]))
            if numbers:
                number = source.choice(numbers)
                text[number.start() : number.end()] = source.choice(_EXTREME)
        else:
            lines = bytes(text).split(b"\r\n")
            lines.insert(source.randrange(len(lines)), source.choice(lines))
            text[:] = b"\r\n".join(lines)
    return bytes(text)


def send(port: int, data: bytes) -> str:
    """Send what is no request any more, and return how it was answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as link:
        received = b""
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            while piece := link.recv(1 << 16):
                received += piece
        except TimeoutError:
            return "nothing in time"
        except OSError:
            pass  # the server has closed before it had read everything, which is its right
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    if not received:
        return "closed"
    return found[1].decode() if found else "no HTTP"


def fuzz(pid: int, port: int, count: int) -> dict[str, Any]:
    """Send damaged requests, and return what became of them and of the server."""
    requests, counts, lock = valid(), Counter[str](), threading.Lock()
    left = iter(range(count))
    early: dict[str, int] = {}
    wrong: list[str] = []
    x = torch.rand(1, 3, 8, 8)

    def work(number: int) -> None:
        source = random.Random(number)
        with HttpTransport(f"http://127.0.0.1:{port}", _PATIENCE_S) as good:
            right = good.infer("net", {"input": x}, max_answer_bytes=1 << 16).tensors["output"]
            while not wrong:
                with lock:
                    n = next(left, None)
                    if n == count // 10:
                        early.update(usage(pid))
                if n is None:
                    return
                answer = send(port, damaged(source.choice(requests), requests, source))
                with lock:
                    counts[answer] += 1
                if n % 100 == 0:
                    again = good.infer("net", {"input": x}, max_answer_bytes=1 << 16).tensors["output"]
                    if not torch.equal(again, right):
                        wrong.append("a good request was answered otherwise than before")

    begun_s = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - begun_s
    time.sleep(1.0)
    late = usage(pid)
    if wrong:
        raise SystemExit(wrong[0])
    grown = {name: late[name] - early[name] for name in late}
    return {"requests": count, "took_s": took_s, "answers": dict(sorted(counts.items())), "after": late, "grown": grown}


def crowd(port: int, count: int, seconds: float) -> dict[str, Any]:
    """Hold very many slow and silent connections open, and return how a good client fares meanwhile."""
    x = torch.rand(1, 3, 8, 8)
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    kinds = (b"", head, head + b"\r\n" + b" " * 500)
    links: list[tuple[socket.socket, bytes]] = []
    established_s: list[float] = []
    health_s: list[float] = []
    with HttpTransport(f"http://127.0.0.1:{port}", _PATIENCE_S) as good, contextlib.ExitStack() as stack:

        def timed_infer() -> None:
            begun_s = time.perf_counter()
            good.infer("net", {"input": x}, max_answer_bytes=1 << 16)
            established_s.append(time.perf_counter() - begun_s)

        def timed_health() -> None:
            begun_s = time.perf_counter()
            answer = send(port, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            if answer != "200":
                raise SystemExit(f"a health check was answered with {answer}")
            health_s.append(time.perf_counter() - begun_s)

        timed_infer()
        for number in range(count):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S))
            link.setblocking(False)
            links.append((link, kinds[number % 3]))
            if number % 50 == 0:
                timed_infer()
                timed_health()
        sent, end_s = 0, time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            for link, text in links:
                if sent < len(text):
                    # Those that the server has closed meanwhile are left alone.
                    with contextlib.suppress(OSError):
                        link.send(text[sent : sent + 1])
            sent += 1
            for _ in range(5):
                timed_infer()
                timed_health()
                time.sleep(0.02)
    return {
        "connections": count,
        "seconds": seconds,
        "established": _waits(established_s),
        "health": _waits(health_s),
    }


def _waits(found_s: list[float]) -> dict[str, float]:
    return {"answers": len(found_s), "median_s": statistics.median(found_s), "longest_s": max(found_s)}


def page(found: dict[str, Any], decoders: dict[str, Any]) -> str:
    """Return what the page says of the results."""
    fuzzed, crowded = found["fuzzed"], found["crowded"]
    grown, many = fuzzed["grown"], f"{crowded['connections']:,} slow and silent connections"
    growth = (
        f"{grown['resident_bytes'] / 1e6:+.1f} MB, {grown['descriptors']:+d} descriptors, {grown['threads']:+d} threads"
    )
    rows = {
        f"{fuzzed['requests']:,} damaged requests to a running server": ", ".join(
            f"{status}: {count:,}" for status, count in fuzzed["answers"].items()
        ),
        "by what the server's process grew, from a tenth of them to the last": growth,
        f"a client that was there before {many}": _waits_text(crowded["established"]),
        "health checks on new connections meanwhile": _waits_text(crowded["health"]),
    }
    words = {"request": "the decoder of requests", "response": "the decoder of answers", "connection": "a connection"}
    for name, row in decoders.items():
        rows[f"{row['tried']:,} coverage-guided texts to {words[name]}"] = f"{row['corpus']} are kept for the tests"
    return "\n".join(["| what | found |", "|---|---|", *(f"| {what} | {text} |" for what, text in rows.items())])


def _waits_text(row: dict[str, float]) -> str:
    median_ms, longest_ms = row["median_s"] * 1e3, row["longest_s"] * 1e3
    return f"all {row['answers']:,} answered, median {median_ms:.1f} ms, longest {longest_ms:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with server() as (pid, port):
        fuzzed = fuzz(pid, port, options.requests)
        print(json.dumps(fuzzed, indent=1), flush=True)
        crowded = crowd(port, options.connections, options.seconds)
        print(json.dumps(crowded, indent=1), flush=True)
    write(options.out, {"fuzzed": fuzzed, "crowded": crowded})
    bad = {"nothing in time", "no HTTP", "500"} & set(fuzzed["answers"])
    if bad:
        raise SystemExit(f"some requests had no proper answer: {', '.join(sorted(bad))}")
    if options.out == OUT:
        show(PAGE, BEGIN, END, page(known(OUT), known(hostile_bytes.OUT)))


if __name__ == "__main__":
    main()
