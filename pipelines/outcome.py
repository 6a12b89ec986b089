"""What a run says at its end."""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from infra import storage
from infra.errors import UserError
from pipelines import dag
from pipelines.dag import Step
from pipelines.execution import AttemptFailed, StepsFailed


def explain(failed: StepsFailed) -> int:
    """Say what failed, where the traceback is, and what to do; exit code 2 for a user's mistake."""
    for name, error in failed.failures.items():
        if isinstance(error, UserError):
            print(error, file=sys.stderr)
        else:
            node, log = "", ""
            if isinstance(error, AttemptFailed):
                node, log = f" on {error.node}", f" (traceback: {error.log})"
            print(f"step {name} failed{node}: {error}{log}", file=sys.stderr)
    mistakes = all(isinstance(error, UserError) for error in failed.failures.values())
    if not mistakes:
        again = shlex.join(["cmforge", *sys.argv[1:]])
        print(f"what is done is kept; go on with: {again}", file=sys.stderr)
    return 2 if mistakes else 1


def show(steps: Sequence[Step], workspace: str) -> None:
    """Scores, the registered model and the report of a run that is done."""
    done: dict[str, Any] = {}
    for line in dag.plan(steps, workspace):
        assert line.committed is not None, f"{line.step.name} is not done: {line.reason}"
        done[line.step.name] = line.committed
    evaluation, model, page = done["evaluate"].value, done["register"].value, done["report"]
    print()
    for score in evaluation.scores:
        steps_text = f"{score.evaluations} evaluation{'s' if score.evaluations > 1 else ''}"
        spread = "" if score.std is None else f" ± {evaluation.text(score.std)}"
        of = " of the variance of the real images" if evaluation.features.unit else ""
        print(
            f"  {score.candidate:<8} {steps_text:<15} {score.protocol.name} "
            f"{evaluation.text(score.value)}{spread}{of}"
        )
    print(
        f"model   {model.name} version {model.version} (from {model.candidate}): {model.decision}"
    )
    print(f"report  {storage.join(page.url, page.value.file)}")
