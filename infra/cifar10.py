"""The official CIFAR-10 archives, python or binary batches, unpacked or as one .tar.gz.

The python batches are pickles; they are read by an unpickler that builds plain values and numpy
arrays and nothing else, so a hostile file is refused by the name it asks for.
"""

import io
import pickle  # noqa: TID251  the data set's own format, behind the allow-list of ArrayUnpickler
import tarfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
ARCHIVES = (".tar.gz", ".tgz")
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")  # given, or unpacked below
_ROW = 3 * 32 * 32  # one image: red plane, green plane, blue plane


def batches(split: str) -> list[str]:
    """Names of the split's files in the official order, without the binary form's `.bin`."""
    return [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]


def read(path: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(images [N, 32, 32, 3], labels [N]) in the official order. UserError names a bad file."""
    stems = batches(split)
    wanted = {name for stem in stems for name in (stem, f"{stem}.bin")}
    archived = path.endswith(ARCHIVES)
    files = _from_archive(path, wanted) if archived else _from_folder(path, wanted)
    parts = []
    for stem in stems:
        if stem in files:
            parts.append(_read_python(files[stem], f"{path}: {stem}"))
        elif f"{stem}.bin" in files:
            parts.append(_read_binary(files[f"{stem}.bin"], f"{path}: {stem}.bin"))
        else:
            raise UserError(f"data.path: {path} has no {stem} (or {stem}.bin); unpack it whole")
    rows = np.concatenate([rows for rows, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise UserError(f"data.path: {path} has labels outside 0..9; is it CIFAR-10?")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _from_folder(path: str, wanted: set[str]) -> dict[str, bytes]:
    """The wanted files of the folder itself or of the one the archive unpacks to."""
    files: dict[str, bytes] = {}
    for folder in FOLDERS:
        url = storage.join(path, folder) if folder else path
        for name in wanted.intersection(storage.list_dir(url)) - files.keys():
            files[name] = storage.read_bytes(storage.join(url, name))
    return files


def _from_archive(path: str, wanted: set[str]) -> dict[str, bytes]:
    """The wanted members by base name, read in memory: nothing is ever extracted."""
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(path)), mode="r:gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if name in wanted and member.isreg():
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a regular file
                    files[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path: {path} is damaged ({error}); fetch it again") from error
    return files


def _read_binary(data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Records of one label byte and one row."""
    if not data or len(data) % (1 + _ROW):
        raise UserError(
            f"data.path: {where} is not whole records of {1 + _ROW} bytes; fetch it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _ROW)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _read_python(data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        batch = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"data.path: {where} is refused: {error}; use the official one") from error
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(f"data.path: {where} is damaged ({error}); fetch it again") from error
    rows = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (_ROW,):
        raise UserError(f"data.path: {where} holds no uint8 rows of {_ROW}; use the official one")
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise UserError(f"data.path: {where} has no label for each row; use the official one")
    if not all(isinstance(label, int) for label in labels):
        raise UserError(f"data.path: {where} has labels that are no integers; use the official one")
    return rows, np.array(labels, np.int64)


class ArrayUnpickler(pickle.Unpickler):
    """Builds dict, list, bytes, str, int and numpy arrays; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        arrays = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
        if module in arrays and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", "_reconstruct")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
