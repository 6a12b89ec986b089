"""Feature statistics in the files that papers exchange: an `.npz` with `mu` and `sigma`.

The reference files of EDM and pytorch-fid and the batches of ADM are read; none says by which
network it was computed, nor from how many samples. Ours add `protocol` and `n`.
"""

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consistency.evaluation.frechet import Gaussian
from consistency.evaluation.protocol import FeatureProtocol

ASYMMETRY = 1e-6  # of the largest entry: what float32 leaves


def read_npz(path: Path) -> tuple[Gaussian, FeatureProtocol | None]:
    """The statistics in `path`, and the protocol they were computed by where the file says.

    Other keys (ADM's spatial statistics and images) are ignored; nothing is ever unpickled.
    Raises OSError for a file that cannot be opened, else ValueError: one line with file and key.
    """
    arrays = _load(path)
    mean, covariance = _floats(path, arrays, "mu"), _floats(path, arrays, "sigma")
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        found = f"mu {mean.shape} and sigma {covariance.shape}"
        raise ValueError(f"{path}: {found}, expected [D] and [D, D]: save them unflattened")
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
        raise ValueError(f"{path}: sigma is not symmetric: save the covariance, not a root of it")
    if (np.diagonal(covariance) < 0).any():
        raise ValueError(f"{path}: sigma has negative variances: compute the statistics again")
    protocol = _protocol(path, arrays)
    if protocol is not None and protocol.dim != len(mean):
        found = f"{len(mean)} features where its protocol says {protocol.dim}"
        raise ValueError(f"{path}: mu has {found}: compute the statistics again")
    return Gaussian(mean, (covariance + covariance.T) / 2, _count(path, arrays)), protocol


def write_npz(path: Path, gaussian: Gaussian, protocol: FeatureProtocol | None) -> None:
    """`mu`, `sigma` (float64) for everybody; `n` and `protocol` (JSON) for `read_npz`."""
    arrays: dict[str, Any] = {"mu": gaussian.mean, "sigma": gaussian.covariance}
    if gaussian.n is not None:
        arrays["n"] = np.int64(gaussian.n)
    if protocol is not None:
        arrays["protocol"] = np.array(json.dumps(dataclasses.asdict(protocol), sort_keys=True))
    with path.open("wb") as file:  # given a name, savez may add a suffix to it
        np.savez(file, **arrays)


def _load(path: Path) -> dict[str, NDArray[np.generic]]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: not an .npz file, or cut short: fetch it again")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                keys = [k for k in ("mu", "sigma", "n", "protocol") if k in archive.files]
                arrays = {key: archive[key] for key in keys}
                present = archive.files
        except (ValueError, zipfile.BadZipFile, zlib.error) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: unreadable ({reason}): save plain arrays") from error
    missing = [key for key in ("mu", "sigma") if key not in arrays]
    if missing:
        found = ", ".join(present) or "nothing"
        mend = "give a file of feature statistics, not of images"
        raise ValueError(f"{path}: no key {' and '.join(missing)} (found {found}): {mend}")
    return arrays


def _floats(path: Path, arrays: dict[str, NDArray[np.generic]], key: str) -> NDArray[np.float64]:
    array = np.asarray(arrays[key])
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"{path}: {key} is {array.dtype}: save it as float64")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {key} has values that are not finite: compute it again")
    return array.astype(np.float64)


def _count(path: Path, arrays: dict[str, NDArray[np.generic]]) -> int | None:
    if "n" not in arrays:
        return None
    array = np.asarray(arrays["n"])
    if array.shape != () or array.dtype.kind not in "iu" or int(array) < 2:
        raise ValueError(f"{path}: n must be one whole number from 2 on: leave it out if unknown")
    return int(array)


def _protocol(path: Path, arrays: dict[str, NDArray[np.generic]]) -> FeatureProtocol | None:
    if "protocol" not in arrays:
        return None
    try:
        return FeatureProtocol(**json.loads(str(arrays["protocol"])))
    except (ValueError, TypeError) as error:
        reason = f"protocol is not one of this version ({error})"
        raise ValueError(f"{path}: {reason}: compute the statistics again") from error
