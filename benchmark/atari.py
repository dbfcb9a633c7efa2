"""The documented results on Atari, run again by ppo_atari.py, a process each.

    python benchmark/atari.py                       # all runs, then the report: hours
    python benchmark/atari.py --runs pong           # Pong for 3M steps, all else at its default:
                                                    # bfloat16 where the CPU has it
    python benchmark/atari.py --runs pong-float32   # the same without bfloat16
    python benchmark/atari.py --runs bfloat16       # 1M steps; full schedules need more
    python benchmark/atari.py --report              # the report alone, from the CSVs

Runs live in runs/atari/. One that was interrupted goes on at its last checkpoint, a finished one is
left alone, so the same command may be given again and again. Results are benchmark/results/atari/:
runs.csv and curves.csv, in which those of other runs stay; from these alone the report makes
summary.md and a picture per group of runs.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, cli, markdown, plot, sweep

RUNS = Path("runs/atari")  # below sweep.ROOT, where the runs are started
RESULTS = sweep.ROOT / "benchmark/results/atari"


class Task(NamedTuple):
    group: str  # a picture each
    flags: str
    threshold: float | None = None  # what the mean return of 100 consecutive games must reach


SHORT = "--total-timesteps 1000000 --threads 1 --checkpoint-every 250 --precision bfloat16"
TASKS = {
    "pong": Task("pong", "--total-timesteps 3000000", 15),
    "pong-float32": Task("pong", "--total-timesteps 3000000 --precision float32", 15),
    "bfloat16": Task("short", SHORT),
}


def count_games(facts: dict, metrics: pd.DataFrame, folder: Path) -> dict:
    """All games of the run and their mean return, and when its last 100 reached the threshold."""
    returns = pd.read_csv(folder / "episodes.csv")["return"]
    games = {"games": len(returns), "mean_return": returns.mean()}
    return games | sweep.first_step_at_threshold(facts, metrics, folder)


COLUMNS = "run env_id seed precision command started git_commit torch gymnasium python envpool"
COLUMNS += " total_timesteps wall_seconds sps last_100_return eval_return_mean eval_return_std"
COLUMNS += " eval_episodes games mean_return threshold first_step_at_threshold cpu cores"
LAYOUT = sweep.Layout(
    key=("run", "seed"),
    columns=tuple(COLUMNS.split()),
    curves={"episodic_return": plot.RETURN},
    measure=count_games,
)


def call(name: str) -> sweep.Call:
    task = TASKS[name]
    labels = {"run": name, "threshold": task.threshold}
    return sweep.script("ppo_atari", task.flags, RUNS / name, labels)


# ---------------------------------------------------------------------------------------- REPORT
def summarise(row: pd.Series) -> dict:
    """A run's row of summary.md, from its row of runs.csv."""
    reached = row["first_step_at_threshold"]
    mean, std = float(row["eval_return_mean"]), float(row["eval_return_std"])
    return {
        "run": row["run"],
        "environment": row["env_id"],
        "precision": row["precision"],
        "steps": f"{int(row['total_timesteps']):,}",
        "hours": f"{float(row['wall_seconds']) / 3600:.1f}",
        "steps/s": f"{float(row['sps']):,.0f}",
        "last 100 games, mean": f"{float(row['last_100_return']):.1f}",
        "all games, mean": f"{float(row['mean_return']):.1f}",
        "evaluation": f"{mean:.1f} +- {std:.1f}",
        "steps to threshold": f"{int(reached):,} ({row['threshold']})" if reached else "",
    }


NOTE = """
Returns are whole games in the game's own points. "Last 100" are the last ones of training, \
"evaluation" is greedy, on
seeds that training never used, and +- the standard deviation over its games; a threshold is for \
the mean of 100 consecutive
training games. Runs may have shared the machine, so hours and steps/s are no measurement of speed.
"""


def report() -> None:
    """Write summary.md and the pictures from the CSVs, always the same bytes.

    Raises OSError where there is none.
    """
    runs, points = (sweep.read(RESULTS / name) for name in ("runs.csv", "curves.csv"))
    text = "# Atari\n\n"
    groups = runs["run"].map(lambda run: TASKS[run].group)
    for group, mine in runs.groupby(groups, sort=False):
        text += "".join(f"    {command}\n" for command in mine["command"])
        lines = plot.groups_of(points[points["run"].isin(mine["run"])], "run", "episodic_return")
        threshold = TASKS[mine["run"].iloc[0]].threshold
        plot.draw(RESULTS / f"{group}.png", {mine["env_id"].iloc[0]: lines}, threshold)
    envpool = sweep.listed(runs, ["envpool"])
    text += f"\n{sweep.describe(runs, 'gymnasium')}; {envpool}\n\n"
    text += markdown([summarise(row) for _, row in runs.iterrows()]) + NOTE
    missing = [name for name in TASKS if name not in set(runs["run"])]
    text += "\nNot run yet:\n\n" if missing else ""
    text += "".join(f"    {call(name).command}\n" for name in missing)
    (RESULTS / "summary.md").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser("Rerun the documented results on Atari and report them.")
    parser.add_argument("--runs", nargs="+", choices=TASKS, default=list(TASKS), help="what to run")
    sweep.add_flags(parser)
    args = parser.parse_args(argv)
    if not args.report:
        calls = [call(name) for name in args.runs]
        layout = replace(LAYOUT, order={"run": list(TASKS)})
        sweep.complete(RESULTS, layout, calls, sweep.choose_engine(args))
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
