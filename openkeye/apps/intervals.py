"""How sure a mean over examples is."""

from typing import Any


def interval(values: Any, clips: Any, num_draws: int = 1000) -> list[float]:
    """95% interval of the mean by drawing clips again: questions of one clip are not independent."""
    import numpy as np

    rng = np.random.default_rng(0)
    names, places = np.unique(clips, return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    draws = rng.integers(len(names), size=(num_draws, len(names)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return [float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]
