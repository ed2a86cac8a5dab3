"""Whatever a server does, a split model answers, with the model's own bits, says why, and goes back to the server."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, PATIENCE_S, degraded, net, remote, right, serve, truth, until
from classifier import split_of as split_anywhere
from factories import Slow
from serving import process
from tcp import listening, read_message, reserved_port
from transports import Relay

import torchsurgeon as ts
from torchsurgeon.serve import Server
from torchsurgeon.transport import Answer, HttpTransport, Transport
from torchsurgeon.transport.deadline import Deadline

pytestmark = pytest.mark.usefixtures("patient")


class Gate:
    """Stands before a server and lets its traffic through, or does to it what ``fault`` says."""

    def __init__(self, port: int) -> None:
        self.port_behind = port
        self.fault = "none"
        self.url = ""

    def attend(self, device: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.port_behind)) as link:
            while message := read_message(device):
                request = bytearray(b"\r\n\r\n".join(message))
                fault = self.fault if self.fault != "none" else None
                if fault == "black hole":
                    while self.fault == "black hole":
                        time.sleep(0.02)
                    return
                if fault == "reset":
                    device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if fault in STATUS:
                    device.sendall(STATUS[fault])
                    continue
                if fault == "flipped going":
                    request[-40] ^= 4
                link.sendall(request)
                message = read_message(link)
                if message is None:
                    return
                answer = bytearray(b"\r\n\r\n".join(message))
                if fault == "flipped coming":
                    answer[-9] ^= 16
                if fault == "cut short":
                    device.sendall(answer[: len(answer) * 2 // 3])
                    return
                if fault == "a byte at a time":
                    for i in range(len(answer)):
                        if self.fault != fault:
                            return
                        device.sendall(answer[i : i + 1])
                        time.sleep(0.1)
                device.sendall(answer)


STATUS = {
    "500": b'HTTP/1.1 500 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "503": b'HTTP/1.1 503 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "400": b'HTTP/1.1 400 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "404": b'HTTP/1.1 404 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}',
    "a lie": b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n[1, 2]",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}
FAULTS = {
    "reset": "unavailable",
    "cut short": "unavailable",
    "flipped going": "refused",
    "flipped coming": "damaged",
    "a byte at a time": "late",
    "black hole": "late",
    "500": "refused",
    "503": "refused",
    "400": "refused",
    "404": "refused",
    "a lie": "damaged",
    "not HTTP": "unavailable|damaged",
}


@contextmanager
def gate(port: int) -> Iterator[Gate]:
    one = Gate(port)
    with listening(one.attend) as own_port:
        one.url = f"http://127.0.0.1:{own_port}"
        try:
            yield one
        finally:
            one.fault = "none"


def split_of(where: Any, **options: Any) -> ts.SplitModule:
    return split_anywhere(where, **{"partition": "stem", **options})


def answered(split: ts.SplitModule) -> bool:
    """Whether an answer is right. Called from here, so that a warning has to name this file."""
    x = torch.rand(1, 3, 8, 8)
    return torch.equal(split(x), truth(x))


def answers(split: ts.SplitModule, count: int = 1) -> None:
    assert all(answered(split) for _ in range(count))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_answered_named_and_left_behind(server: Server, fault: str) -> None:
    with gate(server.port) as before, split_of(before.url) as split:
        answers(split, 3)
        assert remote(split)
        before.fault = fault
        answers(split)
        assert re.match(f"({FAULTS[fault]}): ", degraded(split)), degraded(split)
        assert split.last is not None
        assert split.last.local_s > 0
        assert split.last.server is None
        until(lambda: degraded(split).startswith("unserved: "), split)
        assert split.stats()["servers"][0]["breaker"] != "closed"
        before.fault = "none"
        until(lambda: remote(split), split)
        assert split.stats()["degraded"]["unserved"] >= 1


@pytest.mark.parametrize("url", ["refused", "http://no-such-host.invalid:8000"])
def test_a_server_that_was_never_there_is_no_reason_not_to_answer(url: str) -> None:
    for partition in ("stem", "auto"):
        with reserved_port() as port:
            where = f"http://127.0.0.1:{port}" if url == "refused" else url
            split = split_of(where, partition=partition)
            with pytest.warns(ts.NoServerWarning, match="no server is in use, so the device answers alone") as caught:
                answers(split, 3)
            of_none = [warning.filename for warning in caught if issubclass(warning.category, ts.NoServerWarning)]
            assert of_none == [__file__]
            assert "unavailable" in degraded(split)
            assert split.stats()["degraded"] == {"unserved": 3}


@pytest.mark.filterwarnings("error::torchsurgeon.NoServerWarning")
def test_a_call_with_little_time_does_not_tell_of_servers_that_may_still_answer(server: Server) -> None:
    model = net()
    with gate(server.port) as before, split_of(before.url, model=model, partition="stem") as split:
        assert right(split, model=model)
        before.fault = "black hole"
        model.stem.bias = torch.nn.Parameter(model.stem.bias + 1)
        with split.deadline(0.5):
            assert right(split, model=model)
            assert right(split, model=model)
        assert "unready" in degraded(split)


def test_a_server_that_comes_up_later_is_used_from_then_on() -> None:
    with reserved_port() as port, split_of(f"http://127.0.0.1:{port}") as split:
        answers(split)
        with serve(port=port):
            until(lambda: remote(split), split)


def test_another_model_on_the_server_is_never_used_and_warned_of_once() -> None:
    with reserved_port() as port, serve(port=port) as first, split_of(first) as split:
        answers(split)
        first.stop()
        with serve(net(7), port):
            with pytest.warns(ts.MismatchWarning, match=r"stem\.weight") as caught:
                until(lambda: "mismatch" in degraded(split), split, answered)
            assert [warning.filename for warning in caught] == [__file__]
            answers(split, 3)
            assert not remote(split)
        with serve(port=port):
            until(lambda: remote(split), split)


def test_the_wrong_model_from_the_start_is_warned_of() -> None:
    with serve(net(7)) as running, split_of(running.url) as split:
        with pytest.warns(ts.MismatchWarning, match="Serve the weights") as caught:
            answers(split)
        assert [warning.filename for warning in caught] == [__file__]
        answers(split)
        assert "mismatch" in degraded(split)


@pytest.mark.parametrize("partition", ["stem", "act"])
def test_weights_that_change_here_give_the_new_models_answers(server: Server, partition: str) -> None:
    model = net()
    with split_of(server, model=model, partition=partition) as split:
        assert right(split, model=model)
        model.stem.bias = torch.nn.Parameter(model.stem.bias + 1)
        with torch.no_grad():
            model.head.weight.mul_(2)
        assert right(split, model=model)
        assert degraded(split).startswith("weights: ")
        with pytest.warns(ts.MismatchWarning):
            assert right(split, model=model)
        model.load_state_dict(net().state_dict())
        until(lambda: remote(split), split)


def test_the_next_of_several_servers_is_asked(server: Server) -> None:
    with gate(server.port) as one, gate(server.port) as two, split_of([one.url, two.url]) as split:
        answers(split, 3)
        assert split.last is not None
        assert split.last.server == one.url
        one.fault = "reset"
        answers(split)
        assert split.last.server == two.url
        assert degraded(split).startswith("unavailable: ")
        answers(split, 3)
        two.fault = "500"
        until(lambda: split.last is not None and split.last.server is None, split)
        two.fault = "none"
        until(lambda: remote(split), split)
        assert split.last.server == two.url


def test_a_refusal_of_what_was_put_in_is_not_held_against_the_server(server: Server) -> None:
    with split_of(server) as split:
        answers(split)
        for _ in range(4):
            assert right(split, EXAMPLE.repeat(70, 1, 1, 1))
            assert degraded(split).startswith("refused: ")
        answers(split)
        assert remote(split)
        with pytest.raises(RuntimeError):
            split(EXAMPLE.double())


def test_what_a_server_refuses_is_counted_as_sent_and_not_sent_again(server: Server) -> None:
    large = EXAMPLE.repeat(70, 1, 1, 1)
    with split_of(server) as split:
        answers(split)
        before = split.stats()["sent_bytes"]
        assert right(split, large)
        refused = split.stats()["sent_bytes"]
        assert refused > before
        for _ in range(3):
            assert right(split, large)
            assert degraded(split).startswith("refused: ")
        assert split.stats()["sent_bytes"] == refused
        split.prepare()  # shakes hands again: another server may be there by now
        assert right(split, large)
        assert split.stats()["sent_bytes"] > refused


@pytest.mark.parametrize("fallback", ["local", "error"])
def test_no_other_server_is_asked_where_that_would_send_more_than_is_allowed(server: Server, fallback: Any) -> None:
    bound = 2.5 * EXAMPLE.nbytes
    with gate(server.port) as one, gate(server.port) as two:
        options = {"partition": "server", "hourly_bytes": bound, "fallback": fallback}
        with split_of([one.url, two.url], **options) as split:
            assert right(split)
            one.fault = "500"
            if fallback == "local":
                assert right(split)
                assert degraded(split).startswith("refused: ")
                assert "hourly_bytes" in degraded(split)
            else:
                with pytest.raises(ts.ServerUnavailableError, match=f"{two.url} is not asked.*hourly_bytes"):
                    split(EXAMPLE)
            assert split.stats()["sent_bytes"] <= bound
            assert split.stats()["servers"][1]["sent_bytes"] == 0


@pytest.mark.parametrize("bound", [None, 2.5 * EXAMPLE.nbytes, 3.5 * EXAMPLE.nbytes])
def test_a_request_over_a_kept_connection_that_breaks_is_sent_once_more_unless_that_is_above_what_is_allowed(
    server: Server, bound: float | None
) -> None:
    allowed = bound is None or bound > 3 * EXAMPLE.nbytes
    with gate(server.port) as before, split_of(before.url, partition="server", hourly_bytes=bound) as split:
        assert right(split)
        before.fault = "reset"
        assert right(split)
        assert degraded(split).startswith("unavailable: ")
        sent = split.stats()["sent_bytes"]
        assert sent >= 3 * EXAMPLE.nbytes if allowed else sent < 3 * EXAMPLE.nbytes
        assert bound is None or sent <= bound


class Restarted(Relay):
    """Answers with another identity than the handshake told of, as a server that was restarted does."""

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        answer = super().infer(model, tensors, **options)
        return Answer(answer.tensors, {**answer.parameters, "identity": "another"}, answer.timing)


def test_a_server_that_was_restarted_is_not_sent_the_request_again_above_what_is_allowed(server: Server) -> None:
    bound = 1.5 * EXAMPLE.nbytes
    with (
        HttpTransport(server.url) as inner,
        split_of(Restarted(inner), partition="server", hourly_bytes=bound) as split,
    ):
        assert right(split)
        assert "hourly_bytes" in degraded(split)
        assert split.stats()["sent_bytes"] <= bound


@pytest.mark.filterwarnings("ignore::torchsurgeon.MismatchWarning")
@pytest.mark.parametrize("again", [True, False])
def test_both_requests_to_a_restarted_server_count_where_the_transport_counts_its_answers_only(
    server: Server, again: bool
) -> None:
    class Uncounted(Restarted):
        def infer(self, *args: Any, **options: Any) -> Answer:
            return super().infer(*args, **options | {"deadline": Deadline(PATIENCE_S)})

    bound = (2.5 if again else 1.5) * EXAMPLE.nbytes
    with (
        HttpTransport(server.url) as inner,
        split_of(Uncounted(inner), partition="server", hourly_bytes=bound) as split,
    ):
        assert right(split)
        sent = split.stats()["sent_bytes"] / EXAMPLE.nbytes
        assert 2 < sent < 2.5 if again else 1 < sent < 1.5


def test_a_restarted_server_is_not_sent_the_request_again_where_others_have_reserved_what_is_left(
    server: Server,
) -> None:
    class Busy(Restarted):
        def infer(self, *args: Any, **options: Any) -> Answer:
            split._engine.servers._allowance.reserve(self, 2 * EXAMPLE.nbytes)
            return super().infer(*args, **options)

    bound = 3.5 * EXAMPLE.nbytes
    with (
        HttpTransport(server.url) as inner,
        split_of(Busy(inner), partition="server", hourly_bytes=bound) as split,
    ):
        assert right(split)
        assert "hourly_bytes" in degraded(split)
        assert split.stats()["sent_bytes"] <= bound - 2 * EXAMPLE.nbytes


class Choosy(Relay):
    """Refuses what is encoded by ``refused``, and keeps the codecs of the requests that came."""

    refused = "zstd"

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.came: list[str] = []

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        (codec,) = {codec.name for codec in options["codecs"].values()}
        self.came.append(codec)
        if codec == self.refused:
            raise ts.RequestRefusedError(f"it does not take {codec}", 400)
        return super().infer(model, tensors, **options)


def test_a_refusal_holds_for_the_codec_in_which_the_request_came(server: Server) -> None:
    twice = EXAMPLE.repeat(2, 1, 1, 1)
    with HttpTransport(server.url) as inner:
        between = Choosy(inner)
        with split_of(between, codec="zstd") as split:
            for _ in range(2):
                assert right(split, twice)
                assert degraded(split).startswith("refused: ")
            assert between.came.count("zstd") == 1
            split.codec = "raw"
            assert right(split, twice)
            assert remote(split)
            split.codec = "zstd"
            assert right(split, twice)
            assert degraded(split).startswith("refused: ")
            assert between.came.count("zstd") == 1


def test_a_process_is_stopped_continued_killed_and_restarted() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Slow().eval()

    def slowly_answered(split: ts.SplitModule) -> bool:
        return right(split, torch.rand(1, 4), model)

    with reserved_port() as port, process("slow", "factories:slow", port) as child:
        split = ts.SplitModule(model, torch.ones(1, 4), server=f"http://127.0.0.1:{port}", name="slow", partition=0)
        until(lambda: remote(split), split, slowly_answered)
        os.kill(child.pid, signal.SIGSTOP)
        assert slowly_answered(split)
        assert degraded(split).startswith("late: ")
        until(lambda: degraded(split).startswith("unserved: "), split, slowly_answered)
        os.kill(child.pid, signal.SIGCONT)
        until(lambda: remote(split), split, slowly_answered)
        child.kill()
        child.join()
        assert slowly_answered(split)
        assert not remote(split)
        with process("slow", "factories:slow", port):
            until(lambda: remote(split), split, slowly_answered)
        split.close()


def test_a_refusal_that_is_remembered_keeps_no_tensors_of_refused_calls(server: Server) -> None:
    wide = torch.rand(3, 3, 32, 32)
    with HttpTransport(server.url) as inner:
        between = RefusesWide(inner)
        with split_of(between, partition=1, fallback="error") as split:
            assert right(split)
            errors = []
            for _ in range(3):
                with pytest.raises(ts.RequestRefusedError) as caught:
                    split(wide)
                errors.append(caught.value)
            assert between.refused == 1
            assert len(set(map(id, errors))) == 3
            assert {(str(error), error.status) for error in errors} == {("too wide", 413)}


class RefusesWide(Relay):
    """Refuses all batches but those of one sample."""

    refused = 0

    def infer(self, model: str, tensors: Any, **options: Any) -> Any:
        if next(iter(tensors.values())).shape[0] > 1:
            self.refused += 1
            raise ts.RequestRefusedError("too wide", 413)
        return super().infer(model, tensors, **options)
