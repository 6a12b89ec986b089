"""`diffusers_unet.py` and all it needs of `consistency`, as the source of one file."""

import ast
import textwrap
from importlib.util import find_spec
from pathlib import Path

HEADER = '''"""A few-step image generator made by cmforge: its network, and how diffusers calls it.

Put together from cmforge's source (Apache-2.0). It needs torch and diffusers.
"""
'''
# Each after what it needs.
MODULES = (
    "consistency.config",
    "consistency.randomness",
    "consistency.schedules",
    "consistency.parameterization",
    "consistency.networks.blocks",
    "consistency.networks.unet",
    "consistency.networks.song",
    "consistency.networks.adm",
    "consistency.networks",
    "pipelines.diffusers_unet",
)
WANTED = "CmforgeUNet"


def one_file() -> str:
    """Source that defines `CmforgeUNet` without any import of ours.

    Every top-level statement that its names lead to, in order. The names are unique over all
    modules: two statements that define one would be a bug here, and raise AssertionError.
    """
    imports: dict[str, str] = {}  # by the name that each binds
    statements: dict[str, tuple[str, str, ast.stmt]] = {}  # by the name that each defines
    for module in MODULES:
        source = _source(module)
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import):
                imports |= {a.asname or a.name: f"import {ast.unparse(a)}" for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                if (node.module or "").split(".")[0] != "consistency":
                    start = f"from {node.module} import"
                    imports |= {a.asname or a.name: f"{start} {ast.unparse(a)}" for a in node.names}
            else:
                for name in _defined(node) - {"__all__"}:
                    assert name not in statements, f"{name} is defined twice"
                    statements[name] = module, _text(source, node), node
    needed: set[str] = set()
    waiting = [WANTED]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            node = statements[name][2] if name in statements else ast.Pass()
            waiting += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    used = sorted({line for name, line in imports.items() if name.split(".")[0] in needed})
    parts, module = [], ""
    for name, (home, text, _) in statements.items():
        if name in needed:
            parts += [] if home == module else [f"# ---- {home} ----"]
            parts.append(text)
            module = home
    # Inside a function, as diffusers runs the file again for each model, in the same module: one
    # that is already there must not find the classes of the next.
    body = textwrap.indent("\n\n".join([*parts, f"return {WANTED}"]), "    ")
    start = "\n".join([HEADER, *used])
    return f"{start}\n\n\ndef _define():\n{body}\n\n\n{WANTED} = _define()\n"


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _text(source: str, node: ast.stmt) -> str:
    """The statement as it stands, decorators included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
