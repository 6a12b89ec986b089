"""One training stage: `run_stage` on the driver's side, `worker` on each Ray Train worker.

Teacher, distillation and isolation differ in their objective only; they all pass through here.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistency.config import (
    ConsistencyConfig,
    NetworkConfig,
    NoiseConfig,
    TeacherConfig,
    check_network,
)
from infra import storage, tracking
from infra.errors import UserError
from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.dag import StepContext

if TYPE_CHECKING:
    from infra.cluster import TrainWorker

LOG_EVERY_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Identity of a training step."""

    network: NetworkConfig
    noise: NoiseConfig
    training: TeacherConfig | ConsistencyConfig
    seed: int


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs: plain values and URLs, no open files."""

    step: str
    description: str  # ModelDescription as JSON
    config: TeacherConfig | ConsistencyConfig
    noise: NoiseConfig
    seed: int
    shards_url: str
    manifest_sha256: str
    teacher_url: str | None
    teacher_sha256: str | None
    work: str
    checkpoint_every_seconds: float
    cpus_per_worker: int
    tracking_uri: str
    experiment: str
    fingerprint: str
    artifact_root: str

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


def run_stage(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel] | None = None,
) -> TrainedModel:
    """Train on Ray Train workers, resuming what an earlier attempt left in `ctx.work`.

    Writes weights.safetensors, config.json and curve.jsonl to `ctx.out`.
    """
    from consistency.published import ModelDescription
    from infra import cluster

    try:
        check_network(config.network, shard.value.size)
    except ValueError as error:
        raise UserError(f"network.{error}") from error
    training = config.training
    about = ModelDescription(
        kind="denoiser" if isinstance(training, TeacherConfig) else "consistency",
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
        noise=config.noise,
        seed=config.seed,
        shards_url=storage.join(shard.url, "shards"),
        manifest_sha256=shard.value.manifest_sha256,
        teacher_url=None if teacher is None else teacher.url,
        teacher_sha256=None if teacher is None else teacher.value.weights_sha256,
        work=ctx.work,
        checkpoint_every_seconds=ctx.cluster.checkpoint_every_seconds,
        cpus_per_worker=ctx.cluster.cpus_per_worker,
        tracking_uri=ctx.tracking_uri,
        experiment=ctx.experiment,
        fingerprint=ctx.fingerprint,
        artifact_root=tracking.artifact_root(ctx.workspace),
    )
    result = cluster.train_workers(
        worker,
        {"job": job},
        name="train",
        storage_url=ctx.work,
        workers=ctx.cluster.workers,
        cpus_per_worker=ctx.cluster.cpus_per_worker,
        gpus_per_worker=ctx.cluster.gpus_per_worker,
        checkpoints_kept=ctx.cluster.checkpoints_kept,
        max_failures=ctx.cluster.max_failures,
    )
    if "failed" in result:
        raise (UserError if result["user"] else RuntimeError)(result["failed"])
    for name in ("weights.safetensors", "config.json", "curve.jsonl"):
        (ctx.out / name).write_bytes(storage.read_bytes(storage.join(ctx.work, "final", name)))
    return TrainedModel(**result)


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each rank.

    A failure that would only repeat itself (bad data, a loss that is not finite) is returned, not
    raised: Train would try again.
    """
    from consistency.loop import NonFiniteLoss
    from infra.cluster import TrainWorker

    me = TrainWorker()
    try:
        return _train(payload["job"], me)
    except NonFiniteLoss as error:  # raised on every rank
        return {"failed": str(error), "user": False}
    except UserError as error:
        if me.world_size > 1:  # the other ranks would wait for this one
            raise
        return {"failed": str(error), "user": True}


def _train(job: StageJob, me: "TrainWorker") -> dict[str, Any]:
    """Restore or start, iterate the loop, checkpoint at a cadence, publish at the end."""
    import torch

    from consistency.loop import Workers, train
    from consistency.state import CheckpointError

    torch.set_num_threads(job.cpus_per_worker)
    stage = _Stage(job, me.device)
    with me.latest_checkpoint() as folder:
        if folder is not None:
            try:
                stage.restore(folder)
            except CheckpointError as error:
                raise UserError(
                    f"{error}; delete {storage.join(job.work, 'train')} to train from the start"
                ) from error
    state, curve = stage.state, stage.curve

    with tracking.MetricWriter(
        job.tracking_uri, job.open_run, after=state.images, enabled=me.rank == 0
    ) as metrics:
        before = curve[-1]["seconds"] if curve else 0.0
        clock = _Clock(job.checkpoint_every_seconds, state.images, before)
        steps = train(
            state,
            stage.objective,
            stage.stream,
            job.config,
            preconditioned=stage.preconditioned,
            teacher=stage.teacher,
            seed=job.seed,
            workers=Workers(me.rank, me.world_size, me.device),
        )
        for log in steps:
            clock.losses.append(log.loss)
            last = log.steps == job.config.steps
            if clock.log_due(last):
                point = clock.point(log)
                curve.append(point)
                metrics.log(log.images, {k: v for k, v in point.items() if k != "images"})
                if me.rank == 0:
                    _progress(job, point)
            if not last and clock.checkpoint_due(me.world_size, me.device):
                stage.publish_checkpoint(me.publish, me.rank)
                clock.checkpointed()
        if me.rank == 0:
            return stage.finish(clock.train_seconds)
    return {}


class _Stage:
    """The objects of one stage on one rank."""

    def __init__(self, job: StageJob, device: Any) -> None:
        import torch

        from consistency.config import TargetEMA
        from consistency.data import ImageStream
        from consistency.objectives import ConsistencyObjective, DenoisingObjective
        from consistency.parameterization import ConsistencyFunction, Denoiser
        from consistency.published import ModelDescription, build_network
        from consistency.randomness import derive_seed
        from consistency.state import TrainState
        from pipelines import shard_data

        self.job = job
        self.about = ModelDescription.from_json(job.description)
        noise = job.noise
        images = shard_data.load(job.shards_url, job.manifest_sha256)
        labels = images.labels if self.about.num_classes > 0 else None
        self.stream = ImageStream(images.images, labels, job.seed, job.config.flip)

        self.preconditioned: Callable[[torch.nn.Module], torch.nn.Module]
        self.objective: Any
        if isinstance(job.config, TeacherConfig):
            self.objective = DenoisingObjective(
                noise.sigma_data, job.config.P_mean, job.config.P_std
            )
            self.preconditioned = lambda net: Denoiser(net, noise.sigma_data)
        else:
            self.objective = ConsistencyObjective.of(job.config, noise)
            self.preconditioned = lambda net: ConsistencyFunction(
                net, noise.sigma_data, noise.sigma_min
            )

        # The same initial weights on every rank and every attempt.
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(job.seed, "init"))
            net = build_network(self.about, job.config.dropout).to(device)
        self.teacher = None
        if isinstance(job.config, ConsistencyConfig) and job.teacher_url is not None:
            teacher = build_network(self.about).to(device)
            weights = self._teacher_weights()
            teacher.load_state_dict(weights)
            teacher.eval().requires_grad_(False)
            self.teacher = Denoiser(teacher, noise.sigma_data)
            if job.config.init == "teacher":
                net.load_state_dict(weights)
        target = None
        if isinstance(job.config, ConsistencyConfig) and isinstance(job.config.target, TargetEMA):
            target = build_network(self.about, job.config.dropout).to(device)
        self.state = TrainState.fresh(net, target, job.config)
        self.curve: list[dict[str, float]] = []

    def _teacher_weights(self) -> Any:
        from safetensors.torch import load

        assert self.job.teacher_url is not None
        url = storage.join(self.job.teacher_url, "weights.safetensors")
        data = storage.read_bytes(url)
        if hashlib.sha256(data).hexdigest() != self.job.teacher_sha256:
            raise storage.CorruptError(f"{url} is altered (its sha256 differs): run with --force")
        return load(data)

    def restore(self, folder: Path) -> None:
        self.state.restore(folder)
        lines = (folder / "curve.jsonl").read_text().splitlines()
        self.curve.extend(json.loads(line) for line in lines)

    def publish_checkpoint(self, publish: Callable[[Path | None, int], None], rank: int) -> None:
        if rank != 0:
            publish(None, self.state.images)
            return
        folder = Path(tempfile.mkdtemp(prefix="cmforge-"))
        try:
            self.state.save(folder)
            (folder / "curve.jsonl").write_text(self._curve_text())
            publish(folder, self.state.images)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, train_seconds: float) -> dict[str, Any]:
        """Write the published model to work/final; returns the fields of TrainedModel."""
        from safetensors.torch import save

        average = self.state.averages[self.job.config.ema[0].name]
        weights = save({k: v.contiguous().cpu() for k, v in average.items()})
        final = storage.join(self.job.work, "final")
        storage.write_bytes(storage.join(final, "weights.safetensors"), weights)
        storage.write_bytes(storage.join(final, "config.json"), self.about.to_json().encode())
        storage.write_bytes(storage.join(final, "curve.jsonl"), self._curve_text().encode())
        return {
            "kind": self.about.kind,
            "images": self.state.images,
            "steps": self.state.steps,
            "parameters": sum(p.numel() for p in self.state.net.parameters()),
            "final_loss": self.curve[-1]["loss"] if self.curve else float("nan"),
            "train_seconds": round(train_seconds, 3),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }

    def _curve_text(self) -> str:
        return "".join(json.dumps(point) + "\n" for point in self.curve)


class _Clock:
    """When to log and to checkpoint. Wall time decides, so no result may depend on it."""

    def __init__(self, checkpoint_every_seconds: float, images: int, before: float) -> None:
        now = time.monotonic()
        self.every = checkpoint_every_seconds
        self.before = before  # seconds of earlier attempts
        self.started = self.last_log = self.last_checkpoint = now
        self.last_images = images
        self.losses: list[Any] = []

    def log_due(self, last: bool) -> bool:
        return last or time.monotonic() - self.last_log >= LOG_EVERY_SECONDS

    def point(self, log: Any) -> dict[str, float]:
        """One line of the curve: means since the last one (of rank 0's share)."""
        import torch

        now = time.monotonic()
        rate = (log.images - self.last_images) / max(now - self.last_log, 1e-9)
        loss = torch.stack(self.losses).mean().item()
        self.last_log, self.last_images, self.losses = now, log.images, []
        return {
            "images": log.images,
            "loss": loss,
            "images_per_second": round(rate, 2),
            "lr": log.lr,
            "seconds": round(self.train_seconds, 3),
            **log.metrics,
        }

    def checkpoint_due(self, world_size: int, device: Any) -> bool:
        """Decided by rank 0's clock, since publishing is a barrier for all."""
        due = time.monotonic() - self.last_checkpoint >= self.every
        if world_size > 1:
            import torch
            import torch.distributed as dist

            flag = torch.tensor([float(due)], device=device)
            dist.broadcast(flag, src=0)
            due = bool(flag.item())
        return due

    def checkpointed(self) -> None:
        self.last_checkpoint = time.monotonic()

    @property
    def train_seconds(self) -> float:
        return self.before + time.monotonic() - self.started


def _progress(job: StageJob, point: dict[str, float]) -> None:
    """The live line of this stage, for the driver and `cmforge status`; not worth failing for."""
    line = {**point, "total": job.config.images, "at": time.time()}
    with contextlib.suppress(OSError, UserError):
        storage.write_bytes(storage.join(job.work, "progress.json"), json.dumps(line).encode())


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of a config, as MLflow params."""
    flat: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= _flat(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = str(value)
    return flat
