"""`cmforge import`: a model of this or another project, from anywhere, as a model folder of ours.

What can be read: state dicts of OpenAI's networks (.pt, .safetensors), NVlabs EDM's pickled
networks and state dicts, folders of diffusers' consistency models, model folders and committed
results of our own, from any path or fsspec URL. The files are not trusted; see `foreign_file` for
how they are read.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra import storage, temporary
from infra.errors import UserError
from pipelines import foreign_file, model_record
from pipelines.model_record import FILES, Source

if TYPE_CHECKING:
    from torch import Tensor

    from consistency.published import ModelDescription

Kind = Literal["denoiser", "consistency"]

SUFFIXES = (".pt", ".pth", ".pkl", ".bin", ".ckpt", ".safetensors")
MOST_CONFIG = 1 << 20  # bytes
_TENSORS = ".safetensors"
_THEIR_ENDS = ("safetensors", "safetensors.index.json", "bin")  # the last is refused by name


@dataclass(frozen=True)
class Imported:
    """A model in our terms, its weights in memory or mapped, and where it came from."""

    description: "ModelDescription"
    weights: "dict[str, Tensor]"
    source: Source


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a file may not tell: see `read`."""

    kind: Kind | None = None
    size: int | None = None
    head_channels: int | None = None
    classes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, number in (("--size", self.size), ("--head-channels", self.head_channels)):
            if number is not None and number < 1:
                raise UserError(f"{name}: {number} must be at least 1")


def read(
    source: str,
    *,
    kind: Kind | None = None,
    size: int | None = None,
    head_channels: int | None = None,
    classes: Sequence[str] | None = None,
) -> Imported:
    """The model at a path or URL. Raises UserError for what is none, or is not understood.

    kind           what the network was trained as, where neither the file nor its name says so
    size           side of its images, where the tensors do not tell (OpenAI's other layouts)
    head_channels  width of its attention heads, likewise (64 in all files OpenAI published)
    classes        names of its classes; numbers unless given
    """
    options = Options(kind=kind, size=size, head_channels=head_channels, classes=classes)
    where = storage.absolute(source)
    with tempfile.TemporaryDirectory(dir=temporary.root()) as scratch, _told(source):
        if not is_file(where):
            return _from_folder(where, Path(scratch), options)
        return _from_file(_here(where, Path(scratch)), Path(scratch), options)


def is_file(source: str) -> bool:
    """Whether a name stands for one file: it is one, or a URL that ends like one."""
    if storage.is_local(source):
        return os.path.isfile(storage.absolute(source))
    return source.endswith(SUFFIXES)


def write(imported: Imported, out: str) -> str:
    """A model folder at a path or URL; returns it. The record `model.json` is written last.

    The same model again changes nothing. UserError where a different one is.
    """
    out = storage.absolute(out)
    with tempfile.TemporaryDirectory(dir=temporary.root()) as folder:
        files = model_record.write_files(Path(folder), imported.description, imported.weights)
        for file in files:
            _refuse_another(storage.join(out, file.path), file)
        for name in FILES:
            if not storage.exists(storage.join(out, name)):
                storage.upload_file(os.path.join(folder, name), storage.join(out, name))
    where = storage.join(out, model_record.NAME)
    if not storage.put_if_absent(where, model_record.compose(imported.source, files)):
        stands = model_record.files_of(storage.read_bytes(where), where)
        if sorted(stands, key=lambda f: f.path) != files:
            raise UserError(f"{out}: {_ANOTHER}")
    return out


_ANOTHER = "another model is there; give another --out, or delete it"


def _refuse_another(url: str, file: storage.FileRecord) -> None:
    if not storage.exists(url):
        return
    if storage.size(url) != file.bytes or storage.sha256(url) != file.sha256:
        raise UserError(f"{url}: {_ANOTHER}")


@contextmanager
def _told(source: str) -> Iterator[None]:
    """ValueErrors of the pure mappings, as one line that names the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


# --- files of other projects ---------------------------------------------------------------------


def _here(where: str, scratch: Path) -> Path:
    """The file itself, or a copy of one that lies in a store."""
    if storage.is_local(where):
        return Path(where)
    try:
        size = storage.size(where)
        if size > foreign_file.MOST_BYTES:
            raise UserError(f"{where}: {size:,} bytes are too many; refused")
        local = scratch / where.rsplit("/", 1)[1]
        storage.download_file(where, str(local))
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    return local


def _from_file(path: Path, scratch: Path, options: Options) -> Imported:
    from consistency.foreign import edm, openai
    from consistency.foreign.fit import listed

    left = scratch / "left"
    left.mkdir()
    found = foreign_file.read(path, left)
    keys = list(found.tensors)
    if found.modules or edm.recognises(keys):
        layout = "edm"
        description, weights = _from_edm(found, path.name, options)
    elif openai.recognises(keys):
        layout = "openai"
        kind = _kind(options.kind, None, openai.kind_of(path.name))
        description, weights = openai.from_openai(
            found.tensors,
            kind=kind,
            size=options.size,
            head_channels=options.head_channels or openai.HEAD_CHANNELS,
            class_names=options.classes,
        )
        description = replace(description, mid_sigma=openai.mid_sigma_of(path.name))
    elif edm.is_edm2(keys):
        raise UserError(f"{path}: EDM2's magnitude-preserving network; none of ours computes that")
    else:
        raise UserError(f"{path}: tensors of no layout that is known here: {listed(sorted(keys))}")
    source = Source(layout, path.name, path.stat().st_size, storage.sha256(str(path)))
    return Imported(description, weights, source)


def _from_edm(found: foreign_file.Found, name: str, options: Options) -> Any:
    from consistency.foreign import edm

    built = {m["at"]: edm.Constructed(m["name"], m["args"], m["kwargs"]) for m in found.modules}
    wrapper, network = built.get(""), built.get("model")
    if wrapper is not None:
        edm.refuse_others(wrapper)
        if edm.kind_of(wrapper) is None:  # a network that nothing wraps
            wrapper, network = None, wrapper
    if options.head_channels is not None:
        raise UserError("--head-channels: EDM's networks have their own; leave it out")
    by_name: Kind | None = "denoiser" if name.startswith("edm") else None
    description, weights = edm.from_edm(
        found.tensors,
        kind=_kind(options.kind, edm.kind_of(wrapper), by_name),
        wrapper=wrapper,
        network=network,
        class_names=options.classes,
    )
    if options.size not in (None, description.size):
        raise UserError(f"--size: {options.size}, but the file says {description.size}")
    return description, weights


def _kind(asked: Kind | None, stored: Kind | None, named: Kind | None) -> Kind:
    """What the file says; else what was asked; else what the file's name says."""
    if stored is not None and asked not in (None, stored):
        raise UserError(f"--kind: {asked}, but the file holds a {stored}")
    kind = stored or asked or named
    if kind is None:
        raise UserError("--kind: the file does not say it; give denoiser or consistency")
    return kind


# --- folders -------------------------------------------------------------------------------------


def _from_folder(folder: str, scratch: Path, options: Options) -> Imported:
    if is_diffusers(folder):
        return _from_diffusers(folder, scratch, options)
    folder, records = _committed(folder)
    if not all(storage.exists(storage.join(folder, name)) for name in FILES):
        raise UserError(
            f"{folder}: no such model: no file, and no folder with {' and '.join(FILES)}"
        )
    if options.size is not None or options.head_channels is not None:
        raise UserError(f"{folder}: a model of ours knows its size and heads; leave them out")
    storage.verify(folder, records)
    local = fetched(folder, scratch)
    weights_file = local / FILES[0]
    source = Source(
        "cmforge", FILES[0], weights_file.stat().st_size, storage.sha256(str(weights_file))
    )
    return _own(local, source, options)


def is_diffusers(folder: str) -> bool:
    """Whether diffusers made it: a pipeline's folder, or that of its network alone."""
    names = ("model_index.json", *(f"diffusion_pytorch_model.{end}" for end in _THEIR_ENDS))
    return any(storage.exists(storage.join(folder, name)) for name in names)


def _from_diffusers(folder: str, scratch: Path, options: Options) -> Imported:
    from consistency.foreign.openai import named_classes
    from pipelines import diffusers_folder

    if options.size is not None or options.head_channels is not None:
        raise UserError(f"{folder}: its configuration says size and heads; leave them out")
    if options.kind not in (None, "consistency"):
        raise UserError(f"--kind: {options.kind}, but the folder holds a consistency model")
    local = _diffusers_here(folder, scratch)
    description, weights = diffusers_folder.read_folder(local)
    if options.classes is not None:
        names = named_classes(len(description.class_names), options.classes)
        description = replace(description, class_names=names)
    files = [file for file in storage.describe_dir(str(local)) if file.path.endswith(_TENSORS)]
    digests = "\n".join(file.sha256 for file in files)
    sha256 = digests if len(files) == 1 else hashlib.sha256(digests.encode()).hexdigest()
    name = folder.rstrip("/").rpartition("/")[2]
    source = Source("diffusers", name, sum(file.bytes for file in files), sha256)
    return Imported(description, weights, source)


def _diffusers_here(folder: str, scratch: Path) -> Path:
    """The folder itself, or a copy of what can be read of one that lies in a store."""
    if storage.is_local(folder):
        return Path(storage.absolute(folder))
    files = [f for f in storage.list_files(folder) if f[0].endswith((_TENSORS, ".json"))]
    if (size := sum(size for _, size in files)) > foreign_file.MOST_BYTES:
        raise UserError(f"{folder}: {size:,} bytes are too many; refused")
    for path, _ in files:
        if ".." in path.split("/"):
            raise UserError(f"{folder}: holds {path!r}; refused")
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        storage.download_file(storage.join(folder, path), str(scratch / path))
    return scratch


def _committed(folder: str) -> tuple[str, list[storage.FileRecord]]:
    """The folder itself; of a committed step, the attempt's folder and what its record lists."""
    from pipelines import dag

    if not storage.exists(storage.join(folder, "COMMIT.json")):
        return folder, []
    record = dag.read_record(folder)
    files = [storage.FileRecord(**f) for f in record["files"] if f["path"] in FILES]
    attempt = str(record["attempt"])
    if "/" in attempt or attempt.startswith("."):
        raise UserError(f"{folder}: its record names the attempt {attempt!r}; refused")
    return storage.join(folder, "attempts", attempt), files


def fetched(folder: str, scratch: Path) -> Path:
    """A model folder of any store, here and checked against its record where it has one."""
    if storage.is_local(folder):
        model_record.verify(folder)
        return Path(storage.absolute(folder))
    for name in (model_record.NAME, *FILES):
        if storage.exists(storage.join(folder, name)):
            storage.download_file(storage.join(folder, name), str(scratch / name))
    model_record.verify(str(scratch))
    return scratch


def _own(folder: Path, source: Source, options: Options) -> Imported:
    """A model folder of ours; its tensors must be exactly those of its description."""
    from consistency.foreign.fit import require_fit, shapes_of
    from consistency.foreign.openai import named_classes
    from consistency.published import ModelDescription

    config = folder / FILES[1]
    if config.stat().st_size > MOST_CONFIG:
        raise UserError(f"{config}: longer than any description; refused")
    description = ModelDescription.from_json(config.read_text())
    if options.kind not in (None, description.kind):
        raise UserError(f"--kind: {options.kind}, but the folder holds a {description.kind}")
    if options.classes is not None:
        names = named_classes(len(description.class_names), options.classes)
        description = replace(description, class_names=names)
    weights = foreign_file.read_safetensors(folder / FILES[0])
    try:
        expected = shapes_of(description)
    except RuntimeError as error:  # torch's own limits: a description that was never a model's
        raise UserError(f"{config}: no such network can be: {error}") from error
    require_fit(weights, expected)
    return Imported(description, weights, source)


# --- the command's words -------------------------------------------------------------------------


def class_names(text: str) -> list[str]:
    """`a,b,c`, or a file with a name a line or a JSON list of names. Raises UserError."""
    path = Path(storage.absolute(text))
    if not path.is_file():
        return text.split(",")
    lines = path.read_text()
    if not lines.lstrip().startswith("["):
        return [line.strip() for line in lines.splitlines() if line.strip()]
    try:
        names = json.loads(lines)
    except ValueError as error:
        raise UserError(f"--classes: {text}: {error}") from error
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"--classes: {text}: not a list of names")
    return list(names)


def summary(imported: Imported) -> list[str]:
    """What was found, a line each."""
    about = imported.description
    parameters = sum(tensor.numel() for tensor in imported.weights.values())
    noise = {
        "log_sigma": "ln(sigma) / 4",
        "log_sigma_1000": "1000 ln(sigma) / 4",
        "angle": "atan(sigma / sigma_data)",
    }
    return [
        f"layout      {imported.source.layout}, sha256 {imported.source.sha256[:16]}",
        f"network     {about.network.architecture}, {parameters:,} parameters",
        f"images      {about.size}x{about.size}, {about.channels} channels",
        f"kind        {about.kind}",
        f"classes     {about.num_classes or 'none'}",
        f"noise       the network is told {noise[about.noise.c_noise]}",
    ]
