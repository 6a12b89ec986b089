"""YAML and dotted overrides into frozen values (recipes, clusters, sweeps), strictly.

Precedence: dataclass default < method preset < recipe file < override.

- The sections METHOD_SECTIONS start from the preset `configs/methods/<method>.yaml`.
- An override that changes a section's `method` also drops the keys in METHOD_PARTS which the
  recipe file wrote for the old method; training keys (images, batch, lr, ema, ...) stay.
- A mapping whose `kind` differs from the one below it starts afresh; without `kind` it amends.
- Lists are replaced whole. Files are complete: there is no inheritance, no alias, no tag.

All mistakes of a file and its overrides are reported at once, one line each, as
`file:line:col: path: message, did you mean 'x'?` (see `strict_yaml`).
"""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, get_args

import yaml

from consistency.config import AdoptableConfig
from consistency.method_config import (
    ConsistencyConfig,
    DistillConfig,
    IsolateConfig,
    MeanFlowConfig,
    SCMConfig,
    TruncateConfig,
)
from infra.errors import UserError
from pipelines.recipe import Cluster, Recipe
from pipelines.strict_yaml import (
    Mark,
    Node,
    Problems,
    build,
    describe,
    did_you_mean,
    entry,
    is_null,
    key_of,
    merge,
    parse,
    user_error,
)
from pipelines.sweep import SweepConfig

Folder = Literal["recipes", "clusters", "methods", "sweeps"]

# The stages that have a method, and the kinds of presets each takes.
METHOD_SECTIONS: dict[str, tuple[str | None, ...]] = {
    "distill": tuple(member.kind for member in get_args(DistillConfig)),
    "isolate": tuple(member.kind for member in get_args(IsolateConfig)),
    "truncate": (None,),
}
# What a method is made of, as opposed to how long and how fast it is trained.
METHOD_PARTS = (
    {
        field.name
        for config in (ConsistencyConfig, SCMConfig, MeanFlowConfig, TruncateConfig)
        for field in dataclasses.fields(config)
    }
    - {field.name for field in dataclasses.fields(AdoptableConfig)}
    - {"method"}
)

FILE, PRESET, OVERRIDE = 0, 1, 2  # layers of a Mark; overrides count on from OVERRIDE
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class RecipeSource:
    """A recipe's text with overrides: what trials are variations of. Plain text, so that it can be
    sent to other processes and machines; of files it needs the packaged method presets only."""

    name: str  # where the text is from, as mistakes call it
    text: str
    overrides: tuple[str, ...] = ()
    asked: str = ""  # what a person types for it, if not `name`
    adopted: tuple[str, ...] = ()  # overrides that say what an adopted model brings along

    def typed(self, extra: Sequence[str] = ()) -> str:
        """The command that runs it with `extra` overrides, for a shell."""
        words = [self.asked or self.name, *self.overrides, *extra]
        return "cmforge run " + " ".join(shlex.quote(word) for word in words)

    def recipe(self, extra: Sequence[str] = ()) -> Recipe:
        """The recipe with the overrides and then `extra`: the last one wins, and one that changes a
        method takes away what the file said of the old one. UserError lists every mistake."""
        problems: Problems = []
        tree = _root_mapping(self.text, Mark(FILE, self.name, 1, 1), problems)
        changes = _read_overrides((*self.overrides, *self.adopted, *extra), problems)
        for section in METHOD_SECTIONS:
            tree, changes = _on_method_preset(section, tree, changes, problems)
        return build(Recipe, merge(tree, changes), problems)


def read_source(name_or_path: str, overrides: Sequence[str] = ()) -> RecipeSource:
    """A packaged recipe's name or a path to a .yaml file, not yet looked into. UserError when there
    is no such text."""
    name, text = _read_text("recipes", name_or_path)
    return RecipeSource(name, text, tuple(overrides), asked=name_or_path)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A packaged recipe's name or a path to a .yaml file. UserError lists every mistake."""
    return read_source(name_or_path, overrides).recipe()


def load_cluster(name_or_path: str, overrides: Sequence[str] = ()) -> Cluster:
    """A packaged cluster's name or a path to a .yaml file. UserError lists every mistake."""
    problems: Problems = []
    tree = _read_file("clusters", name_or_path, problems)
    return build(Cluster, merge(tree, _read_overrides(overrides, problems)), problems)


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """A packaged sweep's name or a path to a .yaml file. UserError lists every mistake.

    The elements of an axis' `choice` are kept as they are written (80, true, 1e-3, ict): they go
    behind `key=` of an override. Lists and mappings are quoted: '{kind: ema, mu: 0.95}'.
    """
    problems: Problems = []
    tree = _read_file("sweeps", name_or_path, problems)
    tree = merge(tree, _read_overrides(overrides, problems))
    return build(SweepConfig, _with_choices_as_text(tree, problems), problems)


def names(folder: Folder) -> list[str]:
    """The packaged recipes, clusters, methods or sweeps."""
    files = os.listdir(_root() / folder)
    return sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml"))


def resolved_yaml(value: Recipe | Cluster | SweepConfig) -> str:
    """Every key with its final value; loading the text gives an equal value."""
    # ASCII: PyYAML writes some line breaks of Unicode (U+0085) so that they are read as spaces.
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=False, width=100)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return {key_of(f): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@cache
def _root() -> Path:
    """The presets inside an installed package, or `configs/` of a checkout."""
    packaged = Path(__file__).parent / "presets"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def _read_file(folder: Folder, name_or_path: str, problems: Problems) -> Node:
    """The file's root mapping. UserError when there is no such thing to go on with."""
    source, text = _read_text(folder, name_or_path)
    return _root_mapping(text, Mark(FILE, source, 1, 1), problems)


def _read_text(folder: Folder, name_or_path: str) -> tuple[str, str]:
    """(what mistakes call the file, its text)."""
    kind = folder.removesuffix("s")
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or os.sep in name_or_path:
        source, path = name_or_path, Path(name_or_path)
    else:
        path = _root() / folder / f"{name_or_path}.yaml"
        if not path.is_file():
            raise UserError(
                f"unknown {kind} {name_or_path!r}{did_you_mean(name_or_path, names(folder))} "
                f"(packaged: {', '.join(names(folder))}; or give a path to a .yaml file)"
            )
        inside = path.is_relative_to(Path.cwd())
        source = str(path.relative_to(Path.cwd()) if inside else path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise UserError(f"{source}: is a folder, give a {kind} file (.yaml)") from None
    except OSError as error:
        packaged = ", ".join(names(folder))
        raise UserError(
            f"{source}: cannot read the {kind}: {error.strerror} (packaged: {packaged})"
        ) from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{source}: larger than {MAX_BYTES:,} bytes, not a {kind}")
    try:
        return source, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}:1: not UTF-8 text; save the file as UTF-8") from None


def _root_mapping(
    text: str, start: Mark, problems: Problems, chosen_at: Mark | None = None
) -> Node:
    """The text's root, a mapping. UserError when it is none."""
    root = _parse_once(text, start, problems, chosen_at)
    if root.value is not None and not isinstance(root.value, dict):
        problems.append((root.mark, f"expected a mapping (key: value), got {describe(root)}"))
    if not isinstance(root.value, dict):
        raise user_error(problems)
    return root


def _parse_once(text: str, start: Mark, problems: Problems, chosen_at: Mark | None = None) -> Node:
    """As `parse`, which takes most of the time of loading: a sweep loads one text thousands of
    times. The nodes are shared, and nothing writes into a node."""
    node, said = _parsed(text, start, chosen_at)
    problems += said
    return node


@lru_cache(maxsize=64)
def _parsed(text: str, start: Mark, chosen_at: Mark | None) -> tuple[Node, Problems]:
    problems: Problems = []
    return parse(text, start, problems, chosen_at), problems


def _with_choices_as_text(tree: Node, problems: Problems) -> Node:
    """The sweep with every unquoted element of an axis' `choice` quoted."""
    space = entry(tree, "space")
    if space is None or not isinstance(space.value, list):
        return tree
    axes = []
    for i, axis in enumerate(space.value):
        choice = entry(axis, "choice")
        if choice is not None and isinstance(choice.value, list):
            items = []
            for j, item in enumerate(choice.value):
                if isinstance(item.value, dict | list):
                    message = f"expected text, got {describe(item)}; quote it, such as"
                    message = f"space[{i}].choice[{j}]: {message} '{{kind: ema, mu: 0.95}}'"
                    problems.append((item.mark, message))
                    item = dataclasses.replace(item, value=None)
                items.append(dataclasses.replace(item, plain=item.value == ""))
            assert isinstance(axis.value, dict)
            quoted = dataclasses.replace(choice, value=items)
            axis = dataclasses.replace(axis, value=axis.value | {"choice": quoted})
        axes.append(axis)
    assert isinstance(tree.value, dict)
    return dataclasses.replace(
        tree, value=tree.value | {"space": dataclasses.replace(space, value=axes)}
    )


def _read_overrides(overrides: Sequence[str], problems: Problems) -> Node:
    """`a.b=value` each, the last one wins. The value is taken as it stands (no # comments, no
    escapes) unless it begins like a YAML list, mapping or quoted text."""
    nowhere = Mark(OVERRIDE, "overrides", 0, 0)
    changes = Node({}, nowhere, nowhere)
    for i, override in enumerate(overrides):
        mark = Mark(OVERRIDE + i, f"override {override!r}", 0, 0)
        dotted, equals, text = override.partition("=")
        parts = [part.strip() for part in dotted.split(".")]
        if not equals or not all(parts):
            problems.append((mark, "expected key=value, such as teacher.images=200_000"))
            continue
        text = text.strip()
        is_yaml = text.startswith(("[", "{", "'", '"'))
        node = _parse_once(text, mark, problems) if is_yaml else Node(text, mark, mark)
        for part in reversed(parts):
            node = Node({part: node}, mark, mark)
        changes = merge(changes, node)
    return changes


def _on_method_preset(
    section: str, tree: Node, changes: Node, problems: Problems
) -> tuple[Node, Node]:
    """The tree with the section's method preset under it; see the module's rules."""
    assert isinstance(tree.value, dict)
    assert isinstance(changes.value, dict)
    changed, written = changes.value.get(section), tree.value.get(section)
    if changed is not None and written is not None and is_null(written):
        written = None  # `truncate: null` in a recipe, truncate.method=tcm in an override
    holder = written or changed
    if holder is None or not all(isinstance(n.value, dict) for n in (changed, written) if n):
        return tree, changes  # missing or of the wrong type: said when the section is read
    old, new = entry(written, "method"), entry(changed, "method")
    method = new or old
    base = _preset(section, holder, method, problems)
    if base is None:
        unreadable = dataclasses.replace(holder, value=None)
        rest = {key: node for key, node in changes.value.items() if key != section}
        changes = dataclasses.replace(changes, value=rest)
        return dataclasses.replace(tree, value=tree.value | {section: unreadable}), changes
    if written is not None:
        assert isinstance(written.value, dict)
        if old is not None and new is not None and old.value != new.value:
            kept = {key: node for key, node in written.value.items() if key not in METHOD_PARTS}
            written = dataclasses.replace(written, value=kept)
        base = merge(base, written)
    base = dataclasses.replace(base, mark=holder.mark, key_mark=holder.key_mark)
    return dataclasses.replace(tree, value=tree.value | {section: base}), changes


def _preset(section: str, holder: Node, method: Node | None, problems: Problems) -> Node | None:
    """The preset of the method a section names; None, and a problem, when that is none of its."""
    if method is not None and method.value is None:
        return None  # unreadable, already said
    name = None if method is None else method.value
    if method is not None and isinstance(name, str) and name in names("methods"):
        preset = _read_preset(name, problems, method.mark)
        stages = _stages_for(preset)
        if section in stages:
            return preset
        message = f"{section}.method: {name} is no method of this stage, but of "
        problems.append((method.mark, message + " or ".join(stages)))
        return None
    presets = {known: _read_preset(known, []) for known in names("methods")}
    own = [known for known, preset in presets.items() if section in _stages_for(preset)]
    listed = f"one of {', '.join(own)}"
    if method is None:
        problems.append((holder.key_mark, f"{section}.method: missing, {listed}"))
    else:
        message = f"{section}.method: unknown method {describe(method)}"
        problems.append((method.mark, f"{message}{did_you_mean(name, own)} ({listed})"))
    return None


def _read_preset(name: str, problems: Problems, chosen_at: Mark | None = None) -> Node:
    source, text = _read_text("methods", name)
    return _root_mapping(text, Mark(PRESET, source, 1, 1), problems, chosen_at)


def _stages_for(preset: Node) -> list[str]:
    """The stages that can take a method, by its kind."""
    said = entry(preset, "kind")
    kind = None if said is None else said.value
    return [stage for stage, kinds in METHOD_SECTIONS.items() if kind in kinds]
