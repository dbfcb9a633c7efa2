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

import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, cli, markdown, plot, scores, sweep
from benchmark.sweep import numbers

RUNS = Path("runs/ratchet")  # below sweep.ROOT
RESULTS = sweep.ROOT / "benchmark/results/ratchet"
LUNAR = "--env-id LunarLander-v3 --total-timesteps 1000000 --num-envs 16 --num-steps 1024"
LUNAR += " --num-minibatches 256 --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01"
LUNAR += " --learning-rate 0.001"


class Experiment(NamedTuple):
    flags: str  # of all its runs
    objectives: dict[str, str]  # and flags that go with each
    seeds: range


EXPERIMENTS = {
    "cartpole": Experiment(
        "",
        {"pg": "--update-epochs 1 --num-minibatches 1", "none": "", "clip:0.2": ""},
        range(1, 11),
    ),
    "lunarlander": Experiment(
        LUNAR,
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
TITLES = {  # of the panels of a picture
    "episodic_return": "episodic return (last 100)",
    "kl_after_update": "KL[old, new] of an update",
    "clipfrac": "clip fraction",
}
COLUMNS = "experiment objective seed command env_id total_timesteps wall_seconds sps"
COLUMNS += " last_100_return eval_return_mean eval_return_std"
COLUMNS += " started git_commit torch gymnasium python cpu cores"
LAYOUT = sweep.Layout(
    key=("experiment", "objective", "seed"),
    columns=tuple(COLUMNS.split()),
    curves={
        "episodic_return": plot.RETURN,
        "kl_after_update": "losses/kl_after_update",
        "clipfrac": "losses/clipfrac",
    },
    order={"experiment": list(EXPERIMENTS), "objective": ["pg", "none", "clip:1.0", "clip:0.2"]},
    points=1_000_000,  # every update
)


def call(name: str, objective: str, seed: int) -> sweep.Call:
    experiment = EXPERIMENTS[name]
    flags = f"{experiment.flags} --objective {objective} {experiment.objectives[objective]}"
    folder = RUNS / name / objective.replace(":", "-") / str(seed)
    return sweep.script("ppo_cartpole", f"{flags} --seed {seed}", folder, {"experiment": name})


def calls() -> list[sweep.Call]:
    found = []
    for name, experiment in EXPERIMENTS.items():
        for objective in experiment.objectives:
            found += [call(name, objective, seed) for seed in experiment.seeds]
    return found


# ---------------------------------------------------------------------------------------- REPORT
def summarise(objective: str, runs: pd.DataFrame, points: pd.DataFrame) -> dict:
    """An objective's row of summary.md, from its rows of runs.csv and curves.csv."""
    last, evaluated = numbers(runs["last_100_return"]), numbers(runs["eval_return_mean"])
    kl, clipped = numbers(points["kl_after_update"]), numbers(points["clipfrac"])
    mean, low, high = scores.mean_interval(last.to_numpy())
    return {
        "objective": NAMES[objective],
        "seeds": len(runs),
        "last 100, mean (95% interval)": f"{mean:.1f} ({low:.1f} to {high:.1f})",
        "last 100, worst seed": f"{last.min():.1f}",
        "evaluation, mean": f"{evaluated.mean():.1f}",
        "KL of an update, median": f"{kl.median():.2g}",
        "KL, largest": f"{kl.max():.2g}",
        "clip fraction, mean": f"{clipped.mean():.2g}",
    }


def draw(path: Path, points: pd.DataFrame) -> None:
    """A picture of one experiment: return, KL and clip fraction, all objectives in each."""
    points = points.assign(objective=points["objective"].map(NAMES))
    figure = plot.side_by_side(points, TITLES, "objective", list(NAMES.values()))
    kl = figure.axes[1]
    kl.set_yscale("log")
    floor = 1e-7  # what is smaller is rounding: log-probabilities are float32
    kl.set_ylim(bottom=max(floor, kl.get_ylim()[0]))
    plot.legend(figure, "lower", ncols=3)
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
    runs, points = (sweep.read(RESULTS / name) for name in ("runs.csv", "curves.csv"))
    text = "# The ratchet: with the clip and without it\n\n"
    for name, mine in runs.groupby("experiment", sort=False):
        curves = points[points["experiment"] == name]
        text += f"## {mine['env_id'].iloc[0]}\n\n"
        table = []
        for objective, its_runs in mine.groupby("objective", sort=False):
            its_points = curves[curves["objective"] == objective]
            table.append(summarise(objective, its_runs, its_points))
            command = its_runs["command"].iloc[0].partition(" --seed ")[0]
            first, last = its_runs["seed"].iloc[[0, -1]]
            text += f"    {command} --seed S  # S = {first} to {last}\n"
        draw(RESULTS / f"{name}.png", curves)
        text += f"\n{markdown(table)}\n![Return, KL and clip fraction]({name}.png)\n\n"
    text += f"{NOTE.strip()}\n\n{sweep.describe(runs, 'gymnasium')}\n"
    (RESULTS / "summary.md").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser("The ratchet plot: training with the clip and without it.")
    sweep.add_flags(parser)
    args = parser.parse_args(argv)
    if not args.report:
        sweep.complete(RESULTS, LAYOUT, calls(), sweep.choose_engine(args))
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
