"""The command `cmforge tune`: what a sweep would do, how it stands, and running it."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from infra import storage
from infra.errors import UserError
from pipelines import dag, sweep_table
from pipelines.artifacts import Tuned
from pipelines.config import RecipeSource
from pipelines.dag import Step
from pipelines.ledger import Ledger
from pipelines.recipe import Cluster
from pipelines.space import Checked, Space, check, explain_pbt
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import RUNNING
from pipelines.sweeping import TuneStage, ledger_of

MFU = 0.4  # share of a device's peak, as `cmforge estimate` assumes it


def refuse_what_cannot_be(sweep: SweepConfig, source: RecipeSource) -> Checked:
    """UserError, before anything starts, for a sweep that is none."""
    if sweep.scheduler == "pbt":
        reasons = explain_pbt(Space(sweep.space)) or (
            "its winner has had several settings in turn, and a recipe holds one of each key",
        )
        raise UserError(
            f"sweep {sweep.name}: scheduler pbt moves weights from one setting to another while "
            f"they train, which cannot be here; take asha, median or none\n"
            + "\n".join(f"  {reason}" for reason in reasons)
        )
    checked = check(sweep, source)
    training = getattr(source.recipe(sweep.fixed), sweep.stage)
    shorter = f"{sweep.stage}.images={sweep.images(training.images)}"
    try:
        training = getattr(source.recipe((*sweep.fixed, shorter)), sweep.stage)
    except UserError as error:
        raise UserError(
            f"sweep {sweep.name}: budget {sweep.budget:g} is too small: {error}"
        ) from error
    if training.steps < sweep.probes:
        raise UserError(
            f"sweep {sweep.name}: probes: {sweep.probes} looks at the {training.steps} steps of a "
            f"trial; lower it, or raise {sweep.stage}.images or sweep.budget"
        )
    return checked


def ledger_at(step: Step, cluster: Cluster) -> Ledger:
    """The ledger of a step that may never have run."""
    given: Mapping[str, Any] = {
        alias: SimpleNamespace(fingerprint=one.fingerprint) for alias, one in step.inputs.items()
    }
    return ledger_of(cluster.workspace, step.config, given)


def show_plan(step: Step, cluster: Cluster) -> None:
    """--dry-run: the space, how many settings it has, what it would cost."""
    config: TuneStage = step.config
    sweep, stage = config.sweep, config.sweep.stage
    checked = refuse_what_cannot_be(sweep, config.source)
    tried = ledger_at(step, cluster).trials()
    training = config.stage.training
    print(
        f"sweep {sweep.name} of {stage}: {sweep.trials} trials by {sweep.search}, "
        f"{_rule(sweep)}; {len(tried)} begun so far"
    )
    print(
        f"  measured at {sweep.probes} equal parts of the schedule, {sweep.samples} samples per "
        f"sampling EMA ({', '.join(_emas(config))}); ranked in {sweep.steps} steps"
    )
    print("\nspace")
    width = max(len(axis.key) for axis in sweep.space)
    for axis in sweep.space:
        when = f"  when {' and '.join(axis.when)}" if axis.when else ""
        print(f"  {axis.key:<{width}}  {_values(axis)}{when}")
    for text in sweep.fixed:
        print(f"  fixed in every trial: {text}")
    space = Space(sweep.space)
    ranges = ", times the ranges" if space.has_ranges else ""
    looked = (
        "all"
        if checked.looked_at == space.count()
        else f"{checked.looked_at:,} of them, evenly spread,"
    )
    print(
        f"\n{space.count():,} combinations{ranges}; {looked} looked at: {checked.valid:,} valid, "
        f"{len(checked.invalid):,} refused"
    )
    for reason in dict.fromkeys(one.reason for one in checked.invalid):
        example = next(one for one in checked.invalid if one.reason == reason)
        count = sum(one.reason == reason for one in checked.invalid)
        print(f"  {count:,} refused: {reason}  (such as {' '.join(example.settings)})")
    images = math.ceil(sweep.images(training.images) / training.batch) * training.batch
    full = images * sweep.trials
    print(f"\ncost: {images:,} images a trial (budget {sweep.budget:g}), {full:,} if none stops")
    if sweep.scheduler == "asha":
        share = lockstep_share(sweep)
        print(
            f"  ASHA in lockstep: {share:.0%}, {round(share * full):,} images; it does not wait, "
            f"so somewhat more"
        )
    for line in _device_cost(config, full):
        print(f"  {line}")
    rate = _measured_rate(stage, cluster)
    if rate is not None:
        seconds = full / (rate * cluster.trials)
        print(
            f"  {seconds / 60:.0f} min in full with {cluster.trials} side by side, at the "
            f"{rate:.0f} images/s of {stage}'s last run here"
        )


def show_status(step: Step, cluster: Cluster) -> None:
    """--status: every trial as it stands."""
    config: TuneStage = step.config
    ledger = ledger_at(step, cluster)
    trials = ledger.trials()
    over = sum(trial.state != RUNNING for trial in trials)
    print(
        f"sweep {config.sweep.name} of {config.sweep.stage}: {over} of {config.sweep.trials} "
        f"trials over, {ledger.seconds() / 60:.1f} min so far  ({ledger.home})"
    )
    if trials:
        print("\n".join(sweep_table.lines(trials, config.sweep)))


def show_result(step: Step, workspace: str) -> None:
    """The winner, where its delta is, and the command that makes it."""
    line = dag.plan([step], workspace)[-1]
    assert line.committed is not None, "it has just been run"
    found: Tuned = line.committed.value
    print(
        f"\nwinner  trial {found.winner} of {found.trials}: {found.metric} {found.value:.4g}, EMA "
        f"{found.ema}; {found.spent:.0%} of the full cost"
    )
    for text in found.settings:
        print(f"        {text}")
    print(f"delta   {storage.join(line.committed.url, 'delta.yaml')}")
    print(f"page    {storage.join(line.committed.url, 'sweep.html')}")
    text = storage.read_bytes(storage.join(line.committed.url, "delta.yaml")).decode()
    print(f"to run  {text.splitlines()[1].removeprefix('# ')}")


def lockstep_share(sweep: SweepConfig) -> float:
    """Share of the full cost that successive halving takes when every rung waits for all trials."""
    reached, cost, alive = 0, 0.0, 1.0
    rung = sweep.grace
    while rung < sweep.probes:
        cost += alive * (rung - reached)
        reached, alive, rung = rung, alive / sweep.eta, rung * sweep.eta
    return (cost + alive * (sweep.probes - reached)) / sweep.probes


def _device_cost(config: TuneStage, images: int) -> list[str]:
    """FLOPs and GPU time of so many images of the recipe's own setting; nothing where the recipe
    leaves open how large they are."""
    from pipelines import estimate
    from pipelines.estimate_command import in_hours

    try:
        found = estimate.estimate(config.source.recipe())
    except UserError:
        return []
    stage = next(stage for stage in found.stages if stage.name == config.sweep.stage)
    share = images / stage.images
    work = [estimate.Work(part.flops * share, part.precision) for part in stage.work]
    hours = (f"{device.name} {in_hours(device.hours(work, MFU))}" for device in estimate.DEVICES)
    flops = sum(part.flops for part in work)
    return [
        f"in full {flops:.3g} FLOP by the recipe's own setting: {', '.join(hours)} "
        f"at {MFU:.0%} of the peak, probes not counted"
    ]


def _rule(sweep: SweepConfig) -> str:
    return {
        "asha": f"ASHA from {sweep.grace}/{sweep.probes} of the schedule, one in {sweep.eta} on",
        "median": f"median stopping from {sweep.grace}/{sweep.probes} of the schedule",
        "none": "every trial to its end",
    }[sweep.scheduler]


def _emas(config: TuneStage) -> list[str]:
    sweep = config.sweep
    training = getattr(config.source.recipe(sweep.fixed), sweep.stage)
    return [ema.name for ema in training.ema]


def _values(axis: Axis) -> str:
    if axis.range is None:
        return " | ".join(axis.choice)
    low, high = axis.range
    kind = " on a logarithmic scale" if axis.log else ""
    return f"{low:g} to {high:g}{kind}{', whole numbers' if axis.integer else ''}"


def _measured_rate(stage: str, cluster: Cluster) -> float | None:
    """Images per second of the stage's newest run in this workspace."""
    record = dag.latest_record(stage, cluster.workspace)
    if record is None or not record["value"].get("train_seconds"):
        return None
    return float(record["value"]["images"] / record["value"]["train_seconds"])
