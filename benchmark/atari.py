"""The documented results on Atari, run again by ppo_atari.py, a process each.

    python benchmark/atari.py                       # all runs, then the report: hours
    python benchmark/atari.py --runs pong           # Pong for 3M steps, all else at its default
    python benchmark/atari.py --runs pong-float32   # the same without bfloat16
    python benchmark/atari.py --runs bfloat16       # 1M steps, too few for the schedules
    python benchmark/atari.py --report              # the report alone, from the CSVs

Runs live in runs/atari/. One that was interrupted goes on at its last checkpoint, a finished one is
left alone, so the same command may be given again and again. Results are benchmark/results/atari/:
runs.csv and curves.csv, in which those of other runs stay; from these alone the report makes
summary.md and a picture per group of runs.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import (
    Parser,
    UserError,
    check_config,
    cli,
    machine,
    markdown,
    merge_runs,
    plot,
    positive,
    read_csv,
)
from benchmark.classic import describe, each, execute, first_step_at_threshold, provenance
from ppo_atari import parse_args

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/atari")  # below ROOT, where the runs are started
RESULTS = ROOT / "benchmark/results/atari"


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


# ------------------------------------------------------------------------------------------ RUNS
def folder(name: str) -> Path:
    """Of a run, below ROOT."""
    return RUNS / name


def command(name: str) -> list[str]:
    """What follows `python` to start a run."""
    return f"ppo_atari.py {TASKS[name].flags} --run-dir {folder(name)}".split()


def read_config(name: str) -> dict:
    """A run's config.json.

    Raises UserError where there is none, or where it is not that of this run's command.
    """
    wanted = vars(parse_args(command(name)[1:]))
    filled = {"run_dir": str(folder(name)), "checkpoint_every": 0, "precision": "auto"}
    for flag, value in filled.items():  # where left to it, the script fills them in by itself
        if wanted[flag] == value:
            del wanted[flag]
    return check_config(ROOT / folder(name), wanted)


def complete(name: str) -> None:
    """Start a run, go on with it, or leave it alone, whatever its folder asks for.

    Raises UserError where it fails.
    """
    if (ROOT / folder(name) / "summary.json").exists():
        return
    if (ROOT / folder(name) / "config.json").exists():
        execute(["ppo_atari.py", "--resume", str(folder(name))])
    else:
        # stopped before its first file was whole
        shutil.rmtree(ROOT / folder(name), ignore_errors=True)
        execute(command(name))


def read_run(name: str) -> tuple[dict, list[dict]]:
    """A finished run's row of runs.csv and its rows of curves.csv.

    Raises UserError where a file does not fit.
    """
    config, path, task = read_config(name), ROOT / folder(name), TASKS[name]
    try:
        (summary,) = json.loads((path / "summary.json").read_text())
        metrics, episodes = (read_csv(path / file) for file in ("metrics.csv", "episodes.csv"))
        row = {"run": name, "env_id": summary["env_id"], "seed": summary["seed"]}
        row |= {"precision": config["args"]["precision"]}
        row |= {"command": f"python {' '.join(command(name))}"}
        wanted = "total_timesteps wall_seconds sps last_100_return"
        wanted += " eval_return_mean eval_return_std eval_episodes"
        row |= provenance(config) | {"envpool": config["versions"]["envpool"]}
        row |= {key: summary[key] for key in wanted.split()}
        returns = [float(episode["return"]) for episode in episodes]
        row |= {"games": len(episodes), "mean_return": np.mean(returns)}
        reached = None
        if task.threshold is not None:
            reached = first_step_at_threshold(metrics, episodes, task.threshold)
        row |= {"threshold": task.threshold, "first_step_at_threshold": reached}
        seen = [(point["global_step"], point["charts/episodic_return"]) for point in metrics]
        seen = [(step, ret) for step, ret in seen if ret]  # none before the first game has ended
        kept = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, 200).round().astype(int))]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as reason:
        raise UserError(f"{folder(name)} cannot be reported: {reason!r}") from reason
    where = {"group": task.group, "run": name, "seed": row["seed"]}
    points = [where | {"global_step": step, "episodic_return": ret} for step, ret in kept]
    return row | machine(), points


def run_all(names: list[str], jobs: int) -> None:
    """Complete these runs, `jobs` at a time, and put them into runs.csv and curves.csv.

    Other runs stay there. One that fails does not stop the others; then UserError.
    """
    for name in names:
        if (ROOT / folder(name) / "config.json").exists():
            read_config(name)  # refuse what could not be reported now, not after hours
    each(complete, names, jobs)
    merge_runs(RESULTS, list(map(read_run, names)), "run", list(TASKS))


# ---------------------------------------------------------------------------------------- REPORT
def summarise(row: dict[str, str]) -> dict:
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
seeds that training never used; a threshold is for the mean of 100 consecutive training games. \
Runs may have shared the
machine, so hours and steps/s are no measurement of speed.
"""


def report() -> None:
    """Write summary.md and the pictures from the CSVs, always the same bytes.

    Raises OSError where there is none.
    """
    rows, text = read_csv(RESULTS / "runs.csv"), "# Atari\n\n"
    for group, lines in plot.read_curves(RESULTS / "curves.csv", panel="group", line="run").items():
        mine = [row for row in rows if row["run"] in lines]
        text += "".join(f"    {row['command']}\n" for row in mine)
        threshold = TASKS[mine[0]["run"]].threshold
        plot.draw(RESULTS / f"{group}.png", {mine[0]["env_id"]: lines}, threshold)
    text += f"\n{describe(rows)}; envpool {rows[0]['envpool']}\n\n"
    text += markdown(list(map(summarise, rows))) + NOTE
    missing = [name for name in TASKS if name not in {row["run"] for row in rows}]
    text += "\nNot run yet:\n\n" if missing else ""
    text += "".join(f"    python {' '.join(command(name))}\n" for name in missing)
    (RESULTS / "summary.md").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser("Rerun the documented results on Atari and report them.")
    parser.add_argument("--runs", nargs="+", choices=TASKS, default=list(TASKS), help="what to run")
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time; more than one disturbs wall times"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the report of the CSVs there are"
    )
    args = parser.parse_args(argv)
    if not args.report:
        run_all(args.runs, args.jobs)
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
