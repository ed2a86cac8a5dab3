"""Bytes that cross against the answers that stay the same: for pictures and for boundaries of EfficientNet-Lite.

Each way encodes and decodes the photographs held out (``benchmarks/support/pictures.py``), or what a block computes
from them, and the rest of the network answers. ``kept`` is the share of photographs whose top-1 answer is the one that
the network gives without a codec. ``low`` and ``high`` are exact binomial bounds, each of which holds with 95 %.

    python -m benchmarks.codec_rates                # all ways, about 15 minutes; codec-rates.json and codec-rates.png
    python -m benchmarks.codec_rates --only avif    # measure these curves anew, and keep the others
    python -m benchmarks.codec_rates --draw         # the figure alone
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks.support import pictures, result_file
from torchsurgeon.codec import Codec, find_codec, fit_codec
from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.tracing.graph import LayerGraph

OUT = result_file.RESULTS / "codec-rates.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "codecs.md"
BEGIN, END = "<!-- figures, by benchmarks.codec_rates -->", "<!-- end of figures -->"
BEGIN_STUDENTS, END_STUDENTS = "<!-- students, by benchmarks.codec_rates -->", "<!-- end of students -->"
TRAINING = result_file.RESULTS / "student-training.json"
MODELS = {"lite0": 2, "lite2": 1}
"""Views of each object held out, by model."""
BLOCKS = {"lite0": (1, 2, 3, 4, 5, 7, 8, 10, 11, 13, 14), "lite2": (3, 6, 7, 10, 11, 15)}
"""The blocks after which the network is cut: those that begin or end a stage, and some further on."""
FITTED_BLOCKS = {"lite0": (1, 2, 3, 4, 5, 11), "lite2": (7,)}
"""Those of them after which a codec is fitted."""
RATES = (4.5, 3.9, 3.5, 3.0, 2.0, 1.5, 1.2, 1.0, 0.8, 0.6, 0.4, 0.25)
"""Bits a value at which a fitted codec is measured, where it has them."""
BUDGET = 0.03
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to encode what crosses, at one point of one model.

    Attributes:
        curve: the name of its family, a curve of the figure.
        name: its own name: the codec, its quality, the picture's height and width where that is smaller.
        point: the index of the partition point.
        where: the point's name.
        encode: one picture or boundary to bytes.
        decode: the bytes to what goes into the rest of the network, and the shape and dtype that it has.
        lossless: whether every bit is kept.
        head: what computes the boundary in place of the model's own layers; None where these do.
    """

    curve: str
    name: str
    point: int
    where: str
    encode: Callable[[Tensor], bytes | memoryview]
    decode: Callable[[bytes | memoryview, Tensor], Tensor]
    lossless: bool = False
    head: nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class Rate:
    """What one way was measured to do; the attributes are those of ``Way``, and these.

    Attributes:
        size_bytes: mean bytes that cross.
        pictures: how many pictures were judged.
        changed: how many top-1 answers changed.
        kept: the share that did not.
        low: the lower bound of that share.
        high: its upper bound.
        encode_s: median seconds of encoding, on one thread. They are the process's own, so that others that run beside
            it do not count.
        decode_s: likewise of decoding.
    """

    curve: str
    name: str
    point: int
    where: str
    lossless: bool
    size_bytes: float
    pictures: int
    changed: int
    kept: float
    low: float
    high: float
    encode_s: float
    decode_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results; the figure lies beside it")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", default=[], metavar="CURVE", help="measure curves whose names hold this")
    parser.add_argument("--views", type=int, help="pictures of each object held out (2 for Lite0, 1 for Lite2)")
    parser.add_argument("--draw", action="store_true", help="draw the figure from the file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    if not options.draw:
        for name in options.models:
            before = known.get(name, {}).get("rates", []) if options.only else []
            known[name] = _model(name, options.only, options.views or MODELS[name], before)
            result_file.write(options.out, known, pillow=_pillow(), **pictures.packages())
    draw(known, options.out.with_suffix(".png"))
    if options.out == OUT:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        text = f"{before}{BEGIN}\n\n{page(known)}\n{END}{rest.partition(END)[2]}"
        before, _, rest = text.partition(BEGIN_STUDENTS)
        shown = students_page(known, json.loads(TRAINING.read_text())["results"])
        PAGE.write_text(f"{before}{BEGIN_STUDENTS}\n\n{shown}\n{END_STUDENTS}{rest.partition(END_STUDENTS)[2]}")


def _model(name: str, only: Sequence[str], views: int, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates of one model; of curves that ``only`` does not name those of ``before``."""
    found = pictures.photographs(pictures.side(name), held_out_views=views)
    model = pictures.classifier(name)
    graph = ts.trace(model, found.held_out[:1])
    rates = list(measure(graph, found.held_out, ways(name, graph, found.sample, only)))
    fresh = {rate.curve for rate in rates}
    rows = [row for row in before if row["curve"] not in fresh] + [dataclasses.asdict(rate) for rate in rates]
    with torch.no_grad():
        confidence = _batched(model, found.held_out).softmax(1).amax(1).median()
    return {
        "pictures": len(found.held_out),
        "median_confidence": round(float(confidence), 3),
        "within_budget": within_budget(rows),
        "rates": rows,
    }


def ways(name: str, graph: LayerGraph, sample: Tensor, only: Sequence[str] = ()) -> Iterator[Way]:
    """Yield the ways of a model, those of a point one after the other.

    Args:
        name: the model's name.
        graph: the traced model.
        sample: photographs to set a codec up with, for codecs that are made for a cut.
        only: parts of the names of curves; others are left out. None are left out where it is empty.
    """

    def wanted(curve: str) -> bool:
        return not only or any(part.lower() in curve.lower() for part in only)

    yield from (way for way in _picture_ways() if wanted(way.curve))
    for block in BLOCKS[name]:
        point, where = after_block(graph, block), f"block {block}"
        for codec in filter(wanted, ("zstd", "int8+zstd", "int4+zstd")):
            yield _boundary_way(codec, find_codec(codec), point, where)
        if block in FITTED_BLOCKS[name] and wanted("fitted"):
            begin_s = time.process_time()
            fitted = fit_codec(graph, point, list(sample.split(1)), name=f"block-{block}")
            print(f"fitting a codec after block {block} took {time.process_time() - begin_s:.0f} s")
            for rate in RATES:
                if fitted.rates[-1] <= rate <= fitted.rates[0]:
                    yield _boundary_way("fitted", fitted.at(rate), point, where, f"{rate:g} bits a value")
    file = pictures.CACHE.parent / "students" / f"{name}.student"
    if file.exists() and wanted("student"):
        # Made by benchmarks.student_training.
        codec = ts.load_codec(file, graph)
        assert codec.student is not None
        head, point = codec.student.segment(graph, codec.point[0]), codec.point[0]
        where = f"block {codec.point[1].split('.')[2]}"
        for rate in RATES:
            if codec.rates[-1] <= rate <= codec.rates[0]:
                way = _boundary_way("student", codec.at(rate), point, where, f"{rate:g} bits a value")
                yield dataclasses.replace(way, head=head)


def after_block(graph: LayerGraph, block: int) -> int:
    """Return the index of the partition point after a block, with all of it on the device."""
    return max(point.index for point in graph.points if point.name.startswith(f"net.blocks.{block}."))


def _picture_ways() -> Iterator[Way]:
    """Yield the picture formats, each in the settings near which it is used, at several resolutions."""
    lossless = {"lossless": True, "quality": 100}
    yield _picture_way("PNG", "png", "PNG", lossless=True)
    yield _picture_way("PNG", "png, fastest", "PNG", {"compress_level": 1}, lossless=True)
    yield _picture_way("WebP lossless", "webp-lossless", "WEBP", lossless, lossless=True)
    fastest = {"lossless": True, "quality": 20, "method": 0}
    yield _picture_way("WebP lossless", "webp-lossless, fastest", "WEBP", fastest, lossless=True)
    for quality in (60, 75, 90, 95, 98, 100):
        yield _picture_way("JPEG 4:2:0", f"jpeg-{quality}", "JPEG", {"quality": quality, "subsampling": 2})
    for quality in (75, 90, 95, 98, 100):
        yield _picture_way("JPEG 4:4:4", f"jpeg444-{quality}", "JPEG", {"quality": quality, "subsampling": 0})
    for quality in (60, 80, 90, 95, 100):
        yield _picture_way("WebP", f"webp-{quality}", "WEBP", {"quality": quality})
    for quality in (15, 25, 35, 50, 65, 75, 85, 90, 95):
        yield _picture_way("AVIF 4:2:0", f"avif-{quality}", "AVIF", {"quality": quality})
    for quality in (75, 90, 95, 98):
        yield _picture_way("AVIF 4:4:4", f"avif444-{quality}", "AVIF", {"quality": quality, "subsampling": "4:4:4"})
    for quality in (90, 99):
        fast = {"quality": quality, "subsampling": "4:4:4", "speed": 10}
        yield _picture_way("AVIF 4:4:4, fastest", f"avif444-{quality}, fastest", "AVIF", fast)
    for share in (3 / 4, 1 / 2):
        for quality in (75, 90):
            options = {"quality": quality, "subsampling": "4:4:4", "speed": 10}
            yield _picture_way("AVIF, smaller picture", f"avif444-{quality}, fastest", "AVIF", options, share=share)


_PICTURE_CURVES = (
    "PNG",
    "WebP lossless",
    "JPEG 4:2:0",
    "JPEG 4:4:4",
    "WebP",
    "AVIF, smaller picture",
    "AVIF 4:2:0",
    "AVIF 4:4:4",
    "AVIF 4:4:4, fastest",
)


def _picture_way(
    curve: str,
    name: str,
    kind: str,
    options: dict[str, Any] | None = None,
    *,
    share: float = 1.0,
    lossless: bool = False,
) -> Way:
    """Return the way that sends the picture itself.

    Args:
        curve: as in ``Way``.
        name: as in ``Way``.
        kind: Pillow's name of the format.
        options: what Pillow is asked for.
        share: height and width of what is sent, as a share of the picture's. The server enlarges it again.
        lossless: as in ``Way``.
    """
    from PIL import Image

    # Encoders of AVIF use all cores unless told otherwise.
    asked = (options or {}) | ({"max_threads": 1} if kind == "AVIF" else {})

    def encode(picture: Tensor) -> bytes:
        image = Image.fromarray(picture[0].permute(1, 2, 0).contiguous().numpy())
        if share < 1:
            image = image.resize([round(length * share) for length in image.size], Image.Resampling.LANCZOS)
        written = io.BytesIO()
        image.save(written, kind, **asked)
        return written.getvalue()

    def decode(data: bytes | memoryview, like: Tensor) -> Tensor:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.convert("RGB")
        if share < 1:
            pixels = pixels.resize((like.shape[-1], like.shape[-2]), Image.Resampling.BICUBIC)
        return torch.from_numpy(numpy.array(pixels)).permute(2, 0, 1)[None].contiguous()

    smaller = f" at {share:.0%}" if share < 1 else ""
    return Way(curve, name + smaller, 0, "input", encode, decode, lossless)


def _boundary_way(curve: str, codec: Codec, point: int, where: str, name: str = "") -> Way:
    """Return the way that sends what a block computes with a codec.

    Args:
        curve: as in ``Way``.
        codec: the codec.
        point: as in ``Way``.
        where: as in ``Way``.
        name: as in ``Way``; the codec's name by default.
    """

    def encode(boundary: Tensor) -> memoryview:
        return codec.encode(boundary).data

    def decode(data: bytes | memoryview, like: Tensor) -> Tensor:
        return codec.decode(data, like.dtype, like.shape, None, max_bytes=like.nbytes)

    return Way(curve, name or codec.name, point, where, encode, decode, codec.lossless)


def measure(graph: LayerGraph, held_out: Tensor, known: Iterator[Way]) -> Iterator[Rate]:
    """Yield what each way costs and keeps.

    Args:
        graph: the traced model.
        held_out: the photographs, ``uint8[N, 3, side, side]``.
        known: the ways, those of a point one after the other.
    """
    own = _top1(graph.model, held_out)
    at: tuple[int, nn.Module | None] = (-1, None)
    boundaries, tail = held_out, graph.model
    for way in known:
        if (way.point, way.head) != at:
            at, point = (way.point, way.head), graph.point(way.point)
            if way.point:
                head = way.head or cut(graph, point).head.get_submodule("segment")
                tail = tail_for(graph, [spec.name for spec in point.tensors], flat=True)
                with torch.no_grad():
                    boundaries = torch.cat([head(picture[None])[0] for picture in held_out])
            else:
                boundaries, tail = held_out, graph.model
        yield _rate(way, boundaries, tail, own)


def _rate(way: Way, boundaries: Tensor, tail: nn.Module, own: Tensor) -> Rate:
    sizes, encode_s, decode_s, decoded = [], [], [], []
    for boundary in boundaries.split(1):
        begin_s = time.process_time()
        data = way.encode(boundary)
        encoded_s = time.process_time()
        decoded.append(way.decode(data, boundary))
        decode_s.append(time.process_time() - encoded_s)
        encode_s.append(encoded_s - begin_s)
        sizes.append(len(data))
    there = torch.cat(decoded)
    assert not way.lossless or torch.equal(there, boundaries), f"{way.name} changed a tensor"
    changed = 0 if way.lossless else int((_top1(tail, there) != own).sum())
    low, high = bounds(changed, len(own))
    rate = Rate(
        *(way.curve, way.name, way.point, way.where, way.lossless),
        size_bytes=round(statistics.mean(sizes), 1),
        pictures=len(own),
        changed=changed,
        kept=round(1 - changed / len(own), 4),
        low=round(low, 4),
        high=round(high, 4),
        encode_s=round(statistics.median(encode_s), 6),
        decode_s=round(statistics.median(decode_s), 6),
    )
    print(
        f"{way.where:>8}  {way.name:22} {rate.size_bytes:9,.0f} bytes  kept {rate.kept:6.1%} "
        f"({rate.low:.1%} … {rate.high:.1%})  {rate.encode_s * 1e3:.2f} + {rate.decode_s * 1e3:.2f} ms",
        flush=True,
    )
    return rate


def bounds(changed: int, pictures: int) -> tuple[float, float]:
    """Return the exact binomial bounds (Clopper and Pearson) of the share that is kept; each holds with 95 %."""
    from scipy.stats import beta

    kept = pictures - changed
    low = float(beta.ppf(0.05, kept, changed + 1)) if kept else 0.0
    return low, float(beta.ppf(0.95, kept + 1, changed)) if changed else 1.0


def allowed(rows: Sequence[dict[str, Any]], kept: str, budget: float = BUDGET) -> list[dict[str, Any]]:
    """Return the ways that keep a budget; of each curve at each point from the most bytes on until the first does not.

    So no way is taken because it did well by chance among many that were tried.

    Args:
        rows: the rates of one model.
        kept: what has to keep the budget: ``"kept"``, the measured share, or ``"low"``, its lower bound.
        budget: the share of answers that may change.
    """
    found, ended = [], set()
    for row in sorted(rows, key=lambda row: -row["size_bytes"]):
        family = row["curve"], row["where"]
        if row["lossless"] or (family not in ended and row[kept] >= 1 - budget):
            found.append(row)
        else:
            ended.add(family)
    return found


def within_budget(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fewest bytes of each curve within the budget: as measured, and where the lower bound keeps it too."""
    found: dict[str, Any] = {}
    for key, kept in (("measured", "kept"), ("surely", "low")):
        best: dict[str, dict[str, Any]] = {}
        for row in allowed(rows, kept):
            best[f"{row['curve']}, {row['where']}"] = {
                name: row[name] for name in ("name", "size_bytes", "kept", "low")
            }
        found[key] = dict(sorted(best.items(), key=lambda item: item[1]["size_bytes"]))
    return found


def _batched(model: nn.Module, inputs: Tensor) -> Tensor:
    answers = [model(part) for part in inputs.split(_BATCH)]
    return torch.cat([answer if isinstance(answer, Tensor) else answer[0] for answer in answers])


@torch.no_grad()
def _top1(model: nn.Module, inputs: Tensor) -> Tensor:
    return _batched(model, inputs).argmax(1)


def _pillow() -> str:
    from PIL import __version__, features

    return f"{__version__}, libavif {features.version('avif')}, libwebp {features.version('webp')}"


def page(results: dict[str, Any]) -> str:
    """Return a table of the fewest bytes within the budget, as Markdown: pictures, and each block's boundary."""
    lines = ["| network | what crosses | as measured | surely |", "|---|---|---|---|"]
    for name, found in results.items():
        places = dict.fromkeys(row["where"] for row in found["rates"])
        for where in places:
            cells = [_fewest(found["rates"], where, kept) for kept in ("kept", "low")]
            what = "picture" if where == "input" else f"boundary after {where}"
            lines.append(f"| {name.capitalize()} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def students_page(results: dict[str, Any], training: dict[str, Any]) -> str:
    """Return a table of what students keep at each rate, as Markdown, beside what else keeps as many answers."""
    lines = [
        "| network | student | answers kept | its bytes | a picture that keeps as many | own layers, fitted codec |",
        "|---|---|---|---|---|---|",
    ]
    for name, trained in training.items():
        rows = results[name]["rates"]
        about = (
            f"{trained['flops_share']:.1%} of the operations (own layers: {trained['own_flops_share']:.1%}), "
            f"{trained['training_s'] / 60:.0f} min on {trained['threads']} core"
        )
        students = sorted((row for row in rows if row["curve"] == "student"), key=lambda row: row["size_bytes"])
        # Only rates that keep more than every lower one.
        worth = [row for k, row in enumerate(students) if all(row["kept"] > one["kept"] for one in students[:k])]
        for row in reversed(worth):
            fitted = [one for one in rows if one["curve"] == "fitted" and one["where"] == row["where"]]
            cells = [_smallest(some, row["kept"]) for some in ([r for r in rows if r["where"] == "input"], fitted)]
            size = f"{row['size_bytes'] / 1e3:.1f} kB"
            lines.append(f"| {name.capitalize()} | {about} | {row['kept']:.1%} | {size} | {' | '.join(cells)} |")
            about = ""
    return "\n".join(lines) + "\n"


def _smallest(rows: Sequence[dict[str, Any]], kept: float) -> str:
    found = [row for row in rows if row["kept"] >= kept]
    if not found:
        return "–"
    best = min(found, key=lambda row: row["size_bytes"])
    return f"{best['size_bytes'] / 1e3:.1f} kB, {best['name']}"


def _fewest(rows: Sequence[dict[str, Any]], where: str, kept: str) -> str:
    best = min((row for row in allowed(rows, kept) if row["where"] == where), key=lambda row: row["size_bytes"])
    name = (
        best["name"]
        if best["name"].startswith(best["curve"]) or where == "input"
        else f"{best['curve']}, {best['name']}"
    )
    return f"{best['size_bytes'] / 1e3:.1f} kB, {name}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw bytes against kept answers, a panel for each model."""
    from torchsurgeon.report.pictures import new_figure, save_figure

    figure = new_figure(7.5 * len(results), 6.5)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(panels, results.items(), strict=True):
        _panel(axis, found["rates"])
        axis.legend(fontsize=7, loc="lower right")
        axis.set_title(f"EfficientNet-{name.capitalize()}, {found['pictures']} photographs")
    panels[0].set_ylabel("top-1 answers that stay the same (%)")
    figure.suptitle("What crosses, and how many answers it keeps (bars: each bound holds with 95 %)")
    save_figure(figure, path)


def _color(curve: str, depth: float) -> Any:
    """Return the colour of a curve, the same for every network; ``depth`` is where it is cut, from 0 to 1."""
    from matplotlib import colormaps

    codecs = {"zstd": "0.6", "int8+zstd": "tab:brown", "int4+zstd": "tab:olive"}
    if curve in codecs:
        return codecs[curve]
    if curve == "student":
        return "magenta"
    if curve not in _PICTURE_CURVES:
        return colormaps["winter"](depth)
    return colormaps["autumn"](_PICTURE_CURVES.index(curve) / len(_PICTURE_CURVES))


def _panel(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        # Cuts are drawn as one curve of each codec, from the largest boundary to the smallest.
        cuts = row["curve"].endswith("zstd")
        curves.setdefault((row["curve"], "" if row["where"] == "input" or cuts else row["where"]), []).append(row)
    points = [row["point"] for row in rows]
    for (curve, where), found in curves.items():
        found = sorted(found, key=lambda row: row["size_bytes"])
        kilobytes = [row["size_bytes"] / 1e3 for row in found]
        kept = numpy.array([row["kept"] for row in found]) * 100
        errors = [kept - [row["low"] * 100 for row in found], [row["high"] * 100 for row in found] - kept]
        is_picture = found[0]["where"] == "input"
        axis.errorbar(
            kilobytes,
            kept,
            yerr=errors,
            fmt="o--" if is_picture else "s-",
            markersize=4,
            linewidth=1,
            elinewidth=0.5,
            color=_color(curve, found[0]["point"] / max(1, *points)),
            label=f"{'picture' if is_picture else where or 'boundaries'}: {curve}",
        )
        if where:
            axis.annotate(where, (kilobytes[-1], kept[-1]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        if not is_picture and not where:
            for row, x, y in zip(found, kilobytes, kept, strict=True):
                axis.annotate(
                    row["where"].removeprefix("block "), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
    axis.axhline(100 * (1 - BUDGET), color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("kilobytes that cross (logarithmic; numbers at boundaries are blocks)")
    axis.set_ylim(35, 101)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
