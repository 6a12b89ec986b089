"""How good samples are: feature networks, their statistics, distances, and what makes two numbers
comparable.

    protocol    what was measured and how: names, digests, differences
    extractors  image -> features: the FID network and its company, checked by hash
    frechet     mean and covariance as mergeable sums, and the Frechet distance
    sets        metrics of whole feature sets: KID, precision, recall, density, coverage, FD-infinity
    domain      the small classifier trained on the data at hand
"""
