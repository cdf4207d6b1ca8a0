"""Statistics of repeated trainings: agreement of their answers (ICC), and exact tests of paired differences."""

from itertools import product

import numpy as np

MOST_EXACT = 16  # pairs of which all sign flips are tried
RESAMPLES = 1000
FLIPS = 20_000


def intraclass_correlations(scores: np.ndarray) -> dict[str, float]:
    """The six correlations of Shrout & Fleiss for ``scores`` (n targets, k judges), by name; NaN if nothing varies.

    ICC(1,.): each target has its own judges; ICC(2,.): the judges are a sample; ICC(3,.): they are all there are.
    (.,1): reliability of one judge's score; (.,k): of the mean of k.
    """
    x = np.asarray(scores, dtype=np.float64)
    n, k = x.shape
    deviation = x - x.mean()
    targets, judges = deviation.mean(1), deviation.mean(0)
    within = ((deviation - targets[:, None]) ** 2).sum()
    between_judges = n * (judges**2).sum()
    bms = k * (targets**2).sum() / (n - 1)
    wms = within / (n * (k - 1))
    jms = between_judges / (k - 1)
    ems = ((deviation - targets[:, None] - judges) ** 2).sum() / ((n - 1) * (k - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "ICC(1,1)": float(np.divide(bms - wms, bms + (k - 1) * wms)),
            "ICC(2,1)": float(np.divide(bms - ems, bms + (k - 1) * ems + k * (jms - ems) / n)),
            "ICC(3,1)": float(np.divide(bms - ems, bms + (k - 1) * ems)),
            "ICC(1,k)": float(np.divide(bms - wms, bms)),
            "ICC(2,k)": float(np.divide(bms - ems, bms + (jms - ems) / n)),
            "ICC(3,k)": float(np.divide(bms - ems, bms)),
        }


def icc_samples(scores: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Samples of ICC(2,1) by model over resampled targets, the same targets for all models."""
    random = np.random.default_rng(seed)
    n = len(next(iter(scores.values())))
    chosen = [random.integers(0, n, n) for _ in range(RESAMPLES)]
    return {
        name: np.array([intraclass_correlations(x[rows])["ICC(2,1)"] for rows in chosen]) for name, x in scores.items()
    }


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5; NaN if no sample is finite."""
    low, high = np.nanpercentile(samples, (2.5, 97.5)) if np.isfinite(samples).any() else (np.nan, np.nan)
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences: the share of sign flips with a mean at least as far from zero.

    Up to 16 pairs all flips are tried, otherwise 20 000 random ones. With n pairs no p-value is below 2 / 2ⁿ.
    """
    x = np.asarray(differences, dtype=np.float64)
    x = x[x != 0]  # a zero is the same under both signs
    if len(x) == 0:
        return 1.0
    exact = len(x) <= MOST_EXACT
    if exact:
        signs = np.array(list(product((1.0, -1.0), repeat=len(x))))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (FLIPS, len(x)))
    as_far = (np.abs(signs @ x) >= np.abs(x.sum()) * (1 - 1e-12)).sum()
    return float(as_far / len(signs)) if exact else float((as_far + 1) / (len(signs) + 1))


def resampled_means(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of ``differences`` drawn anew with replacement."""
    x = np.asarray(differences, dtype=np.float64)
    return x[np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))].mean(1)
