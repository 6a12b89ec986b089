"""`cmforge compare A B`: two models under one protocol, same noise, side by side."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import gate, storage
from infra.errors import UserError
from pipelines import png, sample
from pipelines.scoring import Job, Measured, Subject, in_process, measure_all
from pipelines.yardstick import Yardstick

if TYPE_CHECKING:
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
    with tempfile.TemporaryDirectory(prefix="cmforge-compare-") as scratch:
        subjects = [
            _subject(name, recipe, workspace, tracking_uri, Path(scratch) / str(number))
            for number, name in enumerate(names)
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
    unit = yardstick.reference.protocol.unit
    print(f"A  {names[0]}\nB  {names[1]}\n")
    for row in range(0, len(jobs), 2):
        steps, name = jobs[row].protocol.steps, jobs[row].protocol.name
        print(f"{name}, {steps} step{'s' if steps > 1 else ''}")
        a, b = (
            _measurement(job, one)
            for job, one in zip(jobs[row : row + 2], found[row:], strict=False)
        )
        for letter, one, measured in (("A", a, found[row]), ("B", b, found[row + 1])):
            agreement = measured.agreement
            right = "" if agreement is None else f"   {100 * agreement:.1f} % in the right class"
            print(f"  {letter}  {gate.summary(one)}{right}")
        print(f"  {gate.verdict(a, b, 'A', 'B')}\n")
    sheet = _sheet(found)
    with storage.mendable(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png.encode_png(sheet))
    print(f"protocols {', '.join(dict.fromkeys(job.protocol.digest for job in jobs))}")
    print(f"samples   {out.resolve()} (same noise down each column: A, B in one step; A, B in two)")
    if yardstick.reference.protocol.metric != "fid":
        print(f"{yardstick.reference.protocol.metric} {unit and f'(in {unit}) '}is not FID")


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
    shapes = {row.shape[1:] for row in rows}
    if len(shapes) > 1:
        raise UserError(f"compare: the models draw images of different shapes, {sorted(shapes)}")
    scale = png.tile_scale(int(rows[0].shape[1]))
    return png.grid(np.concatenate(rows), len(rows[0]), scale=scale)


def _subject(
    name: str, recipe: "Recipe", workspace: str, tracking_uri: str, scratch: Path
) -> Subject:
    """A model as the evaluation wants it: weights by URL and hash, levels as the recipe's."""
    from consistency.published import ModelDescription

    scratch.mkdir()
    if name.startswith("models:"):
        folder, about = _downloaded(name, tracking_uri, scratch)
    else:
        folder, _ = sample.folder_of(name, workspace)
        about = replace(
            ModelDescription.from_json((folder / "config.json").read_text()),
            mid_sigma=recipe.evaluate.mid_sigma,
        )
    weights = folder / "weights.safetensors"
    return Subject(
        name=name,
        description=about.to_json(),
        weights_url=str(weights),
        weights_sha256=storage.sha256(str(weights)),
    )


def _downloaded(name: str, tracking_uri: str, scratch: Path) -> tuple[Path, Any]:
    """A registered model's weights as safetensors; its description is how it is served."""
    import torch
    from safetensors.torch import save_file

    from consistency.published import ModelDescription
    from infra import tracking

    folder = tracking.download_model(tracking_uri, name, scratch)
    with contextlib.suppress(FileNotFoundError):
        about = ModelDescription.from_json((folder / "artifacts" / "config.json").read_text())
        weights = torch.load(folder / "artifacts" / "weights.pt", weights_only=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, scratch / "weights.safetensors")
        return scratch, about
    raise UserError(f"{name} is not a model that cmforge registered")
