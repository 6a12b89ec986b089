"""MeanFlow: laws of the times, formulas against a second writing of them, dropout, guidance."""

import pytest
import torch
from torch import nn

from consistency.data import Batch
from consistency.method_config import SeparateTimes, SharedTimes
from consistency.objectives import MeanFlowObjective, Nets, Progress
from consistency.objectives import mean_flow as module
from consistency.objectives.mean_flow import draw_times, mean_flow_target, power_loss
from consistency.parameterization import MeanVelocity

START = Progress(0, 1000)


class Small(nn.Module):
    """Smooth in x and both times, with dropout and classes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(2)
        self.inner = nn.Conv2d(1, 8, 1)
        self.outer = nn.Conv2d(8, 1, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, c_noise, labels=None, gap=None):
        shift = (c_noise - 0.5 * gap).view(-1, 1, 1, 1)
        if labels is not None:
            shift = shift + 0.3 * labels.view(-1, 1, 1, 1)
        return self.outer(self.dropout(torch.tanh(self.inner(x) + shift)))


def objective(**changes):
    parts = {"times": SeparateTimes(), "apart": 0.75, "power": 0.75, "power_c": 1e-3}
    return MeanFlowObjective(**{**parts, **changes})


def images(count):
    return 0.5 * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))


# ---- times ---------------------------------------------------------------------------------


def quantiles(values):
    return values.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))


def sigmoid_normal(mean, std):
    """Quantiles .1, .5, .9 of sigmoid(N(mean, std^2))."""
    return torch.sigmoid(mean + std * torch.tensor([-1.2815516, 0.0, 1.2815516]).double())


def test_separate_times_follow_their_two_laws(draws):
    # r's law far below t's: their order is then never exchanged.
    t, r = draw_times(
        SeparateTimes(t_mean=2.0, t_std=0.3, r_mean=-4.0, r_std=0.6), 1.0, draws(50_000)
    )
    torch.testing.assert_close(quantiles(t), sigmoid_normal(2.0, 0.3), rtol=0.01, atol=0)
    torch.testing.assert_close(quantiles(r), sigmoid_normal(-4.0, 0.6), rtol=0.03, atol=0)


def test_shared_times_are_the_larger_and_the_smaller_of_two_draws(draws):
    t, r = draw_times(SharedTimes(P_mean=-0.4, P_std=1.0), 1.0, draws(50_000))
    assert (t > r).all()
    both = torch.cat([t, r])  # the pool of both is the law again
    torch.testing.assert_close(quantiles(both), sigmoid_normal(-0.4, 1.0), rtol=0.02, atol=0)
    # P(larger < median) = 1/4.
    assert (t < torch.sigmoid(torch.tensor(-0.4))).float().mean().item() == pytest.approx(
        0.25, abs=0.01
    )


def test_with_overlapping_laws_t_is_never_below_r(draws):
    t, r = draw_times(SeparateTimes(), 0.75, draws(20_000))
    assert (t >= r).all()
    assert (r > 0).all()
    assert (t < 1).all()


@pytest.mark.parametrize("apart", [0.0, 0.25, 0.75, 1.0])
def test_the_share_of_equal_times_is_exact_over_the_global_batch(apart, draws):
    t, r = draw_times(SharedTimes(), apart, draws(1000))
    assert (r < t).sum().item() == 1000 * apart
    parts = [
        draw_times(SharedTimes(), apart, draws(1000, 0, a, b)) for a, b in ((0, 700), (700, 1000))
    ]
    # To the last bit but one: vectorised functions treat the end of an array apart.
    torch.testing.assert_close(t, torch.cat([part[0] for part in parts]), rtol=1e-6, atol=0)
    torch.testing.assert_close(r, torch.cat([part[1] for part in parts]), rtol=1e-6, atol=0)


# ---- formulas ------------------------------------------------------------------------------


def test_the_target_and_the_power_loss_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    v, du = torch.randn(2, 5, 1, 2, 2, generator=generator).double()
    gap = torch.rand(5, generator=generator).double()
    for row in range(5):
        expected = v[row] - gap[row].item() * du[row]
        torch.testing.assert_close(mean_flow_target(v, du, gap)[row], expected)
    squares = torch.tensor([0.0, 1e-4, 0.3, 40.0], dtype=torch.float64, requires_grad=True)
    for p in (0.0, 0.5, 0.75, 1.0):
        loss = power_loss(squares, p, 1e-3)
        expected = [s / (s + 1e-3) ** p for s in squares.tolist()]
        assert loss.tolist() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(loss.sum(), squares)
        # The weight carries no gradient.
        assert gradient.tolist() == pytest.approx([(s + 1e-3) ** -p for s in squares.tolist()])


def test_the_loss_is_the_formula_with_a_finite_difference_for_the_derivative(draws):
    count, eps = 40, 1e-6
    net, batch = Small(), Batch(images(40), None)
    u = MeanVelocity(net)
    terms = objective()(Nets(u, u), batch, START, draws(count))
    again = draws(count)
    t, r = draw_times(SeparateTimes(), 0.75, again)
    e, x0 = again.normal(1, 2, 2).double(), batch.images.double()
    t, r = t.double(), r.double()
    exact = Small().double()

    def at(t, r):  # u(z_t, t, r) along this sample's own straight path, r fixed
        column = t.view(-1, 1, 1, 1)
        return exact((1 - column) * x0 + column * e, t, None, t - r)

    with torch.no_grad():
        du = (at(t + eps, r) - at(t - eps, r)) / (2 * eps)
        target = e - x0 - (t - r).view(-1, 1, 1, 1) * du
        squares = (at(t, r) - target).square().flatten(1).sum(1)
    expected = squares / (squares + 1e-3) ** 0.75
    torch.testing.assert_close(terms.per_sample.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.sigma.double(), t / (1 - t), rtol=1e-5, atol=0)


# ---- properties ----------------------------------------------------------------------------


def test_the_product_sees_the_dropout_masks_of_the_online_pass(monkeypatch, draws):
    seen, outputs = [], []
    real = module.directional_derivative

    def spy(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "directional_derivative", spy)
    net = MeanVelocity(Small(dropout=0.5)).train()

    def online(*inputs):
        outputs.append(net(*inputs))
        return outputs[-1]

    labels = torch.arange(16) % 3
    # With guidance two more passes lie between the two; they must not shift the masks.
    shape = objective(guidance=2.0, kappa=0.5, label_dropout=0.1)
    shape(Nets(online, net), Batch(images(16), labels), START, draws(16))
    torch.testing.assert_close(seen[0][0], outputs[0].detach(), rtol=1e-6, atol=1e-6)
    x, one = images(16), torch.ones(16)
    assert not torch.equal(net(x, one, one, None), net(x, one, one, None))


def test_only_the_online_pass_carries_gradients(draws):
    online, detached = MeanVelocity(Small()), MeanVelocity(Small())
    terms = objective()(Nets(online, detached), Batch(images(8), None), START, draws(8))
    terms.per_sample.sum().backward()
    assert all(p.grad is not None for p in online.parameters())
    assert all(p.grad is None for p in detached.parameters())


def test_the_power_changes_the_gradient_and_not_the_minimum(draws):
    gradients = []
    for power in (0.0, 0.75):
        net = MeanVelocity(Small())
        terms = objective(power=power)(Nets(net, net), Batch(images(8), None), START, draws(8))
        terms.per_sample.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.05)
    # Zero residual, zero loss.
    x = torch.zeros(3, dtype=torch.float64)
    assert torch.count_nonzero(power_loss(x, 0.75, 1e-3)) == 0


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_classes_are_hidden_only_when_told_and_alike_in_every_pass(share, draws):
    asked = []
    net = MeanVelocity(Small())

    def u(z, t, gap, labels):
        asked.append(labels)
        return net(z, t, gap, labels)

    labels = torch.arange(2000) % 3
    objective(label_dropout=share)(Nets(u, u), Batch(images(2000), labels), START, draws(2000))
    assert len(asked) == 2
    assert torch.equal(asked[0], asked[1])
    hidden = asked[0] < 0
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.04)
    assert torch.equal(asked[0][~hidden], labels[~hidden])


@pytest.mark.parametrize(("w", "kappa"), [(1.0, 0.0), (2.0, 0.0), (1.5, 0.4)])
def test_guidance_mixes_the_velocity_by_its_formula_where_there_is_a_class(w, kappa, draws):
    """w v + (1 - w - kappa) u(z, t, t | null) + kappa u(z, t, t | class), Eq. 20."""
    net, count = MeanVelocity(Small()), 60
    labels = torch.arange(count) % 3
    batch = Batch(images(count), labels)
    # All r = t, so the target is the velocity itself; p = 0 shows it in the gradient.
    shape = objective(apart=0.0, power=0.0, guidance=w, kappa=kappa, label_dropout=0.3)
    seen = {}

    def online(z, t, gap, labels):
        seen.update(z=z, t=t, labels=labels)
        seen["u"] = net(z, t, gap, labels).detach().requires_grad_()
        return seen["u"]

    shape(Nets(online, net), batch, START, draws(count)).per_sample.sum().backward()
    target = seen["u"].detach() - seen["u"].grad / 2
    z, t, given, zero = seen["z"], seen["t"], seen["labels"], torch.zeros(count)
    column = t.view(-1, 1, 1, 1)
    v = (z - batch.images) / column  # z = x0 + t (e - x0)
    with torch.no_grad():
        null = net(z, t, zero, torch.full_like(given, -1))
        own = net(z, t, zero, given)
    mixed = w * v + (1 - w - kappa) * null + kappa * own
    with_class = given >= 0
    assert 0 < with_class.sum() < count
    torch.testing.assert_close(target[with_class], mixed[with_class], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(target[~with_class], v[~with_class], rtol=1e-3, atol=1e-4)
