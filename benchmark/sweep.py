"""Many runs side by side: planned, made, killed and continued, and kept in two tables on disk.

A trainer is a module with parse_args(flags), which may raise its UserError, and train(), which
takes what parse_args() returns and leaves a run folder: config.json, metrics.csv, summary.json. To
go on with that, train() takes the first value of load_run(folder). The scripts are trainers, and so
is benchmark/lockstep.py, whose run holds many agents. A Call is one process of a trainer; a Layout
says what is kept of its agents: a row each in runs.csv, and some points each in curves.csv.

What a new table costs its author:

    LAYOUT = sweep.Layout(
        key=("env_id", "seed"),
        columns=("env_id", "seed", "last_100_return", *sweep.ORIGIN),
        curves={"episodic_return": "charts/episodic_return"},
    )
    calls = []
    for seed in range(1, 4):
        flags = f"--env-id Acrobot-v1 --seed {seed} --run-dir runs/mine/{seed}"
        calls.append(sweep.Call("ppo_cartpole", tuple(flags.split())))
    folder = Path("mine")
    sweep.complete(folder, LAYOUT, calls, functools.partial(sweep.local, jobs=2))
    runs = sweep.Table(folder, LAYOUT).runs
    print(markdown(runs[["env_id", "seed", "last_100_return"]]))

Whatever stops complete(), even a power cut: called again, it goes on from the last checkpoints and
ends with the same numbers. Another algorithm is another name of a module in Call; many settings of
one task are more flags, and a label of the Call that tells them apart, as a part of the key.
"""

import contextlib
import datetime
import fcntl
import functools
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, UserError, git_commit, machine, positive

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "gymnasium", "envpool")
ORIGIN = ("wall_seconds", "sps", "started", "git_commit", "cpu", "cores", "python", "command")
CORES = [0]  # macOS: one call has them all
if hasattr(os, "sched_getaffinity"):
    CORES = sorted(os.sched_getaffinity(0))


# -------------------------------------------------------------------------------------- ONE CALL
@dataclass(frozen=True)
class Call:
    """One process of a trainer."""

    trainer: str  # its module: ppo_cartpole, benchmark.lockstep
    flags: tuple[str, ...]  # --run-dir last: a folder below `root`
    labels: dict = field(default_factory=dict, hash=False)  # columns that the run folder lacks
    root: str = field(default_factory=os.getcwd)

    @property
    def path(self) -> Path:
        return Path(self.root, self.flags[-1])

    @property
    def name(self) -> str:
        return f"{self.path.parent.name} {self.path.name.partition('__')[0]}"

    @property
    def command(self) -> str:
        return f"python {self.trainer.replace('.', '/')}.py {' '.join(self.flags)}"

    @property
    def crowd(self) -> list:
        """The flags of every agent."""
        return parse(self.trainer, self.flags)

    @property
    def folders(self) -> list[Path]:
        """Of every agent."""
        module = import_module(self.trainer)
        if not hasattr(module, "agent_name"):
            return [self.path]
        return [self.path / module.agent_name(args) for args in self.crowd]

    @property
    def finished(self) -> bool:
        return all((folder / "summary.json").exists() for folder in self.folders)

    @property
    def steps(self) -> int:
        """Of all agents together."""
        return sum(args.total_timesteps for args in self.crowd)

    def steps_done(self) -> int:
        """How many of them the last whole line of the last agent's metrics.csv has seen."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.folders[-1] / "metrics.csv").read_text().split("\n")
            global_step = lines[-2].split(",")[1]  # after the last line end is one being written
            return min(self.steps, int(global_step) * len(self.crowd))
        return 0


def script(trainer: str, flags: str, folder: Path, labels: dict) -> Call:
    """A call of a script, with its run folder below ROOT."""
    return Call(trainer, (*flags.split(), "--run-dir", str(folder)), labels, str(ROOT))


@functools.cache
def parse(trainer: str, flags: tuple[str, ...]) -> list:
    """What these flags say to a trainer: the flags of every agent.

    Raises UserError. Where a flag does not exist, tyro says so in a box and exits with code 2.
    """
    module = import_module(trainer)
    try:
        if hasattr(module, "crowd_args"):
            return module.crowd_args(*module.parse_args(list(flags)))
        return [module.parse_args(list(flags))]
    except module.UserError as reason:
        raise UserError(str(reason)) from reason


def pick(metrics: pd.DataFrame, points: int) -> pd.DataFrame:
    """So many rows of metrics.csv, evenly spaced, the first and the last among them."""
    count = len(metrics)
    return metrics.iloc[np.linspace(0, count - 1, min(points, count)).round().astype(int)]


def average(metrics: pd.DataFrame, points: int) -> pd.DataFrame:
    """Means over so many stretches of metrics.csv, each at its last global_step."""
    count = len(metrics)
    groups = metrics.groupby(np.arange(count) * min(points, count) // count)
    return groups.mean(numeric_only=True).assign(global_step=groups["global_step"].last())


def first_step_at_threshold(facts: dict, metrics: pd.DataFrame, folder: Path) -> dict:
    """When the mean return of the last 100 episodes is at least the label `threshold`, if ever.

    The global_step of that row of metrics.csv, which has 100 episodes behind it.
    """
    ends = pd.read_csv(folder / "episodes.csv")["global_step"].sort_values()
    hundred = ends.iloc[99] if len(ends) >= 100 else math.inf
    threshold = math.inf if facts["threshold"] is None else facts["threshold"]
    reached = metrics["charts/episodic_return"].ge(threshold) & metrics["global_step"].ge(hundred)
    steps = metrics["global_step"][reached]
    return {"first_step_at_threshold": None if steps.empty else int(steps.iloc[0])}


@dataclass(frozen=True)
class Layout:
    """What is kept of every agent.

    A column of runs.csv is named as in summary.json, among the flags or versions in config.json, in
    the labels of the call, or in ORIGIN; or it is what `measure` adds from these facts, metrics.csv
    and the run folder.
    """

    key: tuple[str, ...]  # the columns that tell agents apart; every point begins with them
    columns: tuple[str, ...]  # of runs.csv
    curves: dict[str, str]  # columns of curves.csv -> of metrics.csv
    order: dict[str, list[str]] = field(default_factory=dict)  # column of the key -> known cells
    points: int = 200  # of an agent in curves.csv, at most
    thin: Callable[[pd.DataFrame, int], pd.DataFrame] = pick  # metrics.csv to so many points
    measure: Callable[[dict, pd.DataFrame, Path], dict] | None = None  # facts, metrics, folder
    defaults: dict[str, str] = field(default_factory=dict)  # of columns an older runs.csv lacks


class Rows(NamedTuple):
    runs: pd.DataFrame
    curves: pd.DataFrame


def work(call: Call, layout: Layout) -> Rows:
    """Start a run, go on with it, or leave it alone, whatever its folder asks for.

    What it prints goes to a file beside the folder. Raises UserError.
    """
    path = call.path
    if not call.finished:
        module = import_module(call.trainer)
        parsed = module.parse_args(list(call.flags))
        args, *rest = parsed if isinstance(parsed, tuple) else (parsed,)
        args = replace(args, run_dir=str(path))
        if (path / "config.json").exists():
            read_config(path, call.crowd[0])
            args = module.load_run(str(path))[0]
        else:
            shutil.rmtree(path, ignore_errors=True)  # stopped before its first file was whole
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.with_name(path.name + ".log")
        commits = [*commits_of(path), git_commit()]
        beside(path).write_text("\n".join(dict.fromkeys(commits)))
        torch.set_num_threads(1)  # this and the next line: as main() of the scripts does
        gc.freeze()
        with (
            open(log, "a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                module.train(args, *rest)
            except Exception as reason:
                traceback.print_exc()
                raise UserError(f"{path} failed: {reason}; more in {log}") from reason
    return collect(call, layout)


def beside(path: Path) -> Path:
    """The file that says from which commits a run folder was made."""
    return path.with_name(path.name + ".commits")


def commits_of(path: Path) -> list[str]:
    """Of the code that a run was begun with and, if it was stopped, went on with."""
    return beside(path).read_text().splitlines() if beside(path).exists() else []


# flags that a trainer fills in, where they have this value or "auto"
OPEN = {"total_timesteps": None, "warmup_steps": None, "checkpoint_every": 0}


def read_config(folder: Path, args) -> dict:
    """The config.json of a run, or of an agent.

    Raises UserError where there is none, or where its flags are not these: then a report would
    state flags that never ran.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        made = config["args"]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{folder} has no config.json that can be read: {reason!r}") from reason
    for name, value in json.loads(json.dumps(vars(args))).items():
        left_open = name in ("run_dir", "resume") or value in ("auto", OPEN.get(name, "auto"))
        if not left_open and made.get(name, value) != value:
            what = f"{name} {made[name]} instead of {value}"
            raise UserError(f"{folder} ran with {what}; remove the folder, or give another")
    return config


def collect(call: Call, layout: Layout) -> Rows:
    """The rows of a finished run. Raises UserError where a file does not fit."""
    started = read_config(call.path, call.crowd[0])["started"]
    commits = " and ".join(commits_of(call.path)) or "unknown"
    about = machine() | {"started": started, "git_commit": commits, "command": call.command}
    # a package that a run does not import, as EnvPool, is not in its config.json
    installed = {name: version(name) for name in PACKAGES if name in layout.columns}
    rows, curves = [], []
    for args, folder in zip(call.crowd, call.folders, strict=True):
        config = read_config(folder, args)
        try:
            (summary,) = json.loads((folder / "summary.json").read_text())
            metrics = pd.read_csv(folder / "metrics.csv")
            facts = installed | config["args"] | config["versions"] | summary | call.labels | about
            facts["agents"] = len(call.crowd)
            facts["sps"] = summary.get("sps", math.nan) * len(call.crowd)  # of all agents together
            if layout.measure is not None:
                facts |= layout.measure(facts, metrics, folder)
            rows.append({name: facts[name] for name in layout.columns})
            points = layout.thin(metrics, layout.points)
            curve = points.reindex(columns=list(layout.curves.values()))
            curve = curve.astype(float).map(lambda x: f"{x:.6g}")
            curve.columns = list(layout.curves)
            curve = curve.replace("nan", "")
            for name in ("global_step", *reversed(layout.key)):
                curve.insert(0, name, points[name] if name == "global_step" else facts[name])
            curves.append(curve.astype(str))
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise UserError(f"{folder} cannot be collected: {reason!r}") from reason
    cells = [{name: "" if x is None else str(x) for name, x in row.items()} for row in rows]
    return Rows(pd.DataFrame(cells, dtype=str), pd.concat(curves, ignore_index=True))


# ----------------------------------------------------------------------------------- ALL OF THEM
Answer = Rows | UserError


def answer(call: Call, layout: Layout, mine: list[int], pipe: Connection) -> None:
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
        pipe.send(work(call, layout))
    except UserError as reason:
        pipe.send(reason)
    except Exception as reason:  # say what it was: the parent sees nothing else
        pipe.send(UserError(f"{call.path}: {reason!r}"))


def local(
    calls: list[Call],
    layout: Layout,
    tick: Callable[[], None],
    jobs: int,
    target: Callable = answer,
) -> Iterator[tuple[Call, Answer]]:
    """Engine: `jobs` calls side by side, each a new process with an equal share of the cores.

    The next one starts when one is done. Two processes with a core each get more done than one
    process with two.
    """
    jobs = min(jobs, len(calls))
    waiting, running, share = list(calls), {}, max(1, len(CORES) // jobs)
    free = [(CORES * jobs)[i * share : (i + 1) * share] for i in range(jobs)]
    try:
        while waiting or running:
            while waiting and free:
                call, mine = waiting.pop(0), free.pop(0)
                ours, theirs = multiprocessing.Pipe(duplex=False)
                context = multiprocessing.get_context("spawn")
                process = context.Process(target=target, args=(call, layout, mine, theirs))
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


def on_ray(
    calls: list[Call], layout: Layout, tick: Callable[[], None]
) -> Iterator[tuple[Call, Answer]]:
    """Engine: one call at a time on each machine of a Ray cluster.

    That of RAY_ADDRESS, or the one that runs here, or a new one. Every machine needs this
    repository at the same place. A call whose worker dies is tried again, up to three times, and
    goes on from its checkpoint where the machines share the working directory. Raises UserError.
    """
    try:
        import ray
    except ModuleNotFoundError as reason:
        raise UserError("--engine ray needs Ray: pip install -r requirements-ray.txt") from reason

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
            gpus = int(getattr(call.crowd[0], "device", "cpu") == "cuda")
            remote = ray.remote(**options, num_gpus=gpus)(work)
            pending[remote.remote(call, layout)] = call
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


def run(calls: list[Call], engine: Callable, table_of: Callable[[Call], "Table"]) -> None:
    """Complete every call; one that fails does not stop the others. Then raises UserError.

    engine: local, with its jobs, or on_ray. table_of: where the rows of a call go; all tables have
    the same layout.
    """
    for call in calls:
        if (call.path / "config.json").exists():
            read_config(call.path, call.crowd[0])  # refuse it now, not after hours
    failures, finished = [], []

    def done(call: Call) -> int:
        return call.steps if call in finished else call.steps_done()

    def count() -> str:
        text = f"{len(finished) - len(failures)} of {len(calls)} done"
        return f"{text}, {len(failures)} failed" if failures else text

    def tick() -> None:
        running = [call for call in calls if call not in finished and done(call)]
        names = [f"{call.name} x{len(call.crowd)}" for call in running]
        shown = f"{', '.join(names) or '-'}; {count()}"
        bar.set_description_str(shown, refresh=False)
        bar.update(sum(map(done, calls)) - bar.n)

    def results() -> Iterator[tuple[Call, Answer]]:
        """Of the calls whose folders are whole already, then of the others."""
        whole = [call for call in calls if call.finished]
        for call in whole:
            try:
                yield call, collect(call, table_of(call).layout)
            except UserError as reason:
                yield call, reason
        missing = [call for call in calls if call not in whole]
        if missing:
            yield from engine(missing, table_of(missing[0]).layout, tick)

    first = sum(map(done, calls))  # of runs that were interrupted: no part of the speed
    total = sum(call.steps for call in calls)
    with tqdm(total=total, initial=first, unit=" steps", unit_scale=True, disable=None) as bar:
        for call, result in results():
            message = f"{call.name} x{len(call.crowd)}"
            if isinstance(result, UserError):
                failures.append(str(result))
                message = str(result)
            else:
                table_of(call).add(result)
            finished.append(call)
            tick()
            now = f"{datetime.datetime.now():%H:%M}"
            bar.write(f"{now} {message}; {count()}")
    if failures:
        why = "; ".join(sorted(failures))
        raise UserError(f"{len(failures)} of {len(calls)} calls failed: {why}")


def complete(folder: Path, layout: Layout, calls: list[Call], engine: Callable) -> None:
    """Complete every call and put it into the table of a folder. Its other rows stay.

    Raises UserError.
    """
    with alone(folder):
        table = Table(folder, layout)
        run(calls, engine, lambda call: table)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises UserError where another process is at work on this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as reason:
        what = f"another process is at work on {folder}"
        raise UserError(f"{what}; wait for it, or give other --results") from reason
    finally:
        os.close(handle)


def add_flags(parser: Parser, jobs: int | None = 1) -> None:
    """The flags that say who runs a table."""
    what = "calls at a time on this machine; several make each other's wall times longer"
    default = "one on each core" if jobs is None else jobs
    parser.add_argument("--jobs", type=positive, help=f"{what}; default: {default}")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="who runs it")
    what = "run nothing, write the report of the runs there are"
    parser.add_argument("--report", action="store_true", help=what)


def choose_engine(args, jobs: int = 1) -> Callable:
    """The engine that these flags ask for. jobs: where they do not say it. Raises UserError."""
    if args.engine == "local":
        return functools.partial(local, jobs=args.jobs or jobs)
    if args.jobs:
        what = "Ray runs one call at a time on each of its machines"
        raise UserError(f"--jobs is for this machine alone; {what}")
    return on_ray


# ---------------------------------------------------------------------------------------- TABLES
def read(path: Path) -> pd.DataFrame:
    """A CSV, cells as text. Raises OSError."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def numbers(cells: pd.Series) -> pd.Series:
    """Text as numbers; an empty cell is NaN. Raises ValueError."""
    return cells.replace("", "nan").astype(float)


def write(path: Path, rows: pd.DataFrame) -> None:
    """A CSV: all of the new file or all of the old, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        rows.to_csv(file, index=False, lineterminator="\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def runs_of(folder: Path) -> str:
    """Where the runs of a table have their folders.

    Those of a committed table below runs/; those of another one below its own folder, so that two
    tables never share a run.
    """
    committed = ROOT / "benchmark/results"
    if folder.resolve().is_relative_to(committed):
        return f"runs/{folder.resolve().relative_to(committed)}"
    return f"{folder}/runs"


def known_first(names: Iterable[str], known: list[str]) -> list[str]:
    """Names, each once: the known ones in their order, then others by the alphabet."""
    names = set(names)
    return [name for name in known if name in names] + sorted(names - set(known))


def in_order(rows: pd.DataFrame, columns: list[str], order: dict[str, list[str]]) -> pd.DataFrame:
    """Rows sorted by these columns, whose known cells have an order of their own."""

    def rank(column: pd.Series) -> pd.Series:
        if column.name in ("seed", "global_step"):
            return column.astype(int)
        names = known_first(column, order.get(column.name, []))
        return column.map({name: i for i, name in enumerate(names)})

    return rows.sort_values(columns, key=rank, kind="stable", ignore_index=True)


class Table:
    """runs.csv and curves.csv of a folder, cells as text, sorted; on disk always whole."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder = folder
        self.layout = layout
        self.runs = pd.DataFrame(columns=layout.columns, dtype=str)
        if (folder / "runs.csv").exists():
            self.runs = read(folder / "runs.csv")
        self.curves = pd.DataFrame(columns=[*layout.key, "global_step", *layout.curves], dtype=str)
        if (folder / "curves.csv").exists():
            self.curves = read(folder / "curves.csv")[list(self.curves)]
        for name, cell in layout.defaults.items():
            if name not in self.runs:
                self.runs[name] = cell

    @property
    def cells(self) -> set[tuple]:
        """The keys of all runs, seeds as numbers."""
        return set(self.by_key().index)

    def by_key(self) -> pd.DataFrame:
        """The runs with the key as their index, seeds as numbers."""
        runs = self.runs
        if "seed" in self.layout.key:
            runs = runs.assign(seed=runs["seed"].astype(int))
        return runs.set_index(list(self.layout.key))

    def add(self, fresh: Rows) -> None:
        """Put these runs in place of what there was of them, and write both files."""
        self.curves = self.merged(self.curves, fresh.curves, fresh.runs)
        self.runs = self.merged(self.runs, fresh.runs, fresh.runs)
        write(self.folder / "curves.csv", self.curves)
        write(self.folder / "runs.csv", self.runs)  # last: a row says that its run is done

    def merged(self, old: pd.DataFrame, new: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
        """Old rows, but for those of these runs, and the new ones, sorted."""
        key = list(self.layout.key)
        replaced = pd.MultiIndex.from_frame(old[key]).isin(pd.MultiIndex.from_frame(runs[key]))
        rows = pd.concat([old[~replaced], new], ignore_index=True).fillna("")
        columns = [*key, "global_step"] if "global_step" in rows else key
        return in_order(rows, columns, self.layout.order)


# ---------------------------------------------------------------------------------------- ORIGIN
def listed(runs: pd.DataFrame, names: Iterable[str]) -> str:
    """The different cells of these columns, of `started` the days.

    A run that was continued with other code has both commits in its cell: "A and B".
    """
    parts = []
    for name in names:
        cells = runs[name].replace("", "unknown")
        cells = cells.str[:10] if name == "started" else cells.str.split(" and ").explode()
        parts.append(f"{name.replace('_', ' ')} {' and '.join(sorted(set(cells)))}")
    return "; ".join(parts)


def describe(runs: pd.DataFrame, *packages: str) -> str:
    """When, where and from what these runs were made."""
    days = runs["started"].str[:10]
    first_last = dict.fromkeys([days.min(), days.max()])
    names = ("python", "torch", *packages, "git_commit", "cpu", "cores")
    return f"{' to '.join(first_last)}; {listed(runs, names)}"


def on_the_clock(calls: pd.DataFrame) -> float:
    """Seconds in which one or more calls ran: `started` and `wall_seconds` of each."""
    calls = calls.sort_values("started")
    start = pd.to_datetime(calls["started"])
    end = start + pd.to_timedelta(calls["wall_seconds"].astype(float), unit="s")
    alone_from = end.cummax().shift().fillna(start).clip(lower=start)
    return (end - alone_from).dt.total_seconds().clip(lower=0).sum()


def origin(runs: pd.DataFrame) -> str:
    """A section: commands, time, versions."""
    calls = runs.drop_duplicates(["command", "started"], keep="last")
    text = "## Where this is from\n\n"
    text += "".join(f"    {command}\n" for command in runs["command"].unique())
    hours = calls["wall_seconds"].astype(float).sum() / 3600
    text += f"\nThese commands trained for {hours:.2f} hours in all, "
    text += f"{on_the_clock(calls) / 3600:.2f} on the clock, if none was interrupted. "
    names = ("started", "total_timesteps", "python", *PACKAGES, "git_commit", "cpu", "cores")
    text += listed(runs, names) + ".\n"
    return text
