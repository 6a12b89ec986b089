"""What each training worker runs: restore or start, iterate the loop, checkpoint, publish."""

import contextlib
import hashlib
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from consistency.config import PowerEMA
from consistency.method_config import ConsistencyConfig, StageTraining
from infra import storage, temporary, tracking
from infra.errors import UserError
from pipelines import checkpoints, probes, ranks, restarts
from pipelines.cadence import Clock, Due, Notice
from pipelines.checkpoints import Checkpoints
from pipelines.ranks import Worker
from pipelines.training import StageJob
from pipelines.watch import LOG, Diverged, Watch, write_best

CHECK_EVERY = 50  # steps; a look at the loss waits for the GPU


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each rank."""
    from infra.cluster import TrainWorker

    me = TrainWorker()
    job: StageJob = payload["job"]
    try:
        return run(job, me)
    except Exception as error:  # perhaps only because another rank is gone
        place = f"(rank {me.rank} of {me.world_size} on {platform.node()})"
        error.add_note(place)
        with contextlib.suppress(OSError, UserError, ValueError):
            mistake = isinstance(error, UserError)
            said = str(error) if mistake else f"{type(error).__name__}: {error} {place}"
            restarts.because(job.work, said.splitlines()[0], mistake=mistake)
        raise


def run(job: StageJob, me: Worker) -> dict[str, Any]:
    """Train to the end; returns the fields of TrainedModel on rank 0.

    A failure that would only repeat itself (bad data, a loss that is not finite) is returned, not
    raised: Train would try again.
    """
    from consistency.loop import NonFiniteLoss

    try:
        return _train(job, me)
    except NonFiniteLoss as error:  # raised on every rank
        return {"failed": str(error), "user": False}
    except Diverged as error:  # so is this, and its text says what to mend
        return {"failed": str(error), "user": True}
    except UserError as error:
        if me.world_size > 1:  # the other ranks would wait for this one
            raise
        return {"failed": str(error), "user": True}


def _train(job: StageJob, me: Worker) -> dict[str, Any]:
    """Restore or start, iterate the loop, checkpoint at a cadence, publish at the end."""
    import torch

    from consistency.loop import Workers, train
    from consistency.state import CheckpointError

    lives = restarts.begin(job.work, checkpoints.last_in(job.work)) if me.rank == 0 else None
    lives = ranks.said_by_first(lives, me)
    assert lives is not None
    if (verdict := lives.verdict(job.max_failures)) is not None:
        return {"failed": verdict, "user": lives.mistake}
    torch.set_num_threads(job.cpus_per_worker)
    running = _Running(job, me)
    try:
        running.restore(me)
    except CheckpointError as error:
        raise UserError(
            f"{error}; delete {storage.join(job.work, checkpoints.FOLDER)} to train from the start"
        ) from error
    stage, state, curve = running.stage, running.stage.state, running.curve
    if running.watch is not None:
        running.watch.seen = state.images
    marks = snapshot_steps(job.config)

    with (
        tracking.MetricWriter(
            job.tracking_uri,
            job.open_run,
            after=state.images,
            enabled=me.rank == 0 and job.objective is None,
        ) as metrics,
        Notice(job.stop if me.rank == 0 else None) as notice,
    ):
        before = curve[-1]["seconds"] if curve else 0.0
        clock = Clock(job.checkpoint_every_seconds, state.images, before)
        steps = train(
            state,
            stage.objective,
            running.stream,
            job.config,
            teacher=stage.teacher,
            seed=job.seed,
            workers=Workers(
                me.rank,
                me.world_size,
                me.device,
                micro_batch=job.micro_batch,
                check_every=1 if me.device.type == "cpu" else CHECK_EVERY,
            ),
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
            if log.steps in marks and me.rank == 0:
                running.keep_snapshot()
            if log.checked and running.watch is not None:
                with clock.paused():
                    lines = running.look(clock)
                for line in lines:
                    key = f"{line['name']}/{line['ema']}/steps_{line['steps']}"
                    metrics.log(log.images, {key: line["value"]})
                if lines:
                    running.watch.raise_if_diverged()
                if lines and job.objective is not None and not last:
                    running.tell(me)
                    clock.checkpointed()
            if log.checked and not last:
                due = Due.NOTHING
                if notice.given:
                    due = Due.STOP
                elif clock.checkpoint_due() and not running.checkpoints.busy:
                    due = Due.SAVE
                match Due(ranks.said_by_first(int(due), me)):
                    case Due.STOP:
                        running.save(me)
                        running.checkpoints.wait()
                        return {"stopped": state.images}
                    case Due.SAVE:
                        running.save(me)
                        clock.checkpointed()
        running.checkpoints.wait()
        if me.rank == 0:
            return running.finish(clock.train_seconds)
    return {}


def snapshot_steps(config: StageTraining) -> frozenset[int]:
    """The optimiser steps after which power EMAs are kept: evenly spread, the last one included."""
    return frozenset(
        round(config.steps * (n + 1) / config.snapshots) for n in range(config.snapshots)
    )


class _Running:
    """A stage on one rank, and where its files go."""

    def __init__(self, job: StageJob, me: Worker) -> None:
        from consistency.data import ImageStream
        from consistency.published import ModelDescription
        from consistency.stage import begin
        from pipelines import shard_data

        self.job = job
        self.checkpoints = Checkpoints(job.work, job.checkpoints_kept)
        self.about = ModelDescription.from_json(job.description)
        images = shard_data.load(job.shards_url, job.manifest_sha256)
        labels = images.labels if self.about.num_classes > 0 else None
        self.stream = ImageStream(images.images, labels, job.seed, job.config.flip)
        self.stage = begin(
            self.about,
            job.config,
            seed=job.seed,
            device=me.device,
            teacher_weights=self._teacher_weights(),
            lpips=self._lpips(me.device),
        )
        self.watch: Watch | None = None
        if job.watch is not None:
            emas = tuple(ema.name for ema in job.config.ema)
            self.watch = Watch(
                job.watch, self.about, job.step, emas, me.rank, me.world_size, me.device
            )
        self.curve: list[dict[str, float]] = []

    def _teacher_weights(self) -> Any:
        from safetensors.torch import load

        if self.job.teacher_url is None:
            return None
        url = storage.join(self.job.teacher_url, "weights.safetensors")
        data = storage.read_bytes(url)
        if hashlib.sha256(data).hexdigest() != self.job.teacher_sha256:
            raise storage.CorruptError(f"{url} is altered (its sha256 differs): run with --force")
        return load(data)

    def _lpips(self, device: Any) -> Any:
        """The network of distance lpips, whose file must be the one that was planned with."""
        config = self.job.config
        if not isinstance(config, ConsistencyConfig) or config.lpips is None:
            return None
        from consistency.lpips import load_lpips

        data = storage.read_bytes(config.lpips)
        if hashlib.sha256(data).hexdigest() != self.job.lpips_sha256:
            raise UserError(
                f"{self.job.step}.lpips: {config.lpips} changed since the plan; run again"
            )
        with tempfile.TemporaryDirectory(dir=temporary.root()) as folder:
            path = Path(folder) / Path(config.lpips).name
            path.write_bytes(data)
            try:
                return load_lpips(path).to(device)
            except ValueError as error:
                raise UserError(f"{self.job.step}.lpips: {error}") from error

    def restore(self, me: Worker) -> None:
        """The state of the newest whole checkpoint, of which rank 0 says which it is."""
        with contextlib.ExitStack() as stack:
            newest = stack.enter_context(self.checkpoints.newest()) if me.rank == 0 else None
            name = ranks.said_by_first(newest[0] if newest is not None else None, me)
            if name is None:
                return
            folder = newest[1] if newest else stack.enter_context(self.checkpoints.local(name))
            self.stage.state.restore(folder)
            lines = (folder / "curve.jsonl").read_text().splitlines()
            self.curve.extend(json.loads(line) for line in lines)
            if self.watch is not None and (folder / LOG).exists():
                self.watch.restore((folder / LOG).read_text())

    def save(self, me: Worker) -> None:
        """A checkpoint of this moment, written to this machine's disk and sent from there."""
        if me.rank != 0:
            return
        folder = Path(tempfile.mkdtemp(dir=temporary.root()))
        try:
            self.stage.state.save(folder)
            (folder / "curve.jsonl").write_text(self._curve_text())
            if self.watch is not None:
                (folder / LOG).write_text(self.watch.text())
            self.checkpoints.save(folder, self.stage.state.images)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def tell(self, me: Worker) -> None:
        """A trial's probes so far: kept with a checkpoint of this moment, then told."""
        job, watch = self.job, self.watch
        assert watch is not None
        assert watch.job.marks is not None
        assert job.objective is not None
        if me.rank == 0:
            storage.write_bytes(storage.join(job.work, LOG), watch.text().encode())
        self.save(me)
        self.checkpoints.wait()
        report = {"images": self.stage.state.images}
        me.tell({**report, **probes.report(watch.history, watch.job.marks, job.objective)})

    def look(self, clock: "Clock") -> list[dict[str, Any]]:
        """Probe when it is due, affordable to rank 0 and ready on all; keep the best weights."""
        watch, state = self.watch, self.stage.state
        assert watch is not None
        if not watch.due(state.images):
            return []
        trained = state.images - clock.first_images
        within = watch.rank != 0 or watch.affordable(clock.own_seconds, trained)
        if not ranks.unanimous(watch.ready() and within, watch.world_size, watch.device):
            return []
        before = watch.best()
        lines = watch.probe(state, state.images, clock.train_seconds)
        best = watch.best()
        # Of a trial only the end counts: it gets the same files as a stage that nobody watched.
        kept = watch.rank == 0 and self.job.objective is None
        if kept and best is not None and best != before:
            data = self._weights(best["ema"])
            folder = storage.join(self.job.work, "final", "best")
            write_best(folder, data, self.about.to_json(), best)
        return lines

    def keep_snapshot(self) -> None:
        """Power EMAs as they are now; a resumed run that comes by again writes the same bytes."""
        for ema in self.job.config.ema:
            if isinstance(ema, PowerEMA):
                self._write(f"snapshots/{ema.name}-{self.stage.state.steps}", ema.name)

    def finish(self, train_seconds: float) -> dict[str, Any]:
        """Write the published model to work/final; returns the fields of TrainedModel."""
        state, emas = self.stage.state, self.job.config.ema
        first, *others = [ema.name for ema in emas]
        digest = self._write("weights", first)
        for name in others:
            self._write(f"ema/{name}", name)
        final = storage.join(self.job.work, "final")
        storage.write_bytes(storage.join(final, "config.json"), self.about.to_json().encode())
        storage.write_bytes(storage.join(final, "curve.jsonl"), self._curve_text().encode())
        watch: dict[str, Any] = {"watched": False, "best": None}
        if self.watch is not None and self.watch.history:
            storage.write_bytes(storage.join(final, LOG), self.watch.text().encode())
            best = self.watch.best() if self.job.objective is None else None
            said = best and f"{best['ema']} at {best['images']:,} images"
            watch = {"watched": True, "best": said}
        return {
            **watch,
            "kind": self.about.kind,
            "images": state.images,
            "steps": state.steps,
            "parameters": sum(p.numel() for p in state.net.parameters()),
            "final_loss": self.curve[-1]["loss"] if self.curve else float("nan"),
            "train_seconds": round(train_seconds, 3),
            "weights_sha256": digest,
            "ema": first,
            "emas": others,
            "snapshots": [
                f"{ema.name}-{steps}"
                for steps in sorted(snapshot_steps(self.job.config))
                for ema in emas
                if isinstance(ema, PowerEMA)
            ],
        }

    def _write(self, name: str, ema: str) -> str:
        """One EMA's weights as work/final/{name}.safetensors; returns their sha256."""
        data = self._weights(ema)
        url = storage.join(storage.join(self.job.work, "final"), f"{name}.safetensors")
        storage.write_bytes(url, data)
        return hashlib.sha256(data).hexdigest()

    def _weights(self, ema: str) -> bytes:
        from safetensors.torch import save

        average = self.stage.state.averages[ema]
        data: bytes = save({k: v.contiguous().cpu() for k, v in average.items()})
        return data

    def _curve_text(self) -> str:
        return "".join(json.dumps(point) + "\n" for point in self.curve)


def _progress(job: StageJob, point: dict[str, float]) -> None:
    """The live line of this stage, for the driver and `cmforge status`; not worth failing for."""
    line = {**point, "total": job.config.images, "at": time.time()}
    with contextlib.suppress(OSError, UserError):
        storage.write_bytes(storage.join(job.work, "progress.json"), json.dumps(line).encode())
