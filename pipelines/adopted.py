"""A model from outside, as its files describe it: looked at before anything is copied.

Of our own model folders that takes `config.json` and the record `model.json`, and no torch. A
folder without a record costs a hash of its weights; a foreign file is read whole (`importing`).
"""

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from consistency.config import NetworkConfig, NoiseConfig
from infra import storage
from infra.errors import UserError
from infra.tracking import without_secrets
from pipelines import model_record, weights
from pipelines.strict_yaml import Mark, Node, build

(WEIGHTS, CONFIG), RECORD = model_record.FILES, model_record.NAME
LARGEST = 1_000_000  # bytes of a description or a record
LONGEST_SOURCE = 200  # characters


@dataclass(frozen=True, kw_only=True)
class Description:
    """Those parts of a ModelDescription that decide about a graph."""

    kind: Literal["denoiser", "consistency", "mean_flow"]
    network: NetworkConfig
    noise: NoiseConfig
    size: int
    channels: int
    class_names: tuple[str, ...]
    boundary: float = 0.002  # sigma at which f is the identity


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """A model that a recipe names: where it lies, and what it is."""

    place: str  # folder, file or URL
    foreign: bool  # one file of another project
    sha256: str  # of the file that holds the weights
    description: str  # the whole ModelDescription as JSON, in one form
    source: str  # where it is from, for people
    about: Description


def look(key: str, place: str, kinds: Sequence[str]) -> Adopted:
    """The model at a place, which must be of one of the kinds. UserError begins with the key."""
    if place.startswith("models:"):
        raise UserError(
            f"{key}: {place} is a registered model; write it to a folder with "
            f"cmforge export {place} --format safetensors --out DIR, and name DIR"
        )
    own = storage.join(place, WEIGHTS)
    if storage.exists(own):
        foreign, (text, sha256, source) = False, _own(key, place)
    elif not storage.exists(place):
        raise UserError(f"{key}: {place} does not exist; check the spelling or mount it")
    elif storage.is_local(place) and Path(storage.absolute(place)).is_dir():
        raise UserError(
            f"{key}: {place} has no {WEIGHTS}; if it is another project's model: "
            f"cmforge import {place} --out DIR, and name DIR"
        )
    else:
        foreign, sha256, source = True, _sha256(place), _name(place)
        text = _foreign(key, place, sha256)
    about = _described(key, place, text)
    if about.kind not in kinds:
        raise UserError(
            f"{key}: {place} is a {about.kind} model, and {key.partition('.')[0]} must be "
            f"{' or '.join(kinds)}"
        )
    return Adopted(
        place=place,
        foreign=foreign,
        sha256=sha256,
        description=json.dumps(json.loads(text), sort_keys=True),
        source=source,
        about=about,
    )


def check_fit(
    key: str, model: Adopted, size: int, channels: int, class_names: Sequence[str] | None
) -> None:
    """UserError unless the model draws such images, of these classes (None: not known yet)."""
    about = model.about
    if about.size != size:
        raise UserError(
            f"{key}: {model.place} draws images of {about.size} pixels, the data have {size}; "
            f"set data.size={about.size}, or name another model"
        )
    if about.channels != channels:
        raise UserError(
            f"{key}: {model.place} draws images of {about.channels} channels, the data have "
            f"{channels} (grey is 1, colour 3); name another model, or other data"
        )
    if class_names is None or not about.network.class_conditional:
        return
    own, its = tuple(class_names), about.class_names
    if len(own) != len(its):
        raise UserError(
            f"{key}: {model.place} knows {len(its)} classes, the data have {len(own)}; name "
            f"another model, or other data"
        )
    if own != its and set(own) == set(its):
        raise UserError(
            f"{key}: {model.place} has the data's classes in another order ({', '.join(its[:3])}, "
            f"... and {', '.join(own[:3])}, ...); label the data as it was trained"
        )


# --- reading -------------------------------------------------------------------------------------


def _own(key: str, folder: str) -> tuple[str, str, str]:
    """(config.json, sha256 of the weights, where it is from) of a model folder of ours."""
    text = _small(key, folder, CONFIG)
    if text is None:
        raise UserError(f"{key}: {folder} is not a whole model: {CONFIG} is not there")
    said = _small(key, folder, RECORD)
    if said is None:
        return text, _sha256(storage.join(folder, WEIGHTS)), _name(folder)
    where = storage.join(folder, RECORD)
    try:
        files = model_record.files_of(said.encode(), where)
        source = _said(model_record.source_of(said.encode(), where))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    (file,) = (file for file in files if file.path == WEIGHTS)
    if storage.size(storage.join(folder, WEIGHTS)) != file.bytes:
        raise UserError(
            f"{key}: {folder}/{WEIGHTS} has not the {file.bytes:,} bytes that {RECORD} says; "
            f"import the model again"
        )
    return text, file.sha256, source


def _small(key: str, folder: str, name: str) -> str | None:
    """A JSON file's text; None when it is not there."""
    url = storage.join(folder, name)
    try:
        if storage.size(url) > LARGEST:
            raise UserError(f"{key}: {url} is larger than {LARGEST:,} bytes, no file of ours")
        return storage.read_bytes(url).decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {url} is not UTF-8 text, no file of ours") from None


@cache
def _foreign(key: str, place: str, sha256: str) -> str:
    """The description of another project's file, whose content is `sha256`."""
    from pipelines import importing

    try:
        return importing.read(place).description.to_json()
    except UserError as error:
        raise UserError(
            f"{key}: {error}; or cmforge import {place} --out DIR, and name DIR"
        ) from error


def _described(key: str, place: str, text: str) -> Description:
    """What the graph needs of a ModelDescription, as strictly read as a recipe."""
    mark = Mark(0, f"{key}: {place}/{CONFIG}", 0, 0)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{mark}: not valid JSON: {error}") from None
    root = _node(raw, mark)
    wanted = {field.name for field in fields(Description)}
    if isinstance(root.value, dict):
        root = replace(root, value={k: v for k, v in root.value.items() if k in wanted})
    return build(Description, root, [])


def _node(value: Any, mark: Mark) -> Node:
    """JSON as what YAML is read into."""
    plain = not isinstance(value, str)
    if isinstance(value, dict):
        value = {key: _node(item, mark) for key, item in value.items()}
    elif isinstance(value, list):
        value = [_node(item, mark) for item in value]
    elif plain:
        value = json.dumps(value)
    return Node(value, mark, mark, plain)


def _sha256(url: str) -> str:
    if storage.is_local(url):
        return weights.sha256_of(Path(storage.absolute(url)))
    return storage.sha256(url)


# --- saying --------------------------------------------------------------------------------------


def _name(place: str) -> str:
    """A URL without secrets, or a local path's last name: reports are passed around."""
    if "://" not in place or place.startswith("file://"):
        return posixpath.basename(place.rstrip("/")) or "/"
    return without_secrets(place).partition("?")[0]


def _said(source: model_record.Source) -> str:
    """A record's word on what was imported, as one short line."""
    text = f"{_name(source.name)} ({source.layout}, sha256 {source.sha256[:12]})"
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST_SOURCE]
