"""`cmforge doctor`: what would go wrong later, found now."""

import importlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra import storage
from infra.errors import UserError
from pipelines import weights

OURS = ("consistency", "pipelines", "infra")
NEEDED = ("torch", "ray", "mlflow", "webdataset", "fsspec", "s3fs", "safetensors", "psutil")
ENOUGH_DISK = 2 << 30  # bytes
ENOUGH_MEMORY = 4 << 30


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, and what was found."""

    name: str
    ok: bool
    detail: str


def examine(workspace: str, tracking_uri: str | None) -> list[Check]:
    """Every check, each independent of the others."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("packages", _packages),
        ("names", _names),
        ("ray dashboard", _dashboard),
        ("cpu and memory", _machine),
        ("gpu", _gpu),
        ("feature nets", weights.summary),
        ("workspace", lambda: _workspace(workspace)),
        ("registry", lambda: _registry(workspace, tracking_uri)),
    ]
    return [_look(name, look) for name, look in looks]


def _look(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except Exception as error:  # a check must not stop the others
        return Check(name, False, str(error) or type(error).__name__)


def _python() -> str:
    return sys.version.split()[0]


def _packages() -> str:
    missing, found = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; run: pip install cmforge")
    return ", ".join(found)


def _names() -> str:
    """Our flat package names must not be shadowed by somebody else's."""
    owners = importlib.metadata.packages_distributions()
    roots = set()
    for name in OURS:
        others = set(owners.get(name, [])) - {"cmforge"}
        if others:
            raise UserError(f"package {name} also belongs to {', '.join(others)}; uninstall it")
        module = importlib.import_module(name)
        roots.add(str(Path(module.__path__[0]).parent))
    if len(roots) != 1:
        raise UserError(f"our packages come from different places: {', '.join(sorted(roots))}")
    return f"{', '.join(OURS)} from {roots.pop()}"


def _dashboard() -> str:
    """Ray Train frees leaked resources through the dashboard's API, so `ray[default]` it is."""
    for name in ("aiohttp_cors", "opencensus", "grpc"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install 'ray[default]'")
    return "installed"


def _machine() -> str:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{os.cpu_count()} CPUs, {memory.available / 2**30:.1f} GiB of memory available"
    if memory.available < ENOUGH_MEMORY:
        raise UserError(f"{text}; a run needs about {ENOUGH_MEMORY >> 30} GiB")
    shm = Path("/dev/shm")
    if shm.is_dir():
        text += f", /dev/shm {shutil.disk_usage(shm).free / 2**30:.1f} GiB"
    return text


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none (CPU recipes only)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _workspace(workspace: str) -> str:
    """Write, read back, and see whether one of several exclusive writes is the only one."""
    url = storage.join(workspace, f"doctor-{secrets.token_hex(4)}")
    try:
        if not storage.put_if_absent(url, b"first"):
            raise UserError(f"{workspace}: a new object was reported as already there")
        if storage.read_bytes(url) != b"first":
            raise UserError(f"{workspace}: what was written reads back otherwise")
    finally:
        storage.remove_tree(url)
    exclusive = storage.conditional_put(workspace)
    text = f"{workspace}: writable, put-if-absent " + (
        "honoured" if exclusive else "not honoured: drivers take turns by lease"
    )
    if storage.is_local(workspace):
        free = shutil.disk_usage(storage.absolute(workspace)).free
        text += f", {free / 2**30:.1f} GiB free"
        if free < ENOUGH_DISK:
            raise UserError(f"{text}; a run needs about {ENOUGH_DISK >> 30} GiB")
    return text


def _registry(workspace: str, tracking_uri: str | None) -> str:
    from infra import tracking

    uri = tracking_uri or tracking.default_tracking_uri(workspace)
    tracking.probe(uri)
    return tracking.without_secrets(uri)
