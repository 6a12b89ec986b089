"""select_ema: which averages are candidates, which wins, and what is written."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from consistency import published
from consistency.config import NetworkConfig, NoiseConfig, PowerEMA, TeacherConfig
from consistency.ema import ema_update_, gamma_from_sigma_rel, power_beta
from consistency.evaluation.domain import extract, feature_net_for
from consistency.evaluation.frechet import GaussianStats
from pipelines import scoring
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, TrainedModel, content_of
from pipelines.dag import StepContext
from pipelines.measuring import SelectConfig
from pipelines.recipe import Cluster
from pipelines.scoring import Job, Measured, in_process
from pipelines.steps import select_ema
from pipelines.steps.select_ema import SelectStage
from pipelines.train_worker import snapshot_steps
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
REFERENCE = reference(digest="p", count=30)
STEPS = 60
TRACKED = (0.05, 0.10, 0.15, 0.20)  # the last two stand for what the snapshots should rebuild
TRAINED = ("power-0.05", "power-0.1")


class LocalContext(StepContext):
    """Inputs are plain folders here, without commit records."""

    def fetch(self, committed: Committed[Any], name: str) -> Path:
        path = Path(committed.url) / name
        assert path.is_file(), path
        return path


def walk() -> dict[str, list[dict[str, torch.Tensor]]]:
    """A training in which the weights wander: the EMA of every width after each step."""
    generator = torch.Generator().manual_seed(0)
    template = published.build_network(ABOUT).state_dict()
    weights = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in template.items()}
    averages = {w: {k: v.clone() for k, v in weights.items()} for w in TRACKED}
    seen: dict[str, list[dict[str, torch.Tensor]]] = {f"power-{w:g}": [] for w in TRACKED}
    for step in range(1, STEPS + 1):
        for value in weights.values():
            value += 0.02 * torch.randn(value.shape, generator=generator)
        for width, average in averages.items():
            beta = power_beta(step, gamma_from_sigma_rel(width))
            ema_update_(list(average.values()), list(weights.values()), beta)
            seen[f"power-{width:g}"].append({k: v.clone() for k, v in average.items()})
    return seen


WALK = walk()
FINAL = {name: averages[-1] for name, averages in WALK.items()}


def trained(folder: Path, snapshots: int = 6) -> Committed[TrainedModel]:
    """What a training stage would have committed of the walk."""
    for name in ("ema", "snapshots"):
        (folder / name).mkdir(parents=True)
    first, *others = TRAINED
    save_file(FINAL[first], folder / "weights.safetensors")
    for name in others:
        save_file(FINAL[name], folder / "ema" / f"{name}.safetensors")
    kept = []
    for number in range(1, snapshots + 1):
        step = STEPS * number // snapshots
        for name in TRAINED:
            kept.append(f"{name}-{step}")
            save_file(WALK[name][step - 1], folder / "snapshots" / f"{kept[-1]}.safetensors")
    (folder / "config.json").write_text(ABOUT.to_json())
    (folder / "curve.jsonl").write_text('{"images": 1}\n')
    value = TrainedModel(
        kind="consistency",
        images=STEPS * 10,
        steps=STEPS,
        parameters=1,
        final_loss=0.5,
        train_seconds=1.0,
        weights_sha256=hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
        ema=first,
        emas=tuple(others),
        snapshots=tuple(kept),
    )
    return Committed(step="isolate", fingerprint="f", url=str(folder), seconds=1.0, value=value)


@dataclass
class Judge:
    """Stands for the measuring: an EMA scores its distance to the one that is wanted."""

    wanted: str
    values: dict[str, float] = field(default_factory=dict)  # said instead
    asked: list[tuple[str, Job]] = field(default_factory=list)

    def __call__(
        self, ctx: StepContext, yardstick: Yardstick, jobs: Sequence[Job]
    ) -> list[Measured]:
        return [self.measure(job) for job in jobs]

    def measure(self, job: Job) -> Measured:
        weights = job.subject.load("cpu").function.net.state_dict()

        def distance(name: str) -> float:
            parts = zip(weights.values(), FINAL[name].values(), strict=True)
            return math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in parts))

        nearest = min(FINAL, key=distance)
        self.asked.append((nearest, job))
        value = self.values.get(nearest, distance(self.wanted))
        return Measured((value,), None, "", {}, np.zeros((1, 8, 8, 1), np.uint8))


@dataclass
class Place:
    out: Path
    trained: Committed[TrainedModel]
    monkeypatch: pytest.MonkeyPatch
    reference: ReferenceStats = REFERENCE

    def run(self, judge: Judge, mid_sigma: float = 0.7, **select: Any) -> TrainedModel:
        self.monkeypatch.setattr(select_ema, "measure_in_step", judge)
        return self.select(mid_sigma, **select)

    def select(self, mid_sigma: float = 0.7, **select: Any) -> TrainedModel:
        ctx = LocalContext(
            step="select_ema-isolate",
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

        return select_ema.run(
            ctx,
            SelectStage(select=SelectConfig(**select), mid_sigma=mid_sigma),
            shard=given("shard", SHARD),
            reference=given("reference", self.reference),
            trained=self.trained,
        )

    def table(self) -> dict[str, float | None]:
        return {row["name"]: row["value"] for row in self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.out / "ema.json").read_text())
        return rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "out").mkdir()
    return Place(tmp_path / "out", trained(tmp_path / "trained"), monkeypatch)


def test_every_trained_average_and_every_width_asked_for_is_scored_once(place: Place) -> None:
    judge = Judge("power-0.05")
    place.run(judge, sigma_rel=(0.05, 0.15, 0.20), samples=123, steps=2, seed=9)
    assert list(place.table()) == ["power-0.05", "power-0.1", "power-0.15", "power-0.2"]
    assert [name for name, _ in judge.asked] == list(place.table())
    for _, job in judge.asked:  # the evaluation's second level, own noise
        assert json.loads(job.subject.description)["mid_sigma"] == 0.7
        asked = job.protocol
        assert (asked.samples, asked.steps, asked.seed, asked.seed_blocks) == (123, 2, 9, 1)


@pytest.mark.parametrize("wanted", sorted(FINAL))
def test_the_lowest_wins_and_its_weights_are_published(place: Place, wanted: str) -> None:
    value = place.run(Judge(wanted), sigma_rel=(0.15, 0.20))
    assert value.ema == wanted
    assert [row["name"] for row in place.rows() if row["chosen"]] == [wanted]
    written = place.out / "weights.safetensors"
    assert value.weights_sha256 == hashlib.sha256(written.read_bytes()).hexdigest()
    published_now = load_file(written)
    spread = max(float((FINAL["power-0.05"][k] - v).abs().max()) for k, v in FINAL[wanted].items())
    for name, truth in FINAL[wanted].items():
        if wanted in TRAINED:
            assert torch.equal(published_now[name], truth)
        else:  # rebuilt from six snapshots of two widths
            assert float((published_now[name] - truth).abs().max()) < 0.1 * spread
    model = published.load(place.out)  # a whole model folder
    assert model.description == ABOUT


def test_the_result_is_the_model_with_other_weights(place: Place) -> None:
    before = place.trained.value
    after = place.run(Judge("power-0.1"))
    assert after == replace(
        before, ema="power-0.1", emas=(), snapshots=(), weights_sha256=after.weights_sha256
    )
    assert sorted(path.name for path in place.out.iterdir()) == [
        *("config.json", "curve.jsonl", "ema.json", "weights.safetensors")
    ]
    for name in ("config.json", "curve.jsonl"):
        assert (place.out / name).read_bytes() == (Path(place.trained.url) / name).read_bytes()


def test_choosing_what_was_published_anyway_keeps_its_very_bytes(place: Place) -> None:
    value = place.run(Judge("power-0.05"))
    assert value.weights_sha256 == place.trained.value.weights_sha256


def test_without_snapshots_only_trained_averages_are_candidates(place: Place) -> None:
    place.trained = replace(place.trained, value=replace(place.trained.value, snapshots=()))
    place.run(Judge("power-0.1"), sigma_rel=(0.15,))
    assert list(place.table()) == list(TRAINED)


def test_more_snapshots_rebuild_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for count in (1, 3, 12):
        home = tmp_path / str(count)
        (home / "out").mkdir(parents=True)
        place = Place(home / "out", trained(home / "trained", count), monkeypatch)
        place.run(Judge("power-0.2", {"power-0.05": 9.0, "power-0.1": 9.0}), sigma_rel=(0.20,))
        written = load_file(place.out / "weights.safetensors")
        errors.append(
            sum(float(((written[k] - v) ** 2).sum()) for k, v in FINAL["power-0.2"].items())
        )
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_distance_that_is_not_finite_never_wins(place: Place, bad: float) -> None:
    judge = Judge("power-0.05", {"power-0.05": bad, "power-0.1": 900.0, "power-0.15": bad})
    assert place.run(judge, sigma_rel=(0.15,)).ema == "power-0.1"
    assert place.table() == {"power-0.05": None, "power-0.1": 900.0, "power-0.15": None}
    assert "NaN" not in (place.out / "ema.json").read_text()


def test_of_equals_the_published_one_stays(place: Place) -> None:
    judge = Judge("power-0.05", dict.fromkeys(FINAL, 1.0))
    assert place.run(judge, sigma_rel=(0.15,)).ema == "power-0.05"


def test_the_real_measuring_finds_the_average_the_real_images_came_from(place: Place) -> None:
    """The reference holds the very samples of one candidate, so its distance is zero."""
    net = feature_net_for(size=8, image_channels=1, num_classes=3)
    folder = place.out.parent / "reference"
    folder.mkdir()
    save_file(net.state_dict(), folder / "features.safetensors")
    sha256 = hashlib.sha256((folder / "features.safetensors").read_bytes()).hexdigest()
    model = published.build(replace(ABOUT, mid_sigma=0.7), FINAL["power-0.1"])
    images = model.generate(range(200), steps=2, seed=4)
    real = GaussianStats.from_features(extract(net.eval(), images)).gaussian
    n = np.asarray(200, np.int64)
    arrays = {"n": n, "mean": real.mean, "covariance": real.covariance}
    save_arrays(arrays, folder / "stats.safetensors")
    place.reference = reference(
        replace(DOMAIN, weights_sha256=sha256), total_variance=float(real.covariance.trace())
    )
    place.monkeypatch.setattr(scoring, "on_actors", lambda cluster: in_process)
    asked = {"sigma_rel": (0.15, 0.20), "samples": 200, "steps": 2, "seed": 4}
    assert place.select(0.7, **asked).ema == "power-0.1"
    values = place.table()
    assert values["power-0.1"] == pytest.approx(0, abs=1e-4)
    assert all((values[name] or 0) > 1e-2 for name in values if name != "power-0.1")
    # Other noise, or another second level, and it is no longer the same samples.
    place.select(0.7, **{**asked, "seed": 5})
    assert (place.table()["power-0.1"] or 0) > 1e-2
    place.select(2.0, **asked)
    assert (place.table()["power-0.1"] or 0) > 1e-3


def test_another_choice_is_another_result_for_those_who_come_after(place: Place) -> None:
    values = [place.run(Judge(wanted)) for wanted in TRAINED]
    assert content_of(values[0]) != content_of(values[1])
    assert content_of(values[0]) == content_of(place.run(Judge(TRAINED[0])))


def test_snapshots_are_evenly_spread_and_end_with_the_last_step() -> None:
    """So that the end of training, which is what is rebuilt, lies within them."""
    emas = (PowerEMA(sigma_rel=0.05), PowerEMA(sigma_rel=0.10))
    config = TeacherConfig(images=1_000, batch=100, ema=emas, snapshots=4)
    assert snapshot_steps(config) == {2, 5, 8, 10}
    every = TeacherConfig(images=1_000, batch=100, ema=emas, snapshots=10)
    assert snapshot_steps(every) == set(range(1, 11))
    assert snapshot_steps(TeacherConfig(images=1_000, batch=100)) == set()
