"""Levels of the edits: the paper's at full budget, tuned ones below, always within the model's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency.edit_presets import DEFAULT_STEPS, TASKS, TUNED, preset
from consistency.schedules import karras_sigmas


@pytest.mark.parametrize("task", ["inpaint", "colorize", "superres"])
def test_forty_steps_are_the_papers_grid(task):
    assert preset(task, 40) == karras_sigmas(40, 0.002, 80.0).flip(0).tolist()


def test_strokes_are_the_papers_at_its_size_and_scale_with_others():
    assert preset("stroke", 2) == [5.38, 2.24]
    assert preset("stroke", 1) == [5.38]
    assert preset("stroke", 2, size=64) == pytest.approx([5.38 / 2, 2.24 / 2])


def test_the_tuned_ends_are_used_as_they_stand():
    for task, tuned in TUNED.items():
        for steps, (first, last) in tuned.items():
            for size in (8, 16):
                levels = preset(task, steps, size=size)
                assert levels[0] == first
                assert levels[-1] == (last if steps > 1 else first)


def test_larger_images_begin_higher_where_something_large_is_missing():
    for task, factor in (("inpaint", 16), ("colorize", 16), ("superres", 1)):
        first, last = TUNED[task][8]
        levels = preset(task, 8, size=256)
        assert (levels[0], levels[-1]) == (factor * first, last)


def test_denoising_begins_with_the_noise_in_the_image():
    assert preset("denoise", 1, sigma=0.7) == [0.7]
    assert preset("denoise", 3, sigma=0.7)[0] == 0.7
    with pytest.raises(ValueError, match="needs sigma"):
        preset("denoise", 1)


@given(
    task=st.sampled_from(TASKS),
    steps=st.integers(1, 40),
    sigma_min=st.floats(0.001, 0.02),
    sigma_max=st.floats(20, 200),
    size=st.sampled_from([8, 32, 256, 512]),
)
@settings(max_examples=200, deadline=None)
def test_every_preset_decreases_within_the_models_levels(task, steps, sigma_min, sigma_max, size):
    levels = preset(task, steps, sigma_min, sigma_max, size=size, sigma=0.5)
    assert len(levels) == steps
    assert sigma_min <= levels[-1] <= levels[0] <= sigma_max
    assert levels == sorted(set(levels), reverse=True)


def test_a_model_of_high_levels_is_asked_for_those():
    assert preset("inpaint", 8, sigma_min=1.0, size=16)[::7] == [2.0, 1.0]


def test_what_has_no_levels_is_refused():
    for steps in (0, 41):
        with pytest.raises(ValueError, match=f"inpaint: {steps} steps are not in 1 to 40"):
            preset("inpaint", steps)
    with pytest.raises(ValueError, match="'repaint' is no edit; there are inpaint"):
        preset("repaint", 1)
    for sigma in (0.0, 81.0, float("nan")):
        with pytest.raises(ValueError, match="do not fit into this model's levels"):
            preset("denoise", 1, sigma=sigma)
    with pytest.raises(ValueError, match="do not fit"):  # a model of high levels only
        preset("stroke", 2, sigma_min=2.0, size=32)


def test_every_task_has_a_default():
    assert set(DEFAULT_STEPS) == set(TASKS)
