"""Statistics of many runs: arrays in, arrays out.

Returns and scores are arrays [..., K tasks, O objectives, S seeds]; resample() puts its draws in
front. So every function takes what was measured and what was drawn from it alike:

    scores = normalise(raw, zero, one)
    mean, draws = means(scores), means(resample(scores))
    low, high = interval(draws)
"""

import bisect
import math
from functools import partial

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

    That is the stratified bootstrap of Agarwal et al. (2021). Every objective draws on its own,
    though runs of one seed begin with the same weights and noise: seed_correlation() says how much
    that matters. The same numbers at every call.
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


def seed_correlation(scores: np.ndarray) -> float:
    """scores [K, O, S] -> the correlation of two objectives' runs of one task and seed.

    The mean over all pairs of objectives, of what is left without the mean of task and objective.
    NaN where fewer than two objectives have any spread.
    """
    left = by_objective(scores - scores.mean(-1, keepdims=True))  # [O, K * S]
    left = left[left.std(-1) > 0]  # without spread there is no correlation
    found = np.atleast_2d(np.corrcoef(left))[np.triu_indices(len(left), 1)]
    return float(found.mean()) if len(found) else math.nan


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
        rounding = 1e-12 * max(1, np.abs(both).max())
        as_large += int((np.abs(dealt) >= np.abs(x.mean() - y.mean()) - rounding).sum())
    return (1 + as_large) / (1 + times)  # the deal that was observed counts as one


def holm(p: np.ndarray) -> np.ndarray:
    """p values [n] -> the same, corrected for being n (Holm 1979)."""
    order = np.argsort(p)
    grown = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = grown.clip(max=1)
    return corrected


def is_seen(
    x: np.ndarray, y: np.ndarray, difference: float, seeds: int, level: float, power: float = 0.8
) -> bool:
    """Whether permutation_test() sees such a difference of means at this two-sided level.

    With this power, if each side has so many seeds, runs spread within a task as x, y [K, S] do,
    and the difference varies between tasks as theirs does. (The more it varies, the wider is the
    distribution of the permutations, and the less is seen.) By normal approximations.
    """
    tasks = len(x)
    within = x.var(-1, ddof=1) + y.var(-1, ddof=1)  # [K]
    apart = x.mean(-1) - y.mean(-1)
    apart = apart - apart.mean() + difference  # in each task
    measured = within.sum() / seeds / tasks**2  # the variance of the difference that is measured
    squares = (seeds - 1) * within + seeds * apart**2 / 2  # distances to the mean of both sides
    dealt = (2 / seeds * squares / (2 * seeds - 1)).sum() / tasks**2  # variance over the deals
    critical = stats.norm.ppf(1 - level / 2) * np.sqrt(dealt)
    return bool(difference >= critical + stats.norm.ppf(power) * np.sqrt(measured))


def detectable(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """x, y [K, S] -> the smallest difference that is_seen() with S seeds; infinite above 100."""
    steps = range(1, 100_001)
    seeds = x.shape[-1]
    first = bisect.bisect_left(
        steps, True, key=lambda step: is_seen(x, y, step / 1000, seeds, level)
    )
    return steps[first] / 1000 if first < len(steps) else math.inf


def seeds_to_detect(x: np.ndarray, y: np.ndarray, difference: float, level: float) -> int:
    """x, y [K, S] -> with how many seeds a difference is_seen(): at least 2, at most 1,000,000."""
    counts = range(2, 1_000_000)
    key = partial(is_seen, x, y, difference, level=level)
    return 2 + bisect.bisect_left(counts, True, key=key)


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
