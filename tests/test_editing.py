"""The edit loop: orthogonal transforms, what is known stays, and closed forms on Gaussian data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency.editing import (
    Channels,
    Known,
    Patches,
    Pixels,
    colorization,
    edit,
    inpainting,
    nothing,
    orthogonal_from,
    patch_means,
    slerp,
    slerp_noise,
    super_resolution,
)
from consistency.sampling import sample_multistep, sample_noise

V, EPS = 0.01, 0.002  # data so narrow that the clamp never acts
SIGMAS = [80.0, 12.0, 2.0, 0.5]
SHAPE = (3, 8, 8)


def noise_of(indices, seed=0, shape=SHAPE):
    return lambda draw: sample_noise(seed, indices, shape, draw)


def exact_f(x, sigma, labels=None):
    """Consistency function of Gaussian data N(0, V)."""
    return x * ((V + EPS**2) / (V + sigma.view(-1, 1, 1, 1) ** 2)).sqrt()


def crooked_f(x, sigma, labels=None):
    """Elementwise, so bitwise independent of the batch; far from anything's exact map."""
    shift = 0 if labels is None else labels.view(-1, 1, 1, 1)
    return 1.5 * torch.sin(3 * x + sigma.view(-1, 1, 1, 1) + shift)


def run(known, f=crooked_f, count=4, sigmas=SIGMAS, **more):
    shape = tuple(known.y.shape[1:])
    noise = more.pop("noise", noise_of(range(count), shape=shape))
    return edit(f, noise, known.y, sigmas, known.transform, known.mask, **more)


def images(count=4, shape=SHAPE, seed=9):
    return sample_noise(seed, range(count), shape).clamp(-1, 1)


def half(shape=SHAPE):
    mask = torch.zeros(1, 1, *shape[1:])
    mask[..., shape[2] // 2 :] = 1
    return mask


# ---- transforms ----------------------------------------------------------------------------


@given(
    p=st.integers(1, 9),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_patches_are_orthogonal_and_coefficient_0_is_the_mean(p, rows, columns, channels, seed):
    shape = (channels, rows * p, columns * p)
    x, other = (sample_noise(s, range(2), shape).double() for s in (seed, seed + 100))
    transform = Patches(p)
    a, b = transform.forward(x), transform.forward(other)
    assert a.shape == (2, channels, rows, columns, p * p)
    torch.testing.assert_close(transform.inverse(a), x)
    torch.testing.assert_close((a * b).sum(), (x * other).sum())
    torch.testing.assert_close(a[..., 0], p * torch.nn.functional.avg_pool2d(x, p))


@given(first=st.lists(st.floats(0.05, 2), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_channels_are_orthogonal_and_coefficient_0_is_along_the_first(first, seed):
    q = orthogonal_from(first)
    torch.testing.assert_close(q.T @ q, torch.eye(len(first), dtype=torch.float64))
    along = torch.tensor(first, dtype=torch.float64)
    torch.testing.assert_close(q[:, 0], along / along.norm())
    x = sample_noise(seed, range(2), (len(first), 2, 3)).double()
    transform = Channels(tuple(first))
    torch.testing.assert_close(transform.inverse(transform.forward(x)), x)
    torch.testing.assert_close(transform.forward(x).norm(), x.norm())


def test_the_colour_basis_is_the_papers():
    rows = [(0.4471, -0.8204, 0.3563), (0.8780, 0.4785, 0.0), (0.1705, -0.3129, -0.9343)]
    q = orthogonal_from((0.2989, 0.5870, 0.1140))
    torch.testing.assert_close(q, torch.tensor(rows).double(), atol=1e-4, rtol=0)


def test_the_reflection_of_patches_has_the_first_column_1_over_p():
    p = 4
    basis = torch.eye(p * p, dtype=torch.float64).view(p * p, 1, 1, 1, p * p)
    q = Patches(p).inverse(basis).flatten(1)
    torch.testing.assert_close(q[0], torch.full((p * p,), 1 / p, dtype=torch.float64))
    torch.testing.assert_close(q @ q.T, torch.eye(p * p, dtype=torch.float64))


# ---- the loop ------------------------------------------------------------------------------


EDITS = {
    "inpaint": lambda: inpainting(images(), half()),
    "colorize": lambda: colorization(images(shape=(1, 8, 8))),
    "superres 2": lambda: super_resolution(images(shape=(3, 4, 4)), 2),
    "superres 4": lambda: super_resolution(images(shape=(3, 2, 2)), 4),
    "superres all": lambda: super_resolution(images(shape=(3, 1, 1)), 8),
}


@pytest.mark.parametrize("name", EDITS)
def test_known_coefficients_hold_after_a_run_and_the_others_are_drawn(name):
    known = EDITS[name]()
    x = run(known)
    wanted, found = known.transform.forward(known.y), known.transform.forward(x)
    fixed = ~known.mask.bool().expand(wanted.shape)
    torch.testing.assert_close(found[fixed], wanted[fixed], atol=1e-5, rtol=0)
    assert (found - wanted)[~fixed].abs().mean() > 0.1
    assert not torch.equal(x[0], x[1])


def test_inpainting_keeps_what_is_there_bit_for_bit():
    y, mask = images(), half()
    x = run(inpainting(y, mask))
    assert torch.equal(x[..., :4], y[..., :4])
    each = torch.stack([half()[0], 1 - half()[0]] * 2)  # a mask of its own for every image
    x = run(inpainting(y, each))
    assert torch.equal(x[1, ..., 4:], y[1, ..., 4:])
    assert torch.equal(x[0, ..., :4], y[0, ..., :4])


def test_the_first_input_is_the_known_part_and_real_noise():
    """JCM's notebook added noise times an index, 0, there (methods.md 4.3, trap 16)."""
    seen = []

    def f(x, sigma, labels):
        seen.append((x, sigma))
        return torch.full_like(x, 0.25)

    y, noise = images(), noise_of(range(4))
    x = run(inpainting(y, half()), f=f, sigmas=[10.0, 2.0])
    torch.testing.assert_close(seen[0][0], y * (1 - half()) + 10 * noise(0))
    assert seen[0][1].tolist() == [10.0] * 4
    after = torch.where(half().bool(), 0.25, y)
    torch.testing.assert_close(seen[1][0], after + math.sqrt(4 - EPS**2) * noise(1))
    torch.testing.assert_close(x, after)


def test_what_is_put_together_are_coefficients_not_pixels():
    """A^-1[(A y)(1 - M) + (A x) M]: with x in place of A x the details would be wrong (trap 15)."""
    out = images(seed=5)
    known = super_resolution(images(shape=(3, 4, 4)), 2)
    x = run(known, f=lambda x, sigma, labels: out)
    mean = torch.nn.functional.avg_pool2d
    up = torch.nn.functional.interpolate
    details = out - up(mean(out, 2), scale_factor=2)
    torch.testing.assert_close(x, known.y + details)


def test_with_everything_free_it_is_multistep_sampling():
    noise = noise_of(range(4))
    plain = sample_multistep(crooked_f, noise, SIGMAS)
    mask = torch.ones(1, 1, 8, 8)
    assert torch.equal(run(inpainting(images(), mask)), plain)
    assert torch.equal(run(nothing(images())), plain)


@pytest.mark.parametrize("name", EDITS)
def test_a_result_depends_on_its_index_not_on_its_batch(name):
    known, labels = EDITS[name](), torch.tensor([0, 1, 2, 3])
    whole = run(known, labels=labels)
    part = Known(known.y[2:], known.transform, known.mask)
    shape = tuple(known.y.shape[1:])
    again = run(part, labels=labels[2:], noise=noise_of([2, 3], shape=shape))
    assert torch.equal(again, whole[2:])


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([], "must decrease"),
        ([80.0, 80.0], "must decrease"),
        ([1.0, 2.0], "must decrease"),
        ([80.0, 0.001], "must lie in 0.002 to 80"),
        ([81.0, 1.0], "must lie in"),
        ([math.nan], "must lie in"),
    ],
)
def test_levels_that_make_no_sense_are_refused(sigmas, says):
    with pytest.raises(ValueError, match=says):
        run(inpainting(images(), half()), sigmas=sigmas)


def test_what_cannot_be_edited_is_refused():
    with pytest.raises(ValueError, match="1 channels, the basis 3"):
        run(Known(images(shape=(1, 8, 8)), Channels(), torch.tensor([0, 1, 1]).view(3, 1, 1)))
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        colorization(images(shape=(2, 8, 8)))
    with pytest.raises(ValueError, match="patches of 3 do not divide images of 8x8"):
        run(patch_means(images(), 3))
    with pytest.raises(ValueError, match="factor 0"):
        super_resolution(images(), 0)


# ---- closed forms on N(0, V) ---------------------------------------------------------------


def test_inpainting_white_data_draws_the_free_pixels_with_their_variance():
    shape = (1, 8, 8)
    y = 0.1 * sample_noise(3, range(500), shape)
    x = run(inpainting(y, half(shape)), f=exact_f, count=500)
    assert torch.equal(x[..., :4], y[..., :4])
    assert x[..., 4:].std().item() == pytest.approx(0.1, rel=0.02)
    assert (x * y)[..., 4:].mean().item() == pytest.approx(0, abs=2e-4)  # independent of y


def test_a_correlated_pair_follows_the_recursion_of_its_mean_and_variance():
    """Two pixels, covariance [[1, r], [r, 1]] V, the first known: f* is linear, x2' = a x1 + b x2.

    The loop is known to be an approximation: the exact answer is N(r y, (1 - r^2) V).
    """
    r, count, y = 0.9, 2000, 0.1
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    scale = V * torch.tensor([1 + r, 1 - r])

    def matrix(sigma):
        return turn @ torch.diag(((scale + EPS**2) / (scale + sigma**2)).sqrt()) @ turn

    def f(x, sigma, labels):
        return (x.flatten(1) @ matrix(sigma[0].item())).view_as(x)

    sigmas = [80.0, 5.0, 0.8, 0.3, 0.15, 0.08, 0.04]
    mean, variance = 0.0, 0.0
    for step, sigma in enumerate(sigmas):
        a, b = matrix(sigma)[1].tolist()
        added = sigma**2 - (EPS**2 if step else 0)
        mean, variance = a * y + b * mean, b**2 * variance + (a**2 + b**2) * added
    shape = (1, 1, 2)
    known = inpainting(torch.full((count, *shape), y), half(shape))
    drawn = run(known, f=f, sigmas=sigmas, count=count)[..., 1]
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert drawn.std().item() == pytest.approx(math.sqrt(variance), rel=0.06)
    assert 0.5 * r * y < mean < r * y


def test_white_data_keep_their_variance_under_super_resolution_and_colour():
    y = 0.1 * sample_noise(3, range(300), SHAPE)
    for known in (patch_means(y, 2), Known(y, Channels(), torch.tensor([0, 1, 1]).view(3, 1, 1))):
        x = run(known, f=exact_f, count=300)
        assert x.std().item() == pytest.approx(0.1, rel=0.02)


def test_denoising_is_the_flow_map_of_the_noisy_image():
    clean = math.sqrt(V) * sample_noise(1, range(2000), SHAPE)
    sigma = 0.3
    noisy = clean + sigma * sample_noise(2, range(2000), SHAPE)
    x = run(nothing(noisy), f=exact_f, sigmas=[sigma], start=noisy, count=2000)
    torch.testing.assert_close(x, noisy * math.sqrt((V + EPS**2) / (V + sigma**2)))
    assert x.std().item() == pytest.approx(0.1, rel=0.01)
    twice = run(nothing(noisy), f=exact_f, sigmas=[sigma, 0.1], start=noisy, count=2000)
    assert twice.std().item() == pytest.approx(0.1, rel=0.01)


def test_a_stroke_is_followed_more_the_lower_its_first_level():
    guide = math.sqrt(V) * sample_noise(1, range(500), SHAPE)
    follows = []
    for sigma in (5.38, 0.1, 0.02):
        start = guide + sigma * sample_noise(4, range(500), SHAPE)
        x = run(nothing(guide), f=exact_f, sigmas=[sigma], start=start, count=500)
        assert x.std().item() == pytest.approx(0.1, rel=0.02)
        expected = V / math.sqrt(V * (V + sigma**2))  # correlation of x and the guide
        found = (x * guide).mean().item() / V
        assert found == pytest.approx(expected, abs=0.02)
        follows.append(found)
    assert follows == sorted(follows)


# ---- interpolation -------------------------------------------------------------------------


def test_interpolation_ends_are_the_two_samples_and_its_norm_stays():
    first, second = noise_of([7], seed=1), noise_of([7], seed=2)
    along = torch.linspace(0, 1, 9)

    def repeated(noise):
        return lambda draw: noise(draw).expand(9, -1, -1, -1)

    between = slerp_noise(repeated(first), repeated(second), along)
    frames = run(nothing(images(9)), noise=between)
    assert torch.equal(frames[:1], sample_multistep(crooked_f, first, SIGMAS))
    assert torch.equal(frames[-1:], sample_multistep(crooked_f, second, SIGMAS))
    norms = between(0).flatten(1).norm(dim=1)
    low, high = sorted((norms[0].item(), norms[-1].item()))
    assert 0.97 * low < norms.min() <= norms.max() < 1.03 * high


def test_each_sample_turns_by_its_own_angle():
    """Over a whole batch's norm (KIN, trap 15), 90 and 60 degrees would be one angle."""
    first = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    second = torch.tensor([[0.0, 3.0], [0.5, math.sqrt(3) / 2]])
    middle = slerp(first, second, torch.tensor([0.5, 0.5]))
    expected = [[3 / math.sqrt(2), 3 / math.sqrt(2)], [math.sqrt(3) / 2, 0.5]]
    torch.testing.assert_close(middle, torch.tensor(expected))
    same = slerp(first, first, torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(same, first)


def test_pixels_are_their_own_coefficients():
    x = images()
    assert torch.equal(Pixels().inverse(Pixels().forward(x)), x)
