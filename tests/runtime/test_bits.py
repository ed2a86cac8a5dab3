"""Every thread and every server gives the model's own bits, or it is said that it does not, and why."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from classifier import remote, until
from factories import wide
from serving import process, serving
from tcp import reserved_port
from torch import nn
from transports import Relay

import torchsurgeon as ts
from torchsurgeon.codec import Budget, measure
from torchsurgeon.models.arithmetic import Arithmetic
from torchsurgeon.models.threads import ThreadSettings, process_threads
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.transport import Answer, HttpTransport, InProcessTransport

MODEL, EXAMPLE = wide()
OTHER_SAMPLES = 6


class Spectrum(nn.Module):
    """MKL computes its Fourier transforms, and no operator of PyTorch's own comes before them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * 1.7, n=x.shape[-1])


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, which is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def batch() -> torch.Tensor:
    return torch.rand(OTHER_SAMPLES, 64)


def own(x: torch.Tensor, model: nn.Module = MODEL) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def split_of(where: Any, **options: Any) -> ts.SplitModule:
    return ts.SplitModule(MODEL, EXAMPLE, server=where, name="net", **{"partition": "server", **options})


def bits(split: ts.SplitModule) -> str:
    assert split.last is not None
    return split.last.bits


# --- threads ---


def test_a_thread_takes_over_settings_and_leaves_other_threads_theirs(threads: Callable[[int], None]) -> None:
    threads(1)
    three = ThreadSettings(3, flush_denormal=True)

    def adopted() -> ThreadSettings:
        three.adopt()
        return ThreadSettings.here()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(adopted).result() == three
        assert process_threads() == 1
        assert ThreadSettings.here() == ThreadSettings(1, flush_denormal=False)
        assert pool.submit(ThreadSettings.here).result() == three


@pytest.mark.parametrize("order", [(1, 2, 1), (2, 1, 3)])
def test_streams_and_fallbacks_use_the_callers_threads_also_after_a_change(
    threads: Callable[[int], None], order: tuple[int, ...]
) -> None:
    with reserved_port() as port, split_of(f"http://127.0.0.1:{port}") as split:
        for count in order:
            threads(count)
            for _ in range(5):
                x = batch()
                assert torch.equal(split(x), own(x))
                assert torch.equal(split.submit(x).result(), own(x))
                assert all(map(torch.equal, split.map([x, x]), [own(x)] * 2))
                assert bits(split) == "same bits"


def test_two_threads_with_different_counts_each_get_their_own_bits(threads: Callable[[int], None]) -> None:
    threads(1)
    with reserved_port() as port, split_of(f"http://127.0.0.1:{port}") as split:
        split(EXAMPLE)

        def equal(count: int) -> bool:
            torch.set_num_threads(count)
            calls = [batch() for _ in range(10)]
            return all(torch.equal(split.submit(x).result(), own(x)) for x in calls)

        found: list[bool] = []
        workers = [threading.Thread(target=lambda n=n: found.append(equal(n))) for n in (1, 2, 3)]  # type: ignore[misc]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert found == [True] * 3


@pytest.mark.parametrize("model", [MODEL, Spectrum().eval()], ids=["matrices", "spectrum"])
def test_a_server_in_this_process_follows_the_number_of_threads(
    model: nn.Module, threads: Callable[[int], None]
) -> None:
    threads(2)
    with (
        serving(model, EXAMPLE) as server,
        ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition="server") as split,
    ):
        for count in (1, 2, 1):
            threads(count)
            # The first requests run in the worker's thread, later ones in the event loop's.
            for _ in range(20):
                x = batch()
                assert torch.equal(split(x), own(x, model))
                assert bits(split) == "same bits", split.last
                assert split.last is not None
                assert split.last.server is not None


def test_models_of_one_server_compute_alike(threads: Callable[[int], None]) -> None:
    threads(1)
    registry = ModelRegistry(profiler=None)
    for name in ("one", "two"):
        registry.add(name, MODEL, EXAMPLE)
    with InProcessTransport(create_app(registry)) as transport:
        for name in ("one", "two", "one"):
            with ts.SplitModule(MODEL, EXAMPLE, server=transport, name=name, partition="server") as split:
                x = batch()
                assert torch.equal(split(x), own(x))
                assert bits(split) == "same bits"
    registry.close()


# --- what the server computes with ---


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in another process, with one thread."""
    with reserved_port() as port, process("net", "factories:wide", port):
        yield f"http://127.0.0.1:{port}"


def test_a_server_with_other_threads_is_the_same_to_rounding_and_says_why(
    url: str, threads: Callable[[int], None]
) -> None:
    threads(2)
    with split_of(url) as split:
        x = batch()
        torch.testing.assert_close(split(x), own(x))
        last = split.last
        assert last is not None
        assert (last.bits, last.inexact_because) == ("same to rounding", ("CPU threads (2 here, 1 on the server)",))
        assert "same to rounding" in str(last)
        stats = split.stats()
        assert stats["bits"] == {"same to rounding": 1}
        assert stats["servers"][0]["bits"] == "same to rounding"
        assert stats["servers"][0]["inexact_because"] == ["CPU threads (2 here, 1 on the server)"]
        threads(1)
        assert torch.equal(split(x), own(x))
        assert bits(split) == "same bits"
        (server,) = split.stats()["servers"]
        assert (server["bits"], server["inexact_because"]) == ("same bits", [])


def test_exact_answers_come_from_the_device_where_the_server_cannot_give_them(
    url: str, threads: Callable[[int], None]
) -> None:
    threads(2)
    with split_of(url, exact=True) as split:
        with pytest.warns(ts.MismatchWarning, match=r"CPU threads \(2 here, 1 on the server\).*--threads 2"):
            split.prepare()
        for _ in range(3):
            x = batch()
            assert torch.equal(split(x), own(x))
            assert split.last is not None
            assert (split.last.server, split.last.bits) == (None, "same bits")
            assert "mismatch" in (split.last.degraded or "")


def test_exact_answers_come_from_the_server_while_it_can_give_them(url: str, threads: Callable[[int], None]) -> None:
    with split_of(url, exact=True, fallback="error") as split:
        for count in (1, 2, 1, 3, 1):
            threads(count)
            x = batch()
            if count == 1:
                assert torch.equal(split(x), own(x))
                assert split.last is not None
                assert (split.last.server, split.last.bits) == (url, "same bits")
            else:
                with pytest.raises(ts.ArithmeticMismatchError, match=f"{count} here, 1 on the server") as caught:
                    split(x)
                assert f"--threads {count}" in str(caught.value)
                assert "leave out exact=True" in str(caught.value)


def test_exact_answers_come_from_the_server_again_once_it_can_give_them(
    url: str, threads: Callable[[int], None]
) -> None:
    threads(2)
    with split_of(url, exact=True) as split:
        with pytest.warns(ts.MismatchWarning):
            assert torch.equal(split(EXAMPLE), own(EXAMPLE))
        threads(1)
        until(lambda: remote(split), split, lambda split: torch.equal(split(EXAMPLE), own(EXAMPLE)))
        assert bits(split) == "same bits"


def test_of_several_servers_an_exact_one_is_asked(url: str, threads: Callable[[int], None]) -> None:
    threads(2)
    with serving(MODEL, EXAMPLE) as server, split_of([url, server.url], exact=True) as split:
        with pytest.warns(ts.MismatchWarning):
            split.prepare()
        x = batch()
        assert torch.equal(split(x), own(x))
        assert split.last is not None
        assert (split.last.server, split.last.degraded) == (server.url, None)


@pytest.mark.parametrize("exact", [False, True])
def test_the_middle_of_a_chain_answers_for_the_end_only_if_it_is_exact(url: str, exact: bool) -> None:
    registry = ModelRegistry(profiler=None)
    with split_of(url, exact=exact, partition=1) as middle:
        registry.add("net", middle)
        with InProcessTransport(create_app(registry)) as transport, split_of(transport) as split:
            x = batch()
            assert torch.equal(split(x), own(x))
            assert bits(split) == ("same bits" if exact else "same to rounding")
    registry.close()


@pytest.mark.parametrize(
    "change",
    [lambda on: setattr(torch.backends.mkldnn, "enabled", on), torch.backends.mha.set_fastpath_enabled],
    ids=["mkldnn", "fastpath"],
)
def test_a_setting_that_only_the_device_changes_is_a_difference(url: str, change: Callable[[bool], None]) -> None:
    with split_of(url) as split:
        split(EXAMPLE)
        assert bits(split) == "same bits"
        change(False)
        try:
            split(EXAMPLE)
            assert split.last is not None
            assert split.last.bits == "same to rounding"
            assert "(False here, True on the server)" in split.last.inexact_because[0]
        finally:
            change(True)
        split(EXAMPLE)
        assert bits(split) == "same bits"


class Quiet(Relay):
    """A server of an older version: it does not tell what it computes with."""

    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        told = super().get_json(path, timeout_s=timeout_s)
        told.pop("arithmetic", None)
        return told

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        answer = super().infer(model, tensors, **options)
        answer.parameters.pop("arithmetic", None)
        return answer


class Turning(Relay):
    """A server that computes with something else from the second answer on, such as another one behind its address."""

    answers = 0

    def infer(self, model: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> Answer:
        answer = super().infer(model, tensors, **options)
        self.answers += 1
        if self.answers > 1:
            answer.parameters["arithmetic"] = "0" * 16
        return answer


def test_a_server_that_does_not_tell_is_the_same_to_rounding(url: str) -> None:
    with Quiet(HttpTransport(url)) as transport, split_of(transport) as split:
        split(EXAMPLE)
        assert bits(split) == "same to rounding"
    with (
        Quiet(HttpTransport(url)) as transport,
        split_of(transport, exact=True, fallback="error") as split,
        pytest.raises(ts.ArithmeticMismatchError, match="what the server computes with"),
    ):
        split(EXAMPLE)


@pytest.mark.usefixtures("patient")
def test_each_answer_tells_what_it_was_computed_with(url: str) -> None:
    with Turning(HttpTransport(url)) as transport, split_of(transport) as split:
        split(EXAMPLE)
        assert bits(split) == "same bits"
        split(EXAMPLE)
        assert bits(split) == "same to rounding"
    with Turning(HttpTransport(url)) as transport, split_of(transport, exact=True) as split:
        for _ in range(2):
            x = batch()
            with pytest.warns(ts.MismatchWarning) if transport.answers else contextlib.nullcontext():
                assert torch.equal(split(x), own(x))
            assert bits(split) == "same bits"
        assert split.last is not None
        assert split.last.server is None


@pytest.mark.parametrize(
    "told", [None, 5, [], {}, {"threads": 1}, {"a": "b" * 10_000}, dict.fromkeys(map(str, range(500)), "")]
)
def test_what_a_server_tells_without_sense_is_taken_for_nothing(told: Any) -> None:
    assert Arithmetic.from_json(told) is None


def test_what_differs_is_named_on_both_sides() -> None:
    here = Arithmetic({"torch": "2.10", "cpu_features": "avx avx2 fma", "threads": "2"})
    there = Arithmetic({"torch": "2.11", "cpu_features": "avx fma neon", "threads": "2", "new": "yes"})
    assert list(map(str, here.compare(there))) == [
        "PyTorch's version (2.10 here, 2.11 on the server)",
        "the CPU's features (avx2 here, neon on the server)",
        "new (not told here, yes on the server)",
    ]
    joins = Arithmetic({**here.facts, "batching": "up to 64 samples"})
    assert list(map(str, here.compare(joins))) == [
        "the server may run requests together (up to 64 samples) unless started with --exact or --no-batching"
    ]
    assert here.compare(Arithmetic(dict(here.facts))) == ()


# --- codecs, compilers and memory ---


def test_exact_refuses_what_changes_bits() -> None:
    server = "http://127.0.0.1:9"
    for which, codec in (("codec", "int8"), ("answer_codec", "float16"), ("codec", "jpeg-80")):
        with pytest.raises(ts.CodecError, match=f"{codec}.*leave out exact=True"):
            split_of(server, exact=True, **{which: codec})
    for compiled in ({"compile": True}, {"backend": lambda module: module}):
        with pytest.raises(ts.BackendError, match="leave out exact=True"):
            split_of(server, exact=True, **compiled)
    with split_of(server, exact=True, codec="auto", answer_codec="zstd") as split:
        with pytest.raises(ts.CodecError, match="bfloat16"):
            split.codec = "bfloat16"
        split.codec = "zstd"


def test_exact_refuses_tables_with_lossy_codecs_that_may_be_used() -> None:
    graph = ts.trace(MODEL, EXAMPLE)
    samples = [torch.rand(1, 64) for _ in range(2)]
    lossless = measure(graph, samples, codecs=["raw", "zstd", "int8"])
    split_of("http://127.0.0.1:9", exact=True, codecs=lossless, partition=0).close()
    lossy = measure(graph, samples, codecs=["raw", "int8"], budget=Budget(min_cosine=0.5, decide_by="estimate"))
    with pytest.raises(ts.CodecError, match="int8"):
        split_of("http://127.0.0.1:9", exact=True, codecs=lossy, partition=0)


def test_lossy_codecs_are_said(url: str) -> None:
    with split_of(url, codec="bfloat16") as split:
        split(EXAMPLE)
        assert split.last is not None
        assert split.last.bits == "changed by a lossy codec"
        assert split.last.inexact_because[0] == "codec bfloat16"


def test_a_backend_is_said_even_on_the_device(url: str) -> None:
    for partition in ("server", "device"):
        with split_of(url, backend=lambda module: module, partition=partition) as split:
            split(EXAMPLE)
            assert bits(split) == "same to rounding"


def moved(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins 4 bytes past a multiple of 64."""
    memory = torch.empty(x.numel() + 32)
    begin = next(i for i in range(32) if memory[i:].data_ptr() % 64 == 4)
    return memory[begin : begin + x.numel()].view(x.shape).copy_(x)


def test_inputs_that_lie_elsewhere_in_memory_keep_their_bits_or_it_is_said(
    url: str, threads: Callable[[int], None]
) -> None:
    x = moved(batch())
    with split_of(url) as split:
        split(x)
        assert split.last is not None
        assert split.last.bits == "same to rounding"
        assert "4 bytes past a multiple of 64" in split.last.inexact_because[0]
        split(torch.rand(OTHER_SAMPLES, 128)[:, 64:])
        assert "gaps" in split.last.inexact_because[0]
    with split_of(url, exact=True) as split:
        assert torch.equal(split(x), own(x))
        assert split.last is not None
        assert split.last.server is None
        assert (split.last.degraded or "").startswith("inexact: ")
    with split_of(url, exact=True, fallback="error") as split, pytest.raises(ts.ArithmeticMismatchError, match="past"):
        split(x)
    threads(2)
    with split_of(None, partition="device") as split:
        for y in (x, torch.rand(OTHER_SAMPLES, 128)[:, 1:65], batch().T.contiguous().T, EXAMPLE.expand(4, 64)):
            assert torch.equal(split.submit(y).result(), own(y))
            assert all(torch.equal(answer, own(y)) for answer in split.map([y, y]))
