"""isolate: a consistency model with no teacher in the loss, from scratch or a teacher's weights."""

from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.training import StageConfig, run_stage


def run(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel] | None = None,
) -> TrainedModel:
    return run_stage(ctx, config, shard, teacher)
