"""The paper's Figure 3: PPO beside the algorithms that the paper compares it with, 1M steps each.

    python benchmark/figure3.py                   # what is missing: hours on two cores
    python benchmark/figure3.py --report          # the report alone, from the CSVs
    python benchmark/figure3.py --tasks Hopper Swimmer --algorithms trpo-frozen cem --seeds 1 2
    python benchmark/figure3.py --engine ray      # on a Ray cluster; see requirements-ray.txt

A cell is a task, an algorithm and a seed: one process of a file of benchmark/baselines/, a row of
runs.csv. There is one such process on each core. If this command is stopped, give it again: it goes
on from the last checkpoints and ends with the same numbers. PPO is not run here: its rows are those
of clip:0.2 in benchmark/results/table1/, whatever seeds are there.

After the grid come experiments: an algorithm with one thing changed, on tasks where its mean is far
from the paper's end. EXPERIMENTS lists them; each is run where its algorithm and its task are asked
for.

Results are benchmark/results/figure3/: runs.csv and curves.csv, from which the report makes
summary.md and the pictures. The report lists the runs that are missing.
"""

import functools
import itertools
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
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
from benchmark.grids import TASKS
from benchmark.sweep import PACKAGES, ROOT, Call, Layout


class Algorithm(NamedTuple):
    trainer: str  # a file of benchmark/baselines/
    flags: str
    theirs: str  # what it is compared with: a column of published()
    curve: str  # as figure3_mujoco_curves.json calls it
    title: str


OPENAI = "TRPO, OpenAI Baselines 2018"  # with sigma learned, which in the paper it probably was not
PPO = Algorithm("", "", "PPO (clip)", "PPO(Clip)", "PPO (clip)")
ALGORITHMS = {
    "trpo-frozen": Algorithm("trpo", "--sigma frozen", "TRPO", "TRPO", "TRPO"),
    "trpo-learned": Algorithm("trpo", "--sigma learned", OPENAI, "TRPO", "TRPO"),
    "trpo-learned-32": Algorithm("trpo", "--sigma learned --hidden 32", OPENAI, "TRPO", "TRPO"),
    "vpg": Algorithm("vpg", "", "Vanilla PG adaptive", "VPG-adapt", "Vanilla PG, adaptive"),
    "a2c": Algorithm("a2c", "", "A2C", "A2C", "A2C"),
    "a2c-tr": Algorithm("a2c", "--trust-region", "A2C + TR", "A2C+TR", "A2C + trust region"),
    "cem": Algorithm("cem", "", "CEM", "CEM", "CEM"),
}
WITH_PPO = {"ppo": PPO} | ALGORITHMS


class Experiment(NamedTuple):
    base: str  # a key of ALGORITHMS
    tasks: tuple[str, ...]
    flags: str  # what is different
    what: str


EXPERIMENTS = {
    "trpo-frozen-discount": Experiment(
        "trpo-frozen",
        ("Hopper-v4", "Walker2d-v4"),
        "--gamma 0.995 --gae-lambda 0.97",
        "gamma 0.995 and lambda 0.97, which modular_rl has",
    ),
    "vpg-kl-target": Experiment(
        "vpg", ("Walker2d-v4",), "--kl-target 0.01", "an update may have five times the KL"
    ),
    "vpg-returns": Experiment(
        "vpg",
        ("HalfCheetah-v4", "InvertedDoublePendulum-v4", "Reacher-v4"),
        "--gae-lambda 1 --value-epochs 10",
        "lambda 1, and ten epochs of the value function, as in the homework",
    ),
    "a2c-step-size": Experiment(
        "a2c",
        ("InvertedDoublePendulum-v4", "Walker2d-v4"),
        "--learning-rate 0.0021",
        "three times the step size",
    ),
    "a2c-tr-step-size": Experiment(
        "a2c-tr",
        ("InvertedDoublePendulum-v4",),
        "--learning-rate 0.005",
        "seven times the step size",
    ),
    "cem-unclipped": Experiment(
        "cem", ("Reacher-v4",), "--no-clip-actions", "actions are not clipped, as in modular_rl"
    ),
    "cem-noise": Experiment(
        "cem",
        ("InvertedDoublePendulum-v4", "Reacher-v4"),
        "--action-std 1",
        "normal noise of deviation 1 on all actions, added before they are clipped",
    ),
}
PAPER = ["PPO (clip)", "TRPO", "Vanilla PG adaptive", "A2C", "A2C + TR", "CEM"]
PAPER_SEEDS = 3  # of Table 1; for Figure 3 the paper does not say
OTHERS = ["vpg", "a2c", "a2c-tr", "cem"]
LINE_UPS = {"frozen": ["ppo", "trpo-frozen", *OTHERS], "learned": ["ppo", "trpo-learned", *OTHERS]}
DRAWS = 10_000  # of the mean of an algorithm
OTHERS_1M = ROOT / "benchmark/paper/others_1m.csv"

MEANS = ("accepted", "backtracks", "cg_residual", "projected")  # over a run; see trpo.py, a2c.py


def measure(facts: dict, metrics: pd.DataFrame, folder: Path) -> dict:
    """updates, of CEM the generations; kl_median and kl_max; MEANS, where an algorithm has them."""
    means = dict.fromkeys(MEANS)
    for name in MEANS:
        if f"losses/{name}" in metrics:
            means[name] = float(metrics[f"losses/{name}"].mean())
    return grids.kl_of_updates(facts, metrics, folder) | {"updates": len(metrics)} | means


COLUMNS = "env_id algorithm seed total_timesteps transitions updates last_100_return"
COLUMNS += f" eval_return_mean eval_return_std eval_episodes kl_median kl_max {' '.join(MEANS)}"
COLUMNS += " wall_seconds sps started git_commit cpu cores python"
LAYOUT = Layout(
    key=("env_id", "algorithm", "seed"),
    columns=(*COLUMNS.split(), *PACKAGES, "command"),
    curves={
        "episodic_return": plot.RETURN,
        "kl": "losses/kl_after_update",
        "action_std": "charts/action_std",
        "learning_rate": "charts/learning_rate",
    },
    order={"env_id": TASKS, "algorithm": [*WITH_PPO, *EXPERIMENTS]},
    measure=measure,
)


# ------------------------------------------------------------------------------------------ RUNS
class Grid(NamedTuple):
    """Every combination of these, in this order."""

    tasks: list[str]
    algorithms: list[str]
    seeds: list[int]

    @property
    def cells(self) -> list[tuple[str, str, int]]:
        return list(itertools.product(*self))

    @property
    def experiments(self) -> list[tuple[str, str, int]]:
        """Cells, too: of the experiments with these tasks and algorithms."""
        found = []
        for name, experiment in EXPERIMENTS.items():
            if experiment.base in self.algorithms:
                tasks = [task for task in experiment.tasks if task in self.tasks]
                found += itertools.product(tasks, [name], self.seeds)
        return found


def call_of(cell: tuple[str, str, int], total_timesteps: int, runs: str) -> Call:
    task, name, seed = cell
    more = EXPERIMENTS[name].flags.split() if name in EXPERIMENTS else []
    algorithm = ALGORITHMS[EXPERIMENTS[name].base if name in EXPERIMENTS else name]
    flags = [*grids.environment(task), *algorithm.flags.split(), *more, "--seed", str(seed)]
    flags += [
        "--total-timesteps",
        str(total_timesteps),
        "--run-dir",
        f"{runs}/{task}/{name}__{seed}",
    ]
    return Call(f"benchmark.baselines.{algorithm.trainer}", tuple(flags), {"algorithm": name})


def flags_of(command: str) -> str:
    """Without where the run folder is."""
    return command.partition(" --run-dir")[0]


def plan(grid: Grid, table: sweep.Table, total_timesteps: int) -> list[Call]:
    """The calls for all cells that the table lacks, those of the first seeds first.

    Experiments are last. Raises UserError where a cell is there that was made with other flags.
    """
    made = table.by_key()["command"]
    calls = []
    for cell in [*sorted(grid.cells, key=lambda cell: cell[2]), *grid.experiments]:
        call = call_of(cell, total_timesteps, sweep.runs_of(table.folder))
        if cell not in made.index:
            calls.append(call)
        elif flags_of(made[cell]) != flags_of(call.command):
            what = f"{table.folder} holds a run of other settings than {call.command}"
            raise UserError(f"{what}; give other --results")
    return calls


def complete(grid: Grid, folder: Path, total_timesteps: int, engine) -> None:
    """Run what the CSVs of this folder lack of the grid. Raises UserError."""
    with sweep.alone(folder):
        table = sweep.Table(folder, LAYOUT)
        sweep.run(plan(grid, table, total_timesteps), engine, lambda call: table)


# ----------------------------------------------------------------------------------------- SCORES
def read_ppo(folder: Path) -> sweep.Rows:
    """The rows of clip:0.2 in a folder of benchmark/table1.py, none where there is no such file.

    Raises UserError where they have other details: those of the paper's time are compared here.
    """
    table = sweep.Table(folder, grids.LAYOUT)
    found = [rows[rows["objective"] == "clip:0.2"] for rows in (table.runs, table.curves)]
    ppo = sweep.Rows(*(rows.assign(algorithm="ppo") for rows in found))
    if not ppo.runs["bootstrap_truncated"].eq("False").all():
        what = f"the runs of {folder} go on at a time limit, those of the others end there"
        raise UserError(f"{what}; give another --ppo")
    return ppo


def returns_of(runs: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """(task, algorithm) -> last_100_return of its seeds; a run without an episode is left out."""
    numbers = sweep.numbers(runs["last_100_return"]).dropna()
    return {
        cell: mine.to_numpy() for cell, mine in numbers.groupby([runs["env_id"], runs["algorithm"]])
    }


@functools.cache
def other_code() -> pd.DataFrame:
    """The rows of others_1m.csv, with a name: of the algorithm and whose it is."""
    rows = pd.read_csv(OTHERS_1M)
    return rows.assign(name=rows["algorithm"] + ", " + rows["source"])


def published() -> pd.DataFrame:
    """The ends of the paper's curves: a row per task (-v4), a column per algorithm.

    After the columns of PAPER come those of others_1m.csv, such as OPENAI.
    """
    ends = pd.read_csv(ROOT / "benchmark/paper/figure3_final.csv")
    ends["task"] += "-v4"
    theirs = other_code().pivot(index="env_id", columns="name", values="mean")
    return ends.pivot(index="task", columns="algorithm", values="final").join(theirs)


def seeds_of(column: str) -> int:
    """How many runs each number in a column of published() is the mean of."""
    if column in PAPER:
        return PAPER_SEEDS
    others = other_code()
    (seeds,) = others["seeds"][others["name"] == column].unique()
    return int(seeds)


def range_of_mean(x: np.ndarray, new_runs: float = math.inf) -> tuple[float, float]:
    """From x, the returns of two runs or more: where the mean of new runs lies in 95% of cases.

    By Student's t, as if returns were normally distributed. With infinitely many new runs this is
    the confidence interval of the mean. With fewer it is the prediction interval, which is wider:
    the mean of the new runs varies, too.
    """
    error = x.std(ddof=1) * math.sqrt(1 / len(x) + 1 / new_runs)
    half_width = stats.t.ppf(0.975, len(x) - 1) * error
    return x.mean() - half_width, x.mean() + half_width


def could_be_ours(x: np.ndarray, end: float, new_runs: int) -> bool:
    """Whether their end lies in the range for the mean of that many new runs of ours."""
    low, high = range_of_mean(x, new_runs)
    return bool(low <= end <= high)


def yes_or_no(x: np.ndarray, end: float, new_runs: int) -> str:
    """The same in a table: empty where there are fewer than two runs."""
    if len(x) < 2:
        return ""
    return "yes" if could_be_ours(x, end, new_runs) else "no"


def in_brackets(limits: tuple[float, float]) -> str:
    low, high = limits
    return f"[{number(low)}, {number(high)}]"


def with_interval(x: np.ndarray, seeds: int) -> str:
    """The mean of the runs; of two or more, its 95% interval by Student's t too.

    And their number, where it is not `seeds`.
    """
    text = number(x.mean())
    if len(x) > 1:
        text += f" {in_brackets(range_of_mean(x))}"
    return text + f", n = {len(x)}" * (len(x) != seeds)


def rank_of_first(means: np.ndarray) -> np.ndarray:
    """means [K, ...] of K algorithms -> the rank of the first of them, 1 for the highest: [...]"""
    return 1 + (means[1:] > means[0]).sum(0)


def likely_means(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x [S >= 2 seeds] -> random means, spread as Student's t says after these runs: [DRAWS]"""
    return x.mean() + stats.sem(x) * rng.standard_t(len(x) - 1, size=DRAWS)


def ranks_of_ppo(returns: list[np.ndarray], rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """The returns of several algorithms on a task, PPO's first -> PPO's rank, and in each draw.

    Every algorithm has two seeds or more, and its mean is drawn on its own. A tie counts for PPO.
    """
    means = np.array([x.mean() for x in returns])
    draws = np.array([likely_means(x, rng) for x in returns])
    return int(rank_of_first(means)), rank_of_first(draws)


# ---------------------------------------------------------------------------------------- REPORT
def tell_missing(there: set[tuple], grid: Grid, seeds_of_ppo: dict[str, int]) -> str:
    """How many of the runs are in, and which are not. there: the cells of all runs."""
    missing_seeds, tasks_without = {}, {}
    for task, name, seed in [*grid.cells, *grid.experiments]:
        if (task, name, seed) not in there:
            missing_seeds.setdefault((task, name), []).append(str(seed))
    for (task, name), seeds in missing_seeds.items():
        tasks_without.setdefault((name, " ".join(seeds)), []).append(task)
    missing = ""
    for (name, seeds), tasks in tasks_without.items():
        kind = "the experiment " * (name in EXPERIMENTS)
        where = "all tasks" if tasks == grid.tasks else ", ".join(tasks)
        missing += f"- {kind}`{name}`, seeds {seeds}: {where}\n"
    without_ppo = [task for task in grid.tasks if task not in seeds_of_ppo]
    if without_ppo:
        missing += f"- PPO, which benchmark/table1.py runs: {', '.join(without_ppo)}\n"

    count = sum(cell in there for cell in grid.cells)
    more = sum(name in ALGORITHMS for _, name, _ in there) - count
    text = f"{len(grid.tasks)} tasks x {len(grid.algorithms)} algorithms x {len(grid.seeds)} seeds"
    if count == len(grid.cells):
        text = f"All {count} runs of the grid are in: {text}."
    else:
        text = f"**PARTIAL: {count} of {len(grid.cells)} runs of the grid are in: {text}.**"
    if missing:
        text += f" Still missing:\n\n{missing}"
    counts = ", ".join(
        f"{task} {seeds_of_ppo[task]}" for task in grid.tasks if task in seeds_of_ppo
    )
    text += f"\n{more} runs of other seeds are here too, and count." * (more > 0)
    return text + f"\nSeeds of PPO: {counts or 'none'}.\n\n"


def tell_returns(returns: dict, grid: Grid, ends: pd.DataFrame) -> str:
    table = []
    for name in ("ppo", *grid.algorithms):
        row = {"algorithm": f"`{name}`"}
        theirs = WITH_PPO[name].theirs
        for task in grid.tasks:
            cell = []
            if (task, name) in returns:
                cell.append(with_interval(returns[task, name], len(grid.seeds)))
            if task in ends.index and theirs in PAPER:
                cell.append(f"paper {number(ends.loc[task, theirs])}")
            row[task] = "<br>".join(cell)
        table.append(row)
    return f"""## Returns

The return of the last 100 episodes: the mean of {len(grid.seeds)} runs, or of n where a cell \
says so, and its 95% interval by
Student's t; below it the end of the paper's curve (-v1). The paper has one curve of TRPO, \
probably with sigma frozen: it
stands at `trpo-frozen` alone.

{markdown(table)}
![Learning curves](curves.png)

Means over seeds with bootstrap 95% intervals. Beside the paper's curves, dashed and grey:

![Learning curves beside the paper's](beside.png)

"""


def tell_ranks(returns: dict, grid: Grid, ends: pd.DataFrame) -> str:
    """PPO's rank on each task, beside TRPO with sigma frozen and beside TRPO with sigma learned.

    Only where each algorithm has two runs or more: one alone does not say how sure its mean is.
    """
    table, first_in_paper, told_by_paper = [], 0, 0
    rng = np.random.default_rng(0)
    firsts = {name: [] for name in LINE_UPS}  # per task: whether PPO is first, and in each draw
    for task in grid.tasks:
        row = {"task": task, "the paper": ""}
        if task in ends.index:
            rank = rank_of_first(ends.loc[task, PAPER].to_numpy())
            first_in_paper += rank == 1
            told_by_paper += 1
            row["the paper"] = f"{rank} of {len(PAPER)}"
        for name, line_up in LINE_UPS.items():
            column = f"TRPO's sigma {name}"
            missing = [other for other in line_up if len(returns.get((task, other), ())) < 2]
            row[column] = f"too few runs: {', '.join(missing)}"
            if not missing:
                rank, draws = ranks_of_ppo([returns[task, other] for other in line_up], rng)
                firsts[name].append((rank == 1, draws == 1))
                low, high = scores.interval(draws).round().astype(int)
                row[column] = f"{rank} of {len(line_up)} [{low}, {high}]; "
                row[column] += f"first in {(draws == 1).mean():.0%} of the draws"
                ahead = [
                    f"`{other}`"
                    for other in line_up[1:]
                    if returns[task, other].mean() > returns[task, "ppo"].mean()
                ]
                row[column] += f"; behind {', '.join(ahead)}" if ahead else ""
        table.append(row)
    last = {"task": "**PPO first**", "the paper": f"{first_in_paper} of {told_by_paper} tasks"}
    for name, mine in firsts.items():
        last[f"TRPO's sigma {name}"] = ""
        if mine:
            low, high = scores.interval(sum(draws for _, draws in mine))
            count = sum(first for first, _ in mine)
            text = f"{count} of {len(mine)} tasks [{low:.0f}, {high:.0f}]"
            last[f"TRPO's sigma {name}"] = text
    return f"""## Where PPO stands

PPO's rank by the mean return of the last 100 episodes, 1 for the highest; a tie counts for PPO. \
The other algorithms are
vanilla policy gradient, A2C, A2C with a trust region and CEM. In brackets: the middle 95% of \
{DRAWS:,} draws. In a draw
every mean is moved by its standard error times a random number from Student's t distribution. The \
last row counts tasks,
and in brackets how many there are in the draws.

{markdown([*table, last])}
"""


def source_of(column: str) -> str:
    """Of a column of published()."""
    return f"the paper, {column}" if column in PAPER else column


def count_inside(inside: dict[str, bool]) -> str:
    """On how many tasks, and which are not among them."""
    outside = [task for task, is_inside in inside.items() if not is_inside]
    text = f"{len(inside) - len(outside)} of {len(inside)}"
    return text + f"; not {', '.join(outside)}" * bool(outside)


def tell_disagreements(returns: dict, grid: Grid, ends: pd.DataFrame) -> str:
    """Where each algorithm ends farthest from the paper's curve, or from a result of other code."""
    table = []
    for name in ("ppo", *grid.algorithms):
        far, inside = {}, {}
        theirs = WITH_PPO[name].theirs
        their_seeds = seeds_of(theirs)
        for task in grid.tasks:
            if (task, name) in returns and task in ends.index:
                x, end = returns[task, name], ends.loc[task, theirs]
                best, worst = ends.loc[task, PAPER].max(), ends.loc[task, PAPER].min()
                far[task] = (x.mean() - end) / (best - worst)
                if len(x) > 1:
                    inside[task] = could_be_ours(x, end, their_seeds)
        if far:
            task = max(far, key=lambda task: abs(far[task]))
            x, end = returns[task, name], ends.loc[task, theirs]
            row = {"algorithm": f"`{name}`", "task": task}
            row["ours"] = with_interval(x, len(grid.seeds))
            row |= {"theirs": number(end), "compared with": source_of(theirs)}
            row |= {"apart": f"{far[task]:+.0%}", "mean of new runs": ""}
            if len(x) > 1:
                row["mean of new runs"] = in_brackets(range_of_mean(x, their_seeds))
            row["inside"] = yes_or_no(x, end, their_seeds)
            row["inside, all tasks"] = count_inside(inside)
            table.append(row)
    if not table:
        return ""
    return f"""## The largest disagreement of each algorithm

Apart: ours minus theirs, in percent of the distance between the paper's best and worst algorithm \
on that task. TRPO with
a learned sigma is compared with OpenAI's code of 2018 (-v2, networks of 32-32).

Could their number be a mean of runs like ours? It is a mean of few runs: {seeds_of(OPENAI)} in \
OpenAI's results; {PAPER_SEEDS} in the paper,
which says so for Table 1, and we assume the same here. Suppose that we trained that many new \
runs. "Mean of new runs" is
the range in which their mean would lie in 95% of cases, by Student's t, if returns were normally \
distributed. It is
wider than the interval of our mean, because a mean of few runs varies, too. "Inside": their \
number lies in this range.
That does not show that the algorithms are equal. With three runs of ours the range is wide, and \
the more our runs
differ, the more numbers it holds. Nor does "outside" show more than a hint: the tests are many \
and not corrected, one in
twenty would be outside by chance alone, and our tasks are -v4, theirs -v1 or -v2.

{markdown(table)}
"""


def tell_experiments(returns: dict, grid: Grid, ends: pd.DataFrame) -> str:
    """Every experiment that has run, beside its algorithm and the paper."""
    table = []
    cells = [(task, name) for name in EXPERIMENTS for task in EXPERIMENTS[name].tasks]
    for task, name in [cell for cell in cells if cell in returns]:
        experiment, base = EXPERIMENTS[name], EXPERIMENTS[name].base
        row = {"experiment": f"`{name}`", "task": task, "what is different": experiment.what}
        row["with it"] = with_interval(returns[task, name], len(grid.seeds))
        row["without it"] = ""
        if (task, base) in returns:
            row["without it"] = with_interval(returns[task, base], len(grid.seeds))
        theirs = ALGORITHMS[base].theirs
        end = ends.loc[task, theirs]
        row |= {"theirs": number(end), "compared with": source_of(theirs)}
        for column, mine in {"inside with it": name, "inside without it": base}.items():
            row[column] = yes_or_no(returns.get((task, mine), ()), end, seeds_of(theirs))
        table.append(row)
    if not table:
        return ""
    return f"""## Experiments on disagreements

Other settings, on tasks where the mean of the algorithm is far from the paper's end. "Inside" is \
the test above.

{markdown(table)}
"""


def tell_sigma(returns: dict, tasks: list[str], ends: pd.DataFrame) -> str:
    """Which TRPO of ours the paper's could be, on tasks with two runs or more."""
    text = ""
    for name in [name for name in ALGORITHMS if name.startswith("trpo")]:
        mine = {task: returns.get((task, name), ()) for task in tasks}
        inside = {
            task: could_be_ours(x, ends.loc[task, "TRPO"], PAPER_SEEDS)
            for task, x in mine.items()
            if len(x) > 1
        }
        if inside:
            text += "Tasks on which the end of the paper's TRPO could be the mean of "
            text += f"{PAPER_SEEDS} runs of `{name}`: {count_inside(inside)}.\n"
    return text


def tell_others(returns: dict, grid: Grid, ends: pd.DataFrame) -> str:
    """TRPO and A2C beside the paper and other code, and with which sigma TRPO is the paper's."""
    tasks = [task for task in grid.tasks if task in ends.index]
    sources = other_code().drop_duplicates("name")
    text = ""
    for family in ("TRPO", "A2C"):
        mine = [name for name in grid.algorithms if name.startswith(family.lower())]
        if not (mine and tasks):
            continue
        rows = []
        for name in mine:
            row = {"algorithm": f"`{name}`"} | dict.fromkeys(tasks, "")
            for task in [task for task in tasks if (task, name) in returns]:
                row[task] = with_interval(returns[task, name], len(grid.seeds))
            rows.append(row)
        for column in [column for column in ends.columns if column.startswith(family)]:
            row = {"algorithm": f"{column}, the paper" if column in PAPER else column}
            rows.append(row | {task: number(ends.loc[task, column]) for task in tasks})
        text += f"{markdown(rows)}\n"
        for row in sources[sources["algorithm"] == family].itertuples():
            text += f"- {row.name}: {row.seeds} seeds; {row.how}; {row.url}\n"
        text += "\n"
    if not text:
        return ""
    return f"""## TRPO and A2C beside other code

Ours: means of the last 100 episodes of training. The paper's: the ends of its curves.

{text}{tell_sigma(returns, tasks, ends)}
"""


def tell_generations(runs: pd.DataFrame) -> str:
    table = []
    mine = runs[runs["algorithm"] == "cem"]
    for task, rows in mine.groupby("env_id", sort=False):
        updates = sweep.numbers(rows["updates"])
        steps = sweep.numbers(rows["total_timesteps"])
        row = {"task": task, "generations": f"{updates.median():.0f}"}
        row |= {"fewest": f"{updates.min():.0f}", "most": f"{updates.max():.0f}"}
        table.append(row | {"steps of each, on average": f"{(steps / updates).median():,.0f}"})
    if not table:
        return ""
    return f"""## CEM's generations

A generation is an episode of each of 200 candidates. Medians over seeds. The last generation is \
played to its end, so a
run may have more steps than those of the others.

{markdown(table)}
"""


def tell_updates(runs: pd.DataFrame, grid: Grid) -> str:
    table = []
    for name in [name for name in grid.algorithms if name != "cem"]:
        row = {"algorithm": f"`{name}`"}
        for task in grid.tasks:
            mine = runs[(runs["algorithm"] == name) & (runs["env_id"] == task)]
            kls = sweep.numbers(mine["kl_median"])
            largest = sweep.numbers(mine["kl_max"]).max()
            row[task] = f"{two_figures(kls.median())} ({two_figures(largest)})" if len(kls) else ""
        table.append(row)
    if not table:
        return ""
    text = f"""## How far an update goes

KL[old, new] of an update: the median over seeds of a run's median, and in brackets the largest of \
all.

{markdown(table)}
"""
    projected = sweep.numbers(runs["projected"][runs["algorithm"] == "a2c-tr"]).dropna()
    if len(projected):
        share, most = projected.mean(), projected.max()
        text += f"The trust region of `a2c-tr` changes the gradient in {share:.2%} of all states, "
        text += f"at most in {most:.2%} of those of a run.\n\n"
    return text


def tell_origin(runs: pd.DataFrame, ppo_folder: Path) -> str:
    """Commands, one for each algorithm; time, versions."""
    text = "## Where this is from\n\n"
    same = r"--env-id \S+|--seed \d+|--run-dir \S+"
    shown = {"--env-id": "--env-id TASK", "--seed": "--seed S"}
    commands = [
        re.sub(same, lambda match: shown.get(match[0].split()[0], ""), command).strip()
        for command in runs["command"]
    ]
    text += "".join(f"    {command}\n" for command in dict.fromkeys(commands))
    hours = sweep.numbers(runs["wall_seconds"]).sum() / 3600
    text += f"\nThese runs trained for {hours:.2f} hours in all, "
    text += f"{sweep.on_the_clock(runs) / 3600:.2f} on the clock, if none was interrupted. "
    names = ("started", "python", *PACKAGES, "git_commit", "cpu", "cores")
    return text + sweep.listed(runs, names) + f". PPO's runs are in {ppo_folder.name}/.\n"


def draw(folder: Path, points: pd.DataFrame, grid: Grid) -> None:
    """curves.png, a panel per task as in the paper; beside.png, one per task and algorithm."""
    curves = plot.gather(points, "env_id", "algorithm", "episodic_return")
    lines = list(WITH_PPO)

    def mine(task: str, names: list[str]) -> plot.Groups:
        there = curves.get(task, {})
        return plot.drawable({name: there[name] for name in names if name in there})

    figure, axes = plot.sheet(len(grid.tasks), 4, (3.2, 2.7))
    for ax, task in zip(axes, grid.tasks, strict=True):
        plot.curves(ax, mine(task, ["ppo", *grid.algorithms]), lines)
        ax.set(title=task, xlabel="", ylabel="")
    plot.legend(figure, "upper", ncols=8, fontsize="small")
    figure.savefig(folder / "curves.png", dpi=90)

    columns = {}  # title -> the algorithms in it
    for name in ("ppo", *grid.algorithms):
        columns.setdefault(WITH_PPO[name].title, []).append(name)
    size = (2.6, 2.1)
    figure, axes = plot.sheet(len(grid.tasks) * len(columns), len(columns), size, sharey="row")
    panels = itertools.product(grid.tasks, columns.items())
    for ax, (task, (title, names)) in zip(axes, panels, strict=True):
        plot.curves(ax, mine(task, names), lines)
        for theirs in grids.paper_curve(task, WITH_PPO[names[0]].curve):
            ax.plot(*theirs, "--", color="0.4", linewidth=1, label="the paper")
        ax.set(xlabel="", ylabel="", title=title if task == grid.tasks[0] else "")
        if names[0] == "ppo":
            ax.set_ylabel(task.removesuffix("-v4"), fontsize="small")
    plot.legend(figure, "upper", ncols=9, fontsize="small")
    figure.savefig(folder / "beside.png", dpi=90)


def report(folder: Path, ppo_folder: Path, asked: Grid) -> None:
    """Write summary.md and the pictures from the CSVs; the same CSVs give the same bytes.

    Of the grid that is asked for, and of the tasks and algorithms that are there besides. Raises
    UserError where there is no run.
    """
    table = sweep.Table(folder, LAYOUT)
    runs = table.runs
    if runs.empty:
        raise UserError(f"{folder / 'runs.csv'} has no run yet; run figure3.py without --report")
    there = [name for name in runs["algorithm"] if name in ALGORITHMS]
    grid = Grid(
        sweep.known_first([*asked.tasks, *runs["env_id"]], TASKS),
        sweep.known_first([*asked.algorithms, *there], list(ALGORITHMS)),
        asked.seeds,
    )
    ppo = read_ppo(ppo_folder)
    returns = returns_of(pd.concat([ppo.runs, runs], ignore_index=True))
    ends = published()
    text = "# Figure 3\n\n"
    text += tell_missing(table.cells, grid, ppo.runs.groupby("env_id").size().to_dict())
    text += (
        "Every run is a row of [runs.csv](runs.csv), its curve is in [curves.csv](curves.csv).\n\n"
    )
    text += tell_returns(returns, grid, ends)
    text += tell_ranks(returns, grid, ends)
    text += tell_disagreements(returns, grid, ends)
    text += tell_experiments(returns, grid, ends)
    text += tell_others(returns, grid, ends)
    text += tell_generations(runs)
    text += tell_updates(runs, grid)
    text += tell_origin(runs, ppo_folder)
    draw(folder, pd.concat([ppo.curves, table.curves]), grid)
    (folder / "summary.md").write_text(text)


# ------------------------------------------------------------------------------------------ MAIN
def main(argv: list[str]) -> None:
    parser = Parser("Run what is missing of the paper's Figure 3, and report it.")
    add = parser.add_argument
    add("--tasks", nargs="+", default=TASKS, help="environment ids; without a version -v4")
    what = "what to run beside PPO"
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help=what)
    what = "runs of every task and algorithm"
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help=what)
    add("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    add("--results", type=Path, default=ROOT / "benchmark/results/figure3", help="folder")
    what = "folder of PPO's runs.csv and curves.csv"
    add("--ppo", type=Path, default=ROOT / "benchmark/results/table1", help=what)
    sweep.add_flags(parser, jobs=None)
    args = parser.parse_args(argv)
    grid = Grid(
        sweep.known_first(map(grids.with_version, args.tasks), TASKS),
        sweep.known_first(args.algorithms, list(ALGORITHMS)),
        sorted(set(args.seeds)),
    )
    if not args.report:
        engine = sweep.choose_engine(args, len(sweep.CORES))
        complete(grid, args.results, args.total_timesteps, engine)
    report(args.results, args.ppo, grid)
    print(args.results / "summary.md")


if __name__ == "__main__":
    cli(main)
