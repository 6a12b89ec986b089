"""How good samples are: feature networks, their statistics, distances, and what makes two numbers
comparable.

    protocol    what was measured and how: names, digests, differences
    extractors  image -> features: the FID network and its company, checked by hash
    specs       the published networks as facts: layers, sizes, hashes, where to get the weights
    frechet     mean and covariance as mergeable sums, and the Frechet distance
    sets        metrics of whole feature sets: KID, Inception Score, precision, recall, FD-infinity
    npz         statistics files of other projects
    domain      the small classifier trained on the data at hand
"""
