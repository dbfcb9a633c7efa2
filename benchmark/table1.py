"""The paper's Table 1 with ten seeds: 7 MuJoCo tasks x 11 objectives x 10 seeds, 1M steps each.

    python benchmark/table1.py                    # what is missing: ten hours or so on two cores
    python benchmark/table1.py --report           # the report alone, from the CSVs
    python benchmark/table1.py --preset modern    # four objectives, with today's usual details
    python benchmark/table1.py --tasks Hopper Swimmer --objectives none clip:0.2 --seeds 1 2
    python benchmark/table1.py --engine ray       # on a Ray cluster; see requirements-ray.txt
    python benchmark/table1.py -- --device cuda   # what follows -- goes to lockstep.py as it is

The unit is the cell: one task, objective and seed, a row of runs.csv. Cells of a task that are
missing there are trained side by side by one process of benchmark/lockstep.py, at most three seeds
of each objective; its run folder is under runs/. There is one such process on each core. Whatever
stops this command, even a power cut, the same command goes on from the last checkpoint and ends
with the same numbers.

In the preset `paper` a time limit is an end. 231 runs with exact bootstrapping instead, made when
`--preset paper` still meant that, are a table of their own:

    python benchmark/table1.py --report --results benchmark/results/table1-bootstrapped \
        --seeds 1 2 3 -- --bootstrap-truncated

Results are benchmark/results/table1/, or table1-modern/: runs.csv, curves.csv and random.csv (what
the policies score that have learned nothing); from these alone the report makes summary.md and the
pictures. A clone holds the committed ones, so nothing is missing there: to run it all again, give a
folder of your own, --results mine.
"""

import contextlib
import datetime
import fcntl
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import envpool
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous
from benchmark import (
    Parser,
    UserError,
    check_config,
    cli,
    git_commit,
    lockstep,
    machine,
    markdown,
    plot,
    positive,
    read_csv,
    write_csv,
)

ROOT = Path(__file__).resolve().parents[1]
NAMES = "HalfCheetah Hopper InvertedDoublePendulum InvertedPendulum Reacher Swimmer Walker2d"
TASKS = [f"{name}-v4" for name in NAMES.split()]  # the nearest there is to the paper's -v1
FIGURES = ROOT / "benchmark/paper"
PAPER = read_csv(FIGURES / "table1.csv")
OBJECTIVES = {
    "paper": [row["objective"] for row in PAPER],
    "modern": ["none", "clip:0.2", "kl:1", "adaptive:0.01"],
}
SEEDS = {"paper": range(1, 11), "modern": range(1, 4)}
PACKAGES = ("torch", "numpy", "gymnasium", "envpool")
POINTS = 200  # of a run in curves.csv
TOGETHER = 3  # seeds of an objective in one process; more would take over an hour
SUMMARY = ["total_timesteps", "transitions", "last_100_return"]  # from summary.json to runs.csv
SUMMARY += ["eval_return_mean", "eval_return_std", "eval_episodes", "diverged_at"]
CURVES = {  # columns of curves.csv -> of metrics.csv
    "episodic_return": "charts/episodic_return",
    "kl": "losses/kl_after_update",
    "beta": "charts/beta",
    "action_std": "charts/action_std",
}
EPISODES = 100  # of each untrained policy
CORES = [0]  # macOS: one call has them all
if hasattr(os, "sched_getaffinity"):
    CORES = sorted(os.sched_getaffinity(0))


# -------------------------------------------------------------------------------------- ONE CALL
class Call(NamedTuple):
    """One process of benchmark/lockstep.py: cells of one task, side by side."""

    flags: tuple[str, ...]  # of lockstep.py, --run-dir last: a folder below `root`
    root: str

    @property
    def path(self) -> Path:
        return Path(self.root, self.flags[-1])

    @property
    def name(self) -> str:
        return f"{self.path.parent.name} {self.flags[1]}"

    @property
    def crowd(self) -> list[ppo_continuous.Args]:
        """The flags of every agent."""
        return parse(self.flags)

    @property
    def folders(self) -> list[Path]:
        """Of every agent."""
        return [self.path / lockstep.agent_name(args) for args in self.crowd]

    @property
    def agents(self) -> int:
        return len(self.crowd)

    @property
    def steps(self) -> int:
        """Of all agents together."""
        return self.crowd[0].num_updates * self.crowd[0].batch_size * self.agents

    def steps_done(self) -> int:
        """How many of them the last whole line of the last agent's metrics.csv has seen."""
        with contextlib.suppress(OSError), open(self.folders[-1] / "metrics.csv", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            cells = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].split(b",")
            if len(cells) > 1 and cells[1].isdigit():  # update,global_step,...
                return int(cells[1]) * self.agents
        return 0


@functools.cache
def parse(flags: tuple[str, ...]) -> list[ppo_continuous.Args]:
    """What these flags say to lockstep.py: the flags of every agent.

    Raises UserError. Where a flag does not exist, tyro says so in a box and exits with code 2.
    """
    try:
        return lockstep.crowd_args(*lockstep.parse_args(list(flags)))
    except ppo_continuous.UserError as reason:
        raise UserError(str(reason)) from reason


def work(call: Call) -> tuple[list[dict], list[dict]]:
    """Start a run, go on with it, or leave it alone, whatever its folder asks for.

    Returns its rows of runs.csv and of curves.csv. What it prints goes to a file beside the folder.
    Raises UserError.
    """
    path = call.path
    args = replace(call.crowd[0], run_dir=str(path))
    if not all((folder / "summary.json").exists() for folder in call.folders):
        if (path / "config.json").exists():
            read_config(path, args)
            args = replace(args, resume=str(path))
        else:
            shutil.rmtree(path, ignore_errors=True)  # stopped before its first file was whole
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.with_name(path.name + ".log")
        seeds = list(dict.fromkeys(mine.seed for mine in call.crowd))
        objectives = list(dict.fromkeys(mine.objective for mine in call.crowd))
        torch.set_num_threads(1)  # this and the next line: as main() of the scripts does
        gc.freeze()
        with (
            open(log, "a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                lockstep.train(args, seeds, objectives)
            except Exception as reason:
                traceback.print_exc()
                raise UserError(f"{path} failed: {reason}; more in {log}") from reason
    return collect(call)


def read_config(folder: Path, args: ppo_continuous.Args) -> dict:
    """The config.json of a run, or of an agent. Raises UserError where its flags are others."""
    derived = {"run_dir", "resume", "checkpoint_every"}  # what the script fills in
    wanted = {name: value for name, value in vars(args).items() if name not in derived}
    return check_config(folder, wanted)


def collect(call: Call) -> tuple[list[dict], list[dict]]:
    """Rows of runs.csv and of curves.csv from a finished run.

    Raises UserError where a file does not fit.
    """
    started = read_config(call.path, call.crowd[0])["started"]
    about = {"started": started, "git_commit": git_commit()} | machine()
    command = f"python benchmark/lockstep.py {' '.join(call.flags)}"
    rows, points = [], []
    for args, folder in zip(call.crowd, call.folders, strict=True):
        config = read_config(folder, args)
        try:
            (summary,) = json.loads((folder / "summary.json").read_text())
            metrics = read_csv(folder / "metrics.csv")
            key = {name: summary[name] for name in ("env_id", "objective", "seed")}
            row = key | {name: summary[name] for name in SUMMARY}
            kl = [row["losses/kl_after_update"] for row in metrics]
            kl = [float(cell) for cell in kl if cell]  # empty: of an agent that is frozen
            row["kl_median"] = np.median(kl).item() if kl else None
            row["kl_max"] = max(kl, default=None)
            row["bootstrap_truncated"] = str(args.bootstrap_truncated)
            row["agents"] = call.agents
            row["wall_seconds"] = summary["wall_seconds"]
            row["sps"] = summary["sps"] * call.agents  # of all agents together
            row |= about | {name: config["versions"][name] for name in ("python", *PACKAGES)}
            rows.append(row | {"command": command})
            for i in np.unique(np.linspace(0, len(metrics) - 1, POINTS).round().astype(int)):
                point = key | {"global_step": metrics[i]["global_step"]}
                for name, column in CURVES.items():
                    cell = metrics[i][column]
                    point[name] = f"{float(cell):.6g}" if cell else ""
                points.append(point)
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise UserError(f"{folder} cannot be collected: {reason!r}") from reason
    return rows, points


# ----------------------------------------------------------------------------------- ALL OF THEM
Answer = tuple[list[dict], list[dict]] | UserError


def answer(call: Call, mine: list[int], pipe: Connection) -> None:
    """In a process of its own, on these cores: work(), its result or its error into the pipe.

    Ends when the parent does.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)

    def watch():
        multiprocessing.parent_process().join()
        # or a run without a master would write into the folder that the next master continues
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    try:
        pipe.send(work(call))
    except UserError as reason:
        pipe.send(reason)


def local(
    calls: list[Call], tick: Callable[[], None], jobs: int, target: Callable = answer
) -> Iterator[tuple[Call, Answer]]:
    """Engine: `jobs` calls side by side, each a new process with an equal share of the cores.

    The next one starts when one is done. Two processes with a core each get 1.4 times as much done
    as one process with two.
    """
    waiting, running, share = list(calls), {}, max(1, len(CORES) // jobs)
    free = [(CORES * jobs)[i * share : (i + 1) * share] for i in range(jobs)]
    try:
        while waiting or running:
            while waiting and free:
                call, mine = waiting.pop(0), free.pop(0)
                ours, theirs = multiprocessing.Pipe(duplex=False)
                context = multiprocessing.get_context("spawn")
                process = context.Process(target=target, args=(call, mine, theirs))
                process.start()
                theirs.close()
                running[ours] = call, process, mine
            for pipe in wait(running, timeout=1):
                call, process, mine = running.pop(pipe)
                try:
                    result = pipe.recv()
                except EOFError:  # killed, or out of memory
                    what = "its process died; the same command goes on with it"
                    result = UserError(f"{call.path}: {what}")
                process.join()
                free.append(mine)
                yield call, result
            tick()
    finally:
        for _, process, _ in running.values():
            process.kill()


def on_ray(calls: list[Call], tick: Callable[[], None]) -> Iterator[tuple[Call, Answer]]:
    """Engine: one call at a time on each machine of a Ray cluster.

    That of RAY_ADDRESS, or the one that runs here, or a new one. Every machine needs this
    repository at the same place. A call whose worker dies is tried again, up to three times, and
    goes on from its checkpoint where the machines share the working directory. Raises UserError.
    """
    try:
        import ray
    except ModuleNotFoundError as reason:
        raise UserError("--engine ray needs Ray: pip install -r requirements-ray.txt") from reason
    from benchmark import table1  # this file's name on every machine; here it may be __main__

    where = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"env_vars": {"PYTHONPATH": where}}
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=variables)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = min(node["CPU"] for node in nodes if "CPU" in node)
        options = {"num_cpus": cores, "max_calls": 1, "max_retries": 3}
        options["scheduling_strategy"] = "SPREAD"
        pending = {}
        for call in calls:
            gpus = int(call.crowd[0].device == "cuda")
            remote = ray.remote(**options, num_gpus=gpus)(table1.work)
            pending[remote.remote(table1.Call(*call))] = call
        while pending:
            ready, _ = ray.wait(list(pending), timeout=1)
            tick()
            for reference in ready:
                try:
                    result = ray.get(reference)
                except UserError as reason:
                    # as Ray raises it: of a class made of both its own and ours
                    result = UserError(str(reason.cause))
                except ray.exceptions.RayError as reason:
                    what = f"{reason}; the same command goes on with it"
                    result = UserError(f"{pending[reference].path}: {what}")
                yield pending.pop(reference), result
    finally:
        ray.shutdown()


def environment(task: str) -> list[str]:
    """Flags: the same simulator for few agents and for many.

    Or one table would hold two versions of MuJoCo.
    """
    backend = "envpool" if task in envpool.list_all_envs() else "gymnasium"
    return ["--env-id", task, "--env-backend", backend]


def common_flags(preset: str, total_timesteps: int, more: list[str]) -> list[str]:
    """The flags of every run, as its command in runs.csv shows them before --run-dir."""
    return ["--preset", preset, "--total-timesteps", str(total_timesteps), *more]


def is_earlier(row: dict) -> bool:
    """Whether a row of runs.csv is of the time when ppo_continuous.py trained crowds itself."""
    return row["command"].startswith("python ppo_continuous.py")


class Grid(NamedTuple):
    """Every combination of these, in this order."""

    tasks: list[str]
    objectives: list[str]
    seeds: list[int]

    @property
    def cells(self) -> list[tuple[str, str, int]]:
        return list(itertools.product(*self))


def plan(grid: Grid, done: set, settings: list[str], runs: str) -> list[Call]:
    """The calls for all cells of the grid that are not `done`, those of the first seeds first.

    Per task one for each set of missing seeds, of at most TOGETHER. The same missing cells give the
    same call, with the same folder.
    """
    calls = []
    for task in grid.tasks:
        groups = {}  # missing seeds -> objectives
        for objective in grid.objectives:
            missing = tuple(seed for seed in grid.seeds if (task, objective, seed) not in done)
            groups.setdefault(missing, []).append(objective)
        for missing, mine in groups.items():
            for start in range(0, len(missing), TOGETHER):
                seeds = [str(seed) for seed in missing[start : start + TOGETHER]]
                named = f"{task}__{'-'.join(seeds)}__{'_'.join(mine).replace(':', '-')}"
                flags = [*environment(task), "--objectives", *mine, "--seeds", *seeds, *settings]
                calls.append(Call((*flags, "--run-dir", f"{runs}/{named}"), os.getcwd()))
    return sorted(calls, key=lambda call: call.crowd[0].seed)


def cell_of(row: dict) -> tuple[str, str, int]:
    """What a row of runs.csv or curves.csv is about."""
    return row["env_id"], row["objective"], int(row["seed"])


def place(task: str, objective: str, seed: int = 0) -> tuple:
    """To sort by: the paper's order, and what the paper has not after it."""
    known = TASKS.index(task) if task in TASKS else len(TASKS), task
    order = OBJECTIVES["paper"]
    return *known, order.index(objective) if objective in order else len(order), objective, seed


class Table:
    """runs.csv and curves.csv of a folder, rows as text, sorted; on disk always whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = folder / "runs.csv", folder / "curves.csv"
        self.runs, self.curves = (read_csv(path) if path.exists() else [] for path in paths)
        for row in self.runs:
            row.setdefault("bootstrap_truncated", "True")  # at that time there was nothing else

    def check(self, settings: list[str], earlier: list[str] | None = None) -> None:
        """Raises UserError where a run was made with other flags than these.

        earlier: what they were in earlier rows, where that is not the same.
        """
        for row in self.runs:
            flags, command = settings, row["command"]
            bootstrapped = str(parse(tuple(settings))[0].bootstrap_truncated)
            if is_earlier(row):
                flags = earlier or settings
                bootstrapped = "True"
                was = r"--preset paper --total-timesteps \d+"
                command = re.sub(was, r"\g<0> --bootstrap-truncated", command)
            if (
                bootstrapped != row["bootstrap_truncated"]
                or f" {' '.join(flags)} --run-dir" not in command
            ):
                what = f"{self.folder} holds runs of other settings: {row['command']}"
                raise UserError(f"{what}; give other --results")

    def add(self, rows: list[dict], points: list[dict]) -> None:
        """Put these cells in place of what there was of them, and write both files."""
        new = set(map(cell_of, rows))
        self.runs = [row for row in self.runs if cell_of(row) not in new] + rows
        self.curves = [row for row in self.curves if cell_of(row) not in new] + points
        for kept in (self.runs, self.curves):
            kept.sort(key=lambda row: (*place(*cell_of(row)), int(row.get("global_step", 0))))
        replace_csv(self.folder / "curves.csv", self.curves)
        replace_csv(self.folder / "runs.csv", self.runs)  # last: a row says that its cell is done


def replace_csv(path: Path, rows: list[dict]) -> None:
    """All of the new file or all of the old."""
    temporary = path.with_name(path.name + ".tmp")
    write_csv(temporary, rows)
    os.replace(temporary, path)


def run(calls: list[Call], engine: Callable, table_of: Callable[[Call], Table]) -> None:
    """Complete every call; one that fails does not stop the others. Then raises UserError."""
    total = sum(call.steps for call in calls)
    started = time.monotonic()
    failures, finished = [], []

    def done(call: Call) -> int:
        return call.steps if call in finished else call.steps_done()

    def rest() -> str:
        """When all will be done, at the speed since the start of this command."""
        now = sum(map(done, calls))
        if now <= first:
            return "?"
        seconds = (total - now) * (time.monotonic() - started) / (now - first)
        return f"{datetime.datetime.now() + datetime.timedelta(seconds=seconds):%a %H:%M}"

    def tick() -> None:
        running = [call for call in calls if call not in finished and done(call)]
        names = [f"{call.name} x{call.agents}" for call in running] or ["-"]
        shown = f"{', '.join(names)}; {len(finished)} of {len(calls)} done"
        bar.set_description_str(shown, refresh=False)
        bar.set_postfix_str(f"all done {rest()}", refresh=False)
        bar.update(sum(map(done, calls)) - bar.n)

    first = sum(map(done, calls))  # of runs that were interrupted
    with tqdm(total=total, initial=first, unit=" steps", unit_scale=True, disable=None) as bar:
        for call, result in engine(calls, tick):
            if isinstance(result, UserError):
                failures.append(str(result))
                said = str(result)
            else:
                table_of(call).add(*result)
                minutes = result[0][0]["wall_seconds"] / 60
                said = f"{call.name}: {call.agents} runs in {minutes:.1f} min"
            finished.append(call)
            tick()
            bar.clear()
            said += f"; {len(finished)} of {len(calls)} done"
            said += f", all by {rest()}" if len(finished) < len(calls) else ""
            print(f"{datetime.datetime.now():%H:%M} {said}", flush=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(calls)} calls failed: {'; '.join(failures)}")


def measure_random(grid: Grid, settings: list[str], path: Path) -> None:
    """random.csv: what two policies score that have learned nothing.

    A row per task, policy and seed: actions uniform within their bounds, and the Gaussian of a
    fresh agent, which the paper calls the initial random policy. Raises UserError where an
    environment cannot be made.
    """
    rows = read_csv(path) if path.exists() else []
    have = {(row["env_id"], int(row["seed"])) for row in rows}
    now = datetime.datetime.now().isoformat(timespec="seconds")
    about = {"started": now, "git_commit": git_commit()}
    about |= {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    for task in grid.tasks:
        missing = [seed for seed in grid.seeds if (task, seed) not in have]
        if not missing:
            continue
        options = {"eval_episodes": EPISODES, "sample_actions": True, "device": "cpu"}
        crowd = parse((*environment(task), "--seeds", *map(str, missing), *settings))
        crowd = [replace(args, **options) for args in crowd]
        try:
            with warnings.catch_warnings(action="ignore"):  # Gymnasium would rather have -v5
                measured = {"uniform": uniform(crowd), "gaussian": untrained(crowd)}
        except ppo_continuous.UserError as reason:
            raise UserError(str(reason)) from reason
        for policy, returns in measured.items():
            for seed, mine in zip(missing, returns, strict=True):
                row = {"env_id": task, "policy": policy, "seed": seed, "episodes": len(mine)}
                row["mean_return"] = np.mean(mine).item()
                row["std_return"] = np.std(mine).item()
                rows.append(row | about)
        order = ["uniform", "gaussian"]
        rows.sort(key=lambda row: (order.index(row["policy"]), int(row["seed"])))
        rows.sort(key=lambda row: place(row["env_id"], ""))
        replace_csv(path, rows)


def untrained(crowd: list[ppo_continuous.Args]) -> list[list[float]]:
    """Returns [A][E] of A fresh agents, actions sampled."""
    torch.set_num_threads(1)  # as in the script: the bits of initial weights depend on it
    actors = ppo_continuous.Actors(crowd[0], 1)
    agents = [ppo_continuous.begin(args, actors, None)[1]["agent"] for args in crowd]
    actors.envs.close()
    return lockstep.evaluate(agents, crowd, Path())


def uniform(crowd: list[ppo_continuous.Args]) -> list[list[float]]:
    """Returns [A][E] of uniform actions.

    There is a generator per seed, for all of its episodes side by side.
    """
    episodes = crowd[0].eval_episodes
    firsts = [2**30 + ppo_continuous.stream(args.seed, "uniform") for args in crowd]
    rng = [np.random.default_rng(first) for first in firsts]
    actors = ppo_continuous.Actors(crowd[0], episodes * len(crowd))
    actors.restart([first + i for first in firsts for i in range(episodes)])
    space = actors.envs.single_action_space
    returns = {}
    while len(returns) < actors.num_envs:
        shares = [generator.random((episodes, *space.shape)) for generator in rng]
        actions = space.low + (space.high - space.low) * np.concatenate(shares)
        *_, ended = actors.step(actions.astype(space.dtype))
        for i, episode_return, _ in ended:
            returns.setdefault(i, episode_return)
    actors.envs.close()
    return np.reshape([returns[i] for i in range(actors.num_envs)], (len(crowd), -1)).tolist()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises UserError where another process is at work on this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as reason:
        what = f"another table1.py is at work on {folder}"
        raise UserError(f"{what}; wait for it, or give other --results") from reason
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------- SCORING
def raw_returns(runs: list[dict], grid: Grid) -> np.ndarray:
    """The last_100_return of every cell, [K tasks, O objectives, S seeds].

    Raises UserError where one is missing.
    """
    have = {cell_of(row): float(row["last_100_return"] or "nan") for row in runs}
    missing = [cell for cell in grid.cells if not math.isfinite(have.get(cell, math.nan))]
    if missing:
        what = f"{len(missing)} of {len(grid.cells)} runs are missing or have no return"
        named = ", ".join(" ".join(map(str, cell)) for cell in missing)
        raise UserError(f"{what}: {named}")
    return np.array([have[cell] for cell in grid.cells]).reshape([len(part) for part in grid])


def best_returns(raw: np.ndarray, best: str) -> np.ndarray:
    """raw [K, O, S] -> what scores 1 in each task, [K].

    The best single run, or the mean of the best objective.
    """
    return raw.max((1, 2)) if best == "run" else raw.mean(2).max(1)


def normalise(raw: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """raw [K, O, S], shifted and scaled so that zero [K] becomes 0 and one [K] becomes 1."""
    return (raw - zero[:, None, None]) / (one - zero)[:, None, None]


def by_objective(scores: np.ndarray) -> np.ndarray:
    """[K, O, S] -> [O, K * S]"""
    return scores.transpose(1, 0, 2).reshape(scores.shape[1], -1)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """scores [..., n] -> [...]: the mean without the lowest and the highest n // 4 runs."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def resample(scores: np.ndarray, times: int = 10_000) -> np.ndarray:
    """scores [K, O, S] -> [times, O, K * S]: runs drawn with replacement within each task.

    That is the stratified bootstrap of Agarwal et al. (2021), with the same seeds for all
    objectives, since these share weights and noise. The same numbers at every call.
    """
    tasks, objectives, seeds = scores.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(times, tasks, seeds))
    picked = scores.transpose(0, 2, 1)[np.arange(tasks)[:, None], drawn]  # [times, K, S, O]
    return picked.reshape(times, -1, objectives).transpose(0, 2, 1)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of x [..., n] and y [n]; equal numbers share their mean rank."""

    def ranks(z):  # from their mean
        above = (z[..., None] > z[..., None, :]).sum(-1) + (z[..., None] >= z[..., None, :]).sum(-1)
        return (above - z.shape[-1]) / 2

    x, y = ranks(x), ranks(y)
    return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


# ---------------------------------------------------------------------------------------- REPORT
READINGS = {  # of "random policy" and "best result", which the paper leaves open; headline first
    "Gaussian, best run": ("gaussian", "run"),
    "Gaussian, best objective": ("gaussian", "objective"),
    "uniform, best run": ("uniform", "run"),
    "uniform, best objective": ("uniform", "objective"),
}
KINDS = ("clip", "adaptive", "kl")  # of objectives: columns of the pictures


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}"


def interval(estimate: float, draws: np.ndarray) -> str:
    """An estimate and its bootstrap 95% interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{estimate:.2f} [{low:.2f}, {high:.2f}]"


def random_returns(rows: list[dict], tasks: list[str], policy: str) -> np.ndarray:
    """The mean return of a policy that has learned nothing, over the rows of random.csv: [K].

    Raises UserError.
    """
    means = []
    for task in tasks:
        mine = [row for row in rows if (row["env_id"], row["policy"]) == (task, policy)]
        if not mine:
            what = f"random.csv has no {policy} policy for {task}"
            raise UserError(f"{what}; run table1.py without --report")
        means.append(np.mean([float(row["mean_return"]) for row in mine]))
    return np.array(means)


def tell_scores(folder: Path, runs: list[dict], untrained: list[dict], grid: Grid) -> str:
    """The normalised scores of a grid without a gap.

    Draws scores.png, and writes the first of the text as scores.md too.
    """
    raw, objectives = raw_returns(runs, grid), grid.objectives
    paper = {row["objective"]: float(row["avg_normalized_score"]) for row in PAPER}
    theirs = np.array([paper.get(objective, np.nan) for objective in objectives])
    policies = ("gaussian", "uniform")
    zeros = {policy: random_returns(untrained, grid.tasks, policy) for policy in policies}
    readings = READINGS.values()
    scores = [normalise(raw, zeros[zero], best_returns(raw, one)) for zero, one in readings]
    means = [by_objective(s).mean(-1) for s in scores]
    drawn = [resample(s).mean(-1) for s in scores]
    mean, draws = means[0], drawn[0]  # of the headline
    middle = interquartile_mean(by_objective(scores[0]))
    middles = interquartile_mean(resample(scores[0]))
    draw_scores(folder / "scores.png", objectives, theirs, (mean, draws), (middle, middles))

    names = [
        {"objective": f"`{o}`", "the paper": f"{paper[o]:.2f}" if o in paper else ""}
        for o in objectives
    ]
    table = []
    for i, name in enumerate(names):
        row = {"ours: mean [95%]": interval(mean[i], draws[:, i])}
        table.append(name | row | {"interquartile mean [95%]": interval(middle[i], middles[:, i])})
    best, worst = mean.argmax(), mean.argmin()
    near = mean >= np.percentile(draws[:, best], 2.5)
    averaged = f"{len(grid.tasks)} tasks x {len(grid.seeds)} seeds"
    runs = [row for row in runs if cell_of(row) in set(grid.cells)]
    frozen = [row["objective"] for row in runs if row["diverged_at"]]
    counted = ", ".join(f"`{o}` {frozen.count(o)}" for o in objectives if o in frozen)
    stopped = "Runs that met a number that was not finite and kept their last weights"
    stopped = f"\n{stopped}: {counted}.\n" if counted else ""
    headline = f"""{markdown(table)}
The return of the last 100 episodes, in each task 0 for the untrained Gaussian policy and 1 for \
the best single run,
averaged over {averaged}. Bootstrap 95% intervals, stratified by task, with 0 and 1 of each task as
measured; from so few seeds they come out too narrow rather than too wide. The paper states none.

Highest is `{objectives[best]}`; at or above the lower end of its interval:
{", ".join(f"`{objectives[i]}`" for i in np.flatnonzero(near))}. Lowest is `{objectives[worst]}`, in
{(draws.argmin(1) == worst).mean():.0%} of the resamples.
{stopped}"""
    (folder / "scores.md").write_text(headline)
    text = f"## Scores\n\n{headline}\n![Scores with intervals](scores.png)\n\n"
    text += "The paper defines neither its random policy nor its best result. "
    text += "All four readings of the mean:\n\n"
    table = []
    for i, name in enumerate(names):
        table.append(name | {r: f"{m[i]:.2f}" for r, m in zip(READINGS, means, strict=True)})
    if objectives == OBJECTIVES["paper"]:
        pairs = zip(means, drawn, strict=True)
        told = [interval(spearman(m, theirs), spearman(d, theirs)) for m, d in pairs]
        row = {"objective": "Spearman correlation with the paper [95%]", "the paper": ""}
        table.append(row | dict(zip(READINGS, told, strict=True)))
    text += f"{markdown(table)}\nWhat is 0 and what is 1 in them:\n\n"
    table = []
    for k, task in enumerate(grid.tasks):
        of_objective, (o, s) = raw[k].mean(1), np.unravel_index(raw[k].argmax(), raw[k].shape)
        row = {
            "task": task,
            "uniform": number(zeros["uniform"][k]),
            "Gaussian": number(zeros["gaussian"][k]),
        }
        row["best run"] = f"{number(raw[k].max())} (`{objectives[o]}`, seed {grid.seeds[s]})"
        name = objectives[of_objective.argmax()]
        row["best objective"] = f"{number(of_objective.max())} (`{name}`)"
        table.append(row)
    return f"{text}{markdown(table)}\n"


def tell_returns(have: dict, grid: Grid) -> str:
    """What every run scored and how far its updates went, of whatever runs there are."""
    returns, kls = [], []
    for objective in grid.objectives:
        returns.append({"objective": f"`{objective}`"})
        kls.append(dict(returns[-1]))
        for task in grid.tasks:
            mine = [have[cell] for seed in grid.seeds if (cell := (task, objective, seed)) in have]
            values = [float(run["last_100_return"] or "nan") for run in mine]
            said = ""
            if values:
                said = f"{number(np.mean(values))} ({number(min(values))} to {number(max(values))})"
            if 0 < len(values) < len(grid.seeds):
                said += f", {len(values)} of {len(grid.seeds)}"
            returns[-1][task] = said
            medians = [float(run["kl_median"]) for run in mine if run["kl_median"]]
            most = [float(run["kl_max"]) for run in mine if run["kl_max"]]
            kls[-1][task] = f"{np.median(medians):.2g} ({max(most):.2g})" if medians else ""
    dead = [
        f"{task} {o} seed {seed} at step {run['diverged_at']}"
        for (task, o, seed), run in have.items()
        if run["diverged_at"]
    ]
    said = f"None of the {len(have)} runs met a number that was not finite"
    if dead:
        said = f"{len(dead)} of {len(have)} runs met a number that was not finite and kept the "
        said += f"last finite weights: {', '.join(dead)}"
    return f"""## Returns

The return of the last 100 episodes: mean over seeds, and from the worst to the best.

{markdown(returns)}
{said}.

![Learning curves](curves.png)

Means over seeds with bootstrap 95% intervals. A curve that leaves its panel goes on below it.

## How far an update goes

KL[old, new] of an update: median, and in brackets the largest of all.

{markdown(kls)}
![KL per update](kl.png)

"""


def tell_learning(folder: Path, have: dict, grid: Grid, curves: dict) -> str:
    """clip:0.2 seed by seed beside the figures of others.

    Draws learning.png, and writes the table as learning.md too.
    """
    figure = json.loads((FIGURES / "figure3_mujoco_curves.json").read_text())
    cleanrl = read_csv(FIGURES / "cleanrl.csv")
    cleanrl = {(row["env_id"], row["total_timesteps"]): row for row in cleanrl}
    table, panels, lines = [], [], ["clip:0.2, ours", "clip:0.2, the paper, -v1"]
    for task in grid.tasks:
        runs = [have.get((task, "clip:0.2", seed)) for seed in grid.seeds]
        values = [float(run["last_100_return"] or "nan") if run else None for run in runs]
        said = ["" if value is None else number(value) for value in values]
        row = {"task": task} | {f"seed {seed}": x for seed, x in zip(grid.seeds, said, strict=True)}
        row["mean"] = "" if None in values else number(np.mean(values))
        for steps in ("1000000", "8000000"):
            other = cleanrl.get((task, steps), {"mean": "", "std": ""})
            said = [number(float(other[name])) for name in ("mean", "std") if other[name]]
            row[f"CleanRL, {steps[0]}M steps"] = " ± ".join(said)
        points = figure.get(task.replace("-v4", "-v1"), {}).get("PPO(Clip)", {}).get("line")
        table.append(row | {"the paper, Figure 3": number(points[-1][1]) if points else ""})
        paper = [tuple(np.array(points).T)] if points else None
        drawn = zip(lines, (curves.get(task, {}).get("clip:0.2"), paper), strict=True)
        panels.append((task, {line: seeds for line, seeds in drawn if seeds}, lines))
    draw(folder / "learning.png", panels, 4, "return (last 100)")
    (folder / "learning.md").write_text(markdown(table))
    return f"""## `clip:0.2`, seed by seed

The return of the last 100 episodes, beside those of CleanRL (-v4, mean and standard deviation \
over seeds) and the end
of the curve in the paper's Figure 3 (-v1); benchmark/paper/README.md says where these are from.

{markdown(table)}
![Learning curves of clip:0.2](learning.png)

"""


def on_the_clock(calls: Iterable[tuple[str, float]]) -> float:
    """Seconds in which one or more calls ran, each given as its start and its seconds."""
    seconds, seen = 0.0, -math.inf
    calls = [(datetime.datetime.fromisoformat(at).timestamp(), length) for at, length in calls]
    for start, length in sorted(calls):
        seconds += max(0.0, start + length - max(start, seen))
        seen = max(seen, start + length)
    return seconds


def tell_origin(runs: list[dict]) -> str:
    """Commands, time, versions."""
    calls = {(run["command"], run["started"]): float(run["wall_seconds"]) for run in runs}
    text = "## Where this is from\n\n"
    text += "".join(f"    {command}\n" for command in dict.fromkeys(run["command"] for run in runs))
    text += f"\nThese commands trained for {sum(calls.values()) / 3600:.2f} hours in all, "
    clock = on_the_clock((start, seconds) for (_, start), seconds in calls.items())
    text += f"{clock / 3600:.2f} on the clock where none was interrupted. "
    names = ["started", "total_timesteps", "python", *PACKAGES, "git_commit", "cpu", "cores"]
    said = []
    for name in names:
        cells = [run[name] or "unknown" for run in runs]
        if name == "started":
            cells = [cell[:10] for cell in cells]  # the day
        said.append(f"{name.replace('_', ' ')} {' and '.join(sorted(set(cells)))}")
    text += "; ".join(said) + ".\n"
    if any(map(is_earlier, runs)):
        text += MOVED
    return text


MOVED = """
These commands are for commit 6c4213f: since then benchmark/lockstep.py takes `--seeds` and
`--objectives`, and what was `--preset paper` is `--preset paper --bootstrap-truncated`.
"""


def draw(path: Path, panels: list[tuple], columns: int, ylabel: str) -> None:
    """One picture of panels: title, curves (plot.Groups), all lines that its place may have.

    Panels of a row that have the same title share their y axis.
    """
    rows = math.ceil(len(panels) / columns)
    shared = len({title for title, *_ in panels}) < len(panels)
    small = {"fontsize": "small", "frameon": False}
    figure = Figure(figsize=(12, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if shared else False)
    for i, (ax, (title, groups, lines)) in enumerate(zip(axes.ravel(), panels, strict=False)):
        groups = {o: [curve for curve in seeds if len(curve[0]) > 1] for o, seeds in groups.items()}
        plot.curves(ax, {o: seeds for o, seeds in groups.items() if seeds}, lines)
        ax.set(title=title, xlabel="", ylabel=ylabel if i % columns == 0 else "")
        if shared and i < columns and ax.lines:
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=2, **small)
    if not shared:
        handles = {line.get_label(): line for ax in axes.ravel() for line in ax.lines}
        figure.legend(handles=handles.values(), loc="outside upper center", ncols=4, **small)
    for row in axes:
        drawn = [(line.get_label(), line.get_ydata()) for ax in row for line in ax.lines]
        others = np.concatenate([[], *(y for label, y in drawn if label != "none")])
        # a collapse must not flatten everything else
        if shared and 0 < len(others) < sum(len(y) for _, y in drawn):
            row[0].set_ylim(bottom=max(row[0].get_ylim()[0], others.min() - 0.1 * np.ptp(others)))
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    figure.savefig(path, dpi=90)


def draw_scores(
    path: Path, objectives: list[str], theirs: np.ndarray, mean: tuple, middle: tuple
) -> None:
    """Dots with intervals; mean and middle: estimates [O] and their bootstrap draws [times, O].

    The axis is cut between `none`, which is far off, and the others.
    """
    places, ends, handles = np.arange(len(objectives)), [theirs], {}
    parts = [places[[(o == "none") == far for o in objectives]] for far in (True, False)]
    parts = [part for part in parts if len(part)]
    figure = Figure(figsize=(7, 1.4 + 0.36 * len(objectives)), layout="constrained")
    widths = [1, 3][-len(parts) :]
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False, width_ratios=widths)[0]
    for shift, marker, label, (score, draws) in (
        (-0.12, "o", "mean", mean),
        (0.12, "D", "interquartile mean", middle),
    ):
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
        ends += [low, high]
        colour = plot.COLOURS[0 if label == "mean" else 2]
        for ax in axes:
            ax.hlines(places + shift, low, high, colour, linewidth=1.5)
            (handles[label],) = ax.plot(score, places + shift, marker, color=colour, markersize=5)
    for ax, part in zip(axes, parts, strict=True):
        (handles["the paper"],) = ax.plot(theirs, places, "x", color="black")
        low, high = np.nanmin(np.array(ends)[:, part]), np.nanmax(np.array(ends)[:, part])
        ax.set_xlim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=places, yticklabels=objectives)
    axes[0].invert_yaxis()
    for left, right in itertools.pairwise(axes):
        right.tick_params(axis="y", left=False)
        right.spines["left"].set_visible(False)
        for ax, end in ((left, 1), (right, 0)):  # two strokes across the axis, where it is cut
            stroke = {"marker": [(-1, -2), (1, 2)], "color": "black", "clip_on": False}
            ax.plot(end, 0, transform=ax.transAxes, **stroke)
    label = "normalised score: 0 is the untrained policy, 1 the best single run"
    figure.supxlabel(label, fontsize="medium")
    style = {"ncols": len(handles), "fontsize": "small", "frameon": False}
    figure.legend(handles.values(), handles, loc="outside upper center", **style)
    figure.savefig(path, dpi=110)


def report(folder: Path, asked: Grid, preset: str) -> None:
    """Write summary.md and the pictures from the CSVs.

    Of the grid that is asked for, and of what there is besides. The same CSVs give the same bytes.
    Raises UserError.
    """
    table = Table(folder)
    path = folder / "random.csv"
    untrained = read_csv(path) if path.exists() else []
    if not table.runs:
        raise UserError(f"{folder / 'runs.csv'} has no run yet; run table1.py without --report")
    have = {cell_of(row): row for row in table.runs}
    both = zip(asked, zip(*have, strict=True), strict=True)
    grid = Grid(*(sorted({*mine, *there}) for mine, there in both))
    grid.tasks.sort(key=lambda task: place(task, ""))
    grid.objectives.sort(key=lambda objective: place("", objective))
    whole = []
    for task in grid.tasks:
        gapless = have.keys() >= set(Grid([task], *grid[1:]).cells)
        if gapless and len(grid.objectives) > 1:  # or one would be compared with itself
            whole.append(task)

    text = f"# {'Table 1' if preset == 'paper' else f'Table 1 with --preset {preset}'}"
    if preset == "paper" and all(row["bootstrap_truncated"] == "True" for row in table.runs):
        text += ", with time limits bootstrapped"
    text += "\n\n"
    shape = f"{len(grid.tasks)} tasks x {len(grid.objectives)} objectives x {len(grid.seeds)} seeds"
    if len(have) == len(grid.cells):
        text += f"All {len(have)} runs are in: {shape}."
    else:
        text += f"**PARTIAL: {len(have)} of {len(grid.cells)} runs are in** ({shape}). "
        said = f"The scores are over the tasks without a gap alone: {', '.join(whole)}."
        text += said if whole else "No scores yet."
    paper = Grid(TASKS, OBJECTIVES["paper"], [1, 2, 3]).cells
    if preset == "paper":
        count = sum(cell in have for cell in paper)
        text += f" Of the {len(paper)} runs of the paper's Table 1, {count} are here."
    text += " Every run is a row of [runs.csv](runs.csv), its curve is in [curves.csv](curves.csv)."
    text += "\n\n"
    for stale in ("scores.md", "scores.png"):
        (folder / stale).unlink(missing_ok=True)
    if whole:
        text += tell_scores(folder, table.runs, untrained, Grid(whole, *grid[1:]))

    curves = {}
    for name in ("episodic_return", "kl", "beta"):
        rows = [row for row in table.curves if row[name]]
        rows = [(*cell_of(row), float(row["global_step"]), float(row[name])) for row in rows]
        if name != "episodic_return":
            rows = [(*row, math.log10(value)) for *row, value in rows if 0 < value < math.inf]
        curves[name] = plot.gather(rows)
    kinds = [kind for kind in KINDS if any(o.startswith(kind) for o in grid.objectives)] or [""]
    columns = [[o for o in grid.objectives if o == "none" or o.startswith(kind)] for kind in kinds]
    width = len(columns) if len(columns) > 1 else 4

    def panels(name: str, columns: list[list[str]]) -> list:
        found = []
        for task in grid.tasks:
            mine = curves[name].get(task, {})
            for lines in columns:
                found.append((task, {o: mine[o] for o in lines if o in mine}, lines))
        return found

    draw(folder / "curves.png", panels("episodic_return", columns), width, "return (last 100)")
    draw(folder / "kl.png", panels("kl", columns), width, "log10 KL[old, new]")
    text += tell_returns(have, grid)
    adaptive = [o for o in grid.objectives if o.startswith("adaptive")]
    if adaptive:
        draw(folder / "beta.png", panels("beta", [adaptive]), 4, "log10 beta")
        text += "![beta over time](beta.png)\n\n"
    if "clip:0.2" in grid.objectives:
        text += tell_learning(folder, have, grid, curves["episodic_return"])
    (folder / "summary.md").write_text(text + tell_origin(table.runs))


def complete(grid: Grid, folder: Path, settings: list[str], engine: Callable) -> None:
    """Run what the CSVs of this folder lack of the grid. Raises UserError."""
    with alone(folder):
        table = Table(folder)
        table.check(settings)
        calls = plan(grid, set(map(cell_of, table.runs)), settings, f"runs/{folder.name}")
        for call in calls:
            parse(call.flags)  # a flag that makes no sense is found now, not after hours
        if not table.runs:  # whatever is there may be of other flags
            (folder / "random.csv").unlink(missing_ok=True)
        measure_random(grid, settings, folder / "random.csv")
        run(calls, engine, lambda call: table)


def main(argv: list[str]) -> None:
    parser = Parser("Run what is missing of the paper's Table 1, and report it.")
    add = parser.add_argument
    add("--tasks", nargs="+", default=TASKS, help="environment ids; without a version -v4")
    what = "default: the paper's 11; of --preset modern four of them"
    add("--objectives", nargs="+", help=what)
    what = "runs of every task and objective"
    add("--seeds", nargs="+", type=int, help=f"{what}; default: 1 to 10, of --preset modern 1 to 3")
    add("--preset", choices=OBJECTIVES, default="paper", help="of ppo_continuous.py")
    add("--total-timesteps", type=positive, default=1_000_000, help="of every run")
    what = "tasks at a time on this machine; default: one on each core"
    add("--jobs", type=positive, help=what)
    add("--engine", choices=["local", "ray"], default="local", help="who runs it")
    what = "folder; default: benchmark/results/table1 or table1-modern"
    add("--results", type=Path, help=what)
    what = "run nothing, write the report of the runs there are"
    add("--report", action="store_true", help=what)
    add("flags", nargs="*", help="after --: more flags of ppo_continuous.py for every run")
    args = parser.parse_args(argv)
    tasks = {task if "-v" in task else f"{task}-v4" for task in args.tasks}
    tasks = sorted(tasks, key=lambda task: place(task, ""))
    objectives = set(args.objectives or OBJECTIVES[args.preset])
    objectives = sorted(objectives, key=lambda objective: place("", objective))
    seeds = sorted(set(args.seeds or SEEDS[args.preset]))
    grid = Grid(tasks, objectives, seeds)
    default = "table1" if args.preset == "paper" else f"table1-{args.preset}"
    folder = args.results or ROOT / "benchmark/results" / default
    settings = common_flags(args.preset, args.total_timesteps, args.flags)
    if not args.report:
        if args.engine == "ray" and args.jobs:
            what = "Ray runs one task at a time on each of its machines"
            raise UserError(f"--jobs is for this machine alone; {what}")
        cuda = parse(tuple(settings))[0].device == "cuda"
        most = 1 if cuda else min(len(CORES), len(tasks))
        local_engine = functools.partial(local, jobs=args.jobs or most)
        complete(grid, folder, settings, on_ray if args.engine == "ray" else local_engine)
    report(folder, grid, args.preset)
    print(folder / "summary.md")


if __name__ == "__main__":
    cli(main)
