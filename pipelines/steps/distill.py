"""distill: teacher -> a consistency model that follows the teacher's ODE."""

from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.training import StageConfig, run_stage


def run(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel],
) -> TrainedModel:
    return run_stage(ctx, config, shard, teacher)
