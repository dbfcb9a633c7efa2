"""The documented results of grpo_toy.py with five seeds: its two tasks, and which parts of GRPO matter.

    python benchmark/grpo.py                      # all runs, one after another, then the report
    python benchmark/grpo.py --jobs 2             # two at a time
    python benchmark/grpo.py --ablations mu beta  # some of them
    python benchmark/grpo.py --report             # the report alone, from the CSVs

First both tasks at their defaults. Then ablations: what the baseline is, how large a group, how many gradient steps a
batch, how heavy the KL penalty, how tokens are averaged. Within an ablation everything else is the same, the number of
sampled answers and the five seeds included. The last one is a demonstration, on a task made for it, `ramble`: whether
an answer is right is settled by its first word, and filler may follow. Dividing by the answer's length, as GRPO does,
punishes every word of a long wrong answer less than those of a short one, and rewards every word of a short right
answer more than those of a long one (Liu et al. 2025, https://arxiv.org/abs/2503.20783).

Runs live in runs/grpo/ and may be interrupted, as those of benchmark/classic.py. The report is
benchmark/results/grpo/: runs.csv, curves.csv, summary.md and a picture per ablation.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_toy
from benchmark import Parser, cli, markdown, plot, scores, sweep
from benchmark.sweep import numbers
from grpo_toy import END, Args, Task

RUNS = Path("runs/grpo")  # below sweep.ROOT
RESULTS = sweep.ROOT / "benchmark/results/grpo"
SEEDS = range(1, 6)


# ---------------------------------------------------------------------------------------------------------- RAMBLE
def verify_first(prompt: list[str], answer: list[str]) -> float:
    """1 if the first word is the letter asked for, whatever follows."""
    return float(answer[0] == prompt[0])


def ramble_task(letters: str = "ABCD", longest: int = 20) -> Task:
    """From "C 4" to "C <end>", "C . <end>", "C . . <end>" and so on. The digit is there to be ignored; one of the ten
    is held out."""
    prompts = [[letter, digit] for digit in "0123456789" for letter in letters]
    vocab = [END, ".", *letters, *"0123456789"]
    return Task(
        "ramble",
        vocab,
        prompts[: -len(letters)],
        prompts[-len(letters) :],
        longest,
        verify_first,
        25_600,
    )


# this file is a trainer (benchmark/sweep.py): grpo_toy.py with one task more
parse_args = grpo_toy.parse_args
load_run = grpo_toy.load_run
UserError = grpo_toy.UserError


def train(args: Args):
    return grpo_toy.train(args, ramble_task() if args.task == "ramble" else None)


# ------------------------------------------------------------------------------------------------------- ABLATIONS
Weights = tuple[tuple[str, float], ...]  # a sum of columns of curves.csv
RIGHT = {"share of right answers": (("frac_right", 1.0),)}


class Ablation(NamedTuple):
    title: str
    flags: str  # of all its runs
    values: dict[str, str]  # what is compared: a label, and the flags that go with it
    default: str | None  # the label that the others are compared with
    panels: tuple[str, str, str]  # columns of metrics.csv, drawn side by side
    outcomes: dict[str, Weights] = RIGHT  # what is compared, as means over the whole run


METRICS = {  # columns of metrics.csv that curves.csv has, and what a picture calls them
    "frac_right": "share of right answers",
    "frac_reward_zero_std": "share of groups of equal rewards",
    "entropy": "entropy of a token",
    "kl_exact": "KL to the reference, of a token",
    "clip_ratio/region_mean": "share of tokens clipped",
    "losses/kl_after_update": "KL of an update, of a token",
    "losses/grad_norm": "norm of the gradient",
    "completions/mean_right_length": "length of right answers",
    "completions/mean_wrong_length": "length of wrong answers",
}
LENGTHS = "completions/mean_wrong_length", "completions/mean_right_length"
SORT = "--task sort --total-timesteps 60000"  # less than a third of its default: not all is learned yet
ABLATIONS = {
    "tasks": Ablation(
        "The two tasks at their defaults",
        "",
        {"sort": "--task sort", "countdown": "--task countdown"},
        None,
        ("frac_right", "entropy", "kl_exact"),
    ),
    "baseline": Ablation(
        "What is subtracted from the reward, all rewards divided by the standard deviation of the batch",
        f"{SORT} --scale-rewards batch",
        {name: f"--baseline {name}" for name in ("group", "batch", "leave-one-out", "none")},
        "group",
        ("frac_right", "losses/grad_norm", "entropy"),
    ),
    "group-size": Ablation(
        "The size G of a group, 512 answers in a batch",
        SORT,
        {
            f"G={size}": f"--group-size {size} --num-prompts {512 // size}"
            for size in (2, 4, 8, 16, 32)
        },
        "G=8",
        ("frac_right", "frac_reward_zero_std", "entropy"),
    ),
    "mu": Ablation(
        "The number mu of gradient steps on each batch",
        SORT,
        {f"mu={steps}": f"--num-iterations {steps}" for steps in (1, 2, 4, 8)},
        "mu=2",
        ("frac_right", "clip_ratio/region_mean", "losses/kl_after_update"),
    ),
    "beta": Ablation(
        "The weight beta of the KL to the reference",
        "--task countdown --total-timesteps 150000",
        {f"beta={beta}": f"--kl-coef {beta}" for beta in ("0", "0.01", "0.04", "0.07", "0.2")},
        "beta=0.07",
        ("frac_right", "kl_exact", "entropy"),
    ),
    "aggregation": Ablation(
        "How tokens are averaged, and how long answers become",
        "--task ramble --kl-coef 0 --num-iterations 1 --learning-rate 0.001 --no-anneal-lr",
        {name: f"--loss-agg {name}" for name in ("grpo", "dr_grpo", "dapo")},
        "grpo",
        ("frac_right", *LENGTHS),
        {
            "words by which wrong answers are longer than right ones": (
                (LENGTHS[0], 1.0),
                (LENGTHS[1], -1.0),
            )
        }
        | RIGHT,
    ),
}


# ------------------------------------------------------------------------------------------------------------ RUNS
COLUMNS = "ablation value seed flags task total_timesteps wall_seconds warmup_seconds k pass@1_before pass@k_before"
COLUMNS += " pass@1_after pass@k_after started git_commit torch python cpu cores"
LAYOUT = sweep.Layout(
    key=("ablation", "value", "seed"),
    columns=tuple(COLUMNS.split()),
    curves={name: name for name in METRICS},
    order={
        "ablation": list(ABLATIONS),
        "value": list(itertools.chain(*(ablation.values for ablation in ABLATIONS.values()))),
    },
    points=100,
    thin=sweep.average,
)


def calls(ablations: list[str]) -> list[sweep.Call]:
    """A call for every value and seed of these."""
    found = []
    for name in ablations:
        for value, seed in itertools.product(ABLATIONS[name].values, SEEDS):
            flags = f"{ABLATIONS[name].flags} {ABLATIONS[name].values[value]} --seed {seed}".strip()
            labels = {"ablation": name, "value": value, "flags": flags}
            found.append(
                sweep.script("benchmark.grpo", flags, RUNS / name / value / str(seed), labels)
            )
    return found


# ---------------------------------------------------------------------------------------------------------- REPORT
def mean_and_interval(values: np.ndarray, form: str) -> str:
    """The mean of one number per seed, and its bootstrap 95% interval."""
    mean, low, high = scores.mean_interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def outcome(points: pd.DataFrame, weights: Weights) -> dict[str, np.ndarray]:
    """label -> the outcome of each seed: the mean over the whole run, in which every answer weighs the same."""
    runs = [points["value"], points["seed"].astype(int)]
    steps = numbers(points["global_step"])
    answers = steps.groupby(runs).diff().fillna(steps)  # in each stretch
    # NaN where a column is empty: lengths are compared within a stretch
    total = sum(weight * numbers(points[column]) for column, weight in weights)
    means = (total * answers).groupby(runs).sum() / answers.where(total.notna()).groupby(runs).sum()
    return {label: mine.to_numpy() for label, mine in means.groupby("value")}


def table(ablation: Ablation, runs: pd.DataFrame, points: pd.DataFrame) -> list[dict]:
    """An ablation's rows of summary.md, from its rows of runs.csv and curves.csv."""
    found = {name: outcome(points, weights) for name, weights in ablation.outcomes.items()}
    lines = []
    for label, flags in ablation.values.items():
        mine = runs[runs["value"] == label]
        first = mine.iloc[0]
        line = {"": label, "flags": f"`{flags}`", "answers": f"{int(first['total_timesteps']):,}"}
        for name, of_label in found.items():
            line[name] = mean_and_interval(of_label[label], ".3f")
            if ablation.default:
                # runs of one seed start from the same weights
                difference = of_label[label] - of_label[ablation.default]
                _, low, high = scores.mean_interval(difference)
                shown = mean_and_interval(difference, "+.3f")
                shown += ", no difference seen" * bool(low <= 0 <= high)
                column = f"{name}: difference from {ablation.default}"
                line[column] = "" if label == ablation.default else shown
        after = numbers(mine["pass@1_after"]).to_numpy()
        line["pass@1 before"] = f"{numbers(mine['pass@1_before']).mean():.3f}"
        line["pass@1 after"] = mean_and_interval(after, ".3f")
        line["worst seed"] = f"{after.min():.3f}"
        for when in ("before", "after"):
            line[f"pass@{first['k']} {when}"] = f"{numbers(mine[f'pass@k_{when}']).mean():.3f}"
        line["seconds"] = f"{numbers(mine['wall_seconds']).median():.0f}"
        line["of them warm-up"] = f"{numbers(mine['warmup_seconds']).median():.0f}"
        lines.append(line)
    return lines


def draw(path: Path, ablation: Ablation, points: pd.DataFrame) -> None:
    """A picture of one ablation: its three panels, all values in each."""
    titles = {column: METRICS[column] for column in ablation.panels}
    figure = plot.side_by_side(points, titles, "value", list(ablation.values))
    for ax in figure.axes:
        ax.set_xlabel("sampled answers")
    plot.legend(figure, "lower", ncols=len(ablation.values))
    figure.savefig(path, dpi=150)


NOTE = """
Shares are means over all answers sampled in training; differences of length are means over the stretches of training
that had both right and wrong answers; then over seeds, with bootstrap 95% intervals over seeds. Differences are between
runs of one seed, which start from the same weights. "No difference seen" stands where the interval of the difference
contains 0: five seeds would miss a small one, and, as a bootstrap of five is too narrow (it covers about 85%), about
one in seven would show where there is none. pass@1 is the share of held-out questions whose greedy answer is right (500
questions, repeats included; in ramble four). pass@16 is the share to which at least one of 16 sampled answers is right.
"Before" is after any warm-up. Pictures: means over seeds with bootstrap 95% intervals. Seconds are medians, from the
start to the end of the last update, so the warm-up and the first evaluation are in them, the last evaluation is not;
runs may have shared the machine, so they are no measurement of speed.
"""


def report() -> None:
    """Write summary.md and the pictures from the CSVs, always the same bytes. Raises OSError where there is none."""
    runs, points = (sweep.read(RESULTS / name) for name in ("runs.csv", "curves.csv"))
    text = "# GRPO: two tasks and some ablations\n\n"
    for name, mine in runs.groupby("ablation", sort=False):
        ablation, curves = ABLATIONS[name], points[points["ablation"] == name]
        text += f"## {ablation.title}\n\n"
        first, last = mine["seed"].iloc[[0, -1]]
        made = f"`{f'python grpo_toy.py {ablation.flags}'.strip()}`"
        if name == "aggregation":  # grpo_toy.py has no task ramble
            made = f"`python benchmark/grpo.py --ablations {name}`, with `{ablation.flags}`"
        text += f"{made}, seeds {first} to {last}.\n\n"
        text += f"{markdown(table(ablation, mine, curves))}\n![{ablation.title}]({name}.png)\n\n"
        draw(RESULTS / f"{name}.png", ablation, curves)
    (RESULTS / "summary.md").write_text(f"{text}{NOTE.strip()}\n\n{sweep.describe(runs)}\n")


def main(argv: list[str]) -> None:
    parser = Parser(
        "Ablations of GRPO: baseline, group size, gradient steps per batch, KL penalty, aggregation."
    )
    what = "which of them"
    parser.add_argument(
        "--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), help=what
    )
    sweep.add_flags(parser)
    args = parser.parse_args(argv)
    if not args.report:
        sweep.complete(RESULTS, LAYOUT, calls(args.ablations), sweep.choose_engine(args))
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
