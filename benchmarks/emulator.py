"""How close the emulated link is to the one asked for, beside the usual proxy that sleeps after each chunk.

Prints and writes, for each preset and transfer, the time asked for and the median and quartiles of the time measured.
Both proxies run in this process, in turns within each round.

    python -m benchmarks.emulator [--repeats 9] [--out benchmarks/results/emulator.json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import PRESETS, Link

HEADER_BYTES = 8
RATE_SPAN_S = 0.5


def answer_as_asked(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = connection.makefile("rb")
    while header := stream.read(HEADER_BYTES):
        stream.read(int.from_bytes(header[:4], "big"))
        connection.sendall(bytes(int.from_bytes(header[4:], "big")))


def serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer_as_asked, args=(connection,), daemon=True).start()


def request_s(connection: socket.socket, up_bytes: int, down_bytes: int) -> float:
    start_s = time.perf_counter()
    sizes = (up_bytes - HEADER_BYTES).to_bytes(4, "big") + down_bytes.to_bytes(4, "big")
    connection.sendall(sizes + bytes(up_bytes - HEADER_BYTES))
    while down_bytes:
        down_bytes -= len(connection.recv(1 << 20))
    return time.perf_counter() - start_s


async def sleep_after_each_chunk(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate_bit_s: float, delay_s: float
) -> None:
    chunk_bytes = max(int(rate_bit_s * 2e-3 / 8), 1500)
    while data := await reader.read(chunk_bytes):
        await asyncio.sleep(len(data) * 8 / rate_bit_s)
        asyncio.get_running_loop().call_later(delay_s, writer.write, data)
    writer.close()


@contextlib.contextmanager
def sleeping_proxy(target_port: int, link: Link) -> Iterator[int]:
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target_port)
        await asyncio.gather(
            sleep_after_each_chunk(reader, server_writer, link.uplink_bit_s, link.round_trip_s / 2),
            sleep_after_each_chunk(server_reader, writer, link.downlink_bit_s, link.round_trip_s / 2),
        )
        ended.set()

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(asyncio.wait_for(ended.wait(), 10), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def measure(target_port: int, link: Link, repeats: int) -> list[dict[str, Any]]:
    transfers = {
        "round trip": (HEADER_BYTES, 1),
        "150 KB up, 4 KB down": (150_000, 4_000),
        "uplink": (int(link.uplink_bit_s * RATE_SPAN_S / 8), 1),
        "downlink": (HEADER_BYTES, int(link.downlink_bit_s * RATE_SPAN_S / 8)),
    }
    rows = []
    with (
        LinkEmulator(0, "127.0.0.1", target_port, link) as emulator,
        sleeping_proxy(target_port, link) as sleeping_port,
    ):
        ports = {"emulator": emulator.port, "asyncio sleep": sleeping_port}
        connections = {name: socket.create_connection(("127.0.0.1", port)) for name, port in ports.items()}
        for connection in connections.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request_s(connection, HEADER_BYTES, 1)
        for transfer, (up_bytes, down_bytes) in transfers.items():
            times_s: dict[str, list[float]] = {name: [] for name in connections}
            for _ in range(repeats):
                for name, connection in connections.items():
                    times_s[name].append(request_s(connection, up_bytes, down_bytes))
            asked_s = link.request_s(up_bytes, down_bytes)
            for name, samples_s in times_s.items():
                low_s, median_s, high_s = statistics.quantiles(samples_s, n=4)
                row = {"link": link.name, "transfer": transfer, "proxy": name, "asked_s": asked_s, "median_s": median_s}
                rows.append(row | {"quartiles_s": [low_s, high_s], "ratio": median_s / asked_s, "samples_s": samples_s})
                print(
                    f"{link.name:11}{transfer:22}{name:15}{asked_s * 1e3:9.2f} ms asked{median_s * 1e3:10.2f} ms "
                    f"({low_s * 1e3:.2f}-{high_s * 1e3:.2f}){median_s / asked_s:8.3f}",
                    flush=True,
                )
        for connection in connections.values():
            connection.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "emulator.json")
    arguments = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    rows = [row for link in PRESETS.values() for row in measure(listener.getsockname()[1], link, arguments.repeats)]
    write(arguments.out, rows)


if __name__ == "__main__":
    main()
