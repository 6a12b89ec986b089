"""register: the best candidate becomes exactly one model version, and takes the alias or not."""

import hashlib
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from infra import temporary
from pipelines.artifacts import (
    Committed,
    Evaluation,
    RegisteredModel,
    Score,
    ShardSet,
    TrainedModel,
)
from pipelines.dag import StepContext
from pipelines.recipe import RegisterConfig
from pipelines.steps.evaluate import PROTOCOLS

if TYPE_CHECKING:
    from consistency.published import ModelDescription
    from infra.gate import Measurement
    from infra.registry import ModelPackage

REQUIREMENTS = ("mlflow>=3.17,<4", "torch>=2.6", "numpy>=2", "pillow>=11")


@dataclass(frozen=True, kw_only=True)
class RegisterStage:
    """Identity of the step."""

    register: RegisterConfig
    recipe: str
    registry: str  # where: a model registered in one registry is not in another


def run(
    ctx: StepContext,
    config: RegisterStage,
    shard: Committed[ShardSet],
    teacher: Committed[TrainedModel],
    evaluate: Committed[Evaluation],
    **candidates: Committed[TrainedModel],
) -> RegisteredModel:
    """Register the candidate of lowest distance at `steps`; the gate decides about the alias."""
    from consistency.published import ModelDescription
    from infra import registry, tracking
    from infra.gate import Rule

    wanted = config.register
    name = best_candidate(evaluate.value, tuple(candidates), wanted.steps)
    trained = candidates[name]
    score = evaluate.value.score(name, wanted.steps)

    text = ctx.fetch(trained, "config.json").read_text()
    # Sample as it was evaluated: the second level of two steps is a choice of the evaluation.
    description = replace(ModelDescription.from_json(text), mid_sigma=evaluate.value.mid_sigma)
    digest = artifact_digest(trained.value.weights_sha256, description.to_json())

    metrics = {
        f"{s.protocol.name}/steps_{s.steps}": s.value
        for s in evaluate.value.scores
        if s.candidate == name
    }
    lineage = {
        "cmforge.recipe": config.recipe,
        "cmforge.candidate": name,
        "cmforge.dataset_digest": shard.value.pixel_digest,
        **{
            f"cmforge.fingerprint.{step.step}": step.fingerprint
            for step in (shard, teacher, trained, evaluate)
        },
        **{f"cmforge.{key}": f"{value:.4f}" for key, value in metrics.items()},
        **{
            f"cmforge.adopted.{stage}": model.value.source
            for stage, model in {"teacher": teacher, **candidates}.items()
            if model.value.source is not None
        },
    }
    if commit := os.environ.get("GIT_COMMIT") or os.environ.get("GITHUB_SHA"):
        lineage["cmforge.git"] = commit

    root = tracking.artifact_root(ctx.workspace)
    run_id = tracking.open_run(
        ctx.tracking_uri,
        ctx.experiment,
        ctx.step,
        ctx.fingerprint,
        root,
        params={"candidate": name, "steps": wanted.steps, "model": wanted.model},
        tags={"cmforge.step": ctx.step},
    )
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory(dir=temporary.root()) as scratch:
            weights = ctx.fetch(trained, "weights.safetensors")
            card = model_card(config, name, evaluate.value, shard.value, description, lineage)
            registered = registry.register_model(
                ctx.tracking_uri,
                experiment=ctx.experiment,
                artifact_root=root,
                run_id=run_id,
                name=wanted.model,
                alias=wanted.alias,
                digest=digest,
                measurement=measurement(score),
                rule=Rule(max_distance=wanted.max_distance, allow_proxy=wanted.allow_proxy),
                package=package(Path(scratch), weights, description, card),
                tags=lineage,
                metrics=metrics,
            )
        shown = [PROTOCOLS, *(score.grid for score in evaluate.value.scores)]
        files = [ctx.fetch(evaluate, file) for file in shown]
        tracking.log_artifacts(ctx.tracking_uri, run_id, files)
        status = "FINISHED"
    finally:
        tracking.finish_run(ctx.tracking_uri, run_id, status)
    return RegisteredModel(
        name=wanted.model,
        version=registered.version,
        alias=wanted.alias if registered.holds_alias else None,
        candidate=name,
        digest=digest,
        metric=score.protocol.name,
        value=score.value,
        outcome=registered.outcome,
        decision=registered.decision,
    )


def lost(tracking_uri: str | None, workspace: str, value: RegisteredModel) -> str | None:
    """Whether the registry still holds what a committed step registered; None when it does."""
    from infra import registry, tracking

    uri = tracking_uri or tracking.default_tracking_uri(workspace)
    if registry.verify_registered(uri, value.name, value.version, value.digest):
        return None
    return f"the registry no longer holds {value.name} version {value.version}"


def best_candidate(evaluation: Evaluation, candidates: tuple[str, ...], steps: int) -> str:
    """The one of lowest distance at `steps`; a distance that is not finite comes last."""

    def rank(name: str) -> tuple[bool, float]:
        value = evaluation.score(name, steps).value
        return not math.isfinite(value), value

    return min(candidates, key=rank)


def artifact_digest(weights_sha256: str, config_json: str) -> str:
    """Identity of the thing registered: its weights and its config, not the attempt."""
    return hashlib.sha256(f"{weights_sha256}\n{config_json}".encode()).hexdigest()


def measurement(score: Score) -> "Measurement":
    """What the gate weighs: the number over its seed blocks, its protocol, and what is beside."""
    from infra.gate import Measurement

    return Measurement(
        name=score.protocol.name,
        unit=score.protocol.features.unit,
        values=score.values,
        protocol=score.protocol.flat(),
        secondary={**score.secondary, "evaluations": float(score.evaluations)},
    )


def package(
    scratch: Path, weights: Path, description: "ModelDescription", card: str
) -> "ModelPackage":
    """What a consumer needs beside mlflow and torch. `weights` is a safetensors file."""
    import torch
    from safetensors.torch import load_file

    import consistency
    from infra.registry import ModelPackage

    assert consistency.__file__ is not None
    (scratch / "config.json").write_text(description.to_json())
    torch.save(load_file(weights), scratch / "weights.pt")  # torch alone reads it
    return ModelPackage(
        code=Path(__file__).parents[1] / "served_model.py",
        packages=(Path(consistency.__file__).parent,),
        artifacts={"weights": scratch / "weights.pt", "config": scratch / "config.json"},
        requirements=REQUIREMENTS,
        inputs={"num_samples": "long"},
        optional_inputs={"image": "string", "mask": "string"},  # of edits, base64
        params={
            "steps": ("long", 1),
            "seed": ("long", 0),
            "class": ("long", -1),
            "output": ("string", "png_base64"),
            "edit": ("string", ""),
            "sigmas": ("string", ""),
            "sigma": ("double", 0.0),
            "factor": ("long", 0),
            "to_seed": ("long", 1),
        },
        card=card,
    )


def about_metric(evaluation: Evaluation) -> str:
    """What the number is, in a sentence or two."""
    features = evaluation.features
    text = (
        f"`{evaluation.metric}` is the Frechet distance of {features.dim} features "
        f"({features.extractor}, weights {features.weights_sha256[:12]}, layer {features.layer})"
    )
    if features.unit:
        text += ", in percent of the total variance of the real images"
    text += "; mean, standard deviation and lowest are over seed blocks."
    if evaluation.metric != "fid":
        text += " It is not FID, and compares with no published one."
    if evaluation.floor is not None:
        text += f" Two halves of the real images are {evaluation.text(evaluation.floor)} apart."
    return text


def model_card(
    config: RegisterStage,
    candidate: str,
    evaluation: Evaluation,
    shard: ShardSet,
    about: "ModelDescription",
    lineage: dict[str, str],
) -> str:
    """Markdown: what the model is, how good, how to load it, where it comes from."""
    name, alias = config.register.model, config.register.alias
    adopted = lineage.get(f"cmforge.adopted.{candidate}")
    made = f"learned from {shard.count:,} images"
    if adopted is not None:
        made = f"not trained here but adopted, measured against {shard.count:,} images"
    conditional = ", ".join(about.class_names) if about.num_classes else "none (unconditional)"
    rows = [
        f"| {s.steps} | {s.evaluations} | {s.samples:,} | {evaluation.text(s.value)} | "
        f"{'' if s.std is None else evaluation.text(s.std)} | {evaluation.text(s.lowest)} | "
        f"{', '.join(f'{level:.4g}' for level in s.levels)} |"
        for s in evaluation.scores
        if s.candidate == candidate
    ]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A few-step generator of {about.size}x{about.size} images with {about.channels} "
            f"channel(s): the {candidate} candidate of the cmforge recipe `{config.recipe}`, "
            f"{made}. Classes: {conditional}.",
            "",
            f"| steps | network calls | samples | {evaluation.metric}, mean | std | lowest | "
            "noise levels (MeanFlow: times) |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *rows,
            "",
            about_metric(evaluation),
            "",
            "```python",
            "import mlflow, pandas as pd",
            f'model = mlflow.pyfunc.load_model("models:/{name}@{alias}")',
            "images = model.predict(",
            '    pd.DataFrame({"num_samples": [16]}),',
            '    params={"steps": 2, "seed": 0, "class": -1, "output": "uint8"},',
            ")  # uint8 [16, H, W, C]; output png_base64 gives a table",
            "```",
            "",
            "Edits of images (inpaint, colorize, superres, stroke, denoise), and interpolation: "
            'the parameter `edit`, images in base64 in the column `image`, and `"steps": 8`.',
            "",
            "MLflow ignores a parameter whose name it does not know, with a warning.",
            "",
            *(f"- {key}: `{value}`" for key, value in sorted(lineage.items())),
            "",
        ]
    )
