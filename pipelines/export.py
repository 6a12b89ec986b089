"""`cmforge export`: a model for other people's programs.

    safetensors  a model folder of ours: weights.safetensors, config.json, and model.json at last
    diffusers    a folder for ConsistencyModelPipeline
    onnx, pt2    one file that needs nothing of cmforge

What is written is whole or not there, and never written over something else.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infra import storage, temporary
from infra.errors import UserError
from pipelines import model_record, models

if TYPE_CHECKING:
    from torch import Tensor

    from consistency.published import ModelDescription

FORMATS = ("safetensors", "diffusers", "onnx", "pt2")
RECORDS = ("model.json", "model_index.json")  # without one a folder is not a model: comes last


def export(
    name: str | None, workspace: str, tracking_uri: str, *, format: str, out: str
) -> list[str]:
    """Write a model to a path or URL; returns lines that load it. Raises UserError."""
    from safetensors.torch import load_file

    with (
        models.located(name, workspace, tracking_uri) as (folder, description),
        _beside(out) as scratch,
    ):
        weights = load_file(folder / "weights.safetensors")
        made = scratch / "made"
        made.mkdir()
        shown = _write(made, description, weights, format=format, out=out, source=name)
        (publish_file if format in ("onnx", "pt2") else publish_folder)(made, out)
    return shown


def _write(
    made: Path,
    description: "ModelDescription",
    weights: "Mapping[str, Tensor]",
    *,
    format: str,
    out: str,
    source: str | None,
) -> list[str]:
    """Everything of one format, below `made`."""
    if format == "diffusers":
        from pipelines import diffusers_folder

        custom = diffusers_folder.write_folder(made, description, weights)
        return diffusers_folder.how_to_load(out, description, custom=custom)
    if format == "safetensors":
        write_model(made, description, weights, _called(source))
        if not storage.is_local(out):
            return [f"cmforge sample {out}"]
        return [
            "from pathlib import Path",
            "from consistency import published",
            f'images = published.load(Path("{out}")).generate(range(16), steps=1, seed=0)',
        ]
    from consistency import published
    from pipelines import programs

    model = published.build(description, weights)
    file = made / Path(out).name
    names = programs.input_names(description)
    if format == "pt2":
        programs.write_pt2(model, file)
        given = ", ".join(f"{name}={name}" for name in names)
        return ["import torch", f'f = torch.export.load("{out}").module()', f"y = f({given})"]
    programs.write_onnx(model, file)
    given = ", ".join(f'"{name}": {name}' for name in names)
    session = f'f = onnxruntime.InferenceSession("{out}")'
    return ["import onnxruntime", session, f"(y,) = f.run(None, {{{given}}})"]


def _called(name: str | None) -> str:
    """A model's name for others, who know nothing of our folders."""
    if name is None:
        return "the model registered last"
    return name if name.startswith("models:") else name.rstrip("/").rpartition("/")[2]


def write_model(
    folder: Path,
    description: "ModelDescription",
    weights: "Mapping[str, Tensor]",
    name: str,
) -> None:
    """A model folder of ours with its record, which says that it was called `name`."""
    files = model_record.write_files(folder, description, weights)
    (own,) = (file for file in files if file.path == "weights.safetensors")
    source = model_record.Source("cmforge", name, own.bytes, own.sha256)
    (folder / model_record.NAME).write_bytes(model_record.compose(source, files))


# --- where it goes ----------------------------------------------------------------------------


@contextmanager
def _beside(out: str) -> Iterator[Path]:
    """A folder to write in; on the same disk as a local `out`, so that a rename is enough."""
    home = str(temporary.root())
    if storage.is_local(out):
        home = os.path.dirname(storage.absolute(out))
        with storage.mendable(out, "--out"):
            os.makedirs(home, exist_ok=True)
    with (
        storage.mendable(out, "--out"),
        tempfile.TemporaryDirectory(prefix=storage.TEMP_PREFIX, dir=home) as scratch,
    ):
        yield Path(scratch)


def publish_file(made: Path, out: str) -> None:
    """The file of `made` that is called like `out`, after those that belong beside it."""
    home, name = os.path.split(storage.absolute(out) if storage.is_local(out) else out)
    if storage.is_local(out) and os.path.isdir(storage.absolute(out)):
        raise UserError(f"--out {out}: a folder is there; give the path of a file")
    _upload(made, home, name, out)


def publish_folder(made: Path, out: str) -> None:
    """All files of `made` as the folder `out`, the record last."""
    (last,) = (name for name in RECORDS if (made / name).exists())
    found = [path for path, _ in storage.list_files(out)]
    strangers = [path for path in found if not (made / path).is_file()]
    if strangers or (storage.is_local(out) and os.path.isfile(storage.absolute(out))):
        raise _taken(out, strangers[0] if strangers else out)
    if found or not storage.is_local(out):
        _upload(made, out, last, out)
    else:
        target = storage.absolute(out)
        if os.path.isdir(target):  # empty
            os.rmdir(target)
        os.rename(made, target)


def _upload(made: Path, home: str, last: str, out: str) -> None:
    """What is not there yet; UserError, before anything is written, for a file that differs."""
    missing = []
    for record in sorted(storage.describe_dir(str(made)), key=lambda record: record.path == last):
        target = storage.join(home, record.path)
        if not storage.exists(target):
            missing.append(record.path)
        elif storage.size(target) != record.bytes or storage.sha256(target) != record.sha256:
            raise _taken(out, target)
    for path in missing:
        storage.upload_file(str(made / path), storage.join(home, path))


def _taken(out: str, what: str) -> UserError:
    return UserError(f"--out {out}: {what} is there and not of this export; give another path")
