"""truncate: a consistency model -> one that is better at high noise levels only (TCM)."""

from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.training import StageConfig, run_stage


def run(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    first: Committed[TrainedModel],
) -> TrainedModel:
    return run_stage(ctx, config, shard, first)
