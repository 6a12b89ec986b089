"""What runs in a trial's process: an attempt at the step `trial` that tells how it goes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import Preempted, TrainingFailed, UserError
from pipelines import drift, probes
from pipelines.artifacts import Committed, TrainedModel
from pipelines.dag import Identity, Input, Settings, StepContext, home_at, read_record
from pipelines.execution import AttemptFailed, produce
from pipelines.fingerprint import fingerprint_of
from pipelines.steps import trial as step
from pipelines.training import StageJob
from pipelines.watch import LOG

if TYPE_CHECKING:
    pass

NAME, VERSION = "trial", "1"


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """Everything a trial's process needs."""

    config: step.TrialConfig
    inputs: Mapping[str, Committed[Any]]
    settings: Settings
    over: bool  # ended in an earlier attempt of the sweep: it only says again what it said
    retries: int  # of an attempt that raised

    @property
    def identity(self) -> Identity:
        given = (Input(alias, one.fingerprint) for alias, one in self.inputs.items())
        return Identity(NAME, VERSION, self.config, tuple(given))

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.identity)[:16]

    @property
    def home(self) -> str:
        return home_of(self.settings.workspace, self.fingerprint)


def home_of(workspace: str, fingerprint: str) -> str:
    return home_at(workspace, NAME, fingerprint)


def run(job: TrialJob, report: Callable[[Mapping[str, Any]], None]) -> None:
    """Train to the end, or until `report` does not return; goes on from what is there.

    What is known already is reported again, marked `repeated`. The end is reported once the model
    is committed. A failure is reported as `failed`, a user's mistake as `mistake`, and that it was
    asked to stop and did as `preempted`.
    """
    places, objective = job.config.marks(), job.config.steps
    known = _known(job)
    for number in range(1, len(known) + 1):
        lines = [line for lines in known[:number] for line in lines]
        # The last one may not have been answered yet; so it is asked again.
        live = number == len(known) and not job.over
        report({**probes.report(lines, places, objective), "repeated": not live})
    if job.over or len(known) == len(places):
        return
    for left in reversed(range(job.retries + 1)):
        try:
            code = drift.closure(step.run.__module__)
            produce(job.identity, step.run, TrainedModel, job.settings, job.inputs, code)
        except UserError as error:
            report({"mistake": str(error)})
            return
        except Preempted:
            report({"preempted": True})
            return
        except TrainingFailed as error:  # it would only fail again
            report({"failed": str(error)})
            return
        except AttemptFailed as error:
            if not left:
                report({"failed": f"{error.message} (traceback: {error.log})"})
                return
        else:
            lines = [line for lines in _known(job) for line in lines]
            report(probes.report(lines, places, objective))
            return


def _known(job: TrialJob) -> list[list[Mapping[str, Any]]]:
    """The probes so far: all of a committed trial, else those of its last checkpoint."""
    try:
        record = read_record(job.home)
        url = storage.join(job.home, "attempts", record["attempt"], LOG)
        text = storage.read_bytes(url).decode()
    except FileNotFoundError:
        url = storage.join(job.home, "work", LOG)
        text = storage.read_bytes(url).decode() if storage.exists(url) else ""
    return probes.by_probe(json.loads(line) for line in text.splitlines())


def in_this_process(ctx: StepContext, job: StageJob) -> dict[str, Any]:
    """Train right here: a process of the sweep goes on to its next trial in a moment, where workers
    of Ray Train take seconds to start."""
    from pipelines.train_worker import run as train

    return train(job, _Here())


class _Here:
    """The only worker of a trial."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        import torch

        self.device: torch.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tell(self, report: Mapping[str, Any]) -> None:
        from infra import tuning

        tuning.report(report)
