"""Steps per second, side by side with other implementations of the same algorithm at the same setting.

    python benchmark/speed.py                        # every suite; on an idle machine only
    python benchmark/speed.py mujoco --rounds 3
    python benchmark/speed.py mujoco --contestants one sb3

Every measurement is a process of its own, and the contestants of a suite take turns, round after round, so that a slow
minute of the machine strikes all of them alike. SBX takes part where requirements-peers.txt is installed. Compared are
ratios within a round. Writes benchmark/results/speed/: SUITE.csv, a row per measurement, and SUITE.md, the table that
is also printed. To measure more, add a Contestant.
"""

import contextlib
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_toy
import ppo_atari
import ppo_cartpole
import ppo_continuous
from benchmark import Parser, UserError, cli, git_commit, machine, markdown, positive, write_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/speed"
CORES = os.cpu_count() or 1
GRID = {"seeds": (1, 2, 3)}  # 33 agents: what one task takes of the 231 runs behind the paper's Table 1
GRID["objectives"] = ("none", "clip:0.1", "clip:0.2", "clip:0.3", "adaptive:0.003", "adaptive:0.01", "adaptive:0.03")
GRID["objectives"] += ("kl:0.3", "kl:1", "kl:3", "kl:10")


# ------------------------------------------------------------------------------------------------------ MEASUREMENTS
def ours(script, total_timesteps: int, threads: int, /, **flags) -> dict:
    """A run of one of the scripts, which set their threads themselves: timed from the end of the first update."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # empty: what a first run pays for compiling
        run_dir = Path(folder, "run")
        flags |= {name: 1 for name in ("eval_episodes", "eval_prompts") if hasattr(script.Args, name)}
        args = script.Args(total_timesteps=total_timesteps, run_dir=str(run_dir), **flags)
        _, (summary, *_) = script.train(args)
        first = script.load_checkpoint(run_dir / "checkpoint.pt")["seconds"]["first"]
        return {"steps_per_second": summary["sps"], "first_update_seconds": first}


def learned(model, args) -> dict:
    """Stable-Baselines3's or SBX's model: timed over as many steps as ours, after a learn() of two rollouts."""
    start = time.perf_counter()
    model.learn(args.batch_size)
    first = time.perf_counter() - start
    model.learn(args.batch_size)
    start = time.perf_counter()
    model.learn(args.batch_size * (args.num_updates - 1))
    return {"steps_per_second": model.num_timesteps / (time.perf_counter() - start), "first_update_seconds": first}


def common(args) -> dict:
    """What PPO of Stable-Baselines3 and of SBX is told."""
    told = {"n_steps": args.num_steps, "batch_size": args.batch_size // args.num_minibatches, "seed": 1}
    told |= {"n_epochs": args.update_epochs, "gamma": args.gamma, "gae_lambda": args.gae_lambda, "clip_range": 0.2}
    told |= {"ent_coef": args.ent_coef, "vf_coef": args.vf_coef, "max_grad_norm": args.max_grad_norm}
    return told | {"learning_rate": lambda left: args.learning_rate * left}


def sb3_cartpole(total_timesteps: int, threads: int) -> dict:
    """At the defaults of ppo_cartpole.py, from which its own network does not differ."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    if threads:
        torch.set_num_threads(threads)
    args = ppo_cartpole.Args(total_timesteps=total_timesteps)
    return learned(PPO("MlpPolicy", make_vec_env(args.env_id, args.num_envs), device="cpu", **common(args)), args)


def cartpoles(total_timesteps: int, threads: int) -> dict:
    """The environments of ppo_cartpole.py alone, stepped with random actions: the ceiling."""
    args = ppo_cartpole.Args()
    envs, steps = ppo_cartpole.make_envs(args.env_id, args.num_envs), total_timesteps // args.num_envs
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 2, (steps, args.num_envs))
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    return {"steps_per_second": steps * args.num_envs / (time.perf_counter() - start), "first_update_seconds": None}


def cheetah(total_timesteps: int) -> tuple:
    """The flags of the modern preset, and HalfCheetah-v4 with the same normalisation, in Stable-Baselines3's way."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    args = ppo_continuous.Args(total_timesteps=total_timesteps)
    args.check()
    return args, VecNormalize(make_vec_env(args.env_id, args.num_envs), gamma=args.gamma)


def sb3_mujoco(total_timesteps: int, threads: int) -> dict:
    """At the modern preset of ppo_continuous.py, from which its own network does not differ."""
    from stable_baselines3 import PPO

    torch.set_num_threads(threads)
    args, envs = cheetah(total_timesteps)
    return learned(PPO("MlpPolicy", envs, device="cpu", **common(args)), args)


def sbx_mujoco(total_timesteps: int, threads: int) -> dict:
    """The same in JAX; its XLA takes the threads it wants."""
    from sbx import PPO

    args, envs = cheetah(total_timesteps)
    return learned(PPO("MlpPolicy", envs, **common(args)), args)


def sb3_atari(total_timesteps: int, threads: int) -> dict:
    """At the defaults of ppo_atari.py, with its own emulator and wrappers around it."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    if threads:
        torch.set_num_threads(threads)
    gymnasium.register_envs(ale_py)
    args = ppo_atari.Args(total_timesteps=total_timesteps)
    envs = VecFrameStack(make_atari_env("PongNoFrameskip-v4", args.num_envs, seed=1), 4)
    told = common(args) | {"clip_range": lambda left: 0.1 * left}
    return learned(PPO("CnnPolicy", envs, device="cpu", **told), args)


class Idle:
    """In place of EnvPool: games of 1000 steps that show the same noise for ever and cost nothing."""

    def __init__(self, *_, num_envs: int, **__):
        rng = np.random.default_rng(0)
        self.obs, self.action_space = rng.integers(0, 256, (num_envs, 4, 84, 84), np.uint8), SimpleNamespace(n=6)
        self.nothing, self.count = np.zeros(num_envs, np.float32), 0

    def reset(self) -> tuple:
        return self.obs, {"lives": self.nothing}

    def step(self, _) -> tuple:
        self.count += 1
        over = self.nothing + (self.count % 1000 == 0)
        return self.obs, self.nothing, over > 0, over > 1, {"lives": self.nothing, "reward": over, "terminated": over}

    def close(self) -> None:
        pass


def network(total_timesteps: int, threads: int) -> dict:
    """ppo_atari.py without an emulator: acting and updating alone."""
    ppo_atari.envpool = SimpleNamespace(make=Idle)
    return ours(ppo_atari, total_timesteps, threads)


def emulators(total_timesteps: int, threads: int) -> dict:
    """The environments of ppo_atari.py alone, stepped with random actions."""
    args = ppo_atari.Args()
    actors, steps = ppo_atari.start_actors(args, 0, args.num_envs), total_timesteps // args.num_envs
    actions = np.random.default_rng(0).integers(0, actors.envs.action_space.n, (steps, args.num_envs))
    start = time.perf_counter()
    for action in actions:
        ppo_atari.play(actors, action)
    return {"steps_per_second": steps * args.num_envs / (time.perf_counter() - start), "first_update_seconds": None}


def grpo(total_timesteps: int, threads: int) -> dict:
    """ours() for grpo_toy.py, whose steps are sampled answers."""
    return ours(grpo_toy, total_timesteps, threads, threads=threads)


def writing(total_timesteps: int, threads: int) -> dict:
    """What grpo_toy.py does before it learns: answers are sampled and verified."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    args, task = grpo_toy.Args(), grpo_toy.sort_task()
    agent, rng = grpo_toy.Agent(len(task.vocab), len(task.prompts[0]) + task.max_length), torch.Generator()
    prompts, batches = task.prompts[: args.num_prompts], total_timesteps // args.batch_size
    start = time.perf_counter()
    for _ in range(batches):
        batch = grpo_toy.sample(agent, task.encode(prompts), args.group_size, task.max_length, 1.0, rng)
        grpo_toy.verify(task, prompts, batch)
    return {"steps_per_second": batches * args.batch_size / (time.perf_counter() - start), "first_update_seconds": None}


def crowd(suite: str, key: str, total_timesteps: int, threads: int) -> dict:
    """A contestant once on each core, all at the same time, speeds added."""
    flags = f"{suite} --worker {key} --total-timesteps {total_timesteps} --threads {threads}"
    command = [sys.executable, __file__, *flags.split()]
    started = []
    for core in sorted(os.sched_getaffinity(0)):
        pin = partial(os.sched_setaffinity, 0, {core})
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=pin))
    results = [json.loads(process.communicate()[0]) for process in started]
    first = max(result["first_update_seconds"] for result in results)
    total = {name: sum(result[name] for result in results) for name in ("steps_per_second", "memory_gb")}
    return total | {"first_update_seconds": first}


def simulators(agents: int, total_timesteps: int, threads: int) -> dict:
    """The environments of so many agents alone, stepped with noise: the ceiling."""
    args = ppo_continuous.Args(total_timesteps=total_timesteps, seeds=tuple(range(agents)))
    args.check()
    ppo_continuous.check_machine(args)
    actors, shape = ppo_continuous.start_actors(args, 0), (total_timesteps, agents)
    actions = np.random.default_rng(0).normal(size=(*shape, *actors.envs.actions.shape)).astype(np.float32)
    start = time.perf_counter()
    for action in actions:
        actors.envs.step(action)
    return {"steps_per_second": total_timesteps * agents / (time.perf_counter() - start), "first_update_seconds": None}


# -------------------------------------------------------------------------------------------------------- CONTESTANTS
class Contestant(NamedTuple):
    title: str
    measure: Callable[[int, int], dict]  # total_timesteps, torch threads or 0 for the default
    threads: int | None = None  # None takes --threads
    agents: int = 1  # that learn in it at a time, or whose environments these are
    cores: int | None = 1  # that it keeps busy; None: as many as it likes
    share: float = 1.0  # of --total-timesteps, per agent: so that each takes about as long


class Suite(NamedTuple):
    note: str  # what is compared, for the report
    peer: str  # the contestant that all speeds are divided by
    contestants: dict[str, Contestant]
    default: tuple[str, ...]
    timesteps: int  # of one measurement
    batch: int  # steps of an update
    parts: tuple[str, ...] = ()  # contestants that do what the first one does, each a part of it


MUJOCO = partial(ours, ppo_continuous)
SUITES = {
    "cartpole": Suite(
        "CartPole-v1 at the defaults of ppo_cartpole.py in all: 32 environments x 64 steps, 4 epochs of 32 "
        "minibatches, separate tanh networks of 64-64 for policy and value, Adam, on the CPU. ppo_cartpole.py always "
        "takes one torch thread. Each makes its environments in its usual way: Gymnasium's make_vec, which has a "
        "CartPole in NumPy for all at once, and make_vec_env, a loop over single ones.",
        "sb3",
        {
            "ours": Contestant("ppo_cartpole.py", partial(ours, ppo_cartpole), 1),
            "ours-compile": Contestant("ppo_cartpole.py --compile", partial(ours, ppo_cartpole, compile=True), 1),
            "sb3": Contestant("Stable-Baselines3 PPO", sb3_cartpole),
            # not by default: with a thread per core, its speed swings many times over on a machine that does more
            "sb3-default": Contestant("Stable-Baselines3 PPO, its default threads", sb3_cartpole, 0, cores=None),
            "environments": Contestant("32 environments alone, Gymnasium", cartpoles, 1),
        },
        ("ours", "ours-compile", "sb3", "environments"),
        100_000,
        ppo_cartpole.Args().batch_size,
    ),
    "mujoco": Suite(
        "HalfCheetah-v4 at the defaults of ppo_continuous.py in all, the paper's Table 3: one environment x 2048 steps "
        "per agent, 10 epochs of 32 minibatches, separate tanh networks of 64-64, observations and rewards normalised, "
        "Adam, on the CPU. The 33 agents are what one task takes of the runs behind the paper's Table 1, 11 objectives "
        "x 3 seeds; they learn in one process, whose updates take a thread per core. Where there is a process per "
        "core, each is pinned to its own.",
        "sb3",
        {
            "one": Contestant("ppo_continuous.py, one agent", MUJOCO, 1),
            "one-eager": Contestant("ppo_continuous.py --no-compile, one agent", partial(MUJOCO, compile=False), 1),
            "grid": Contestant("ppo_continuous.py, 33 agents", partial(MUJOCO, **GRID), CORES, 33, CORES, 1 / 4),
            "grid-crowd": Contestant(
                "ppo_continuous.py, 33 agents a process, a process per core",
                *(partial(crowd, "mujoco", "grid"), 1, 33 * CORES, CORES, 1 / 4),
            ),
            "sb3": Contestant("Stable-Baselines3 PPO", sb3_mujoco),
            "sb3-crowd": Contestant(
                "Stable-Baselines3 PPO, a process per core", partial(crowd, "mujoco", "sb3"), 1, CORES, CORES
            ),
            "sbx": Contestant("SBX PPO (JAX)", sbx_mujoco, cores=None),
            "simulator": Contestant("the environment alone, Gymnasium", partial(simulators, 1), 1),
            "simulators": Contestant("33 environments alone, EnvPool", partial(simulators, 33), 1, 33, CORES, 1 / 4),
        },
        ("one", "grid", "grid-crowd", "sb3", "sb3-crowd", "sbx", "simulator", "simulators"),
        40_960,
        ppo_continuous.Args().batch_size,
    ),
    "atari": Suite(
        "Pong at the defaults of ppo_atari.py in all, the paper's Table 5: 8 environments x 128 steps, 3 epochs of 4 "
        "minibatches, the Nature CNN, Adam, on the CPU, every core of it. ppo_atari.py computes in bfloat16 where the "
        "CPU can, on EnvPool; Stable-Baselines3 in float32, on its own wrappers around ale-py.",
        "sb3",
        {
            "ours": Contestant("ppo_atari.py", partial(ours, ppo_atari), CORES, 1, CORES),
            "ours-float32": Contestant(
                "ppo_atari.py --precision float32", partial(ours, ppo_atari, precision="float32"), CORES, 1, CORES
            ),
            "sb3": Contestant("Stable-Baselines3 PPO", sb3_atari, 0, 1, CORES),
            "emulators": Contestant("8 environments alone, EnvPool", emulators, 1, 1, CORES),
            "network": Contestant("ppo_atari.py without environments", network, CORES, 1, CORES),
        },
        ("ours", "ours-float32", "sb3", "emulators", "network"),
        15_360,
        ppo_atari.Args().batch_size,
        ("emulators", "network"),
    ),
    "grpo": Suite(
        "The task sort at the defaults of grpo_toy.py: 64 questions x 8 answers, 2 gradient steps on each batch, on "
        "the CPU. A step is a sampled answer.",
        "ours",
        {
            "ours": Contestant("grpo_toy.py", grpo, 1),
            "threads": Contestant(f"grpo_toy.py --threads {CORES}", grpo, CORES, 1, CORES),
            "writing": Contestant("answers sampled and verified, nothing learned", writing, 1),
        },
        ("ours", "threads", "writing"),
        40_960,
        grpo_toy.Args().batch_size,
    ),
}


# ---------------------------------------------------------------------------------------------------------- SITTINGS
def work(suite: str, key: str, total_timesteps: int, threads: int) -> None:
    """--worker: one measurement, printed as one line of JSON."""
    contestant = SUITES[suite].contestants[key]
    with contextlib.redirect_stdout(sys.stderr):
        result = contestant.measure(total_timesteps, threads if contestant.threads is None else contestant.threads)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of kilobytes, on Linux
    print(json.dumps({"memory_gb": mine} | result | {"threads": contestant.threads or torch.get_num_threads()}))


def measure(suite: str, key: str, total_timesteps: int, threads: int) -> dict:
    """What work() prints in a process of its own. Raises UserError where that fails."""
    flags = f"{suite} --worker {key} --total-timesteps {total_timesteps} --threads {threads}"
    done = subprocess.run([sys.executable, __file__, *flags.split()], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{SUITES[suite].contestants[key].title} cannot be measured: {why}")
    return json.loads(done.stdout)


def table(suite: Suite, rows: list[dict]) -> list[dict]:
    """Rows of SUITE.csv -> rows of SUITE.md: medians over the rounds, of speeds and of ratios within a round."""
    measured, lines, peer = {}, [], suite.contestants[suite.peer].title
    for row in rows:
        measured.setdefault(row["contestant"], []).append(row)
    speeds = {title: np.array([row["steps_per_second"] for row in mine]) for title, mine in measured.items()}
    for contestant in suite.contestants.values():
        if (title := contestant.title) in measured:
            first = [row["first_update_seconds"] for row in measured[title] if row["first_update_seconds"] is not None]
            ratios = speeds[title] / speeds[peer] if peer in speeds else None
            shown = "" if ratios is None else f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            speed, memory = np.median(speeds[title]), np.median([row["memory_gb"] for row in measured[title]])
            line = {"contestant": title, "torch threads": measured[title][0]["threads"], "steps/s": f"{speed:,.0f}"}
            line |= {"per agent": f"{speed / contestant.agents:,.0f}"}
            line |= {"per core": f"{speed / contestant.cores:,.0f}" if contestant.cores else ""}
            line |= {f"times {peer}": shown, "first update, s": f"{np.median(first):.1f}" if first else ""}
            lines.append(line | {"memory, GB": f"{memory:.1f}"})
    return lines


def of_ceiling(suite: Suite, rows: list[dict]) -> str:
    """How near the first contestant comes to 1 / (1/x + 1/y), x and y the speeds of its parts, round by round."""
    first, *parts = (
        np.array([row["steps_per_second"] for row in rows if row["contestant"] == suite.contestants[key].title])
        for key in (next(iter(suite.contestants)), *suite.parts)
    )
    share = first * sum(1 / part for part in parts)
    titles = " and ".join(f"'{suite.contestants[key].title}'" for key in suite.parts)
    said = f"{np.median(share):.0%} ({share.min():.0%} to {share.max():.0%})"
    return (
        " A loop that does one thing at a time can reach 1 / (1/x + 1/y), x and y the speeds of its parts, here "
        f"{titles}; the first row reaches {said} of that."
    )


def report(name: str, rows: list[dict]) -> str:
    """SUITE.md from the rows of SUITE.csv."""
    suite, seen, rounds = SUITES[name], {row["contestant"] for row in rows}, len({row["round"] for row in rows})
    note = (
        f"{suite.note} Medians of {rounds} rounds, ratios within a round (in brackets the smallest and the largest); "
    )
    note += "steps/s after the first update, which contains compilation, from an empty cache; memory is the peak."
    if suite.parts and {suite.contestants[key].title for key in suite.parts} < seen:
        note += of_ceiling(suite, rows)
    note += " SBX was not installed." * ("sbx" in suite.default and suite.contestants["sbx"].title not in seen)
    about = list(rows[0])[list(rows[0]).index("started") :]
    said = "; ".join(f"{key.replace('_', ' ')} {rows[0][key]}" for key in about)
    return f"# Speed: {name}\n\n{textwrap.fill(note, 120)}\n\n{said}\n\n{markdown(table(suite, rows))}"


def compare(name: str, keys: list[str], rounds: int, total_timesteps: int, threads: int) -> None:
    """Measure, write SUITE.csv and SUITE.md, print the table. Raises UserError."""
    suite = SUITES[name]
    if total_timesteps <= suite.batch:
        raise UserError(f"--total-timesteps must be above {suite.batch}: the first update is not timed")
    about = {"started": datetime.datetime.now().isoformat(timespec="seconds"), "git_commit": git_commit()}
    packages = ["torch", "gymnasium", "envpool", "stable-baselines3"] + ["sbx-rl", "jax"] * ("sbx" in keys)
    packages += ["ale-py"] * (name == "atari")
    about |= {package: version(package) for package in packages}
    about |= {"python": sys.version.split()[0]} | machine()
    rows = []
    with tqdm(total=rounds * len(keys), unit=" runs", disable=None) as bar:
        for i in range(rounds):
            for key in keys:
                contestant = suite.contestants[key]
                steps = max(round(total_timesteps * contestant.share), 2 * suite.batch)
                row = {"round": i + 1, "contestant": contestant.title, "total_timesteps": steps}
                rows.append(row | measure(name, key, steps, threads) | about)
                bar.update()
    write_csv(RESULTS / f"{name}.csv", rows)
    (RESULTS / f"{name}.md").write_text(report(name, rows))
    print(markdown(table(suite, rows)), end="")


def main(argv: list[str]) -> None:
    parser = Parser("Steps per second side by side, in alternating processes.")
    parser.add_argument("suites", nargs="*", help=f"any of {', '.join(SUITES)}; all where none is named")
    parser.add_argument("--contestants", nargs="+", help="who takes part, of one suite; by default its usual ones")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each contestant")
    parser.add_argument("--total-timesteps", type=positive, help="steps of one measurement; by default the suite's")
    parser.add_argument("--threads", type=positive, default=1, help="torch threads of the peers")
    parser.add_argument("--worker", help="measure one contestant here and print a line of JSON")
    args = parser.parse_args(argv)
    chosen = args.suites or list(SUITES)
    for name in chosen:
        if name not in SUITES:
            raise UserError(f"{name!r} is no suite: {', '.join(SUITES)}")
    if args.contestants and len(chosen) > 1:
        raise UserError("--contestants goes with one suite")
    for key in [*(args.contestants or ()), *([args.worker] if args.worker else ())]:
        if key not in SUITES[chosen[0]].contestants:
            raise UserError(f"{key!r} is no contestant of {chosen[0]}: {', '.join(SUITES[chosen[0]].contestants)}")
    for name in chosen:
        steps = args.total_timesteps or SUITES[name].timesteps
        if args.worker:
            work(name, args.worker, steps, args.threads)
        else:
            usual = [key for key in SUITES[name].default if key != "sbx" or find_spec("sbx")]
            compare(name, args.contestants or usual, args.rounds, steps, args.threads)


if __name__ == "__main__":
    cli(main)
