"""What hostile, careless and unlucky users do: an answer is the model's own, or a typed error comes in time."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import EXAMPLE, Net, net, serve, truth
from classifier import split_of as split_anywhere
from factories import Slow
from messages import joined
from serving import process
from tcp import listening, read_message, reserved_port
from torch import nn
from transports import Relay

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.serve import Server
from torchsurgeon.transport import Answer, HttpTransport, Transport


def split_of(where: Any, model: nn.Module | None = None, **options: Any) -> ts.SplitModule:
    return split_anywhere(where, model, **{"partition": "stem", "fallback": "error", **options})


# --- the model on one side is not the one it was ---


def test_a_server_restarted_with_other_weights_gives_no_answers() -> None:
    with reserved_port() as port, serve(port=port) as first, split_of(first, timeout_s=20) as split:
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))
        first.stop()
        with serve(net(7), port):
            for _ in range(2):
                with pytest.raises(ts.ModelMismatchError, match=r"stem\.weight"):
                    split(EXAMPLE)
        with serve(port=port):
            assert torch.equal(split(EXAMPLE), truth(EXAMPLE))


class Changing(Relay):
    """Hands on what ``change`` makes of answers; ``told`` may answer questions about the model instead."""

    def __init__(self, inner: Transport, change: Callable[[Answer], Answer], told: Transport | None = None) -> None:
        super().__init__(inner)
        self.change, self.told = change, told or inner

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self.told.get_json(path, timeout_s=timeout_s)

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        return self.change(super().infer(model, tensors, **options))

    def close(self) -> None:
        super().close()
        self.told.close()


class Telling(Relay):
    """Answers every question about the model with ``answer``."""

    def __init__(self, inner: Transport, answer: Any) -> None:
        super().__init__(inner)
        self.answer = answer

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self.answer


@pytest.mark.parametrize("entry", [None, 5, {}, {"shape": 5}, {"shape": None, "dtype": [], "digest": 7}])
def test_a_fingerprint_that_makes_no_sense_is_another_models(server: Server, entry: Any) -> None:
    told = {"weights": "x", "tensors": {"stem.weight": entry}}
    with (
        split_of(Telling(HttpTransport(server.url), told)) as split,
        pytest.raises(ts.ModelMismatchError, match=r"stem\.weight"),
    ):
        split(EXAMPLE)


def test_servers_with_different_weights_behind_one_address_are_found_out(server: Server) -> None:
    with serve(net(7)) as other, HttpTransport(server.url) as told, HttpTransport(other.url) as asked:
        told.get_json("/v2/models/net/fingerprint")
        asked.get_json("/v2/models/net/fingerprint")
        with (
            split_of(Changing(asked, lambda answer: answer, told)) as split,
            pytest.raises(ts.ModelMismatchError, match="several servers"),
        ):
            split(EXAMPLE)


def _mutate(model: Net) -> None:
    with torch.no_grad():
        model.head.weight.mul_(2)


def _swap_data(model: Net) -> None:
    model.head.weight.data = model.head.weight.data + 1


def _new_parameter(model: Net) -> None:
    model.head.bias = nn.Parameter(torch.ones(5))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_mutate, "other weights on the server"),
        (_swap_data, "other weights on the server"),
        (_new_parameter, "other weights on the server"),
        (lambda m: m.load_state_dict(net(3).state_dict()), "other weights on the server"),
        (lambda m: m.half(), r"is in float16 here and in float32 on the server: .*Call .float\(\)"),
    ],
    ids=["in place", "data", "parameter", "state dict", "half"],
)
def test_weights_changed_on_the_device_are_noticed_and_so_is_their_return(
    server: Server, change: Callable[[Net], Any], said: str
) -> None:
    model = net()
    with split_of(server, model) as split:
        split(EXAMPLE)
        change(model)
        for _ in range(2):
            with pytest.raises(ts.ModelMismatchError, match=said):
                split(EXAMPLE)
        model.float().load_state_dict(net().state_dict())
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))


def test_a_head_in_training_mode_is_refused_before_it_updates_anything(server: Server) -> None:
    model = net()
    with split_of(server, model, partition="norm") as split:
        split(EXAMPLE)
        model.norm.train()
        with pytest.raises(ts.TraceError, match="training mode"):
            split(EXAMPLE)
        assert torch.equal(model.norm.running_mean, net().norm.running_mean)
        model.eval()
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))


@pytest.mark.parametrize("name", ["stem", "head"])
def test_a_submodule_replaced_after_the_cut_is_refused(server: Server, name: str) -> None:
    model = net()
    with split_of(server, model) as split:
        split(EXAMPLE)
        setattr(model, name, copy.deepcopy(getattr(model, name)))
        with pytest.raises(ts.TraceError, match=name):
            split(EXAMPLE)


@pytest.mark.parametrize("partition", ["server", "stem"])
def test_autocast_on_one_side_only_is_refused(server: Server, partition: str) -> None:
    with split_of(server, partition=partition) as split:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ts.ModelMismatchError, match="autocast"):
            split(EXAMPLE)
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))


def test_a_compiled_model_is_the_model_it_was_compiled_from(server: Server) -> None:
    with split_of(server, torch.compile(net(), backend="eager")) as split:  # type: ignore[arg-type]
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_says_what_to_copy(server: Server, copying: Callable[[Any], Any]) -> None:
    with split_of(server) as split:
        split(EXAMPLE)
        with pytest.raises(TypeError, match=r"copy or save its \.model"):
            copying(split)


# --- what is put in ---

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "permuted": lambda x: x.permute(0, 1, 3, 2),
    "every second": lambda x: x.repeat(1, 1, 2, 2)[:, :, ::2, 1::2],
    "offset": lambda x: x.reshape(-1).repeat(2)[1 : 1 + x.numel()].view(x.shape),
    "with gradients": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: nn.Parameter(x),
    "not a number": lambda x: torch.full_like(x, float("nan")),
    "batch of 64": lambda x: x.repeat(64, 1, 1, 1),
    "another size": lambda x: x.repeat(1, 1, 3, 2),
}


@pytest.mark.parametrize("partition", ["server", "stem", "act"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_tensor_gets_the_models_bits(
    server: Server, partition: str, form: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = form(EXAMPLE)
    with split_of(server, partition=partition) as split:
        answer = split(x)
        with torch.inference_mode():
            again = split(x.detach())
    assert not answer.requires_grad
    assert torch.equal(answer.nan_to_num(nan=7.0), truth(x).nan_to_num(nan=7.0))
    assert torch.equal(again.nan_to_num(nan=7.0), answer.nan_to_num(nan=7.0))


@pytest.mark.parametrize("partition", ["server", "stem"])
@pytest.mark.parametrize(
    "x",
    [
        EXAMPLE[:0],
        EXAMPLE.repeat(65, 1, 1, 1),
        EXAMPLE[0],
        EXAMPLE.bfloat16(),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.tensor(1.0),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1, 3, 3000, 3000),
        None,
        [EXAMPLE],
        EXAMPLE.numpy(),
    ],
    ids=["none", "65", "no batch", "bfloat16", "uint8", "0-d", "4 channels", "huge", "None", "list", "numpy"],
)
def test_what_the_model_cannot_take_is_refused_and_the_next_call_works(server: Server, partition: str, x: Any) -> None:
    with split_of(server, partition=partition) as split:
        with pytest.raises((ts.RequestRefusedError, ts.ServerUnavailableError, TypeError, RuntimeError)) as caught:
            split(x)
        assert str(caught.value)
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))


# --- what comes back ---


def _with(**tensors: torch.Tensor | None) -> Callable[[Answer], Answer]:
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return lambda answer: Answer(kept, answer.parameters, answer.timing)


@pytest.mark.parametrize(
    "change",
    [
        _with(),
        _with(other=torch.zeros(1, 5)),
        _with(output=torch.zeros(1, 5), more=torch.zeros(1)),
        _with(output=torch.zeros(1, 5, dtype=torch.float64)),
        _with(output=torch.zeros(2, 5)),
        _with(output=torch.zeros(1, 6)),
        _with(output=torch.zeros(5)),
    ],
    ids=["nothing", "name", "one more", "dtype", "batch", "width", "rank"],
)
def test_an_answer_unlike_the_models_is_refused(server: Server, change: Callable[[Answer], Answer]) -> None:
    with (
        HttpTransport(server.url) as direct,
        split_of(Changing(direct, change)) as split,
        pytest.raises(ts.ProtocolError, match="expected"),
    ):
        split(EXAMPLE)


def _chunked(head: bytes, body: bytes) -> bytes:
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    pieces = [body[i : i + 50] for i in range(0, len(body), 50)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"\r\n".join([*lines, b"transfer-encoding: chunked"]) + b"\r\n\r\n" + chunks + b"0\r\n\r\n"


def _length(change: int) -> Callable[[bytes, bytes], bytes]:
    def mangle(head: bytes, body: bytes) -> bytes:
        head = re.sub(
            rb"(?i)\r\ncontent-length: (\d+)", lambda m: b"\r\ncontent-length: %d" % (int(m[1]) + change), head
        )
        return head + b"\r\n\r\n" + body

    return mangle


def _in_body(old: bytes, new: bytes) -> Callable[[bytes, bytes], bytes]:
    return lambda head, body: head + b"\r\n\r\n" + body.replace(old, new.ljust(len(old)), 1)


MANGLED: dict[str, tuple[Callable[[bytes, bytes], bytes], bool]] = {
    "unchanged": (lambda h, b: h + b"\r\n\r\n" + b, True),
    "chunked": (_chunked, True),
    "HTTP/1.0": (lambda h, b: h.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n\r\n" + b, True),
    "100 first": (lambda h, b: b"HTTP/1.1 100 Continue\r\n\r\n" + h + b"\r\n\r\n" + b, True),
    "closing": (lambda h, b: h + b"\r\nconnection: close\r\n\r\n" + b, True),
    "nothing": (lambda h, b: b"", False),
    "half a head": (lambda h, b: h[:20], False),
    "no body": (lambda h, b: h + b"\r\n\r\n", False),
    "half a body": (lambda h, b: h + b"\r\n\r\n" + b[: len(b) // 2], False),
    "all but a byte": (lambda h, b: h + b"\r\n\r\n" + b[:-1], False),
    "length too short": (_length(-1), False),
    "length too long": (_length(1), False),
    "a huge length": (_length(1 << 40), False),
    "not HTTP": (lambda h, b: b"SSH-2.0-OpenSSH_9.2\r\n\r\n" + b, False),
    "a header of NaN": (_in_body(b'"shape":[1,5]', b'"shape":[NaN]'), False),
    "another shape": (_in_body(b'"shape":[1,5]', b'"shape":[5,1]'), False),
    "another dtype": (_in_body(b'"datatype":"FP32"', b'"datatype":"INT32"'), False),
    "another name": (_in_body(b'"name":"output"', b'"name":"input"'), False),
    "an error": (lambda h, b: b'HTTP/1.1 500 Oh\r\ncontent-length: 16\r\n\r\n{"error": "why"}', False),
    "a redirect": (lambda h, b: b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", False),
}


@contextmanager
def meddler(server: Server, mangle: Callable[[bytes, bytes], bytes], pause_s: float = 0.0) -> Iterator[str]:
    """Stand before ``server``; the answers to inferences pass as ``mangle`` makes them, then the connection closes."""

    def attend(device: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            request = read_message(device)
            if request is None:
                return
            link.sendall(b"\r\n\r\n".join(request))
            head, body = read_message(link) or (b"", b"")
            data = mangle(head, body) if b"/infer " in request[0] else head + b"\r\n\r\n" + body
            for i in range(len(data) if pause_s else 1):
                device.sendall(data[i : i + 1] if pause_s else data)
                time.sleep(pause_s)
            device.shutdown(socket.SHUT_WR)
            device.settimeout(1)
            device.recv(1 << 16)

    with listening(attend) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("name", MANGLED)
def test_a_mangled_answer_is_right_or_a_typed_error(server: Server, name: str) -> None:
    mangle, right = MANGLED[name]
    with meddler(server, mangle) as url:
        split = split_of(url, timeout_s=20)
        for _ in range(2):
            if right:
                assert torch.equal(split(EXAMPLE), truth(EXAMPLE))
            else:
                with pytest.raises((ts.ServerError, ts.ProtocolError)):
                    split(EXAMPLE)
        split.close()


def test_an_answer_of_a_byte_at_a_time_ends_at_the_deadline(server: Server) -> None:
    with meddler(server, lambda h, b: h + b"\r\n\r\n" + b, pause_s=0.2) as url:
        transport = HttpTransport(server.url, 0.6)
        dribbling = HttpTransport(url, 0.6)
        with split_of(Changing(dribbling, lambda answer: answer, transport)) as split:
            begin = time.monotonic()
            with pytest.raises(ts.ServerUnavailableError, match=r"0\.6 s"):
                split(EXAMPLE)
            assert time.monotonic() - begin < 5


# --- processes ---


def footprint(pid: int) -> tuple[int, int, int]:
    """Resident KiB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, threads = (re.search(rf"{key}:\s+(\d+)", status) for key in ("VmRSS", "Threads"))
    assert resident
    assert threads
    return int(resident[1]), len(os.listdir(f"/proc/{pid}/fd")), int(threads[1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_server_process_is_stopped_killed_and_restarted_under_a_live_module() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Slow().eval()
    x, slowly = torch.rand(1, 4), torch.full((1, 4), -1.0)

    def split_within(timeout_s: float) -> ts.SplitModule:
        options: dict[str, Any] = {"name": "slow", "partition": 0, "timeout_s": timeout_s, "fallback": "error"}
        return ts.SplitModule(model, torch.ones(1, 4), server=f"http://127.0.0.1:{port}", **options)

    with reserved_port() as port:
        with process("slow", "factories:slow", port) as child:
            split = split_within(30)
            assert torch.equal(split(x), truth(x, model))

            for i in range(500):
                split(torch.rand(1 + i % 64, 4))
            gc.collect()
            before = footprint(os.getpid()), footprint(child.pid)
            for i in range(2000):
                split(torch.rand(1 + i % 64, 4))
            gc.collect()
            after = footprint(os.getpid()), footprint(child.pid)
            for (old_kib, *old), (new_kib, *new) in zip(before, after, strict=True):
                assert new_kib - old_kib < 16 << 10
                # A thread that was only there for the beginning may have ended meanwhile.
                assert all(now <= then for now, then in zip(new, old, strict=True)), (old, new)

            os.kill(child.pid, signal.SIGSTOP)
            with split_within(0.5) as hasty, pytest.raises(ts.ServerUnavailableError, match=r"0\.5 s"):
                hasty(x)
            os.kill(child.pid, signal.SIGCONT)
            assert torch.equal(split(x), truth(x, model))

            with ThreadPoolExecutor(1) as pool:
                cut_off = pool.submit(split, slowly)
                time.sleep(0.3)
                child.kill()
                with pytest.raises(ts.ServerUnavailableError):
                    cut_off.result(30)
        with process("slow", "factories:slow", port, seed=7), pytest.raises(ts.ModelMismatchError):
            split(x)
        split.close()


def test_a_fork_does_not_share_connections(server: Server) -> None:
    """A child that used its parent's connection would read its parent's answers."""
    model = net()
    split = split_of(server, model)
    split(EXAMPLE)

    def right(first: float) -> bool:
        inputs = [torch.full((1, 3, 8, 8), first + i) for i in range(100)]
        return all(torch.equal(split(x), truth(x, model)) for x in inputs)

    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if right(1000.0) else 2
        finally:
            os._exit(status)
    try:
        assert right(0.0)
    finally:
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    split.close()


def test_a_hundred_devices_with_different_cuts(server: Server) -> None:
    model = net()
    points = len(ts.trace(model, EXAMPLE).points)

    def device(i: int) -> bool:
        with split_of(server, model, partition=i % points) as split:
            inputs = [torch.rand(1 + (i + j) % 5, 3, 8, 8) for j in range(3)]
            return all(torch.equal(split(x), truth(x, model)) for x in inputs)

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(device, range(100)))


def test_closing_while_threads_call_ends_them_with_a_reason(server: Server) -> None:
    split = split_of(server)
    split(EXAMPLE)

    def call() -> str:
        while True:
            try:
                split(EXAMPLE)
            except ts.ServerUnavailableError as error:
                return str(error)

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(call) for _ in range(4)]
        time.sleep(0.1)
        split.close()
        assert all("closed" in end.result(10) for end in ends)


def test_clients_that_reset_in_mid_request_leave_the_server_serving(server: Server) -> None:
    encoded = wire.encode_request({"x": EXAMPLE})
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b: %d\r\n\r\n" % (
        encoded.size_bytes,
        wire.HEADER_LENGTH.encode(),
        encoded.header_bytes or 0,
    )
    request = head + joined(encoded)
    for i in range(60):
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            link.sendall(request[: len(request) * (i % 6 + 1) // 6])
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with split_of(server) as split:
        assert torch.equal(split(EXAMPLE), truth(EXAMPLE))
