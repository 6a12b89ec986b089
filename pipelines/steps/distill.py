"""distill: a consistency model that follows the teacher's probability-flow ODE."""

from pipelines import tuned
from pipelines.artifacts import Committed, ShardSet, TrainedModel, Tuned
from pipelines.dag import StepContext
from pipelines.training import StageConfig, run_stage


def run(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel],
    tune: Committed[Tuned] | None = None,
) -> TrainedModel:
    if tune is not None:
        return tuned.run_stage(ctx, config, shard, {"teacher": teacher}, tune)
    return run_stage(ctx, config, shard, teacher)
