"""`cmforge compare A B`: two models under one protocol, same noise, side by side."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from infra import gate, storage, temporary
from infra.errors import UserError
from pipelines import models, png
from pipelines.scoring import Job, Measured, Subject, in_process, measure_all
from pipelines.yardstick import Yardstick

if TYPE_CHECKING:
    from consistency.published import ModelDescription
    from pipelines.recipe import Recipe

COLUMNS = 10


def show(
    names: Sequence[str],
    recipe: "Recipe",
    yardstick: Yardstick,
    *,
    workspace: str,
    tracking_uri: str,
    samples: int | None,
    out: Path,
) -> None:
    """Print both models' numbers and write a sheet of their samples. Raises UserError.

    names: models:/NAME@ALIAS, a model folder, or a step of the workspace, two of them. They are
    measured as the recipe's evaluation would, on this machine.
    """
    config = recipe.evaluate
    with (
        tempfile.TemporaryDirectory(dir=temporary.root()) as scratch,
        contextlib.ExitStack() as opened,
    ):
        subjects = [
            _subject(
                name,
                *opened.enter_context(models.located(name, workspace, tracking_uri)),
                recipe,
                yardstick,
            )
            for name in names
        ]
        jobs = [
            Job(
                subject=subject,
                protocol=yardstick.protocol(
                    samples=samples or config.samples,
                    seed_blocks=config.seed_blocks,
                    seed=config.seed,
                    steps=steps,
                    allow_rank_deficient=config.allow_rank_deficient,
                ),
            )
            for steps in (1, 2)
            for subject in subjects
        ]
        found = measure_all(
            yardstick,
            jobs,
            in_process,
            work=scratch,
            save_every=float("inf"),
            threads=os.cpu_count() or 1,
        )
    print(f"A  {names[0]}\nB  {names[1]}\n")
    for row in range(0, len(jobs), 2):
        _print_pair(jobs[row : row + 2], found[row : row + 2])
    with storage.mendable(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png.encode_png(_sheet(found)))
    print(f"samples   {out.resolve()} (rows A, B in one step, A, B in two; one noise per column)")
    print(f"protocols {', '.join(dict.fromkeys(job.protocol.digest for job in jobs))}")
    if jobs[0].protocol.features.metric != "fid":
        print(f"{jobs[0].protocol.features.metric} is not FID")


def _print_pair(jobs: Sequence[Job], found: Sequence[Measured]) -> None:
    """Both numbers, and whether they differ by more than their spread."""
    (job, _), (a, b) = jobs, found
    steps = job.protocol.steps
    print(f"{job.protocol.name}, {steps} step{'s' if steps > 1 else ''}")
    one, other = _measurement(job, a), _measurement(job, b)
    for letter, measured, asked in zip("AB", found, jobs, strict=True):
        told = one.text(mean(measured.values))
        if len(measured.values) > 1:
            told += (
                f" ± {one.text(stdev(measured.values))}, lowest {one.text(min(measured.values))}"
            )
        if measured.agreement is not None:
            told += f", {100 * measured.agreement:.1f} % in the right class"
        if steps > 1:
            told += _levels(asked)
        print(f"  {letter}  {told}")
    gap, margin = mean(a.values) - mean(b.values), gate.margin_of(one, other)
    if abs(gap) <= margin:
        print(f"  apart by {one.text(abs(gap))}, within the margin of {one.text(margin)}\n")
    else:
        lower = "A" if gap < 0 else "B"
        print(
            f"  {lower} is lower by {one.text(abs(gap))}, more than the margin of "
            f"{one.text(margin)}\n"
        )


def _levels(job: Job) -> str:
    """Where the samples passed through: two models may differ in that alone."""
    from consistency.published import ModelDescription

    levels = ModelDescription.from_json(job.subject.description).levels(job.protocol.steps)
    return f", levels {', '.join(f'{level:.4g}' for level in levels)}" if levels else ""


def _measurement(job: Job, measured: Measured) -> gate.Measurement:
    return gate.Measurement(
        name=job.protocol.name,
        unit=job.protocol.features.unit,
        values=measured.values,
        protocol=job.protocol.flat(),
        secondary={},
    )


def _sheet(found: Sequence[Measured]) -> Any:
    """Rows: A and B in one step, A and B in two; as many columns as fit."""
    import numpy as np

    rows = [measured.sheet[:COLUMNS] for measured in found]
    scale = png.tile_scale(int(rows[0].shape[1]))
    return png.grid(np.concatenate(rows), len(rows[0]), scale=scale)


def _subject(
    name: str, folder: Path, about: "ModelDescription", recipe: "Recipe", yardstick: Yardstick
) -> Subject:
    """A model as the evaluation wants it: weights by URL and hash, levels as the recipe's."""
    if not name.startswith("models:"):  # a registered one is measured as it is served
        about = replace(about, mid_sigma=recipe.evaluate.mid_sigma)
    network = yardstick.network
    mine, theirs = (about.size, about.channels), (network.size, network.channels)
    if mine != theirs:
        raise UserError(
            f"{name} draws images of {mine[0]} pixels and {mine[1]} channels, the workspace's data "
            f"have {theirs[0]} and {theirs[1]}; compare it in a workspace of its own data"
        )
    weights = folder / "weights.safetensors"
    return Subject(
        name=name,
        description=about.to_json(),
        weights_url=str(weights),
        weights_sha256=storage.sha256(str(weights)),
    )
