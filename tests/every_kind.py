"""One tiny training stage of every kind, for the tests that hold for all of them."""

import socket
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from consistency.config import (
    ConstantEMA,
    HalfLifeEMA,
    NetworkConfig,
    NoiseConfig,
    PowerEMA,
    TeacherConfig,
)
from consistency.data import ImageStream
from consistency.loop import Workers, train
from consistency.method_config import (
    ConsistencyConfig,
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    MeanFlowConfig,
    RatioPairs,
    SCMConfig,
    SqrtLevels,
    TargetEMA,
    TruncateConfig,
    UniformPairs,
)
from consistency.published import build_network
from consistency.stage import begin, describe

NETWORK = NetworkConfig(
    channels=8, channel_mult=(1,), num_blocks=1, attention=(8,), class_conditional=True
)
CLASSES = ("a", "b", "c")
BATCH = 8
COMMON: dict[str, Any] = {
    "images": 3 * BATCH,
    "batch": BATCH,
    "dropout": 0.2,
    "decay_from": 0.5,
    "warmup_images": 16,  # the first step moves nothing
    "grad_clip": 1.0,
    "ema": (ConstantEMA(beta=0.9), HalfLifeEMA(images=100), PowerEMA(sigma_rel=0.1)),
}
KINDS = {
    "teacher": TeacherConfig(**COMMON),
    "teacher-weighted": TeacherConfig(**COMMON, label_dropout=0.4, adaptive_weight=True),
    "cd": ConsistencyConfig(
        **COMMON,
        method="cd",
        init="teacher",
        pairs=UniformPairs(levels=ConstantLevels(N=18)),
        path="heun",
        distance="squared_l2",
        target=TargetEMA(mu=0.9),
        guidance=1.5,
    ),
    "ct-2023": ConsistencyConfig(
        **COMMON,
        method="ct-2023",
        init="scratch",
        pairs=UniformPairs(levels=SqrtLevels(s0=2, s1=20)),
        path="noise",
        distance="squared_l2",
        target=TargetEMA(mu=0.9, adaptive_s0=2),
    ),
    "ict": ConsistencyConfig(
        **COMMON,
        method="ict",
        init="scratch",
        optimizer="radam",
        pairs=LognormalPairs(levels=DoublingLevels(s0=2, s1=16)),
        path="noise",
        weight="inverse_gap",
    ),
    "ect": ConsistencyConfig(
        **COMMON,
        method="ect",
        init="teacher",
        pairs=RatioPairs(stages=3),
        path="noise",
        weight="inverse_gap",
        boundary=0.0,
    ),
    "scd": SCMConfig(
        **COMMON,
        method="scd",
        init="teacher",
        path="teacher",
        tangent_warmup_images=24,
        prior_weight="inverse_sigma",
        guidance=1.5,
    ),
    "sct": SCMConfig(
        **COMMON, method="sct", init="teacher", path="noise", tangent="clip", tangent_norm="rms"
    ),
    "mean_flow": MeanFlowConfig(
        **COMMON, method="mean_flow", label_dropout=0.4, guidance=2.0, kappa=0.5
    ),
    "tcm": TruncateConfig(**COMMON, method="tcm", boundary=0.0, stage=1, huber_c=None),
}


def noise_of(config):
    """sCM is told the angle, as published."""
    return NoiseConfig(c_noise="angle" if isinstance(config, SCMConfig) else "log_sigma")


def about(config, **changes):
    parts = {"network": NETWORK, "size": 8, "channels": 1, "class_names": CLASSES, **changes}
    return describe(config, **{"noise": noise_of(config), **parts})


def fresh(config, **changes):
    """A stage at step zero as a new process would build it, the zeros of its network filled in.

    Layers that start at (nearly) zero would hide most of the network from a three-step test.
    """
    stage = begin(
        about(config, **changes), config, seed=0, teacher_weights=teacher_weights(**changes)
    )
    state = stage.state
    weights = shaken(state.net.state_dict(), seed=2)
    state.net.load_state_dict(weights)
    if state.target is not None:
        state.target.load_state_dict(weights)
    for average in state.averages.values():
        for name, value in average.items():
            value.copy_(weights[name])
    return stage


@cache
def teacher_weights(**changes):
    return shaken(build_network(about(KINDS["teacher"], **changes)).state_dict(), seed=1)


def shaken(weights, seed):
    """Weights [name -> tensor] that depend on their names and shapes alone."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in weights.items():
        flat = torch.randn(value.numel(), generator=generator).view(value.shape)
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        moved[name] = base + 0.1 * flat
    return moved


def images(count=20):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return ImageStream(pixels, random.integers(0, 3, count), seed=5, flip=True)


def run(stage, objective=None, data=None, config=None, **workers):
    """`loop.train` of a stage; `workers` are the arguments of Workers."""
    return train(
        stage.state,
        stage.objective if objective is None else objective,
        images() if data is None else data,
        stage.config if config is None else config,
        teacher=stage.teacher,
        workers=Workers(**workers),
    )


def tensors(stage):
    """Everything that a checkpoint of the stage holds, copied."""
    return {name: value.detach().clone() for name, value in stage.state._tensors().items()}


def deterministic(config):
    """With an Adam that does not turn the rounding of a vanishing gradient into a whole step."""
    return replace(config, eps=1e-3)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Spied:
    """An objective that shows its arguments and its terms to `look` and may return other terms."""

    def __init__(self, objective, look):
        self._objective, self._look = objective, look

    def __call__(self, nets, batch, progress, random):
        terms = self._objective(nets, batch, progress, random)
        other = self._look(nets, batch, progress, terms)
        return terms if other is None else other

    def __getattr__(self, name):
        return getattr(self._objective, name)
