"""The section of docs/evaluation.md that shows what benchmarks.evaluate.alternatives has run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evaluate import alternatives, end_to_end, pictures, public_code
from benchmarks.evaluate.end_to_end_page import way_in_words, without_bfloat16
from benchmarks.evaluate.markdown import listed, percent, table, text
from benchmarks.evaluate.rivals.rival import UNDER_WAY
from benchmarks.evaluate.rivals.server_only import JPEG_QUALITY
from benchmarks.evaluate.rivals.sockets import PROBE_BYTES, Search
from benchmarks.evaluate.study import SLOWER
from benchmarks.support import result_file

OURS = "ours"
_EVEN = 1.05
"""Up to this ratio, two ways are taken for equally quick."""


class Case(NamedTuple):
    """One rival with one network over one link.

    Attributes:
        network: the network.
        link: the link's name.
        rival: the rival's name.
        row: what was measured of it.
        ours: what was measured of torchsurgeon there.
    """

    network: str
    link: str
    rival: str
    row: Mapping[str, Any]
    ours: Mapping[str, Any]

    @property
    def latency_s(self) -> float:
        """What a request takes, with the search before it where there is one."""
        searched_s = self.row["replanning_s"] if self.rival == Search.NAME else 0.0
        return float(self.row["latency_s"]) + float(searched_s)

    @property
    def slower(self) -> float:
        """How many times as long as ours it takes."""
        return self.latency_s / float(self.ours["latency_s"])

    @property
    def frames_s(self) -> float:
        """How many answers come in a second of a stream."""
        return 1 / self.latency_s if self.rival == Search.NAME else float(self.row["frames_s"])


def cases(results: Mapping[str, Any]) -> Iterator[Case]:
    """Yield every rival, ours among them, with every network over every link."""
    for network, found in results.items():
        rivals = found["rivals"]
        for rival, rows in rivals.items():
            for link in rivals[OURS]:
                yield Case(network, link, rival, rows.get(link, rows.get(alternatives.ON_DEVICE)), rivals[OURS][link])


def section(folder: Path) -> str:
    """Return the section's text and tables; one sentence where nothing has been run.

    Args:
        folder: where the files of results are.
    """
    path = folder / alternatives.OUT.name
    if not path.exists():
        return "Nothing is recorded here yet: `python -m benchmarks.evaluate.alternatives` runs it."
    read = json.loads(path.read_text())
    results, environment = read["results"], read["environment"]
    every = list(cases(results))
    one_by_one = list(dict.fromkeys(f"*{case.rival}*" for case in every if "stream_cut" not in case.row))
    parts = [
        _opening(environment, _elsewhere(folder, results)),
        _who(environment["packages"]),
        *without_bfloat16(results),
        _summary(every),
        text(
            f"""
            Latencies in milliseconds, and in brackets how many times ours that is. Frames a second are those of a
            stream, in which {listed(one_by_one)} have one inference under way, and all others several. For streams,
            ours chooses the cut with the highest rate. Bytes are all that crosses the uplink for one inference, with
            headers; where the cut depends on the link, so do the bytes (3G / LTE / Wi-Fi). Replanning is what choosing
            another cut takes when the link has changed.
            """
        ),
    ]
    for network in results:
        own = [case for case in every if case.network == network]
        parts += [f"### {network}", _cuts([case for case in own if case.rival == OURS]), _table(own)]
    parts.append(_public(folder / public_code.OUT.name))
    return "\n\n".join(parts)


def _opening(environment: Mapping[str, Any], elsewhere: list[str]) -> str:
    where = f"on {environment['device']}"
    if elsewhere:
        where = f"""but on another {environment["device"]} than {listed(elsewhere)} there, so that milliseconds of the
            two sections cannot be compared"""
    return text(
        f"""
        Measured and emulated as [above](#end-to-end), {where}: the device is one core, on which
        layers, encoders and planners take {SLOWER:g} times as long, whoever's they are; the server is the other core.
        What sockets, HTTP clients and gloo do is not slowed down. Every rival has an emulated link of the same rates.
        All take turns in random order, over all links, and every answer is compared with eager PyTorch's. Shown are
        medians. Frames a second are those of a stream that goes on: of {alternatives.STREAM_FRAMES}
        frames and more, all but the first and the last {UNDER_WAY} are counted; where a schedule answers batches, one
        of {alternatives.STREAM_FRAMES} follows the other; where nothing overlaps, one call does. Requests of a
        stream are encoded one after the other, as on a device with one core.
        [alternatives.json](../benchmarks/results/evaluation/alternatives.json) has the quartiles, the cuts and how far
        the answers are from eager PyTorch's.
        `make evaluate` leaves {" and ".join(alternatives.SLOW)} as it is recorded, which takes ten minutes.
        """
    )


def _elsewhere(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Return which networks were run on another processor end to end, as far as bfloat16 tells processors apart."""
    ends = result_file.known(folder / end_to_end.OUT.name)
    return [name for name, own in results.items() if name in ends and ends[name].get("bfloat16") != own["bfloat16"]]


def _who(packages: Mapping[str, str]) -> str:
    def version(name: str) -> str:
        return f"{name} {packages[name]}"

    bullets = (
        """
        **ours**: the way that `plan()` chooses from profiles, over eager PyTorch, ONNX Runtime and OpenVINO bf16 on
        both sides and codecs without loss. Its answers come from OpenVINO bf16 where it chooses that.
        """,
        f"""
        **a search per request**: the approach of the public re-implementation of Neurosurgeon, Tjyy-1223/Neurosurgeon,
        in code of ours. Before each request it sends {PROBE_BYTES:,} bytes to learn the rate, and for every cut of the
        chain it runs the head twice and the tail once on the device. The latency holds both. Ours is kinder than the
        original, whose times are regressions: it has the measured ones.
        """,
        """
        **pushed over TCP**: the approach of cloudsyslab/ParetoPipe's TCP backend, in code of ours: a cut that is fixed
        beforehand, and pickled tensors that are sent without waiting. Its server keeps the answer; here it sends it
        back.
        """,
        f"""
        **DADS**: its minimum cut, in code of ours over SciPy's maximum flow ({version("scipy")}), found at every
        request and run by torchsurgeon's runtime in eager PyTorch.
        """,
        f"""
        **torch.distributed.pipelining over gloo**: its own code ({version("torch")}): two stages, GPipe's schedule, a
        stream as micro-batches of one batch. Both stages are cut by torchsurgeon, where one tensor that is sent as it
        is makes a cut inside the network the quickest. Gloo's connection is led over the emulated link.
        """,
        f"""
        **server**: an ordinary inference server, {version("starlette")} on {version("uvicorn")}, in code of ours of a
        few lines, asked by {version("requests")}; it runs all of the network in eager PyTorch unless another runtime is
        named. JPEG (quality {JPEG_QUALITY}, {version("pillow")}) is not the same picture, and its answers differ; all
        others keep its bytes.
        """,
        f"""
        **device**: everything on the device, by {version("torch")} as it is and compiled by inductor,
        {version("onnxruntime")} and {version("openvino")} themselves, without torchsurgeon.
        """,
    )
    return "\n".join("- " + text(bullet).replace("\n", "\n  ") for bullet in bullets)


def _summary(every: list[Case]) -> str:
    others = [case for case in every if case.rival != OURS and case.row["lossless"]]
    ahead = [case for case in others if case.slower < 1 / _EVEN]
    best = [
        min(case.slower for case in others if (case.network, case.link) == key)
        for key in dict.fromkeys((case.network, case.link) for case in every)
    ]
    own = [case for case in every if case.rival == OURS]
    ends = sum(str(case.row["cut"]).split("|")[0] in ("device", "server") for case in own)
    split = sum(str(case.row["stream_cut"]).split("|")[0] not in ("device", "server") for case in own)
    rates = [
        max(case.frames_s for case in others if (case.network, case.link) == (one.network, one.link)) / one.frames_s
        for one in own
    ]
    fewer = [rate for rate in rates if rate > 1]
    most = f", {min(fewer):.2f} to {max(fewer):.2f} times as many" if fewer else ""
    said = text(
        f"""
        The quickest rival that keeps the picture's bytes takes {min(best):.2f} to {max(best):.2f} times as long as
        ours, {statistics.geometric_mean(best):.2f} times in the geometric mean over {len(best)} networks and links.
        Where pictures come one at a time, ours runs the whole network on one side in {ends} of these {len(best)} cases.
        What is gained beside a rival then comes from the backend and the codec, and not from a cut; a rival that has
        the same two takes about as long. For streams, ours cuts the network in {split} of {len(best)} cases, where the
        plan foretells the highest rate. In {len(fewer)} of the {len(best)} streams a rival answers more frames a second
        than ours{most}. Of all {len(others)} latencies of rivals that keep the picture's bytes, ours is
        quicker in {sum(case.slower > _EVEN for case in others)}, within
        {percent(_EVEN - 1)} in {sum(1 / _EVEN <= case.slower <= _EVEN for case in others)}, and slower in {len(ahead)}.
        """
    )
    if not ahead:
        return said
    named = "; ".join(
        f"{case.network} over {pictures.LINK_NAMES[case.link]}, {case.rival} ({case.slower:.2f})" for case in ahead
    )
    return f"{said}\n\n{text(f'Slower than a rival: {named}.')}"


def _table(every: list[Case]) -> str:
    links = list(dict.fromkeys(case.link for case in every))
    lines = []
    for rival in dict.fromkeys(case.rival for case in every):
        own = [next(case for case in every if (case.rival, case.link) == (rival, link)) for link in links]
        lines.append(
            (
                rival,
                *(_latency(case) for case in own),
                " / ".join(f"{case.frames_s:.2g}" for case in own),
                _each([f"{case.row['sent_bytes']:,}" if case.row["sent_bytes"] else "0" for case in own]),
                _each([_duration(case.row["replanning_s"]) for case in own]),
            )
        )
    names = [pictures.LINK_NAMES[link] for link in links]
    return table(("", *(f"{name}, ms" for name in names), "frames/s", "bytes", "replanning"), lines)


def _cuts(own: list[Case]) -> str:
    """Say where ours runs what."""

    def each(key: str) -> str:
        return "; ".join(f"{pictures.LINK_NAMES[case.link]}: {way_in_words(case.row[key])}" for case in own)

    return text(f"One picture at a time, ours runs on: {each('cut')}. In streams it runs on: {each('stream_cut')}.")


def _latency(case: Case) -> str:
    if case.rival == OURS:
        return f"{1e3 * case.latency_s:.0f}"
    return f"{1e3 * case.latency_s:.0f} ({case.slower:.2f}×)"


def _each(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _public(path: Path) -> str:
    if not path.exists():
        return text(
            """
            The public code of Tjyy-1223/Neurosurgeon and cloudsyslab/ParetoPipe itself has not been run here yet:
            `python -m benchmarks.evaluate.public_code` does it, from clones.
            """
        )
    read = json.loads(path.read_text())
    results = read["results"]
    searched = [
        (name, pictures.LINK_NAMES[link], *(f"{row[key]:.3g}" for key in _SEARCHED))
        for name, rows in results["Neurosurgeon"].items()
        for link, row in rows.items()
    ]
    pushed = [
        (name, pictures.LINK_NAMES[link], *(f"{row[key]:.3g}" for key in _PUSHED), f"{row['bytes_per_frame']:,}")
        for name, rows in results["ParetoPipe"].items()
        for link, row in rows.items()
    ]
    commits, packages = results["commits"], read["environment"]["packages"]
    return "\n\n".join(
        [
            "### The public code itself",
            text(
                f"""
                Both were also run as they are, outside this repository, by
                `python -m benchmarks.evaluate.public_code`, with torch {packages["torch"]}: two processes on the same
                two cores, the emulated link between them, and the device's modules {SLOWER:g} times as slow. Their
                networks have random weights and other inputs than those above, so their figures stand beside ours,
                not in one table with them.
                """
            ),
            text(
                f"""
                **Tjyy-1223/Neurosurgeon** at {commits["Neurosurgeon"][:7]}, `cloud_api.py` and `edge_api.py`, seconds:
                the probe of the rate, the search on the device, and what it reports of head, crossing and tail at the
                cut that it chooses. Its regressions are of its authors' machine. No answer comes back to the device.
                """
            ),
            table(
                ("network", "link", "probe", "search", "head", "crossing", "tail", "head, crossing and tail"), searched
            ),
            text(
                f"""
                **cloudsyslab/ParetoPipe** at {commits["ParetoPipe"][:7]}, `partition1.py` and `partition2.py`, with
                batches of eight random pictures: seconds from the beginning of a batch's head to the end of its tail,
                frames a second, and bytes a frame. Heads run ahead of the link, so batches wait for it.
                """
            ),
            table(("network", "link", "a batch's latency, s", "frames/s", "bytes a frame"), pushed),
        ]
    )


_SEARCHED = ("probe_s", "search_s", "head_s", "crossing_s", "tail_s", "latency_s")
_PUSHED = ("batch_latency_s", "frames_s")
