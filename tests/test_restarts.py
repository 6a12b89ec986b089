"""When workers that die are started again, and when there is an end to it."""

import pytest

from infra import storage
from pipelines import restarts
from pipelines.restarts import Lives


@pytest.fixture
def work(tmp_path):
    return str(tmp_path / "work")


def test_lives_that_get_further_go_on_for_ever(work):
    verdicts = [restarts.begin(work, f"{n:012d}-ab").verdict(0) for n in range(50)]
    assert verdicts == [None] * 50


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_dying_at_one_place_ends_after_so_many_failures(work, max_failures):
    for _ in range(max_failures + 1):
        assert restarts.begin(work, "000000001024-ab").verdict(max_failures) is None
    restarts.because(work, "RuntimeError: boom (rank 1 of 2 on b)", mistake=False)
    verdict = restarts.begin(work, "000000001024-ab").verdict(max_failures)
    assert verdict == (
        f"workers died {max_failures + 1} times in a row at checkpoint 000000001024-ab; the last "
        f"one said: RuntimeError: boom (rank 1 of 2 on b)"
    )


def test_killed_ones_say_nothing(work):
    assert restarts.begin(work, None).verdict(0) is None
    verdict = restarts.begin(work, None).verdict(0)
    assert verdict is not None
    assert "at the start; the last one said: nothing: killed, or out of memory" in verdict


def test_a_mistake_of_the_users_is_not_tried_again(work):
    restarts.begin(work, None)
    restarts.because(work, "data.path: gone; mend it", mistake=True)
    lives = restarts.begin(work, None)
    assert (lives.verdict(9), lives.mistake) == ("data.path: gone; mend it", True)


def test_a_new_attempt_counts_anew(work):
    for _ in range(3):
        restarts.begin(work, None)
    restarts.forget(work)
    assert restarts.begin(work, None) == Lives(None)


def test_a_count_that_is_no_count_is_begun_anew(work):
    for text in (b"", b"[]", b'{"a": 1}'):
        storage.write_bytes(storage.join(work, restarts.FILE), text)
        assert restarts.begin(work, "x") == Lives("x")
