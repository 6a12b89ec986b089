"""The command `cmforge`: parsing and printing only. Heavy imports wait until they are needed."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError

EXIT_CODES = """\
exit codes:
  0    done
  1    a stage failed, or a check of `doctor` did
  2    the command, recipe, data or workspace needs mending (one line says how)
  130  interrupted; the same command goes on where it stopped
  141  nobody reads the output any more (`cmforge plan | head`)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option: `run digits --cluster auto a.b=1`.
    if rest and hasattr(arguments, "overrides") and all("=" in r and r[0] != "-" for r in rest):
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()  # here, where a closed pipe is still ours to handle
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other tools: a run cut short must not pass for done
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cmforge",
        description="From images to a registered few-step generator, by consistency models.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        sub.add_argument(
            "--workspace", metavar="URL", help="folder or fsspec URL of results and registry"
        )
        sub.add_argument("--cluster", metavar="NAME", help="laptop, one-gpu, auto, or a YAML file")
        return sub

    def add_recipe(sub: argparse.ArgumentParser, optional: bool) -> None:
        sub.add_argument(
            "recipe",
            nargs="?" if optional else None,
            help="a recipe's name or YAML file"
            + (" (default: the one last run in the workspace)" if optional else ""),
        )
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="dotted overrides: teacher.images=200_000, cluster.workers=2",
        )

    run = add("run", _run, "run what is not done yet, up to a registered model and its report")
    add_recipe(run, optional=False)
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    run.add_argument(
        "--force", action="append", default=[], metavar="STEP", help="run this step again"
    )
    plan = add("plan", _plan, "print what a run would reuse and do, with the reasons")
    add_recipe(plan, optional=False)
    status = add("status", _status, "print how far the workspace is")
    add_recipe(status, optional=True)
    report = add("report", _report, "print where the report is, or copy it")
    add_recipe(report, optional=True)
    report.add_argument("--out", metavar="FILE", help="copy the page there")

    sample = add("sample", _sample, "draw images from a model")
    sample.add_argument(
        "model",
        nargs="?",
        help="models:/NAME@ALIAS, a model folder, or teacher, distill, isolate, truncate of the "
        "workspace (default: the model registered from it)",
    )
    sample.add_argument("--num", type=int, default=40, help="how many images (default 40)")
    sample.add_argument("--steps", type=int, help="evaluations (default 1; a teacher: 18 of Heun)")
    sample.add_argument(
        "--levels",
        metavar="80,0.8",
        help="one evaluation at each of these noise levels (of a MeanFlow: times, from 1)",
    )
    sample.add_argument(
        "--guidance", type=float, default=1.0, help="of a teacher, towards the class (default 1)"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--class", dest="label", type=int, help="class number (default: all)")
    sample.add_argument("--out", default="samples.png", metavar="FILE")
    cost = add("estimate", _estimate, "print FLOPs, GPU-hours and memory before anything starts")
    add_recipe(cost, optional=False)
    cost.add_argument("--mfu", type=float, default=0.4, help="share of the devices' peak (0.4)")
    for what in ("size", "channels", "classes"):
        cost.add_argument(f"--{what}", type=int, help=f"{what} of images the recipe leaves open")
    add("doctor", _doctor, "check this machine, the installation and the workspace")
    return parser


# --- commands ------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    from pipelines import config, dag, execution, graph
    from pipelines.progress import Progress

    recipe, cluster = _load(arguments)
    steps = graph.build(recipe, cluster)
    for name in arguments.force:
        if name not in [step.name for step in steps]:
            known = ", ".join(step.name for step in steps)
            raise UserError(f"--force {name}: no such step; the steps are {known}")
    lines = dag.plan(steps, cluster.workspace)
    if arguments.dry_run:
        _print_plan(lines, arguments.force)
        return 0
    lock = dag.lock_workspace(cluster.workspace)
    try:
        for line in lines:
            if line.step.name in arguments.force:
                dag.set_aside(cluster.workspace, line.step)
        _warn_of_drift(lines, arguments.force)
        text = config.resolved_yaml(recipe).encode()
        storage.write_bytes(storage.join(cluster.workspace, "recipe.yaml"), text)
        settings = dag.Settings(cluster.workspace, _tracking_uri(cluster), recipe.name, cluster)
        events = execution.execute(steps, settings, lambda: _ray(cluster.address))
        with (
            _sigterm_as_interrupt(),
            Progress(lines, cluster.workspace) as progress,
            contextlib.closing(events),  # on an interrupt this cancels what runs
        ):
            for event in events:
                progress.show(event)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except execution.StepsFailed as failed:
        return _explain(failed)
    finally:
        if lock is not None:
            lock.close()
    _print_result(steps, cluster.workspace)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph

    recipe, cluster = _load(arguments)
    _print_plan(dag.plan(graph.build(recipe, cluster), cluster.workspace), [])
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph
    from pipelines.progress import training_line

    recipe, cluster = _load(arguments)
    print(f"{recipe.name} in {cluster.workspace}")
    lines = dag.plan(graph.build(recipe, cluster), cluster.workspace)
    width = max(10, *(len(line.step.name) for line in lines))
    for line in lines:
        state, detail = "done", ""
        if line.committed is None:
            work = storage.join(dag.home_of(cluster.workspace, line.step), "work")
            state, detail = "open", training_line(work) or line.reason
        else:
            detail = f"{line.committed.seconds:.1f} s  {line.reason}"
        print(f"  {line.step.name:<{width}} {state:<5} {line.fingerprint}  {detail}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pipelines import dag, graph

    recipe, cluster = _load(arguments)
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


def _sample(arguments: argparse.Namespace) -> int:
    from pipelines import sample

    arguments.recipe, arguments.overrides = None, []
    _, cluster = _load(arguments, recipe_needed=False)
    path = sample.draw(
        arguments.model,
        cluster.workspace,
        _tracking_uri(cluster) if (arguments.model or "").startswith("models:") else None,
        num=arguments.num,
        steps=arguments.steps,
        seed=arguments.seed,
        label=arguments.label,
        levels=None if arguments.levels is None else sample.levels_of(arguments.levels),
        guidance=arguments.guidance,
        out=Path(arguments.out),
    )
    print(path)
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    from pipelines import estimate

    return estimate.show(arguments, _load(arguments, recipe_needed=False)[1])


def _doctor(arguments: argparse.Namespace) -> int:
    from pipelines import doctor

    _, cluster = _load(arguments, recipe_needed=False)
    checks = doctor.examine(cluster.workspace, cluster.tracking_uri)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<14} {check.detail}")
    return 0 if all(check.ok for check in checks) else 1


# --- shared --------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace, recipe_needed: bool = True) -> tuple[Any, Any]:
    """Recipe and cluster from the arguments; all their errors in one UserError."""
    from pipelines import config

    overrides = list(getattr(arguments, "overrides", []))
    recipe_name = getattr(arguments, "recipe", None)
    if recipe_name is not None and "=" in recipe_name:  # `status key=value`
        recipe_name, overrides = None, [recipe_name, *overrides]
    own = [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]
    rest = [text for text in overrides if not text.startswith("cluster.")]
    name = arguments.cluster or ("auto" if os.environ.get("RAY_ADDRESS") else "laptop")
    try:
        cluster = config.load_cluster(name, own)
    except UserError as error:
        if recipe_name is not None:
            try:
                config.load_recipe(recipe_name, rest)
            except UserError as more:
                raise UserError(f"{error}\n{more}") from None
        raise
    if arguments.workspace is not None:
        cluster = replace(cluster, workspace=arguments.workspace)
    if not cluster.workspace:
        raise UserError("workspace: empty; name a folder or an fsspec URL with --workspace")
    cluster = replace(cluster, workspace=storage.absolute(cluster.workspace))
    if os.environ.get("MLFLOW_TRACKING_URI") and cluster.tracking_uri is None:
        cluster = replace(cluster, tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    if not recipe_needed:
        return None, cluster
    if recipe_name is not None:
        return _at_absolute_paths(config.load_recipe(recipe_name, rest)), cluster
    saved = storage.join(cluster.workspace, "recipe.yaml")
    if not storage.exists(saved):
        raise UserError(
            f"nothing has run in workspace {cluster.workspace}; name a recipe, "
            f"or another --workspace"
        )
    if storage.is_local(saved):
        return config.load_recipe(saved, rest), cluster
    with tempfile.TemporaryDirectory(prefix="cmforge-") as folder:
        local = os.path.join(folder, "recipe.yaml")
        Path(local).write_bytes(storage.read_bytes(saved))
        return config.load_recipe(local, rest), cluster


def _at_absolute_paths(recipe: Any) -> Any:
    """Relative paths are the shell's; workers and later commands may stand elsewhere."""
    from consistency.method_config import ConsistencyConfig

    if recipe.data.path is not None:
        data = replace(recipe.data, path=storage.absolute(recipe.data.path))
        recipe = replace(recipe, data=data)
    for name in ("distill", "isolate"):
        stage = getattr(recipe, name)
        if isinstance(stage, ConsistencyConfig) and stage.lpips is not None:
            stage = replace(stage, lpips=storage.absolute(stage.lpips))
            recipe = replace(recipe, **{name: stage})
    return recipe


def _tracking_uri(cluster: Any) -> str:
    from infra import tracking

    return cluster.tracking_uri or tracking.default_tracking_uri(cluster.workspace)


def _ray(address: str) -> Any:
    """Only now does Ray start."""
    from infra import ray_environment

    ray_environment.prepare(address)
    from infra.cluster import RayExecutor

    return RayExecutor(address)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A polite kill (batch systems, `docker stop`) leaves as Ctrl-C does."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
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


def _explain(failed: Any) -> int:
    """Say what failed, where the traceback is, and what to do; exit code 2 for a user's mistake."""
    for name, error in failed.failures.items():
        if isinstance(error, UserError):
            print(error, file=sys.stderr)
        else:
            message = getattr(error, "message", error)
            log = f" (traceback: {failed.logs[name]})" if name in failed.logs else ""
            print(f"step {name} failed: {message}{log}", file=sys.stderr)
    mistakes = all(isinstance(error, UserError) for error in failed.failures.values())
    if not mistakes:
        print("the same command runs again what is not done", file=sys.stderr)
    return 2 if mistakes else 1


def _print_result(steps: Sequence[Any], workspace: str) -> None:
    from pipelines import dag

    done: dict[str, Any] = {}
    for line in dag.plan(steps, workspace):
        assert line.committed is not None, f"{line.step.name} is not done: {line.reason}"
        done[line.step.name] = line.committed
    evaluation, model, page = done["evaluate"].value, done["register"].value, done["report"]
    print()
    for score in evaluation.scores:
        steps_text = f"{score.evaluations} evaluation{'s' if score.evaluations > 1 else ''}"
        print(
            f"  {score.candidate:<8} {steps_text:<15} {evaluation.metric} "
            f"{score.percent:.2f} % of the variance of the real images"
        )
    print(
        f"model   {model.name} version {model.version} (from {model.candidate}): {model.decision}"
    )
    print(f"report  {storage.join(page.url, page.value.file)}")
