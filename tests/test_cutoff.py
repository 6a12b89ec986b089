"""A result made anew is held against what its dependants were made from."""

from dataclasses import dataclass, field

import pytest

from infra.resources import Resources
from pipelines import dag, execution
from pipelines.artifacts import MEASURED, content_of
from pipelines.dag import Settings, Step
from pipelines.recipe import Cluster

RAN: list[str] = []
DRIFT = {"a": 0.0}  # what changed code, or a GPU, may add to a result of the same identity


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Value:
    value: float
    seconds: float = field(default=0.0, metadata=MEASURED)


def body(ctx, config, **inputs):
    RAN.append(ctx.step)
    (ctx.out / "file").write_text("x")
    total = config.lr + sum(given.value.value for given in inputs.values())
    return Value(value=total + DRIFT.get(ctx.step, 0.0), seconds=len(RAN))


class InProcess:
    def __init__(self):
        self.calls = []

    def capacity(self):
        return Resources(4.0)

    def submit(self, function, *args, needs, name):
        self.calls.append((function, args))
        return len(self.calls) - 1

    def wait(self, handles, timeout):
        return handles[-1:]  # the latest first: an unlucky order

    def result(self, handle):
        function, args = self.calls[handle]
        return function(*args)

    def cancel(self, handles):
        pass

    def close(self):
        pass


def chain():
    """a -> b -> d, a -> d, and c on its own -> d."""

    def step(name, *inputs):
        return Step(
            name=name,
            run=body,
            config=Config(),
            returns=Value,
            inputs={needed.name: needed for needed in inputs},
        )

    a, c = step("a"), step("c")
    b = step("b", a)
    return [a, b, c, step("d", a, b, c)]


@pytest.fixture
def run(tmp_path):
    DRIFT["a"] = 0.0

    def run(steps):
        RAN.clear()
        settings = Settings(str(tmp_path), "sqlite:///unused.db", "test", Cluster())
        list(execution.execute(steps, settings, InProcess))
        return list(RAN)

    return run


def test_the_same_result_again_leaves_its_dependants_alone(run, tmp_path):
    steps = chain()
    run(steps)
    dag.set_aside(str(tmp_path), steps[0])
    assert run(steps) == ["a"]
    assert run(steps) == []


def test_another_result_makes_every_dependant_anew_and_no_one_else(run, tmp_path):
    steps = chain()
    run(steps)
    dag.set_aside(str(tmp_path), steps[0])
    DRIFT["a"] = 1.0
    assert run(steps) == ["a", "b", "d"]
    assert run(steps) == []
    record = dag.read_record(dag.home_of(str(tmp_path), steps[3]))
    assert record["value"]["value"] == pytest.approx(0.1 + 1.1 + 1.2 + 0.1)


def test_a_crash_after_the_new_result_is_caught_up_by_the_next_plan(run, tmp_path):
    steps = chain()
    run(steps)
    dag.set_aside(str(tmp_path), steps[0])
    DRIFT["a"] = 1.0
    assert run(steps[:1]) == ["a"]  # the driver died before it came to b and d
    reasons = {line.step.name: line.reason for line in dag.plan(steps, str(tmp_path))}
    assert reasons["b"] == reasons["d"] == "input a was made anew and differs"
    assert run(steps) == ["b", "d"]


def test_measured_fields_are_no_part_of_a_result():
    assert content_of(Value(value=1.0, seconds=3.0)) == content_of(Value(value=1.0, seconds=4.0))
    assert content_of(Value(value=1.0)) != content_of(Value(value=1.5))
