"""A stage put together: which weights it starts from, what it describes, what it hands back."""

from dataclasses import replace

import pytest
import torch

from consistency.config import NoiseConfig, PowerEMA, TeacherConfig
from consistency.loop import train
from consistency.stage import begin, describe, finish
from tests.every_kind import KINDS, NETWORK, about, fresh, images, run, teacher_weights, tensors

FROM_TEACHER = [kind for kind, config in KINDS.items() if getattr(config, "init", "") == "teacher"]
ASKS_TEACHER = ["cd", "scd", "tcm"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_weights_are_a_function_of_the_seed_alone(kind):
    config, teacher = KINDS[kind], teacher_weights()

    def first(seed, noise):
        torch.manual_seed(noise)
        stage = begin(about(config), config, seed=seed, teacher_weights=teacher)
        return tensors(stage), torch.rand(1)

    weights, after = first(3, noise=0)
    again, other_after = first(3, noise=1)
    assert all(torch.equal(weights[name], value) for name, value in again.items())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert not torch.equal(after, other_after)
    other, _ = first(4, noise=0)
    same = all(torch.equal(weights[name], value) for name, value in other.items())
    assert same == (kind in FROM_TEACHER)


@pytest.mark.parametrize("kind", KINDS)
def test_target_and_averages_start_as_copies_of_the_network_not_as_itself(kind):
    config = KINDS[kind]
    state = begin(about(config), config, seed=0, teacher_weights=teacher_weights()).state
    copies = [*state.averages.values()]
    assert (state.target is not None) == (kind in ("cd", "ct-2023"))
    if state.target is not None:
        copies.append(state.target.state_dict())
        assert not any(p.requires_grad for p in state.target.parameters())
    own = state.net.state_dict()
    for copy in copies:
        assert copy.keys() == own.keys()
        for name, value in own.items():
            assert torch.equal(copy[name], value)
            assert copy[name].data_ptr() != value.data_ptr()
    assert (state.head is not None) == getattr(config, "adaptive_weight", False)


@pytest.mark.parametrize("kind", FROM_TEACHER)
def test_a_student_starts_from_its_teachers_weights(kind):
    config, weights = KINDS[kind], teacher_weights()
    state = begin(about(config), config, seed=0, teacher_weights=weights).state
    own = state.net.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value) for name, value in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_there_where_it_is_asked_frozen_and_in_eval_mode(kind):
    config, weights = KINDS[kind], teacher_weights()
    stage = begin(about(config), config, seed=0, teacher_weights=weights)
    assert (stage.teacher is not None) == (kind in ASKS_TEACHER)
    if stage.teacher is not None:
        assert not stage.teacher.training
        assert not any(p.requires_grad for p in stage.teacher.parameters())
        for name, value in stage.teacher.state_dict().items():
            assert torch.equal(value, weights[name])


@pytest.mark.parametrize("kind", ASKS_TEACHER)
def test_training_leaves_the_teacher_as_it_was(kind):
    stage = fresh(KINDS[kind])
    before = {name: value.clone() for name, value in stage.teacher.state_dict().items()}
    next(run(stage))
    assert not stage.teacher.training
    assert all(torch.equal(before[k], value) for k, value in stage.teacher.state_dict().items())


def test_a_teacher_that_is_asked_but_missing_is_named():
    with pytest.raises(AssertionError, match="teacher's weights"):
        begin(about(KINDS["cd"]), KINDS["cd"], seed=0)


def test_dropout_is_that_of_the_config_and_the_teacher_has_none():
    stage = fresh(replace(KINDS["cd"], dropout=0.35, dropout_max_side=8))
    blocks = [m.dropout for m in stage.state.net.modules() if hasattr(m, "resample")]
    assert set(blocks) == {0.35}
    narrow = fresh(replace(KINDS["cd"], dropout=0.35, dropout_max_side=4))  # of 8 pixels
    assert {m.dropout for m in narrow.state.net.modules() if hasattr(m, "resample")} == {0.0}
    assert {m.dropout for m in stage.teacher.modules() if hasattr(m, "resample")} == {0.0}
    assert {m.dropout for m in stage.state.target.modules() if hasattr(m, "resample")} == {0.35}


# --- describe -----------------------------------------------------------------------------------

DESCRIBED = {  # kind -> (kind of model, boundary, lowest sigma)
    "teacher": ("denoiser", 0.002, 0.0),
    "teacher-weighted": ("denoiser", 0.002, 0.0),
    "cd": ("consistency", 0.002, 0.0),
    "ct-2023": ("consistency", 0.002, 0.0),
    "ict": ("consistency", 0.002, 0.0),
    "ect": ("consistency", 0.0, 0.0),
    "scd": ("consistency", 0.0, 0.0),
    "sct": ("consistency", 0.0, 0.0),
    "mean_flow": ("mean_flow", 0.002, 0.0),
    "tcm": ("consistency", 0.0, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_says_what_it_will_publish(kind):
    model = about(KINDS[kind])
    assert (model.kind, model.boundary, model.lowest_sigma) == DESCRIBED[kind]
    assert (model.size, model.channels, model.class_names) == (8, 1, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("boundary", "expected"), [(None, 0.01), (0, 0), (0.0, 0.0), (0.003, 0.003)]
)
@pytest.mark.parametrize("kind", ["ect", "ict", "tcm"])
def test_the_boundary_published_is_the_boundary_trained(kind, boundary, expected):
    """Also when it is the whole number 0."""
    config = replace(KINDS[kind], boundary=boundary)
    noise = NoiseConfig(sigma_min=0.01)
    stage = fresh(config, noise=noise)
    assert stage.description.boundary == expected
    assert stage.objective.boundary == expected
    assert finish(stage).function.sigma_min == expected
    assert stage.objective.function(stage.state.net).sigma_min == expected


# --- finish -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_model_is_the_first_average_in_eval_mode(kind):
    stage = fresh(replace(KINDS[kind], warmup_images=0))
    next(run(stage))
    model = finish(stage)
    weights = model.function.net.state_dict()
    first = stage.state.averages["constant-0.9"]
    assert all(torch.equal(weights[name], value) for name, value in first.items())
    trained = stage.state.net.state_dict()
    assert not all(torch.equal(weights[name], value) for name, value in trained.items())
    assert not any(module.training for module in model.function.net.modules())
    assert not any(p.requires_grad for p in model.function.parameters())
    power = finish(stage, PowerEMA(sigma_rel=0.1).name).function.net.state_dict()
    other = stage.state.averages["power-0.1"]
    assert all(torch.equal(power[name], value) for name, value in other.items())


def test_the_lines_that_the_module_shows_train_and_sample():
    config = TeacherConfig(images=16, batch=8)
    model = describe(
        config, network=NETWORK, noise=NoiseConfig(), size=8, channels=1, class_names=()
    )
    model = replace(model, network=replace(NETWORK, class_conditional=False))
    stage = begin(model, config, seed=0)
    data = images()
    logs = list(train(stage.state, stage.objective, data, config, teacher=stage.teacher))
    assert [log.images for log in logs] == [8, 16]
    assert finish(stage).generate(range(2), steps=2, seed=0).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("boundary", [None, 0.0])
def test_training_starts_where_the_teacher_stands(boundary):
    """Copied weights and EDM's coefficients: f is the denoiser, but for the shift to sigma_min."""
    config = replace(KINDS["ect"], boundary=boundary)
    weights = teacher_weights()
    stage = begin(about(config), config, seed=0, teacher_weights=weights)
    denoiser = begin(about(KINDS["teacher"]), KINDS["teacher"], seed=0)
    denoiser.state.net.load_state_dict(weights)
    D = denoiser.objective.function(denoiser.state.net).eval()
    f = stage.objective.function(stage.state.net).eval()
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.5, 1.0, 5.0, 80.0])
    difference = (f(x, sigma) - D(x, sigma)).abs().max().item()
    assert (difference == 0) == (boundary == 0.0)
    assert difference < 0.02


def test_the_distilled_models_weights_are_first_ones_like_the_teachers():
    config, weights = KINDS["ict"], teacher_weights()
    begun = begin(about(config), replace(config, init="distilled"), seed=0, teacher_weights=weights)
    for name, value in begun.state.net.state_dict().items():
        assert torch.equal(value, weights[name])
    assert begun.teacher is None
