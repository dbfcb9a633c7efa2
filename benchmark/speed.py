"""Steps per second, side by side with other implementations of the same algorithm and setting.

    python benchmark/speed.py                        # every suite; on an idle machine only
    python benchmark/speed.py mujoco --rounds 3
    python benchmark/speed.py mujoco --contestants one sb3

Every measurement is a process of its own, and the contestants of a suite take turns, round after
round, so that a slow minute of the machine strikes all of them alike. SBX, rejax and sb3-contrib
take part where requirements-peers.txt is installed. Compared are ratios within a round. Writes
benchmark/results/speed/: SUITE.csv, a row per measurement, and SUITE.md, the table that is also
printed. To measure more, add a Contestant.
"""

import contextlib
import datetime
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_toy
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
    sweep,
)
from benchmark.baselines import trpo
from benchmark.sweep import numbers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/speed"
CORES = os.cpu_count() or 1
PEERS = {  # module: its package in requirements-peers.txt, and others that the table names
    "sbx": ("sbx-rl", "jax"),
    "rejax": ("rejax", "jax"),
    "sb3_contrib": ("sb3-contrib",),
}
SEEDS = [1, 2, 3]  # 33 agents: what one task takes of the 231 runs behind the paper's Table 1
OBJECTIVES = ["none", "clip:0.1", "clip:0.2", "clip:0.3"]
OBJECTIVES += ["adaptive:0.003", "adaptive:0.01", "adaptive:0.03"]
OBJECTIVES += ["kl:0.3", "kl:1", "kl:3", "kl:10"]


# ---------------------------------------------------------------------------------- MEASUREMENTS
def ours(script, total_timesteps: int, threads: int, /, **flags) -> dict:
    """A run of one of the scripts, timed from the end of the first update."""
    for name in ("eval_episodes", "eval_prompts"):
        if hasattr(script.Args, name):
            flags[name] = 1
    with prepared(threads) as run_dir:
        args = script.Args(total_timesteps=total_timesteps, run_dir=str(run_dir), **flags)
        _, summary = script.train(args)
        first = first_update_seconds(run_dir, args)
    return {"steps_per_second": summary["sps"], "first_update_seconds": first}


def side_by_side(
    total_timesteps: int, threads: int, /, seeds: list[int] | None = None, **flags
) -> dict:
    """The same for 33 agents in benchmark/lockstep.py, the steps of all of them together.

    Or for those of other seeds than SEEDS.
    """
    with prepared(threads) as run_dir:
        flags |= {"run_dir": str(run_dir), "eval_episodes": 1}
        args = ppo_continuous.Args(total_timesteps=total_timesteps, **flags)
        summaries = lockstep.train(args, seeds or SEEDS, OBJECTIVES)
        agent, *_ = run_dir.glob("*/metrics.csv")
        first = first_update_seconds(agent.parent, args)
    speed = sum(summary["sps"] for summary in summaries)
    return {"steps_per_second": speed, "first_update_seconds": first}


@contextlib.contextmanager
def prepared(threads: int) -> Iterator[Path]:
    """A folder for a run, in a process that is made ready for it as main() of the scripts does."""
    torch.set_num_threads(threads)
    gc.freeze()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # an empty cache: what a first run pays for compiling
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        yield Path(folder, "run")


def first_update_seconds(folder: Path, args) -> float:
    """Up to the end of the first update: the first row of metrics.csv counts from the start."""
    first, *_ = read_csv(folder / "metrics.csv")
    return args.batch_size / float(first["charts/SPS"])


def learned(model, args) -> dict:
    """A model of Stable-Baselines3, SBX or sb3-contrib, timed over as many steps as ours.

    The first learn() is one rollout: the time of the first update. The second one is not timed,
    since it may still warm up.
    """
    start = time.perf_counter()
    model.learn(args.batch_size)
    first = time.perf_counter() - start
    model.learn(args.batch_size)
    start = time.perf_counter()
    model.learn(args.batch_size * (args.num_updates - 1))
    speed = model.num_timesteps / (time.perf_counter() - start)
    return {"steps_per_second": speed, "first_update_seconds": first}


def common(args) -> dict:
    """What PPO of Stable-Baselines3 and of SBX is told."""
    return {
        "n_steps": args.num_steps,
        "batch_size": args.batch_size // args.num_minibatches,
        "seed": 1,
        "n_epochs": args.update_epochs,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "clip_range": 0.2,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef,
        "max_grad_norm": args.max_grad_norm,
        "normalize_advantage": args.norm_adv != "none",
        "learning_rate": lambda left: args.learning_rate * left,
    }


def sb3_cartpole(total_timesteps: int, threads: int) -> dict:
    """At the defaults of ppo_cartpole.py, from which its own network does not differ."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    if threads:
        torch.set_num_threads(threads)
    args = ppo_cartpole.Args(total_timesteps=total_timesteps)
    envs = make_vec_env(args.env_id, args.num_envs)
    return learned(PPO("MlpPolicy", envs, device="cpu", **common(args)), args)


def rejax_cartpole(total_timesteps: int, threads: int) -> dict:
    """The same in JAX end to end: environments, rollouts and updates are one compiled program.

    It clips the value loss and each network's gradient by element, which cannot be turned off;
    network, batch and number of gradient steps are ours. XLA takes the threads it wants.
    """
    import jax
    from rejax import PPO

    args = ppo_cartpole.Args(total_timesteps=total_timesteps)
    algorithm = PPO.create(
        env=args.env_id,
        agent_kwargs={"activation": "tanh"},
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        num_epochs=args.update_epochs,
        num_minibatches=args.num_minibatches,
        learning_rate=args.learning_rate,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        vf_coef=2 * args.vf_coef,  # its loss has a factor of 1/2
        ent_coef=args.ent_coef,
        max_grad_norm=args.max_grad_norm,
        total_timesteps=args.num_updates * args.batch_size,
        eval_freq=args.num_updates * args.batch_size,
        skip_initial_evaluation=True,
    )
    algorithm = algorithm.replace(eval_callback=lambda *_: 0.0)  # nobody else evaluates here
    start = time.perf_counter()
    train = jax.jit(algorithm.train).lower(jax.random.key(1)).compile()
    compiled = time.perf_counter()
    jax.block_until_ready(train(jax.random.key(1)))
    seconds = time.perf_counter() - compiled
    speed = args.num_updates * args.batch_size / seconds
    return {"steps_per_second": speed, "first_update_seconds": compiled - start}


def script(total_timesteps: int, threads: int, /, flags: str = "", warm: bool = False) -> dict:
    """A whole run of ppo_cartpole.py, from the start of its process to its end.

    warm: what was compiled in an earlier run is found in the cache.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, str(ROOT / "ppo_cartpole.py"), *flags.split()]
        command += ["--eval-episodes", "1"]

        def seconds(name: str, steps: int) -> float:
            start = time.perf_counter()
            more = ["--run-dir", f"{folder}/{name}", "--total-timesteps", str(steps)]
            subprocess.run(command + more, check=True, capture_output=True, env=environment)
            return time.perf_counter() - start

        if warm:
            seconds("before", 2 * ppo_cartpole.Args().batch_size)
        return of_process(total_timesteps / seconds("run", total_timesteps))


def of_process(speed: float) -> dict:
    """The numbers of a contestant that worked in processes of its own."""
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"steps_per_second": speed, "first_update_seconds": None, "memory_gb": memory}


def rejax_process(total_timesteps: int, threads: int) -> dict:
    """A whole run of rejax: a process that imports, compiles and trains."""
    flags = f"cartpole --worker rejax --total-timesteps {total_timesteps}"
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, *flags.split()], check=True, capture_output=True)
    return of_process(total_timesteps / (time.perf_counter() - start))


def cartpoles(total_timesteps: int, threads: int) -> dict:
    """The environments of ppo_cartpole.py alone, stepped with random actions: the ceiling."""
    args = ppo_cartpole.Args()
    envs = ppo_cartpole.make_envs(args, args.num_envs)
    steps = total_timesteps // args.num_envs
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 2, (steps, args.num_envs))
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    speed = steps * args.num_envs / (time.perf_counter() - start)
    return {"steps_per_second": speed, "first_update_seconds": None}


def cheetah(total_timesteps: int) -> tuple:
    """The flags of the modern preset, and Stable-Baselines3's HalfCheetah-v4, normalised alike."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    args = ppo_continuous.Args(total_timesteps=total_timesteps)
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


def sb3_trpo(total_timesteps: int, threads: int) -> dict:
    """At the defaults of benchmark/baselines/trpo.py, with less work in a step of the policy.

    All of that step, gradient and line search too, sees every fifth row. The KL must be below
    delta, not 1.5 delta; a time limit is bootstrapped.
    """
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(threads)
    args = trpo.Args(total_timesteps=total_timesteps)
    envs = make_vec_env(args.env_id, args.num_envs)
    model = TRPO(
        "MlpPolicy",
        VecNormalize(envs, norm_reward=False, clip_obs=args.obs_clip),
        learning_rate=args.value_learning_rate,
        n_steps=args.num_steps,
        batch_size=args.value_minibatch,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        cg_max_steps=args.cg_iterations,
        cg_damping=args.damping,
        line_search_shrinking_factor=0.5,
        line_search_max_iter=args.line_search_tries,
        n_critic_updates=args.value_epochs,
        target_kl=args.max_kl,
        sub_sampling_factor=args.fisher_every,
        seed=1,
        device="cpu",
    )
    return learned(model, args)


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
    """In place of EnvPool: games of 1000 steps that show the same noise and cost nothing."""

    def __init__(self, *_, num_envs: int, **__):
        rng = np.random.default_rng(0)
        self.obs = rng.integers(0, 256, (num_envs, 4, 84, 84), np.uint8)
        self.action_space = SimpleNamespace(n=6)
        self.nothing = np.zeros(num_envs, np.float32)
        self.count = 0

    def reset(self) -> tuple:
        return self.obs, {"lives": self.nothing}

    def step(self, _) -> tuple:
        self.count += 1
        over = self.nothing + (self.count % 1000 == 0)
        info = {"lives": self.nothing, "reward": over, "terminated": over}
        return self.obs, self.nothing, over > 0, over > 1, info

    def close(self) -> None:
        pass


def network(total_timesteps: int, threads: int) -> dict:
    """ppo_atari.py without an emulator: acting and updating alone."""
    real = ppo_atari.envpool
    ppo_atari.envpool = SimpleNamespace(make=Idle, make_spec=real.make_spec)
    return ours(ppo_atari, total_timesteps, threads)


def emulators(total_timesteps: int, threads: int, num_envs: int = 8) -> dict:
    """The environments of ppo_atari.py alone, stepped with random actions."""
    args = ppo_atari.Args(num_envs=num_envs)
    steps = total_timesteps // args.num_envs
    actors = ppo_atari.Actors(args, args.num_envs)
    actors.restart(seed=0)
    num_actions = actors.envs.action_space.n
    actions = np.random.default_rng(0).integers(0, num_actions, (steps, args.num_envs))
    start = time.perf_counter()
    for action in actions:
        actors.step(action)
    speed = steps * args.num_envs / (time.perf_counter() - start)
    return {"steps_per_second": speed, "first_update_seconds": None}


def grpo(total_timesteps: int, threads: int) -> dict:
    """ours() for grpo_toy.py, whose steps are sampled answers."""
    return ours(grpo_toy, total_timesteps, threads, threads=threads)


def writing(total_timesteps: int, threads: int) -> dict:
    """What grpo_toy.py does before it learns: answers are sampled and verified."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    args, task = grpo_toy.Args(), grpo_toy.sort_task()
    agent = grpo_toy.Agent(len(task.vocab), len(task.prompts[0]) + task.max_length)
    rng = torch.Generator()
    questions = task.prompts[: args.num_prompts]
    batches = total_timesteps // args.batch_size
    start = time.perf_counter()
    for _ in range(batches):
        prompts = task.encode(questions)
        batch = grpo_toy.sample(agent, prompts, args.group_size, task.max_length, 1.0, rng)
        grpo_toy.verify(task, questions, batch, args.group_size)
    speed = batches * args.batch_size / (time.perf_counter() - start)
    return {"steps_per_second": speed, "first_update_seconds": None}


def crowd(suite: str, key: str, total_timesteps: int, threads: int) -> dict:
    """A contestant once on each core, all at the same time, speeds added."""
    flags = f"{suite} --worker {key} --total-timesteps {total_timesteps} --threads {threads}"
    command = [sys.executable, __file__, *flags.split()]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    started = []
    for core in sorted(os.sched_getaffinity(0)):
        pin = partial(os.sched_setaffinity, 0, {core})
        started.append(subprocess.Popen(command, preexec_fn=pin, **quiet))
    results = [json.loads(process.communicate()[0]) for process in started]
    return {
        "steps_per_second": sum(result["steps_per_second"] for result in results),
        "memory_gb": sum(result["memory_gb"] for result in results),
        "first_update_seconds": max(result["first_update_seconds"] for result in results),
    }


def simulators(agents: int, total_timesteps: int, threads: int) -> dict:
    """The environments of so many agents alone, stepped with noise: the ceiling."""
    args = lockstep.crowd_args(ppo_continuous.Args(), list(range(agents)), ["clip:0.2"])[0]
    envs = ppo_continuous.make_envs(args, agents)
    envs.reset(seed=0)
    space = envs.single_action_space
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(total_timesteps, agents, *space.shape)).astype(space.dtype)
    actions = actions.clip(space.low, space.high)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    speed = total_timesteps * agents / (time.perf_counter() - start)
    return {"steps_per_second": speed, "first_update_seconds": None}


# ----------------------------------------------------------------------------------- CONTESTANTS
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
        "CartPole-v1 at the defaults of ppo_cartpole.py in all: 32 environments x 64 steps, 4 "
        "epochs of 32 minibatches, separate tanh networks of 64-64 for policy and value, Adam, on "
        "the CPU. ppo_cartpole.py always takes one torch thread. Each makes its environments in "
        "its usual way: Gymnasium's make_vec, which has a CartPole in NumPy for all at once, and "
        "make_vec_env, a loop over single ones.",
        "sb3",
        {
            "ours": Contestant("ppo_cartpole.py", partial(ours, ppo_cartpole), 1),
            "ours-compile": Contestant(
                "ppo_cartpole.py --compile", partial(ours, ppo_cartpole, compile=True), 1
            ),
            "sb3": Contestant("Stable-Baselines3 PPO", sb3_cartpole),
            # not by default: with a thread per core, its speed swings on a machine that does more
            "sb3-default": Contestant(
                "Stable-Baselines3 PPO, its default threads", sb3_cartpole, 0, cores=None
            ),
            "rejax": Contestant("rejax PPO (JAX end to end)", rejax_cartpole, cores=None),
            "environments": Contestant("32 environments alone, Gymnasium", cartpoles, 1),
        },
        ("ours", "ours-compile", "sb3", "rejax", "environments"),
        100_000,
        ppo_cartpole.Args().batch_size,
    ),
    "process": Suite(
        "A million steps of CartPole-v1 at the defaults of ppo_cartpole.py, from the start of the "
        "process to its end: imports, compiling, training, one episode of evaluation (none in "
        "rejax). JAX end to end needs the environment in JAX: it runs CartPole so, but no MuJoCo, "
        "no ALE, and no environment of your own in Gymnasium.",
        "rejax",
        {
            "ours": Contestant("ppo_cartpole.py", script, 1),
            "cold": Contestant(
                "ppo_cartpole.py --compile, empty cache", partial(script, flags="--compile"), 1
            ),
            "warm": Contestant(
                "ppo_cartpole.py --compile, compiled before",
                partial(script, flags="--compile", warm=True),
                1,
            ),
            "rejax": Contestant("rejax PPO (JAX end to end)", rejax_process, cores=None),
        },
        ("ours", "cold", "warm", "rejax"),
        1_000_000,
        ppo_cartpole.Args().batch_size,
    ),
    "mujoco": Suite(
        "HalfCheetah-v4 at the defaults of ppo_continuous.py in all, the paper's Table 3: one "
        "environment x 2048 steps per agent, 10 epochs of 32 minibatches, separate tanh networks "
        "of 64-64, observations and rewards normalised, Adam, on the CPU. The 33 agents are what "
        "one task takes of the runs behind the paper's Table 1, 11 objectives x 3 seeds; they "
        "learn in one process, whose updates take a thread per core. Where there is a process per "
        "core, each is pinned to its own.",
        "sb3",
        {
            "one": Contestant("ppo_continuous.py, one agent", MUJOCO, 1),
            "one-eager": Contestant(
                "ppo_continuous.py --no-compile, one agent", partial(MUJOCO, compile=False), 1
            ),
            "grid": Contestant(
                "ppo_continuous.py, 33 agents", side_by_side, CORES, 33, CORES, 1 / 4
            ),
            "grid-crowd": Contestant(
                "ppo_continuous.py, 33 agents a process, a process per core",
                *(partial(crowd, "mujoco", "grid"), 1, 33 * CORES, CORES, 1 / 4),
            ),
            "sb3": Contestant("Stable-Baselines3 PPO", sb3_mujoco),
            "sb3-crowd": Contestant(
                "Stable-Baselines3 PPO, a process per core",
                partial(crowd, "mujoco", "sb3"),
                1,
                CORES,
                CORES,
            ),
            "sbx": Contestant("SBX PPO (JAX)", sbx_mujoco, cores=None),
            "simulator": Contestant("the environment alone, Gymnasium", partial(simulators, 1), 1),
            "simulators": Contestant(
                "33 environments alone, EnvPool", partial(simulators, 33), 1, 33, CORES, 1 / 4
            ),
        },
        ("one", "grid", "grid-crowd", "sb3", "sb3-crowd", "sbx", "simulator", "simulators"),
        40_960,
        ppo_continuous.Args().batch_size,
    ),
    "trpo": Suite(
        "HalfCheetah-v4 at the defaults of benchmark/baselines/trpo.py in both: one environment x "
        "1024 steps, ten iterations of conjugate gradients with Fisher products on every fifth "
        "row, five epochs of the value function in minibatches of 64, separate tanh networks of "
        "64-64, observations normalised, on the CPU. sb3-contrib takes every fifth row for the "
        "gradient and the line search too, which is less work.",
        "sb3_contrib",
        {
            "ours": Contestant("trpo.py", partial(ours, trpo), 1),
            "sb3_contrib": Contestant("sb3-contrib TRPO", sb3_trpo),
        },
        ("ours", "sb3_contrib"),
        40_960,
        trpo.Args().batch_size,
    ),
    "atari": Suite(
        "Pong at the defaults of ppo_atari.py in all, the paper's Table 5: 8 environments x 128 "
        "steps, 3 epochs of 4 minibatches, the Nature CNN, Adam, on the CPU, every core of it. "
        "ppo_atari.py computes in bfloat16 where the CPU can, on EnvPool; Stable-Baselines3 in "
        "float32, on its own wrappers around ale-py.",
        "sb3",
        {
            "ours": Contestant("ppo_atari.py", partial(ours, ppo_atari), CORES, 1, CORES),
            "ours-float32": Contestant(
                "ppo_atari.py --precision float32",
                partial(ours, ppo_atari, precision="float32"),
                CORES,
                1,
                CORES,
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
        "The task sort at the defaults of grpo_toy.py: 64 questions x 8 answers, 2 gradient steps "
        "on each batch, on the CPU. A step is a sampled answer.",
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


# -------------------------------------------------------------------------------------- SITTINGS
def work(suite: str, key: str, total_timesteps: int, threads: int) -> None:
    """--worker: one measurement, printed as one line of JSON."""
    contestant = SUITES[suite].contestants[key]
    if contestant.threads is not None:
        threads = contestant.threads
    with contextlib.redirect_stdout(sys.stderr):
        result = contestant.measure(total_timesteps, threads)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of kilobytes, on Linux
    threads = contestant.threads or torch.get_num_threads()
    print(json.dumps({"memory_gb": mine} | result | {"threads": threads}))


def measure(suite: str, key: str, total_timesteps: int, threads: int) -> dict:
    """What work() prints in a process of its own. Raises UserError where that fails."""
    flags = f"{suite} --worker {key} --total-timesteps {total_timesteps} --threads {threads}"
    command = [sys.executable, __file__, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{SUITES[suite].contestants[key].title} cannot be measured: {why}")
    return json.loads(done.stdout)


def speeds_of(rows: pd.DataFrame, title: str) -> np.ndarray:
    """The steps per second of a contestant, round by round."""
    return numbers(rows["steps_per_second"][rows["contestant"] == title]).to_numpy()


def with_range(x: np.ndarray, form: str) -> str:
    """The median, and where there are several the smallest and the largest."""
    middle, low, high = (f"{value:{form}}" for value in (np.median(x), x.min(), x.max()))
    return f"{middle} ({low} to {high})" if len(x) > 1 else middle


def table(suite: Suite, rows: pd.DataFrame) -> list[dict]:
    """Rows of SUITE.csv -> rows of SUITE.md.

    Medians over the rounds, of speeds and of ratios within a round.
    """
    lines = []
    peer = suite.contestants[suite.peer].title
    for contestant in suite.contestants.values():
        mine = rows[rows["contestant"] == contestant.title]
        if mine.empty:
            continue
        speeds, peers = speeds_of(rows, contestant.title), speeds_of(rows, peer)
        speed = np.median(speeds)
        first = numbers(mine["first_update_seconds"]).median()
        line = {
            "contestant": contestant.title,
            "torch threads": mine["threads"].iloc[0],
            "steps/s": f"{speed:,.0f}",
            "per agent": f"{speed / contestant.agents:,.0f}",
            "per core": f"{speed / contestant.cores:,.0f}" if contestant.cores else "",
            f"times {peer}": with_range(speeds / peers, ".2f") if len(peers) else "",
            "first update, s": "" if np.isnan(first) else f"{first:.1f}",
            "memory, GB": f"{numbers(mine['memory_gb']).median():.1f}",
        }
        lines.append(line)
    return lines


def of_ceiling(suite: Suite, rows: pd.DataFrame) -> str:
    """How near the first contestant comes to 1 / (1/x + 1/y), round by round.

    x and y: the speeds of its parts.
    """
    first = speeds_of(rows, next(iter(suite.contestants.values())).title)
    parts = [suite.contestants[key].title for key in suite.parts]
    share = first * sum(1 / speeds_of(rows, title) for title in parts)
    said = with_range(share, ".0%")
    return (
        " A loop that does one thing at a time can reach 1 / (1/x + 1/y), x and y the speeds of "
        f"its parts, here {' and '.join(map(repr, parts))}; the first row reaches {said} of that."
    )


def report(name: str, rows: pd.DataFrame) -> str:
    """SUITE.md from SUITE.csv, cells as text."""
    suite = SUITES[name]
    there = set(rows["contestant"])
    rounds = rows["round"].nunique()
    told = f"Medians of {rounds} rounds, ratios within a round (in brackets the smallest and the "
    told += "largest)"
    note = f"{suite.note} {told if rounds > 1 else 'One measurement of each'}; "
    if name != "process":
        compiling = name not in ("trpo", "grpo")
        compiles = ", which contains compilation, from an empty cache" if compiling else ""
        note += f"steps/s after the first update{compiles}; "
    note += "memory is the peak."
    if suite.parts and {suite.contestants[key].title for key in suite.parts} < there:
        note += of_ceiling(suite, rows)
    for key, packages in PEERS.items():
        if key in suite.default and suite.contestants[key].title not in there:
            note += f" {packages[0]} was not installed."
    about = rows.loc[0, "started":]
    said = "; ".join(f"{key.replace('_', ' ')} {cell}" for key, cell in about.items())
    note = textwrap.fill(note, 120)
    return f"# Speed: {name}\n\n{note}\n\n{said}\n\n{markdown(table(suite, rows))}"


def compare(name: str, keys: list[str], rounds: int, total_timesteps: int, threads: int) -> None:
    """Measure, write SUITE.csv and SUITE.md, print the table. Raises UserError."""
    suite = SUITES[name]
    if total_timesteps <= suite.batch:
        what = f"--total-timesteps must be above {suite.batch}"
        raise UserError(f"{what}: the first update is not timed")
    now = datetime.datetime.now().isoformat(timespec="seconds")
    about = {"started": now, "git_commit": git_commit()}
    packages = ["torch", "gymnasium", "envpool", "stable-baselines3"]
    for key, mine in PEERS.items():
        packages += mine if key in keys else []
    packages += ["ale-py"] if name == "atari" else []
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
    sweep.write(RESULTS / f"{name}.csv", pd.DataFrame(rows))
    rows = sweep.read(RESULTS / f"{name}.csv")
    (RESULTS / f"{name}.md").write_text(report(name, rows))
    print(markdown(table(suite, rows)), end="")


def main(argv: list[str]) -> None:
    parser = Parser("Steps per second side by side, in alternating processes.")
    add = parser.add_argument
    add("suites", nargs="*", help=f"any of {', '.join(SUITES)}; all where none is named")
    what = "who takes part, of one suite; by default its usual ones"
    add("--contestants", nargs="+", help=what)
    add("--rounds", type=positive, default=5, help="measurements of each contestant")
    what = "steps of one measurement; by default the suite's"
    add("--total-timesteps", type=positive, help=what)
    add("--threads", type=positive, default=1, help="torch threads of the peers")
    add("--worker", help="measure one contestant here and print a line of JSON")
    args = parser.parse_args(argv)
    chosen = args.suites or list(SUITES)
    for name in chosen:
        if name not in SUITES:
            raise UserError(f"{name!r} is no suite: {', '.join(SUITES)}")
    if args.contestants and len(chosen) > 1:
        raise UserError("--contestants goes with one suite")
    for key in [*(args.contestants or ()), *([args.worker] if args.worker else ())]:
        if key not in SUITES[chosen[0]].contestants:
            known = ", ".join(SUITES[chosen[0]].contestants)
            raise UserError(f"{key!r} is no contestant of {chosen[0]}: {known}")
    for name in chosen:
        steps = args.total_timesteps or SUITES[name].timesteps
        if args.worker:
            work(name, args.worker, steps, args.threads)
        else:
            usual = [key for key in SUITES[name].default if key not in PEERS or find_spec(key)]
            compare(name, args.contestants or usual, args.rounds, steps, args.threads)


if __name__ == "__main__":
    cli(main)
