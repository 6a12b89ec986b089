"""Which code made a result: comments do not count, code does, and a change is said aloud."""

import dataclasses
import textwrap
from pathlib import Path

import pytest

from pipelines import commands, dag, drift, execution
from pipelines.dag import Planned, Step
from pipelines.steps import evaluate, isolate, report, shard, teacher

BEFORE = '''\
"""About the module."""

import math


class Circle:
    """About the class."""

    def area(self, r):
        """About the method."""
        return math.pi * r * r


async def wait(seconds):
    # a comment
    return [seconds, 2]
'''

SAME = {
    "another comment": BEFORE.replace("# a comment", "# said otherwise"),
    "no comment": BEFORE.replace("    # a comment\n", ""),
    "other docstrings": BEFORE.replace("About the", "Everything about this"),
    "no docstrings": BEFORE.replace('"""About the module."""\n', "")
    .replace('    """About the class."""\n', "")
    .replace('        """About the method."""\n', ""),
    "one more docstring": BEFORE.replace(
        "async def wait(seconds):\n", 'async def wait(seconds):\n    """Wait."""\n'
    ),
    "another layout": BEFORE.replace("[seconds, 2]", "[\n        seconds,\n        2,\n    ]"),
    "other line ends": BEFORE.replace("\n", "\r\n"),
    "other quotes and brackets": BEFORE.replace("math.pi * r * r", "(math.pi * r) * r"),
}
DIFFERENT = {
    "a number": BEFORE.replace("2", "3"),
    "an operator": BEFORE.replace("r * r", "r + r"),
    "a name": BEFORE.replace("Circle", "Disc"),
    "an import": BEFORE.replace("import math", "import math\nimport os"),
    "a default": BEFORE.replace("(self, r)", "(self, r=1)"),
    "a decorator": BEFORE.replace("    def area", "    @staticmethod\n    def area"),
    "a text that is no docstring": BEFORE + "x = 'text'\n",
    "the order": BEFORE.replace("[seconds, 2]", "[2, seconds]"),
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small installation: writes files below it, and forgets what was read."""
    monkeypatch.setattr(drift, "ROOT", tmp_path)
    drift._read.cache_clear()
    drift._bytes.cache_clear()

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_bytes(textwrap.dedent(text).encode())
        drift._read.cache_clear()
        drift._bytes.cache_clear()
        return tmp_path

    yield write
    drift._read.cache_clear()
    drift._bytes.cache_clear()


@pytest.mark.parametrize("change", list(SAME))
def test_what_a_person_reads_does_not_change_the_digest(tree, change):
    tree(infra__one=BEFORE)
    recorded = drift.closure("infra.one")
    assert SAME[change] != BEFORE
    tree(infra__one=SAME[change])
    digests = [c["infra/one.py"].split("-") for c in (recorded, drift.closure("infra.one"))]
    assert digests[0][1] == digests[1][1]
    assert digests[0][0] != digests[1][0]  # that of its bytes, which only saves time
    assert drift.changed(recorded) == ()


@pytest.mark.parametrize("change", list(DIFFERENT))
def test_what_the_machine_reads_changes_the_digest(tree, change):
    tree(infra__one=BEFORE)
    recorded = drift.closure("infra.one")
    assert DIFFERENT[change] != BEFORE
    tree(infra__one=DIFFERENT[change])
    assert drift.closure("infra.one") != recorded
    assert drift.changed(recorded) == ("infra/one.py",)


def test_the_closure_holds_the_module_all_of_ours_it_reaches_and_their_packages(tree):
    tree(
        pipelines__start="""
            import os, numpy
            from consistency import near
            import infra.plain, infra.sub.deep
            def f():
                from infra.late import name
            """,
        consistency__near="import consistency.far\nfrom pipelines.start import f",  # a cycle
        consistency__far="",
        consistency__unrelated="",
        infra__plain="",
        infra__sub__deep="",
        infra__late="if True:\n    import consistency.conditional",
        consistency__conditional="",
        numpy="",
    )
    assert list(drift.closure("pipelines.start")) == [
        "consistency/__init__.py",
        "consistency/conditional.py",
        "consistency/far.py",
        "consistency/near.py",
        "infra/__init__.py",
        "infra/late.py",
        "infra/plain.py",
        "infra/sub/__init__.py",
        "infra/sub/deep.py",
        "pipelines/__init__.py",
        "pipelines/start.py",
    ]


def test_changed_names_every_file_that_differs_or_is_gone(tree):
    root = tree(infra__a="x = 1\nimport infra.b, infra.c", infra__b="y = 1", infra__c="z = 1")
    recorded = drift.closure("infra.a")
    (root / "infra" / "c.py").unlink()
    tree(infra__b="y = 2")
    assert drift.changed(recorded) == ("infra/b.py", "infra/c.py")


def test_a_module_that_is_not_ours_has_no_code_of_ours(tree):
    tree(infra__a="")
    assert drift.closure("json.decoder") == {}
    assert drift.closure("test_something") == {}


@pytest.mark.parametrize("step", [shard, teacher, isolate, evaluate, report])
def test_a_real_stage_reaches_what_computes_it_and_not_the_machinery(step):
    code = drift.closure(step.__name__)
    assert step.__name__.replace(".", "/") + ".py" in code
    assert not {f"pipelines/{name}.py" for name in ("dag", "cli", "progress", "drift")} & set(code)
    assert all(not name.startswith(("/", "..")) for name in code)


def test_a_training_stage_depends_on_the_mathematics_it_imports_late():
    code = drift.closure(teacher.__name__)
    needed = {"consistency/loop.py", "consistency/networks/unet.py", "pipelines/training.py"}
    assert needed <= set(code)


# --- the warning ---------------------------------------------------------------------------------


def planned(drifted: tuple[str, ...]) -> list[Planned]:
    @dataclasses.dataclass(frozen=True)
    class Config:
        x: int = 0

    step = Step(name="teacher", run=teacher.run, config=Config(), returns=Config)
    return [Planned(step, "0" * 16, "cached", "committed", None, drifted)]


def test_a_reused_result_of_other_code_is_warned_about_with_the_files(capsys):
    commands._print_plan(planned(("consistency/loop.py", "infra/shards.py")), [])
    captured = capsys.readouterr()
    assert captured.err == (
        "warning: teacher is reused, but its code has changed since: consistency/loop.py, "
        "infra/shards.py; --force teacher runs it again\n"
    )
    assert "1 cached, 0 to run" in captured.out


def test_a_long_list_of_files_is_cut(capsys):
    commands._print_plan(planned(tuple(f"infra/{i}.py" for i in range(9))), [])
    assert "infra/4.py and 4 more;" in capsys.readouterr().err


@pytest.mark.parametrize(("drifted", "forced"), [((), []), (("infra/a.py",), ["teacher"])])
def test_no_warning_without_drift_nor_for_what_runs_again(capsys, drifted, forced):
    commands._print_plan(planned(drifted), forced)
    assert capsys.readouterr().err == ""


def test_drift_leaves_a_result_cached_and_the_plan_names_the_file(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Value:
        x: int = 0

    def body(ctx, config):
        return Value()

    body.__module__ = "infra.errors"  # as if it were defined there
    step = Step(name="a", run=body, config=Value(), returns=Value)
    settings = dag.Settings(str(tmp_path), "sqlite:///unused.db", "test", dag.Cluster())
    execution.run_attempt(step, settings, {}, (), drift.closure(step.run.__module__))
    (line,) = dag.plan([step], str(tmp_path))
    assert (line.state, line.drifted) == ("cached", ())
    read = drift._read

    def edited(path):
        digest, imports = read(path)
        return (digest[::-1] if path.name == "errors.py" else digest), imports

    monkeypatch.setattr(drift, "_read", edited)
    monkeypatch.setattr(drift, "_bytes", lambda path: "edited")
    (line,) = dag.plan([step], str(tmp_path))
    assert (line.state, line.drifted) == ("cached", ("infra/errors.py",))


def test_a_record_of_the_time_before_digests_of_bytes_is_understood(tree):
    tree(infra__one=BEFORE)
    before = {name: digest.split("-")[1] for name, digest in drift.closure("infra.one").items()}
    assert drift.changed(before) == ()
    tree(infra__one=DIFFERENT["a number"])
    assert drift.changed(before) == ("infra/one.py",)
