"""In-loop evaluation: when it looks, what it finds, what it leaves alone, and when it stops."""

import hashlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from consistency import published
from consistency.config import NetworkConfig, NoiseConfig
from consistency.evaluation.domain import feature_net_for
from consistency.evaluation.frechet import GaussianStats
from pipelines import blocks
from pipelines.measuring import WatchConfig
from pipelines.scoring import Job, Subject, in_process, measure_all
from pipelines.watch import Diverged, Watch, WatchJob, write_best
from pipelines.yardstick import FeatureNetwork, Yardstick
from tests.scores import DOMAIN, reference

ABOUT = published.ModelDescription(
    kind="consistency",
    network=NetworkConfig(channels=4, channel_mult=(1,), num_blocks=1, attention=()),
    noise=NoiseConfig(),
    size=8,
    channels=1,
    class_names=("a", "b"),
)


class State:
    """Of a training state, what a probe reads."""

    def __init__(self, *seeds: int) -> None:
        self.averages = {}
        for number, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            self.averages[f"power-{number}"] = {
                name: 0.1 * torch.randn(value.shape, generator=generator)
                for name, value in published.build_network(ABOUT).state_dict().items()
            }


@pytest.fixture(autouse=True)
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ITEM", 40)


@pytest.fixture
def yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Yardstick:
    generator = torch.Generator().manual_seed(1)
    net = feature_net_for(size=8, image_channels=1, num_classes=2, generator=generator)
    save_file(net.state_dict(), tmp_path / "features.safetensors")
    sha256 = hashlib.sha256((tmp_path / "features.safetensors").read_bytes()).hexdigest()
    real = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
    network = FeatureNetwork(
        name="domain",
        url=str(tmp_path / "features.safetensors"),
        sha256=sha256,
        size=8,
        channels=1,
        num_classes=2,
    )
    stats = GaussianStats.from_features(network.load("cpu")(real).pooled).gaussian
    n = np.asarray(300, np.int64)
    arrays = {"n": n, "mean": stats.mean, "covariance": stats.covariance}
    save_arrays(arrays, tmp_path / "stats.safetensors")
    value = reference(
        replace(DOMAIN, weights_sha256=sha256), total_variance=float(stats.covariance.trace())
    )
    made = Yardstick(network=network, reference=value, url=str(tmp_path))
    monkeypatch.setattr(Yardstick, "at", lambda home, about: made if home == "there" else None)
    return made


def watching(
    home: str = "there",
    emas: tuple[str, ...] = ("power-0",),
    rank: int = 0,
    ranks: int = 1,
    **config: Any,
) -> Watch:
    asked = WatchConfig(**{"every_images": 100, "samples": 100, **config})
    job = WatchJob(config=asked, reference=home, mid_sigma=0.5, teacher_steps=3)
    return Watch(job, ABOUT, "isolate", emas, rank, ranks, "cpu")


def looking(**asked: Any) -> Watch:
    """One that has found its reference."""
    it = watching(**asked)
    assert it.ready()
    return it


# --- when ----------------------------------------------------------------------------------------


def test_it_looks_when_a_step_crosses_the_cadence() -> None:
    it = watching()
    assert [images for images in range(30, 630, 30) if it.due(images)] == [
        120,
        210,
        300,
        420,
        510,
        600,
    ]


def test_a_cadence_crossed_between_two_questions_is_not_missed() -> None:
    """On a GPU the loop asks every so many steps only."""
    it = watching()
    assert [images for images in (90, 130, 190, 310, 390) if it.due(images)] == [130, 310]
    resumed = watching()
    resumed.seen = 310
    assert not resumed.due(390)


def test_probes_stay_within_the_share_of_the_training_time(yardstick: Yardstick) -> None:
    it = watching(share=0.1)
    # 300 forward passes at a third of a step of 1 s each per 100 images: about 1 s.
    assert not it.affordable(elapsed=9.0, trained=900)
    assert it.affordable(elapsed=11.0, trained=1_100)
    it.spent, it.last_cost = 1.0, 2.0  # dearer than guessed: what it cost counts from now on
    assert not it.affordable(elapsed=29.0, trained=2_900)
    assert it.affordable(elapsed=30.0, trained=3_000)


def test_the_guess_grows_with_samples_steps_and_averages() -> None:
    assert watching().evaluations() == 100 * 3
    assert watching(samples=200, emas=("a", "b")).evaluations() == 200 * 3 * 2
    it = watching()
    it.about = replace(ABOUT, kind="denoiser")
    assert it.evaluations() == 100 * 5  # three steps of Heun


def test_training_does_not_wait_for_the_reference(yardstick: Yardstick) -> None:
    assert not watching("elsewhere").ready()
    assert watching().ready()


# --- what ----------------------------------------------------------------------------------------


def test_a_probe_finds_what_the_evaluation_would(yardstick: Yardstick, tmp_path: Path) -> None:
    state: Any = State(7, 8)
    lines = looking(emas=("power-0", "power-1")).probe(state, 500)
    assert [(line["ema"], line["steps"]) for line in lines] == [
        ("power-0", 1),
        ("power-0", 2),
        ("power-1", 1),
        ("power-1", 2),
    ]
    assert {(line["images"], line["name"]) for line in lines} == {(500, "fd_domain_100")}
    for line in lines:
        path = tmp_path / f"{line['ema']}.safetensors"
        save_file(state.averages[line["ema"]], path)
        subject = Subject(
            name="m",
            description=replace(ABOUT, mid_sigma=0.5).to_json(),
            weights_url=str(path),
            weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        protocol = yardstick.protocol(
            samples=100, seed_blocks=1, seed=2, steps=line["steps"], allow_rank_deficient=False
        )
        assert protocol.digest == line["digest"]
        (found,) = measure_all(
            yardstick,
            [Job(subject=subject, protocol=protocol)],
            in_process,
            work=str(tmp_path / "work"),
            save_every=0,
            threads=1,
        )
        assert line["value"] == found.values[0]


def test_every_probe_samples_the_same_noise(yardstick: Yardstick) -> None:
    it, state = looking(), State(7)
    first = it.probe(state, 100)  # type: ignore[arg-type]
    again = it.probe(state, 200)  # type: ignore[arg-type]
    assert [line["value"] for line in first] == [line["value"] for line in again]


def test_a_probe_leaves_the_training_as_it_was(yardstick: Yardstick) -> None:
    state: Any = State(7)
    before = {name: value.clone() for name, value in state.averages["power-0"].items()}
    torch.manual_seed(3)
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    looking().probe(state, 100)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()
    for name, value in state.averages["power-0"].items():
        assert torch.equal(value, before[name])


def test_ranks_share_a_probe_and_agree_on_it(
    yardstick: Yardstick, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = looking().probe(State(7), 100)  # type: ignore[arg-type]
    barrier, given = threading.Barrier(2), {}

    def gather(parts: list[Any], own: Any) -> None:
        given[threading.current_thread().name] = own
        barrier.wait()
        parts[:] = [given["0"], given["1"]]
        barrier.wait()

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        found[rank] = looking(rank=rank, ranks=2).probe(State(7), 100)  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == alone
    assert [len(given[rank]) for rank in "01"] == [2, 1]  # of three items


# --- what follows --------------------------------------------------------------------------------


def told(*values: float, ema: str = "power-0", **config: Any) -> Watch:
    it = watching(**config)
    it.history = [
        {
            "images": 100 * (n + 1),
            "ema": ema,
            "steps": steps,
            "name": "fd",
            "value": value + steps,
            "digest": f"d{steps}",
        }
        for n, value in enumerate(values)
        for steps in (1, 2)
    ]
    return it


def test_the_best_is_the_first_lowest_in_the_fewest_steps() -> None:
    best = told(5.0, 3.0, 4.0, 3.0).best()
    assert best is not None
    assert (best["images"], best["steps"]) == (200, 1)
    assert told().best() is None
    nothing = told(float("nan"), float("inf"))
    assert nothing.best() is None


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ((9.0, 1.0, 9.0, 9.0, 9.0), True),
        ((9.0, 1.0, 9.0, 9.0), False),  # not yet
        ((9.0, 1.0, 9.0, 7.0, 9.0), False),  # at 4 x 2 it is not above
        ((9.0, 1.0, 9.0, 9.0, 9.0, 2.0), False),  # came back
        ((9.0, 8.0, 7.0, 6.0, 5.0), False),  # slow is not diverging
        ((1.0, float("nan"), float("inf"), float("nan")), True),
    ],
)
def test_what_goes_up_and_stays_there_stops(values: tuple[float, ...], stops: bool) -> None:
    it = told(*values)  # one step: each value plus one
    if not stops:
        it.raise_if_diverged()
        return
    with pytest.raises(Diverged, match=r"isolate diverges: fd was 2 at .* images"):
        it.raise_if_diverged()
    told(*values, stop_above=None).raise_if_diverged()
    told(*values, patience=9).raise_if_diverged()


def test_numbers_of_another_protocol_are_neither_best_nor_a_rise() -> None:
    """The recipe's watch may change between two attempts of a stage."""
    it = told(9.0, 1.0, 9.0, 9.0, 9.0)
    for line in it.history[:4]:
        line["digest"] = "other"
    it.raise_if_diverged()
    best = it.best()
    assert best is not None
    assert best["images"] == 300


def test_of_several_averages_the_best_one_speaks() -> None:
    it = told(9.0, 1.0, 9.0, 9.0, 9.0)
    it.history += told(9.0, 1.0, 2.0, 2.0, 2.0, ema="power-1").history
    it.raise_if_diverged()


def test_the_history_survives_a_checkpoint() -> None:
    it = told(9.0, float("nan"), 1.0)
    other = watching()
    other.restore(it.text())
    assert other.text() == it.text()
    assert other.best() == it.best()


def test_the_best_weights_are_a_model_folder(tmp_path: Path) -> None:
    from safetensors.torch import save

    weights = State(7).averages["power-0"]
    write_best(str(tmp_path / "best"), save(weights), ABOUT.to_json(), {"images": 5})
    loaded = published.load(tmp_path / "best")
    for name, value in loaded.function.net.state_dict().items():
        assert torch.equal(value, weights[name])
