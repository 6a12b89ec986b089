"""TCM's second stage: who answers for which level, the weights of its two means, properties."""

import pytest
import torch
from torch import nn

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.method_config import TruncateConfig
from consistency.objectives import Nets, Progress, TruncatedObjective
from consistency.objectives.distance import Distance
from consistency.parameterization import ConsistencyFunction
from consistency.schedules import ect_r

NOISE = NoiseConfig()
START = Progress(0, 1000)


def objective(**changes):
    parts = {
        "noise": NOISE,
        "sigma_prime": 1.0,
        "nu": 0.01,
        "loc": 0.0,
        "scale": 0.2,
        "q": 2.0,
        "stage": 4,
        "k": 8.0,
        "b": 1.0,
        "max_ratio": None,
        "distance": Distance("squared_l2"),
        "weight": "uniform",
        "boundary": 0.0,
        "boundary_share": 0.25,
        "boundary_weight": 0.1,
    }
    return TruncatedObjective(**{**parts, **changes})


def images(count):
    return 0.5 * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def constant(value):
    return lambda x, sigma, labels: torch.full_like(x, value)


class Scale(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, c_noise, labels=None, gap=None):
        return self.dropout(self.a * x)


def f_of(net):
    return ConsistencyFunction(net, 0.5, 0.0).train()


def test_the_student_answers_from_sigma_prime_on_and_the_first_stage_below(draws):
    total = 4000
    nets = Nets(constant(0.0), constant(1.0), None, constant(2.0))
    terms = objective()(nets, Batch(images(total), None), START, draws(total))
    r = ect_r(terms.sigma, 4, 2.0)
    tied = torch.arange(total) < total // 4
    share = torch.where(tied, 0.1 * 4, 4 / 3)  # weight * total / tied, total / (total - tied)
    # Squared distances: 1 to the student's answer, 4 to the first stage's.
    expected = torch.where(r >= 1.0, 1.0, 4.0) * share
    torch.testing.assert_close(terms.per_sample, expected)
    for which in (r >= 1.0, (r < 1.0) & ~tied, tied):
        assert which.any()


def test_a_quarter_sits_at_sigma_prime_and_gets_the_first_stages_answer(draws):
    total, asked = 1000, {}

    def frozen(x, sigma, labels):
        asked["r"] = sigma
        return torch.full_like(x, 2.0)

    nets = Nets(constant(0.0), constant(1.0), None, frozen)
    terms = objective()(nets, Batch(images(total), None), START, draws(total))
    tied = terms.sigma == 1.0
    assert tied.sum().item() == 250
    assert (asked["r"][tied] < 1.0).all()
    assert (terms.sigma[~tied] > 1.0).all()
    assert (terms.sigma <= NOISE.sigma_max).all()
    torch.testing.assert_close(terms.per_sample[tied], torch.full((250,), 4 * 0.1 * 4))


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_the_loss_is_one_mean_plus_the_weighted_other(share, weight, draws):
    total = 500
    net = f_of(Scale())
    nets = Nets(net, net, None, constant(0.4))
    shape = objective(boundary_share=share, boundary_weight=weight)
    plain = objective(boundary_share=share, boundary_weight=(1 - share) ** -1 * share)
    batch = Batch(images(total), None)
    terms = shape(nets, batch, START, draws(total))
    # With that boundary weight every row has the same factor 1 / (1 - share).
    rows = plain(nets, batch, START, draws(total)).per_sample * (1 - share)
    tied = terms.sigma == 1.0
    expected = rows[~tied].mean() + weight * rows[tied].mean()
    torch.testing.assert_close(terms.per_sample.mean(), expected, rtol=1e-5, atol=0)


def test_ranks_and_micro_batches_add_up_to_the_whole_batch(draws):
    net = f_of(Scale())
    nets, batch = Nets(net, net, None, constant(0.4)), Batch(images(30), None)
    whole = objective()(nets, batch, START, draws(30)).per_sample
    parts = [
        objective()(nets, Batch(batch.images[a:b], None), START, draws(30, 0, a, b)).per_sample
        for a, b in ((0, 5), (5, 12), (12, 30))
    ]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_a_student_equal_to_the_first_stage_has_no_loss_where_t_is_r_under_dropout(draws):
    # The gap of q = 1e12 rounds to r = t: every target is then the student's own answer.
    net = f_of(Scale(dropout=0.5))
    torch.manual_seed(0)
    terms = objective(q=1e12, stage=0)(
        Nets(net, net, None, constant(9.0)), Batch(images(64), None), START, draws(64)
    )
    assert torch.count_nonzero(terms.per_sample) == 0
    x, sigma = torch.ones(64, 1, 2, 2), torch.ones(64)
    assert not torch.equal(net(x, sigma), net(x, sigma))


def test_only_the_online_pass_carries_gradients(draws):
    online, detached, frozen = Scale(), Scale(), Scale()
    terms = objective()(
        Nets(f_of(online), f_of(detached), None, f_of(frozen)),
        Batch(images(64), None),
        START,
        draws(64),
    )
    terms.per_sample.sum().backward()
    assert online.a.grad is not None
    assert detached.a.grad is None
    assert frozen.a.grad is None


def test_all_passes_see_the_same_noise_and_the_true_classes(draws):
    seen = {}

    def record(name):
        def f(x, sigma, labels):
            seen[name] = (x, sigma, labels)
            return torch.zeros_like(x)

        return f

    labels = torch.arange(64) % 5
    batch = Batch(images(64), labels)
    nets = Nets(record("online"), record("student"), None, record("first"))
    objective()(nets, batch, START, draws(64))
    noise = {name: (x - batch.images) / s.view(-1, 1, 1, 1) for name, (x, s, _) in seen.items()}
    torch.testing.assert_close(noise["online"], noise["student"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noise["online"], noise["first"], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(given, labels) for _, _, given in seen.values())


@pytest.mark.parametrize("boundary", [0.0, 0.002])
def test_a_wide_gap_ends_at_the_clean_image(boundary, draws):
    # Stage 0, q = 2: r = 0 at sigma_prime = 0.5, where the target is x0 without any network.
    asked = objective(sigma_prime=0.5, stage=0, boundary=boundary)
    batch = Batch(images(40), None)
    nets = Nets(constant(0.0), constant(float("nan")), None, constant(float("nan")))
    terms = asked(nets, batch, START, draws(40))
    tied = terms.sigma == 0.5
    expected = batch.images[tied].square().flatten(1).mean(1) * 0.1 * 4
    torch.testing.assert_close(terms.per_sample[tied], expected)


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_batch_that_has_no_image_on_one_side_is_refused(share):
    # round(0.95 x 8) = 8: the mean over the rest would be one over nothing.
    with pytest.raises(ValueError, match=r"^boundary_share: .* of a batch of 8"):
        TruncateConfig(method="tcm", images=64, batch=8, boundary_share=share)
