"""What a training step minimises, as frozen values: `objective(nets, batch, progress, random)`.

`DenoisingObjective` trains the teacher. `ConsistencyObjective` is one composition of parts
(pairs x path x distance x weight x target); CD, CT, iCT and ECT are settings of it. `SCMObjective`
(sCD, sCT), `MeanFlowObjective` and `TruncatedObjective` (TCM) are the successors.
"""

from torch import nn

from consistency.config import NoiseConfig, TeacherConfig
from consistency.method_config import (
    ConsistencyConfig,
    MeanFlowConfig,
    SCMConfig,
    StageTraining,
    TruncateConfig,
)
from consistency.objectives.base import LossTerms, Nets, Objective, Progress
from consistency.objectives.consistency import ConsistencyObjective
from consistency.objectives.denoising import DenoisingObjective
from consistency.objectives.mean_flow import MeanFlowObjective
from consistency.objectives.scm import SCMObjective
from consistency.objectives.truncated import TruncatedObjective

__all__ = [
    "ConsistencyObjective",
    "DenoisingObjective",
    "LossTerms",
    "MeanFlowObjective",
    "Nets",
    "Objective",
    "Progress",
    "SCMObjective",
    "TruncatedObjective",
    "objective_for",
]


def objective_for(
    config: StageTraining, noise: NoiseConfig, lpips: nn.Module | None = None
) -> Objective:
    """The objective that a stage's configuration describes; the only place that tells them apart.

    `lpips` is the loaded network of `config.distance: lpips`.
    """
    match config:
        case TeacherConfig():
            return DenoisingObjective.of(config, noise)
        case ConsistencyConfig():
            return ConsistencyObjective.of(config, noise, lpips)
        case SCMConfig():
            return SCMObjective.of(config, noise)
        case MeanFlowConfig():
            return MeanFlowObjective.of(config)
        case TruncateConfig():
            return TruncatedObjective.of(config, noise)
