"""Where the weights of published feature networks lie, and which network a recipe measures with.

Files only: nothing here asks the network for anything (`weights_fetch` does, when a person types
it). A file that is not what its name says is refused, never passed over.
"""

import difflib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from consistency.evaluation.protocol import DOMAIN, FeatureProtocol
from consistency.evaluation.specs import FILE, SPECS, ExtractorSpec
from infra import storage
from infra.errors import UserError

# Other names the same weights go by.
ALIASES = {
    "inception_fid": ("pt_inception-2015-12-05-6726825d.pth",),
    "googlenet_bvlc": ("googlenet_bvlc_fp32.safetensors",),
}
BLOCK = 1 << 20  # bytes
PATIENCE = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Resolved:
    """The feature network to measure with; the domain net has no file, it is trained."""

    name: str  # of SPECS, "domain", or "file"
    path: Path | None
    sha256: str | None


# --- finding -------------------------------------------------------------------------------------


def resolve(extractors: Sequence[str], weights: str | None) -> Resolved:
    """The first network of an ordered list whose weights are at hand; reads files, no network.

    extractors  names of SPECS, "domain", or paths of TorchScript and .pt2 files
    weights     the recipe's `reference.weights`: a file, or a folder searched before all others
    Raises UserError for an unknown name, when nothing is found, and for a file that is not what it
    should be: the next of the list is only for weights that are absent.
    """
    for entry in extractors:
        if entry != DOMAIN and not is_path(entry):
            spec_of(entry)
    if weights is not None:
        _require_an_owner(extractors, weights)
    for entry in extractors:
        if entry == DOMAIN:
            return Resolved(DOMAIN, None, None)
        if is_path(entry):
            file = Path(storage.absolute(entry))
            if file.is_file():
                return Resolved(FILE, file, sha256_of(file))
        elif (found := locate(entry, weights)) is not None:
            return Resolved(entry, found, checked(spec_of(entry), found))
    missing = "; ".join(_missing(entry, weights) for entry in extractors)
    raise UserError(f"reference.extractor: {missing}; or {_another(extractors)}")


def locate(name: str, path: str | None = None) -> Path | None:
    """The file a network's weights would be read from, unchecked; None when there is none.

    Order: `path` (file or folder), CMFORGE_WEIGHTS (folder), CMFORGE_INCEPTION_WEIGHTS (file, of
    inception_fid), cmforge's cache, torch hub's. UserError for a path that leads nowhere.
    """
    spec = spec_of(name)
    for place in _places(spec, path):
        with storage.mendable(str(place), "folder"):
            files = [place / each for each in names(spec)] if place.is_dir() else [place]
            for file in files:
                if file.is_file():
                    return file
    return None


def checked(spec: ExtractorSpec, file: Path) -> str:
    """sha256 of a file; UserError unless it is the spec's, where that is known."""
    with storage.mendable(str(file), "file"):
        size, digest = file.stat().st_size, sha256_of(file)
    if spec.sha256 not in (None, digest) or spec.bytes not in (None, size):
        raise UserError(
            f"{file}: not the weights of {spec.name}: {size:,} bytes, sha256 {digest}, expected "
            f"{expected(spec)}; replace it, or name the right one: {_how_to_get(spec)}"
        )
    return digest


def spec_of(name: str) -> ExtractorSpec:
    """UserError for a name that is not in SPECS."""
    if name in SPECS:
        return SPECS[name]
    near = difflib.get_close_matches(name, [*SPECS, DOMAIN], n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    raise UserError(
        f"unknown feature network {name!r}{hint} known: {', '.join(SPECS)}; {DOMAIN} needs no "
        f"weights, and the path of a TorchScript or .pt2 file is one too"
    )


def metric_of(spec: ExtractorSpec) -> str:
    """What a distance under the network is called."""
    return FeatureProtocol(
        extractor=spec.name,
        weights_sha256=spec.sha256 or "",
        layer=spec.layer,
        dim=spec.dim,
        resize=spec.resize,
        size=spec.size,
    ).metric


def cache_folder() -> Path:
    """Where `fetch` and `import` put files."""
    return _cache_home() / "cmforge" / "weights"


def _cache_home() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are to be ignored.
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def _places(spec: ExtractorSpec, given: str | None) -> list[Path]:
    """Folders and files to look at, the first one first."""
    places = []
    if given is not None:
        places.append(Path(storage.absolute(given)))
        if not places[-1].exists():
            raise UserError(f"reference.weights: {places[-1]} does not exist; mend the path")
    if folder := os.environ.get("CMFORGE_WEIGHTS"):
        places.append(Path(storage.absolute(folder)))
        if not places[-1].is_dir():
            raise UserError(f"CMFORGE_WEIGHTS: {places[-1]} is not a folder; mend or unset it")
    file = os.environ.get("CMFORGE_INCEPTION_WEIGHTS")
    if file and spec.name == "inception_fid":
        places.append(Path(storage.absolute(file)))
        if not places[-1].is_file():
            raise UserError(
                f"CMFORGE_INCEPTION_WEIGHTS: {places[-1]} is not a file; mend or unset it"
            )
    torch_home = os.environ.get("TORCH_HOME") or str(_cache_home() / "torch")
    hub = Path(storage.absolute(torch_home)) / "hub" / "checkpoints"
    return [*places, cache_folder(), hub]


def names(spec: ExtractorSpec) -> tuple[str, ...]:
    return (spec.file, *ALIASES.get(spec.name, ()))


def is_path(entry: str) -> bool:
    return "/" in entry or Path(entry).suffix != ""


def _require_an_owner(extractors: Sequence[str], weights: str) -> None:
    """One file cannot be meant for two networks, and which one it is must not be guessed."""
    networks = [entry for entry in extractors if entry in SPECS]
    if not networks:
        raise UserError(
            f"reference.weights: {weights} is of no network of reference.extractor "
            f"[{', '.join(extractors)}]; name one ({', '.join(SPECS)}), or leave it out"
        )
    if len(networks) > 1 and Path(storage.absolute(weights)).is_file():
        raise UserError(
            f"reference.weights: {weights} is one file, but reference.extractor names "
            f"{' and '.join(networks)}; give the folder that holds it, or name one network"
        )


def sha256_of(file: Path) -> str:
    about = file.stat()
    return _digest(str(file), about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest(file: str, size: int, changed: int) -> str:
    """A plan may ask several times for the same 96 MB."""
    return storage.sha256(file)


# --- what messages say ---------------------------------------------------------------------------


def _missing(entry: str, weights: str | None) -> str:
    if is_path(entry):
        return f"{storage.absolute(entry)} does not exist"
    spec = spec_of(entry)
    looked = ", ".join(str(place) for place in _places(spec, weights))
    return (
        f"weights of {entry} not found: looked in {looked} for {' or '.join(names(spec))} "
        f"({expected(spec)}); get them: {_how_to_get(spec)}"
    )


def expected(spec: ExtractorSpec) -> str:
    size = "any size" if spec.bytes is None else f"{spec.bytes:,} bytes"
    return f"{size}, " + ("no pinned sha256" if spec.sha256 is None else f"sha256 {spec.sha256}")


def _how_to_get(spec: ExtractorSpec) -> str:
    ways = [] if spec.url is None else [f"cmforge weights fetch {spec.name}"]
    ways += [f"cmforge weights import PATH{as_option(spec)}", "reference.weights=PATH"]
    return ", or ".join(ways)


def as_option(spec: ExtractorSpec) -> str:
    return f" --as {spec.name}" if spec.sha256 is None else ""


def _another(extractors: Sequence[str]) -> str:
    """The way out that works now: a network at hand, whose numbers bear another name."""
    wanted = [metric_of(SPECS[entry]) for entry in extractors if entry in SPECS]
    others = (name for name in SPECS if name not in extractors and locate(name) is not None)
    name = next(others, DOMAIN)
    metric = f"fd_{DOMAIN}" if name == DOMAIN else metric_of(SPECS[name])
    apart = f", not comparable with {' or '.join(wanted)}" if wanted else ""
    return f"measure with another network, reference.extractor=[{name}] (reports {metric}{apart})"


def table() -> list[str]:
    """Lines of `cmforge weights list`."""
    rows = [("network", "metric", "licence", "file")]
    rows += [(s.name, metric_of(s), s.licence, str(_state(s) or "missing")) for s in SPECS.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]


def summary() -> str:
    """One line for `cmforge doctor`: the networks at hand, and how to come by the standard one."""
    states = {name: _state(spec) for name, spec in SPECS.items()}
    found = [DOMAIN, *(name for name, state in states.items() if isinstance(state, Path))]
    faults = {str(state) for state in states.values() if isinstance(state, UserError)}
    parts = [f"at hand: {', '.join(found)}", *sorted(faults)]
    if states["inception_fid"] is None:
        parts.append("FID: weights not found; cmforge weights fetch inception_fid")
    return "; ".join(parts)


def _state(spec: ExtractorSpec) -> Path | UserError | None:
    """Its file, what is wrong with it, or None where there is none."""
    try:
        found = locate(spec.name)
        if found is not None and spec.sha256 is not None:
            checked(spec, found)
        return found
    except UserError as error:
        return error
