"""isolate: a consistency model with no teacher in the loss, from scratch or others' weights."""

from pipelines import tuned
from pipelines.artifacts import Committed, ShardSet, TrainedModel, Tuned
from pipelines.dag import StepContext
from pipelines.training import StageConfig, run_stage


def run(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel] | None = None,
    distilled: Committed[TrainedModel] | None = None,
    tune: Committed[Tuned] | None = None,
) -> TrainedModel:
    """`teacher` and `distilled` are there where the settings may begin with one of them."""
    given = {"teacher": teacher, "distilled": distilled}
    if tune is not None:
        return tuned.run_stage(ctx, config, shard, given, tune)
    return run_stage(ctx, config, shard, tuned.source_of(config.training, given))
