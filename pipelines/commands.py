"""What each command does: heavy imports wait until they are needed."""

import argparse
import contextlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage, temporary
from infra.errors import HeadLost, Preempted, UserError
from pipelines.arguments import load, source, tracking_uri


def run(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph, outcome

    recipe, cluster = load(arguments)
    steps = graph.build(recipe, cluster, source(arguments, recipe))
    for name in arguments.force:
        if name not in [step.name for step in steps]:
            known = ", ".join(step.name for step in steps)
            raise UserError(f"--force {name}: no such step; the steps are {known}")
    lines = dag.plan(steps, cluster.workspace)
    _check_sweeps(lines, arguments.force)
    if arguments.dry_run:
        _print_plan(lines, arguments.force)
        return 0
    code = _execute(recipe, cluster, steps, lines, arguments.force, wait=arguments.wait)
    if code == 0:
        outcome.show(steps, cluster.workspace)
    return code


def tune(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph, tune_command
    from pipelines.steps.tune import step_name

    recipe, cluster = load(arguments)
    if arguments.extend is not None and arguments.extend < 1:
        raise UserError(f"--extend: {arguments.extend} must be at least 1")

    def step_of(recipe: Any) -> Any:
        steps = graph.build(recipe, cluster, source(arguments, recipe))
        name = step_name(recipe.tune[0].stage)
        return next(step for step in steps if step.name == name)

    step = step_of(recipe)
    if arguments.extend is not None:
        begun = len(tune_command.ledger_at(step, cluster).trials())
        sweep = replace(recipe.tune[0], trials=begun + arguments.extend)
        recipe = replace(recipe, tune=(sweep,))
        step = step_of(recipe)
    if arguments.dry_run:
        tune_command.show_plan(step, cluster)
        return 0
    if arguments.status:
        tune_command.show_status(step, cluster)
        return 0
    lines = dag.plan([step], cluster.workspace)
    _check_sweeps(lines, [])
    code = _execute(recipe, cluster, [step], lines, [], wait=arguments.wait, sweep=step)
    if code == 0:
        tune_command.show_result(step, cluster.workspace)
    return code


def _execute(
    recipe: Any,
    cluster: Any,
    targets: Sequence[Any],
    lines: Sequence[Any],
    force: Sequence[str],
    *,
    wait: bool,
    sweep: Any = None,
) -> int:
    """Run what is not done; `sweep` is the step whose trials are shown as they go."""
    from pipelines import config, dag, execution, lease, outcome, sweep_table, tune_command
    from pipelines.progress import Progress

    view = None
    if sweep is not None:
        ledger = tune_command.ledger_at(sweep, cluster)
        view = sweep_table.SweepView(ledger, sweep.config.sweep)
    try:
        with (
            _sigterm_noted() as sigterm,
            lease.hold(
                cluster.workspace,
                wait=wait,
                waiting_for=lambda holder: print(f"waiting for {holder}", file=sys.stderr),
                asked_to_stop=sigterm.is_set,
            ) as held,
        ):
            for line in lines:
                if line.step.name in force:
                    dag.set_aside(cluster.workspace, line.step)
            _warn_of_drift(lines, force)
            text = config.resolved_yaml(recipe).encode()
            storage.write_bytes(storage.join(cluster.workspace, "recipe.yaml"), text)
            settings = dag.Settings(
                workspace=cluster.workspace,
                tracking_uri=tracking_uri(cluster),
                experiment=recipe.name,
                cluster=cluster,
                stop=storage.join(cluster.workspace, "stops", held.token),
            )

            def asked_to_stop() -> str | None:
                if held.lost is not None:
                    return f"workspace {cluster.workspace} was taken over by {held.lost}"
                return "asked to stop by SIGTERM" if sigterm.is_set() else None

            events = execution.execute(
                targets, settings, lambda: _ray(cluster.address), asked_to_stop
            )
            with (
                Progress(lines, cluster.workspace, view) as progress,
                contextlib.closing(events),  # on an interrupt this cancels what runs
            ):
                for event in events:
                    progress.show(event)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on where it stopped", file=sys.stderr)
        return 3
    except HeadLost as lost:
        print(lost, file=sys.stderr)
        return 1
    except execution.StepsFailed as failed:
        return outcome.explain(failed)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph

    recipe, cluster = load(arguments)
    steps = graph.build(recipe, cluster, source(arguments, recipe))
    lines = dag.plan(steps, cluster.workspace)
    _check_sweeps(lines, [])
    _print_plan(lines, [])
    return 0


def status(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph
    from pipelines.progress import progress_line

    recipe, cluster = load(arguments)
    print(f"{recipe.name} in {cluster.workspace}")
    lines = dag.plan(graph.build(recipe, cluster), cluster.workspace)
    width = max(10, *(len(line.step.name) for line in lines))
    for line in lines:
        state, detail = "done", ""
        if line.committed is None:
            work = storage.join(dag.home_of(cluster.workspace, line.step), "work")
            state, detail = "open", progress_line(work) or line.reason
        else:
            detail = f"{line.committed.seconds:.1f} s  {line.reason}"
        print(f"  {line.step.name:<{width}} {state:<5} {line.fingerprint}  {detail}")
    return 0


def report(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph

    recipe, cluster = load(arguments)
    line = dag.plan(graph.build(recipe, cluster), cluster.workspace)[-1]
    if line.committed is None:
        recipe_name = arguments.recipe or recipe.name
        raise UserError(f"no report yet: {line.reason}; run: cmforge run {recipe_name}")
    page = storage.join(line.committed.url, line.committed.value.file)
    if arguments.out:
        storage.write_bytes(storage.absolute(arguments.out), storage.read_bytes(page))
        page = storage.absolute(arguments.out)
    print(page)
    return 0


def estimate(arguments: argparse.Namespace) -> int:
    from pipelines import estimate_command

    return estimate_command.show(arguments, load(arguments, recipe_needed=False)[1])


def doctor(arguments: argparse.Namespace) -> int:
    from pipelines import doctor

    _, cluster = load(arguments, recipe_needed=False)
    checks = doctor.examine(cluster.workspace, cluster.tracking_uri)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<14} {check.detail}")
    return 0 if all(check.ok for check in checks) else 1


def compare(arguments: argparse.Namespace) -> int:
    from pipelines import compare

    if arguments.samples is not None and arguments.samples < 2:
        raise UserError(f"--samples: {arguments.samples} must be at least 2")
    recipe, cluster = load(arguments)
    compare.show(
        (arguments.a, arguments.b),
        recipe,
        _yardstick(recipe, cluster),
        workspace=cluster.workspace,
        tracking_uri=tracking_uri(cluster),
        samples=arguments.samples,
        out=Path(arguments.out),
    )
    return 0


def reference_export(arguments: argparse.Namespace) -> int:
    from consistency.evaluation.npz import write_npz

    yardstick = _yardstick(*load(arguments))
    target = storage.absolute(arguments.file)
    with tempfile.TemporaryDirectory(dir=temporary.root()) as folder:
        local = Path(folder) / "statistics.npz"
        write_npz(local, yardstick.statistics(), yardstick.reference.protocol)
        storage.upload_file(str(local), target)
    print(target)
    return 0


def weights_list(arguments: argparse.Namespace) -> int:
    from pipelines import weights

    for line in weights.table():
        print(line)
    return 0


def weights_fetch(arguments: argparse.Namespace) -> int:
    from pipelines import weights_fetch

    print(weights_fetch.fetch(arguments.name))
    return 0


def weights_import(arguments: argparse.Namespace) -> int:
    from pipelines import weights_fetch

    print(weights_fetch.take(Path(arguments.path), arguments.name))
    return 0


def gc(arguments: argparse.Namespace) -> int:
    from pipelines import gc

    workspace = load(arguments, recipe_needed=False)[1].workspace
    return gc.show(workspace, arguments.older_than, delete=arguments.delete)


# --- shared ---------------------------------------------------------------------------------------


def _check_sweeps(lines: Sequence[Any], forced: Sequence[str]) -> None:
    """UserError for a sweep that is none, before anything starts."""
    from pipelines import tune_command

    for line in lines:
        to_run = line.state == "to run" or line.step.name in forced
        if line.step.gang == "trials" and to_run:
            config = line.step.config
            tune_command.refuse_what_cannot_be(config.sweep, config.source)


def _yardstick(recipe: Any, cluster: Any) -> Any:
    """The feature network and statistics of a finished reference step."""
    from pipelines import dag, graph
    from pipelines.yardstick import Yardstick

    lines = dag.plan(graph.build(recipe, cluster), cluster.workspace)
    done = {line.step.name: line for line in lines}
    shard, reference = done["shard"], done["reference"]
    if shard.committed is None or reference.committed is None:
        raise UserError(
            f"no statistics of real images yet: {reference.reason}; run: cmforge run {recipe.name}"
        )
    return Yardstick.of(shard.committed, reference.committed)


def _ray(address: str) -> Any:
    """Only now does Ray start."""
    from infra import ray_environment

    ray_environment.prepare(address)
    from infra.cluster import RayExecutor

    return RayExecutor(address)


@contextlib.contextmanager
def _sigterm_noted() -> Iterator[threading.Event]:
    """A polite kill (batch systems, `docker stop`, a node that goes away) leaves time to save what
    there is; a second one leaves as Ctrl-C does."""
    asked = threading.Event()

    def note(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plan(lines: Sequence[Any], forced: Sequence[str]) -> None:
    width = max(10, *(len(line.step.name) for line in lines))
    for line in lines:
        state, reason = line.state, line.reason
        if line.step.name in forced:
            state, reason = "to run", "--force"
        print(f"{line.step.name:<{width}} {state:<7} {line.fingerprint}  {reason}")
    _warn_of_drift(lines, forced)
    todo = sum(line.state == "to run" or line.step.name in forced for line in lines)
    print(f"{len(lines) - todo} cached, {todo} to run")


def _warn_of_drift(lines: Sequence[Any], forced: Sequence[str]) -> None:
    """Results whose code has changed since are reused, but never silently."""
    for line in lines:
        if line.drifted and line.step.name not in forced:
            shown = ", ".join(line.drifted[:5])
            more = f" and {len(line.drifted) - 5} more" if len(line.drifted) > 5 else ""
            print(
                f"warning: {line.step.name} is reused, but its code has changed since: "
                f"{shown}{more}; --force {line.step.name} runs it again",
                file=sys.stderr,
            )
