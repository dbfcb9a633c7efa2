"""The ratchet plot: return, KL and clip fraction of training with the clip and without it.

    python benchmark/ratchet.py                   # all runs, one after another, then the report
    python benchmark/ratchet.py --jobs 2          # two at a time
    python benchmark/ratchet.py --report          # the report alone, from the CSVs

LunarLander: the clip of eq. 7 at 0.2, at 1.0, and none at all. CartPole: from the policy gradient
to PPO. The first takes one gradient step per batch; "almost PPO" takes K epochs of minibatches,
which needs the ratio of eq. 6; PPO adds the clip. Every run is a process of ppo_cartpole.py; all
other flags are those that benchmark/classic.py documents.

Runs live in runs/ratchet/ and may be interrupted, as those of benchmark/classic.py. The report is
benchmark/results/ratchet/: runs.csv, curves.csv (every update of every run), summary.md and a
picture per experiment.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import (
    Parser,
    UserError,
    classic,
    cli,
    machine,
    markdown,
    merge_runs,
    plot,
    positive,
    read_csv,
)

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/ratchet")  # below ROOT
RESULTS = ROOT / "benchmark/results/ratchet"


class Experiment(NamedTuple):
    flags: str  # of all its runs
    objectives: dict[str, str]  # and flags that go with each
    seeds: range


EXPERIMENTS = {
    "cartpole": Experiment(
        classic.TASKS["cartpole"].flags,
        {"pg": "--update-epochs 1 --num-minibatches 1", "none": "", "clip:0.2": ""},
        range(1, 11),
    ),
    "lunarlander": Experiment(
        classic.TASKS["lunarlander"].flags,
        {"none": "", "clip:1.0": "", "clip:0.2": ""},
        range(1, 6),
    ),
}
NAMES = {  # what tables and legends say; the order gives the colours
    "clip:0.2": "PPO (clip:0.2)",
    "none": "almost PPO (none)",
    "pg": "policy gradient (pg)",
    "clip:1.0": "looser clip (clip:1.0)",
}
COLUMNS = {  # of metrics.csv -> of curves.csv, and what the picture says
    "charts/episodic_return": ("episodic_return", "episodic return (last 100)"),
    "losses/kl_after_update": ("kl_after_update", "KL[old, new] of an update"),
    "losses/clipfrac": ("clipfrac", "clip fraction"),
}


# ------------------------------------------------------------------------------------------ RUNS
def command(name: str, objective: str, seed: int) -> list[str]:
    """What follows `python` to start a run."""
    flags, extra = EXPERIMENTS[name].flags, EXPERIMENTS[name].objectives[objective]
    folder = RUNS / name / objective.replace(":", "-") / str(seed)
    words = f"ppo_cartpole.py {flags} --objective {objective} {extra}"
    return f"{words} --seed {seed} --run-dir {folder}".split()


def read_run(name: str, objective: str, seed: int) -> tuple[dict, list[dict]]:
    """A finished run's row of runs.csv and its rows of curves.csv.

    Raises UserError where a file does not fit.
    """
    who = {"experiment": name, "objective": objective, "seed": seed}
    words = command(name, objective, seed)
    config, path = classic.read_config(words), ROOT / words[-1]
    try:
        (summary,) = json.loads((path / "summary.json").read_text())
        wanted = "env_id total_timesteps wall_seconds sps last_100_return"
        wanted += " eval_return_mean eval_return_std"
        row = who | {"command": f"python {' '.join(words)}"}
        row |= {column: summary[column] for column in wanted.split()}
        points = []
        for metrics in read_csv(path / "metrics.csv"):
            point = who | {"global_step": metrics["global_step"]}
            for column, (short, _) in COLUMNS.items():
                point[short] = f"{float(metrics[column]):.6g}"
            points.append(point)
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{words[-1]} cannot be reported: {reason!r}") from reason
    return row | classic.provenance(config) | machine(), points


def run_all(jobs: int) -> None:
    """Complete all runs and write runs.csv and curves.csv. Raises UserError."""
    runs = [
        (name, o, seed) for name, e in EXPERIMENTS.items() for o in e.objectives for seed in e.seeds
    ]
    classic.complete_commands([command(*run) for run in runs], jobs)
    merge_runs(RESULTS, [read_run(*run) for run in runs], "experiment", list(EXPERIMENTS))


# ---------------------------------------------------------------------------------------- REPORT
def summarise(objective: str, runs: list[dict], points: list[dict]) -> dict:
    """An objective's row of summary.md, from its rows of runs.csv and curves.csv."""
    last = np.array([float(run["last_100_return"]) for run in runs])
    evaluated = np.array([float(run["eval_return_mean"]) for run in runs])
    kl = np.array([float(point["kl_after_update"]) for point in points])
    clipped = np.array([float(point["clipfrac"]) for point in points])
    ((mean,), (low,), (high,)) = plot.interval(last[:, None])
    return {
        "objective": NAMES[objective],
        "seeds": len(runs),
        "last 100, mean (95% interval)": f"{mean:.1f} ({low:.1f} to {high:.1f})",
        "last 100, worst seed": f"{last.min():.1f}",
        "evaluation, mean": f"{evaluated.mean():.1f}",
        "KL of an update, median": f"{np.median(kl):.2g}",
        "KL, largest": f"{kl.max():.2g}",
        "clip fraction, mean": f"{clipped.mean():.2g}",
    }


def draw(path: Path, points: list[dict]) -> None:
    """A picture of one experiment: return, KL and clip fraction, all objectives in each."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS))
    for ax, (column, label) in zip(axes, COLUMNS.values(), strict=True):
        curve = (
            (NAMES[p["objective"]], p["seed"], float(p["global_step"]), float(p[column]))
            for p in points
        )
        plot.curves(ax, plot.gather(("", *point) for point in curve)[""], list(NAMES.values()))
        ax.set_title(label, fontsize="medium")
        ax.set_ylabel("")
    axes[1].set_yscale("log")
    floor = 1e-7  # what is smaller is rounding: log-probabilities are float32
    axes[1].set_ylim(bottom=max(floor, axes[1].get_ylim()[0]))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=150)


NOTE = """
"Last 100" are the last episodes of training, "evaluation" is greedy, on seeds that training \
never used. The KL is the
exact KL[old, new] over the whole batch, after the last gradient step of an update. The clip \
fraction is the share of
transitions, mean over the minibatches of an update, whose ratio is further than epsilon from 1: \
each objective's own
epsilon, so `clip:1.0` counts others than `clip:0.2`; without a clip it is 0 by definition. \
Pictures: means over seeds
with bootstrap 95% intervals.
"""


def report() -> None:
    """Write summary.md and the pictures from the CSVs, always the same bytes.

    Raises OSError where there is none.
    """
    runs, points = (read_csv(RESULTS / name) for name in ("runs.csv", "curves.csv"))
    text = "# The ratchet: with the clip and without it\n\n"
    for name in dict.fromkeys(run["experiment"] for run in runs):
        mine = [run for run in runs if run["experiment"] == name]
        curves = [point for point in points if point["experiment"] == name]
        table, text = [], text + f"## {mine[0]['env_id']}\n\n"
        for objective in dict.fromkeys(run["objective"] for run in mine):
            its_runs = [run for run in mine if run["objective"] == objective]
            its_points = [point for point in curves if point["objective"] == objective]
            table.append(summarise(objective, its_runs, its_points))
            words = its_runs[0]["command"].partition(" --seed ")[0]
            text += f"    {words} --seed S  # S = {its_runs[0]['seed']} to {its_runs[-1]['seed']}\n"
        draw(RESULTS / f"{name}.png", curves)
        text += f"\n{markdown(table)}\n![Return, KL and clip fraction]({name}.png)\n\n"
    (RESULTS / "summary.md").write_text(f"{text}{NOTE.strip()}\n\n{classic.describe(runs)}\n")


def main(argv: list[str]) -> None:
    parser = Parser("The ratchet plot: training with the clip and without it.")
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time; more than one disturbs wall times"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the report of the CSVs there are"
    )
    args = parser.parse_args(argv)
    if not args.report:
        run_all(args.jobs)
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
