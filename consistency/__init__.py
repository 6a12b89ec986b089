"""Consistency models as pure mathematics: numbers and tensors in, numbers and tensors out.

Symbols, the same in every module (Song et al. 2023, "Consistency Models"; Karras et al. 2022, EDM):

    x0          clean image, float32 [B, C, H, W] in [-1, 1]
    z           standard normal noise, the shape of x0
    sigma       noise level = standard deviation of the noise in x_sigma = x0 + sigma z; [B]
                (the papers' t; where one loss uses two levels, t is the noisier and r the cleaner)
    sigma_min   smallest level, the papers' epsilon = 0.002; f(x, sigma_min) = x
    sigma_max   largest level, the papers' T = 80; sampling starts from sigma_max z
    sigma_data  standard deviation of the data, 0.5
    rho         curvature of the Karras grid, 7
    D(x, sigma) denoiser: the expected clean image given x (the teacher)
    f(x, sigma) consistency function: the end, at sigma_min, of the ODE trajectory through x
    F           the raw network inside both: c_skip x + c_out F(c_in x, c_noise, labels)
    theta       the trained weights; theta- (target): their EMA with decay mu, used only in the loss
    N(k)        number of grid points (not intervals: those are N - 1) at progress k
    mu(k)       decay of the target EMA at progress k
    K           where the curricula end; k and K share one unit, by default images seen
    s0, s1      first and last number of discretisation steps of N(k)
    P_mean, P_std   mean and standard deviation of ln sigma in the log-normal laws
    q, stage    ECT: the relative gap 1 - r/t shrinks as q^-(stage + 1)
    beta        decay of a sampling EMA (never of the target: that one is mu)
    gamma       exponent of a power-function EMA; sigma_rel is its relative width
    labels      int64 [B], -1 = no class; None for a network without classes

Every noise level is a sigma, never a grid index, an angle or a time in [0, 1]; grids ascend.
"""

__version__ = "0.1.0"
