"""A policy with a memory where the velocities are hidden, against one without.

    python benchmark/recurrent.py                 # all runs, one after another, then the report
    python benchmark/recurrent.py --report        # the report alone, from the CSVs

Both learn CartPole from positions alone, with the same flags: ppo_cartpole.py, and a copy of it
with examples/recurrent.patch, which this file makes. Runs live in runs/recurrent/, and the copy
with them. One that was interrupted goes on at its last checkpoint, a finished one is left alone.
Results are benchmark/results/recurrent/: runs.csv and curves.csv; from these the report makes
summary.md and curves.png.
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, UserError, cli, markdown, plot, scores, sweep
from benchmark.sweep import ROOT, numbers

RUNS = Path("runs/recurrent")  # below ROOT, where the runs are started
RESULTS = ROOT / "benchmark/results/recurrent"
PATCH = "examples/recurrent.patch"
TRAINERS = {"feed-forward": "ppo_cartpole", "recurrent": "ppo_recurrent"}
FLAGS = "--env-id examples:PositionOnlyCartPole-v1 --total-timesteps 500000"
# a small weight of the value loss: its norm would decide how far the policy's gradient is shrunk.
# Advantages as they are: once the value function is exact they are noise, and small; standardised,
# they would drive the policy away from what it has learned
FLAGS += " --num-envs 64 --num-steps 32 --num-minibatches 16 --learning-rate 0.001"
FLAGS += " --vf-coef 0.01 --norm-adv none"
SEEDS = range(1, 6)
SOLVED = 450  # mean return of an evaluation, of at most 500

COLUMNS = "policy env_id seed command started git_commit torch gymnasium python total_timesteps"
COLUMNS += " wall_seconds sps last_100_return eval_return_mean eval_return_std eval_episodes"
COLUMNS += " first_step_at_threshold cpu cores"
LAYOUT = sweep.Layout(
    key=("policy", "seed"),
    columns=tuple(COLUMNS.split()),
    curves={"episodic_return": plot.RETURN},
    order={"policy": list(TRAINERS)},
    points=100,
    measure=sweep.first_step_at_threshold,
)


def make_recurrent() -> None:
    """Write the recurrent script beside its runs, and let Python find it.

    Raises UserError where the patch does not apply.
    """
    folder = ROOT / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    command = ["patch", "--fuzz=0", f"--output={folder / 'ppo_recurrent.py'}"]
    command += [str(ROOT / "ppo_cartpole.py"), str(ROOT / PATCH)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as reason:
        raise UserError(f"there is no program `patch`: {reason}") from reason
    if done.returncode:
        raise UserError(f"{PATCH} does not apply: {' '.join(done.stdout.split())}")
    sys.path.insert(0, str(folder))  # a new process takes it over


def call(policy: str, seed: int) -> sweep.Call:
    labels = {"policy": policy, "threshold": SOLVED}
    folder = RUNS / policy / str(seed)
    return sweep.script(TRAINERS[policy], f"{FLAGS} --seed {seed}", folder, labels)


# ---------------------------------------------------------------------------------------- REPORT
def summarise(policy: str, runs: pd.DataFrame) -> dict:
    """A policy's row of summary.md, from its rows of runs.csv."""
    evaluated = numbers(runs["eval_return_mean"])
    mean, low, high = scores.mean_interval(evaluated.to_numpy())
    steps = numbers(runs["first_step_at_threshold"])
    return {
        "policy": policy,
        "evaluation, mean": f"{mean:.1f}",
        "95% interval": f"{low:.1f} to {high:.1f}",
        "worst seed": f"{evaluated.min():.1f}",
        "best seed": f"{evaluated.max():.1f}",
        f"seeds at {SOLVED} or above": f"{(evaluated >= SOLVED).sum()} of {len(runs)}",
        "last 100 of training, mean": f"{numbers(runs['last_100_return']).mean():.1f}",
        f"steps to {SOLVED}, slowest": f"{steps.max():,.0f}" if steps.notna().all() else "never",
        "steps/s, median": f"{numbers(runs['sps']).median():,.0f}",
    }


NOTE = f"""
"Evaluation" is greedy, on seeds that training never used; the interval is the bootstrap over seeds.
"Steps to {SOLVED}" are those until 100 consecutive episodes of training return that much, on
average.
"""


def report() -> None:
    """Write summary.md and the picture from the CSVs, always the same bytes.

    Raises OSError where there is none.
    """
    runs = sweep.read(RESULTS / "runs.csv")
    text = "# CartPole with the velocities hidden\n\n"
    text += f"    patch -o ppo_recurrent.py ppo_cartpole.py {PATCH}\n"
    table = []
    for policy, mine in runs.groupby("policy", sort=False):
        first, last = mine["seed"].iloc[[0, -1]]
        flags = mine["command"].iloc[0].partition(f" --seed {first} ")[0]
        text += f"    {flags} --seed S  # S = {first} to {last}\n"
        table.append(summarise(policy, mine))
    text += f"\n{sweep.describe(runs, 'gymnasium')}\n\n{markdown(table)}{NOTE}"
    sps = runs.assign(sps=numbers(runs["sps"])).pivot(index="seed", columns="policy", values="sps")
    slower = sps["feed-forward"] / sps["recurrent"]
    text += "\nWith the memory, a run of the same seed, made just before or after, took "
    text += f"{slower.median():.1f} times as long per step ({slower.min():.1f} to "
    text += f"{slower.max():.1f}).\n\n![Learning curves](curves.png)\n"
    (RESULTS / "summary.md").write_text(text)
    points = sweep.read(RESULTS / "curves.csv")
    groups = plot.groups_of(points, "policy", "episodic_return")
    plot.draw(RESULTS / "curves.png", {runs["env_id"].iloc[0].rpartition(":")[2]: groups}, SOLVED)


def main(argv: list[str]) -> None:
    parser = Parser("A policy with a memory where the velocities are hidden, against one without.")
    sweep.add_flags(parser)
    args = parser.parse_args(argv)
    if not args.report:
        make_recurrent()
        # side by side in time: what else the machine does slows both
        calls = [call(policy, seed) for seed in SEEDS for policy in TRAINERS]
        sweep.complete(RESULTS, LAYOUT, calls, sweep.choose_engine(args))
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
