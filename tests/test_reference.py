"""The reference step: what it writes is what the evaluation loads, with classes and without."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from consistency.evaluation.backbones import SqueezeNet
from consistency.evaluation.domain import extract, feature_net_for
from consistency.evaluation.frechet import GaussianStats, frechet_distance
from consistency.evaluation.npz import write_npz
from infra import shards, sources
from infra.errors import UserError
from pipelines import blocks, scoring
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, from_json, to_json
from pipelines.dag import StepContext
from pipelines.measuring import ReferenceConfig
from pipelines.recipe import Cluster
from pipelines.scoring import in_process
from pipelines.steps import reference
from pipelines.steps.reference import ReferenceStage
from pipelines.yardstick import Yardstick

COUNT = 90
DOMAIN_STAGE = ReferenceStage(
    reference=ReferenceConfig(steps=2, batch=8), extractor="domain", weights_sha256=None
)


class Place:
    """A workspace with shards, and contexts for attempts of the step."""

    def __init__(
        self, home: Path, classes: int = 2, channels: int = 1, num_shards: int = 1
    ) -> None:
        self.home = home
        self.attempts = len(list(home.glob("attempts/*")))
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (COUNT, 8, 8, channels), np.uint8)
        home.mkdir(parents=True, exist_ok=True)
        np.savez(home / "a.npz", images=self.images, labels=np.arange(COUNT) % classes)
        source = sources.open_source("npz", str(home / "a.npz"), size=None, fit="crop")
        manifest = shards.write_shards(
            source, str(home / f"data{num_shards}" / "shards"), num_shards=num_shards
        )
        value = ShardSet(
            count=COUNT,
            size=8,
            channels=channels,
            class_names=manifest.class_names,
            num_shards=num_shards,
            bytes=manifest.total_bytes,
            pixel_digest=manifest.pixel_digest,
            manifest_sha256=manifest.sha256,
        )
        url = str(home / f"data{num_shards}")
        self.shard = Committed(step="shard", fingerprint="s", url=url, seconds=0.0, value=value)

    def run(self, config: ReferenceStage) -> tuple[ReferenceStats, Yardstick]:
        self.attempts += 1
        out = self.home / "attempts" / str(self.attempts)
        out.mkdir(parents=True)
        ctx = StepContext(
            step="reference",
            fingerprint="r",
            out=out,
            work=str(self.home / f"work{self.attempts}"),
            workspace=str(self.home),
            tracking_uri="",
            experiment="",
            cluster=Cluster(checkpoint_every_seconds=0),
        )
        value = reference.run(ctx, config, self.shard)
        made = Committed(step="reference", fingerprint="r", url=str(out), seconds=0.0, value=value)
        return value, Yardstick.of(self.shard, made)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference, "on_actors", lambda cluster: in_process)
    monkeypatch.setattr(blocks, "ITEM", 20)
    monkeypatch.setattr(scoring, "FEW", 0)
    monkeypatch.setenv("CMFORGE_CACHE", str(tmp_path / "cache"))


def weights(folder: Path) -> ReferenceStage:
    """A published network with weights of our own."""
    import torch

    torch.manual_seed(0)
    path = folder / "squeezenet11_fp32.safetensors"
    save_file(SqueezeNet().state_dict(), path)
    return ReferenceStage(
        reference=ReferenceConfig(extractor=("squeezenet11",)),
        extractor="squeezenet11",
        weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        weights_path=str(path),
    )


@pytest.mark.parametrize("classes", [1, 2])
def test_the_yardstick_is_loaded_as_it_was_trained(tmp_path: Path, classes: int) -> None:
    place = Place(tmp_path, classes)
    value, yardstick = place.run(DOMAIN_STAGE)
    assert (value.accuracy is None) == (classes == 1)
    assert from_json(ReferenceStats, to_json(value)) == value
    assert value.protocol.metric == "fd_domain"
    net = yardstick.network.load("cpu")
    features = net(place.images).pooled
    stats, again = yardstick.statistics(), GaussianStats.from_features(features).gaussian
    assert stats.n == value.count == COUNT
    np.testing.assert_allclose(stats.mean, again.mean, atol=1e-5)
    np.testing.assert_allclose(stats.covariance, again.covariance, atol=1e-4)
    assert value.total_variance == pytest.approx(float(again.covariance.trace()), rel=1e-5)


def test_the_floor_is_the_distance_of_two_halves(tmp_path: Path) -> None:
    place = Place(tmp_path)
    value, yardstick = place.run(DOMAIN_STAGE)
    assert len(list(tmp_path.glob("work1/blocks/*"))) == 4
    quarters = np.array_split(yardstick.real_features(), [22, 45, 67])

    def apart(*pairs: int) -> float:
        one, other = (
            GaussianStats.from_features(np.concatenate([quarters[i] for i in pair]))
            for pair in (pairs[:2], pairs[2:])
        )
        return frechet_distance(one, other)

    expected = (apart(0, 1, 2, 3) + apart(0, 2, 1, 3) + apart(0, 3, 1, 2)) / 3
    assert value.halves == pytest.approx(value.reported(expected), rel=1e-6)


def test_a_published_network_travels_with_the_reference(tmp_path: Path) -> None:
    place, config = Place(tmp_path, channels=3), weights(tmp_path)
    value, yardstick = place.run(config)
    assert value.accuracy is None
    assert value.protocol.metric == "fd_squeezenet11"
    assert value.protocol.weights_sha256 == config.weights_sha256
    Path(str(config.weights_path)).unlink()
    own = yardstick.network.load("cpu")(place.images).pooled
    expected = GaussianStats.from_features(own).gaussian
    np.testing.assert_allclose(yardstick.statistics().mean, expected.mean, rtol=1e-4, atol=1e-4)


def test_the_same_pixels_are_measured_once_however_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = weights(tmp_path)
    first, _ = Place(tmp_path, channels=3).run(config)

    def nobody(make: Callable[..., Any], items: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(reference, "on_actors", lambda cluster: nobody)
    again, yardstick = Place(tmp_path, channels=3, num_shards=3).run(config)
    assert again == first
    assert yardstick.statistics().n == COUNT
    renamed = tmp_path / "another.safetensors"
    Path(str(config.weights_path)).rename(renamed)
    config = replace(config, weights_path=str(renamed))
    _, yardstick = Place(tmp_path, channels=3).run(config)
    assert yardstick.network.load("cpu").protocol == first.protocol
    # A damaged entry is no entry.
    stats = next(tmp_path.glob("references/*/stats.safetensors"))
    stats.write_bytes(stats.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(AssertionError, match="measured again"):
        Place(tmp_path, channels=3).run(config)


def test_statistics_of_another_project_take_the_place_of_our_own(tmp_path: Path) -> None:
    place, config = Place(tmp_path, channels=3), weights(tmp_path)
    _, own = place.run(config)
    file = tmp_path / "theirs.npz"
    np.savez(file, mu=own.statistics().mean, sigma=own.statistics().covariance)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    other = replace(
        config,
        reference=replace(config.reference, statistics=str(file)),
        statistics_sha256=digest,
    )
    value, yardstick = place.run(other)
    assert (value.count, value.digest, value.halves) == (None, digest, None)
    assert yardstick.statistics().n is None
    np.testing.assert_array_equal(yardstick.statistics().mean, own.statistics().mean)
    with pytest.raises(UserError, match=r"reference\.statistics: .* changed since the plan"):
        place.run(replace(other, statistics_sha256="0" * 64))


def test_statistics_under_another_network_are_refused(tmp_path: Path) -> None:
    place, config = Place(tmp_path, channels=3), weights(tmp_path)
    value, own = place.run(config)
    file = tmp_path / "theirs.npz"

    def asked() -> ReferenceStage:
        return replace(
            config,
            reference=replace(config.reference, statistics=str(file)),
            statistics_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        )

    np.savez(file, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match=r"has 7 features, squeezenet11 has 512"):
        place.run(asked())
    write_npz(file, own.statistics(), replace(value.protocol, resize="tf1"))
    with pytest.raises(UserError, match=r"they do not compare"):
        place.run(asked())
    write_npz(file, own.statistics(), value.protocol)
    assert place.run(asked())[0].count == COUNT


def test_weights_that_changed_or_are_gone_are_named(tmp_path: Path) -> None:
    place, config = Place(tmp_path, channels=3), weights(tmp_path)
    with pytest.raises(UserError, match=r"reference\.weights: .* changed since the plan"):
        place.run(replace(config, weights_sha256="0" * 64))
    with pytest.raises(UserError, match=r"is not on this node"):
        place.run(replace(config, weights_path=str(tmp_path / "absent")))


def test_an_interrupted_reference_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, config = Place(tmp_path, channels=3), weights(tmp_path)
    done: list[int] = []

    def counted(make: Any, items: Any) -> Any:
        for index, part in in_process(make, items):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(items[index].start)
            yield index, part

    monkeypatch.setattr(reference, "on_actors", lambda cluster: counted)
    with pytest.raises(KeyboardInterrupt):
        place.run(config)
    place.attempts = 0  # the next attempt finds the same work folder
    (tmp_path / "attempts" / "1").rename(tmp_path / "attempts" / "first")
    left: list[int] = []

    def rest(make: Any, items: Any) -> Any:
        left.extend(item.start for item in items)
        return in_process(make, items)

    monkeypatch.setattr(reference, "on_actors", lambda cluster: rest)
    value, _ = place.run(config)
    assert set(left).isdisjoint(done[:2])
    assert value.count == COUNT
    assert json.loads(next(tmp_path.glob("references/*/entry.json")).read_text())["files"]


def test_the_domain_extractor_is_the_net_itself(tmp_path: Path) -> None:
    place = Place(tmp_path)
    _, yardstick = place.run(DOMAIN_STAGE)
    from safetensors.torch import load_file

    net = feature_net_for(size=8, image_channels=1, num_classes=2)
    net.load_state_dict(load_file(Path(yardstick.url) / "features.safetensors"))
    np.testing.assert_allclose(
        yardstick.network.load("cpu")(place.images).pooled,
        extract(net.eval(), place.images),
        rtol=1e-5,
    )
