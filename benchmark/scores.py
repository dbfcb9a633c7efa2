"""Statistics of many runs: arrays in, arrays out.

Returns and scores are arrays [..., K tasks, O objectives, S seeds]; resample() puts its draws in
front. So every function takes what was measured and what was drawn from it alike:

    scores = normalise(raw, zero, one)
    mean, draws = means(scores), means(resample(scores))
    low, high = interval(draws)
"""

import numpy as np
from scipy import stats


def best_returns(raw: np.ndarray, best: str) -> np.ndarray:
    """raw [K, O, S] -> what scores 1 in each task, [K].

    best: "run", the best single run, or "objective", the mean of the best objective.
    """
    return raw.max((1, 2)) if best == "run" else raw.mean(2).max(1)


def normalise(raw: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """raw [K, O, S], shifted and scaled so that zero [K] becomes 0 and one [K] becomes 1."""
    return (raw - zero[:, None, None]) / (one - zero)[:, None, None]


def by_objective(scores: np.ndarray) -> np.ndarray:
    """[..., K, O, S] -> [..., O, K * S]"""
    scores = np.moveaxis(scores, -3, -2)
    return scores.reshape(*scores.shape[:-2], -1)


def means(scores: np.ndarray) -> np.ndarray:
    """scores [..., K, O, S] -> [..., O]: the mean over tasks and seeds."""
    return by_objective(scores).mean(-1)


def interquartile_means(scores: np.ndarray) -> np.ndarray:
    """scores [..., K, O, S] -> [..., O]: the mean of the middle half of an objective's runs.

    Without the lowest and the highest n // 4 of its n runs (Agarwal et al. 2021).
    """
    return stats.trim_mean(by_objective(scores), 0.25, axis=-1)


def resample(scores: np.ndarray, times: int = 10_000) -> np.ndarray:
    """scores [K, O, S] -> [times, K, O, S]: runs drawn with replacement within each task.

    That is the stratified bootstrap of Agarwal et al. (2021). Every objective draws on its own. (In
    Table 1, runs of one seed begin with the same weights and noise, but the correlation of their
    returns is below 0.1.) The same numbers at every call.
    """
    drawn = np.random.default_rng(0).integers(scores.shape[-1], size=(times, *scores.shape))
    return np.take_along_axis(scores[np.newaxis], drawn, axis=-1)


def interval(draws: np.ndarray) -> np.ndarray:
    """draws [times, ...] -> the ends of the 95% interval, [2, ...]"""
    return np.percentile(draws, [2.5, 97.5], axis=0)


def mean_interval(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [S seeds, ...] -> mean [...], and its bootstrap 95% interval: low [...], high [...].

    The same numbers at every call. Whole seeds are drawn, so the points of a curve stay together.
    """
    seeds = len(x)
    # how often each seed is drawn, in each of 10,000 resamples
    counts = np.random.default_rng(0).multinomial(seeds, [1 / seeds] * seeds, size=10_000)
    return x.mean(0), *interval(np.tensordot(counts, x, 1) / seeds)


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x, y [..., K, S] -> [...]: the probability of improvement of x over y.

    That a run of x beats a run of y on the same task; a tie counts half; the mean over tasks
    (Agarwal et al. 2021).
    """
    wins = stats.mannwhitneyu(x, y, axis=-1, method="asymptotic").statistic
    return wins.mean(-1) / (x.shape[-1] * y.shape[-1])


def permutation_test(x: np.ndarray, y: np.ndarray, times: int = 100_000) -> float:
    """x, y [K, S] -> the two-sided p value of the difference of their means.

    If it made no difference which side a run is on, sides could be dealt out anew within each task:
    p is the share of deals whose difference is at least as large. The same number at every call.
    """
    seeds = x.shape[-1]
    both = np.concatenate([x, y], -1)
    rng = np.random.default_rng(0)
    as_large = 0
    for start in range(0, times, 10_000):  # all at once would be large
        count = min(10_000, times - start)
        deals = rng.permuted(np.broadcast_to(both, (count, *both.shape)), axis=-1)
        dealt = deals[..., :seeds].mean((1, 2)) - deals[..., seeds:].mean((1, 2))
        # other orders of the same sums round otherwise
        as_large += int((np.abs(dealt) >= np.abs(x.mean() - y.mean()) - 1e-12).sum())
    return (1 + as_large) / (1 + times)  # the deal that was observed counts as one


def holm(p: np.ndarray) -> np.ndarray:
    """p values [n] -> the same, corrected for being n (Holm 1979)."""
    order = np.argsort(p)
    grown = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = grown.clip(max=1)
    return corrected


def detectable(x: np.ndarray, y: np.ndarray, level: float, power: float = 0.8) -> float:
    """x, y [K, S] -> the smallest difference of two such means that a test would see.

    At this two-sided level, with this power, from the spread of runs within their task.
    """
    tasks, seeds = x.shape
    variance = (x.var(-1, ddof=1) + y.var(-1, ddof=1)).sum() / seeds / tasks**2
    return (stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)) * np.sqrt(variance)


def profiles(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """scores [K, O, S], thresholds [n] -> the share of runs above each, [O, n].

    A performance profile (Agarwal et al. 2021).
    """
    return (by_objective(scores)[..., np.newaxis] > thresholds).mean(1)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of x [..., n] and y [n]; equal numbers share their mean rank.

    scipy's spearmanr would compare all pairs of the many x.
    """
    ranks = stats.rankdata(x, axis=-1)
    others = np.broadcast_to(stats.rankdata(y), ranks.shape)
    return stats.pearsonr(ranks, others, axis=-1).statistic
