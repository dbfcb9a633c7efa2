"""The defaults of ppo_continuous.py on MuJoCo: which settings earn their place?

    python benchmark/defaults.py --search      # what is missing of the search
    python benchmark/defaults.py               # what is missing of the final runs
    python benchmark/defaults.py --report      # the report alone, from the CSVs

The search starts from a centre and changes one thing at a time, on four tasks and seeds 1 to 6. One
change goes back to the defaults of before; one setting puts two changes together. The centre is
what `--preset modern` says. The final runs show it on all seven tasks with seeds 101 to 110, which
the search does not have.

The setting of two changes did best in the search, and was the default from commit fd3fd4c to
d005031. Its runs on all tasks, with the same ten seeds, showed that it is not better. They are in
candidate/. To make them again: `git checkout fd3fd4c`, and the second command with --results mine.

Every command names all that the search changes, so that it means the same whatever the defaults
are. Where no flag does, a worker changes the text of the script, as benchmark/collapse.py does.

Results are benchmark/results/defaults/: search/, final/ and candidate/ with runs.csv and curves.csv
of all runs, random.csv, and summary.md for all. To run again what is committed: --results mine.
(The first runs of `centre` and `eight-actors` have other names for these in their run folders.)
"""

import itertools
import sys
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
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
)
from benchmark.grids import TASKS, Grid
from benchmark.sweep import Call, Layout, Table

RESULTS = sweep.ROOT / "benchmark/results/defaults"
PUBLIC = sweep.ROOT / "benchmark/paper/mujoco_1m.csv"
CHEETAH = "HalfCheetah-v4"
SEARCHED = [CHEETAH, "Walker2d-v4", "Swimmer-v4", "InvertedDoublePendulum-v4"]
SEARCH_SEEDS = range(1, 7)
FINAL_SEEDS = range(101, 111)
PLATEAU = 2500  # of CHEETAH: between the two outcomes, a plateau and a gait


class Setting(NamedTuple):
    what: str
    flags: dict[str, str]  # those of the centre that are different, and more
    changes: tuple[tuple[str, str], ...] = ()  # of the script's text: old, new


CENTRE = {
    "num-envs": "1",
    "num-steps": "2048",
    "log-std": "-1",
    "norm-adv": "minibatch",
    "gamma": "0.99",
    "gae-lambda": "0.95",
    "update-epochs": "10",
}
RELU = (
    (
        "        layer_init(nn.Linear(inputs, 64)),\n        nn.Tanh(),\n",
        "        layer_init(nn.Linear(inputs, 64)),\n        nn.ReLU(),\n",
    ),
    (
        "        layer_init(nn.Linear(64, 64)),\n        nn.Tanh(),\n",
        "        layer_init(nn.Linear(64, 64)),\n        nn.ReLU(),\n",
    ),
    ("x = np.tanh(x @ w0.mT + b0)", "x = np.maximum(x @ w0.mT + b0, 0)"),
    ("x = np.tanh(x @ w1.mT + b1)", "x = np.maximum(x @ w1.mT + b1, 0)"),
)
SETTINGS = {
    "centre": Setting("1 actor x 2,048 steps, log sigma from -1", {}),
    "before": Setting("log sigma from 0: the defaults of before", {"log-std": "0"}),
    "log-std-0.5": Setting("log sigma from -0.5", {"log-std": "-0.5"}),
    "log-std-1.5": Setting("log sigma from -1.5", {"log-std": "-1.5"}),
    "eight-actors": Setting("8 actors x 256 steps", {"num-envs": "8", "num-steps": "256"}),
    "norm-adv-none": Setting("advantages as they are", {"norm-adv": "none"}),
    "norm-adv-batch": Setting(
        "advantages standardised over the batch, not over the minibatch", {"norm-adv": "batch"}
    ),
    "value-clip": Setting("the value loss clipped at 0.2", {"value-clip": "0.2"}),
    "lambda-0.9": Setting("lambda 0.9", {"gae-lambda": "0.9"}),
    "gamma-0.995": Setting("gamma 0.995", {"gamma": "0.995"}),
    "gamma-0.999": Setting("gamma 0.999", {"gamma": "0.999"}),
    "gamma-0.995-none": Setting(
        "gamma 0.995 and advantages as they are", {"gamma": "0.995", "norm-adv": "none"}
    ),
    "epochs-5": Setting("5 epochs", {"update-epochs": "5"}),
    "relu": Setting("ReLU in place of tanh", {}, RELU),
    "adam-epsilon": Setting("Adam's epsilon 1e-8 in place of 1e-5", {}, grids.ADAM_EPSILON),
}
CHOSEN = "centre"  # what --preset modern says
CANDIDATE = "gamma-0.995-none"  # what it said in the commit of candidate/
FINAL = "defaults"  # the setting of all final runs: --preset modern as it is

COLUMNS = ("env_id", "setting", "seed", *grids.LAYOUT.columns)
LAYOUT = replace(
    grids.LAYOUT,
    key=("env_id", "setting", "seed"),
    columns=tuple(dict.fromkeys(COLUMNS)),  # each once
    order={"env_id": TASKS, "setting": list(SETTINGS)},
)


# ---------------------------------------------------------------------------------------- RUNS
def flags_of(name: str) -> list[str]:
    """The flags of a setting; --flag=value, since a value may begin with a minus."""
    if name == FINAL:
        return []
    return [f"--{flag}={value}" for flag, value in (CENTRE | SETTINGS[name].flags).items()]


def plan(
    names: list[str], tasks: list[str], seeds: list[int], settings: list[str], table: Table
) -> list[Call]:
    """A call for each setting and task, with the seeds that the table lacks of it.

    names: of SETTINGS. settings: the flags of all runs. Raises UserError where a run of the table
    had other flags.
    """
    for name, command in table.runs[["setting", "command"]].drop_duplicates().to_numpy():
        if " ".join([*settings, *flags_of(name), "--run-dir"]) not in command:
            what = f"{table.folder} holds runs of other settings: {command}"
            raise UserError(f"{what}; give other --results")
    calls, done = [], table.cells
    for name, task in itertools.product(names, tasks):
        missing = [str(seed) for seed in seeds if (task, name, seed) not in done]
        if missing:
            flags = [*grids.environment(task), "--seeds", *missing, *settings, *flags_of(name)]
            folder = f"{sweep.runs_of(table.folder)}/{name}/{task}__{'-'.join(missing)}"
            flags += ["--run-dir", folder]
            calls.append(Call("benchmark.lockstep", tuple(flags), {"setting": name}))
    return calls


def answer(call: Call, layout: Layout, mine: list[int], pipe: Connection) -> None:
    """sweep.answer, in a process of its own, with the text of the call's setting."""
    setting = SETTINGS.get(call.labels["setting"])
    if setting is not None and setting.changes:
        grids.use(*grids.altered(setting.changes))
    sweep.answer(call, layout, mine, pipe)


def complete(folder: Path, names: list[str], tasks, seeds, settings: list[str], engine) -> None:
    """Run what the CSVs of this folder lack. Raises UserError."""
    with sweep.alone(folder):
        table = Table(folder, LAYOUT)
        sweep.run(plan(names, tasks, seeds, settings, table), engine, lambda call: table)


# -------------------------------------------------------------------------------------- REPORT
def returns_of(runs: pd.DataFrame, column: str) -> pd.Series:
    """A column of runs.csv as numbers, by (task, setting, seed)."""
    keyed = runs.set_index(["env_id", "setting", runs["seed"].astype(int)])
    return sweep.numbers(keyed[column]).sort_index()


def iqm(x: np.ndarray) -> float:
    """The mean of the middle half."""
    return float(stats.trim_mean(x, 0.25))


def effects(last: pd.Series, zero: np.ndarray, names: list[str]) -> dict[str, str]:
    """What each of these settings changes, on the mean normalised score, against the centre.

    last: returns by (task, setting, seed), whole for these. Empty where they lack the centre.
    """
    if "centre" not in names:
        return {}
    tasks, _, seeds = (last.index.unique(level) for level in range(3))
    tasks = [task for task in SEARCHED if task in tasks]
    cells = list(itertools.product(tasks, names, sorted(seeds)))
    raw = last.reindex(cells).to_numpy().reshape(len(tasks), len(names), len(seeds))
    normalised = scores.normalise(raw, zero, scores.best_returns(raw, "run"))
    means, draws = scores.means(normalised), scores.means(scores.resample(normalised))
    centre, found = names.index("centre"), {}
    for i, name in enumerate(names):
        low, high = scores.interval(draws[:, i] - draws[:, centre])
        found[name] = f"{means[i] - means[centre]:+.2f} [{low:+.2f}, {high:+.2f}]"
    return found | {"centre": "0"}


def tell_search(folder: Path) -> str:
    """Every setting beside the centre, from search/; an effect where all of its runs are there."""
    runs = sweep.read(folder / "search/runs.csv")
    runs = runs[runs["env_id"].isin(SEARCHED)]
    last = returns_of(runs, "last_100_return")
    greedy = returns_of(runs, "eval_return_mean")
    seeds = sorted(set(runs["seed"].astype(int)))
    tasks = [task for task in SEARCHED if task in set(runs["env_id"])]
    counts = runs.groupby("setting").size()
    whole = [name for name in SETTINGS if counts.get(name, 0) == len(tasks) * len(seeds)]
    zero = grids.random_returns(folder / "random.csv", tasks, "gaussian")
    effect = effects(last, zero, whole)
    rows, every = [], []
    for name in [name for name in SETTINGS if name in counts]:
        row = {"setting": f"`{name}`", "what is different": SETTINGS[name].what}
        row["effect [95%]"] = effect.get(name, "")
        sorted_returns = {"setting": f"`{name}`"}
        for task in tasks:
            returns = last.get((task, name), pd.Series(dtype=float))
            row[task], sorted_returns[task] = "", ", ".join(number(x) for x in sorted(returns))
            if len(returns) == len(seeds):
                mean = greedy.loc[task, name].mean()
                row[task] = f"{number(iqm(returns.to_numpy()))} / {number(mean)}"
        cheetahs = last.get((CHEETAH, name), pd.Series(dtype=float))
        row["gaits"] = f"{(cheetahs > PLATEAU).sum()} of {len(cheetahs)}"
        rows.append(row)
        every.append(sorted_returns)
    left_out = [f"`{name}`" for name in SETTINGS if name not in whole]
    missing = f"Not all runs are there of {', '.join(left_out)}.\n" if left_out else ""
    return f"""## The search

{markdown(rows)}
{len(tasks)} tasks x {len(seeds)} seeds. In each cell: the interquartile mean of the last 100 \
training
episodes, and the mean greedy return at the end. Effect: on the mean normalised score, against \
the centre; 0 is the
untrained Gaussian policy and 1 the best run of the task among settings with all runs; bootstrap \
intervals. Gaits: the HalfCheetahs whose last 100 episodes are above \
{PLATEAU:,}; the others stay on
a plateau. The defaults are those
of `{CHOSEN}`.
{missing}{grids.tell_frozen(runs, list(LAYOUT.key))}

Every run, sorted:

{markdown(every)}
{sweep.origin(runs)}"""


def tell_final(folder: Path) -> str:
    """The defaults on all tasks, beside what others have published. Draws final.png."""
    table = Table(folder / "final", LAYOUT)
    last = returns_of(table.runs, "last_100_return")
    greedy = returns_of(table.runs, "eval_return_mean")
    public = pd.read_csv(PUBLIC)
    rows, verdicts = [], []
    for task in TASKS:
        if task not in last.index:
            continue
        ours, mine = last.loc[task].to_numpy(), greedy.loc[task].to_numpy()
        row = {"task": task, "seeds": str(len(ours))}
        span = f"{number(min(ours))} to {number(max(ours))}"
        row["last 100: IQM (lowest to highest)"] = f"{number(iqm(ours))} ({span})"
        mean, low, high = scores.mean_interval(mine)
        row["greedy: mean [95%]"] = f"{number(mean)} [{number(low)}, {number(high)}]"
        curves = table.curves[table.curves["env_id"] == task]
        points = sweep.numbers(curves["episodic_return"])
        highest = points.groupby(curves["global_step"]).mean().max()
        row["highest mean of the run"] = number(highest)
        theirs = public[public["env_id"] == task]
        for source in public["source"].unique():
            found = theirs[theirs["source"] == source]
            row[source] = number(found["mean"].iloc[0]) if len(found) else ""
        rows.append(row)
        verdicts.append({"task": task} | compare(mine, theirs))
    draw(folder / "final.png", table.curves)
    said = [verdict["ours is"] for verdict in verdicts]
    higher = sum(verdict["our mean is"] == "higher" for verdict in verdicts)
    sources = []
    for row in public.drop_duplicates("source").itertuples():
        sources.append(f"- {row.source}: {row.how}; {row.url}")
    return f"""## The defaults, with seeds that the search does not have

{markdown(rows)}
The defaults of `ppo_continuous.py`. Last 100: training episodes, sampled
actions. Greedy: 20 episodes at the end. Highest mean of the run: the largest, over the run, of \
the mean over seeds of the
last 100 episodes, which is how a maximum is published. \
{grids.tell_frozen(table.runs, ["env_id", "seed"])}

Others' figures; not all of them are of -v4:

{chr(10).join(sources)}

![Learning curves beside the paper's](final.png)

Greedy returns at the end against the ten seeds of Tianshou at 983k steps, by Welch's t test from \
means and deviations.
Our mean is higher on {higher} of {len(said)} tasks; by the test, it is better on \
{said.count("better")}, worse on {said.count("worse")}.

{markdown(verdicts)}
{sweep.origin(table.runs)}"""


def tell_candidate(folder: Path) -> str:
    """The final runs beside those of CANDIDATE: tasks and seeds that both have."""
    runs = [sweep.read(folder / part / "runs.csv") for part in ("final", "candidate")]
    both = [returns_of(mine, "last_100_return") for mine in runs]
    cells = both[0].index.intersection(both[1].index)
    rows = []
    for task in [task for task in TASKS if task in cells.get_level_values("env_id")]:
        ours, theirs = (mine[cells][task].to_numpy() for mine in both)
        row = {"task": task, "seeds": str(len(ours))}
        for name, x in (("defaults", ours), (f"`{CANDIDATE}`", theirs)):
            row[f"{name}: mean"] = number(x.mean())
            row[f"{name}: each"] = ", ".join(number(y) for y in sorted(x))
        row["the candidate is"], row["p"] = welch(moments(theirs), moments(ours))
        rows.append(row)
    said = [row["the candidate is"] for row in rows]
    return f"""## The best of the search, on all tasks

`{CANDIDATE}` and the defaults with the same seeds, returns of the last 100 episodes. p: Welch's t \
test, not corrected for
the number of tasks. The candidate is better on {said.count("better")} and worse on \
{said.count("worse")} of {len(said)} tasks; on the others no difference is
shown.

{markdown(rows)}
Of the candidate: {grids.tell_frozen(runs[1], ["env_id", "seed"])}

{sweep.origin(runs[1])}
In that commit `--preset modern` meant `{CANDIDATE}`.
"""


def moments(x: np.ndarray) -> tuple[float, float, int]:
    """Mean, standard deviation and size of a sample."""
    return x.mean(), x.std(ddof=1), len(x)


def welch(mine: tuple[float, float, int], theirs: tuple[float, float, int]) -> tuple[str, str]:
    """moments() of two samples -> whether the first is better, or worse, at the level of 5%; p.

    By Welch's t test, which needs two of each. Where no run differs from another it has no t: then
    the means say it.
    """
    if min(mine[2], theirs[2]) < 2:
        return "one run only", ""
    first, second = ((mean, max(deviation, 1e-6), n) for mean, deviation, n in (mine, theirs))
    p = stats.ttest_ind_from_stats(*first, *second, equal_var=False).pvalue
    word = "no difference shown"
    if p < 0.05:
        word = "better" if mine[0] > theirs[0] else "worse"
    return word, f"{p:.2g}"


def draw(path: Path, curves: pd.DataFrame) -> None:
    """The curve of every task beside the paper's."""
    ours = plot.gather(curves, "env_id", "setting", "episodic_return")
    figure, axes = plot.sheet(len(TASKS), 4, (3, 2.6))
    for ax, task in zip(axes, TASKS, strict=True):
        groups = {f"ppo_continuous.py, {task[-3:]}": ours.get(task, {}).get(FINAL, [])}
        groups["the paper, -v1"] = grids.paper_curve(task)
        lines = list(groups)
        plot.curves(ax, plot.drawable(groups), lines)
        ax.set(title=task, xlabel="", ylabel="")
    plot.legend(figure, "lower", ncols=2)
    figure.savefig(path, dpi=110)


def compare(mine: np.ndarray, theirs: pd.DataFrame) -> dict[str, str]:
    """Our runs of a task beside Tianshou's mean and deviation."""
    theirs = theirs[theirs["source"] == "Tianshou, at 983k steps"].iloc[0]
    peer = theirs["mean"], theirs["deviation"], int(theirs["seeds"])
    word, p = welch(moments(mine), peer)
    return {
        "ours": f"{number(mine.mean())} +- {number(mine.std(ddof=1))}",
        "Tianshou": f"{number(theirs['mean'])} +- {number(theirs['deviation'])}",
        "our mean is": "higher" if mine.mean() > theirs["mean"] else "not higher",
        "ours is": word,
        "p": p,
    }


def report(folder: Path) -> None:
    """Write summary.md from the CSVs there are. Raises UserError where there is none."""
    text = ""
    for tell, parts in {
        tell_final: ["final"],
        tell_search: ["search"],
        tell_candidate: ["final", "candidate"],
    }.items():
        if all((folder / part / "runs.csv").exists() for part in parts):
            text += f"\n{tell(folder)}"
    if not text:
        raise UserError(f"{folder} has no run yet; run defaults.py without --report")
    (folder / "summary.md").write_text(f"# The defaults of ppo_continuous.py on MuJoCo\n{text}")


def main(argv: list[str]) -> None:
    parser = Parser("Which settings earn their place among the defaults on MuJoCo?")
    add = parser.add_argument
    add("--search", action="store_true", help="run the search, not the defaults of today")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of the search")
    add("--tasks", nargs="+", choices=TASKS, help="default: four in the search, all in the end")
    add("--seeds", nargs="+", type=int, help="default: 1 to 6 in the search, 101 to 110 in the end")
    add("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs and the report")
    sweep.add_flags(parser, jobs=None)
    args = parser.parse_args(argv)
    if not args.report:
        settings = grids.common_flags("modern", args.total_timesteps, [])
        engine = sweep.choose_engine(args, len(sweep.CORES))
        if args.engine == "local":
            engine = partial(engine, target=answer)
        if args.search:
            tasks, seeds = args.tasks or SEARCHED, args.seeds or list(SEARCH_SEEDS)
            if not set(tasks) <= set(SEARCHED):
                raise UserError(f"the search is on {' '.join(SEARCHED)} alone")
            altered = [name for name in args.settings if SETTINGS[name].changes]
            if args.engine == "ray" and altered:
                what = "Ray's workers run the script as it is; leave out --settings"
                raise UserError(f"{what} {' '.join(altered)}")
            scale = [*settings, "--log-std=0"]  # the same 0 of the scale, whatever the defaults are
            grids.measure(Grid(tasks, [], seeds), scale, args.results / "random.csv")
            complete(args.results / "search", args.settings, tasks, seeds, settings, engine)
        else:
            tasks, seeds = args.tasks or TASKS, args.seeds or list(FINAL_SEEDS)
            complete(args.results / "final", [FINAL], tasks, seeds, settings, engine)
    report(args.results)
    print(args.results / "summary.md")


if __name__ == "__main__":
    cli(main)
