"""Student heads: how they are made, what they keep, their files, and what they refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.codec import Budget, FittedCodec, Look, measure
from torchsurgeon.codec.fitted.student import Student
from torchsurgeon.codec.student import thinning, views
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import CodecError, UnfinishedWarning
from torchsurgeon.planning.rows import LayerCosts

torch.set_num_threads(1)

CUT, SHARE = "5", 0.05


class Residual(nn.Module):
    """A block whose output channels are bound to its input's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, 4 * channels, 1)
        self.each = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels, bias=False)
        self.norm = nn.BatchNorm2d(4 * channels)
        self.narrow = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.norm(self.each(torch.relu(self.wide(x))))))


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        Residual(16),
        Residual(16),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


def pictures(count: int, seed: int) -> list[Tensor]:
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").split(1))


X = pictures(1, 0)[0]


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    return ts.trace(classifier(), X)


@pytest.fixture(scope="module")
def student(graph: ts.LayerGraph) -> FittedCodec:
    return ts.distill(graph, CUT, pictures(64, 1), share=SHARE, training_s=3, name="small")


def unexplained(graph: ts.LayerGraph, head: nn.Module) -> float:
    own = cut(graph, CUT).head
    with torch.no_grad():
        pairs = [(own(x)[0], head(x)[0]) for x in pictures(32, 9)]
    values = torch.cat([one for one, _ in pairs])
    error = torch.cat([one - other for one, other in pairs])
    return float(error.square().mean() / values.var())


def test_it_takes_the_share_of_operations_asked_for(graph: ts.LayerGraph, student: FittedCodec) -> None:
    assert student.student is not None
    head = student.student.module(graph, student.point[0])
    counted = ts.trace(head, X)
    whole = sum(layer.flops for layer in graph.layers)
    share = sum(layer.flops for layer in counted.layers) / whole
    assert 0.5 * SHARE < share <= SHARE
    assert student.student.flops_share == pytest.approx(share, rel=1e-3)


def test_it_gives_nearly_what_the_models_own_layers_give(graph: ts.LayerGraph, student: FittedCodec) -> None:
    assert student.student is not None
    assert unexplained(graph, student.student.module(graph, student.point[0])) < 0.3


def test_training_makes_it_better(graph: ts.LayerGraph, student: FittedCodec) -> None:
    untrained = ts.distill(graph, CUT, pictures(64, 1), share=SHARE, training_s=0, name="untrained")
    assert untrained.student is not None
    assert student.student is not None
    before, after = Look.of(untrained.student), Look.of(student.student)
    assert before.steps == 0 < after.steps
    assert after.unexplained < before.unexplained


def test_layers_fitted_to_the_models_own_are_better_than_those_that_were_left(graph: ts.LayerGraph) -> None:
    from torchsurgeon.codec.student.refit import refit

    own = cut(graph, CUT).head.get_submodule("segment")
    scores = {name: torch.rand(len(layer.weight)) for name, layer in thinning.weighted_layers(own).items()}
    flops = sum(thinning.count_flops(own, [X]).values())
    thinned = thinning.thin(own, [X], scores, 0.5 * flops)
    thinned.segment.requires_grad_(False)
    before = unexplained(graph, thinned.segment)
    refit(thinned.segment, own, thinned.kept, [[x] for x in pictures(32, 3)], lambda: None)
    assert unexplained(graph, thinned.segment) < 0.5 * before


def test_the_model_itself_is_not_changed(graph: ts.LayerGraph, student: FittedCodec) -> None:
    fresh = classifier()
    for (name, one), other in zip(graph.model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert not graph.model.training
    assert all(one.requires_grad for one in graph.model.parameters())


def test_channels_that_count_most_stay(graph: ts.LayerGraph) -> None:
    own = cut(graph, CUT).head.get_submodule("segment")
    scores = {name: torch.rand(len(layer.weight)) for name, layer in thinning.weighted_layers(own).items()}
    scores["2.wide"][7] = scores["2.each"][7] = 1e6
    flops = sum(thinning.count_flops(own, [X]).values())
    thinned = thinning.thin(own, [X], scores, 0.5 * flops)
    assert 7 in thinned.kept["2.wide"]
    assert torch.equal(thinned.kept["2.wide"], thinned.kept["2.each"])
    assert len(thinned.kept["4"]) == 8, "boundary tensors keep all channels"


def test_its_file_holds_it(graph: ts.LayerGraph, student: FittedCodec, tmp_path: Path) -> None:
    student.save(tmp_path / "small.student")
    loaded = FittedCodec.load(tmp_path / "small.student")
    loaded.check(graph)
    assert loaded.name == student.name
    assert loaded.student is not None
    assert student.student is not None
    one, other = (each.student.module(graph, 0 + each.point[0]) for each in (student, loaded) if each.student)
    assert torch.equal(one(X)[0], other(X)[0])
    assert Look.of(loaded.student) == Look.of(student.student)


def test_a_training_goes_on_where_it_was_interrupted(graph: ts.LayerGraph, tmp_path: Path) -> None:
    path = tmp_path / "going.training"
    sample = pictures(32, 1)

    with pytest.warns(UnfinishedWarning, match="can go on"):
        first = ts.distill(graph, CUT, sample, share=SHARE, training_s=60, checkpoint=path, progress=_interrupting(0.5))
    assert first.student is not None
    assert path.exists()
    steps = Look.of(first.student).steps
    with pytest.warns(UnfinishedWarning):
        second = ts.distill(
            graph, CUT, sample, share=SHARE, training_s=60, checkpoint=path, progress=_interrupting(1.0)
        )
    assert second.student is not None
    assert Look.of(second.student).steps > steps
    with pytest.raises(CodecError, match=r"another model, point, sample or share; remove"):
        ts.distill(graph, CUT, sample, share=0.2, training_s=1, checkpoint=path)
    path.write_bytes(b"damaged")
    with pytest.raises(CodecError, match=r"holds no training that can go on"):
        ts.distill(graph, CUT, sample, share=SHARE, training_s=1, checkpoint=path)


def _interrupting(after_s: float) -> Callable[[float, float, str], None]:
    """Press Ctrl-C once, when so many seconds have been trained."""
    pressed = []

    def progress(done: float, total: float, what: str) -> None:
        if done > after_s and not pressed:
            pressed.append(done)
            raise KeyboardInterrupt

    return progress


def test_it_is_measured_as_a_codec_with_seconds_of_its_own(graph: ts.LayerGraph, student: FittedCodec) -> None:
    rated = student.at(student.rates[0])
    budget = Budget(max_top1_change=0.9, decide_by="estimate")
    table = measure(graph, pictures(24, 5), ["raw", rated.name], budget=budget)
    rows = {row.cost.codec: row for row in table.at(student.point[0])}
    cost = rows[rated.name].cost
    assert cost.head_share is not None
    assert cost.head_share > 0
    assert not cost.lossless
    assert rows[rated.name].findings
    assert rows["raw"].cost.head_share is None
    assert [row.point for row in table.rows if row.cost.codec == rated.name] == [student.point[0]]


def test_a_plan_counts_its_seconds_in_place_of_the_layers(graph: ts.LayerGraph, student: FittedCodec) -> None:
    rated = student.at(student.rates[0])
    table = measure(graph, pictures(24, 5), ["raw", rated.name], budget=Budget(max_top1_change=1, decide_by="estimate"))
    profile = ts.profile(graph)
    found = [row for row in LayerCosts(graph, profile, profile).rows(table) if row.codec == rated.name]
    cost = next(row.cost for row in table.rows if row.cost.codec == rated.name)
    assert cost.head_share is not None
    assert [row.head_s for row in found] == [pytest.approx(cost.head_share * profile.total_s)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"share": 0.0}, "share must be between 0 and 1"),
        ({"share": float("nan")}, "share must be between 0 and 1"),
        ({"share": 0.9}, "not more than the share of 90.0%; choose a later point or a smaller share"),
        ({"share": 1e-4}, "can be thinned to"),
        ({"training_s": -1.0}, "training_s must be seconds, 0 or more; got -1"),
        ({"batch": 0}, "batch must be from 1 to 4096; got 0"),
        ({"point": "13"}, "there is no layer '13' to cut after"),
    ],
)
def test_bad_arguments_are_refused(graph: ts.LayerGraph, arguments: dict[str, object], says: str) -> None:
    known = {"point": CUT, "sample": pictures(16, 0), "training_s": 0.0, **arguments}
    with pytest.raises(ts.TorchSurgeonError, match=says):
        ts.distill(graph, **known)  # type: ignore[arg-type]


def test_a_small_sample_is_refused(graph: ts.LayerGraph) -> None:
    with pytest.raises(CodecError, match="from 16 inputs or more, better 500; got 3"):
        ts.distill(graph, CUT, pictures(3, 0))


def test_a_student_of_another_model_or_with_wrong_sizes_is_refused(graph: ts.LayerGraph, student: FittedCodec) -> None:
    assert student.student is not None
    other = ts.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), X)
    with pytest.raises(CodecError, match="does not fit Sequential"):
        student.student.module(other, 1)
    sizes = {**student.student.sizes, "2.wide": {"out_channels": 1000}}
    with pytest.raises(CodecError, match=r"out_channels of '2.wide' cannot be 1000"):
        Student(sizes, student.student.tensors, 0.1, {}).module(graph, student.point[0])
    with pytest.raises(CodecError, match="finite float32"):
        Student({}, {"a": numpy.array([numpy.nan], numpy.float32)}, 0.1, {})
    fewer = {name: array[:1] for name, array in student.student.tensors.items()}
    with pytest.raises(CodecError, match="does not fit Sequential"):
        Student(student.student.sizes, fewer, 0.1, {}).module(graph, student.point[0])


def test_views_of_images_differ_and_keep_shape_and_range() -> None:
    images = [[(255 * torch.rand(1, 3, 20, 24)).to(torch.uint8)] for _ in range(4)]
    drawn = views.views(images, 8, torch.Generator().manual_seed(0))
    (one,), (other,) = next(drawn), next(drawn)
    assert one.shape == (8, 3, 20, 24)
    assert one.dtype == torch.uint8
    assert not torch.equal(one, other)


def test_inputs_that_are_no_images_are_drawn_as_they_are() -> None:
    tokens = [[torch.full((1, 5), k)] for k in range(6)]
    (one,) = next(views.views(tokens, 3, torch.Generator().manual_seed(0)))
    assert one.shape == (3, 5)
    assert all(len(set(row.tolist())) == 1 for row in one)


def test_without_torch_pruning_it_says_what_to_install(graph: ts.LayerGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(CodecError, match=r"pip install 'torchsurgeon\[distill\]'"):
        ts.distill(graph, CUT, pictures(16, 0), share=SHARE, training_s=0)


def test_a_transformers_hidden_layers_are_thinned() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 96, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    x = torch.rand(1, 7, 6)
    graph = ts.trace(model, x)
    whole = sum(one.flops for one in graph.layers)
    point = next(point for point in graph.points if point.name == "2")
    own = cut(graph, point).head.get_submodule("segment")
    share = 0.8 * sum(thinning.count_flops(own, [x]).values()) / whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedWarning)
        made = ts.distill(graph, point, [torch.rand(1, 7, 6) for _ in range(20)], share=share, training_s=0.5)
    assert made.student is not None
    assert made.student.flops_share <= share


# --- what a breaker found ---


class Tied(nn.Module):
    """Two convolutions that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 1)
        self.other.weight = self.one.weight
        self.last, self.out = nn.Conv2d(24, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.relu(self.other(torch.relu(self.one(torch.relu(self.first(x)))))))
        return self.out(x.mean((2, 3)))


class Masked(nn.Module):
    """A head that hands on a mask of booleans beside its values, and has a buffer that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow, self.out = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 6, 1), nn.Linear(6, 4)
        self.register_buffer("ruled_out", torch.tensor(-float("inf")))

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(input=torch.relu(self.wide(x)))
        mask = x[:, :1, 1:-1, 1:-1] > 10
        return self.out(torch.where(~mask, y, self.ruled_out).mean((2, 3)))


@pytest.mark.parametrize("kind", [Tied, Masked])
def test_unusual_heads_are_kept_as_they_were_trained(kind: type[nn.Module], tmp_path: Path) -> None:
    model = kind().eval()
    graph = ts.trace(model, X)
    place = next(one for one in graph.points if {spec.shape[1] for spec in one.tensors if spec.shape[1] == 6})
    made = ts.distill(graph, place, pictures(24, 2), share=0.5, training_s=0.3)
    made.save(tmp_path / "unusual.student")
    loaded = ts.load_codec(tmp_path / "unusual.student", graph)
    assert made.student is not None
    assert loaded.student is not None
    one, other = (each.module(graph, place.index)(X) for each in (made.student, loaded.student))
    assert all(map(torch.equal, one, other))
    assert Look.of(made.student).unexplained < 1


def test_measured_together_the_student_computes_what_crosses(graph: ts.LayerGraph, student: FittedCodec) -> None:
    from torchsurgeon.codec import measure_together

    rated = student.at(student.rates[0])
    budget = Budget(min_cosine=0.1, decide_by="estimate")
    sample = pictures(30, 6)
    alone = measure(graph, sample, ["raw", rated.name], points=[CUT], budget=budget)
    (row,) = [row for row in alone.rows if row.cost.codec == rated.name]
    (together,) = measure_together(graph, sample, [(CUT, rated.name)], budget)
    assert together.estimate == pytest.approx(row.findings[0].estimate)
    with pytest.raises(CodecError, match="used at the first cut only"):
        measure_together(graph, sample, [("0", "raw"), (CUT, rated.name)], budget)


def test_a_checkpoint_of_another_sample_is_refused_and_one_that_cannot_be_written_too(
    graph: ts.LayerGraph, tmp_path: Path
) -> None:
    path = tmp_path / "one.training"
    ts.distill(graph, CUT, pictures(20, 1), share=SHARE, training_s=0.2, checkpoint=path)
    with pytest.raises(CodecError, match="another model, point, sample or share"):
        ts.distill(graph, CUT, pictures(20, 2), share=SHARE, training_s=0.2, checkpoint=path)
    with pytest.raises(CodecError, match="cannot be written"):
        ts.distill(graph, CUT, pictures(20, 1), share=SHARE, training_s=0.2, checkpoint=tmp_path / "none" / "a")
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "optimizer": {}}, path)
    with pytest.raises(CodecError, match="holds no training that can go on"):
        ts.distill(graph, CUT, pictures(20, 1), share=SHARE, training_s=0.2, checkpoint=path)


def test_a_student_at_a_point_that_is_not_measured_is_refused(graph: ts.LayerGraph, student: FittedCodec) -> None:
    with pytest.raises(CodecError, match="which is not measured; add this point"):
        measure(graph, pictures(3, 5), [student.at(2).name], points=["0"])
