"""Bring README.md up to date with the code and the results: `python benchmark/readme.py`.

What stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is written here and nowhere else:
the table of implementation details from the markers in the scripts, everything else from
benchmark/results/. No number is typed.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import markdown, read_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results"
SCRIPTS = ("ppo_cartpole.py", "ppo_continuous.py")
DETAILS = {  # the thirteen core details of Huang et al. (2022), and where each comes from
    1: ("Vectorised environments: N actors, T steps each", "Algorithm 1"),
    2: (
        "Orthogonal initialisation, zero biases; "
        "gains sqrt 2, 0.01 for the policy, 1 for the value",
        "baselines ppo2",
    ),
    3: ("Adam with epsilon 1e-5", "baselines ppo1, ppo2"),
    4: ("Step size annealed linearly to 0", "baselines ppo2; the paper's Table 5"),
    5: (
        "Generalized advantage estimation; value targets are advantage + value",
        "eqs. 11-12; Schulman et al. 2016",
    ),
    6: ("Minibatches of shuffled transitions, every one once per epoch", "Algorithm 1"),
    7: ("Advantages standardised, by default within each minibatch", "baselines ppo2"),
    8: ("Clipped surrogate objective", "eq. 7"),
    9: ("Clipped value loss (off by default)", "baselines ppo1, ppo2"),
    10: ("One loss: policy, value, entropy", "eq. 9"),
    11: ("Gradient clipped by its global norm", "baselines ppo2"),
    12: (
        "What to watch: KL, clip fraction, losses; means over the whole update",
        "Schulman, KL approximation",
    ),
    13: ("Separate networks for policy and value", "section 6.1"),
}


def details() -> str:
    """The table of details, and in which line of each script its marker stands."""
    rows = []
    for n, (what, source) in DETAILS.items():
        row = {"n": n, "detail": what}
        for script in SCRIPTS:
            lines = enumerate((ROOT / script).read_text().splitlines(), 1)
            found = [i for i, line in lines if f"[detail {n}]" in line]
            row[script] = ", ".join(f"[{i}]({script}#L{i})" for i in found)
        rows.append(row | {"from": source})
    return markdown(rows).strip()


def result(path: str) -> Callable[[], str]:
    """What reads a committed result, without its title."""

    def read() -> str:
        return re.sub(r"\A# .*\n+", "", (RESULTS / path).read_text()).strip("\n")

    return read


def section(path: str, title: str) -> Callable[[], str]:
    """What reads one section of a committed result, without its title and its picture."""

    def read() -> str:
        text = (RESULTS / path).read_text()
        return re.search(rf"^##? {title}\n(.*?)^!\[", text, re.S | re.M)[1].strip("\n")

    return read


def speed_short() -> str:
    """Of the table in speed/mujoco.md, the rows of those that learn and the plainest columns."""
    lines = (RESULTS / "speed/mujoco.md").read_text().splitlines()
    lines = [line for line in lines if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    wanted = ("contestant", "steps/s", "per core", "memory, GB")
    return markdown([{k: row[k] for k in wanted} for row in rows if row["first update, s"]]).strip()


def atari_of_others() -> str:
    """paper/atari.csv, without where the numbers are from."""
    rows = read_csv(ROOT / "benchmark/paper/atari.csv")
    return markdown([{name: row[name] for name in row if name != "where"} for row in rows])


RERUN = {  # folder of results -> what it holds, the command for all of it
    "table1-bootstrapped": (
        "[Table 1](#the-papers-table-1)",
        "table1.py --seeds 1 2 3 --results mine/bootstrapped -- --bootstrap-truncated",
    ),
    "table1-modern": (
        "[Table 1 with today's details](#with-todays-details)",
        "table1.py --preset modern --results mine/modern",
    ),
    "collapse/HalfCheetah-v4": (
        "[HalfCheetah's collapse](#what-makes-halfcheetah-collapse)",
        "collapse.py --results mine/collapse",
    ),
    "collapse/InvertedDoublePendulum-v4": (
        "[the double pendulum's fall](#why-the-double-pendulum-falls)",
        "collapse.py --task InvertedDoublePendulum-v4 --results mine/collapse",
    ),
    "ratchet": (
        "[with the clip and without it](#with-the-clip-and-without-it-ppo_cartpolepy)",
        "ratchet.py",
    ),
    "classic": (
        "[CartPole, Acrobot, LunarLander](#cartpole-acrobot-lunarlander-ppo_cartpolepy)",
        "classic.py",
    ),
    "atari": ("[Pong](#atari-ppo_ataripy)", "atari.py"),
    "grpo": ("[GRPO](#grpo-grpo_toypy)", "grpo.py"),
}


def rerun() -> str:
    """What makes each committed result again, and for how many hours its runs ran."""
    rows = []
    for folder, (what, command) in RERUN.items():
        summary = (RESULTS / folder / "summary.md").read_text()
        told = re.search(r"trained for ([\d.]+) hours in all", summary)
        if told:  # of runs that share a process
            hours = float(told[1])
        else:
            runs = read_csv(RESULTS / folder / "runs.csv")
            hours = sum(float(run["wall_seconds"]) for run in runs) / 3600
        command = f"`python benchmark/{command}`"
        rows.append({"what": what, "command": command, "hours": f"{hours:.1f}"})
    return markdown(rows).strip()


BLOCKS = {
    "rerun": rerun,
    "speed-short": speed_short,
    "transcript": result("classic/transcript.md"),
    "details": details,
    "table1": result("table1-bootstrapped/scores.md"),
    "table1-learning": result("table1-bootstrapped/learning.md"),
    "collapse-pendulum": section(
        "collapse/InvertedDoublePendulum-v4/summary.md",
        "InvertedDoublePendulum-v4, one detail at a time",
    ),
    "collapse-cheetah": section(
        "collapse/HalfCheetah-v4/summary.md", "HalfCheetah-v4, one detail at a time"
    ),
    "table1-modern": result("table1-modern/scores.md"),
    "classic": result("classic/summary.md"),
    "ratchet-cartpole": section("ratchet/summary.md", "CartPole-v1"),
    "ratchet-lunarlander": section("ratchet/summary.md", "LunarLander-v3"),
    "mujoco": result("table1-modern/learning.md"),
    "atari": result("atari/summary.md"),
    "atari-others": lambda: atari_of_others().strip(),
    "grpo": section("grpo/summary.md", "The two tasks at their defaults"),
    "speed-mujoco": result("speed/mujoco.md"),
    "speed-atari": result("speed/atari.md"),
    "speed-cartpole": result("speed/cartpole.md"),
    "speed-grpo": result("speed/grpo.md"),
}


def renew(text: str) -> str:
    """README.md with every block written anew."""
    for name, write in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        block = f"{begin}\n{write()}\n{end}"
        text, found = re.subn(f"{begin}.*?{end}", lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            sys.exit(f"error: README.md must hold the block {name} once, not {found} times")
    return text


if __name__ == "__main__":
    (ROOT / "README.md").write_text(renew((ROOT / "README.md").read_text()))
