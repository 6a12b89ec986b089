"""Every setting of every stage moves what it is a setting of: none is parsed and then forgotten."""

from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch

from consistency.config import NoiseConfig
from consistency.method_config import (
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    RatioPairs,
    SharedTimes,
    TargetEMA,
    UniformPairs,
)
from consistency.objectives import Progress, objective_for
from consistency.objectives.pairs import draw_pairs
from consistency.randomness import BatchRandom
from tests.every_kind import BATCH, KINDS, fresh, run

TRAIN = {
    "optimizer": "radam",
    "lr": 2e-3,
    "betas": (0.5, 0.9),
    "eps": 1e-2,
    "warmup_images": 8,
    "inverse_sqrt_images": 4,
    "decay_from": 0.1,
    "grad_clip": 0.01,
    "dropout": 0.5,
    "dropout_max_side": 4,
    "precision": "bf16",
}
OTHER = {
    "teacher": {"P_mean": 0.0, "P_std": 0.5, "label_dropout": 0.5, "adaptive_weight": True},
    "cd": {"path": "euler", "guidance": 3.0, "target": TargetEMA(mu=0.5), "distance": "l1"},
    "ict": {
        "distance": "l1",
        "huber_c": 1.0,
        "weight": "edm",
        "boundary": 0.1,
        "pairs": UniformPairs(levels=DoublingLevels(s0=2, s1=16)),
    },
    "scd": {
        "path": "noise",
        "P_mean": 0.0,
        "P_std": 0.5,
        "tangent": "clip",
        "tangent_c": 1.0,
        "tangent_norm": "rms",
        "tangent_warmup_images": 0,
        "adaptive_weight": False,
        "prior_weight": "uniform",
        "guidance": 1.0,
    },
    "mean_flow": {
        "times": SharedTimes(),
        "apart": 0.1,
        "power": 0.5,
        "power_c": 5.0,
        "guidance": 1.0,
        "kappa": 0.1,
        "label_dropout": 0.9,
    },
    "tcm": {
        "sigma_prime": 2.0,
        "nu": 1.0,
        "loc": 1.0,
        "scale": 1.0,
        "q": 4.0,
        "stage": 3,
        "k": 2.0,
        "b": 0.1,
        "max_ratio": 0.2,
        "distance": "squared_l2",
        "huber_c": 1.0,
        "weight": "edm",
        "boundary": 0.1,
        "boundary_share": 0.5,
        "boundary_weight": 1.0,
    },
}
# Of the pipeline (data, evaluation, storage), with one possible value, or with their own test.
ELSEWHERE = {
    *("kind", "method", "images", "batch", "ema", "snapshots", "flip", "of", "init", "lpips"),
    "from_",
}
RATIO = {"P_mean": 0.0, "P_std": 0.5, "q": 4.0, "k": 2.0, "b": 0.1, "max_ratio": 0.2, "stages": 1}
LOGNORMAL = {"P_mean": 0.0, "P_std": 0.5, "levels": ConstantLevels(N=3)}


@lru_cache
def gradients(config):
    """Of the second step: a target and a loss weight have moved away by then."""
    stage = fresh(replace(config, warmup_images=0))
    steps = run(stage)
    for _ in range(2):
        next(steps)
    return [parameter.grad.clone() for parameter in stage.state.net.parameters()]


def differ(some, others):
    return any(not torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_the_settings_below_are_all_there_are():
    common = {field.name for field in fields(KINDS["teacher"])} - set(OTHER["teacher"]) - ELSEWHERE
    assert common == set(TRAIN)
    discrete = set(OTHER["cd"]) | set(OTHER["ict"])
    for kind, ours in {**OTHER, "cd": discrete, "ict": discrete}.items():
        own = {field.name for field in fields(KINDS[kind])} - common - ELSEWHERE
        assert own - set(ours) <= ({"path"} if kind in ("tcm", "mean_flow") else set())


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, settings in OTHER.items() for name in settings]
)
def test_every_setting_of_a_method_moves_its_gradients(kind, name):
    plain = KINDS[kind]
    if (kind, name) == ("scd", "path"):  # without a teacher there is none to guide
        plain = replace(plain, guidance=1.0)
    changed = replace(plain, **{name: OTHER[kind][name]})
    assert differ(gradients(changed), gradients(plain))


@pytest.mark.parametrize(
    ("pairs", "name", "value"),
    [(RatioPairs(), name, value) for name, value in RATIO.items()]
    + [(LognormalPairs(), name, value) for name, value in LOGNORMAL.items()],
)
def test_every_setting_of_a_law_of_pairs_moves_the_pairs(pairs, name, value):
    at = Progress(500, 1000)
    r = []
    for law in (pairs, replace(pairs, **{name: value})):
        random = BatchRandom(torch.Generator().manual_seed(0), 64, 0, 64)
        r.append(draw_pairs(law, NoiseConfig(), at, random).r)
    assert not torch.equal(*r)


@pytest.mark.parametrize("name", TRAIN)
def test_every_setting_of_training_moves_the_weights(name):
    def weights(config):
        stage = fresh(config)
        for _, _ in zip(range(2), run(stage), strict=False):
            pass
        return list(stage.state.net.parameters())

    plain = replace(KINDS["teacher"], warmup_images=0)
    assert differ(weights(replace(plain, **{name: TRAIN[name]})), weights(plain))


def test_the_perceptual_distance_is_really_asked():
    calls = []

    class Perceptual(torch.nn.Module):
        def forward(self, a, b):
            calls.append(a.shape)
            return (a - b).square().flatten(1).sum(1)

    config = replace(KINDS["ict"], distance="lpips", lpips="weights.pt")
    stage = fresh(config)
    next(run(stage, objective_for(config, stage.description.noise, Perceptual())))
    assert calls == [(BATCH, 1, 8, 8)]
