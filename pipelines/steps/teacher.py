"""teacher: shards -> an EDM diffusion model."""

from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.training import StageConfig, run_stage


def run(ctx: StepContext, config: StageConfig, shard: Committed[ShardSet]) -> TrainedModel:
    return run_stage(ctx, config, shard)
