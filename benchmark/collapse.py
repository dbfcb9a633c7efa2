"""Where Table 1 came out unlike the paper's: which detail makes the difference?

Controlled experiments on one task:

    python benchmark/collapse.py                                # what is missing of HalfCheetah-v4
    python benchmark/collapse.py --task InvertedDoublePendulum-v4
    python benchmark/collapse.py --suspects filter-acting       # one that has not been tried there
    python benchmark/collapse.py --report                       # the report alone, from the CSVs

The paper explains its -0.39 for no clipping and no penalty by HalfCheetah, where `none` ends far
below the untrained policy. Here is every detail that may have been different in the paper's own
code, one at a time: three seeds of `none` and of `clip:0.2`, with `--preset paper` and with time
limits bootstrapped, as in benchmark/results/table1-bootstrapped/. A suspect is a flag of
ppo_continuous.py, or a change of its text or of that of benchmark/lockstep.py: a worker replaces
the old words by the new ones and runs the result. So what is tested is the code itself with one
line altered.

Results are benchmark/results/collapse/TASK/: per suspect a folder with the runs.csv and curves.csv
of benchmark/grids.py and the change, change.diff; random.csv, summary.md and collapse.png for all
of them. To run again what is committed: --results mine.
"""

import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

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
    sweep,
)
from benchmark.grids import LAYOUT, Grid
from benchmark.sweep import Call, Layout, Table

RESULTS = sweep.ROOT / "benchmark/results/collapse"
OBJECTIVES = ["none", "clip:0.2"]


class Suspect(NamedTuple):
    what: str  # and where it is from
    changes: tuple[tuple[str, str], ...] = ()  # of the text of either file: old, new
    flags: tuple[str, ...] = ()
    earlier: tuple[str, ...] | None = None  # flags of the committed runs, where they were others

    @property
    def diff(self) -> str:
        """What is different, in the words of change.diff."""
        lines = []
        for old, new in self.changes:
            lines += [f"-{line}\n" for line in old.strip("\n").splitlines()]
            lines += [f"+{line}\n" for line in new.strip("\n").splitlines()]
        if self.flags:
            lines.append(f"+{' '.join(self.flags)}\n")
        return "".join(lines)


NORMC = (
    ("gain: float = math.sqrt(2)", "gain: float = 1.0"),
    (
        "nn.init.orthogonal_(layer.weight, gain)",
        "layer.weight.data = gain * nn.functional.normalize(torch.randn_like(layer.weight))",
    ),
)
FLOOR = (("(self.var + 1e-8).sqrt()", "(self.var + 1e-8).clamp(min=1e-2).sqrt()"),)
RENEWAL = """\
            if alive[i]:
                agent.obs_stats.update(obs[i][:-1][valid[i]])
"""
LEARNED = "            # LOG\n            bar.update(args.batch_size * count)\n"
AFTER = (
    (RENEWAL, ""),
    (
        LEARNED,
        """\
            for i, batch in enumerate(batches):
                if alive[i]:
                    agents[i].obs_stats.update(batch["obs"][batch["valid"]])
"""
        + LEARNED,
    ),
)
STORING = "            mean, log_std = agent.policy(obs[i][:-1])\n"
ACTING = ((RENEWAL + STORING, STORING + RENEWAL),)
TERMINAL = ("--no-bootstrap-truncated",)
RAW = ("--norm-adv", "none")
CLIPPED = ("--value-clip", "0.2")
SUSPECTS = {
    "as-it-is": Suspect("nothing: --preset paper --bootstrap-truncated"),
    "adam-epsilon": Suspect(
        "Adam's epsilon is 1e-8, as in the first public code (baselines da99706)",
        grids.ADAM_EPSILON,
    ),
    "normc": Suspect(
        "weights are Gaussian, scaled to norm 1 per unit, 0.01 for the means (baselines ppo1)",
        NORMC,
    ),
    "time-limit": Suspect(
        "the end of the 1000 steps counts as terminal: no bootstrap (baselines ppo1)",
        flags=TERMINAL,
        earlier=(),
    ),
    "value-clip": Suspect("the value loss is clipped at 0.2 (baselines da99706)", flags=CLIPPED),
    "filter-floor": Suspect("observations are divided by no less than 0.1 (baselines ppo1)", FLOOR),
    "filter-after": Suspect(
        "observation statistics are renewed after the update, not before it", AFTER
    ),
    "filter-acting": Suspect(
        "the old policy is what acted, under the statistics before their renewal", ACTING
    ),
    "first-code": Suspect(
        "all that the first public code had: Adam, normc, time limit, value clipping, filter floor",
        (*grids.ADAM_EPSILON, *NORMC, *FLOOR),
        (*TERMINAL, *CLIPPED),
        earlier=CLIPPED,
    ),
    "annealing": Suspect(
        "the step size falls linearly to 0 "
        "(baselines d9f194f, a day older than the paper's second version)",
        flags=("--anneal-lr",),
        earlier=("--anneal-lr", "True"),
    ),
    "step-size": Suspect(
        "the step size is 1e-3, not the 3e-4 of Table 3", flags=("--learning-rate", "0.001")
    ),
    "raw-advantages": Suspect("advantages are not standardised; the paper does not say", flags=RAW),
    "raw-time-limit": Suspect(
        "both: advantages as they are, and the time limit is terminal",
        flags=(*RAW, *TERMINAL),
        earlier=RAW,
    ),
    "simulator": Suspect(
        "Gymnasium and its MuJoCo simulate, not EnvPool's", flags=("--env-backend", "gymnasium")
    ),
}


TRIED = {  # on the tasks that have a page in docs/
    "HalfCheetah-v4": [name for name in SUSPECTS if name not in ("filter-acting", "annealing")],
    "InvertedDoublePendulum-v4": [
        "as-it-is",
        "time-limit",
        "filter-floor",
        "first-code",
        "annealing",
    ],
}


def suspect_of(call: Call) -> str:
    return call.path.parent.name


def answer(call: Call, layout: Layout, mine: list[int], pipe: Connection) -> None:
    """sweep.answer, in a process of its own, with the altered script and the altered crowd."""
    grids.use(*grids.altered(SUSPECTS[suspect_of(call)].changes))
    sweep.answer(call, layout, mine, pipe)


def diff_of(folder: Path) -> str:
    """The change that the runs of a suspect's folder were made with."""
    path = folder / "change.diff"
    return path.read_text() if path.exists() else ""


def complete(names: list[str], grid: Grid, settings: list[str], folder: Path, jobs: int) -> None:
    """Run what the CSVs lack. Raises UserError."""
    with sweep.alone(folder):
        tables, calls = {name: Table(folder / name, LAYOUT) for name in names}, []
        for name, table in tables.items():
            suspect = SUSPECTS[name]
            grids.altered(suspect.changes)
            mine = [*settings, *suspect.flags]
            before = mine if suspect.earlier is None else [*settings, *suspect.earlier]
            grids.check(table, mine, before)
            missing = grids.plan(grid, table.cells, mine, f"{sweep.runs_of(folder)}/{name}")
            if missing and len(table.runs) and diff_of(table.folder) != suspect.diff:
                what = f"{table.folder} holds runs of another change, see its change.diff"
                raise UserError(f"{what}; give other --results")
            if missing and suspect.diff:
                table.folder.mkdir(exist_ok=True)
                (table.folder / "change.diff").write_text(suspect.diff)
            calls += missing
        grids.measure(grid, settings, folder / "random.csv")
        engine = partial(sweep.local, jobs=jobs, target=answer)
        sweep.run(calls, engine, lambda call: tables[suspect_of(call)])


def summarise(table: Table, objective: str) -> tuple[dict, np.ndarray]:
    """Cells of an objective in a suspect's row of summary.md, and the returns of its runs."""
    runs = table.runs[table.runs["objective"] == objective]
    points = table.curves.merge(runs[[*LAYOUT.key, "total_timesteps"]], on=list(LAYOUT.key))
    late = 2 * points["global_step"].astype(int) > points["total_timesteps"].astype(int)
    lowest = sweep.numbers(points["episodic_return"])[late].groupby(points["seed"]).min()
    returns = sweep.numbers(runs["last_100_return"])
    cells = {
        f"`{objective}`": ", ".join(map(number, returns)),
        f"lowest, `{objective}`": ", ".join(map(number, lowest.reindex(runs["seed"]))),
        f"KL, `{objective}`": f"{sweep.numbers(runs['kl_median']).median(skipna=False):.2g}",
    }
    return cells, returns.to_numpy()


def report(task: str, folder: Path) -> None:
    """Write summary.md and collapse.png from the CSVs of all suspects that have run.

    Raises UserError where none has.
    """
    if not any((folder / name / "runs.csv").exists() for name in SUSPECTS):
        raise UserError(f"{folder} has no run yet; run collapse.py without --report")
    (untrained,) = grids.random_returns(folder / "random.csv", [task], "gaussian")
    tables = {}
    for name in SUSPECTS:
        if (folder / name / "runs.csv").exists():
            tables[name] = Table(folder / name, LAYOUT)
    rows, diffs, panels = [], "", {}
    for name, table in tables.items():
        row = {"suspect": f"`{name}`", "what is different": SUSPECTS[name].what}
        cells, returns = summarise(table, "none")
        below = f"{(returns < untrained).sum()} of {len(returns)}"
        row |= cells | {"below untrained": below} | summarise(table, "clip:0.2")[0]
        rows.append(row)
        panels[name] = plot.groups_of(table.curves, "objective", "episodic_return")
        diff = diff_of(folder / name)
        diffs += f"`{name}`:\n\n```diff\n{diff}```\n\n" if diff else ""
    draw(folder / "collapse.png", panels, untrained)
    runs = pd.concat([table.runs.assign(suspect=name) for name, table in tables.items()])
    (folder / "summary.md").write_text(f"""# {task}, one detail at a time

{markdown(rows)}
The return of the last 100 episodes, seed by seed: at the end, and where it was lowest in the \
second half of the run;
and the median KL[old, new] of an update. The untrained Gaussian policy scores \
{number(untrained)}.
{grids.tell_frozen(runs, ["suspect", "objective", "seed"])}

![Learning curves](collapse.png)

Means over seeds with bootstrap 95% intervals; dashed: the untrained policy. A panel that goes \
below -10,000 is
logarithmic from there on.

## What was changed

{diffs}Each command below ran with the change of the suspect that its --run-dir names.

{grids.origin(runs)}""")


def draw(path: Path, panels: dict[str, plot.Groups], untrained: float) -> None:
    """A panel per suspect, all on one scale unless a run goes below -10,000."""
    curves = [curve for groups in panels.values() for seeds in groups.values() for curve in seeds]
    deep = any(returns.min() < -10_000 for _, returns in curves)
    figure, axes = plot.sheet(len(panels), 4, (3, 2.7), sharey=not deep)
    for i, (ax, (name, groups)) in enumerate(zip(axes, panels.items(), strict=True)):
        plot.curves(ax, plot.drawable(groups), OBJECTIVES, untrained)
        ax.set(title=name, xlabel="", ylabel="return (last 100)" if i % 4 == 0 else "")
        low, high = ax.get_ylim()
        if deep and low < -10_000:
            ax.set_yscale("symlog", linthresh=10_000)
            ticks = (-1_000_000, -100_000, -30_000, -10_000, 0, 10_000)
            ticks = [tick for tick in ticks if low < tick < high]
            ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
    plot.legend(figure, "upper", ncols=2, fontsize="small")
    figure.savefig(path, dpi=90)


def main(argv: list[str]) -> None:
    parser = Parser("Which detail makes the difference to the paper's Table 1?")
    add = parser.add_argument
    add("--task", choices=grids.TASKS, default=grids.TASKS[0], help="on which task")
    what = "what to try; default: what the committed table of the task has, or everything"
    add("--suspects", nargs="+", choices=SUSPECTS, help=what)
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="runs of each objective")
    add("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    add("--jobs", type=positive, default=len(sweep.CORES), help="suspects at a time")
    what = "folder, in which each task has its own"
    add("--results", type=Path, default=RESULTS, help=what)
    what = "run nothing, write the report of the runs there are"
    add("--report", action="store_true", help=what)
    add("flags", nargs="*", help="after --: more flags of ppo_continuous.py for every run")
    args = parser.parse_args(argv)
    folder = args.results / args.task
    if not args.report:
        grid = Grid([args.task], OBJECTIVES, sorted({*args.seeds}))
        flags = ["--bootstrap-truncated", *args.flags]  # as the committed runs were made
        settings = grids.common_flags("paper", args.total_timesteps, flags)
        suspects = args.suspects or TRIED.get(args.task, list(SUSPECTS))
        complete(suspects, grid, settings, folder, args.jobs)
    report(args.task, folder)
    print(folder / "summary.md")


if __name__ == "__main__":
    cli(main)
