from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from paths import ROOT

from torchsurgeon import _native
from torchsurgeon.errors import NativeUnavailableError
from torchsurgeon.hooks.recorder import Source, SpanRecorder

NO_DRIVER = -3


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found of the extension is forgotten before and after."""
    _native._load.cache_clear()
    _native.clock.cache_clear()
    yield
    _native._load.cache_clear()
    _native.clock.cache_clear()


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("torchsurgeon._native.importlib.import_module", missing)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_recorder_is_clean_under(sanitizer: str, build, tmp_path: Path) -> None:
    program = tmp_path / "recorder"
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1", "-pthread")
    compiled = build("recorder.cpp", *flags, "-o", program)
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in result.stderr:  # a kernel that randomises addresses more than the sanitizer bears
        command = ["setarch", "--addr-no-randomize", program]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "all passed" in result.stdout


def test_declarations_agree_with_cudas_headers(build) -> None:
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [
        *site.glob("nvidia/*/include"),
        *site.glob("triton/backends/nvidia/include"),
        Path("/usr/local/cuda/include"),
    ]
    includes = [argument for folder in folders if folder.is_dir() for argument in ("-isystem", folder)]
    if not any((folder / "cupti.h").is_file() for folder in folders):
        pytest.skip("no cupti.h: pip install nvidia-cuda-cupti")
    result = build("cuda_abi.cpp", "-fsyntax-only", *includes)
    assert result.returncode == 0, result.stderr


def test_declarations_agree_with_pythons_header(build) -> None:
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        pytest.skip("no Python.h: apt-get install python3-dev")
    result = build("python_abi.cpp", "-fsyntax-only", "-isystem", include)
    assert result.returncode == 0, result.stderr


def test_spans_come_back_in_the_order_they_began() -> None:
    with SpanRecorder(10) as recorder:
        outer = recorder.begin(3)
        inner = recorder.begin(5)
        recorder.end(inner)
        recorder.end(outer)
        recorder.add(7, 100, 250, Source.CUPTI)
        spans = recorder.spans()
    assert [span.id for span in spans] == [3, 5, 7]
    assert spans[0].start_ns <= spans[1].start_ns <= spans[1].end_ns <= spans[0].end_ns
    assert (spans[2].start_ns, spans[2].end_ns, spans[2].source) == (100, 250, Source.CUPTI)


def test_marks_time_a_straight_line() -> None:
    with SpanRecorder(3) as recorder:
        mark = recorder.mark
        for span_id in (8, 9, 8, -1):
            mark(span_id)
        spans = recorder.spans()
    assert [span.id for span in spans] == [8, 9, 8]
    assert [span.end_ns for span in spans[:-1]] == [span.start_ns for span in spans[1:]]


def test_spans_share_pythons_clock() -> None:
    with SpanRecorder(1) as recorder:
        before = time.perf_counter_ns()
        recorder.end(recorder.begin(0))
        after = time.perf_counter_ns()
        (span,) = recorder.spans()
    assert before <= span.start_ns <= span.end_ns <= after


def test_a_full_recorder_keeps_the_first_spans_and_counts_the_rest() -> None:
    with SpanRecorder(2) as recorder:
        for span_id in range(5):
            recorder.end(recorder.begin(span_id))
        assert [span.id for span in recorder.spans()] == [0, 1]
        assert recorder.dropped == 3
        recorder.clear()
        assert recorder.spans() == ()


def test_threads_record_side_by_side() -> None:
    with SpanRecorder(400) as recorder:

        def record(first: int) -> None:
            for span_id in range(first, first + 100):
                recorder.end(recorder.begin(span_id))

        threads = [threading.Thread(target=record, args=(first,)) for first in (0, 100, 200, 300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(span.id for span in recorder.spans()) == list(range(400))


def test_a_closed_recorder_is_refused() -> None:
    recorder = SpanRecorder(1)
    recorder.close()
    with pytest.raises(RuntimeError, match="closed or was never opened"):
        recorder.begin(0)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_recorder_without_room_is_refused(capacity: int) -> None:
    with pytest.raises(RuntimeError, match="at least 1 span"):
        SpanRecorder(capacity)


@pytest.mark.usefixtures("not_built")
def test_without_the_extension_the_clock_runs_and_says_so_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"Python's clock.*not built"):
        clock = _native.clock()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.clock() is clock
    assert clock() <= clock()


@pytest.mark.usefixtures("not_built")
def test_without_the_extension_its_users_are_told_what_to_install() -> None:
    assert not _native.available()
    with pytest.raises(NativeUnavailableError, match=r"recording spans needs.*not built.*--no-build-isolation"):
        SpanRecorder(4)


def test_an_extension_of_another_pytorch_says_so(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: torch_library_impl")

    monkeypatch.setattr("torchsurgeon._native.importlib.import_module", broken)
    with pytest.raises(
        NativeUnavailableError,
        match=f"does not load under PyTorch {torch.__version__}.*undefined symbol".replace("+", r"\+"),
    ):
        _native.operators("anything")


def test_a_machine_without_driver_is_told_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    with pytest.raises(NativeUnavailableError, match=r"timing needs an NVIDIA driver: libcuda\.so\.1"):
        _native.open_cuda_driver("timing")
    assert _native.operators("this test").cupti_open("libcupti.so.13", False) == NO_DRIVER


def test_a_driver_that_lacks_functions_is_called_too_old(tmp_path: Path) -> None:
    empty = tmp_path / "empty.cpp"
    empty.write_text("int nothing;\n")
    subprocess.run(["g++", "-shared", "-fPIC", empty, "-o", tmp_path / "libcuda.so.1"], check=True)
    result = run_python("from torchsurgeon import _native; _native.open_cuda_driver('timing')", tmp_path)
    assert "timing needs a newer NVIDIA driver" in result.stderr


EVENTS = """
import os
from torchsurgeon import _native

def attempt(records):
    try:
        ops = _native.open_cuda_driver("timing")
        tape = ops.event_tape_open(4)
        for _ in range(records):
            ops.event_record(tape, 0)
        print(ops.event_rewind(tape).flatten().tolist())
    except (RuntimeError, _native.NativeUnavailableError) as error:
        print(error)

os.environ["FAKE_CUDA_INIT"] = "100"
attempt(4)
os.environ["FAKE_CUDA_INIT"] = "0"
attempt(4)
attempt(6)
os.environ["FAKE_CUDA_CONTEXT"] = "0"
attempt(1)
"""


def test_events_are_nanoseconds_since_the_first_or_say_what_is_missing(fake_gpu: Path) -> None:
    result = run_python(EVENTS, fake_gpu)
    no_device, times, too_short, no_context = result.stdout.splitlines()
    assert "cuInit answered CUDA_ERROR_NO_DEVICE (100); check that nvidia-smi lists one" in no_device
    assert times == "[0, 1500000, 3000000, 4500000]"
    assert "6 events were recorded on a tape of 4" in too_short
    assert "has no CUDA context; move a tensor to the device first" in no_context
