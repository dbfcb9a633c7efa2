"""The documented results on classic control, run again by ppo_cartpole.py, a process each.

    python benchmark/classic.py                   # all runs, one after another, then the report
    python benchmark/classic.py --jobs 2          # two at a time
    python benchmark/classic.py --report          # the report alone, from the CSVs
    python benchmark/classic.py --walltime        # instead: the default command's time, five times

Runs live in runs/classic/. One that was interrupted goes on at its last checkpoint, a finished one
is left alone, so the same command may be given again and again. Results are
benchmark/results/classic/: runs.csv and curves.csv, in which other tasks stay; from these the
report makes summary.md and a picture per task. --walltime adds walltime.csv and transcript.md, and
the next report its median.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, UserError, cli, git_commit, machine, markdown, plot, sweep
from benchmark.sweep import ROOT, numbers

RUNS = Path("runs/classic")  # below ROOT, where the runs are started
RESULTS = ROOT / "benchmark/results/classic"


class Task(NamedTuple):
    flags: str
    seeds: range
    threshold: float  # what the mean return of 100 consecutive episodes must reach


ACROBOT = "--env-id Acrobot-v1 --total-timesteps 500000 --num-envs 16 --num-steps 256"
ACROBOT += " --num-minibatches 64 --learning-rate 0.001"
LUNAR = "--env-id LunarLander-v3 --total-timesteps 1000000 --num-envs 16 --num-steps 1024"
LUNAR += " --num-minibatches 256 --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01"
LUNAR += " --learning-rate 0.001"
TASKS = {
    "cartpole": Task("", range(1, 11), 475),
    "acrobot": Task(ACROBOT, range(1, 6), -100),
    "lunarlander": Task(LUNAR, range(1, 6), 200),
}
WALLTIME_SEEDS = range(1, 6)


COLUMNS = "task env_id seed command started git_commit torch gymnasium python total_timesteps"
COLUMNS += " wall_seconds sps last_100_return eval_return_mean eval_return_std eval_episodes"
COLUMNS += " first_step_at_threshold cpu cores"
LAYOUT = sweep.Layout(
    key=("task", "seed"),
    columns=tuple(COLUMNS.split()),
    curves={"episodic_return": plot.RETURN},
    order={"task": list(TASKS)},
    points=100,
    measure=sweep.first_step_at_threshold,
)


def call(name: str, seed: int) -> sweep.Call:
    task = TASKS[name]
    labels = {"task": name, "threshold": task.threshold}
    flags = f"{task.flags} --seed {seed}"
    return sweep.script("ppo_cartpole", flags, RUNS / name / str(seed), labels)


# -------------------------------------------------------------------------------------- WALLTIME
def execute(arguments: list[str]) -> str:
    """What `python` with these arguments prints at the root of the repository.

    Raises UserError where it fails.
    """
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"python {' '.join(arguments)} ended with code {done.returncode}: {reason}")
    return done.stdout


def measure_walltime() -> None:
    """Write walltime.csv and transcript.md.

    walltime.csv: seconds of the default command's whole process, imports and evaluation included,
    one at a time. transcript.md: what each of them printed.
    """
    rows, transcript = [], "# What the default command prints\n\n"
    for seed in tqdm(WALLTIME_SEEDS, unit=" runs", disable=None):
        path = ROOT / RUNS / "walltime" / str(seed)
        shutil.rmtree(path, ignore_errors=True)
        arguments = f"ppo_cartpole.py --seed {seed} --run-dir {RUNS / 'walltime' / str(seed)}"
        start = time.perf_counter()
        printed = execute(arguments.split())
        row = {"seed": seed, "seconds": time.perf_counter() - start}
        row["command"] = f"python {arguments}"
        config = json.loads((path / "config.json").read_text())
        row |= {"started": config["started"], "git_commit": git_commit()}
        row |= {name: config["versions"][name] for name in ("torch", "gymnasium", "python")}
        rows.append(row | machine())
        transcript += f"    $ {row['command']}\n    {printed}"
        shutil.rmtree(path)
    sweep.write(RESULTS / "walltime.csv", pd.DataFrame(rows))
    (RESULTS / "transcript.md").write_text(transcript)


# ---------------------------------------------------------------------------------------- REPORT
def summarise(task: str, runs: pd.DataFrame) -> dict:
    """A task's row of summary.md, from its rows of runs.csv."""
    threshold = TASKS[task].threshold
    last, evaluated = numbers(runs["last_100_return"]), numbers(runs["eval_return_mean"])
    # a seed that never got there is slowest
    steps = numbers(runs["first_step_at_threshold"]).fillna(np.inf)
    median = steps.median()
    return {
        "task": task,
        "environment": runs["env_id"].iloc[0],
        "threshold": f"{threshold:g}",
        "seeds that reach it": f"{np.isfinite(steps).sum()} of {len(runs)}",
        "and end at or above it": f"{(last >= threshold).sum()} of {len(runs)}",
        "last 100, mean": f"{last.mean():.1f}",
        "last 100, worst seed": f"{last.min():.1f}",
        "evaluation, mean": f"{evaluated.mean():.1f}",
        "evaluation, worst seed": f"{evaluated.min():.1f}",
        "steps to threshold, median": f"{median:,.0f}" if np.isfinite(median) else "never",
    }


NOTE = """
A task's threshold is for the mean return of 100 consecutive training episodes. \
"Last 100" are the last ones of
training, "evaluation" is greedy, on seeds that training never used. Runs may have shared the \
machine, so their
wall_seconds in runs.csv are no measurement of speed.
"""


def report() -> None:
    """Write summary.md and the pictures from the CSVs, always the same bytes.

    Raises OSError where there is none.
    """
    runs = sweep.read(RESULTS / "runs.csv")
    panels = plot.gather(sweep.read(RESULTS / "curves.csv"), "task", "task", "episodic_return")
    text, table = "# Classic control\n\n", []
    for task, mine in runs.groupby("task", sort=False):
        first, last = mine["seed"].iloc[[0, -1]]
        command = mine["command"].iloc[0].replace(f" --seed {first} ", " --seed S ")
        text += f"    {command.rpartition('/')[0]}/S  # S = {first} to {last}\n"
        table.append(summarise(task, mine))
        panel = {mine["env_id"].iloc[0]: panels[task]}
        plot.draw(RESULTS / f"{task}.png", panel, TASKS[task].threshold)
    text += f"\n{sweep.describe(runs, 'gymnasium')}\n\n{markdown(table)}{NOTE}"
    if (RESULTS / "walltime.csv").exists():
        whole = sweep.read(RESULTS / "walltime.csv")
        text += "\n`python ppo_cartpole.py`, the whole process with imports and evaluation: "
        text += f"{numbers(whole['seconds']).median():.1f} s, median of {len(whole)} runs "
        text += f"one after another ({sweep.describe(whole, 'gymnasium')}).\n"
    (RESULTS / "summary.md").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser("Rerun the documented results on classic control and report them.")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to run")
    sweep.add_flags(parser)
    what = "time the default command instead, five runs in a row"
    add("--walltime", action="store_true", help=what)
    args = parser.parse_args(argv)
    if args.walltime:
        measure_walltime()
        return
    if not args.report:
        calls = [call(task, seed) for task in args.tasks for seed in TASKS[task].seeds]
        sweep.complete(RESULTS, LAYOUT, calls, sweep.choose_engine(args))
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
