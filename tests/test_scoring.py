"""Numbers from streamed items: the same whatever the order, the workers, the interruptions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from consistency.evaluation.extractors import Features
from consistency.evaluation.frechet import GaussianStats, frechet_distance
from consistency.evaluation.protocol import FeatureProtocol
from infra.errors import UserError
from pipelines import blocks, scoring
from pipelines.artifacts import ReferenceStats
from pipelines.recipe import Cluster
from pipelines.scoring import Evaluator, Job, Subject, in_order, in_process, measure_all
from pipelines.yardstick import FeatureNetwork, Yardstick, check_rank

DIM = 6
SAMPLES = 70
PROTOCOL = FeatureProtocol(
    extractor="squeezenet11",
    weights_sha256="ab" * 32,
    layer="fire9",
    dim=DIM,
    resize="none",
    size=4,
)


class StandIn:
    """A model whose image i depends on (seed, i), and a network whose features are its pixels."""

    def __init__(self) -> None:
        self.asked: list[range] = []

    def generate(self, indices: range, *, steps: int, seed: int, **_: Any) -> NDArray[np.uint8]:
        self.asked.append(indices)
        rows = [np.random.default_rng([seed, steps, i]).integers(0, 256, 48) for i in indices]
        return np.stack(rows).astype(np.uint8).reshape(-1, 4, 4, 3)

    def labels(self, indices: range) -> torch.Tensor:
        return torch.tensor([i % 2 for i in indices])

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        flat = images.reshape(len(images), -1).astype(np.float32)
        return Features(pooled=flat[:, :DIM], logits=flat[:, :2])


@pytest.fixture(autouse=True)
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ITEM", 16)
    monkeypatch.setattr(scoring, "FEW", 0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    it = StandIn()
    monkeypatch.setattr(Subject, "load", lambda self, device: it)
    monkeypatch.setattr(FeatureNetwork, "load", lambda self, device: it)
    return it


@pytest.fixture
def yardstick(tmp_path: Path) -> Yardstick:
    features = np.random.default_rng(0).normal(128, 60, (200, DIM)).astype(np.float32)
    real = GaussianStats.from_features(features).gaussian
    n = np.asarray(200, np.int64)
    arrays = {"n": n, "mean": real.mean, "covariance": real.covariance}
    save_file(arrays, tmp_path / "stats.safetensors")
    np.save(tmp_path / "real_features.npy", features)
    network = FeatureNetwork(
        name="squeezenet11", url="", sha256="", size=4, channels=3, num_classes=2
    )
    reference = ReferenceStats(
        protocol=PROTOCOL,
        extractor_file="x",
        digest="d",
        count=200,
        total_variance=float(real.covariance.trace()),
        halves=None,
        accuracy=None,
    )
    return Yardstick(network=network, reference=reference, url=str(tmp_path))


def jobs(yardstick: Yardstick, *, seed_blocks: int = 2, also: tuple[str, ...] = ()) -> list[Job]:
    return [
        Job(
            subject=Subject(name="m", description="{}", weights_url="", weights_sha256="w"),
            protocol=yardstick.protocol(
                samples=SAMPLES,
                seed_blocks=seed_blocks,
                seed=5,
                steps=steps,
                allow_rank_deficient=False,
            ),
            also=also,
        )
        for steps in (1, 2)
    ]


def measure(yardstick: Yardstick, work: Path, spread: Any = in_process, **asked: Any) -> Any:
    return measure_all(
        yardstick, jobs(yardstick, **asked), spread, work=str(work), save_every=0, threads=1
    )


def shuffled(
    make: Callable[[], Callable[[Any], Any]], items: Sequence[Any], *, seed: int
) -> Iterator[tuple[int, Any]]:
    work = make()
    for index in np.random.default_rng(seed).permutation(len(items)):
        yield int(index), work(items[index])


def test_a_value_is_the_distance_of_its_seed_blocks_samples(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path
) -> None:
    one, two = measure(yardstick, tmp_path / "w")
    for measured, steps in ((one, 1), (two, 2)):
        for block, value in enumerate(measured.values):
            indices = range(block * SAMPLES, (block + 1) * SAMPLES)
            features = stand_in(stand_in.generate(indices, steps=steps, seed=5)).pooled
            whole = GaussianStats.from_features(features)
            assert value == pytest.approx(frechet_distance(whole, yardstick.statistics()), rel=1e-9)
    assert one.values != two.values
    np.testing.assert_array_equal(one.sheet, stand_in.generate(range(16), steps=1, seed=5))


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_items_changes_not_a_bit(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path, seed: int
) -> None:
    plain = measure(yardstick, tmp_path / "a")
    other = measure(yardstick, tmp_path / "b", partial(shuffled, seed=seed))
    assert [m.values for m in other] == [m.values for m in plain]
    assert [m.images_sha256 for m in other] == [m.images_sha256 for m in plain]


def test_the_size_of_the_items_changes_the_last_digits_only(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [m.values for m in measure(yardstick, tmp_path / "a")]
    monkeypatch.setattr(blocks, "ITEM", 23)
    again = [m.values for m in measure(yardstick, tmp_path / "b")]
    np.testing.assert_allclose(again, values, rtol=1e-9)


@pytest.mark.parametrize("survived", [1, 4, 5, 9, 17])
@pytest.mark.parametrize("also", [(), ("kid", "inception_score")])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path, survived: int, also: tuple[str, ...]
) -> None:
    plain = measure(yardstick, tmp_path / "a", also=also)
    total = len(stand_in.asked)

    def cut_short(make: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, pair in enumerate(in_process(make, items)):
            if number == survived:
                raise RuntimeError("the machine is gone")
            yield pair

    with pytest.raises(RuntimeError, match="gone"):
        measure(yardstick, tmp_path / "b", cut_short, also=also)
    stand_in.asked.clear()
    again = measure(yardstick, tmp_path / "b", also=also)
    assert len(stand_in.asked) == total - survived
    for one, other in zip(plain, again, strict=True):
        assert one.values == other.values
        assert one.secondary == other.secondary
        assert one.images_sha256 == other.images_sha256
        np.testing.assert_array_equal(one.sheet, other.sheet)


def test_a_few_items_need_no_evaluators(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [m.values for m in measure(yardstick, tmp_path / "a")]

    def nobody(make: Any, items: Sequence[Any]) -> Any:
        raise AssertionError("evaluators were asked for")

    with pytest.raises(AssertionError, match="asked for"):
        measure(yardstick, tmp_path / "b", nobody)
    monkeypatch.setattr(scoring, "FEW", len(stand_in.asked))
    assert [m.values for m in measure(yardstick, tmp_path / "b", nobody)] == plain


def test_where_only_evaluators_have_a_gpu_they_are_asked_for_the_least_item(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "FEW", 1_000)
    asked: list[int] = []

    def evaluators(make: Any, items: Sequence[Any]) -> Any:
        asked.append(len(items))
        return in_process(make, items)

    monkeypatch.setattr(scoring, "on_actors", lambda cluster: evaluators)
    for gpus in (0.0, 1.0):
        ctx: Any = SimpleNamespace(
            cluster=Cluster(gpus_per_evaluator=gpus), work=str(tmp_path / f"{gpus}")
        )
        scoring.measure_in_step(ctx, yardstick, jobs(yardstick)[:1])
    assert len(asked) == 1  # the second time


def test_sums_of_other_weights_are_not_gone_on_with(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path
) -> None:
    keys = {job.key for job in jobs(yardstick)}
    job = jobs(yardstick)[0]
    others = {
        replace(job, subject=replace(job.subject, weights_sha256="v")).key,
        replace(job, subject=replace(job.subject, description="{ }")).key,
        replace(job, subject=replace(job.subject, guidance=2.0)).key,
        replace(job, protocol=replace(job.protocol, seed=6)).key,
        replace(job, also=("kid",)).key,
    }
    assert len(keys) == 2
    assert len(others) == 5
    assert not keys & others


def test_a_second_or_a_missing_result_is_an_error() -> None:
    taken: list[tuple[int, str]] = []
    with pytest.raises(AssertionError, match="item 0 came twice"):
        in_order([(0, "a"), (0, "b")], 2, take=lambda i, x: taken.append((i, x)))
    with pytest.raises(AssertionError, match="1 of 2 items came"):
        in_order([(0, "a")], 2, take=lambda i, x: None)
    taken.clear()
    in_order([(2, "c"), (0, "a"), (1, "b")], 3, take=lambda i, x: taken.append((i, x)))
    assert taken == [(0, "a"), (1, "b"), (2, "c")]


def test_no_more_samples_than_features_are_refused_by_name() -> None:
    check_rank(DIM + 1, DIM, False)
    check_rank(DIM, DIM, True)
    with pytest.raises(UserError, match=r"evaluate\.samples: 6 samples of 6 features"):
        check_rank(DIM, DIM, False)


def test_metrics_of_sets_are_those_of_the_first_seed_block(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path
) -> None:
    from consistency.evaluation import sets

    every = ("kid", "precision_recall", "fd_infinity", "inception_score")
    found = measure(yardstick, tmp_path, also=every)[0].secondary
    features = stand_in(stand_in.generate(range(SAMPLES), steps=1, seed=5))
    real = yardstick.real_features()
    scale = float(np.linalg.norm(real, axis=1).mean() / np.sqrt(DIM))
    assert found["kid"] == pytest.approx(sets.kid(features.pooled, real, scale=scale)[0])
    assert 0 <= found["recall"] <= 1
    assert found["inception_score"] == pytest.approx(sets.inception_score(features.logits)[0])
    assert found["fd_infinity"] < measure(yardstick, tmp_path)[0].values[0]


def test_class_agreement_is_told_by_the_domain_net_alone(
    yardstick: Yardstick, stand_in: StandIn, tmp_path: Path
) -> None:
    assert measure(yardstick, tmp_path / "a")[0].agreement is None
    domain = replace(yardstick, network=replace(yardstick.network, name="domain"))
    found = measure(domain, tmp_path / "b")[0].agreement
    images = stand_in.generate(range(2 * SAMPLES), steps=1, seed=5)
    right = stand_in(images).logits.argmax(1) == np.arange(2 * SAMPLES) % 2
    assert found == pytest.approx(right.mean())


def test_an_evaluator_holds_one_model_at_a_time(
    yardstick: Yardstick, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def load(self: Subject, device: str) -> Any:
        loads.append(self.name)
        return StandIn()

    monkeypatch.setattr(Subject, "load", load)
    monkeypatch.setattr(FeatureNetwork, "load", lambda self, device: StandIn())
    first, second = jobs(yardstick)
    other = replace(first, subject=replace(first.subject, name="n"))
    work = Evaluator(yardstick, (first, second, other), threads=1)
    for job in (0, 0, 1, 2, 2, 0):
        work(blocks.Item(job, 0, 0, 4))
    assert loads == ["m", "n", "m"]
