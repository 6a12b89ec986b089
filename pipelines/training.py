"""One training stage, the driver's side; `train_worker` is what each worker runs.

Teacher, distillation and isolation differ in their objective only; they all pass through here, and
so does every trial of a sweep.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from consistency.config import NetworkConfig, NoiseConfig, check_network
from consistency.method_config import ConsistencyConfig, StageTraining
from infra import storage, tracking
from infra.errors import Preempted, TrainingFailed, UserError
from pipelines import restarts
from pipelines.artifacts import Committed, ShardSet, TrainedModel, from_json
from pipelines.dag import StepContext
from pipelines.recipe import Recipe
from pipelines.watch import WatchJob

BEST_FILES = ("weights.safetensors", "config.json", "watch.json")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Identity of a training step."""

    network: NetworkConfig
    noise: NoiseConfig
    training: StageTraining
    seed: int
    lpips_sha256: str | None = None  # of the weights of distance lpips
    watch: WatchJob | None = field(default=None, metadata={"identity": False})

    @classmethod
    def of(cls, recipe: Recipe, stage: str, watch: WatchJob | None = None) -> "StageConfig":
        """That of a recipe's stage. Raises UserError for a file that is not there."""
        training: StageTraining = getattr(recipe, stage)
        if recipe.adopts(stage):
            raise UserError(f"{stage}.from: an adopted model is not trained; leave it out")
        lpips = training.lpips if isinstance(training, ConsistencyConfig) else None
        return cls(
            network=recipe.network,
            noise=recipe.noise,
            training=training,
            seed=recipe.seed,
            lpips_sha256=None if lpips is None else digest(f"{stage}.lpips", lpips),
            watch=watch,
        )


def digest(key: str, url: str) -> str:
    """What stands for a file in an identity."""
    if not storage.exists(url):
        raise UserError(f"{key}: {url} does not exist; check the spelling or mount it")
    return storage.sha256(storage.absolute(url))


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs: plain values and URLs, no open files."""

    step: str
    description: str  # ModelDescription as JSON
    config: StageTraining
    seed: int
    shards_url: str
    manifest_sha256: str
    teacher_url: str | None
    teacher_sha256: str | None
    work: str
    lpips_sha256: str | None
    checkpoint_every_seconds: float
    checkpoints_kept: int
    max_failures: int
    stop: str | None  # where this file is, the workers save what they have and leave
    cpus_per_worker: int
    micro_batch: int | None
    tracking_uri: str
    experiment: str
    fingerprint: str
    artifact_root: str
    watch: WatchJob | None
    # Of a trial: the sampling steps of its objective; it reports every probe, and the sweep keeps
    # its MLflow run.
    objective: int | None

    def open_run(self) -> str:
        """The MLflow run of this stage, found or created."""
        return tracking.open_run(
            self.tracking_uri,
            self.experiment,
            self.step,
            self.fingerprint,
            self.artifact_root,
            params=_flat(self.config),
            tags={"cmforge.step": self.step},
        )


Launch = Callable[[StepContext, StageJob], dict[str, Any]]


def run_stage(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel] | None = None,
    *,
    launch: Launch | None = None,
    objective: int | None = None,
) -> TrainedModel:
    """Train, resuming what an earlier attempt left in `ctx.work`.

    `teacher` is what the stage starts from or asks: of the truncated stage, its first one. Network
    and noise axis are that model's: an adopted one may have others than the recipe. Writes the
    files that `TrainedModel` names to `ctx.out`. `launch` is how the workers come about
    (default: `on_workers`). Raises UserError; TrainingFailed for a loss that is not finite, and for
    workers that get no further; Preempted where it was asked to stop.
    """
    from consistency.published import ModelDescription
    from consistency.stage import describe

    if teacher is not None:
        its = ModelDescription.from_json(ctx.fetch(teacher, "config.json").read_text())
        config = dataclasses.replace(config, network=its.network, noise=its.noise)
    try:
        check_network(config.network, shard.value.size)
    except ValueError as error:
        raise UserError(f"network.{error}") from error
    training = config.training
    about = describe(
        training,
        network=config.network,
        noise=config.noise,
        size=shard.value.size,
        channels=shard.value.channels,
        class_names=shard.value.class_names,
    )
    if ctx.cluster.workers > training.batch:
        raise UserError(
            f"{ctx.step}.batch: {training.batch} is less than the cluster's {ctx.cluster.workers} "
            f"workers; raise it, or lower workers in the cluster file"
        )
    job = StageJob(
        step=ctx.step,
        description=about.to_json(),
        config=training,
        seed=config.seed,
        shards_url=storage.join(shard.url, "shards"),
        manifest_sha256=shard.value.manifest_sha256,
        teacher_url=None if teacher is None else teacher.url,
        teacher_sha256=None if teacher is None else teacher.value.weights_sha256,
        work=ctx.work,
        lpips_sha256=config.lpips_sha256,
        checkpoint_every_seconds=ctx.cluster.checkpoint_every_seconds,
        checkpoints_kept=ctx.cluster.checkpoints_kept,
        max_failures=ctx.cluster.max_failures,
        stop=ctx.stop,
        cpus_per_worker=ctx.cluster.cpus_per_worker,
        micro_batch=ctx.cluster.micro_batch,
        tracking_uri=ctx.tracking_uri,
        experiment=ctx.experiment,
        fingerprint=ctx.fingerprint,
        artifact_root=tracking.artifact_root(ctx.workspace),
        watch=config.watch,
        objective=objective,
    )
    restarts.forget(ctx.work)
    result = (launch or on_workers)(ctx, job)
    if "failed" in result:
        raise (UserError if result["user"] else TrainingFailed)(result["failed"])
    if "stopped" in result:
        raise Preempted(f"{ctx.step} stopped at {result['stopped']:,} images, all of them saved")
    model: TrainedModel = from_json(TrainedModel, result)
    for name in files_of(model):
        (ctx.out / name).parent.mkdir(exist_ok=True)
        (ctx.out / name).write_bytes(storage.read_bytes(storage.join(ctx.work, "final", name)))
    return model


def on_workers(ctx: StepContext, job: StageJob) -> dict[str, Any]:
    """Ray Train workers, as many as the cluster has them."""
    from infra import cluster
    from pipelines.train_worker import worker

    result: dict[str, Any] = cluster.train_workers(
        worker,
        {"job": job},
        name="train",
        storage_url=ctx.work,
        workers=ctx.cluster.workers,
        min_workers=ctx.cluster.min_workers,
        cpus_per_worker=ctx.cluster.cpus_per_worker,
        gpus_per_worker=ctx.cluster.gpus_per_worker,
        reports_to_tune=job.objective is not None,
    )
    return result


def files_of(model: TrainedModel) -> list[str]:
    """Every file of a trained model, relative to its folder."""
    return [
        "weights.safetensors",
        "config.json",
        "curve.jsonl",
        *(f"ema/{name}.safetensors" for name in model.emas),
        *(f"snapshots/{name}.safetensors" for name in model.snapshots),
        *(["watch.jsonl"] if model.watched else []),
        *(f"best/{name}" for name in (BEST_FILES if model.best is not None else ())),
    ]


def _flat(config: object, prefix: str = "") -> dict[str, str]:
    """Dotted keys of a config, as MLflow params."""
    flat: dict[str, str] = {}
    assert dataclasses.is_dataclass(config)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name == "from_":
            continue  # of an adopted model, and this one is trained
        if dataclasses.is_dataclass(value):
            flat |= _flat(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = str(value)
    return flat
