"""The PPO scripts and benchmark/lockstep.py on a GPU: the same numbers as on the CPU, then speed.

    python benchmark/gpu.py                             # all parts, in at most 8 minutes
    python benchmark/gpu.py check atari --minutes 4     # some of them
    python benchmark/gpu.py --device cpu --toy          # a rehearsal where there is no GPU

check: float32 on the CPU and on the GPU, from the same weights and the same rollouts; losses and
weights must agree. atari, lockstep, small: steps per second, each measured once, in a process of
its own; small is ppo_cartpole.py and ppo_continuous.py. breakout: a game learned in the time that
is left. Every measurement has a time limit, and results are written after each: one that fails or
takes too long is a row that says so. A later call adds its rows to those that are there. Writes
benchmark/results/speed/: gpu.csv, gpu-checks.csv and the report gpu.md. CUDA graphs are Inductor's:
TORCHINDUCTOR_CUDAGRAPHS=1 switches them on.
"""

import contextlib
import copy
import csv
import datetime
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_atari
import ppo_cartpole
import ppo_continuous
from benchmark import (
    Parser,
    UserError,
    cli,
    git_commit,
    lockstep,
    machine,
    markdown,
    positive,
    read_csv,
    speed,
)

RESULTS = speed.RESULTS
# seconds of one process
LIMITS = {"check": 120, "atari": 75, "lockstep": 120, "small": 60, "breakout": 3600}
SHARE_OF_BREAKOUT = 0.3  # of the time; the other parts leave that much
BOUND = 1e-2  # of a difference, relative: any but that of the weights
BOUND_OF_WEIGHTS = 3e-2
NOTE = f"""\
check: the CPU trains. The device then learns from the same rollouts, and begins every update with
the weights and Adam's moments of the CPU; in both, everything is in float32, TensorFloat-32 off.
The difference of the weights is that of all agents together after an update, divided by the
distance that they went in it; of a loss it is divided by its largest size. Of all updates the
largest counts. The first rollout is also played anew on the device: the same frames and actions,
log-probabilities and values within the bound. float32 rounds to 6e-8, and sums of thousands of
products to about 1e-6; the gradient steps of an update pass that on. The losses stay below 1e-4,
and the bound of {BOUND:g} leaves room for a few actions that cross the edge of the clip range.
Weights are further off, because Adam enlarges rounding where a gradient is nothing else; hence
{BOUND_OF_WEIGHTS:g}. (From one update to the next, differences grow without a bound: to add up the
rows of a minibatch in another order is enough.) Steps/s: after the first update, which contains
compilation, from an empty cache; one measurement each; memory is the peak. Where ppo_atari.py
computes in bfloat16 by default, it does here. lockstep: HalfCheetah-v4 in the paper's settings, the
steps of all agents together. small: at the scripts' defaults."""


# ----------------------------------------------------------------------------------------- CHECK
class Watch:
    """Every update of a training: what it began with, and what it led to.

    Stands in for begin() and collect() of the script. `starts` has for every update the weights and
    the optimiser's state of every agent, `rollouts` what collect() returned.
    """

    def __init__(self, script):
        self.script = script
        self.begin, self.collect = script.begin, script.collect
        self.parts, self.starts, self.rollouts = [], [], []

    def watched_begin(self, *given):
        state, parts = self.begin(*given)
        self.parts.append(parts)
        return state, parts

    def watched_collect(self, *given):
        self.starts.append(copies(self.parts))
        rollout, games = self.collect(*given)
        self.rollouts.append((dict(rollout), games))
        return rollout, games

    def train(self, train: Callable, run_dir: Path) -> dict[str, np.ndarray]:
        """Run train(). Returns the losses by name: [updates * agents] each."""
        changes = {"begin": self.watched_begin, "collect": self.watched_collect}
        with mock.patch.multiple(self.script, **changes), contextlib.redirect_stdout(sys.stderr):
            train(run_dir=str(run_dir))
        self.starts.append(copies(self.parts))
        losses = {}
        for path in sorted(run_dir.rglob("metrics.csv")):
            for row in read_csv(path):
                for name, cell in row.items():
                    if name.startswith("losses/"):
                        losses.setdefault(name, []).append(float(cell))
        return {name: np.array(values) for name, values in losses.items()}


class Replay(Watch):
    """Begins every update as `recorded` did, with its weights, Adam's moments and rollout.

    ends: after every update, the weights that it led to. differences: of the first rollout, which
    is played here too. Raises AssertionError where that is another game, or the first weights are
    not the recorded ones.
    """

    def __init__(self, recorded: Watch, device: str):
        super().__init__(recorded.script)
        self.recorded, self.device = recorded, device
        self.ends, self.differences = [], {}

    def watched_collect(self, *given):
        update = len(self.ends)
        self.ends.append(weights_of(copies(self.parts)))
        if update == 0:
            if not torch.equal(self.ends[0], weights_of(self.recorded.starts[0])):
                raise AssertionError("the device has other first weights than the CPU")
            rollout, _ = self.collect(*given)
            self.differences = compare_rollouts(self.recorded.rollouts[0][0], rollout)
        for parts, (agent, optimizer) in zip(self.parts, self.recorded.starts[update], strict=True):
            parts["agent"].load_state_dict(agent)
            parts["optimizer"].load_state_dict(copy.deepcopy(optimizer))
        rollout, games = self.recorded.rollouts[update]
        return placed(self.script, rollout, self.device), games

    def train(self, train: Callable, run_dir: Path) -> dict[str, np.ndarray]:
        losses = super().train(train, run_dir)
        self.ends.append(weights_of(copies(self.parts)))
        return losses


def copies(parts: list[dict]) -> list[tuple[dict, dict]]:
    """The states of every agent and of its optimiser, on the CPU."""
    buffer = io.BytesIO()
    torch.save([(x["agent"].state_dict(), x["optimizer"].state_dict()) for x in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu")


def weights_of(states: list[tuple[dict, dict]]) -> Tensor:
    """All weights of all agents, in one vector. Statistics, in float64, are no weights."""
    weights = []
    for agent, _ in states:
        weights += [x.flatten() for x in agent.values() if x.dtype == torch.float32]
    return torch.cat(weights)


def compared(script, train: Callable, device: str, variants: dict[str, dict]) -> list[dict]:
    """Rows of gpu-checks.csv: train(device="cpu"), then every variant on its recorded updates.

    train: takes device, run_dir and compile.
    """
    recorded = Watch(script)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "cpu")
        losses = recorded.train(partial(train, device="cpu", compile=False), path)
        for i, (title, flags) in enumerate(variants.items()):
            torch._dynamo.reset()
            replay = Replay(recorded, device)
            graphs = {"triton.cudagraphs": flags.get("graphs", False)}
            mine = partial(train, device=device, compile=flags["compile"])
            with torch._inductor.config.patch(graphs):
                seen = replay.train(mine, Path(folder, str(i)))
            differences = replay.differences
            starts = [weights_of(states) for states in recorded.starts]
            worst = []
            for before, after, mine in zip(starts, starts[1:], replay.ends[1:], strict=False):
                worst.append(((mine - after).norm() / (after - before).norm()).item())
            differences["weights"] = np.max(worst).item()  # NaN where one of them is
            for name, cpu in losses.items():
                scale = max(np.abs(cpu).max(), 1e-30)
                differences[name] = np.abs(cpu - seen[name]).max() / scale
            for name, difference in differences.items():
                bound = BOUND_OF_WEIGHTS if name == "weights" else BOUND
                row = {"check": title, "of": name, "difference": difference, "bound": bound}
                rows.append(row | {"passed": bool(difference <= bound)})
    return rows


def compare_rollouts(recorded: dict, played: dict) -> dict[str, float]:
    """Differences of a rollout's numbers. Raises AssertionError where another game was played."""
    differences = {}
    for name, x in recorded.items():
        y = played[name].cpu()
        if name in ("values", "log_probs") or (name == "actions" and x.is_floating_point()):
            scale = x.abs().max().clamp(min=1e-30)
            differences[f"rollout/{name}"] = ((x - y).abs().max() / scale).item()
        elif not torch.equal(x, y):
            raise AssertionError(f"the device plays another game than the CPU: {name} differ")
    return differences


def placed(script, rollout: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """A rollout with everything where collect() leaves it on this device."""
    on_device = ("obs", "values", "log_probs", "actions") if script is ppo_atari else ()
    return {name: x.to(device) if name in on_device else x for name, x in rollout.items()}


def check_atari(device: str, toy: bool) -> list[dict]:
    """Ten updates of Pong at the defaults, but in float32."""

    def train(**flags) -> None:
        args = ppo_atari.Args(precision="float32", eval_episodes=1, **flags)
        args.num_envs, args.num_steps = (2, 8) if toy else (8, 128)
        args.total_timesteps = (3 if toy else 10) * args.batch_size
        ppo_atari.train(args)

    variants = {"ppo_atari.py, eager": {"compile": False}}
    if not toy:
        variants["ppo_atari.py, compiled"] = {"compile": True}
        variants["ppo_atari.py, compiled, CUDA graphs"] = {"compile": True, "graphs": True}
    return compared(ppo_atari, train, device, variants)


def check_small(script, device: str, toy: bool) -> list[dict]:
    """Ten updates of ppo_cartpole.py or ppo_continuous.py, at the defaults."""

    def train(**flags) -> None:
        args = script.Args(eval_episodes=1, **flags)
        if toy:
            args.num_steps, args.num_minibatches = 32, 2
        args.total_timesteps = (3 if toy else 10) * args.batch_size
        script.train(args)

    name = Path(script.__file__).name
    variants = {f"{name}, eager": {"compile": False}}
    if not toy:
        variants[f"{name}, compiled"] = {"compile": True}
    return compared(script, train, device, variants)


def check_lockstep(device: str, toy: bool) -> list[dict]:
    """Three updates of six agents of HalfCheetah, of every kind of objective."""

    def train(**flags) -> None:
        args = ppo_continuous.Args(eval_episodes=1, **flags)
        args.num_steps, args.num_minibatches = (64, 2) if toy else (2048, 32)
        args.total_timesteps = 3 * args.batch_size
        lockstep.train(args, [1, 2], ["clip:0.2", "none", "kl:1"])

    name = "eager" if toy else "compiled"
    variants = {f"benchmark/lockstep.py, {name}": {"compile": not toy}}
    return compared(ppo_continuous, train, device, variants)


# ----------------------------------------------------------------------------------------- SPEED
def atari(num_envs: int, device: str, toy: bool, graphs: bool = False, **flags) -> dict:
    """speed.ours() for ppo_atari.py."""
    torch._inductor.config.triton.cudagraphs = graphs
    flags |= {"num_envs": num_envs, "num_steps": 128, "device": device}
    updates = 13 if num_envs < 100 else 5
    if toy:
        flags |= {"num_envs": 2, "num_steps": 8, "compile": False}
        updates = 2
    steps = updates * flags["num_envs"] * flags["num_steps"]
    return speed.ours(ppo_atari, steps, speed.CORES, **flags) | {"total_timesteps": steps}


def crowd(agents: int, device: str, toy: bool) -> dict:
    """speed.side_by_side() of so many agents of HalfCheetah, in the settings of the paper."""
    flags = ppo_continuous.PAPER | {"device": device}
    seeds = list(range(1, agents // len(speed.OBJECTIVES) + 1))
    updates = 5 if agents < 100 else 2
    if toy:
        flags |= {"num_steps": 64, "num_minibatches": 2, "compile": False}
        updates = 2
    steps = updates * flags.get("num_steps", ppo_continuous.Args.num_steps)
    result = speed.side_by_side(steps, speed.CORES, seeds=seeds, **flags)
    return result | {"total_timesteps": steps * agents}


def small(script, device: str, toy: bool) -> dict:
    """speed.ours() for ppo_cartpole.py or ppo_continuous.py, at the defaults."""
    flags = {"device": device}
    if toy:
        flags |= {"num_steps": 32, "num_minibatches": 2, "compile": False}
    steps = (2 if toy else 30) * script.Args(**flags).batch_size
    return speed.ours(script, steps, 1, **flags) | {"total_timesteps": steps}


def consoles(num_envs: int, device: str, toy: bool) -> dict:
    """The environments of ppo_atari.py alone."""
    steps = num_envs * (10 if toy else 500)
    return speed.emulators(steps, 1, num_envs) | {"total_timesteps": steps}


def simulators(agents: int, device: str, toy: bool) -> dict:
    """The environments of lockstep alone."""
    steps = 10 if toy else 500
    return speed.simulators(agents, steps, 1) | {"total_timesteps": steps * agents}


class Contestant(NamedTuple):
    part: str
    title: str
    measure: Callable  # of device and toy
    on_cpu: bool = False  # whatever --device says


GRAPHS = {"compile": True, "graphs": True}
CHECKS = {
    "check-atari": check_atari,
    "check-cartpole": partial(check_small, ppo_cartpole),
    "check-continuous": partial(check_small, ppo_continuous),
    "check-lockstep": check_lockstep,
}
CONTESTANTS = {
    "8-eager": Contestant("atari", "8 environments, eager", partial(atari, 8)),
    "8-compiled": Contestant("atari", "8 environments, compiled", partial(atari, 8, compile=True)),
    "8-graphs": Contestant(
        "atari", "8 environments, compiled, CUDA graphs", partial(atari, 8, **GRAPHS)
    ),
    "128-eager": Contestant("atari", "128 environments, eager", partial(atari, 128)),
    "128-compiled": Contestant(
        "atari", "128 environments, compiled", partial(atari, 128, compile=True)
    ),
    "128-graphs": Contestant(
        "atari", "128 environments, compiled, CUDA graphs", partial(atari, 128, **GRAPHS)
    ),
    "8-cpu": Contestant("atari", "8 environments", partial(atari, 8), True),
    "8-alone": Contestant("atari", "8 environments alone", partial(consoles, 8), True),
    "128-alone": Contestant("atari", "128 environments alone", partial(consoles, 128), True),
    "33": Contestant("lockstep", "33 agents", partial(crowd, 33)),
    "33-cpu": Contestant("lockstep", "33 agents", partial(crowd, 33), True),
    "330": Contestant("lockstep", "330 agents", partial(crowd, 330)),
    "330-cpu": Contestant("lockstep", "330 agents", partial(crowd, 330), True),
    "33-alone": Contestant("lockstep", "33 environments alone", partial(simulators, 33), True),
    "330-alone": Contestant("lockstep", "330 environments alone", partial(simulators, 330), True),
    "cartpole": Contestant("small", "ppo_cartpole.py", partial(small, ppo_cartpole)),
    "cartpole-cpu": Contestant("small", "ppo_cartpole.py", partial(small, ppo_cartpole), True),
    "continuous": Contestant("small", "ppo_continuous.py", partial(small, ppo_continuous)),
    "continuous-cpu": Contestant(
        "small", "ppo_continuous.py", partial(small, ppo_continuous), True
    ),
}
BREAKOUT = {"env_id": "Breakout-v5", "num_envs": 128, "num_minibatches": 32}  # of 512 steps each
MODES = {"128-eager": "eager", "128-compiled": "compiled"}
MODES["128-graphs"] = "compiled, CUDA graphs"
PARTS = ("check", "atari", "lockstep", "small", "breakout")


# -------------------------------------------------------------------------------------- PROCESSES
def work(args) -> None:
    """--worker: one check or measurement, printed as one line of JSON."""
    key = args.worker
    device = args.device
    with contextlib.redirect_stdout(sys.stderr):
        if key in CHECKS:
            torch.backends.cudnn.allow_tf32 = False  # which convolutions take by default
            torch.set_num_threads(1)  # as main() of the scripts does
            result = {"rows": CHECKS[key](device, args.toy)}
        elif key == "breakout":
            result = learn_breakout(args)
        else:
            contestant = CONTESTANTS[key]
            device = "cpu" if contestant.on_cpu else device
            result = contestant.measure(device=device, toy=args.toy)
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        result["gpu_memory_gb"] = torch.cuda.max_memory_reserved() / 2**30
    print(json.dumps(result))


def learn_breakout(args) -> dict:
    """A run in the folder args.run_dir, in BREAKOUT's settings. Returns its speed."""
    torch.set_num_threads(1)
    torch._inductor.config.triton.cudagraphs = args.like == "128-graphs"
    flags = BREAKOUT | {"device": args.device, "compile": args.like != "128-eager"}
    if args.toy:
        flags |= {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "compile": False}
        flags |= {"eval_episodes": 1}
    train_args = ppo_atari.Args(total_timesteps=args.steps, run_dir=args.run_dir, **flags)
    _, summary = ppo_atari.train(train_args)
    return {"steps_per_second": summary["sps"]}


def measured(words: list[str], seconds: float, log_path: Path) -> dict:
    """What work() prints in a process of its own; {"error": why} where it fails or is too slow."""
    command = [sys.executable, __file__, *words]
    with open(log_path, "a+") as log:
        print(f"\n$ gpu.py {' '.join(words)}", file=log, flush=True)
        start = log.tell()
        piped = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen(command, process_group=0, **piped)
        try:
            out, _ = process.communicate(timeout=seconds)
            error = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"not done in {seconds:.0f} s"
        finally:  # the compiler's processes too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not error:
            return json.loads(out.splitlines()[-1])
        log.seek(start)
        last = log.read().strip().rpartition("\n")[2]
        return {"error": f"{error}: {last}"[:200].replace("|", "/").strip(": ")}


def about(device: str, commit: str) -> dict:
    """What a row says of the machine and the versions. Raises UserError where there is no GPU."""
    card, driver = "none", "none"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA here; --device cpu --toy rehearses without it")
        card, driver = torch.cuda.get_device_name(), driver_version()
    now = datetime.datetime.now().isoformat(timespec="seconds")
    found = {"started": now, "git_commit": commit, "card": card, "driver": driver}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    found |= {package: version(package) for package in ("numpy", "gymnasium", "envpool")}
    return found | {"python": sys.version.split()[0]} | machine()


def driver_version() -> str:
    """Of NVIDIA's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        out = ""
    return out.partition("\n")[0].strip() or "unknown"


# ---------------------------------------------------------------------------------------- SITTING
def add_rows(path: Path, rows: list[dict], column: str) -> None:
    """Put rows into a CSV, in place of those that agree with one of them in this column."""
    fresh = {row[column] for row in rows}
    kept = [row for row in (read_csv(path) if path.exists() else []) if row[column] not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def speed_row(key: str, contestant: Contestant, result: dict, device: str) -> dict:
    """A row of gpu.csv; an empty cell where there is no number."""
    row = {
        "key": key,
        "part": contestant.part,
        "contestant": contestant.title,
        "device": "cpu" if contestant.on_cpu else device,
    }
    names = ["total_timesteps", "steps_per_second", "first_update_seconds", "memory_gb"]
    names += ["gpu_memory_gb", "episodic_return", "error"]
    return row | {name: result.get(name) for name in names}


def breakout_result(run_dir: Path, result: dict) -> dict:
    """How far the run came, from its metrics.csv: also where it was cut."""
    path = run_dir / "metrics.csv"
    rows = read_csv(path) if path.exists() else []
    if not rows:
        return result
    last = rows[-1]
    return result | {
        "total_timesteps": last["global_step"],
        "steps_per_second": float(last["charts/SPS"]),
        "episodic_return": last["charts/episodic_return"],
    }


def device_of(row: dict) -> str:
    """The card's name, where it was not the CPU."""
    return row["card"] if row["device"] == "cuda" else "CPU"


def size_of_difference(row: dict) -> float:
    """Infinite where there is none, and where it is NaN: the worst of all."""
    size = float(row["difference"] or "inf")
    return np.inf if np.isnan(size) else size


def shown_difference(row: dict) -> str:
    """A difference and what it is one of; why there is none, where there is none."""
    return f"{float(row['difference']):.1e}, {row['of']}" if row["difference"] else row["error"]


def report(rows: list[dict], checks: list[dict]) -> str:
    """gpu.md from the rows of gpu.csv and gpu-checks.csv, cells as text."""
    sections = ["# Speed: gpu", textwrap.fill(NOTE, 120)]
    names = list((rows or checks)[0])
    names = names[names.index("card") :]
    machines = {}  # with when each sitting on it began, and its commit
    for row in sorted(checks + rows, key=itemgetter("started")):
        known = "; ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names)
        sitting = f"{row['started']} (git commit {row['git_commit'][:7]})"
        machines.setdefault(known, {})[sitting] = True
    for known, sittings in machines.items():
        sections.append(f"started {', '.join(sittings)}; {known}")
    if checks:
        lines = {}
        for row in checks:
            lines.setdefault(row["check"], []).append(row)
        table = []
        for title, mine in lines.items():
            others = [row for row in mine if row["of"] != "weights"]
            worst = max(others or mine, key=size_of_difference)
            weights = [row["difference"] for row in mine if row["of"] == "weights"]
            passed = all(row["passed"] == "True" for row in mine)
            line = {
                "check": title,
                "device": device_of(mine[0]),
                "weights": f"{float(weights[0]):.1e}" if weights else "",
                "largest of the others": shown_difference(worst),
                "": "agrees" if passed else "DOES NOT AGREE",
            }
            table.append(line)
        sections.append(markdown(table).rstrip())
    table = []
    order = [*CONTESTANTS, "breakout"]
    for row in sorted(rows, key=lambda row: order.index(row["key"])):
        line = {"": row["part"], "contestant": row["contestant"], "device": device_of(row)}
        line["steps"] = f"{int(row['total_timesteps']):,}" if row["total_timesteps"] else ""
        shown = f"{float(row['steps_per_second']):,.0f}" if row["steps_per_second"] else ""
        line["steps/s"] = shown or row["error"]
        for title, name in (
            ("first update, s", "first_update_seconds"),
            ("memory, GB", "memory_gb"),
            ("GPU memory, GB", "gpu_memory_gb"),
            ("return, last 100 games", "episodic_return"),
        ):
            line[title] = f"{float(row[name]):.1f}" if row[name] else ""
        table.append(line)
    if table:
        sections.append(markdown(table).rstrip())
    return "\n\n".join(sections) + "\n"


def write_report(folder: Path) -> list[dict]:
    """gpu.md from the CSVs of its folder. Returns the checks that failed. Raises UserError."""
    rows, checks = [
        read_csv(folder / name) if (folder / name).exists() else []
        for name in ("gpu.csv", "gpu-checks.csv")
    ]
    if not rows and not checks:
        raise UserError(f"there is neither gpu.csv nor gpu-checks.csv in {folder}")
    (folder / "gpu.md").write_text(report(rows, checks))
    return [row for row in checks if row["passed"] != "True"]


def sit(args) -> None:
    """All parts that are asked for, one after the other, until the time is up."""
    folder = args.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    parts = args.parts or PARTS
    known = about(args.device, args.commit)
    deadline = time.monotonic() + 60 * args.minutes
    reserve = 60 * args.minutes * SHARE_OF_BREAKOUT if "breakout" in parts else 0
    like, steps = args.like, args.steps
    speeds = {}  # of the contestants with 128 environments on the GPU

    def attempt(part: str, title: str, words: list[str], reserve: float = reserve) -> dict:
        """measured(), and a line of how it went."""
        started = time.monotonic()
        left = deadline - started - reserve
        result = {"error": "no time left"}
        if left > (1 if args.toy else 15):
            words = [*words, "--device", args.device, *["--toy"] * args.toy]
            limit = LIMITS[part] * (10 if args.toy else 1)  # a rehearsal may run beside much else
            result = measured(words, min(left, limit), args.log or folder / "gpu.log")
        speed_now = result.get("steps_per_second")
        how = result.get("error") or (f"{speed_now:,.0f} steps/s" if speed_now else "done")
        print(f"{part}, {title}: {how} ({time.monotonic() - started:.0f} s)", flush=True)
        return result

    def keep(key: str, contestant: Contestant, result: dict) -> None:
        """A row of gpu.csv, in place of an older one."""
        row = speed_row(key, contestant, result, args.device) | known
        add_rows(folder / "gpu.csv", [row], "key")
        write_report(folder)

    for part in parts:
        for key in CHECKS if part == "check" else ():
            result = attempt(part, key, ["--worker", key])
            failed = {"check": key, "of": "", "difference": None, "bound": BOUND, "passed": False}
            more = {"key": key, "device": args.device, "error": result.get("error")} | known
            rows = [row | more for row in result.get("rows", [failed])]
            add_rows(folder / "gpu-checks.csv", rows, "key")
            write_report(folder)
        for key, contestant in CONTESTANTS.items():
            if contestant.part == part:
                title = f"{contestant.title}, {'cpu' if contestant.on_cpu else args.device}"
                result = attempt(part, title, ["--worker", key])
                keep(key, contestant, result)
                if key in MODES:
                    speeds[key] = result.get("steps_per_second", 0)
        if part == "breakout":
            if not like:
                like = max(speeds, key=speeds.get)
                seconds = deadline - time.monotonic() - (1 if args.toy else 45)  # to start, to end
                # with more gradient steps than where the speed was measured
                steps = max(1, min(int(0.6 * speeds[like] * seconds), 10_000_000))
            steps = 64 if args.toy else steps
            run_dir = args.run_dir or Path(f"runs/gpu-breakout-{time.time_ns()}")
            title = f"Breakout-v5, 128 environments, minibatches of 512, {MODES[like]}"
            words = ["--worker", part, "--like", like, "--steps", str(steps)]
            result = attempt(part, title, [*words, "--run-dir", str(run_dir)], reserve=0)
            keep(part, Contestant(part, title, learn_breakout), breakout_result(run_dir, result))
    print((folder / "gpu.md").read_text(), end="")
    if bad := write_report(folder):
        names = dict.fromkeys(row["check"] for row in bad)
        raise UserError(f"not shown to be the same as on the CPU: {', '.join(names)}")


def main(argv: list[str]) -> None:
    parser = Parser("Correctness and speed on a GPU.")
    add = parser.add_argument
    add("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all where none is named")
    add("--minutes", type=float, default=8.0, help="when the last measurement must have ended")
    add("--device", default="cuda", help="cuda; cpu for a rehearsal")
    add("--toy", action="store_true", help="tiny sizes, eager: to see that everything runs")
    add("--output", type=Path, help="folder of the results; by default benchmark/results/speed")
    add("--run-dir", type=Path, help="folder of the run of Breakout; by default one under runs/")
    add("--log", type=Path, help="what the processes say; by default gpu.log in --output")
    add("--commit", default=git_commit(), help="for where there is no git to ask")
    add("--report", action="store_true", help="write gpu.md from the CSVs and stop")
    add("--worker", help="measure one thing here and print a line of JSON")
    add("--like", choices=MODES, help="the mode of breakout; by default the fastest of atari's")
    add("--steps", type=positive, help="with --like: how many steps of breakout")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"{part!r} is no part: {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    if "breakout" in parts and "atari" not in parts[: parts.index("breakout")] and not args.like:
        raise UserError("breakout comes after atari, or with --like and --steps")
    if (args.like is None) != (args.steps is None):
        raise UserError("--like and --steps go together")
    if args.report:
        write_report(args.output or RESULTS)
    elif args.worker:
        work(args)
    else:
        sit(args)


if __name__ == "__main__":
    cli(main)
