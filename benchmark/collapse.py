"""Where Table 1 came out unlike the paper's: which detail makes the difference? Controlled experiments on one task.

    python benchmark/collapse.py                                # HalfCheetah-v4: run what is missing, then the report
    python benchmark/collapse.py --task InvertedDoublePendulum-v4
    python benchmark/collapse.py --suspects as-it-is adam-epsilon
    python benchmark/collapse.py --report                       # the report alone, from the CSVs

The paper explains its -0.39 for no clipping and no penalty by HalfCheetah, where `none` ends far below the untrained
policy. Here is every detail that may have been different in the paper's own code, one at a time: three seeds of `none`
and of `clip:0.2`, with --preset paper. A suspect is a flag of ppo_continuous.py, or a change of its text: a worker
replaces the old words by the new ones and runs the result, so that what is tested is the script itself with one line
altered.

Results are benchmark/results/collapse/TASK/: per suspect a folder with the runs.csv and curves.csv of
benchmark/table1.py; random.csv, summary.md and collapse.png for all of them. To run again what is committed:
--results mine.
"""

import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous
from benchmark import Parser, UserError, cli, markdown, plot, positive, read_csv, table1
from benchmark.table1 import Call, Grid, Table, cell_of

RESULTS = table1.ROOT / "benchmark/results/collapse"
OBJECTIVES = ["none", "clip:0.2"]


class Suspect(NamedTuple):
    what: str  # and where it is from
    changes: tuple[tuple[str, str], ...] = ()  # of the text of ppo_continuous.py: old, new
    flags: tuple[str, ...] = ()


ADAM = ((".sqrt() + 1e-5)", ".sqrt() + 1e-8)"),)
NORMC = (
    ("gain: float = math.sqrt(2)) -> nn.Linear:", "gain: float = 1.0) -> nn.Linear:"),
    (
        "nn.init.orthogonal_(layer.weight, gain)",
        "layer.weight.data = gain * nn.functional.normalize(torch.randn_like(layer.weight))",
    ),
)
TERMINAL = (
    (
        'recorded = (rollout["rewards"], values, rollout["terminated"], rollout["truncated"])',
        'recorded = (rollout["rewards"], values, *2 * [rollout["terminated"] | rollout["truncated"]])',
    ),
)
FLOOR = (('(stats["var"] + 1e-8).sqrt()', 'stats["var"].clamp(min=1e-2).sqrt()'),)
RENEWAL = '        stats["obs"] = merge(stats["obs"], by_agent(rollout["obs"][:-1]), valid, alive)\n'
LEARNING = "        learners = update(step, learners, batch, knobs, orders, lr, args)\n"
AFTER = (
    (RENEWAL, RENEWAL.replace('stats["obs"] =', "renewed =")),
    (LEARNING, LEARNING + '        stats["obs"] = renewed\n'),
)
STORING = '        batch |= {"obs": seen, "mean": mean, "log_std": log_std}'
ACTING = (
    (RENEWAL, '        acted = stats["obs"]\n' + RENEWAL),
    (
        STORING,
        '        acting = standardised(by_agent(rollout["obs"]), acted, args.obs_clip).to(args.device)\n'
        '        mean, log_std, _ = look(learners["weights"], (acting,))\n' + STORING,
    ),
)
RAW = ("--norm-adv", "none")
SUSPECTS = {
    "as-it-is": Suspect("nothing: --preset paper"),
    "adam-epsilon": Suspect("Adam's epsilon is 1e-8, as in the first public code (baselines da99706)", ADAM),
    "normc": Suspect("weights are Gaussian, scaled to norm 1 per unit, 0.01 for the means (baselines ppo1)", NORMC),
    "time-limit": Suspect("the end of the 1000 steps counts as terminal: no bootstrap (baselines ppo1)", TERMINAL),
    "value-clip": Suspect("the value loss is clipped at 0.2 (baselines da99706)", flags=("--value-clip", "0.2")),
    "filter-floor": Suspect("observations are divided by no less than 0.1 (baselines ppo1)", FLOOR),
    "filter-after": Suspect("observation statistics are renewed after the update, not before it", AFTER),
    "filter-acting": Suspect("the old policy is what acted, under the statistics before their renewal", ACTING),
    "first-code": Suspect(
        "all that the first public code had: Adam, normc, time limit, value clipping, filter floor",
        (*ADAM, *NORMC, *TERMINAL, *FLOOR),
        ("--value-clip", "0.2"),
    ),
    "annealing": Suspect(
        "the step size falls linearly to 0 (baselines d9f194f, a day older than the paper's second version)",
        flags=("--anneal-lr", "True"),
    ),
    "step-size": Suspect("the step size is 1e-3, not the 3e-4 of Table 3", flags=("--learning-rate", "0.001")),
    "raw-advantages": Suspect("advantages are not standardised; the paper does not say", flags=RAW),
    "raw-time-limit": Suspect("both: advantages as they are, and the time limit is terminal", TERMINAL, RAW),
    "simulator": Suspect("Gymnasium and its MuJoCo simulate, not EnvPool's", flags=("--env-backend", "gymnasium")),
}


def altered(changes: tuple[tuple[str, str], ...]) -> ModuleType:
    """ppo_continuous.py with every old text replaced. Raises UserError where it does not hold one."""
    text = Path(ppo_continuous.__file__).read_text()
    for old, new in changes:
        if old not in text:
            raise UserError(f"ppo_continuous.py no longer says {old.strip()!r}: mend benchmark/collapse.py")
        text = text.replace(old, new)
    module = ModuleType("ppo_continuous")
    module.__file__ = ppo_continuous.__file__
    before, sys.modules["ppo_continuous"] = sys.modules["ppo_continuous"], module  # dataclasses look themselves up
    try:
        exec(compile(text, module.__file__, "exec"), module.__dict__)
    finally:
        sys.modules["ppo_continuous"] = before
    return module


def suspect_of(call: Call) -> str:
    return call.path.parent.name


def answer(call: Call, mine: list[int], pipe: Connection) -> None:
    """table1.answer, in a process of its own, with the altered script."""
    sys.modules["ppo_continuous"] = table1.ppo_continuous = altered(SUSPECTS[suspect_of(call)].changes)
    table1.answer(call, mine, pipe)


def complete(names: list[str], grid: Grid, settings: list[str], folder: Path, jobs: int) -> None:
    """Run what the CSVs lack. Raises UserError."""
    with table1.alone(folder):
        tables, calls = {name: Table(folder / name) for name in names}, []
        for name, table in tables.items():
            altered(SUSPECTS[name].changes)
            mine = [*settings, *SUSPECTS[name].flags]
            table.check(mine)
            calls += table1.plan(grid, {*map(cell_of, table.runs)}, mine, f"runs/collapse/{folder.name}/{name}")
        table1.measure_random(grid, settings, folder / "random.csv")
        engine = partial(table1.local, jobs=jobs, target=answer)
        table1.run(calls, engine, lambda call: tables[suspect_of(call)])


def lowest(run: dict, curves: list[dict]) -> float:
    """The lowest return of the second half of a run, from its row of runs.csv and the rows of curves.csv."""
    mine = [point for point in curves if cell_of(point) == cell_of(run) and point["episodic_return"]]
    late = [point for point in mine if 2 * int(point["global_step"]) > int(run["total_timesteps"])]
    return min([float(point["episodic_return"]) for point in late], default=np.nan)


def report(task: str, folder: Path) -> None:
    """Write summary.md and collapse.png from the CSVs of all suspects that have run. Raises OSError where none has."""
    (untrained,) = table1.random_returns(read_csv(folder / "random.csv"), [task], "gaussian")
    names = [name for name in SUSPECTS if (folder / name / "runs.csv").exists()]
    table, diffs, panels = [], "", {}
    for name in names:
        runs, suspect = Table(folder / name), SUSPECTS[name]
        row = {"suspect": f"`{name}`", "what is different": suspect.what}
        for objective in OBJECTIVES:
            mine = [run for run in runs.runs if run["objective"] == objective]
            returns = [float(run["last_100_return"] or "nan") for run in mine]
            row[f"`{objective}`"] = ", ".join(map(table1.number, returns))
            row[f"lowest, `{objective}`"] = ", ".join(table1.number(lowest(run, runs.curves)) for run in mine)
            row[f"KL, `{objective}`"] = f"{np.median([float(run['kl_median']) for run in mine]):.2g}"
            if objective == "none":
                row["below untrained"] = f"{sum(ret < untrained for ret in returns)} of {len(returns)}"
        table.append(row)
        points = [(name, p["objective"], p["seed"], float(p["global_step"]), p["episodic_return"]) for p in runs.curves]
        panels |= plot.gather((*point[:4], float(point[4])) for point in points if point[4])
        lines = "".join(f"{sign}{line}\n" for pair in suspect.changes for sign, text in zip("-+", pair, strict=True)
                        for line in text.strip("\n").splitlines())  # fmt: skip
        lines += f"+{' '.join(suspect.flags)}\n" if suspect.flags else ""
        diffs += f"`{name}`:\n\n```diff\n{lines}```\n\n" if lines else ""
    draw(folder / "collapse.png", panels, untrained)
    origin = table1.tell_origin([run for name in names for run in Table(folder / name).runs])
    (folder / "summary.md").write_text(f"""# {task}, one detail at a time

{markdown(table)}
The return of the last 100 episodes, seed by seed: at the end, and where it was lowest in the second half of the run;
and the median KL[old, new] of an update. The untrained Gaussian policy scores {table1.number(untrained)}.

![Learning curves](collapse.png)

Means over seeds with bootstrap 95% intervals; dashed: the untrained policy. A panel that goes below -10,000 is
logarithmic from there on.

## What was changed

{diffs}Each command below ran with the change of the suspect that its --run-dir names.

{origin}""")


def draw(path: Path, panels: dict[str, plot.Groups], untrained: float) -> None:
    """A panel per suspect."""
    rows = -(-len(panels) // 4)
    figure = Figure(figsize=(12, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    for i, (ax, (name, groups)) in enumerate(zip(axes, panels.items(), strict=False)):
        plot.curves(ax, groups, OBJECTIVES, untrained)
        ax.set(title=name, xlabel="", ylabel="return (last 100)" if i % 4 == 0 else "")
        low, high = ax.get_ylim()
        if low < -10_000:
            ax.set_yscale("symlog", linthresh=10_000)
            ticks = [tick for tick in (-1_000_000, -100_000, -30_000, -10_000, 0, 10_000) if low < tick < high]
            ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.savefig(path, dpi=90)


def main(argv: list[str]) -> None:
    parser = Parser("Which detail makes the difference to the paper's Table 1?")
    parser.add_argument("--task", choices=table1.TASKS, default=table1.TASKS[0], help="on which task")
    parser.add_argument("--suspects", nargs="+", choices=SUSPECTS, default=list(SUSPECTS), help="what to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="runs of each objective")
    parser.add_argument("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    parser.add_argument("--jobs", type=positive, default=len(table1.CORES), help="suspects at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder, in which each task has its own")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of the runs there are")
    parser.add_argument("flags", nargs="*", help="after --: more flags of ppo_continuous.py for every run")
    args = parser.parse_args(argv)
    folder = args.results / args.task
    if not args.report:
        grid = Grid([args.task], OBJECTIVES, sorted({*args.seeds}))
        settings = ["--preset", "paper", "--total-timesteps", str(args.total_timesteps), *args.flags]
        complete(args.suspects, grid, settings, folder, args.jobs)
    report(args.task, folder)
    print(folder / "summary.md")


if __name__ == "__main__":
    cli(main)
