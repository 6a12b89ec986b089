"""A training stage from its job to its files, in this process: Ray Train is stood in for."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from consistency import published
from consistency.config import ConstantEMA, NetworkConfig, NoiseConfig
from consistency.evaluation.domain import feature_net_for
from consistency.evaluation.frechet import GaussianStats
from consistency.method_config import ConsistencyConfig, LognormalPairs, SqrtLevels
from infra import cluster, shards, sources
from infra.errors import Preempted, TrainingFailed, UserError
from pipelines import train_worker, watch
from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.checkpoints import Checkpoints
from pipelines.dag import StepContext
from pipelines.measuring import WatchConfig
from pipelines.recipe import Cluster
from pipelines.training import StageConfig, run_stage
from pipelines.watch import WatchJob
from pipelines.yardstick import FeatureNetwork, Yardstick
from tests.scores import DOMAIN, reference

NETWORK = NetworkConfig(channels=4, channel_mult=(1,), num_blocks=1, attention=())
TRAINING = ConsistencyConfig(
    method="ict",
    images=160,
    batch=16,
    dropout=0.1,
    init="scratch",
    pairs=LognormalPairs(levels=SqrtLevels(s0=2, s1=8)),
    path="noise",
    ema=(ConstantEMA(beta=0.9), ConstantEMA(beta=0.5)),
)


class Worker:
    """Rank 0 of one, as Ray Train would have it."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def tell(self, report: Mapping[str, Any]) -> None:
        raise AssertionError("only trials are told about")


class Mortal(Checkpoints):
    """Sends each checkpoint before training goes on; the process dies after so many."""

    left: int | None = None
    saved: ClassVar[list[int]] = []  # images, in this process

    def save(self, folder: Path, images: int) -> None:
        if self.left == 0:
            raise ConnectionError("the node is gone")
        if self.left is not None:
            type(self).left = self.left - 1
        super().save(folder, images)
        self.wait()
        self.saved.append(images)


class Place:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.monkeypatch = home, monkeypatch
        images = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8)
        np.savez(home / "a.npz", images=images)
        source = sources.open_source("npz", str(home / "a.npz"), size=None, fit="crop")
        manifest = shards.write_shards(source, str(home / "shards"), num_shards=1)
        self.shard = Committed(
            step="shard",
            fingerprint="s",
            url=str(home),
            seconds=0.0,
            value=ShardSet(
                count=90,
                size=8,
                channels=1,
                class_names=manifest.class_names,
                num_shards=1,
                bytes=1,
                pixel_digest=manifest.pixel_digest,
                manifest_sha256=manifest.sha256,
            ),
        )
        self.logged: list[tuple[int, str, float]] = []
        self.yardstick = self._yardstick(images)

    def _yardstick(self, images: Any) -> Yardstick:
        generator = torch.Generator().manual_seed(1)
        net = feature_net_for(size=8, image_channels=1, num_classes=1, generator=generator)
        path = self.home / "features.safetensors"
        save_file(net.state_dict(), path)
        network = FeatureNetwork(
            name="domain",
            url=str(path),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size=8,
            channels=1,
            num_classes=1,
        )
        real = GaussianStats.from_features(network.load("cpu")(images).pooled).gaussian
        n = np.asarray(90, np.int64)
        arrays = {"n": n, "mean": real.mean, "covariance": real.covariance}
        save_arrays(arrays, self.home / "stats.safetensors")
        value = reference(DOMAIN, total_variance=float(real.covariance.trace()))
        return Yardstick(network=network, reference=value, url=str(self.home))

    def train(
        self,
        name: str,
        dies_after: int | None = None,
        ready: bool = True,
        stop: str | None = None,
        **asked: Any,
    ) -> tuple[TrainedModel, Path]:
        """The stage `name`, watched if `asked`; the same name goes on where it stopped."""
        self.monkeypatch.setattr(
            Yardstick, "at", lambda home, about: self.yardstick if ready else None
        )
        out = self.home / name / "out"
        out.mkdir(parents=True, exist_ok=True)

        # Of so short a training every probe would take more than any share.
        self.monkeypatch.setattr(watch.Watch, "affordable", lambda *_: True)

        self.monkeypatch.setattr(cluster, "train_workers", self.workers)
        self.monkeypatch.setattr(cluster, "TrainWorker", Worker)
        self.monkeypatch.setattr(train_worker, "Checkpoints", Mortal)
        self.monkeypatch.setattr(Mortal, "left", dies_after)
        self.monkeypatch.setattr(train_worker.tracking, "MetricWriter", self.writer)
        job = None
        if asked:
            config = WatchConfig(**{"samples": 80, "every_images": 32, **asked})
            job = WatchJob(config=config, reference="", mid_sigma=0.8, teacher_steps=3)
        ctx = StepContext(
            step="isolate",
            fingerprint="f",
            out=out,
            work=str(self.home / name / "work"),
            workspace=str(self.home),
            tracking_uri="",
            experiment="",
            cluster=Cluster(checkpoint_every_seconds=0 if stop is None else 1e9),
            stop=stop,
        )
        stage = StageConfig(
            network=NETWORK, noise=NoiseConfig(), training=TRAINING, seed=0, watch=job
        )
        return run_stage(ctx, stage, self.shard), out

    @staticmethod
    def workers(function: Any, payload: dict[str, Any], **_: Any) -> Any:
        return function(payload)

    def writer(self, *_: Any, **__: Any) -> Any:
        place = self

        class Writer(contextlib.nullcontext[Any]):
            def log(self, images: int, metrics: dict[str, float]) -> None:
                place.logged.extend((images, key, value) for key, value in metrics.items())

        return Writer(Writer())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("CMFORGE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, monkeypatch)


def test_watching_changes_nothing_that_comes_out(place: Place) -> None:
    plain, bare = place.train("plain")
    watched, out = place.train("watched", every_images=32)
    assert (bare / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()
    assert plain.weights_sha256 == watched.weights_sha256
    assert not plain.watched
    assert watched.watched
    assert not (bare / watch.LOG).exists()


def test_the_distances_are_in_the_file_and_in_the_metrics(place: Place) -> None:
    _, out = place.train("watched", every_images=32)
    lines = [json.loads(line) for line in (out / watch.LOG).read_text().splitlines()]
    assert {(line["images"], line["ema"], line["steps"]) for line in lines} == {
        (images, ema, steps)
        for images in (32, 64, 96, 128, 160)
        for ema in ("constant-0.9", "constant-0.5")
        for steps in (1, 2)
    }
    told = {(i, key): value for i, key, value in place.logged if key.startswith("fd_")}
    assert told == {
        (line["images"], f"{line['name']}/{line['ema']}/steps_{line['steps']}"): line["value"]
        for line in lines
    }


def test_the_best_weights_stand_beside_the_last(place: Place) -> None:
    value, out = place.train("watched", every_images=32)
    lines = [json.loads(line) for line in (out / watch.LOG).read_text().splitlines()]
    ones = [line for line in lines if line["steps"] == 1]
    best = min(ones, key=lambda line: line["value"])
    assert json.loads((out / "best" / "watch.json").read_text()) == best
    assert value.best == f"{best['ema']} at {best['images']:,} images"
    model = published.load(out / "best")
    if best["images"] == 160:
        own = "weights" if best["ema"] == "constant-0.9" else f"ema/{best['ema']}"
        for name, tensor in load_file(out / f"{own}.safetensors").items():
            assert torch.equal(model.function.net.state_dict()[name], tensor)


def seen(out: Path) -> list[dict[str, Any]]:
    """The lines of a watch log, but for the seconds."""
    lines = [json.loads(line) for line in (out / watch.LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_after_a_crash_it_remembers_what_it_saw(place: Place) -> None:
    whole, out = place.train("whole", every_images=32)
    with pytest.raises(ConnectionError, match="the node is gone"):
        place.train("cut", dies_after=4, every_images=32)
    again, rest = place.train("cut", every_images=32)
    assert again.weights_sha256 == whole.weights_sha256
    assert seen(rest) == seen(out)
    assert again.best == whole.best
    assert (rest / "best" / "weights.safetensors").read_bytes() == (
        out / "best" / "weights.safetensors"
    ).read_bytes()


def test_a_diverging_run_stops_and_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([5.0, 5.0, 5.0, 5.0] + [50.0] * 100)
    monkeypatch.setattr(watch.Watch, "_measure", lambda self, weights, protocol: next(values))
    with pytest.raises(UserError, match=r"isolate diverges: .* was 5 at 32 images and is 50 at"):
        place.train("bad", every_images=32, patience=2)
    assert max(images for images, _, _ in place.logged) == 96
    assert (place.home / "bad" / "work" / "final" / "best" / "weights.safetensors").exists()


def test_without_a_reference_it_trains_without_looking(place: Place) -> None:
    value, out = place.train("early", ready=False, every_images=32)
    assert not value.watched
    assert value.best is None
    assert not (out / watch.LOG).exists()


# --- asked to stop, dying, damaged ----------------------------------------------------------------


def test_asked_to_stop_it_saves_the_step_it_has_done_and_goes_on_from_there(place: Place) -> None:
    whole, _ = place.train("whole")
    stop = place.home / "stop"
    for images in (16, 32, 48):  # asked again and again, it gets on by a step each time
        stop.touch()
        with pytest.raises(Preempted, match=f"isolate stopped at {images} images, all of them"):
            place.train("cut", stop=str(stop))
        names = [path.parent.name for path in place.home.glob("cut/work/checkpoints/*/record.json")]
        assert max(names).startswith(f"{images:012d}-")
    stop.unlink()
    again, _ = place.train("cut", stop=str(stop))
    assert again.weights_sha256 == whole.weights_sha256
    assert (again.images, again.steps) == (whole.images, whole.steps)


def test_a_damaged_checkpoint_costs_the_way_from_the_one_before(place: Place) -> None:
    whole, _ = place.train("whole")
    with pytest.raises(ConnectionError):
        place.train("cut", dies_after=4)
    newest = max(place.home.glob("cut/work/checkpoints/*"))
    assert newest.name.startswith(f"{64:012d}-")
    file = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)
    Mortal.saved.clear()
    again, _ = place.train("cut")
    assert again.weights_sha256 == whole.weights_sha256
    assert Mortal.saved == [64, 80, 96, 112, 128, 144]


def test_with_all_of_them_damaged_it_refuses_to_begin_again_unasked(place: Place) -> None:
    with pytest.raises(ConnectionError):
        place.train("cut", dies_after=2)
    for file in place.home.glob("cut/work/checkpoints/*/state.json"):
        file.unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        place.train("cut")


def test_workers_that_die_at_one_place_end_with_what_they_said(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train begins them again and again: so does this stand-in, until they say it is over."""
    deaths = []

    def dies(*_: Any) -> Any:
        deaths.append(1)
        raise MemoryError("out of memory")

    def train_workers(function: Any, payload: dict[str, Any], **_: Any) -> Any:
        for _ in range(9):
            with contextlib.suppress(MemoryError):
                return function(payload)
        raise AssertionError("started again for ever")

    monkeypatch.setattr(train_worker, "_Running", dies)
    monkeypatch.setattr(place, "workers", train_workers)
    with pytest.raises(TrainingFailed) as caught:
        place.train("dead")
    assert len(deaths) == Cluster().max_failures + 1
    words = "workers died 3 times in a row at the start; the last one said: MemoryError: out of"
    assert words in str(caught.value)
    assert "(rank 0 of 1 on " in str(caught.value)
