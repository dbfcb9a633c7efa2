"""A humanoid that learns to run: section 6.3 of the paper, in MuJoCo's Humanoid-v4.

    python benchmark/humanoid.py                                  # three seeds, then the report
    python benchmark/humanoid.py --ablation defaults fixed-lr     # these instead, one seed of each
    python benchmark/humanoid.py --report                         # the report alone, from the CSVs
    python benchmark/humanoid.py --film                           # best and worst seed, as mp4
    python benchmark/humanoid.py --speed                          # beside the simulator alone

A run is a process of benchmark/humanoid_ppo.py, one on each core; the ablation `defaults` is one of
ppo_continuous.py as it is. A run takes hours. Runs live in runs/humanoid/. One that was interrupted
goes on at its last checkpoint, a finished one is left alone, so the same command may be given again
and again. The length is a part of the plan: a finished run of 10M steps is not made longer.

Agents train in EnvPool. The last policy of each is then played in EnvPool and in Gymnasium, 20
greedy episodes each; an episode ends at a fall or after 1,000 steps. A policy that knows one
simulator too well shows here. Standing still pays 5 a step and so 5,000 an episode. So speed and
length stand beside every return.

Results are benchmark/results/humanoid/: runs.csv, curves.csv and, made of these, summary.md and
curves.png; --film adds best.mp4, worst.mp4, eight pictures of each in a row, and films.csv, --speed
adds speed.csv. Where there is no screen, MUJOCO_GL=egl before the command lets MuJoCo draw without
one.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous as ppo
from benchmark import (
    Parser,
    UserError,
    cli,
    git_commit,
    humanoid_ppo,
    machine,
    markdown,
    number,
    plot,
    positive,
    scores,
    sweep,
)
from benchmark.sweep import CORES, ROOT, numbers

RUNS = Path("runs/humanoid")  # below ROOT, where the runs are started
RESULTS = ROOT / "benchmark/results/humanoid"
ENV_ID = "Humanoid-v4"
AGENT = "benchmark.humanoid_ppo"
STEPS = 10_000_000
EPISODES = 20  # of each policy in each simulator


class Setting(NamedTuple):
    what: str  # the report says it
    trainer: str
    flags: str
    seeds: range


ONE = range(1, 2)
SETTINGS = {
    "recipe": Setting("all of the recipe", AGENT, "", range(1, 4)),
    "defaults": Setting("ppo_continuous.py as it is", "ppo_continuous", "", ONE),
    "fixed-lr": Setting("a step size of 3e-4 that stays", AGENT, "--no-adapt-lr", ONE),
    "raw-values": Setting(  # returns are far above 1: a clip of 0.2 would hold V back
        "values neither normalised nor clipped",
        AGENT,
        "--no-norm-values --value-clip None",
        ONE,
    ),
    "no-value-clip": Setting("values not clipped", AGENT, "--value-clip None", ONE),
    "sigma-1": Setting(
        "sigma starts at 1, 2.5 times the actions' bound", AGENT, "--log-std 0", ONE
    ),
    "8-actors": Setting(
        "8 actors; so minibatches of 256, and 8 times the gradient steps",
        AGENT,
        "--num-envs 8",
        ONE,
    ),
}
ABLATIONS = [name for name in SETTINGS if name != "recipe"]


# --------------------------------------------------------------------------------------- PLAYING
SIMULATORS = {"gymnasium": "Gymnasium", "envpool": "EnvPool"}


def make_envs(simulator: str, count: int):
    """So many humanoids of a simulator, as they are registered."""
    if simulator == "envpool":
        return ppo.EnvPool(ENV_ID, count)
    return gym.make_vec(ENV_ID, num_envs=count, vectorization_mode="sync")


def play(agent, envs, first_seed: int) -> dict[str, list[float]]:
    """One greedy episode in each environment: its return, its length, and its speed.

    speed: the mean of x_velocity, metres per second of the centre of mass, over its steps.
    """
    obs, _ = envs.reset(seed=first_seed)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    running = np.ones(len(obs), bool)
    returns, lengths, metres_per_second = np.zeros((3, len(obs)))
    while running.any():
        obs, rewards, terminated, truncated, infos = envs.step(ppo.act(agent, obs).clip(low, high))
        returns += rewards * running
        lengths += running
        metres_per_second += infos["x_velocity"] * running
        running &= ~(terminated | truncated)
    speeds = metres_per_second / lengths
    return {"return": returns.tolist(), "length": lengths.tolist(), "speed": speeds.tolist()}


def play_both(trainer: str, folder: Path, seed: int) -> dict:
    """play() in both simulators, from the run's last checkpoint, on seeds of its evaluation.

    Kept in the run folder, as both.json. Raises UserError where there is no policy to play.
    """
    path = folder / "both.json"
    if path.exists():
        return json.loads(path.read_text())
    try:
        agent, _ = import_module(trainer).load_agent(str(folder))
    except ppo.UserError as reason:
        raise UserError(str(reason)) from reason
    measured = {"mujoco": version("mujoco")}  # Gymnasium's; EnvPool has one of its own
    for name in SIMULATORS:
        envs = make_envs(name, EPISODES)
        measured[name] = play(agent, envs, 2**30 + ppo.stream(seed, "evaluation"))
        envs.close()
    ppo.write_file(path, ppo.to_json(measured))
    return measured


def measure(facts: dict, metrics: pd.DataFrame, folder: Path) -> dict:
    """The columns of runs.csv that say how the policy does in both simulators."""
    measured = play_both(facts["trainer"], folder, facts["seed"])
    columns = {"mujoco": measured["mujoco"], "last_100_length": metrics[LENGTH].iloc[-1]}
    for name in SIMULATORS:
        episodes = measured[name]
        columns[f"{name}_return"] = np.mean(episodes["return"]).item()
        columns[f"{name}_return_std"] = np.std(episodes["return"]).item()
        columns[f"{name}_length"] = np.mean(episodes["length"]).item()
        # over all steps that were played, so that a short episode counts for little
        speed = np.average(episodes["speed"], weights=episodes["length"])
        columns[f"{name}_speed"] = speed.item()
    return columns


# -------------------------------------------------------------------------------------- ALL RUNS
LENGTH = "charts/episodic_length"
SPEED = "charts/forward_speed"


COLUMNS = "run env_id seed total_timesteps transitions last_100_return last_100_length"
COLUMNS += " eval_return_mean eval_return_std eval_episodes"
COLUMNS += " gymnasium_return gymnasium_return_std gymnasium_speed gymnasium_length mujoco"
COLUMNS += " envpool_return envpool_return_std envpool_speed envpool_length"
LAYOUT = sweep.Layout(
    key=("run", "seed"),
    columns=(*COLUMNS.split(), *sweep.PACKAGES, *sweep.ORIGIN),
    curves={
        "episodic_return": plot.RETURN,
        "episodic_length": LENGTH,
        "forward_speed": SPEED,  # which ppo_continuous.py does not log: empty cells
        "learning_rate": "charts/learning_rate",
        "kl": "losses/kl_after_update",
        "action_std": "charts/action_std",
    },
    order={"run": list(SETTINGS)},
    thin=sweep.average,
    measure=measure,
)


def call(name: str, seed: int, steps: int) -> sweep.Call:
    setting = SETTINGS[name]
    flags = f"--env-id {ENV_ID} --total-timesteps {steps} {setting.flags} --seed {seed}"
    labels = {"run": name, "trainer": setting.trainer}
    return sweep.script(setting.trainer, flags, RUNS / name / str(seed), labels)


def calls(names: list[str], steps: int) -> list[sweep.Call]:
    return [call(name, seed, steps) for name in names for seed in SETTINGS[name].seeds]


# ------------------------------------------------------------------------------------------ FILM
def best_and_worst(runs: pd.DataFrame) -> dict[str, int]:
    """The seeds of the recipe with the highest and the lowest mean return in Gymnasium, if any."""
    mine = runs[runs["run"] == "recipe"].set_index("seed")
    if mine.empty:
        return {}
    returns = numbers(mine["gymnasium_return"])
    return {"best": int(returns.idxmax()), "worst": int(returns.idxmin())}


def film(runs: pd.DataFrame) -> None:
    """An episode of the recipe's best and worst seed in Gymnasium, and films.csv.

    Raises UserError where nothing can be drawn, or no run of the recipe is there.
    """
    seeds = best_and_worst(runs)
    if not seeds:
        raise UserError("no run of the recipe is finished: there is nothing to film")
    rows = []
    for name, seed in seeds.items():
        folder = ROOT / RUNS / "recipe" / str(seed)
        try:
            agent, args = import_module(SETTINGS["recipe"].trainer).load_agent(str(folder))
            args = replace(args, capture_video=True, eval_episodes=1)
            ppo.check_rendering(args)
            (episode_return,) = ppo.evaluate(agent, args, folder)
        except ppo.UserError as reason:
            raise UserError(str(reason)) from reason
        (path,) = (folder / "videos").glob("*.mp4")
        shutil.copy(path, RESULTS / f"{name}.mp4")
        draw_strip(path, RESULTS / f"{name}.png")
        rows.append({"film": name, "seed": seed, "return": episode_return})
    sweep.write(RESULTS / "films.csv", pd.DataFrame(rows))


def draw_strip(path: Path, picture: Path) -> None:
    """Eight pictures of the first three seconds of a film, in a row.

    Later it runs beyond the 20 metres of floor that are drawn; the simulator's floor goes on.
    """
    from matplotlib import image  # these two take time that no other command needs
    from moviepy import VideoFileClip

    with VideoFileClip(str(path)) as clip:
        times = np.linspace(0, min(3, clip.duration), 8, endpoint=False)
        frames = [clip.get_frame(time)[::2, ::2] for time in times]
    image.imsave(picture, np.concatenate(frames, axis=1))


# ----------------------------------------------------------------------------------------- SPEED
ROUNDS = 3
UPDATES = 6  # of the recipe, in each round; the first one, which compiles, does not count
STEPS_ALONE = 400  # of each environment


def time_recipe() -> float:
    """Steps per second of the recipe's first updates."""
    args = humanoid_ppo.Args(eval_episodes=1)
    args.total_timesteps = UPDATES * args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        args.run_dir = f"{folder}/run"
        _, summary = humanoid_ppo.train(args)
    return summary["sps"]


def time_simulator() -> float:
    """Steps per second of its environments alone, under noise as wide as its first policy."""
    args = humanoid_ppo.Args()
    envs = make_envs("envpool", args.num_envs)
    envs.reset(seed=0)
    space = envs.single_action_space
    noise = np.random.default_rng(0).normal(size=(STEPS_ALONE, args.num_envs, *space.shape))
    actions = (math.exp(args.log_std) * noise).clip(space.low, space.high)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    speed = actions.shape[0] * actions.shape[1] / (time.perf_counter() - start)
    envs.close()
    return speed


def compare_speed() -> None:
    """Both in turns, on one core; speed.csv."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES[:1])
    known = {"started": time.strftime("%Y-%m-%dT%H:%M:%S"), "git_commit": git_commit()} | machine()
    rows = [{"recipe": time_recipe(), "alone": time_simulator()} | known for _ in range(ROUNDS)]
    sweep.write(RESULTS / "speed.csv", pd.DataFrame(rows))


def tell_speed() -> str:
    """From speed.csv; empty where there is none."""
    if not (RESULTS / "speed.csv").exists():
        return ""
    rows = sweep.read(RESULTS / "speed.csv")
    recipe, alone = numbers(rows["recipe"]), numbers(rows["alone"])
    share = (recipe / alone).median()
    return f"""At the start of training, on one core of {rows["cpu"][0]}: {recipe.median():,.0f} \
steps/s, {share:.2f} of the {alone.median():,.0f} of
EnvPool's humanoids alone (medians of {len(rows)} rounds, both in turns; {rows["started"][0]}, \
git commit {rows["git_commit"][0]}).

"""


# ---------------------------------------------------------------------------------------- REPORT
TITLES = {  # of the panels of the picture
    "episodic_return": "episodic return (last 100)",
    "episodic_length": "episode length (last 100)",
    "forward_speed": "speed of the torso in training, m/s",
}
ELSEWHERE = [  # PPO on Humanoid-v4
    ("Sample Factory, Gymnasium", "10M", "5,439 +- 1,314", "APPO; best policy, 10 episodes"),
    (
        "rl_games, EnvPool",
        "10M",
        "about 9,500",
        "one seed, in training, read off its plot of 2022; in Gymnasium, a policy of that "
        "EnvPool's Humanoid-v3 had 82 (envpool#143)",
    ),
    ("CleanRL, Gymnasium", "8M", "583 +- 28", "docs/rl-algorithms/rpo.md, its PPO beside RPO"),
]
NOTE = f"""
Gymnasium and EnvPool: the last policy, {EPISODES} greedy episodes per seed on seeds that training \
never used. An episode
ends at a fall or after 1,000 steps. m/s: the mean of x_velocity, the speed of the centre of mass, \
over all steps played.
A humanoid that stands still gets 5 a step, 5,000 an episode: the return alone does not tell \
standing from running. "Last
100" are the last episodes of training, with noise, in EnvPool (`defaults`: in Gymnasium, as \
ppo_continuous.py does with
one actor). In brackets: bootstrap 95% intervals over seeds, which of three seeds reach from the \
lowest to the highest. An
ablation is one seed: within the recipe's range, a difference says nothing. Runs may have shared \
the machine, so hours and
steps/s are no measurement of speed.

Where the two simulators are known to differ: 84 of the 376 inputs, the contact forces, are always \
0 in EnvPool, and not
in Gymnasium. benchmark/humanoid_ppo.py leaves out inputs that never varied in training, \
ppo_continuous.py does not.

In the picture, the recipe's curves dip every million steps. There a checkpoint restarts all \
episodes, and for some
updates only those that fall early have ended.
"""


def with_interval(runs: pd.DataFrame, column: str, show: Callable[[float], str]) -> str:
    """The mean over seeds and its bootstrap 95% interval; one seed has none."""
    values = numbers(runs[column]).to_numpy()
    mean, low, high = scores.mean_interval(values)
    return show(mean) if len(values) == 1 else f"{show(mean)} ({show(low)} to {show(high)})"


def speed(x: float) -> str:
    return f"{x:.2f}"


def summarise(name: str, runs: pd.DataFrame) -> dict:
    """A setting's row of summary.md, from its rows of runs.csv."""
    setting = SETTINGS[name]
    steps = sorted(set(numbers(runs["total_timesteps"]) / 1e6))
    cells = {
        "run": f"`{name}`",
        "what": setting.what,
        "seeds": f"{len(runs)} of {len(setting.seeds)}",
        "million steps": " and ".join(dict.fromkeys(f"{x:.3g}" for x in steps)),
    }
    for simulator, title in SIMULATORS.items():
        cells[f"{title}: return"] = with_interval(runs, f"{simulator}_return", number)
        cells[f"{title}: m/s"] = with_interval(runs, f"{simulator}_speed", speed)
        cells[f"{title}: length"] = with_interval(runs, f"{simulator}_length", number)
    cells["last 100: return"] = with_interval(runs, "last_100_return", number)
    return cells


def summarise_seed(row: pd.Series) -> dict:
    """A run's row of summary.md, from its row of runs.csv."""
    cells = {"run": f"`{row['run']}`", "seed": row["seed"]}
    for simulator, title in SIMULATORS.items():
        mean, std = float(row[f"{simulator}_return"]), float(row[f"{simulator}_return_std"])
        cells[f"{title}: return"] = f"{number(mean)} +- {number(std)}"
        cells[f"{title}: m/s"] = speed(float(row[f"{simulator}_speed"]))
        cells[f"{title}: length"] = number(float(row[f"{simulator}_length"]))
    cells["last 100: return"] = number(float(row["last_100_return"]))
    cells["last 100: length"] = number(float(row["last_100_length"]))
    cells["hours"] = f"{float(row['wall_seconds']) / 3600:.1f}"
    cells["steps/s"] = f"{float(row['sps']):,.0f}"
    return cells


def missing_runs(runs: pd.DataFrame) -> str:
    """What is not there yet, with its commands; empty where all is."""
    done = set(zip(runs["run"], runs["seed"].astype(int), strict=True))
    text = ""
    for name, setting in SETTINGS.items():
        seeds = [str(seed) for seed in setting.seeds if (name, seed) not in done]
        if seeds:
            flags = "" if name == "recipe" else f" --ablation {name}"
            text += f"- `{name}`, seed {', '.join(seeds)}: "
            text += f"`python benchmark/humanoid.py{flags}`\n"
    return f"## Not run\n\n{text}\n" if text else ""


def report() -> None:
    """Write summary.md and curves.png from the CSVs, always the same bytes.

    Raises OSError where there is none.
    """
    runs, points = (sweep.read(RESULTS / name) for name in ("runs.csv", "curves.csv"))
    figure = plot.side_by_side(points, TITLES, "run", list(SETTINGS))
    plot.legend(figure, "lower", ncols=len(SETTINGS))
    figure.savefig(RESULTS / "curves.png", dpi=150)

    table = [summarise(name, mine) for name, mine in runs.groupby("run", sort=False)]
    elsewhere = pd.DataFrame(ELSEWHERE, columns=["elsewhere", "steps", "return", "how"])
    text = f"# {ENV_ID}\n\n{markdown(table)}{NOTE}\n{tell_speed()}"
    text += "![Return, episode length and speed over steps](curves.png)\n\n"
    if (RESULTS / "films.csv").exists():
        seeds = best_and_worst(runs)
        for film_of, row in sweep.read(RESULTS / "films.csv").set_index("film").iterrows():
            if int(row["seed"]) == seeds.get(film_of):  # another run may have come since
                how = f"an episode of return {number(float(row['return']))}"
                text += f"[The {film_of} seed, {row['seed']}, in {how}]({film_of}.mp4):\n\n"
                text += f"![Eight moments of its first three seconds]({film_of}.png)\n\n"
    text += f"{markdown(elsewhere)}\n{missing_runs(runs)}"
    text += f"## Every seed\n\n{markdown([summarise_seed(row) for _, row in runs.iterrows()])}\n"
    text += f"{sweep.origin(runs)}\nGymnasium plays with {sweep.listed(runs, ['mujoco'])}.\n"
    (RESULTS / "summary.md").write_text(text)


def main(argv: list[str]) -> None:
    parser = Parser("Train a humanoid to run, on three seeds, and report it.")
    add = parser.add_argument
    what = "run one seed of each of these instead of the recipe"
    add("--ablation", nargs="+", choices=ABLATIONS, default=[], help=what)
    add("--total-timesteps", type=positive, default=STEPS, help="of each run")
    what = "run nothing, film the best and the worst seed, and write the report"
    add("--film", action="store_true", help=what)
    what = "run nothing but some updates and the simulator alone, and write the report"
    add("--speed", action="store_true", help=what)
    sweep.add_flags(parser, jobs=None)
    args = parser.parse_args(argv)
    if args.speed:
        compare_speed()
    elif args.film:
        film(sweep.read(RESULTS / "runs.csv"))
    elif not args.report:
        planned = calls(args.ablation or ["recipe"], args.total_timesteps)
        sweep.complete(RESULTS, LAYOUT, planned, sweep.choose_engine(args, jobs=len(CORES)))
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
