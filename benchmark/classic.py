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
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import (
    Parser,
    UserError,
    check_config,
    cli,
    git_commit,
    machine,
    markdown,
    merge_runs,
    plot,
    positive,
    read_csv,
    write_csv,
)
from ppo_cartpole import parse_args

ROOT = Path(__file__).resolve().parents[1]
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


# ------------------------------------------------------------------------------------------ RUNS
def folder(task: str, seed: int | str) -> Path:
    """Of a run, below ROOT."""
    return RUNS / task / str(seed)


def command(task: str, seed: int | str) -> list[str]:
    """What follows `python` to start a run."""
    words = f"ppo_cartpole.py {TASKS[task].flags} --seed {seed} --run-dir {folder(task, seed)}"
    return words.split()


def execute(arguments: list[str]) -> str:
    """What `python` with these arguments prints at the root of the repository.

    Raises UserError where it fails.
    """
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"python {' '.join(arguments)} ended with code {done.returncode}: {reason}")
    return done.stdout


def read_config(arguments: list[str]) -> dict:
    """The config.json of a run, in the folder that its arguments name last.

    Raises UserError as check_config.
    """
    derived = {"run_dir", "checkpoint_every"}  # what the script fills in by itself
    flags = vars(parse_args(arguments[1:]))
    wanted = {name: value for name, value in flags.items() if name not in derived}
    return check_config(ROOT / arguments[-1], wanted)


def each(complete: Callable, runs: list, jobs: int) -> None:
    """complete(run) for every run, `jobs` at a time.

    One that fails does not stop the others; then UserError.
    """
    failures = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit=" runs", disable=None) as bar:
        try:
            for future in as_completed([pool.submit(complete, run) for run in runs]):
                if future.exception():
                    failures.append(str(future.exception()))
                bar.update()
        except KeyboardInterrupt:  # the terminal has told the processes too
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        why = "; ".join(sorted(failures))
        raise UserError(f"{len(failures)} of {len(runs)} runs failed: {why}")


def complete(arguments: list[str]) -> None:
    """Start a run, go on with it, or leave it alone, whatever its folder asks for.

    Raises UserError where it fails.
    """
    path = ROOT / arguments[-1]
    if (path / "summary.json").exists():
        return
    if (path / "config.json").exists():
        execute(["ppo_cartpole.py", "--resume", arguments[-1]])
    else:
        shutil.rmtree(path, ignore_errors=True)  # stopped before its first file was whole
        execute(arguments)


def complete_commands(commands: list[list[str]], jobs: int) -> None:
    """Complete the run of every command, `jobs` at a time.

    One that fails does not stop the others; then UserError.
    """
    for arguments in commands:
        if (ROOT / arguments[-1] / "config.json").exists():
            read_config(arguments)  # refuse what could not be reported now, not after hours
    each(complete, commands, jobs)


def measure_walltime() -> None:
    """Write walltime.csv and transcript.md.

    walltime.csv: seconds of the default command's whole process, imports and evaluation included,
    one at a time. transcript.md: what each of them printed.
    """
    rows, transcript = [], "# What the default command prints\n\n"
    for seed in tqdm(WALLTIME_SEEDS, unit=" runs", disable=None):
        path = ROOT / folder("walltime", seed)
        shutil.rmtree(path, ignore_errors=True)
        arguments = f"ppo_cartpole.py --seed {seed} --run-dir {folder('walltime', seed)}".split()
        start = time.perf_counter()
        printed = execute(arguments)
        seconds = time.perf_counter() - start
        row = {"seed": seed, "seconds": seconds, "command": f"python {' '.join(arguments)}"}
        rows.append(row | provenance(json.loads((path / "config.json").read_text())) | machine())
        transcript += f"    $ {row['command']}\n    {printed}"
        shutil.rmtree(path)
    write_csv(RESULTS / "walltime.csv", rows)
    (RESULTS / "transcript.md").write_text(transcript)


def provenance(config: dict) -> dict:
    """When and with which versions, as a run's config.json says, and the commit that is here."""
    versions = {name: config["versions"][name] for name in ("torch", "gymnasium", "python")}
    return {"started": config["started"], "git_commit": git_commit()} | versions


def first_step_at_threshold(
    metrics: list[dict], episodes: list[dict], threshold: float
) -> int | None:
    """When the mean return of the last 100 episodes is at least `threshold` for the first time.

    The global_step of that row of metrics.csv, which has 100 episodes behind it, or None.
    """
    ends = sorted(int(row["global_step"]) for row in episodes)
    for row in metrics:
        step = int(row["global_step"])
        if bisect_right(ends, step) >= 100 and float(row["charts/episodic_return"]) >= threshold:
            return step
    return None


def read_run(task: str, seed: int) -> tuple[dict, list[dict]]:
    """A finished run's row of runs.csv and its rows of curves.csv.

    Raises UserError where a file does not fit.
    """
    config, path, row = read_config(command(task, seed)), ROOT / folder(task, seed), {"task": task}
    try:
        (summary,) = json.loads((path / "summary.json").read_text())
        metrics, episodes = (read_csv(path / name) for name in ("metrics.csv", "episodes.csv"))
        row |= {
            "env_id": summary["env_id"],
            "seed": seed,
            "command": f"python {' '.join(command(task, seed))}",
        }
        wanted = "total_timesteps wall_seconds sps last_100_return"
        wanted += " eval_return_mean eval_return_std eval_episodes"
        row |= provenance(config) | {name: summary[name] for name in wanted.split()}
        row["first_step_at_threshold"] = first_step_at_threshold(
            metrics, episodes, TASKS[task].threshold
        )
        seen = [(point["global_step"], point["charts/episodic_return"]) for point in metrics]
        seen = [(step, ret) for step, ret in seen if ret]  # none before the first episode has ended
        kept = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, 100).round().astype(int))]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as reason:
        raise UserError(f"{folder(task, seed)} cannot be reported: {reason!r}") from reason
    where = {"task": task, "seed": seed}
    points = [where | {"global_step": step, "episodic_return": ret} for step, ret in kept]
    return row | machine(), points


def run_all(tasks: list[str], jobs: int) -> None:
    """Complete every run of these tasks and put them into runs.csv and curves.csv.

    Other tasks stay there. Raises UserError.
    """
    runs = [(task, seed) for task in tasks for seed in TASKS[task].seeds]
    complete_commands([command(*run) for run in runs], jobs)
    merge_runs(RESULTS, [read_run(*run) for run in runs], "task", list(TASKS))


# ---------------------------------------------------------------------------------------- REPORT
def summarise(task: str, runs: list[dict[str, str]]) -> dict:
    """A task's row of summary.md, from its rows of runs.csv."""
    threshold, names = TASKS[task].threshold, ("last_100_return", "eval_return_mean")
    last, evaluated = (np.array([float(run[name]) for run in runs]) for name in names)
    # a seed that never got there is slowest
    steps = [float(run["first_step_at_threshold"] or "inf") for run in runs]
    median = np.median(steps)
    return {
        "task": task,
        "environment": runs[0]["env_id"],
        "threshold": f"{threshold:g}",
        "seeds that reach it": f"{np.isfinite(steps).sum()} of {len(runs)}",
        "and end at or above it": f"{(last >= threshold).sum()} of {len(runs)}",
        "last 100, mean": f"{last.mean():.1f}",
        "last 100, worst seed": f"{last.min():.1f}",
        "evaluation, mean": f"{evaluated.mean():.1f}",
        "evaluation, worst seed": f"{evaluated.min():.1f}",
        "steps to threshold, median": f"{median:,.0f}" if np.isfinite(median) else "never",
    }


def describe(rows: list[dict]) -> str:
    """When, where and from what these rows were measured."""
    days = sorted(row["started"][:10] for row in rows)
    said = " to ".join(dict.fromkeys((days[0], days[-1])))
    for name in ("python", "torch", "gymnasium", "git_commit", "cpu", "cores"):
        values = sorted({str(row[name]) for row in rows})
        said += f"; {name.replace('_', ' ')} {' and '.join(values)}"
    return said


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
    rows = read_csv(RESULTS / "runs.csv")
    panels = plot.read_curves(RESULTS / "curves.csv", panel="task", line="task")
    text, table = "# Classic control\n\n", []
    for task, lines in panels.items():
        mine = [row for row in rows if row["task"] == task]
        words = mine[0]["command"].replace(f" --seed {mine[0]['seed']} ", " --seed S ")
        text += f"    {words.rpartition('/')[0]}/S  # S = {mine[0]['seed']} to {mine[-1]['seed']}\n"
        table.append(summarise(task, mine))
        plot.draw(RESULTS / f"{task}.png", {mine[0]["env_id"]: lines}, TASKS[task].threshold)
    text += f"\n{describe(rows)}\n\n{markdown(table)}{NOTE}"
    if (RESULTS / "walltime.csv").exists():
        whole = read_csv(RESULTS / "walltime.csv")
        median = np.median([float(row["seconds"]) for row in whole])
        text += "\n`python ppo_cartpole.py`, the whole process with imports and evaluation: "
        text += (
            f"{median:.1f} s, median of {len(whole)} runs one after another ({describe(whole)}).\n"
        )
    (RESULTS / "summary.md").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser("Rerun the documented results on classic control and report them.")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to run"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time; more than one disturbs wall times"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the report of the CSVs there are"
    )
    parser.add_argument(
        "--walltime",
        action="store_true",
        help="time the default command instead, five runs in a row",
    )
    args = parser.parse_args(argv)
    if args.walltime:
        measure_walltime()
        return
    if not args.report:
        run_all(args.tasks, args.jobs)
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
