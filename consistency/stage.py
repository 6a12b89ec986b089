"""One training stage put together: what is trained, by which objective, from which weights.

Pure, so that a script with torch alone can train what the pipeline trains:

    about = describe(config, network=network, noise=noise, size=32, channels=3, class_names=())
    stage = begin(about, config, seed=0)
    for log in train(stage.state, stage.objective, stream, config, teacher=stage.teacher): ...
    model = finish(stage)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from consistency.config import NetworkConfig, NoiseConfig, TeacherConfig
from consistency.method_config import (
    ConsistencyConfig,
    MeanFlowConfig,
    SCMConfig,
    StageTraining,
    TargetEMA,
    TruncateConfig,
)
from consistency.objectives import Objective, objective_for
from consistency.published import ModelDescription, PublishedModel, build, build_network
from consistency.randomness import derive_seed
from consistency.state import TrainState


@dataclass
class Stage:
    """`teacher` is the frozen inner network that the objective asks, or None."""

    description: ModelDescription
    config: StageTraining
    objective: Objective
    state: TrainState
    teacher: nn.Module | None


def describe(
    config: StageTraining,
    *,
    network: NetworkConfig,
    noise: NoiseConfig,
    size: int,
    channels: int,
    class_names: tuple[str, ...],
) -> ModelDescription:
    """The model that a stage will publish."""
    about = ModelDescription(
        kind="consistency",
        network=network,
        noise=noise,
        size=size,
        channels=channels,
        class_names=class_names,
        boundary=noise.sigma_min,
    )
    match config:
        case TeacherConfig():
            return replace(about, kind="denoiser")
        case MeanFlowConfig():
            return replace(about, kind="mean_flow")
        case SCMConfig():
            return replace(about, boundary=0.0)
        case ConsistencyConfig(boundary=boundary):
            return replace(about, boundary=noise.sigma_min if boundary is None else boundary)
        case TruncateConfig(boundary=boundary, sigma_prime=sigma_prime):
            at = noise.sigma_min if boundary is None else boundary
            return replace(about, boundary=at, lowest_sigma=sigma_prime)


def begin(
    description: ModelDescription,
    config: StageTraining,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    teacher_weights: Mapping[str, Tensor] | None = None,
    lpips: nn.Module | None = None,
) -> Stage:
    """Step zero. The initial weights are a function of `seed`, on every rank and every attempt.

    `teacher_weights` (of an inner network of the same shape) are those of the model that the config
    begins with or asks: the teacher's, or the distilled model's (`init: distilled`).
    """
    objective = objective_for(config, description.noise, lpips)
    teacher = target = None
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "init"))
        net = build_network(description, config.dropout, config.dropout_max_side).to(device)
        if isinstance(config, ConsistencyConfig) and isinstance(config.target, TargetEMA):
            target = build_network(description, config.dropout, config.dropout_max_side).to(device)
        if not isinstance(config, TeacherConfig) and config.uses_teacher:
            assert teacher_weights is not None, "this stage needs a teacher's weights"
            if config.init != "scratch":
                net.load_state_dict(dict(teacher_weights))
            if config.path != "noise":
                teacher = build_network(description).to(device)
                teacher.load_state_dict(dict(teacher_weights))
                teacher.eval().requires_grad_(False)
    head = objective.loss_weight()
    state = TrainState.fresh(net, target, config, None if head is None else head.to(device))
    return Stage(description, config, objective, state, teacher)


def finish(stage: Stage, ema: str | None = None) -> PublishedModel:
    """The trained model with the weights of one sampling EMA (default: the first), on the CPU."""
    name = stage.config.ema[0].name if ema is None else ema
    weights = {key: value.cpu() for key, value in stage.state.averages[name].items()}
    return build(stage.description, weights)
