"""search_sigmas: what is measured and kept, what the model then does; killed and gone on with."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from consistency import published
from consistency.config import NetworkConfig, NoiseConfig
from consistency.evaluation.domain import extract, feature_net_for
from consistency.evaluation.frechet import GaussianStats
from pipelines import scoring
from pipelines.artifacts import (
    Committed,
    ReferenceStats,
    SearchedModel,
    ShardSet,
    TrainedModel,
    content_of,
    from_json,
    to_json,
)
from pipelines.dag import StepContext
from pipelines.measuring import SigmaSearchConfig
from pipelines.recipe import Cluster
from pipelines.scoring import Job, Measured, in_process
from pipelines.steps import search_sigmas
from pipelines.steps.search_sigmas import SearchStage
from pipelines.yardstick import Yardstick
from tests.scores import DOMAIN, reference

ABOUT = published.ModelDescription(
    kind="consistency",
    network=NetworkConfig(
        channels=4, channel_mult=(1,), num_blocks=1, attention=(), class_conditional=True
    ),
    noise=NoiseConfig(),
    size=8,
    channels=1,
    class_names=("a", "b", "c"),
)
SHARD = ShardSet(
    count=30,
    size=8,
    channels=1,
    class_names=ABOUT.class_names,
    num_shards=1,
    bytes=1,
    pixel_digest="p",
    manifest_sha256="m",
)


class LocalContext(StepContext):
    """Inputs are plain folders here, without commit records."""

    def fetch(self, committed: Committed[Any], name: str) -> Path:
        path = Path(committed.url) / name
        assert path.is_file(), path
        return path


def trained(folder: Path, about: published.ModelDescription = ABOUT) -> Committed[TrainedModel]:
    """What a training stage, or select_ema, would have committed."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    template = published.build_network(about).state_dict()
    weights = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in template.items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(about.to_json())
    (folder / "curve.jsonl").write_text('{"images": 1}\n')
    value = TrainedModel(
        kind=about.kind,
        images=600,
        steps=60,
        parameters=1,
        final_loss=0.5,
        train_seconds=1.0,
        weights_sha256=hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
        ema="power-0.1",
        emas=("power-0.05",),
        snapshots=("power-0.1-60",),
    )
    return Committed(step="isolate", fingerprint="f", url=str(folder), seconds=1.0, value=value)


@dataclass
class Judge:
    """Stands for the measuring: levels score their distance to those that are wanted."""

    wanted: tuple[float, ...]
    confirming: tuple[float, ...] | None = None  # what the larger sample wants instead
    asked: list[Job] = field(default_factory=list)
    calls: int = 0
    bad: float | None = None  # instead of a number, wherever it stands

    def __call__(
        self, ctx: StepContext, yardstick: Yardstick, jobs: Sequence[Job]
    ) -> list[Measured]:
        self.calls += 1
        return [self.measure(job) for job in jobs]

    def measure(self, job: Job) -> Measured:
        self.asked.append(job)
        about = published.ModelDescription.from_json(job.subject.description)
        sigmas = about.sigmas(job.protocol.steps)[1:]
        larger = job.protocol.seed_blocks > 1
        wanted = self.confirming if larger and self.confirming else self.wanted
        value = sum(math.log(a / b) ** 2 for a, b in zip(sigmas, wanted, strict=False))
        value = value if self.bad is None else self.bad
        values = tuple(value + 0.01 * n for n in range(job.protocol.seed_blocks))
        return Measured(values, None, "", {}, np.zeros((1, 8, 8, 1), np.uint8))


@dataclass
class Place:
    out: Path
    trained: Committed[TrainedModel]
    monkeypatch: pytest.MonkeyPatch
    reference: ReferenceStats = field(default_factory=lambda: reference(digest="p", count=30))

    def run(self, judge: Judge, **asked: Any) -> SearchedModel:
        self.monkeypatch.setattr(search_sigmas, "measure_in_step", judge)
        return self.search(**asked)

    def search(self, mid_sigma: float = 0.821, **asked: Any) -> SearchedModel:
        ctx = LocalContext(
            step="search_sigmas-isolate",
            fingerprint="s",
            out=self.out,
            work=str(self.out.parent / "work"),
            workspace="",
            tracking_uri="",
            experiment="",
            cluster=Cluster(),
        )

        def given(step: str, value: Any) -> Committed[Any]:
            url = str(self.out.parent / step)
            return Committed(step=step, fingerprint=step, url=url, seconds=0.0, value=value)

        return search_sigmas.run(
            ctx,
            SearchStage(search=SigmaSearchConfig(**asked), mid_sigma=mid_sigma),
            shard=given("shard", SHARD),
            reference=given("reference", self.reference),
            trained=self.trained,
        )

    def table(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = json.loads((self.out / "sigmas.json").read_text())
        return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "out").mkdir()
    return Place(tmp_path / "out", trained(tmp_path / "trained"), monkeypatch)


# --- what is kept --------------------------------------------------------------------------------


def test_the_levels_that_score_best_become_the_models_own(place: Place) -> None:
    value = place.run(Judge((5.0, 0.5, 0.05)), steps=4)
    assert [len(levels) for levels in value.searched] == [2, 3, 4]
    model = published.load(place.out)  # a whole model folder
    assert model.description == replace(ABOUT, searched=value.searched)
    for steps in (2, 3, 4):
        assert model.description.levels(steps) == list(value.searched[steps - 2])
    assert model.description.levels(4) == pytest.approx([80, 5, 0.5, 0.05], rel=0.2)
    assert model.description.levels(3) == model.description.levels(4)[:3]
    # One step, and more than were searched, are as they were.
    assert model.description.levels(1) == ABOUT.levels(1)
    assert model.description.levels(5) == ABOUT.levels(5)
    drawn = model.generate(range(3), steps=2, seed=4)
    asked = published.load(Path(place.trained.url))
    np.testing.assert_array_equal(
        drawn, asked.generate(range(3), steps=2, seed=4, levels=value.searched[0])
    )


def test_the_result_is_the_model_with_levels(place: Place) -> None:
    before, value = place.trained.value, place.run(Judge((5.0,)))
    same = {**to_json(before), "emas": (), "snapshots": ()}
    assert value == SearchedModel(**same, searched=value.searched)
    assert sorted(path.name for path in place.out.iterdir()) == [
        *("config.json", "curve.jsonl", "sigmas.json", "weights.safetensors")
    ]
    for name in ("weights.safetensors", "curve.jsonl"):
        assert (place.out / name).read_bytes() == (Path(place.trained.url) / name).read_bytes()
    assert from_json(SearchedModel, json.loads(json.dumps(to_json(value)))) == value


def test_other_levels_are_another_result_for_those_who_come_after(place: Place) -> None:
    """The weights are the same, but not what is evaluated."""
    values = [place.run(Judge((wanted,))) for wanted in (5.0, 0.5, 5.0)]
    assert content_of(values[0]) == content_of(values[2]) != content_of(values[1])


def test_the_default_stays_where_a_larger_sample_does_not_agree(place: Place) -> None:
    value = place.run(Judge((5.0,), confirming=(0.7,)), mid_sigma=0.7)
    assert value.searched == ()
    assert published.load(place.out).description == ABOUT  # mid_sigma is the evaluation's to say
    (row,) = place.table()["decided"]
    assert row["kept"] == row["default"] == [80.0, 0.7]
    assert row["found"][1] == pytest.approx(5.0, rel=0.2)
    assert row["searched"] is False
    assert min(one["value"] for one in row["confirmed"]) == row["confirmed"][0]["value"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_distances_that_are_not_finite_keep_the_default(place: Place, bad: float) -> None:
    assert place.run(Judge((5.0,), bad=bad)).searched == ()
    assert "NaN" not in (place.out / "sigmas.json").read_text()
    assert "Infinity" not in (place.out / "sigmas.json").read_text()


# --- what is measured ----------------------------------------------------------------------------


def test_every_list_is_measured_once_under_common_noise_and_confirmed_under_other(
    place: Place,
) -> None:
    judge = Judge((5.0,))
    asked = {"samples": 101, "confirm_samples": 202, "confirm_blocks": 3, "seed": 9}
    place.run(judge, **asked)
    assert len({job.key for job in judge.asked}) == len(judge.asked)
    protocols = [(j.protocol.samples, j.protocol.seed_blocks, j.protocol.seed) for j in judge.asked]
    first = protocols.index((202, 3, 10))
    assert set(protocols[:first]) == {(101, 1, 9)}
    assert set(protocols[first:]) == {(202, 3, 10)}
    assert first <= 24
    assert len(protocols) - first <= 3
    rows = place.table()["measured"]
    assert [row["protocol"] for row in rows] == [job.protocol.digest for job in judge.asked]
    assert [row["confirms"] for row in rows] == [False] * first + [True] * (len(rows) - first)
    assert all(row["steps"] == 2 and len(row["sigmas"]) == 2 for row in rows)
    assert [80.0, 0.821] in [row["sigmas"] for row in rows[:first]]
    assert judge.calls < first  # the grid side by side


def test_no_level_lies_below_what_the_model_knows(place: Place, tmp_path: Path) -> None:
    about = replace(ABOUT, boundary=0.0, lowest_sigma=1.0)  # as TCM's second stage
    place.trained = trained(tmp_path / "truncated", about)
    judge = Judge((0.01,))
    place.run(judge, steps=3, mid_sigma=2.0)
    for job in judge.asked:
        said = json.loads(job.subject.description)
        assert min(said["searched"][0]) >= 1.0


def test_a_mean_flow_is_searched_in_its_times(place: Place, tmp_path: Path) -> None:
    about = replace(ABOUT, kind="mean_flow")
    place.trained = trained(tmp_path / "flow", about)
    value = place.run(Judge((3.0, 0.5)), steps=3, mid_sigma=0.7)
    times = published.load(place.out).description.levels(3)
    assert times == [1.0, *(s / (1 + s) for s in value.searched[1][1:])]
    assert times == pytest.approx([1.0, 0.75, 1 / 3], rel=0.1)
    decided = place.table()["decided"]
    assert [row["default"][1:] for row in decided] == [[0.7], pytest.approx([2.0, 0.5])]
    published.load(place.out).generate(range(2), steps=3, seed=0)


def test_too_few_samples_for_a_covariance_are_refused(place: Place) -> None:
    from infra.errors import UserError

    with pytest.raises(UserError, match="allow_rank_deficient"):
        place.run(Judge((5.0,)), samples=64)
    place.run(Judge((5.0,)), samples=64, allow_rank_deficient=True)


# --- the real measuring --------------------------------------------------------------------------


@pytest.fixture
def measuring(place: Place) -> Callable[[], list[str]]:
    """The reference are samples at levels (80, 3); says which items were drawn since last time."""
    net = feature_net_for(size=8, image_channels=1, num_classes=3)
    folder = place.out.parent / "reference"
    folder.mkdir()
    save_file(net.state_dict(), folder / "features.safetensors")
    sha256 = hashlib.sha256((folder / "features.safetensors").read_bytes()).hexdigest()
    model = published.load(Path(place.trained.url))
    images = model.generate(range(300), steps=2, seed=4, levels=[80.0, 3.0])
    real = GaussianStats.from_features(extract(net.eval(), images)).gaussian
    arrays = {"n": np.asarray(300, np.int64), "mean": real.mean, "covariance": real.covariance}
    save_arrays(arrays, folder / "stats.safetensors")
    place.reference = reference(
        replace(DOMAIN, weights_sha256=sha256), total_variance=float(real.covariance.trace())
    )
    place.monkeypatch.setattr(scoring, "on_actors", lambda cluster: in_process)
    drawn: list[str] = []
    real_part = scoring.sample_part

    def counting(model: Any, extractor: Any, indices: Sequence[int], **sampling: Any) -> Any:
        levels = model.description.levels(sampling["steps"])
        drawn.append(f"{levels} {sampling['seed']} {indices[0]}")
        return real_part(model, extractor, indices, **sampling)

    place.monkeypatch.setattr(scoring, "sample_part", counting)

    def since() -> list[str]:
        seen = drawn[:]
        drawn.clear()
        return seen

    return since


ASKED = {"samples": 100, "confirm_samples": 100, "confirm_blocks": 2, "seed": 3}


def test_real_samples_lead_to_the_levels_the_real_images_came_from(
    place: Place, measuring: Callable[[], list[str]]
) -> None:
    value = place.search(**ASKED)
    (levels,) = value.searched
    assert levels[1] == pytest.approx(3.0, rel=0.35)
    drawn = measuring()
    assert len(set(drawn)) == len(drawn)


def test_a_killed_search_goes_on_and_repeats_no_measurement(
    place: Place, measuring: Callable[[], list[str]]
) -> None:
    undisturbed = place.search(**ASKED)
    table, whole = place.table(), measuring()

    for path in place.out.iterdir():
        path.unlink()
    place.out.parent.joinpath("work").rename(place.out.parent / "first")
    real_part, allowed = scoring.sample_part, iter([4, 1, 3, 2, 1, 100])

    def interrupted(tries: Iterator[int]) -> None:
        left = next(tries)

        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real_part(*args, **kwargs)

        place.monkeypatch.setattr(scoring, "sample_part", dying)

    drawn: list[str] = []
    kills = 0
    while True:
        interrupted(allowed)
        try:
            again = place.search(**ASKED)
        except KeyboardInterrupt:
            kills += 1
            drawn += measuring()
            continue
        break
    drawn += measuring()
    assert kills == 5
    assert sorted(drawn) == sorted(whole)
    assert again == undisturbed
    assert place.table() == table
