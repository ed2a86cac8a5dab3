"""A split model in programs of many tasks and threads: web applications, cancelled requests, thread pools."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest
import requests
import torch
from classifier import EXAMPLE, PATIENCE_S, right, split_of, truth
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from transports import Held

import torchsurgeon as ts
from torchsurgeon.serve import Server
from torchsurgeon.transport import HttpTransport

INPUTS = torch.rand(12, 3, 32, 32).split(1)
TRUTHS = [truth(x) for x in INPUTS]


def are_right(answers: Any) -> bool:
    return all(torch.equal(answer, own) for answer, own in zip(answers, TRUTHS, strict=True))


@pytest.fixture
def held(server: Server) -> Iterator[Held]:
    with Held(HttpTransport(server.url)) as transport:
        yield transport
        transport.go.set()


@pytest.fixture
def split(held: Held) -> Iterator[ts.SplitModule]:
    """A split model whose requests can be held up. Nothing is computed here instead, however long that lasts."""
    with split_of(held, partition=2, fallback="error") as module:
        assert right(module)
        yield module


async def until_begun(held: Held) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not held.begun.is_set():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.001)


# --- tasks ---


async def cancel(split: ts.SplitModule, held: Held) -> None:
    task = asyncio.create_task(split.acall(EXAMPLE))
    await until_begun(held)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def run_out_of_time(split: ts.SplitModule, held: Held) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(split.acall(EXAMPLE), 0.01)


async def leave_an_anyio_scope(split: ts.SplitModule, held: Held) -> None:
    with anyio.move_on_after(0.01) as scope:
        await split.acall(EXAMPLE)
    assert scope.cancelled_caught


async def cancel_more_than_can_be_in_flight(split: ts.SplitModule, held: Held) -> None:
    tasks = [asyncio.create_task(split.acall(EXAMPLE)) for _ in range(40)]
    await until_begun(held)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended)


@pytest.mark.parametrize("give_up", [cancel, run_out_of_time, leave_an_anyio_scope, cancel_more_than_can_be_in_flight])
def test_calls_after_a_cancelled_one_are_right(
    split: ts.SplitModule, held: Held, give_up: Callable[[ts.SplitModule, Held], Awaitable[None]]
) -> None:
    async def main() -> list[torch.Tensor]:
        held.hold()
        await give_up(split, held)
        held.go.set()
        return await asyncio.gather(*map(split.acall, INPUTS))

    assert are_right(asyncio.run(main()))
    assert right(split)


def test_a_loop_that_ends_before_the_answer_comes_harms_no_later_call(split: ts.SplitModule, held: Held) -> None:
    async def main() -> None:
        held.hold()
        task = asyncio.create_task(split.acall(EXAMPLE))
        await until_begun(held)
        task.cancel()

    asyncio.run(main())
    held.go.set()
    assert right(split)


# --- threads ---


def test_a_pool_of_threads_and_a_loop_share_a_split(split: ts.SplitModule) -> None:
    async def main() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(6) as pool:
            in_threads = [loop.run_in_executor(pool, split, x) for x in INPUTS]
            return await asyncio.gather(*in_threads), await asyncio.gather(*map(split.acall, INPUTS))

    assert all(map(are_right, asyncio.run(main())))


def test_threads_of_anyio_share_a_split(split: ts.SplitModule) -> None:
    answers: dict[int, torch.Tensor] = {}

    async def answer(number: int) -> None:
        answers[number] = await anyio.to_thread.run_sync(split, INPUTS[number])

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for number in range(len(INPUTS)):
                group.start_soon(answer, number)

    anyio.run(main)
    assert are_right(answers[number] for number in range(len(INPUTS)))


# --- a web application ---


def application(split: ts.SplitModule, cancelled: list[bool]) -> Starlette:
    """Answers in the event loop, in a thread of a pool as FastAPI does, and as a stream that may be broken off."""

    async def in_loop(request: Request) -> JSONResponse:
        return JSONResponse((await split.acall(INPUTS[request.path_params["number"]])).tolist())

    def in_thread(request: Request) -> JSONResponse:
        return JSONResponse(split(INPUTS[request.path_params["number"]]).tolist())

    async def as_stream(request: Request) -> StreamingResponse:
        async def lines() -> Any:
            try:
                yield str((await split.acall(EXAMPLE)).tolist())
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        return StreamingResponse(lines())

    return Starlette(
        routes=[
            Route("/loop/{number:int}", in_loop),
            Route("/thread/{number:int}", in_thread),
            Route("/stream", as_stream),
        ]
    )


def test_requests_to_a_web_application_are_right_after_a_client_has_gone(split: ts.SplitModule, held: Held) -> None:
    cancelled: list[bool] = []
    with Server(application(split, cancelled)) as web:
        held.hold()
        with socket.create_connection(("127.0.0.1", web.port)) as client:
            client.sendall(b"GET /stream HTTP/1.1\r\nHost: test\r\n\r\n")
            assert held.begun.wait(PATIENCE_S)
        end_s = time.monotonic() + PATIENCE_S
        while not cancelled:
            assert time.monotonic() < end_s
            time.sleep(0.001)
        held.go.set()
        for where in ("loop", "thread"):
            urls = [f"{web.url}/{where}/{number}" for number in range(len(INPUTS))]
            with requests.Session() as session, ThreadPoolExecutor(6) as clients:
                session.trust_env = False  # no proxy that the environment names
                answers = list(clients.map(lambda url: session.get(url, timeout=PATIENCE_S).json(), urls))
            assert are_right(map(torch.tensor, answers))
