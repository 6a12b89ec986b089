import math

import pytest
import torch

from consistency.distances import huber_c, l1, pseudo_huber, squared_l2


def pair(residual_std, batch=4, shape=(3, 32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(batch, *shape, generator=generator)
    return b + residual_std * torch.randn(batch, *shape, generator=generator), b


def huber(a, b):
    return pseudo_huber(a, b, huber_c(a.shape[1:]))


ALL = [l1, squared_l2, huber]


def test_distances_of_a_known_residual_are_closed_form():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert l1(a, b).tolist() == [0.5, 0.5]
    assert squared_l2(a, b).tolist() == [0.25, 0.25]
    norm2, c = 48 * 0.25, 0.03
    expected = math.sqrt(norm2 + c * c) - c
    assert pseudo_huber(a, b, c).tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize(("size", "c"), [(32, 0.029930), (64, 0.059860)])
def test_huber_c_matches_the_oracle(size, c):
    assert huber_c((3, size, size)) == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize("distance", ALL)
def test_distance_is_zero_only_at_equality_and_symmetric(distance):
    a, b = pair(0.1)
    assert distance(a, a).tolist() == [0] * 4
    assert bool((distance(a, b) > 0).all())
    assert torch.equal(distance(a, b), distance(b, a))


@pytest.mark.parametrize("distance", ALL)
def test_rows_do_not_see_each_other(distance):
    a, b = pair(0.1)
    together, alone = (
        distance(a, b),
        torch.cat([distance(a[i : i + 1], b[i : i + 1]) for i in range(4)]),
    )
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert together.shape == (4,)


@pytest.mark.parametrize("residual_std", [0.003, 0.03, 0.3])
def test_pseudo_huber_gradient_has_norm_near_one_whatever_the_residual(residual_std):
    a, b = pair(residual_std, batch=1)
    a.requires_grad_()
    huber(a, b).sum().backward()
    assert 0.97 < a.grad.norm().item() <= 1.0 + 1e-5


@pytest.mark.parametrize("c", [0.0, 1e-8, 0.03])
def test_pseudo_huber_gradient_is_zero_not_nan_at_equality(c):
    a = torch.randn(2, 3, 4, 4, requires_grad=True)
    pseudo_huber(a, a.detach().clone(), c).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_pseudo_huber_with_c_zero_is_the_norm_also_in_gradient():
    a, b = pair(0.1)
    a.requires_grad_()
    distance = pseudo_huber(a, b, 0.0)
    norm = (a - b).flatten(1).norm(dim=1)
    torch.testing.assert_close(distance, norm)
    (of_distance,) = torch.autograd.grad(distance.sum(), a)
    (of_norm,) = torch.autograd.grad(norm.sum(), a)
    torch.testing.assert_close(of_distance, of_norm)


def test_pseudo_huber_far_below_c_is_half_the_squared_norm_over_c():
    a, b = torch.full((1, 4), 1e-5), torch.zeros(1, 4)
    assert pseudo_huber(a, b, 0.03).item() == pytest.approx(4e-10 / 0.06, rel=1e-4)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_reduced_in_float32_without_overflow(distance, dtype):
    a = torch.full((2, 3, 32, 32), 60.0, dtype=dtype)
    out = distance(a, -a)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, distance(a.float(), -a.float()))
    assert torch.isfinite(out).all()


def test_each_distance_gives_another_gradient():
    gradients = []
    for distance in ALL:
        a, b = pair(0.1, batch=1)
        a.requires_grad_()
        distance(a, b).sum().backward()
        gradients.append(a.grad)
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])


@pytest.mark.parametrize("distance", ALL)
def test_shapes_that_would_broadcast_are_refused(distance):
    with pytest.raises(ValueError, match="unequal shapes"):
        distance(torch.zeros(4, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_negative_c_is_refused():
    with pytest.raises(ValueError, match="c >= 0"):
        pseudo_huber(torch.zeros(1, 1), torch.zeros(1, 1), -0.1)


def test_pseudo_huber_of_nan_is_nan():
    broken = torch.full((2, 1, 2, 2), float("nan"))
    for c in (0.0, 0.03):
        assert torch.isnan(pseudo_huber(broken, torch.zeros_like(broken), c)).all()
