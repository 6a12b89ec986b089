"""`model.json`: what a model's folder holds and where it came from, written last.

    format   1
    source   layout, name, bytes, sha256 of what was imported
    files    bytes and sha256 of weights.safetensors and of config.json, by name

A folder that has one is checked against it before anything in it is used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from consistency.published import ModelDescription

NAME = "model.json"
FORMAT = 1
FILES = ("weights.safetensors", "config.json")
_NOT_ONE = "not a model's record; import the model again"


@dataclass(frozen=True)
class Source:
    """What a model was made from: its layout, its name without the folder, and its bytes."""

    layout: str  # openai, edm, diffusers, cmforge
    name: str
    bytes: int
    sha256: str


def write_files(
    folder: Path, description: "ModelDescription", weights: "Mapping[str, Tensor]"
) -> list[storage.FileRecord]:
    """The two files, in a local folder; what a record says of them."""
    from safetensors.torch import save  # its save_file leaves files that only their owner may read

    data = save({name: tensor.contiguous() for name, tensor in weights.items()})
    (folder / FILES[0]).write_bytes(data)
    (folder / FILES[1]).write_text(description.to_json())
    return storage.describe_dir(str(folder))


def compose(source: Source, files: Sequence[storage.FileRecord]) -> bytes:
    """The record's text."""
    listed = {file.path: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
    record = {"format": FORMAT, "source": asdict(source), "files": listed}
    return json.dumps(record, indent=1, sort_keys=True).encode()


def source_of(text: bytes, where: str) -> Source:
    """What a record says the model was made from. UserError where it does not."""
    try:
        source = json.loads(text)["source"]
        layout, name, sha256 = (str(source[key]) for key in ("layout", "name", "sha256"))
        return Source(layout, name, int(source["bytes"]), sha256)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: {_NOT_ONE}") from error


def files_of(text: bytes, where: str) -> list[storage.FileRecord]:
    """The files that a record lists. UserError for what is no record of these two files."""
    try:
        record: Any = json.loads(text)
        if record["format"] != FORMAT:
            raise UserError(f"{where}: format {record['format']!r}; this cmforge reads {FORMAT}")
        files = [
            storage.FileRecord(name, int(file["bytes"]), str(file["sha256"]))
            for name, file in sorted(record["files"].items())
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: {_NOT_ONE}") from error
    if [file.path for file in files] != sorted(FILES):
        raise UserError(f"{where}: lists other files than {' and '.join(FILES)}; refused")
    return files


def verify(folder: str) -> None:
    """Checks a folder against its record, if it has one. UserError for a file that differs."""
    where = storage.join(folder, NAME)
    try:
        text = storage.read_bytes(where)
    except FileNotFoundError:
        return
    storage.verify(folder, files_of(text, where))
