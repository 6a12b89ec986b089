"""Items on evaluators: each result once and in full, whoever dies; and the bookkeeping beneath."""

import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError, WorkerLost

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def spread() -> Iterator[Callable[..., Any]]:
    """`map_on_actors` on a Ray of two CPUs."""
    import ray

    from infra.cluster import map_on_actors

    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield partial(map_on_actors, cpus=1, gpus=0)
    ray.shutdown()


def squares() -> Callable[[int], int]:
    return lambda item: item * item


def fragile(folder: str, deaths: dict[int, int]) -> Callable[[int], int]:
    """Dies at an item as often as told; a file counts, since memory dies too."""

    def work(item: int) -> int:
        mark = Path(folder) / f"{item}"
        died = len(mark.read_text()) if mark.exists() else 0
        if died < deaths.get(item, 0):
            mark.write_text("x" * (died + 1))
            os._exit(1)
        return item * item

    return work


def test_every_item_comes_once(spread: Callable[..., Any]) -> None:
    found = sorted(spread(squares, range(20), actors=2))
    assert found == [(i, i * i) for i in range(20)]


def test_items_of_lost_actors_are_given_out_again(
    spread: Callable[..., Any], tmp_path: Path
) -> None:
    make = partial(fragile, str(tmp_path), {0: 1, 3: 2, 7: 1})
    found = sorted(spread(make, range(8), actors=2))
    assert found == [(i, i * i) for i in range(8)]
    assert (tmp_path / "3").read_text() == "xx"


def test_an_item_that_kills_every_actor_ends_the_map(
    spread: Callable[..., Any], tmp_path: Path
) -> None:
    make = partial(fragile, str(tmp_path), {1: 99})
    with pytest.raises(WorkerLost, match="3 evaluators died at item 1"):
        list(spread(make, range(3), actors=1))


def test_what_the_work_raises_is_raised_here(spread: Callable[..., Any]) -> None:
    def make() -> Callable[[int], int]:
        raise UserError("reference.weights: broken")

    with pytest.raises(UserError, match=r"reference\.weights: broken"):
        list(spread(make, range(3), actors=2))


def test_more_actors_than_the_cluster_holds_are_not_waited_for(
    spread: Callable[..., Any],
) -> None:
    found = sorted(spread(squares, range(6), actors=5))
    assert [index for index, _ in found] == list(range(6))


def test_a_slow_item_holds_the_others_back(spread: Callable[..., Any]) -> None:
    """Results in memory stay few: what is done may run ahead of the slowest by so much only."""
    from infra.cluster import AHEAD

    def make() -> Callable[[int], int]:
        def work(item: int) -> int:
            time.sleep(3 if item == 0 else 0)
            return item

        return work

    before_the_slow_one = []
    for index, _ in spread(make, range(40), actors=2):
        if index == 0:
            break
        before_the_slow_one.append(index)
    assert max(before_the_slow_one, default=0) < 2 * AHEAD


def test_no_actor_outlives_the_map(spread: Callable[..., Any]) -> None:
    import ray

    results = spread(squares, range(10), actors=2)
    next(results)
    results.close()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < deadline, "an actor holds on to its CPU"
        time.sleep(0.1)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_taking_losing_and_doubling_finishes_each_item_once(seed: int) -> None:
    from infra.cluster import _Items

    rng = random.Random(seed)
    queue, out, done = _Items(30, ahead=6), [], []
    while queue.open():
        if rng.random() < 0.6 and (index := queue.take()) is not None:
            assert index < min(set(range(30)) - set(done)) + 6
            out.append(index)
        elif out:
            index = out.pop(rng.randrange(len(out)))
            event = rng.random()
            if event < 0.1:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("infra.cluster.MAX_LOSSES", 99)
                    queue.lost(index, "died")
                continue
            assert queue.finish(index) is (index not in done)
            done.append(index)
            if event > 0.8:  # the same result again
                assert queue.finish(index) is False
    assert sorted(done) == list(range(30))
