"""`python -m pipelines.foreign_pickle FILE FOLDER`: a process of its own for one untrusted file.

Reads what torch.save and pickle.dump write, by `inert_pickle`: nothing in the file is run, here or
anywhere. Under limits on memory, processor time and what it may write, it leaves in FOLDER

    tensors.safetensors   every tensor of the state dict or network
    found.json            where they stood, and how the network was constructed

and ends with 0; or with 2 and one line on stderr, and leaves nothing that its parent would read.
The formats: a zip of `data.pkl` and one member per storage (torch.save since 1.6), pickles followed
by the storages (before), and a lone pickle with such bytes within it (EDM's networks).
"""

import io
import json
import os
import re
import resource
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipelines.inert_pickle import (
    DTYPES,
    SIZES,
    Machine,
    Name,
    Object,
    Refused,
    Storage,
    View,
    shown,
)

MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6
MOST_MEMBERS = 20_000
MOST_MODULES = 20_000
DEEPEST = 40  # modules in modules, lists in lists
MOST_TEXT = 1 << 20  # bytes of found.json
NESTS = ("ema", "state_dict", "model", "net")  # where training scripts put what we want


def main(arguments: list[str]) -> int:
    path, folder = arguments
    try:
        size = os.stat(path).st_size
        _limit(size)
        with open(path, "rb") as file:
            tensors, found = _wanted(_read(file, size))
            _write(Path(folder), tensors, found, size)
    except Refused as refused:
        return _say(refused)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        return _say(f"damaged or cut short: {shown(str(error))}")
    except RecursionError:
        return _say("its parts are nested too deeply")
    except MemoryError:
        return _say("it asks for more memory than its size gives reason for")
    except OSError as error:
        return _say(f"while it was read: {error.strerror}")
    return 0


def _say(what: object) -> int:
    print(what, file=sys.stderr)
    return 2


def _limit(size: int) -> None:
    """A file may cost a few times its own size, and no more."""
    gib = 1 << 30
    for what, most in (
        (resource.RLIMIT_AS, gib + 4 * size),
        (resource.RLIMIT_CPU, 60 + size // (10 << 20)),
        (resource.RLIMIT_FSIZE, 2 * size + (16 << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]  # a lower one of the system's stays
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


# --- the three formats ---------------------------------------------------------------------------


def _read(file: IO[bytes], size: int) -> Any:
    if file.read(2) == b"PK":
        return _read_zip(file, size)
    file.seek(0)
    machine = Machine(file, from_bytes=lambda data: _read_before_zip(io.BytesIO(data), len(data)))
    value = machine.load()
    if value == MAGIC and isinstance(value, int):
        file.seek(0)
        return _read_before_zip(file, size)
    if file.read(1):
        raise Refused("more follows after its end")
    return value


def _read_zip(file: IO[bytes], size: int) -> Any:
    """Members are read in place, by name: nothing is unpacked."""
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    _check_members(archive.infolist(), size)
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise Refused("a zip, but not one of torch.save: it has no data.pkl")
    root = pickles[0].split("/")[0]
    order = f"{root}/byteorder"
    if order in members and archive.read(order) != b"little":
        raise Refused("its numbers are big-endian")

    def numbers(identity: Any) -> Storage:
        kind, count, key = _stored(identity)
        name = f"{root}/data/{key}"
        if name not in members or members[name].file_size != count * SIZES[kind]:
            raise Refused(f"{shown(name)} is missing or has another size than its tensors")
        return Storage(kind, count, lambda: archive.read(name))

    return Machine(io.BytesIO(archive.read(pickles[0])), numbers=numbers).load()


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """torch.save stores, it does not compress: what a zip holds is no larger than the file."""
    if len(members) > MOST_MEMBERS:
        raise Refused(f"a zip of {len(members):,} members")
    if len({member.filename for member in members}) < len(members):
        raise Refused("a zip with two members of one name")
    for member in members:
        parts = member.filename.split("/")
        mode = member.external_attr >> 16
        if member.filename.startswith(("/", "\\")) or ".." in parts or stat.S_ISLNK(mode):
            raise Refused(f"a zip with a path that leads outside: {shown(member.filename)}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise Refused(f"a zip with a compressed member: {shown(member.filename)}")
    if sum(member.file_size for member in members) > size:
        raise Refused("a zip whose members claim more bytes than the file has")


def _read_before_zip(file: IO[bytes], size: int) -> Any:
    """Five pickles (magic number, version, machine, value, order of the storages), then numbers."""
    storages: dict[str, Storage] = {}

    def numbers(identity: Any) -> Storage:
        kind, count, key = _stored(identity)
        if count * SIZES[kind] > size:
            raise Refused(f"it claims {count:,} numbers in {size:,} bytes")
        known = storages.setdefault(key, Storage(kind, count))
        if (known.dtype, known.count) != (kind, count):
            raise Refused("it tells one storage in two ways")
        return known

    machine = Machine(file, numbers=numbers)
    magic, version, made_on = machine.load(), machine.load(), machine.load()
    if (magic, version) != (MAGIC, 1001) or not isinstance(made_on, dict):
        raise Refused("numbers in a form that torch.save does not write")
    if made_on.get("little_endian") is not True:
        raise Refused("its numbers are big-endian")
    value, order = machine.load(), machine.load()
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(storages):
        raise Refused("damaged: its storages are not those of its tensors")
    for key in order:
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        data = file.read(storage.count * SIZES[storage.dtype])
        if count != storage.count or len(data) != storage.count * SIZES[storage.dtype]:
            raise Refused("cut short: numbers are missing at its end")
        storage.data = _given(data)
    return value


def _given(data: bytes) -> Any:
    return lambda: data


def _stored(identity: Any) -> tuple[str, int, str]:
    """(dtype, count, key) of a storage, from the identity that torch.save gives it."""
    match identity:
        case ("storage", Name("torch", kind), str() as key, str(), int() as count, *view) if (
            kind in DTYPES and view in ([], [None]) and key.isalnum() and 0 <= count < 2**40
        ):
            return DTYPES[kind][0], count, key
        case ("storage", Name("torch.storage", "UntypedStorage"), str() as key, str(), int() as n):
            return "U8", n, key
    raise Refused("it has numbers of an unknown kind")


# --- what is wanted of it ------------------------------------------------------------------------


def _wanted(value: Any) -> tuple[dict[str, View], dict[str, Any]]:
    """(tensors by name, what found.json says)."""
    if isinstance(value, Object):
        return _network(value)
    if not isinstance(value, dict):
        raise Refused(f"it holds a {_kind(value)}, not a state dict or a network")
    if value and all(isinstance(one, View) for one in value.values()):
        return _state_dict(value), {"at": "", "modules": []}
    for at in NESTS:
        inner = value.get(at)
        if isinstance(inner, Object):
            tensors, found = _network(inner)
            return tensors, {**found, "at": at}
        if isinstance(inner, dict) and inner and all(isinstance(v, View) for v in inner.values()):
            others = [n for n in NESTS if n != at and isinstance(value.get(n), dict | Object)]
            if others:
                raise Refused(f"it holds several models: {at}, {', '.join(others)}")
            return _state_dict(inner), {"at": at, "modules": []}
    held = ", ".join(f"{shown(str(k))}: {_kind(v)}" for k, v in list(value.items())[:10])
    raise Refused(
        f"it is no flat state dict of tensors and has no network; it holds {held or '{}'}"
    )


def _state_dict(value: dict[Any, View]) -> dict[str, View]:
    for key in value:
        if not isinstance(key, str):
            raise Refused(f"it has a {type(key).__name__} as a tensor's name")
    return value


def _network(network: Object) -> tuple[dict[str, View], dict[str, Any]]:
    """The tensors of a module and those below it, and how it and its children were constructed."""
    children = _attribute(network, "_modules").items()
    described = [("", network), *((n, m) for n, m in children if isinstance(m, Object))]
    modules = [_constructed(name, module) for name, module in described]
    return dict(_tensors(network, "", [0])), {"at": "", "modules": modules}


def _tensors(module: Object, prefix: str, visited: list[int]) -> Iterator[tuple[str, View]]:
    visited[0] += 1
    if visited[0] > MOST_MODULES or prefix.count(".") > DEEPEST:
        raise Refused("its modules are nested without end")
    aside = module.state.get("_non_persistent_buffers_set", ())
    for held in ("_parameters", "_buffers"):
        for name, tensor in _attribute(module, held).items():
            if tensor is None or (held == "_buffers" and name in aside):
                continue
            if not isinstance(tensor, View) or not isinstance(name, str):
                raise Refused(f"{shown(prefix + str(name))} is a {_kind(tensor)}, not a tensor")
            yield prefix + name, tensor
    for name, child in _attribute(module, "_modules").items():
        if child is not None:
            if not isinstance(child, Object) or not isinstance(name, str):
                raise Refused(f"{shown(prefix + str(name))} is a {_kind(child)}, not a module")
            yield from _tensors(child, f"{prefix}{name}.", visited)


def _attribute(module: Object, name: str) -> dict[Any, Any]:
    state = module.state
    if not isinstance(state, dict) or not isinstance(state.get(name), dict):
        raise Refused(f"it holds a {shown(module.name)}, which is no network")
    found: dict[Any, Any] = state[name]
    return found


def _constructed(name: Any, module: Object) -> dict[str, Any]:
    args, kwargs = module.state.get("_init_args"), module.state.get("_init_kwargs")
    return {
        "at": str(name),
        "name": module.name,
        "args": _plain([] if args is None else args, 0),
        "kwargs": _plain({} if kwargs is None else kwargs, 0),
    }


def _plain(value: Any, depth: int) -> Any:
    """Constructor arguments as JSON: numbers, text, lists and dicts of them."""
    if depth > DEEPEST:
        raise Refused("constructor arguments are nested too deeply")
    if isinstance(value, str) and len(value) > 1000:
        raise Refused("a constructor argument is a long text")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and len(value) <= 1000:
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) <= 1000:
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    raise Refused(f"a constructor argument is a {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, View):
        return "tensor"
    return shown(value.name) if isinstance(value, Object | Name) else type(value).__name__


# --- what is left of it --------------------------------------------------------------------------


def _write(folder: Path, tensors: dict[str, View], found: dict[str, Any], size: int) -> None:
    """safetensors by hand (a header, then the numbers): torch is not needed here."""
    header: dict[str, Any] = {}
    end = 0
    for name, view in tensors.items():
        start, end = end, end + _bytes(view)
        header[name] = {
            "dtype": view.storage.dtype,
            "shape": view.shape,
            "data_offsets": (start, end),
        }
    if end > size:
        raise Refused(f"its tensors would be {end:,} bytes, the file has {size:,}")
    text, head = json.dumps(found).encode(), json.dumps(header).encode()
    if len(text) > MOST_TEXT or len(head) > 16 * MOST_TEXT:
        raise Refused("its names and arguments are longer than those of any network")
    with open(folder / "tensors.safetensors", "xb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for view in tensors.values():
            file.write(_numbers(view))
    (folder / "found.json").write_bytes(text)


def _bytes(view: View) -> int:
    return SIZES[view.storage.dtype] * int(np.prod(view.shape, dtype=object))


def _numbers(view: View) -> bytes:
    """The view's elements in the order of its shape."""
    if view.storage.data is None:
        raise Refused("damaged: numbers are missing")
    data, width = view.storage.data(), SIZES[view.storage.dtype]
    flat = np.frombuffer(data, np.dtype(f"V{width}"))
    if len(flat) != view.storage.count:
        raise Refused("damaged: numbers are missing")
    if 0 in view.shape:
        return b""
    strides = tuple(step * width for step in view.strides)
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides).tobytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
