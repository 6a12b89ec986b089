"""`model.json`: what an imported model's folder holds and where it came from, written last.

    format   1
    source   layout, name, bytes, sha256 of what was imported
    files    path, bytes, sha256 of weights.safetensors and config.json

A folder that has one is checked against it before anything in it is used.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra import storage
from infra.errors import UserError

NAME = "model.json"
FORMAT = 1
FILES = ("weights.safetensors", "config.json")


@dataclass(frozen=True)
class Source:
    """What was imported: its layout, its name without the folder, and its bytes."""

    layout: str  # openai, edm, diffusers, cmforge
    name: str
    bytes: int
    sha256: str


def compose(source: Source, files: Sequence[storage.FileRecord]) -> bytes:
    """The record's text."""
    record = {"format": FORMAT, "source": asdict(source), "files": [asdict(f) for f in files]}
    return json.dumps(record, indent=1, sort_keys=True).encode()


def files_of(text: bytes, where: str) -> list[storage.FileRecord]:
    """The files that a record lists. UserError for what is no record of these two files."""
    try:
        record: Any = json.loads(text)
        if record["format"] != FORMAT:
            raise UserError(f"{where}: format {record['format']!r}; this cmforge reads {FORMAT}")
        files = [storage.FileRecord(**file) for file in record["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a model's record; import the model again") from error
    if sorted(str(file.path) for file in files) != sorted(FILES):
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
