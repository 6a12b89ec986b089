"""Which code made a result: recorded beside it, and warned about when it has changed since.

Code is no part of a step's identity (a reformatted comment must not retrain a teacher), so a
cached result whose code differs is reused, loudly.
"""

import ast
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("consistency", "pipelines", "infra")
# The machinery that runs and prints steps does not decide what they compute.
IGNORED = {
    "pipelines.dag",
    "pipelines.execution",
    "pipelines.drift",
    "pipelines.cli",
    "pipelines.progress",
}


def closure(module: str) -> dict[str, str]:
    """File (relative to the install root) -> "{digest of its bytes}-{digest of its code}", for a
    module and all of ours it imports."""
    found: dict[str, str] = {}
    queue = [module]
    while queue:
        path = _path_of(queue.pop())
        if path is None:
            continue
        name = str(path.relative_to(ROOT))
        if name not in found:
            digest, imports = _read(path)
            found[name] = f"{_bytes(path)}-{digest}"
            queue.extend(imports - IGNORED)
    return dict(sorted(found.items()))


def changed(code: Mapping[str, str]) -> tuple[str, ...]:
    """Files of a recorded closure that are gone or differ now."""
    differing = []
    for name, recorded in code.items():
        path = ROOT / name
        before, _, digest = recorded.rpartition("-")
        # Parsing takes a hundred times longer than reading, and most files are as they were.
        if not path.is_file() or (_bytes(path) != before and _read(path)[0] != digest):
            differing.append(name)
    return tuple(differing)


@lru_cache(maxsize=512)
def _bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _path_of(module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        path = path / "__init__"
    path = path.with_name(path.name + ".py")
    return path if path.is_file() else None


@lru_cache(maxsize=512)
def _read(path: Path) -> tuple[str, frozenset[str]]:
    """(digest that ignores comments, layout and docstrings; modules of ours it names)."""
    tree = ast.parse(path.read_bytes())
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            imports.add(node.module)
            imports.update(f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    ours = {name for name in imports if name.split(".")[0] in PACKAGES}
    # Importing a.b.c runs a and a.b, too.
    packages = {
        ".".join(name.split(".")[:n]) for name in ours for n in range(1, name.count(".") + 1)
    }
    return digest, frozenset(ours | packages)
