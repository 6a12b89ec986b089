"""The tensors of one file from outside, which is not trusted.

safetensors holds numbers and names only and is read here. Whatever torch.save or pickle.dump wrote
is read by a child process (`foreign_pickle`) that runs nothing of it, under limits, with none of
this process's secrets in its environment; what is read here is what that child left.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 32 << 30  # the largest published network is 2 GB
PATIENCE = 3600.0  # seconds; the child's own limit of processor time comes first
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME")
_NOT_CHECKPOINTS = {
    b"<": "a web page or XML; fetch the file itself",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"\x89HDF": "an HDF5 file; export its tensors as safetensors",
    b"\x1f\x8b": "gzipped; unpack it first",
}


@dataclass(frozen=True)
class Found:
    """The tensors by name; and, of a pickled network, how its modules were constructed."""

    tensors: "dict[str, Tensor]"
    modules: list[dict[str, Any]]  # each with at, name, args, kwargs; "" is the outermost


def read(path: Path, scratch: Path) -> Found:
    """Every tensor of a safetensors, .pt or .pkl file. Raises UserError naming what is wrong.

    scratch: an empty folder for the tensors of a pickle, which are mapped from there.
    """
    with storage.mendable(str(path)):
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path}: not a file")
        with open(path, "rb") as file:
            head = file.read(32)
    if size > MOST_BYTES:
        raise UserError(f"{path}: {size:,} bytes are more than {MOST_BYTES:,}; refused")
    for start, what in _NOT_CHECKPOINTS.items():
        if head.startswith(start):
            raise UserError(f"{path}: {what}")
    if head.startswith(b"PK") or head[:1] == b"\x80":
        return _from_pickle(path, scratch)
    if len(head) > 8 and head[8:9] == b"{":
        return Found(read_safetensors(path), [])
    raise UserError(f"{path}: no safetensors, .pt or .pkl file (it begins with {head[:8]!r})")


def read_safetensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of a file that holds nothing else. Raises UserError for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged or cut short: {what}; fetch it again") from error


def _from_pickle(path: Path, scratch: Path) -> Found:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-P", "-m", "pipelines.foreign_pickle"]
    command += [os.fspath(path.resolve()), os.fspath(scratch)]
    try:
        done = subprocess.run(
            command,
            env=_environment(os.environ, root),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: refused: reading it takes more than {PATIENCE:g} s") from None
    if done.returncode == 2 and done.stderr.strip():
        raise UserError(f"{path}: refused: {done.stderr.strip().splitlines()[-1][:500]}")
    if done.returncode != 0:
        raise UserError(
            f"{path}: refused: its reader ended with {done.returncode} (a limit of memory or time, "
            f"or a damaged file)"
        )
    modules = json.loads((scratch / "found.json").read_text())["modules"]
    return Found(read_safetensors(scratch / "tensors.safetensors"), modules)


def _environment(ours: Mapping[str, str], root: Path) -> dict[str, str]:
    """Enough to find Python and its packages, and no secrets."""
    paths = [str(root), *filter(None, [ours.get("PYTHONPATH")])]
    kept = {name: ours[name] for name in _PASSED_ON if name in ours}
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
