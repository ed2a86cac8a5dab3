from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from paths import ROOT

from torchsurgeon import hooks
from torchsurgeon.errors import NativeUnavailableError
from torchsurgeon.hooks.attribution import OUTSIDE, KernelTrace, Span, attribute

NAMES = ["features", "features.0", "classifier"]
SPANS = [
    Span(0, 0, 1_000, 9_000, 0),
    Span(1, 1, 2_000, 4_000, 0),
    Span(2, 2, 9_500, 11_000, 0),
    Span(3, 1, 12_000, 13_000, 0),
]
KERNELS = ["implicit_gemm", "relu", "memcpy"]
# external id, start, end, device, stream, grid x y z, block x y z, name
ACTIVITIES = [
    [1, 50_000, 53_000, 0, 7, 4, 2, 1, 128, 1, 1, 0],
    [0, 53_000, 54_000, 0, 7, 1, 1, 1, 64, 1, 1, 1],
    [3, 57_000, 59_000, 0, 9, 4, 2, 1, 128, 1, 1, 0],
    [-1, 49_000, 49_500, 0, 7, 0, 0, 0, 0, 0, 0, 2],
    [99, 60_000, 60_250, 0, 7, 0, 0, 0, 0, 0, 0, 2],
]
OFFSET_NS = -40_000


@pytest.fixture
def trace() -> KernelTrace:
    return KernelTrace(*attribute(SPANS, NAMES, ACTIVITIES, KERNELS, OFFSET_NS))


def test_kernels_belong_to_the_call_that_launched_them(trace: KernelTrace) -> None:
    found = [(kernel.name, kernel.layer, kernel.call, kernel.start_ns, kernel.stream) for kernel in trace.kernels]
    assert found == [
        ("memcpy", OUTSIDE, None, 9_000, 7),
        ("implicit_gemm", "features.0", 1, 10_000, 7),
        ("relu", "features", 0, 13_000, 7),
        ("implicit_gemm", "features.0", 3, 17_000, 9),
        ("memcpy", OUTSIDE, None, 20_000, 7),
    ]


def test_layers_are_summed_over_their_calls(trace: KernelTrace) -> None:
    rows = {row.name: (row.calls, row.launches, row.busy_s, row.slowest) for row in trace.by_layer()}
    assert rows == {
        "features": (1, 1, pytest.approx(1e-6), "relu"),
        "features.0": (2, 2, pytest.approx(5e-6), "implicit_gemm"),
        OUTSIDE: (0, 2, pytest.approx(0.75e-6), "memcpy"),
    }


def test_the_table_has_a_line_a_layer_and_tells_what_is_missing(trace: KernelTrace) -> None:
    trace.dropped = 12
    lines = trace.table().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["features", "features.0", "(outside"]
    assert "74.1%" in lines[2]
    assert lines[-1] == "12 records are missing: the storage was full, give kernel_trace more capacity"


def test_an_empty_trace_has_a_table_and_a_file(tmp_path: Path) -> None:
    KernelTrace().save(tmp_path / "empty.json")
    assert KernelTrace().table().startswith("layer")
    assert json.loads((tmp_path / "empty.json").read_text())["displayTimeUnit"] == "ns"


def test_the_trace_file_has_layers_on_one_track_and_kernels_on_another(trace: KernelTrace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    complete = [event for event in events if event["ph"] == "X"]
    by_track: dict[str, list[str]] = {}
    for event in complete:
        by_track.setdefault(tracks[event["pid"], event["tid"]], []).append(event["name"])
    assert by_track == {
        "layers": ["features", "features.0", "classifier", "features.0"],
        "kernels, stream 7": ["memcpy", "implicit_gemm", "relu", "memcpy"],
        "kernels, stream 9": ["implicit_gemm"],
    }
    assert min(event["ts"] for event in complete) == 0
    gemm = next(event for event in complete if event["name"] == "implicit_gemm")
    assert (gemm["ts"], gemm["dur"]) == (9.0, 3.0)
    assert gemm["args"] == {"layer": "features.0", "grid": [4, 2, 1], "block": [128, 1, 1]}


def test_layer_ranges_cost_nothing_and_do_nothing_without_a_trace() -> None:
    assert hooks.active() is None
    with hooks.layer_range("features.0"):
        assert hooks.active() is None


def test_a_machine_without_gpu_is_told_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with (
        pytest.raises(NativeUnavailableError, match=r"tracing CUDA kernels needs an? (NVIDIA driver|CUDA device)"),
        hooks.kernel_trace(),
    ):
        pass
    assert hooks.active() is None


def test_a_running_profiler_is_not_disturbed() -> None:
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True),
        pytest.raises(NativeUnavailableError, match=r"torch\.profiler is running.*end it first"),
        hooks.kernel_trace(),
    ):
        pass


PRELUDE = """
import ctypes, os, torch
from torchsurgeon import _native, hooks
from torchsurgeon.errors import NativeUnavailableError
path = os.environ["FAKE_GPU"] + "/libcupti.so.13"
_native._cupti_candidates = lambda: [("libnothing.so", True), (path, False)]
torch.cuda.is_available = lambda: True
torch.cuda.init = torch.cuda.synchronize = lambda: None
launch = ctypes.CDLL(path).fake_launch
launch.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
launch.restype = None

class Launch(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
    def forward(self, x):
        launch(self.name, 5000)
        return x

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Launch(b"_Z4convPfi")
        self.relu = Launch(b"relu")
    def forward(self, x):
        x = self.relu(self.conv(x))
        launch(b"add", 1000)
        return x

model = torch.nn.Sequential(Block(), Block())
"""


def on_fake_gpu(fake_gpu: Path, code: str) -> subprocess.CompletedProcess[str]:
    settings = {"LD_LIBRARY_PATH": str(fake_gpu), "FAKE_GPU": str(fake_gpu), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_called_model_names_its_own_layers(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        launch(b"before", 1)
        with hooks.kernel_trace() as trace:
            launch(b"outside", 1)
            model(torch.zeros(1))
        for kernel in trace.kernels:
            print(kernel.layer, kernel.name, kernel.end_ns - kernel.start_ns, kernel.grid, sep="|")
        first, conv = trace.layers[0], trace.kernels[2]
        print(first.name, first.start_ns <= conv.start_ns <= first.end_ns)
        """,
    )
    lines = result.stdout.splitlines()
    assert [line.split("|")[:2] for line in lines[:-1]] == [
        ["(outside any layer)", "before"],
        ["(outside any layer)", "outside"],
        ["0.conv", "conv(float*, int)"],
        ["0.relu", "relu"],
        ["0", "add"],
        ["1.conv", "conv(float*, int)"],
        ["1.relu", "relu"],
        ["1", "add"],
    ], result.stderr
    assert lines[2].split("|")[2:] == ["5000", "(3, 0, 0)"]
    assert lines[-1] == "Sequential True"


def test_named_ranges_outrank_module_names(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        with hooks.kernel_trace() as trace:
            with hooks.layer_range("my layer"):
                model[0](torch.zeros(1))
            ranges = hooks.active()
            layer = ranges.id_of("pushed")
            slot = ranges.push(layer)
            launch(b"in the loop", 1)
            ranges.pop(slot)
            model[1].conv(torch.zeros(1))
        print([kernel.layer for kernel in trace.kernels], hooks.active())
        """,
    )
    assert result.stdout == "['my layer', 'my layer', 'my layer', 'pushed', 'Launch'] None\n", result.stderr


def test_heads_and_tails_name_functions_as_the_graph_does(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        import torchsurgeon as ts

        class Twice(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = torch.nn.ReLU(), torch.nn.ReLU()
            def forward(self, x):
                return torch.cos(self.second(torch.sin(self.first(x))))

        graph = ts.trace(Twice().eval(), torch.rand(1))
        part = ts.cut(graph, 2)
        with hooks.kernel_trace() as trace:
            part.tail(*part.head(torch.rand(1)))
            with hooks.layer_range("all"):
                part.tail(*part.head(torch.rand(1)))
        print([layer.name for layer in graph.layers])
        print([layer.name for layer in trace.layers])
        print(part.tail.watcher)
        """,
    )
    names, traced, watcher = result.stdout.splitlines() or ["", "", result.stderr]
    assert names == str(["first", "sin", "second", "cos"])
    # The modules around the steps are found too, except inside a range that was opened by name.
    assert traced == str(["Head", "segment", "first", "sin", "Segment", "second", "cos", "all"])
    assert watcher == "None"


def test_a_failing_model_leaves_no_trace_running(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        class Fails(torch.nn.Module):
            def forward(self, x):
                raise ValueError("no")
        try:
            with hooks.kernel_trace():
                torch.nn.Sequential(Block(), Fails())(torch.zeros(1))
        except ValueError as error:
            print(error)
        with hooks.kernel_trace() as trace:
            try:
                with hooks.kernel_trace():
                    pass
            except NativeUnavailableError as error:
                print(error)
            Block()(torch.zeros(1))
        print([kernel.layer for kernel in trace.kernels])
        """,
    )
    assert result.stdout.splitlines() == [
        "no",
        "tracing CUDA kernels: one kernel trace runs at a time, and one is running; end it first",
        "['conv', 'relu', 'Block']",
    ], result.stderr


def test_a_cupti_that_is_missing_or_refuses_says_what_to_do(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        def attempt():
            try:
                with hooks.kernel_trace():
                    print("traced")
            except NativeUnavailableError as error:
                print(error)
            assert hooks.active() is None

        candidates = _native._cupti_candidates
        _native._cupti_candidates = lambda: [("/nowhere/libcupti.so.13", False)]
        attempt()
        _native._cupti_candidates = candidates
        for answer in ("35", "39", "999", "0"):
            os.environ["FAKE_CUPTI_ENABLE"] = answer
            attempt()
        """,
    )
    missing, privileges, subscribers, other, none = result.stdout.splitlines()
    assert "needs CUPTI, and none of /nowhere/libcupti.so.13 opens" in missing
    assert "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES (35): run as root on a Jetson" in privileges
    assert "another profiler (nsys, ncu, torch.profiler) uses it; end that first" in subscribers
    assert "CUPTI refuses with CUPTI_ERROR_FAKE (999)" in other
    assert none == "traced"


def test_a_gpus_clocks_tell_device_time(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        from torchsurgeon import meters
        stream = torch.cuda.current_stream = lambda: type("Stream", (), {"cuda_stream": 0})()
        with meters.CudaEventClock(3) as clock:
            for _ in range(2):
                for _ in range(3):
                    clock.mark()
                print(clock.intervals_ns())
        with meters.CuptiClock() as clock:
            for _ in range(2):
                launch(b"before", 1)
                clock.mark()
                launch(b"one", 2000)
                launch(b"two", 3000)
                clock.mark()
                clock.mark()
                launch(b"after", 1)
                print(clock.intervals_ns())
        print(hooks.active())
        """,
    )
    assert result.stdout == "[1500000, 1500000]\n" * 2 + "[5000, 0]\n" * 2 + "None\n", result.stderr


def test_a_profile_takes_its_times_from_the_gpus_events(fake_gpu: Path) -> None:
    result = on_fake_gpu(
        fake_gpu,
        """
        import torchsurgeon as ts
        from torchsurgeon.profiling.measure import ModelRun
        torch.cuda.current_stream = lambda: type("Stream", (), {"cuda_stream": 0})()
        graph = ts.trace(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()).eval(), torch.rand(1))
        run = ModelRun(graph, torch.device("cpu"), None)
        with ts.meters.CudaEventClock(len(run.whole.steps) + 1) as clock:
            samples, whole = run.times(clock, 2, 1, 0.0, lambda: None)
        print(len(run.whole.steps), samples.sum(axis=1).round(6).tolist(), whole.tolist())
        """,
    )
    assert result.stdout == "3 [0.0045, 0.0045] [0.0015, 0.0015]\n", result.stderr


@pytest.mark.cuda
def test_real_kernels_are_found_under_their_layers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 30 * 30, 4)
    ).cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    model(x)
    with hooks.kernel_trace() as trace:
        for _ in range(3):
            model(x)
    rows = {row.name: row for row in trace.by_layer()}
    assert {"0", "1", "3"} <= set(rows)
    assert all(rows[name].calls == 3 and rows[name].launches >= 3 and rows[name].busy_s > 0 for name in ("0", "1", "3"))
    assert all(trace.layers[0].start_ns < kernel.start_ns for kernel in trace.kernels)
    trace.save(tmp_path / "trace.json")
    assert trace.dropped == 0
