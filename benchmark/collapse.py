"""Where Table 1 came out unlike the paper's: which detail makes the difference?

Controlled experiments on one task:

    python benchmark/collapse.py                                # what is missing of HalfCheetah-v4
    python benchmark/collapse.py --task InvertedDoublePendulum-v4
    python benchmark/collapse.py --suspects as-it-is adam-epsilon
    python benchmark/collapse.py --report                       # the report alone, from the CSVs

The paper explains its -0.39 for no clipping and no penalty by HalfCheetah, where `none` ends far
below the untrained policy. Here is every detail that may have been different in the paper's own
code, one at a time: three seeds of `none` and of `clip:0.2`, with the flags of table1.py. A suspect
is a flag of ppo_continuous.py, or a change of its text or of that of benchmark/lockstep.py: a
worker replaces the old words by the new ones and runs the result, so that what is tested is the
code itself with one line altered.

Results are benchmark/results/collapse/TASK/: per suspect a folder with the runs.csv and curves.csv
of benchmark/table1.py and the change, change.diff; random.csv, summary.md and collapse.png for all
of them. To run again what is committed: --results mine.
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
import benchmark
import ppo_continuous
from benchmark import Parser, UserError, cli, lockstep, markdown, plot, positive, read_csv, table1
from benchmark.table1 import Call, Grid, Table, cell_of

RESULTS = table1.ROOT / "benchmark/results/collapse"
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


ADAM = (("eps=1e-5", "eps=1e-8"), (".sqrt() + 1e-5", ".sqrt() + 1e-8"))
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
LEARNED = "        # LOG\n        bar.update(args.batch_size * count)\n"
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
    "as-it-is": Suspect("nothing: --preset paper"),
    "adam-epsilon": Suspect(
        "Adam's epsilon is 1e-8, as in the first public code (baselines da99706)", ADAM
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
        (*ADAM, *NORMC, *FLOOR),
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


def altered(changes: tuple[tuple[str, str], ...]) -> tuple[ModuleType, ModuleType]:
    """ppo_continuous.py and, on top of it, lockstep.py, with every old text replaced.

    Raises UserError where an old text does not stand in exactly one place of the two.
    """
    files = {"ppo_continuous": ppo_continuous.__file__, "benchmark.lockstep": lockstep.__file__}
    texts = {name: Path(path).read_text() for name, path in files.items()}
    for old, new in changes:
        count = sum(text.count(old) for text in texts.values())
        if count != 1:
            what = f"ppo_continuous.py and lockstep.py say {old.strip()!r} {count} times, not once"
            raise UserError(f"{what}: mend benchmark/collapse.py")
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    modules = {name: ModuleType(name) for name in files}
    before = {name: sys.modules[name] for name in files}
    sys.modules.update(modules)  # where dataclasses look themselves up, and lockstep the script
    try:
        for name, module in modules.items():
            module.__file__ = files[name]
            exec(compile(texts[name], files[name], "exec"), module.__dict__)
    finally:
        sys.modules.update(before)
    return tuple(modules.values())


def suspect_of(call: Call) -> str:
    return call.path.parent.name


def answer(call: Call, mine: list[int], pipe: Connection) -> None:
    """table1.answer, in a process of its own, with the altered script and the altered crowd."""
    script, crowd = altered(SUSPECTS[suspect_of(call)].changes)
    sys.modules.update({"ppo_continuous": script, "benchmark.lockstep": crowd})
    benchmark.lockstep = crowd
    table1.ppo_continuous, table1.lockstep = script, crowd
    table1.answer(call, mine, pipe)


def diff_of(folder: Path) -> str:
    """The change that the runs of a suspect's folder were made with."""
    path = folder / "change.diff"
    return path.read_text() if path.exists() else ""


def complete(names: list[str], grid: Grid, settings: list[str], folder: Path, jobs: int) -> None:
    """Run what the CSVs lack. Raises UserError."""
    with table1.alone(folder):
        tables, calls = {name: Table(folder / name) for name in names}, []
        for name, table in tables.items():
            suspect = SUSPECTS[name]
            altered(suspect.changes)
            mine = [*settings, *suspect.flags]
            before = mine if suspect.earlier is None else [*settings, *suspect.earlier]
            table.check(mine, before)
            runs = f"runs/collapse/{folder.name}/{name}"
            missing = table1.plan(grid, {*map(cell_of, table.runs)}, mine, runs)
            if missing and table.runs and diff_of(table.folder) != suspect.diff:
                what = f"{table.folder} holds runs of another change, see its change.diff"
                raise UserError(f"{what}; give other --results")
            if missing and suspect.diff:
                table.folder.mkdir(exist_ok=True)
                (table.folder / "change.diff").write_text(suspect.diff)
            calls += missing
        table1.measure_random(grid, settings, folder / "random.csv")
        engine = partial(table1.local, jobs=jobs, target=answer)
        table1.run(calls, engine, lambda call: tables[suspect_of(call)])


def lowest(run: dict, curves: list[dict]) -> float:
    """The lowest return of the second half of a run.

    run: its row of runs.csv. curves: the rows of curves.csv.
    """
    mine = [point for point in curves if cell_of(point) == cell_of(run)]
    late = [point for point in mine if 2 * int(point["global_step"]) > int(run["total_timesteps"])]
    returns = [float(point["episodic_return"]) for point in late if point["episodic_return"]]
    return min(returns, default=np.nan)


def report(task: str, folder: Path) -> None:
    """Write summary.md and collapse.png from the CSVs of all suspects that have run.

    Raises OSError where none has.
    """
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
            least = [lowest(run, runs.curves) for run in mine]
            row[f"lowest, `{objective}`"] = ", ".join(map(table1.number, least))
            kl = np.median([float(run["kl_median"]) for run in mine])
            row[f"KL, `{objective}`"] = f"{kl:.2g}"
            if objective == "none":
                below = sum(ret < untrained for ret in returns)
                row["below untrained"] = f"{below} of {len(returns)}"
        table.append(row)
        points = []
        for point in runs.curves:
            if point["episodic_return"]:
                x, y = float(point["global_step"]), float(point["episodic_return"])
                points.append((name, point["objective"], point["seed"], x, y))
        panels |= plot.gather(points)
        diff = diff_of(folder / name)
        diffs += f"`{name}`:\n\n```diff\n{diff}```\n\n" if diff else ""
    draw(folder / "collapse.png", panels, untrained)
    origin = table1.tell_origin([run for name in names for run in Table(folder / name).runs])
    (folder / "summary.md").write_text(f"""# {task}, one detail at a time

{markdown(table)}
The return of the last 100 episodes, seed by seed: at the end, and where it was lowest in the \
second half of the run;
and the median KL[old, new] of an update. The untrained Gaussian policy scores \
{table1.number(untrained)}.

![Learning curves](collapse.png)

Means over seeds with bootstrap 95% intervals; dashed: the untrained policy. A panel that goes \
below -10,000 is
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
            ticks = (-1_000_000, -100_000, -30_000, -10_000, 0, 10_000)
            ticks = [tick for tick in ticks if low < tick < high]
            ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    style = {"ncols": 2, "fontsize": "small", "frameon": False}
    figure.legend(handles, labels, loc="outside upper center", **style)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.savefig(path, dpi=90)


def main(argv: list[str]) -> None:
    parser = Parser("Which detail makes the difference to the paper's Table 1?")
    add = parser.add_argument
    add("--task", choices=table1.TASKS, default=table1.TASKS[0], help="on which task")
    add("--suspects", nargs="+", choices=SUSPECTS, default=list(SUSPECTS), help="what to try")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="runs of each objective")
    add("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    add("--jobs", type=positive, default=len(table1.CORES), help="suspects at a time")
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
        settings = table1.common_flags("paper", args.total_timesteps, flags)
        complete(args.suspects, grid, settings, folder, args.jobs)
    report(args.task, folder)
    print(folder / "summary.md")


if __name__ == "__main__":
    cli(main)
