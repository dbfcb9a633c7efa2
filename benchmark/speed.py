"""Steps per second, side by side with other implementations of the same algorithm at the same setting.

    python benchmark/speed.py
    python benchmark/speed.py --contestants ours sb3 sb3-default     # on an idle machine only

Every measurement is a process of its own, and the contestants take turns, round after round, so that a slow minute of
the machine strikes all of them alike. Compared are ratios within a round. Writes benchmark/results/speed/: speed.csv,
a row per measurement, and summary.md, the table that is also printed. To measure more, add a Contestant.
"""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_cartpole
from benchmark import Parser, UserError, cli, machine, markdown, positive, write_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/speed"
Measure = Callable[[int, int], tuple[float, float | None]]  # total_timesteps, torch threads or 0 for the default


def cartpole(total_timesteps: int, threads: int, compile: bool = False) -> tuple[float, float]:
    """ppo_cartpole.py, which sets its one thread by itself: steps/s after the first update, seconds until its end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # empty: what a first run pays for compiling
        run_dir = Path(folder, "run")
        args = ppo_cartpole.Args(total_timesteps=total_timesteps, compile=compile, run_dir=str(run_dir))
        _, (summary,) = ppo_cartpole.train(args)
        return summary["sps"], ppo_cartpole.load_checkpoint(run_dir / "checkpoint.pt")["seconds"]["first"]


def sb3(total_timesteps: int, threads: int) -> tuple[float, None]:
    """Stable-Baselines3 at the defaults of ppo_cartpole.py, from which its own network does not differ: steps/s of a
    learn() as long as what is timed of ours, after a learn() of two rollouts."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    if threads:
        torch.set_num_threads(threads)
    args = ppo_cartpole.Args(total_timesteps=total_timesteps)
    model = PPO(
        "MlpPolicy",
        make_vec_env(args.env_id, args.num_envs),
        learning_rate=lambda left: args.learning_rate * left,
        n_steps=args.num_steps,
        batch_size=args.batch_size // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=ppo_cartpole.parse_objective(args.objective).epsilon,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        device="cpu",
    )
    model.learn(2 * args.batch_size)
    start = time.perf_counter()
    model.learn(args.batch_size * (args.num_updates - 1))
    return model.num_timesteps / (time.perf_counter() - start), None


class Contestant(NamedTuple):
    title: str
    measure: Measure
    peer: str  # the contestant that its speed is divided by
    threads: int | None = None  # torch threads, 0 for the default; None takes --threads


CONTESTANTS = {
    "ours": Contestant("ppo_cartpole.py", cartpole, "sb3", 1),
    "ours-compile": Contestant("ppo_cartpole.py --compile", lambda *a: cartpole(*a, compile=True), "sb3", 1),
    "sb3": Contestant("Stable-Baselines3 PPO", sb3, "sb3"),
    # not by default: with a thread per core, its speed swings many times over on a machine that does anything else
    "sb3-default": Contestant("Stable-Baselines3 PPO, its default threads", sb3, "sb3", 0),
}
DEFAULT = ["ours", "ours-compile", "sb3"]


def work(key: str, total_timesteps: int, threads: int) -> None:
    """--worker: one measurement, printed as one line of JSON."""
    own = CONTESTANTS[key].threads
    with contextlib.redirect_stdout(sys.stderr):
        speed, first = CONTESTANTS[key].measure(total_timesteps, threads if own is None else own)
    result = {"steps_per_second": speed, "first_update_seconds": first, "threads": torch.get_num_threads()}
    print(json.dumps(result))


def measure(key: str, total_timesteps: int, threads: int) -> dict:
    """What work() prints in a process of its own. Raises UserError where that fails."""
    flags = f"--worker {key} --total-timesteps {total_timesteps} --threads {threads}"
    done = subprocess.run([sys.executable, __file__, *flags.split()], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{CONTESTANTS[key].title} cannot be measured: {done.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(done.stdout)


def table(rows: list[dict]) -> list[dict]:
    """Rows of speed.csv -> rows of summary.md: medians over the rounds, of speeds and of ratios within a round."""
    measured = {}
    for row in rows:
        measured.setdefault(row["contestant"], []).append(row)
    speeds = {title: np.array([row["steps_per_second"] for row in mine]) for title, mine in measured.items()}
    lines = []
    for title, peer in ((c.title, CONTESTANTS[c.peer].title) for c in CONTESTANTS.values() if c.title in measured):
        first = [row["first_update_seconds"] for row in measured[title] if row["first_update_seconds"] is not None]
        ratios = speeds[title] / speeds[peer] if peer in speeds else None
        shown = "" if ratios is None else f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        line = {"contestant": title, "torch threads": measured[title][0]["threads"]}
        line |= {"steps/s": f"{np.median(speeds[title]):,.0f}", f"times {peer}": shown}
        lines.append(line | {"first update, s": f"{np.median(first):.1f}" if first else ""})
    return lines


NOTE = """# Speed

{args.env_id} at the defaults of ppo_cartpole.py in all: {args.num_envs} environments x {args.num_steps} steps,
{args.update_epochs} epochs of {args.num_minibatches} minibatches, separate tanh networks of 64-64 for policy and value,
Adam, on the CPU. Timed are {timed:,} steps after the warm-up. Medians of {rounds} rounds, ratios within a round (in
brackets the smallest and the largest). ppo_cartpole.py always takes one torch thread, Stable-Baselines3 by default
all that torch offers. Each makes its environments in its usual way: Gymnasium's make_vec, which has a CartPole in
NumPy for all at once, and make_vec_env, a loop over single ones. The first update contains compilation, from an empty
cache.

{about}

"""


def compare(keys: list[str], rounds: int, total_timesteps: int, threads: int) -> None:
    """Measure, write speed.csv and summary.md, print the table. Raises UserError."""
    args = ppo_cartpole.Args(total_timesteps=total_timesteps)
    if args.num_updates < 2:
        raise UserError(f"--total-timesteps must be above {args.batch_size}: the first update is not timed")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    about = {"started": datetime.datetime.now().isoformat(timespec="seconds")}
    about["git_commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about |= {name: version(name) for name in ("torch", "gymnasium", "stable-baselines3")}
    about |= {"python": sys.version.split()[0]} | machine()
    timed, rows = args.batch_size * (args.num_updates - 1), []
    with tqdm(total=rounds * len(keys), unit=" runs", disable=None) as bar:
        for i in range(rounds):
            for key in keys:
                row = {"round": i + 1, "contestant": CONTESTANTS[key].title, "timed_steps": timed}
                rows.append(row | measure(key, total_timesteps, threads) | about)
                bar.update()
    write_csv(RESULTS / "speed.csv", rows)
    said = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
    note = NOTE.format(args=args, timed=timed, rounds=rounds, about=said)
    (RESULTS / "summary.md").write_text(note + markdown(table(rows)))
    print(markdown(table(rows)), end="")


def main(argv: list[str]) -> None:
    parser = Parser("Steps per second side by side, in alternating processes.")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=DEFAULT, help="who takes part")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each contestant")
    parser.add_argument("--total-timesteps", type=positive, default=100_000, help="steps of one measurement")
    parser.add_argument("--threads", type=positive, default=1, help="torch threads of the peers; ours always takes 1")
    parser.add_argument("--worker", choices=CONTESTANTS, help="measure one contestant here and print a line of JSON")
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker, args.total_timesteps, args.threads)
    else:
        compare(args.contestants, args.rounds, args.total_timesteps, args.threads)


if __name__ == "__main__":
    cli(main)
