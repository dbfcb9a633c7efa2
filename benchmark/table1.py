"""The paper's Table 1 with ten seeds: 7 MuJoCo tasks x 11 objectives x 10 seeds, 1M steps each.

    python benchmark/table1.py                    # what is missing: hours on two cores
    python benchmark/table1.py --report           # the report alone, from the CSVs
    python benchmark/table1.py --preset modern    # four objectives, with today's usual details
    python benchmark/table1.py --tasks Hopper Swimmer --objectives none clip:0.2 --seeds 1 2
    python benchmark/table1.py --engine ray       # on a Ray cluster; see requirements-ray.txt
    python benchmark/table1.py -- --device cuda   # what follows -- goes to lockstep.py as it is

The unit is the cell: one task, objective and seed, a row of runs.csv. Cells of a task that are
missing there are trained side by side by one process of benchmark/lockstep.py, at most 44 agents at
a time; its run folder is under runs/. There is one such process on each core. Whatever stops this
command, even a power cut, the same command goes on from the last checkpoint and ends with the same
numbers.

In the preset `paper` a time limit is an end. 231 runs with exact bootstrapping instead, made when
`--preset paper` still meant that, are a table of their own:

    python benchmark/table1.py --report --results benchmark/results/table1-bootstrapped \
        --seeds 1 2 3 -- --bootstrap-truncated

To compare both treatments of time limits, two tasks have ten seeds of the other one as well:

    python benchmark/table1.py --results benchmark/results/time-limits \
        --tasks InvertedDoublePendulum HalfCheetah --objectives none clip:0.2 \
        -- --bootstrap-truncated

Results are benchmark/results/table1/, or table1-modern/: runs.csv, curves.csv and random.csv (what
the policies score that have learned nothing); from these alone the report makes summary.md and the
pictures. A clone holds the committed ones, so nothing is missing there: to run it all again, give a
folder of your own, --results mine.

`--report --freeze-scale` wrote scale.csv, once, when all 770 runs were in: what is 0 and what is 1.
The other tables are on that scale too. So whoever runs this table anew deletes it, freezes another,
and reports them again: the two commands above and --preset modern, each with --report; then
figure3.py --report, which reads PPO's runs here, and readme.py.
"""

import itertools
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import (
    Parser,
    UserError,
    cli,
    grids,
    markdown,
    number,
    plot,
    positive,
    scores,
    sweep,
    two_figures,
)
from benchmark.grids import LAYOUT, PAPER, TASKS, Grid

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = {
    "paper": grids.OBJECTIVES,
    "modern": ["none", "clip:0.2", "kl:1", "adaptive:0.01"],
}
SEEDS = {"paper": range(1, 11), "modern": range(1, 6)}
PLAN = Grid(TASKS, OBJECTIVES["paper"], list(SEEDS["paper"]))  # the table with ten seeds
HEADLINE = "Gaussian, best run"
READINGS = {  # of "random policy" and "best result", which the paper leaves open
    "Gaussian, best run": ("gaussian", "run"),
    "Gaussian, best objective": ("gaussian", "objective"),
    "uniform, best run": ("uniform", "run"),
    "uniform, best objective": ("uniform", "objective"),
}
KINDS = ("clip", "adaptive", "kl")  # of objectives: columns of the pictures
PLANNED = "clip:0.2"  # the objective that is tested against all others
PLANNED_FLAGS = grids.common_flags("paper", 1_000_000, [])  # of the runs in PLAN
SCALE = ROOT / "benchmark/results/table1/scale.csv"  # 0 and 1 of the table with ten seeds
SCALE_LINK = "[scale.csv](../table1/scale.csv)"  # from any folder of results
BOOTSTRAPPED = ROOT / "benchmark/results/table1-bootstrapped"  # all tasks, three seeds
TIME_LIMITS = ROOT / "benchmark/results/time-limits"  # two tasks, ten seeds


# ---------------------------------------------------------------------------------------- SCORES
def finite_returns(runs: pd.DataFrame) -> pd.Series:
    """The last_100_return of every run; NaN where it is not finite."""
    return sweep.numbers(runs["last_100_return"]).replace([np.inf, -np.inf], np.nan)


def fill_gaps(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Runs by cell, in which one without a finite return counts as the lowest of its task.

    And which these are. Where a task has no finite return at all, they stay without.
    """
    returns = finite_returns(runs)
    filled = returns.fillna(returns.groupby(level="env_id").transform("min"))
    found = [" ".join(map(str, cell)) for cell in runs.index[returns.isna() & filled.notna()]]
    return runs.assign(last_100_return=filled), found


def raw_returns(runs: pd.DataFrame, grid: Grid) -> np.ndarray:
    """The last_100_return of every cell, [K tasks, O objectives, S seeds].

    Raises UserError where one is missing.
    """
    returns = finite_returns(runs).reindex(grid.cells)
    missing = [" ".join(map(str, cell)) for cell in returns.index[returns.isna()]]
    if missing:
        what = f"{len(missing)} of {len(grid.cells)} runs are missing or have no return"
        raise UserError(f"{what}: {', '.join(missing)}")
    return returns.to_numpy().reshape([len(part) for part in grid])


def with_interval(estimate: float, draws: np.ndarray) -> str:
    low, high = scores.interval(draws)
    return f"{estimate:z.2f} [{low:z.2f}, {high:z.2f}]"


class Estimates(NamedTuple):
    """Average scores of O objectives: measured [O], and in every resample [times, O]."""

    measured: np.ndarray
    draws: np.ndarray

    def text(self, i: int) -> str:
        return with_interval(self.measured[i], self.draws[:, i])


def estimate(
    raw: np.ndarray, resampled: np.ndarray, scale: tuple, average=scores.means
) -> Estimates:
    """raw [K, O, S], its resamples [times, K, O, S] -> the average score of each objective.

    scale: zero [K] and one [K] of every task.
    """
    return Estimates(*(average(scores.normalise(x, *scale)) for x in (raw, resampled)))


def two_digits(score: float) -> str:
    """A score of the paper; empty where it has none."""
    return "" if pd.isna(score) else f"{score:.2f}"


def tell_scores(folder: Path, runs: pd.DataFrame, grid: Grid) -> str:
    """The normalised scores of a grid without a gap.

    runs: by cell. Draws scores.png. The first table goes into scores.md, too.
    """
    raw = raw_returns(runs, grid)
    resampled = scores.resample(raw)
    zeros = {}
    for policy in ("gaussian", "uniform"):
        zeros[policy] = grids.random_returns(folder / "random.csv", grid.tasks, policy)
    readings = {}
    for name, (zero, one) in READINGS.items():
        scale = zeros[zero], scores.best_returns(raw, one)
        readings[name] = estimate(raw, resampled, scale)
    own_scale = zeros["gaussian"], scores.best_returns(raw, "run")  # of HEADLINE
    mean = readings[HEADLINE]
    middle = estimate(raw, resampled, own_scale, scores.interquartile_means)
    theirs = PAPER["avg_normalized_score"].reindex(grid.objectives)
    draw_scores(folder / "scores.png", theirs, mean, middle)
    text = tell_headline(runs, grid, theirs, mean, middle)
    (folder / "scores.md").write_text(text)
    explained = ""
    scale = frozen_scale(grid.tasks)
    if scale is not None and not np.allclose(scale, own_scale):  # a table of other runs
        readings["frozen scale"] = estimate(raw, resampled, scale)
        explained = "\nFrozen scale: 0 and 1 are those of the table with ten seeds, "
        explained += f"{SCALE_LINK}.\n"
    if grid.objectives == OBJECTIVES["paper"]:
        explained += "\nThe intervals of the correlations are those of our runs alone: the paper's "
        explained += "scores count as exact.\nThey lie too close to 0: a resample has the noise of "
        explained += "the runs twice, and noise weakens a correlation.\n"
    return f"""## Scores

{text}
![Scores with intervals](scores.png)

Crosses: the paper's scores, which have another 0 and another 1: compare the order, not the levels.
The axis is cut between `none` and the others, where both are there; the sides differ in scale.

The paper gives the returns neither of its random policy nor of its best result. The mean score, \
for each choice of 0 and 1:

{markdown(readings_table(readings, grid.objectives, theirs))}{explained}
What is 0 and what is 1 in them:

{markdown(scale_table(raw, zeros, grid))}
"""


def tell_headline(
    runs: pd.DataFrame, grid: Grid, theirs: pd.Series, mean: Estimates, middle: Estimates
) -> str:
    """The table of scores, which objective is best and which is worst."""
    objectives, draws = grid.objectives, mean.draws
    table = []
    for i, objective in enumerate(objectives):
        row = {"objective": f"`{objective}`", "the paper": two_digits(theirs[objective])}
        row |= {"ours: mean [95%]": mean.text(i), "interquartile mean [95%]": middle.text(i)}
        table.append(row)
    best = mean.measured.argmax()
    worst, next_worst = mean.measured.argsort()[:2]
    at_least_behind = scores.interval(draws[:, [best]] - draws)[0]
    close = [f"`{o}`" for i, o in enumerate(objectives) if i != best and at_least_behind[i] <= 0]
    difference = mean.measured[next_worst] - mean.measured[worst]
    gap = with_interval(difference, draws[:, next_worst] - draws[:, worst])
    # the deviation of resamples divides by n, not n - 1
    too_narrow = 1 - math.sqrt(1 - 1 / len(grid.seeds))
    fewer = ""
    if grid.tasks != TASKS:
        fewer = "The paper's scores are averages over all seven tasks: these cannot be compared "
        fewer += "with them.\n"
    frozen = runs.loc[grid.cells].query("diverged_at != ''").groupby("objective").size()
    stopped = ""
    if len(frozen):
        counted = ", ".join(f"`{o}` {frozen[o]}" for o in objectives if o in frozen)
        stopped = "\nRuns that met a number that was not finite and kept their last weights: "
        stopped += f"{counted}.\n"
    return f"""{markdown(table)}
The return of the last 100 episodes, in each task 0 for the untrained Gaussian policy and 1 for \
the best single run,
averaged over {len(grid.tasks)} tasks x {len(grid.seeds)} seeds. \
Bootstrap 95% intervals, stratified by task; 0 and 1 stay fixed
in the resamples. With {len(grid.seeds)} seeds they are about {too_narrow:.0%} too narrow, more \
where one run is far off. The paper gives no intervals.
{fewer}
Highest is `{objectives[best]}`, in {(draws.argmax(1) == best).mean():.0%} of the resamples. The \
interval of the difference from it holds 0 for:
{", ".join(close) or "no other objective"}. Lowest is `{objectives[worst]}`, in \
{(draws.argmin(1) == worst).mean():.0%} of the resamples; the next one is higher by {gap}.
{stopped}"""


def readings_table(
    readings: dict[str, Estimates], objectives: list[str], theirs: pd.Series
) -> list[dict]:
    """The mean of every objective in every reading; with all eleven, correlations too."""
    table = []
    for i, objective in enumerate(objectives):
        row = {"objective": f"`{objective}`", "the paper": two_digits(theirs[objective])}
        table.append(row | {name: f"{mean.measured[i]:z.2f}" for name, mean in readings.items()})
    if objectives != OBJECTIVES["paper"]:
        return table
    everything = [True] * len(objectives)
    others = [objective != "none" for objective in objectives]
    for what, kept in (("", everything), (", without `none`", others)):
        row = {"objective": f"Spearman correlation with the paper{what} [95%]", "the paper": ""}
        for name, mean in readings.items():
            draws = scores.spearman(mean.draws[:, kept], theirs[kept])
            row[name] = with_interval(scores.spearman(mean.measured[kept], theirs[kept]), draws)
        table.append(row)
    return table


def scale_table(raw: np.ndarray, zeros: dict[str, np.ndarray], grid: Grid) -> list[dict]:
    """What may be 0 and what may be 1 in each task. raw [K, O, S], zeros: policy -> [K]"""
    table = []
    for k, task in enumerate(grid.tasks):
        means = raw[k].mean(1)
        o, s = np.unravel_index(raw[k].argmax(), raw[k].shape)
        run = f"`{grid.objectives[o]}`, seed {grid.seeds[s]}"
        table.append(
            {
                "task": task,
                "uniform": number(zeros["uniform"][k]),
                "Gaussian": number(zeros["gaussian"][k]),
                "best run": f"{number(raw[k].max())} ({run})",
                "best objective": f"{number(means.max())} (`{grid.objectives[means.argmax()]}`)",
            }
        )
    return table


# ------------------------------------------------------------------------------------- CONTRASTS
def freeze_scale(folder: Path) -> None:
    """Write scale.csv: what is 0 and what is 1 in the whole table, for all later ones.

    Raises UserError where a run or an untrained policy is missing, a run is of other settings, or a
    scale is there.
    """
    if folder.resolve() != SCALE.parent.resolve():
        raise UserError(f"the scale is that of {SCALE.parent}: give --freeze-scale there")
    if SCALE.exists():
        raise UserError(f"{SCALE} is frozen already, and other tables may be on it")
    table = sweep.Table(folder, LAYOUT)
    grids.check(table, PLANNED_FLAGS)
    raw = raw_returns(fill_gaps(table.by_key())[0], PLAN)
    path = folder / "random.csv"
    untrained = sweep.read(path).query("policy == 'gaussian'")
    measured = set(zip(untrained["env_id"], untrained["seed"].astype(int), strict=True))
    missing = sorted(set(itertools.product(PLAN.tasks, PLAN.seeds)) - measured)
    if missing:
        what = ", ".join(f"{task} {seed}" for task, seed in missing)
        raise UserError(f"random.csv has no Gaussian policy for {what}; run it without --report")
    rows = {
        "env_id": PLAN.tasks,
        "zero": grids.random_returns(path, PLAN.tasks, "gaussian", PLAN.seeds),
        "one": scores.best_returns(raw, "run"),
    }
    sweep.write(SCALE, pd.DataFrame(rows))


def frozen_scale(tasks: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Zero [K] and one [K] of scale.csv; None where it has not been frozen, or lacks a task."""
    if not SCALE.exists():
        return None
    scale = pd.read_csv(SCALE, index_col="env_id")
    if not set(tasks) <= set(scale.index):
        return None
    return scale.loc[tasks, "zero"].to_numpy(), scale.loc[tasks, "one"].to_numpy()


def tell_contrasts(folder: Path, runs: pd.DataFrame, grid: Grid, when: str) -> str:
    """`clip:0.2` against every other objective, and how small a difference could be detected.

    when: a key of WHEN. Draws profile.png.
    """
    raw, objectives = raw_returns(runs, grid), grid.objectives
    scale, which = frozen_scale(grid.tasks), f"the frozen scale, {SCALE_LINK}"
    if scale is None:
        zero = grids.random_returns(folder / "random.csv", grid.tasks, "gaussian")
        scale, which = (zero, scores.best_returns(raw, "run")), "the scale of this table"
    normalised = scores.normalise(raw, *scale)
    resampled = scores.resample(normalised)
    ours = objectives.index(PLANNED)
    others = [i for i in range(len(objectives)) if i != ours]
    mine = normalised[:, ours]
    tested = {}  # column -> the p values of all others
    if when != "before":
        p = np.array([scores.permutation_test(mine, normalised[:, i]) for i in others])
        tested = {"p": p, "p, Holm": scores.holm(p)}
    rows, counts = [], []
    levels = sorted({0.05, 0.05 / len(others)}, reverse=True)  # of one test, of the strictest
    for place, i in enumerate(others):
        other = normalised[:, i]
        draws = resampled[:, :, ours].mean((1, 2)) - resampled[:, :, i].mean((1, 2))
        better = scores.improvement(resampled[:1000, :, ours], resampled[:1000, :, i])
        row = {
            "against": f"`{objectives[i]}`",
            "difference [95%, each alone]": with_interval(mine.mean() - other.mean(), draws),
        }
        improvement = with_interval(scores.improvement(mine, other), better)
        row["probability of improvement [95%]"] = improvement
        row |= {name: p_text(p[place]) for name, p in tested.items()}
        smallest = [scores.detectable(mine, other, level) for level in levels]
        row["smallest detectable difference"] = " / ".join(f"{x:.2f}" for x in smallest)
        if grid.tasks == TASKS:  # the paper's scores are averages over these
            paper = PAPER["avg_normalized_score"]
            apart = abs(paper[PLANNED] - paper.get(objectives[i], math.nan))
            row["the paper's difference"] = row["seeds to detect that"] = ""
            if apart > 0:
                needed = [scores.seeds_to_detect(mine, other, apart, level) for level in levels]
                row["the paper's difference"] = f"{apart:.2f}"
                row["seeds to detect that"] = " / ".join(map(seeds_text, needed))
                counts.append(needed[-1])
        rows.append(row)
    power = ""
    if counts:
        enough = sum(n <= len(grid.seeds) for n in counts)
        power = f"With {len(grid.seeds)} seeds, {enough} of {len(counts)} differences as large as "
        power += "the paper's can be detected at the strictest level with a power of 80%; "
        power += f"to detect all of them takes {seeds_text(max(counts))} seeds.\n"
    correlation = scores.seed_correlation(normalised)
    paired = ""
    if not math.isnan(correlation):
        paired = "Runs of one seed start alike: the scores of two objectives with one seed "
        paired += f"correlate by {correlation:.2f} on average. Intervals and tests "
        paired += "treat them as independent"
        if correlation > 0:
            paired += "; that alone would make intervals too wide and p too large"
        paired += ".\n"
    strictest = ""
    if len(others) > 1:
        strictest = f"; then at 5% / {len(others)}, which the first of {len(others)} tests must "
        strictest += "pass after Holm's correction"
    seeds_needed = ""
    if grid.tasks == TASKS:
        seeds_needed = "Seeds to detect that: how many each objective would need to detect a "
        seeds_needed += "difference as large as the paper's, at the\nsame levels, if its scores "
        seeds_needed += "were on this scale.\n"
    draw_profiles(folder / "profile.png", normalised, objectives)
    return f"""## `{PLANNED}` against the others

{markdown(rows)}
On {which}, over {len(grid.tasks)} tasks x {len(grid.seeds)} seeds. {WHEN[when]}
Probability of improvement: that a run of `{PLANNED}` beats one of the other on the same task; a \
tie counts half.
Smallest detectable difference: with a power of 80%, from the spread of these runs, at a level of \
5%{strictest}.
{seeds_needed}These numbers are by normal approximations, which are rough where one run is far off.
{power}{paired}
![Performance profile](profile.png)

The share of runs, of all tasks, above a score.

"""


TEST = """The p values are of a permutation test, \
stratified by task. Its
null hypothesis: there is no difference in any task. Holm's correction is for all tests of this \
table, an interval is for
one: so an interval can exclude 0 although the corrected p is large."""
WHEN = {  # what a table of contrasts is
    "planned": f"""{TEST} We chose these tests when 99 of the 770 runs were in (three seeds of \
HalfCheetah,
Hopper and InvertedPendulum; the last 33 were run again later), and the 231 of \
table1-bootstrapped. Everything else here is
exploratory.""",
    "before": "The tests wait until all runs of the plan are in and the scale is frozen.",
    "after": f"{TEST} We chose these tests after the runs, so they are exploratory.",
}


def seeds_text(seeds: int) -> str:
    """A number of scores.seeds_to_detect(), which looks no further than a million."""
    return f"{seeds:,}" if seeds < 1_000_000 else "a million or more"


def p_text(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def draw_profiles(path: Path, normalised: np.ndarray, objectives: list[str]) -> None:
    """A line per objective, those of a kind in a panel of their own."""
    kinds = [kind for kind in KINDS if any(o.startswith(kind) for o in objectives)]
    figure, axes = plot.sheet(len(kinds), len(kinds), (4, 2.9), sharey=True)
    thresholds = np.linspace(-0.2, max(1, normalised.max()), 121)
    shares = dict(zip(objectives, scores.profiles(normalised, thresholds), strict=True))
    for ax, kind in zip(axes, kinds, strict=True):
        mine = [o for o in objectives if o in ("none", PLANNED) or o.startswith(kind)]
        for i, objective in enumerate(mine):
            style = {"color": "black"} if objective == PLANNED else {"color": plot.COLOURS[i]}
            ax.plot(thresholds, shares[objective], label=objective, **style)
        ax.set(title=kind, xlabel="score", ylim=(0, 1))
        ax.legend(frameon=False, fontsize="small")
    axes[0].set_ylabel("share of runs above it")
    figure.savefig(path, dpi=90)


HIGH, LOW = 8000, 1200  # returns of a double pendulum; some 9,350 are possible


def climbs(curve: tuple) -> bool:
    """Whether the return of a double pendulum is ever high."""
    return bool((curve[1] > HIGH).any())


def falls(curve: tuple) -> bool:
    """Whether it climbs, and is low afterwards."""
    returns = curve[1]
    return climbs(curve) and bool((returns[(returns > HIGH).argmax() :] < LOW).any())


TREATMENTS = ("the limit is an end", "bootstrapped")  # of a time limit


def bootstrapped_runs(folder: Path) -> sweep.Rows:
    """The runs with exact bootstrapping, of a task and objective those of one table.

    Of `folder` where it has more seeds, else of BOOTSTRAPPED.
    """
    few, many = sweep.Table(BOOTSTRAPPED, LAYOUT), sweep.Table(folder, LAYOUT)
    cells = ["env_id", "objective"]
    seeds, more = few.runs.groupby(cells).size(), many.runs.groupby(cells).size()
    covered = {cell for cell, count in more.items() if count > seeds.get(cell, 0)}

    def picked(rows: pd.DataFrame, wanted: bool) -> pd.DataFrame:
        found = [cell in covered for cell in rows[cells].itertuples(index=False, name=None)]
        return rows[np.array(found, bool) == wanted]

    runs = pd.concat([picked(few.runs, False), picked(many.runs, True)])
    return sweep.Rows(runs, pd.concat([picked(few.curves, False), picked(many.curves, True)]))


def tell_returns_of_both(tables: dict[str, sweep.Table | sweep.Rows], grid: Grid) -> str:
    """A table: what `none` and PLANNED end at under each of the TREATMENTS, task by task."""
    rows = []
    for task, objective in itertools.product(grid.tasks, ("none", PLANNED)):
        row = {"task": task, "objective": f"`{objective}`"}
        returns = []
        for name, each in tables.items():
            mine = each.runs.query("env_id == @task and objective == @objective")
            returns.append(finite_returns(mine).dropna().to_numpy())
            x, row[name] = returns[-1], ""
            if len(x):
                row[name] = f"{number(x.mean())} ({number(x.min())} to {number(x.max())}), {len(x)}"
        row["difference [95%]"] = ""
        if min(map(len, returns)) > 1 and max(map(np.ptp, returns)) > 0:
            ended, bootstrapped = returns
            with warnings.catch_warnings(action="ignore"):  # one side may have no spread
                test = stats.ttest_ind(bootstrapped, ended, equal_var=False)
            low, high = map(number, test.confidence_interval())
            row["difference [95%]"] = (
                f"{number(bootstrapped.mean() - ended.mean())} [{low}, {high}]"
            )
        rows.append(row)
    return markdown(rows)


def curves_of_both(
    tables: dict[str, sweep.Table | sweep.Rows], task: str, objective: str
) -> plot.Groups:
    """A curve per run, those of each of the TREATMENTS together."""
    found = {}
    for name, each in tables.items():
        points = each.curves.query("env_id == @task and objective == @objective")
        found |= plot.groups_of(points.assign(line=name), "line", "episodic_return")
    return found


def count(what: str, groups: plot.Groups, holds) -> dict[str, str]:
    """A row: for how many curves of each treatment something holds.

    And p by Fisher's exact test, where both have curves.
    """
    row, table = {"runs": what}, []
    for name in TREATMENTS:
        found = [holds(curve) for curve in groups.get(name, [])]
        row[name] = f"{sum(found)} of {len(found)}"
        table.append([sum(found), len(found) - sum(found)])
    row["p"] = p_text(stats.fisher_exact(table).pvalue) if min(map(sum, table)) else ""
    return row


def draw_runs(path: Path, rows: dict[str, tuple[plot.Groups, list[float]]]) -> None:
    """Every run as a thin line: a row per title, with dashed levels, a column per treatment."""
    columns = len(TREATMENTS)
    figure, axes = plot.sheet(len(rows) * columns, columns, (6, 2.8), sharey="row")
    places = itertools.product(rows.items(), enumerate(TREATMENTS))
    for ax, ((title, (groups, levels)), (i, name)) in zip(axes, places, strict=True):
        for curve in groups.get(name, []):
            ax.plot(*curve, color=plot.COLOURS[i], linewidth=0.8, alpha=0.7)
        plot.finish(ax, levels)
        ax.set(title=f"{title}: {name}", ylabel="" if i else "return (last 100)")
    figure.savefig(path, dpi=90)


def tell_time_limits(folder: Path, ended: sweep.Table, bootstrapped: sweep.Rows, grid: Grid) -> str:
    """Runs in which a time limit is an end beside bootstrapped ones. Draws time-limits.png."""
    tables = dict(zip(TREATMENTS, (ended, bootstrapped), strict=True))
    pendulums = curves_of_both(tables, "InvertedDoublePendulum-v4", PLANNED)
    cheetahs = curves_of_both(tables, "HalfCheetah-v4", "none")
    path = BOOTSTRAPPED / "random.csv"  # an untrained policy does not depend on the treatment
    untrained = grids.random_returns(path, ["HalfCheetah-v4"], "gaussian")[0]

    def is_low(curve: tuple) -> bool:
        returns = curve[1]
        return bool((returns[len(returns) // 2 :] < untrained).any())

    climbed = {name: list(filter(climbs, mine)) for name, mine in pendulums.items()}
    pendulum, cheetah = f"double pendulum, `{PLANNED}`:", "HalfCheetah, `none`:"
    below = f"below the untrained policy, {number(untrained)}"
    counted = [
        count(f"{pendulum} climbs above 8,000", pendulums, climbs),
        count(f"{pendulum} of these, falls below 1,200 afterwards", climbed, falls),
        count(f"{cheetah} ends {below}", cheetahs, lambda curve: curve[1][-1] < untrained),
        count(f"{cheetah} at some time in the second half {below}", cheetahs, is_low),
    ]
    titles = f"InvertedDoublePendulum-v4, {PLANNED}", "HalfCheetah-v4, none"
    rows = (pendulums, [HIGH, LOW]), (cheetahs, [untrained])
    draw_runs(folder / "time-limits.png", dict(zip(titles, rows, strict=True)))
    return f"""## What a time limit is

{tell_returns_of_both(tables, grid)}
The return of the last 100 episodes: mean, from the worst to the best, and how many runs. First, \
from
[table1](../table1/runs.csv): a time limit ends an episode as a fall does. Then: runs with exact \
bootstrapping. The difference,
second minus first, and its 95% interval are by Welch's t test. All of it is exploratory. Where \
there are ten bootstrapped
runs, they are from [time-limits](../time-limits/runs.csv); where there are three, from
[table1-bootstrapped](../table1-bootstrapped/summary.md), which earlier code made. The tests treat \
all runs as independent,
although runs with one seed often start alike.

{markdown(counted)}
p is by Fisher's exact test. The untrained policy is that of table1-bootstrapped. The curves hold \
two updates of five. 8,000
and 1,200 were chosen when the runs of table1-bootstrapped were known.

![Both treatments, run by run](time-limits.png)

A line is a run. Dashed: 8,000 and 1,200; the untrained policy.

"""


# --------------------------------------------------------------------------------------- RETURNS
def by_task(runs: pd.DataFrame, grid: Grid, tell) -> str:
    """A table of objectives and tasks: what `tell` makes of the runs of each pair, if there are."""
    table = []
    for objective in grid.objectives:
        row = {"objective": f"`{objective}`"}
        for task in grid.tasks:
            mine = runs.query("env_id == @task and objective == @objective")
            row[task] = tell(mine) if len(mine) else ""
        table.append(row)
    return markdown(table)


def tell_returns(runs: pd.DataFrame, grid: Grid) -> str:
    """What every run scored and how far its updates went, of whatever runs there are."""

    def returns(mine: pd.DataFrame) -> str:
        x = sweep.numbers(mine["last_100_return"])
        text = f"{number(x.mean(skipna=False))} ({number(x.min())} to {number(x.max())})"
        return text + f", {len(x)} of {len(grid.seeds)}" * (len(x) < len(grid.seeds))

    def kls(mine: pd.DataFrame) -> str:
        median, largest = sweep.numbers(mine["kl_median"]), sweep.numbers(mine["kl_max"])
        if median.isna().all():
            return ""
        return f"{two_figures(median.median())} ({two_figures(largest.max())})"

    return f"""## Returns

The return of the last 100 episodes: mean over seeds, and from the worst to the best.

{by_task(runs, grid, returns)}
{grids.tell_frozen(runs.reset_index(), list(LAYOUT.key))}

![Learning curves](curves.png)

Means over seeds with bootstrap 95% intervals. A curve that leaves its panel goes on below it.

## How far an update goes

KL[old, new] of an update: the median over seeds of a run's median, and in brackets the largest of \
all.

{by_task(runs, grid, kls)}
![KL per update](kl.png)

A line ends where the first of its runs met a number that was not finite.

"""


def tell_learning(folder: Path, runs: pd.DataFrame, grid: Grid, curves: dict) -> str:
    """PLANNED seed by seed beside the figures of others.

    Draws learning.png, and writes the table as learning.md too.
    """
    cleanrl = pd.read_csv(ROOT / "benchmark/paper/cleanrl.csv")
    cleanrl = cleanrl.set_index(["env_id", "total_timesteps"])
    returns = sweep.numbers(runs["last_100_return"])
    table, panels, lines = [], [], [f"{PLANNED}, ours", f"{PLANNED}, the paper, -v1"]
    for task in grid.tasks:
        mine = returns.reindex([(task, PLANNED, seed) for seed in grid.seeds])
        row = {"task": task}
        for (*_, seed), x in mine.items():
            row[f"seed {seed}"] = number(x) if (task, PLANNED, seed) in runs.index else ""
        row["mean"] = "" if "" in row.values() else number(mine.mean(skipna=False))
        for steps in (1_000_000, 8_000_000):
            column = f"CleanRL, {steps // 1_000_000}M steps"
            row[column] = ""
            if (task, steps) in cleanrl.index:
                other = cleanrl.loc[(task, steps), ["mean", "std"]]
                row[column] = " ± ".join(number(x) for x in other.dropna())
        paper = grids.paper_curve(task)
        table.append(row | {"the paper, Figure 3": number(paper[0][1][-1]) if paper else ""})
        groups = {}
        if PLANNED in curves.get(task, {}):
            groups[lines[0]] = curves[task][PLANNED]
        if paper:
            groups[lines[1]] = paper
        panels.append((task, groups, lines))
    draw(folder / "learning.png", panels, 4, "return (last 100)")
    (folder / "learning.md").write_text(markdown(table))
    return f"""## `{PLANNED}`, seed by seed

The return of the last 100 episodes, beside those of CleanRL (-v4, mean and standard deviation \
over seeds) and the end
of the curve in the paper's Figure 3 (-v1); benchmark/paper/README.md says where these are from.

{markdown(table)}
![Learning curves of {PLANNED}](learning.png)

"""


# ---------------------------------------------------------------------------------------- REPORT
def draw(path: Path, panels: list[tuple], columns: int, ylabel: str) -> None:
    """One picture of panels: title, curves (plot.Groups), all lines that its place may have.

    Panels of a row that have the same title share their y axis.
    """
    shared = len({title for title, *_ in panels}) < len(panels)
    size = (12 / columns, 2.7)
    columns = min(columns, len(panels))
    figure, axes = plot.sheet(len(panels), columns, size, sharey="row" if shared else False)
    legend_style = {"fontsize": "small", "frameon": False}
    for i, (ax, (title, groups, lines)) in enumerate(zip(axes, panels, strict=True)):
        plot.curves(ax, plot.drawable(groups), lines)
        ax.set(title=title, xlabel="", ylabel=ylabel if i % columns == 0 else "")
        if shared and i < columns and ax.lines:
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=2, **legend_style)
    if not shared:
        plot.legend(figure, "upper", ncols=4, fontsize="small")
    for start in range(0, len(axes), columns):
        row = axes[start : start + columns]
        drawn = [(line.get_label(), line.get_ydata()) for ax in row for line in ax.lines]
        others = np.concatenate([[], *(y for label, y in drawn if label != "none")])
        # a collapse must not flatten everything else
        if shared and 0 < len(others) < sum(len(y) for _, y in drawn):
            row[0].set_ylim(bottom=max(row[0].get_ylim()[0], others.min() - 0.1 * np.ptp(others)))
    figure.savefig(path, dpi=90)


def draw_scores(path: Path, theirs: pd.Series, mean: Estimates, middle: Estimates) -> None:
    """Dots with intervals, a row per objective. theirs: the paper's scores by objective.

    The axis is cut between `none`, which is far off, and the others.
    """
    objectives = list(theirs.index)
    places, ends, handles = np.arange(len(objectives)), [theirs.to_numpy()], {}
    parts = [places[[(o == "none") == far for o in objectives]] for far in (True, False)]
    parts = [part for part in parts if len(part)]
    figure = Figure(figsize=(7, 1.4 + 0.36 * len(objectives)), layout="constrained")
    widths = [1, 3][-len(parts) :]
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False, width_ratios=widths)[0]
    for shift, marker, label, (estimates, draws) in (
        (-0.12, "o", "mean", mean),
        (0.12, "D", "interquartile mean", middle),
    ):
        low, high = scores.interval(draws)
        ends += [low, high]
        colour = plot.COLOURS[0 if label == "mean" else 2]
        for ax in axes:
            ax.hlines(places + shift, low, high, colour, linewidth=1.5)
            (handles[label],) = ax.plot(
                estimates, places + shift, marker, color=colour, markersize=5
            )
    for ax, part in zip(axes, parts, strict=True):
        (handles["the paper"],) = ax.plot(theirs, places, "x", color="black")
        low, high = np.nanmin(np.array(ends)[:, part]), np.nanmax(np.array(ends)[:, part])
        ax.set_xlim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=places, yticklabels=objectives)
    axes[0].invert_yaxis()
    for left, right in itertools.pairwise(axes):
        right.tick_params(axis="y", left=False)
        right.spines["left"].set_visible(False)
        for ax, end in ((left, 1), (right, 0)):  # two strokes across the axis, where it is cut
            stroke = {"marker": [(-1, -2), (1, 2)], "color": "black", "clip_on": False}
            ax.plot(end, 0, transform=ax.transAxes, **stroke)
    label = "normalised score: 0 is the untrained policy, 1 the best single run"
    figure.supxlabel(label, fontsize="medium")
    style = {"ncols": len(handles), "fontsize": "small", "frameon": False}
    figure.legend(handles.values(), handles, loc="outside upper center", **style)
    figure.savefig(path, dpi=110)


def without_gaps(runs: pd.DataFrame, grid: Grid) -> Grid | None:
    """The part of a grid that can be scored.

    All tasks, with the seeds that all of them have; or else the tasks that have all seeds. None
    where there is neither, or a single objective: it would be compared with itself.
    """
    there = set(runs.index[runs["last_100_return"].notna()])
    seeds = [s for s in grid.seeds if there >= set(grid._replace(seeds=[s]).cells)]
    tasks = [task for task in grid.tasks if there >= set(grid._replace(tasks=[task]).cells)]
    if len(grid.objectives) == 1 or not (seeds or tasks):
        return None
    return grid._replace(seeds=seeds) if seeds else grid._replace(tasks=tasks)


def report(folder: Path, asked: Grid, settings: list[str]) -> None:
    """Write summary.md and the pictures from the CSVs.

    Of the grid that is asked for, and of what there is besides. settings: the flags that these runs
    were made with. The same CSVs give the same bytes. Raises UserError.
    """
    table = sweep.Table(folder, LAYOUT)
    if table.runs.empty:
        raise UserError(f"{folder / 'runs.csv'} has no run yet; run table1.py without --report")
    grids.check(table, settings)
    preset = settings[1]  # after --preset
    planned = settings == PLANNED_FLAGS
    runs = table.by_key()
    both = [{*mine, *there} for mine, there in zip(asked, runs.index.levels, strict=True)]
    grid = make_grid(*both)
    filled, gaps = fill_gaps(runs)
    scored = without_gaps(filled, grid)
    whole = planned and without_gaps(filled, PLAN) == PLAN
    if whole:  # whatever else there is
        scored = PLAN
        filled, gaps = fill_gaps(runs.loc[PLAN.cells])
    text = f"# {'Table 1' if preset == 'paper' else f'Table 1 with --preset {preset}'}"
    if preset == "paper":
        bootstrapped = (runs["bootstrap_truncated"] == "True").all()
        text += f", with time limits {'bootstrapped' if bootstrapped else 'as ends'}"
    text += "\n\n"
    shape = f"{len(grid.tasks)} tasks x {len(grid.objectives)} objectives x {len(grid.seeds)} seeds"
    if len(runs) == len(grid.cells):
        text += f"All {len(runs)} runs are in: {shape}."
    else:
        text += f"**PARTIAL: {len(runs)} of {len(grid.cells)} runs are in** ({shape})."
    if len(grid.objectives) == 1:
        text += " No scores: they compare objectives."
    elif scored is None:
        text += " No scores yet."
    elif scored != grid:
        text += f" Scored is {'the plan' if whole else 'what has no gap'}: "
        text += f"{', '.join(scored.tasks)}; seeds {', '.join(map(str, scored.seeds))}."
    if gaps:
        text += " A run without a finite return counts as the lowest of its task: "
        text += f"{', '.join(gaps)}."
    text += " Every run is a row of [runs.csv](runs.csv), its curve is in [curves.csv](curves.csv)."
    text += "\n\n"
    for stale in ("scores.md", "scores.png", "profile.png", "time-limits.png"):
        (folder / stale).unlink(missing_ok=True)
    if scored is not None:
        text += tell_scores(folder, filled, scored)
        if PLANNED in grid.objectives and len(scored.seeds) > 1:
            ready = whole and frozen_scale(PLAN.tasks) is not None
            when = "after" if not planned else "planned" if ready else "before"
            text += tell_contrasts(folder, filled, scored, when)
    if planned:
        text += tell_time_limits(folder, table, bootstrapped_runs(TIME_LIMITS), grid)
    elif folder.name == TIME_LIMITS.name:
        ended = sweep.Table(SCALE.parent, LAYOUT)
        text += tell_time_limits(folder, ended, bootstrapped_runs(folder), grid)

    curves = {}
    for name in ("episodic_return", "kl", "beta"):
        points = table.curves.assign(**{name: sweep.numbers(table.curves[name])})
        if name != "episodic_return":
            points = points[points[name].between(0, math.inf, inclusive="neither")]
            points = points.assign(**{name: np.log10(points[name])})
        curves[name] = plot.gather(points, "env_id", "objective", name)
    kinds = [kind for kind in KINDS if any(o.startswith(kind) for o in grid.objectives)] or [""]
    columns = [[o for o in grid.objectives if o == "none" or o.startswith(kind)] for kind in kinds]
    width = len(columns) if len(columns) > 1 else 4

    def panels(name: str, columns: list[list[str]]) -> list:
        found = []
        for task, lines in itertools.product(grid.tasks, columns):
            mine = curves[name].get(task, {})
            found.append((task, {o: mine[o] for o in lines if o in mine}, lines))
        return found

    draw(folder / "curves.png", panels("episodic_return", columns), width, "return (last 100)")
    draw(folder / "kl.png", panels("kl", columns), width, "log10 KL[old, new]")
    text += tell_returns(runs, grid)
    adaptive = [o for o in grid.objectives if o.startswith("adaptive")]
    if adaptive:
        draw(folder / "beta.png", panels("beta", [adaptive]), 4, "log10 beta")
        text += "![beta over time](beta.png)\n\n"
    if PLANNED in grid.objectives:
        text += tell_learning(folder, runs, grid, curves["episodic_return"])
    (folder / "summary.md").write_text(text + grids.origin(table.runs))


# ------------------------------------------------------------------------------------------ MAIN
def make_grid(tasks, objectives, seeds) -> Grid:
    """In the paper's order, each once; tasks without a version are -v4."""
    tasks = sweep.known_first(map(grids.with_version, tasks), TASKS)
    return Grid(tasks, sweep.known_first(objectives, OBJECTIVES["paper"]), sorted(set(seeds)))


def complete(grid: Grid, folder: Path, settings: list[str], engine) -> None:
    """Run what the CSVs of this folder lack of the grid. Raises UserError."""
    with sweep.alone(folder):
        table = sweep.Table(folder, LAYOUT)
        grids.check(table, settings)
        calls = grids.plan(grid, table.cells, settings, sweep.runs_of(folder))
        if table.runs.empty:  # whatever is there may be of other flags
            (folder / "random.csv").unlink(missing_ok=True)
        grids.measure(grid, settings, folder / "random.csv")
        sweep.run(calls, engine, lambda call: table)


def main(argv: list[str]) -> None:
    parser = Parser("Run what is missing of the paper's Table 1, and report it.")
    add = parser.add_argument
    add("--tasks", nargs="+", default=TASKS, help="environment ids; without a version -v4")
    what = "default: the paper's 11; of --preset modern four of them"
    add("--objectives", nargs="+", help=what)
    what = "runs of every task and objective"
    add("--seeds", nargs="+", type=int, help=f"{what}; default: 1 to 10, of --preset modern 1 to 5")
    add("--preset", choices=OBJECTIVES, default="paper", help="of ppo_continuous.py")
    add("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    what = "folder; default: benchmark/results/table1 or table1-modern"
    add("--results", type=Path, help=what)
    sweep.add_flags(parser, jobs=None)
    add("--freeze-scale", action="store_true", help="write scale.csv from this table")
    add("flags", nargs="*", help="after --: more flags of ppo_continuous.py for every run")
    args = parser.parse_args(argv)
    objectives = args.objectives or OBJECTIVES[args.preset]
    grid = make_grid(args.tasks, objectives, args.seeds or SEEDS[args.preset])
    default = "table1" if args.preset == "paper" else f"table1-{args.preset}"
    folder = args.results or ROOT / "benchmark/results" / default
    settings = grids.common_flags(args.preset, args.total_timesteps, args.flags)
    if not args.report:
        jobs = 1 if grids.parse(settings)[0].device == "cuda" else len(sweep.CORES)
        complete(grid, folder, settings, sweep.choose_engine(args, jobs))
    if args.freeze_scale:
        with sweep.alone(folder):
            freeze_scale(folder)
    report(folder, grid, settings)
    print(folder / "summary.md")


if __name__ == "__main__":
    cli(main)
