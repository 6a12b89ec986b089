"""A few seeded faults of `make chaos`, so that its harness and the product stay fit for it."""

from collections.abc import Callable, Iterator

import pytest

from tests.chaos import forked
from tests.chaos.forked import Bench, Skip, Story
from tests.chaos.invariants import Watch
from tests.chaos.place import Place


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = forked.undisturbed(tmp_path_factory.mktemp("chaos"), twice=False)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("scenario", "seed", "faults"),
    [
        pytest.param(forked.killed, 1, 3, id="driver-killed"),
        pytest.param(forked.killed_at_record, 1, 2, id="killed-at-a-record"),
        pytest.param(forked.terminated, 1, 1, id="asked-to-stop"),
        pytest.param(forked.full, 1, 1, id="disk-full"),
        pytest.param(forked.flipped, 0, 1, id="bit-of-a-shard"),
        pytest.param(forked.truncated, 3, 1, id="blank-commit"),
    ],
)
def test_after_a_fault_the_same_command_ends_as_if_undisturbed(
    bench: Bench, scenario: Callable[[Bench, int, int], Story], seed: int, faults: int
) -> None:
    try:
        story = scenario(bench, seed, faults)
    except Skip as reason:
        pytest.skip(str(reason))
    assert story.faults, "nothing was struck"
    assert story.wrong == []


def test_the_watch_sees_a_lost_commit_another_result_and_a_beginning_at_zero(
    bench: Bench,
) -> None:
    with bench.place("watch", 0) as place:
        bench.with_registry(place)
        kill = {"match": r"teacher/.*checkpoints/.*record.json done", "nth": 9, "do": "kill"}
        assert place.run(kill) == -9
        watch = Watch(place)
        watch.look()
        assert watch.images["teacher"] > 0
        lost = next(iter(watch.commits))
        _forget_training(place)
        assert place.run() == 0
        place.write(lost, place.read(lost).replace(b'"format": 1', b'"format":  1'))
        place.write(_weights(place), b"other weights")
        wrong = "\n".join(watch.close(bench.expected))
    assert "changed commit: steps/" in wrong
    assert "teacher began again: its curve is not the one before" in wrong
    assert "distill: weights.safetensors is not what its record says" in wrong


def _forget_training(place: Place) -> None:
    storage = place.storage()
    for path in place.files():
        if path.startswith("steps/teacher/") and "/checkpoints/" in path:
            storage.remove_tree(storage.join(place.workspace, path))


def _weights(place: Place) -> str:
    found = place.files("steps/distill")
    return next(path for path in found if path.endswith("weights.safetensors"))
