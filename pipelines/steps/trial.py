"""trial: one setting of a sweep, trained as its stage would train it and looked at on the way.

No step of the graph: a sweep makes as many as it needs. Each is content-addressed like any step, so
a setting that was tried before costs nothing.
"""

from dataclasses import dataclass, replace

from pipelines import probes
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, TrainedModel
from pipelines.dag import StepContext, home_at
from pipelines.measuring import WatchConfig
from pipelines.training import StageConfig, on_workers, run_stage
from pipelines.watch import WatchJob


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Identity: what is trained, and how it is measured meanwhile."""

    stage: StageConfig
    probes: int
    steps: int  # sampling steps of the objective
    samples: int
    noise_seed: int
    mid_sigma: float
    allow_rank_deficient: bool

    def marks(self) -> tuple[int, ...]:
        """Images at which it is looked at."""
        return probes.marks(self.stage.training, self.probes)


def run(
    ctx: StepContext,
    config: TrialConfig,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    teacher: Committed[TrainedModel] | None = None,
) -> TrainedModel:
    """The trained model with every sampling EMA, and `watch.jsonl` with its distances.

    One worker trains in this process, more are Ray Train's. `teacher` is the model that the trial
    begins with or asks.
    """
    from pipelines.trial import in_this_process

    watch = WatchJob(
        config=WatchConfig(
            every_images=1,  # the marks say when
            samples=config.samples,
            stop_above=None,  # it is the scheduler that stops trials
            allow_rank_deficient=config.allow_rank_deficient,
            seed=config.noise_seed,
        ),
        reference=home_at(ctx.workspace, reference.step, reference.fingerprint),
        mid_sigma=config.mid_sigma,
        teacher_steps=1,  # of a diffusion model, which no trial is
        marks=config.marks(),
    )
    return run_stage(
        ctx,
        replace(config.stage, watch=watch),
        shard,
        teacher,
        launch=in_this_process if ctx.cluster.workers == 1 else on_workers,
        objective=config.steps,
    )
