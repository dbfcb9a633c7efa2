"""Bring the documents up to date with the code and the results: `python benchmark/readme.py`.

Three things in README.md, benchmark/README.md and docs/ are written here and nowhere else:

    <!-- begin NAME -->     all up to <!-- end NAME -->: tables and whole results
    [`code`](FILE.py#L1)    the number: the one line of FILE.py that contains this code
    a chapter of a result   present where benchmark/results/NAME/summary.md is

No result is typed here.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, UserError, cli, markdown, read_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results"
SCRIPTS = ("ppo_cartpole.py", "ppo_continuous.py", "ppo_atari.py")
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
    13: ("Policy and value function: shared or separate networks", "section 6.1"),
}


def line_of(script: str, code: str) -> int:
    """The number of the one line of a script that contains this code. Raises UserError."""
    lines = (ROOT / script).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        raise UserError(f"{script} holds {code!r} in {len(found)} lines, not in one")
    return found[0]


def details() -> str:
    """The table of the core details, and in which line of each script each stands."""
    rows = []
    for n, (what, source) in DETAILS.items():
        row = {"n": n, "detail": what}
        for script in SCRIPTS:
            number = line_of(script, f"[detail {n}]")
            row[script] = f"[{number}](../{script}#L{number})"
        rows.append(row | {"from": source})
    return markdown(rows).strip()


def result(path: str) -> str:
    """A committed result, without its title."""
    return re.sub(r"\A# .*\n+", "", (RESULTS / path).read_text()).strip("\n")


def section(path: str, title: str) -> str:
    """One section of a committed result, without its title and its picture."""
    text = (RESULTS / path).read_text()
    return re.search(rf"^##? {title}\n(.*?)^!\[", text, re.S | re.M)[1].strip("\n")


def table(path: str) -> list[dict[str, str]]:
    """The rows of the first table of a committed result."""
    lines = (RESULTS / path).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    head, _, *rows = rows
    return [dict(zip(head, row, strict=True)) for row in rows]


def transcript() -> str:
    """What the default command printed for the first seed."""
    lines = result("classic/transcript.md").splitlines()
    command, printed = lines[:2]
    return f"{command}\n{printed}"


def speed_short() -> str:
    """Of the table in speed/mujoco.md, the rows of those that learn and the plainest columns."""
    wanted = ("contestant", "steps/s", "per core", "memory, GB")
    rows = [row for row in table("speed/mujoco.md") if row["first update, s"]]
    ratios = {}  # per core; Stable-Baselines3 has one
    for row in rows:
        steps, per_core = (float(row[name].replace(",", "")) for name in ("steps/s", "per core"))
        found = re.findall(r"[\d.]+", row["times Stable-Baselines3 PPO"])  # median, and two bounds
        median, *bounds = (f"{float(x) * per_core / steps:.1f}" for x in found)
        ratios[row["contestant"]] = f"{median} ({' to '.join(bounds)})" if bounds else median
    one, *_, many = [ratio for name, ratio in ratios.items() if "continuous" in name]
    said = f"Per core, after compilation, one agent is {one} times as fast as "
    said += "Stable-Baselines3, and 33 agents side by side ([lockstep.py](benchmark/lockstep.py)) "
    said += f"are {many} times as fast."
    return f"{markdown([{name: row[name] for name in wanted} for row in rows])}\n{said}"


def atari_of_others() -> str:
    """paper/atari.csv, without where the numbers are from."""
    rows = read_csv(ROOT / "benchmark/paper/atari.csv")
    return markdown([{name: row[name] for name in row if name != "where"} for row in rows]).strip()


def lunarlander(row: dict[str, str]) -> str:
    """How many runs solve it: those of classic/, from its table, and of ratchet/ with its flags."""
    highest = {}
    for point in read_csv(RESULTS / "ratchet/curves.csv"):
        if (point["experiment"], point["objective"]) == ("lunarlander", "clip:0.2"):
            mean = float(point["episodic_return"] or "-inf")
            highest[point["seed"]] = max(mean, highest.get(point["seed"], mean))
    reached, runs = map(int, row["seeds that reach it"].split(" of "))
    reached += sum(mean >= float(row["threshold"]) for mean in highest.values())
    return f"{reached} of {runs + len(highest)} runs solve it"


def ends(rows: list[dict], column: str) -> tuple[str, str]:
    """The objectives with the highest and with the lowest score in this column, and the scores."""
    ordered = sorted(rows, key=lambda row: float(row[column].split()[0]))
    lowest, *_, highest = [f"{row['objective']} {row[column]}" for row in ordered]
    return highest, lowest


def in_short() -> str:
    """The table of results on the front page: a sentence for each, from the committed tables."""
    scores = table("table1/scores.md")
    highest, lowest = ends(scores, "ours: mean [95%]")
    paper_highest, paper_lowest = ends(scores, "the paper")
    seeds = re.search(r"7 tasks x (\d+) seeds", result("table1/scores.md"))[1]
    spearman = r"^\| Spearman [^|]*\|[^|]*\| ([^|]*) \|"  # in the first reading of 0 and 1
    alike = re.search(spearman, result("table1/summary.md"), re.M)[1]
    finals = []
    for row in table("defaults/summary.md"):
        finals.append(f"{row['task'].removesuffix('-v4')} {row['greedy: mean [95%]'].split()[0]}")
    against = re.search(r"^Our mean is (.*)\.$", result("defaults/summary.md"), re.M)[1]
    firsts = re.search(r"^\| \*\*PPO first\*\* \|(.*)\|$", result("figure3/summary.md"), re.M)[1]
    in_paper, frozen, learned = firsts.split("|")
    classic = {row["task"]: row for row in table("classic/summary.md")}
    humanoid = table("humanoid/summary.md")[0]
    pong = table("atari/summary.md")[0]
    grpo = {row[""]: row for row in table("grpo/summary.md")}
    found = {
        f"[Table 1](benchmark/README.md#the-papers-table-1), limits as ends, {seeds} seeds": (
            f"Highest {highest}, lowest {lowest}; in the paper, on another scale, {paper_highest}, "
            f"{paper_lowest}. Rank correlation {alike}"
        ),
        "[Figure 3](benchmark/README.md#figure3), three seeds or more": (
            f"PPO is first on{frozen}with TRPO's sigma frozen, on{learned}with it learned; "
            f"the paper:{in_paper.rstrip()}"
        ),
        "[MuJoCo](benchmark/README.md#defaults), defaults, ten seeds, greedy": (
            f"{', '.join(finals)}. Beside Tianshou's ten seeds our mean is {against}"
        ),
        "[CartPole](benchmark/README.md#cartpole-acrobot-lunarlander-ppo_cartpolepy)": (
            f"{classic['cartpole']['seeds that reach it']} seeds solve it"
        ),
        "[LunarLander](benchmark/README.md#cartpole-acrobot-lunarlander-ppo_cartpolepy)": (
            lunarlander(classic["lunarlander"])
        ),
        "[Humanoid](benchmark/README.md#humanoid), 10M steps": (
            f"it runs: {humanoid['Gymnasium: return']} at {humanoid['Gymnasium: m/s']} m/s; "
            f"lowest to highest of {humanoid['seeds'].split()[0]} seeds"
        ),
        "[Pong](benchmark/README.md#atari-ppo_ataripy), one seed": (
            f"{pong['last 100 games, mean']} after {pong['steps']} steps"
        ),
        "[GRPO](benchmark/README.md#grpo-grpo_toypy), held-out questions": (
            f"share that is right: sort {grpo['sort']['pass@1 before']} before training, "
            f"{grpo['sort']['pass@1 after']} after; countdown {grpo['countdown']['pass@1 before']} "
            f"before, {grpo['countdown']['pass@1 after']} after"
        ),
    }
    return markdown([{"what": what, "result": text} for what, text in found.items()]).strip()


RERUN = {  # folder of results -> what it holds, the commands for all of it
    "table1": (
        "[Table 1, time limits as ends, ten seeds](#table1)",
        ["table1.py --results mine/table1"],
    ),
    "table1-bootstrapped": (
        "[Table 1, time limits bootstrapped](#with-time-limits-bootstrapped-three-seeds)",
        ["table1.py --seeds 1 2 3 --results mine/bootstrapped -- --bootstrap-truncated"],
    ),
    "time-limits": (
        "[two of its tasks, time limits bootstrapped, ten seeds](../docs/double-pendulum.md)",
        [
            "table1.py --tasks InvertedDoublePendulum HalfCheetah --objectives none clip:0.2 "
            "--results mine/time-limits -- --bootstrap-truncated"
        ],
    ),
    "table1-modern": (
        "[Table 1 with today's details](#with-todays-details)",
        ["table1.py --preset modern --results mine/modern"],
    ),
    "defaults/final": (
        "[defaults on MuJoCo](#defaults)",
        ["defaults.py --results mine/defaults"],
    ),
    "defaults/search": (
        "the search for them",
        ["defaults.py --search --results mine/defaults"],
    ),
    "figure3": ("[Figure 3](#figure3)", ["figure3.py --results mine/figure3"]),
    "humanoid": (
        "[Humanoid](#humanoid)",
        ["humanoid.py", "humanoid.py --ablation defaults fixed-lr sigma-1"],
    ),
    "recurrent": ("[a policy with memory](#recurrent)", ["recurrent.py"]),
    "collapse/HalfCheetah-v4": (
        "[HalfCheetah's collapse](../docs/halfcheetah.md)",
        ["collapse.py --results mine/collapse"],
    ),
    "collapse/InvertedDoublePendulum-v4": (
        "[the double pendulum's fall](../docs/double-pendulum.md)",
        ["collapse.py --task InvertedDoublePendulum-v4 --results mine/collapse"],
    ),
    "ratchet": (
        "[with the clip and without it](#with-the-clip-and-without-it-ppo_cartpolepy)",
        ["ratchet.py"],
    ),
    "classic": (
        "[CartPole, Acrobot, LunarLander](#cartpole-acrobot-lunarlander-ppo_cartpolepy)",
        ["classic.py"],
    ),
    "atari": ("[Pong](#atari-ppo_ataripy)", ["atari.py"]),
    "grpo": ("[GRPO](#grpo-grpo_toypy)", ["grpo.py"]),
}


def hours_of(folder: str) -> float:
    """How long the runs of a folder of results ran, agents that shared a process counted once."""
    seconds = {}
    for file in (RESULTS / folder).rglob("runs.csv"):
        for i, run in enumerate(read_csv(file)):
            call = file, run.get("command", i), run.get("started", i)
            seconds[call] = float(run["wall_seconds"])
    return sum(seconds.values()) / 3600


def rerun() -> str:
    """What makes each committed result again, and for how many hours its runs ran."""
    rows = []
    for folder, (what, commands) in RERUN.items():
        path = RESULTS / folder
        summaries = [place / "summary.md" for place in (path, path.parent)]
        summaries = [summary for summary in summaries if summary.exists()]
        if summaries:
            told = "<br>".join(f"`python benchmark/{command}`" for command in commands)
            hours = f"{hours_of(folder):.1f}"
            if any("**PARTIAL" in summary.read_text() for summary in summaries):
                hours += " so far"
            rows.append({"what": what, "command": told, "hours": hours})
    return markdown(rows).strip()


def chapter(folder: str, count: int = 1) -> str:
    """A committed result with its first `count` sections; empty where there is none."""
    path = RESULTS / folder / "summary.md"
    if not path.exists():
        return ""
    title, _, text = path.read_text().partition("\n")
    lead, *sections = re.split(r"^(?=## )", text, flags=re.M)
    text = (lead + "".join(sections[:count])).strip("\n")
    text = re.sub(r"^## ", "#### ", text, flags=re.M)
    text = re.sub(r"\]\((?!https?:|#)", f"](results/{folder}/", text)
    text = text.replace(f"](results/{folder}/../", "](results/")
    heading = f'<a id="{folder}"></a>\n\n### {title.removeprefix("# ")}'
    return f"{heading}\n\n{text}\n\nAll of it: [summary.md](results/{folder}/summary.md)."


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {  # document -> block -> what writes it
    "README.md": {
        "transcript": transcript,
        "speed-short": speed_short,
        "in-short": in_short,
    },
    "benchmark/README.md": {
        "rerun": rerun,
        "table1": partial(chapter, "table1", 3),  # scores, contrasts, time limits
        "table1-bootstrapped": partial(result, "table1-bootstrapped/scores.md"),
        "table1-learning": partial(result, "table1-bootstrapped/learning.md"),
        "table1-modern": partial(result, "table1-modern/scores.md"),
        "defaults": partial(chapter, "defaults"),
        "figure3": partial(chapter, "figure3", 6),  # all but KLs and origin
        "humanoid": partial(chapter, "humanoid"),
        "recurrent": partial(chapter, "recurrent"),
        "classic": partial(result, "classic/summary.md"),
        "transcript-all": partial(result, "classic/transcript.md"),
        "ratchet-lunarlander": partial(section, "ratchet/summary.md", "LunarLander-v3"),
        "ratchet-cartpole": partial(section, "ratchet/summary.md", "CartPole-v1"),
        "atari": partial(result, "atari/summary.md"),
        "atari-others": atari_of_others,
        "grpo": partial(section, "grpo/summary.md", "The two tasks at their defaults"),
        "speed-mujoco": partial(result, "speed/mujoco.md"),
        "speed-trpo": partial(result, "speed/trpo.md"),
        "speed-atari": partial(result, "speed/atari.md"),
        "speed-cartpole": partial(result, "speed/cartpole.md"),
        "speed-process": partial(result, "speed/process.md"),
        "speed-grpo": partial(result, "speed/grpo.md"),
        "speed-gpu": partial(result, "speed/gpu.md"),
    },
    "docs/details.md": {"details": details},
    "docs/double-pendulum.md": {
        "collapse-pendulum": partial(
            section,
            "collapse/InvertedDoublePendulum-v4/summary.md",
            "InvertedDoublePendulum-v4, one detail at a time",
        ),
    },
    "docs/halfcheetah.md": {
        "collapse-cheetah": partial(
            section, "collapse/HalfCheetah-v4/summary.md", "HalfCheetah-v4, one detail at a time"
        ),
    },
}


def documents() -> list[str]:
    """All that people read, relative to the root of the repository."""
    docs = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    return ["README.md", "benchmark/README.md", *(f"docs/{name}" for name in docs)]


def renew(name: str, text: str) -> str:
    """The text of a document with every block and every line number written anew.

    Raises UserError where a block or a quoted line is missing.
    """
    for block, write in BLOCKS.get(name, {}).items():
        begin, end = f"<!-- begin {block} -->", f"<!-- end {block} -->"
        inside = write()
        whole = f"{begin}\n{inside}\n{end}" if inside else f"{begin}\n{end}"
        text, found = re.subn(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, flags=re.S)
        if found != 1:
            raise UserError(f"{name} must hold the block {block} once, not {found} times")

    def numbered(link: re.Match) -> str:
        code, path, script = link.groups()
        return f"[`{code}`]({path}{script}#L{line_of(script, code)})"

    return re.sub(r"\[`([^`\n]+)`\]\(((?:\.\./)*)(\w+\.py)#L\d+\)", numbered, text)


def main(argv: list[str]) -> None:
    """Bring all documents up to date. Raises UserError before it has changed any of them."""
    Parser(__doc__).parse_args(argv)
    texts = {name: renew(name, (ROOT / name).read_text()) for name in documents()}
    for name, text in texts.items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    cli(main)
