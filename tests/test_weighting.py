"""Weights of the loss over noise levels."""

import pytest
import torch

from consistency.objectives.weighting import LossWeight, balanced, pair_weight
from consistency.parameterization import noise_label


def test_pair_weights_are_their_formulas():
    t, r = torch.tensor([[0.1, 1.0, 80.0], [0.0, 0.9, 79.0]], dtype=torch.float64)
    assert torch.equal(pair_weight("uniform", t, r, 0.5), torch.ones(3).double())
    torch.testing.assert_close(pair_weight("inverse_gap", t, r, 0.5), 1 / (t - r))
    expected = torch.tensor([104.0, 5.0, 4.00015625], dtype=torch.float64)
    torch.testing.assert_close(pair_weight("edm", t, r, 0.5), expected, rtol=1e-9, atol=0)


def test_a_learned_weight_balances_the_loss_at_its_minimum():
    loss = torch.tensor([1e-3, 0.2, 7.0], dtype=torch.float64)
    u = loss.log().requires_grad_()
    value = balanced(loss, u)
    torch.testing.assert_close(value, 1 + loss.log())
    value.sum().backward()
    torch.testing.assert_close(u.grad, torch.zeros(3).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("c_noise", ["log_sigma", "angle"])
def test_the_loss_weight_head_starts_at_zero_and_can_be_anything_in_between(c_noise):
    head = LossWeight(0.5, c_noise)
    sigma = torch.exp(torch.linspace(-6, 4.4, 200))
    assert torch.count_nonzero(head(sigma)) == 0
    again = LossWeight(0.5, c_noise)
    assert torch.equal(head.frequencies, again.frequencies)  # every rank's is the same
    wanted = torch.sin(4 * noise_label(sigma, 0.5, c_noise))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        (head(sigma) - wanted).square().mean().backward()
        optimizer.step()
    assert (head(sigma) - wanted).abs().mean().item() < 0.1
