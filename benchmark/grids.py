"""What sweeps on MuJoCo share: crowds of benchmark/lockstep.py, what is kept of them, and policies
that have learned nothing.

A cell is a task, an objective and a seed: a row of runs.csv. plan() makes calls of what is missing;
measure() fills random.csv, a row per task, policy and seed: actions uniform within their bounds,
and the Gaussian of a fresh agent, which the paper calls the initial random policy. altered() is the
script and the crowd with words of their text replaced, for what no flag can change.
"""

import datetime
import functools
import itertools
import json
import re
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import envpool
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous as ppo
from benchmark import UserError, git_commit, lockstep, sweep
from benchmark.sweep import PACKAGES, ROOT, Call, Layout, Table

NAMES = "HalfCheetah Hopper InvertedDoublePendulum InvertedPendulum Reacher Swimmer Walker2d"
TASKS = [f"{name}-v4" for name in NAMES.split()]  # the nearest there is to the paper's -v1
PAPER = pd.read_csv(ROOT / "benchmark/paper/table1.csv", index_col="objective")  # its Table 1
OBJECTIVES = list(PAPER.index)
ORDER = {"env_id": TASKS, "objective": OBJECTIVES}  # the paper's order; other names follow
TOGETHER = 44  # agents in one process, at most: such a call takes half an hour to three hours
EPISODES = 100  # of each untrained policy
POLICIES = ["uniform", "gaussian"]


# ----------------------------------------------------------------------------------------- CROWDS
def kl_of_updates(facts: dict, metrics: pd.DataFrame, folder: Path) -> dict:
    """kl_median and kl_max; None for an agent that was frozen in its first update."""
    kl = metrics["losses/kl_after_update"].dropna()
    if kl.empty:
        return {"kl_median": None, "kl_max": None}
    return {"kl_median": float(kl.median()), "kl_max": float(kl.max())}


COLUMNS = "env_id objective seed total_timesteps transitions last_100_return eval_return_mean"
COLUMNS += " eval_return_std eval_episodes diverged_at kl_median kl_max bootstrap_truncated agents"
COLUMNS += " wall_seconds sps started git_commit cpu cores python"
LAYOUT = Layout(
    key=("env_id", "objective", "seed"),
    columns=(*COLUMNS.split(), *PACKAGES, "command"),
    curves={
        "episodic_return": "charts/episodic_return",
        "kl": "losses/kl_after_update",
        "beta": "charts/beta",
        "action_std": "charts/action_std",
    },
    order=ORDER,
    measure=kl_of_updates,
    defaults={"bootstrap_truncated": "True"},  # at that time there was nothing else
)


def with_version(task: str) -> str:
    """A task without a version is -v4."""
    return task if "-v" in task else f"{task}-v4"


@functools.cache
def digitised_curves() -> dict:
    """The curves of Figure 3: task, algorithm, "line" -> points [steps, return]."""
    return json.loads((ROOT / "benchmark/paper/figure3_mujoco_curves.json").read_text())


def paper_curve(task: str, algorithm: str = "PPO(Clip)") -> list[tuple[np.ndarray, np.ndarray]]:
    """A curve of Figure 3: steps and returns, as plot.Groups has them; [] where it has none."""
    points = digitised_curves().get(task.replace("-v4", "-v1"), {}).get(algorithm, {}).get("line")
    return [tuple(np.array(points).T)] if points else []


class Grid(NamedTuple):
    """Every combination of these, in this order."""

    tasks: list[str]
    objectives: list[str]
    seeds: list[int]

    @property
    def cells(self) -> list[tuple[str, str, int]]:
        return list(itertools.product(*self))


def parse(flags: list[str]) -> list[ppo.Args]:
    """The flags of every agent of a crowd. Raises UserError."""
    return sweep.parse("benchmark.lockstep", tuple(flags))


def environment(task: str) -> list[str]:
    """Flags: the same simulator for few agents and for many.

    Otherwise one table would hold two versions of MuJoCo.
    """
    backend = "envpool" if task in envpool.list_all_envs() else "gymnasium"
    return ["--env-id", task, "--env-backend", backend]


def common_flags(preset: str, total_timesteps: int, more: list[str]) -> list[str]:
    """The flags of every run, as its command in runs.csv shows them before --run-dir."""
    return ["--preset", preset, "--total-timesteps", str(total_timesteps), *more]


def plan(grid: Grid, done: set, settings: list[str], runs: str) -> list[Call]:
    """The calls for all cells of the grid that are not `done`, those of the first seeds first.

    A call has one task, and all missing objectives of some seeds: as many seeds as fit into
    TOGETHER agents, but at least one. The same missing cells give the same call, with the same
    folder. Raises UserError for flags that make no sense.
    """
    calls = []
    for task in grid.tasks:
        groups = {}  # missing seeds -> objectives
        for objective in grid.objectives:
            missing = tuple(seed for seed in grid.seeds if (task, objective, seed) not in done)
            groups.setdefault(missing, []).append(objective)
        for missing, mine in groups.items():
            size = max(1, TOGETHER // len(mine))
            for start in range(0, len(missing), size):
                seeds = [str(seed) for seed in missing[start : start + size]]
                named = f"{task}__{'-'.join(seeds)}__{'_'.join(mine).replace(':', '-')}"
                flags = [*environment(task), "--objectives", *mine, "--seeds", *seeds, *settings]
                calls.append(Call("benchmark.lockstep", (*flags, "--run-dir", f"{runs}/{named}")))
    return sorted(calls, key=lambda call: call.crowd[0].seed)


def check(table: Table, settings: list[str], earlier: list[str] | None = None) -> None:
    """Raises UserError where a run of a table was made with other flags than these.

    earlier: the flags of the rows for which is_earlier() is true, if they differ.
    """
    wanted = str(parse(settings)[0].bootstrap_truncated)
    commands = table.runs[["command", "bootstrap_truncated"]].drop_duplicates()
    for command, bootstrapped in commands.itertuples(index=False):
        if is_earlier(command):
            was = r"--preset paper --total-timesteps \d+"
            today = re.sub(was, r"\g<0> --bootstrap-truncated", command)
            same = f" {' '.join(earlier or settings)} --run-dir" in today
            same = same and bootstrapped == "True"
        else:
            same = f" {' '.join(settings)} --run-dir" in command and bootstrapped == wanted
        if not same:
            what = f"{table.folder} holds runs of other settings: {command}"
            raise UserError(f"{what}; give the flags of these runs, or other --results")


def is_earlier(command: str) -> bool:
    """Whether a run is of the time when ppo_continuous.py trained crowds itself."""
    return command.startswith("python ppo_continuous.py")


def tell_frozen(runs: pd.DataFrame, names: list[str]) -> str:
    """Which runs met a number that was not finite. names: the columns that tell runs apart."""
    frozen = runs[runs["diverged_at"] != ""]
    if frozen.empty:
        return f"None of the {len(runs)} runs met a number that was not finite."
    places = []
    for row in frozen.to_dict("records"):
        where = " ".join(f"seed {row[name]}" if name == "seed" else row[name] for name in names)
        places.append(f"{where} at step {row['diverged_at']}")
    text = f"{len(frozen)} of {len(runs)} runs met a number that was not finite and kept the last "
    return text + f"finite weights: {', '.join(places)}."


def origin(runs: pd.DataFrame) -> str:
    """A section: commands, time, versions."""
    moved = runs["command"].map(is_earlier).any()
    return sweep.origin(runs) + MOVED * bool(moved)


MOVED = """
These commands are for commit 6c4213f: since then benchmark/lockstep.py takes `--seeds` and
`--objectives`, and what was `--preset paper` is `--preset paper --bootstrap-truncated`.
"""


# ------------------------------------------------------------------------------- ALTERED TEXTS
ADAM_EPSILON = (("eps=1e-5", "eps=1e-8"), (".sqrt() + 1e-5", ".sqrt() + 1e-8"))  # a change of text


def use(script: ModuleType, crowd: ModuleType) -> None:
    """Put altered() modules in place of the real ones, in a worker that runs nothing else."""
    sys.modules.update({"ppo_continuous": script, "benchmark.lockstep": crowd})


def altered(changes: tuple[tuple[str, str], ...]) -> tuple[ModuleType, ModuleType]:
    """ppo_continuous.py and, on top of it, lockstep.py, with every old text replaced.

    Raises UserError where an old text does not stand in exactly one place of the two.
    """
    files = {"ppo_continuous": ppo.__file__, "benchmark.lockstep": lockstep.__file__}
    texts = {name: Path(path).read_text() for name, path in files.items()}
    for old, new in changes:
        count = sum(text.count(old) for text in texts.values())
        if count != 1:
            what = f"ppo_continuous.py and lockstep.py say {old.strip()!r} {count} times, not once"
            raise UserError(f"{what}: mend the table that alters it")
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


# ------------------------------------------------------------------------------ UNTRAINED POLICIES
def measure(grid: Grid, settings: list[str], path: Path) -> None:
    """Measure what random.csv lacks of the tasks and seeds of a grid.

    Raises UserError where an environment cannot be made.
    """
    columns = ["env_id", "policy", "seed"]
    rows = sweep.read(path) if path.exists() else pd.DataFrame(columns=columns, dtype=str)
    done = set(zip(rows["env_id"], rows["seed"], strict=True))
    now = datetime.datetime.now().isoformat(timespec="seconds")
    about = {"started": now, "git_commit": git_commit()}
    about |= {name: version(name) for name in PACKAGES}
    about |= {"python": sys.version.split()[0]}
    for task in grid.tasks:
        missing = [seed for seed in grid.seeds if (task, str(seed)) not in done]
        if not missing:
            continue
        flags = [*environment(task), "--seeds", *map(str, missing), *settings]
        options = {"eval_episodes": EPISODES, "sample_actions": True, "device": "cpu"}
        crowd = [replace(args, **options) for args in parse(flags)]
        try:
            with warnings.catch_warnings(action="ignore"):  # Gymnasium would rather have -v5
                measured = {"uniform": uniform(crowd), "gaussian": gaussian(crowd)}
        except ppo.UserError as reason:
            raise UserError(str(reason)) from reason
        fresh = []
        for policy, returns in measured.items():
            for seed, mine in zip(missing, returns, strict=True):
                row = {"env_id": task, "policy": policy, "seed": seed, "episodes": len(mine)}
                row |= {"mean_return": np.mean(mine).item(), "std_return": np.std(mine).item()}
                fresh.append({name: str(cell) for name, cell in (row | about).items()})
        rows = pd.concat([rows, pd.DataFrame(fresh)], ignore_index=True)
        rows = sweep.in_order(rows, columns, ORDER | {"policy": POLICIES})
        sweep.write(path, rows)


def gaussian(crowd: list[ppo.Args]) -> list[list[float]]:
    """Returns [A][E] of A fresh agents, actions sampled."""
    torch.set_num_threads(1)  # as in the script: the bits of initial weights depend on it
    actors = ppo.Actors(crowd[0], 1)
    agents = [ppo.begin(args, actors, None)[1]["agent"] for args in crowd]
    actors.close()
    return lockstep.evaluate(agents, crowd, Path())


def uniform(crowd: list[ppo.Args]) -> list[list[float]]:
    """Returns [A][E] of uniform actions.

    There is a generator per seed, for all of its episodes side by side.
    """
    episodes = crowd[0].eval_episodes
    firsts = [2**30 + ppo.stream(args.seed, "uniform") for args in crowd]
    rng = [np.random.default_rng(first) for first in firsts]
    actors = ppo.Actors(crowd[0], episodes * len(crowd))
    actors.restart([first + i for first in firsts for i in range(episodes)])
    space = actors.envs.single_action_space
    returns = {}
    while len(returns) < actors.num_envs:
        shares = [generator.random((episodes, *space.shape)) for generator in rng]
        actions = space.low + (space.high - space.low) * np.concatenate(shares)
        *_, ended = actors.step(actions.astype(space.dtype))
        for i, episode_return, _ in ended:
            returns.setdefault(i, episode_return)
    actors.close()
    return np.reshape([returns[i] for i in range(actors.num_envs)], (len(crowd), -1)).tolist()


def random_returns(
    path: Path, tasks: list[str], policy: str, seeds: list[int] | None = None
) -> np.ndarray:
    """The mean return of a policy in each task, over the rows of random.csv: [K].

    seeds: use only the rows of these; None: all rows.
    Raises UserError where there is none, and OSError where there is no such file.
    """
    rows = sweep.read(path)
    rows = rows[rows["policy"] == policy]
    if seeds is not None:
        rows = rows[rows["seed"].astype(int).isin(seeds)]
    found = rows["mean_return"].astype(float).groupby(rows["env_id"]).mean()
    for task in tasks:
        if task not in found:
            what = f"random.csv has no {policy} policy for {task}"
            raise UserError(f"{what}; run it without --report")
    return found[tasks].to_numpy()
