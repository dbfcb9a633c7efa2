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

import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_toy
from benchmark import (
    Parser,
    UserError,
    check_config,
    classic,
    cli,
    git_commit,
    machine,
    markdown,
    merge_runs,
    plot,
    positive,
    read_csv,
)
from grpo_toy import END, Args, Task, parse_args, train

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/grpo")  # below ROOT
RESULTS = ROOT / "benchmark/results/grpo"
SEEDS = range(1, 6)
POINTS = 100  # of a run in curves.csv, at most


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
class Key(NamedTuple):
    """A run: of which ablation, with which value, from which seed."""

    ablation: str
    value: str
    seed: int

    def folder(self) -> Path:
        """Below ROOT."""
        return RUNS / self.ablation / self.value / str(self.seed)

    def flags(self) -> str:
        """Of grpo_toy.py."""
        ablation = ABLATIONS[self.ablation]
        return f"{ablation.flags} {ablation.values[self.value]} --seed {self.seed}".strip()


def grid(ablations: list[str]) -> list[Key]:
    return [
        Key(name, value, seed)
        for name in ablations
        for value in ABLATIONS[name].values
        for seed in SEEDS
    ]


def work(key: Key) -> None:
    """--worker: the run itself; what it prints is not needed."""
    args = parse_args([*key.flags().split(), "--run-dir", str(ROOT / key.folder())])
    task = ramble_task() if args.task == "ramble" else None
    if (ROOT / key.folder() / "config.json").exists():
        args = Args(resume=args.run_dir)
    try:
        train(args, task)
    except (grpo_toy.UserError, grpo_toy.NonFiniteError) as reason:
        raise UserError(str(reason)) from reason


def read_config(key: Key) -> dict:
    """The config.json of a run. Raises UserError where there is none, or where it is not that of the run's flags."""
    flags = vars(parse_args(key.flags().split()))
    wanted = {
        name: value for name, value in flags.items() if value is not None
    }  # None: filled in by the script
    return check_config(ROOT / key.folder(), wanted)


def complete(key: Key) -> None:
    """Start a run, go on with it, or leave it alone, whatever its folder asks for. Raises UserError where it fails."""
    path = ROOT / key.folder()
    if (path / "summary.json").exists():
        return
    if not (path / "config.json").exists():
        shutil.rmtree(path, ignore_errors=True)  # stopped before its first file was whole
    classic.execute([__file__, "--worker", *map(str, key)])


def mean(cells: list[str]) -> float:
    """Of the cells that are not empty; NaN of none."""
    return np.mean([float(cell) for cell in cells if cell] or [np.nan]).item()


def read_run(key: Key) -> tuple[dict, list[dict]]:
    """A finished run's row of runs.csv and its rows of curves.csv, each the mean over a stretch of updates. Raises
    UserError where a file does not fit."""
    config, path, who = read_config(key), ROOT / key.folder(), key._asdict()
    try:
        (summary,) = json.loads((path / "summary.json").read_text())
        wanted = "task total_timesteps wall_seconds warmup_seconds k "
        wanted += "pass@1_before pass@k_before pass@1_after pass@k_after"
        row = who | {"flags": key.flags()} | {name: summary[name] for name in wanted.split()}
        versions = {name: config["versions"][name] for name in ("torch", "python")}
        row |= {"started": config["started"], "git_commit": git_commit()} | versions | machine()
        points, metrics = [], read_csv(path / "metrics.csv")
        for stretch in np.array_split(np.arange(len(metrics)), min(POINTS, len(metrics))):
            means = {name: mean([metrics[i][name] for i in stretch]) for name in METRICS}
            shown = {name: "" if np.isnan(x) else f"{x:.6g}" for name, x in means.items()}
            points.append(who | {"global_step": metrics[stretch[-1]]["global_step"]} | shown)
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{key.folder()} cannot be reported: {reason!r}") from reason
    return row, points


def run_all(ablations: list[str], jobs: int) -> None:
    """Complete all runs, `jobs` at a time, and put them into runs.csv and curves.csv, where those of other ablations
    stay. One that fails does not stop the others; then UserError."""
    keys = grid(ablations)
    for key in keys:
        if (ROOT / key.folder() / "config.json").exists():
            read_config(key)  # refuse what could not be reported now, not after hours
    classic.each(complete, keys, jobs)
    merge_runs(RESULTS, list(map(read_run, keys)), "ablation", list(ABLATIONS))


# ---------------------------------------------------------------------------------------------------------- REPORT
def said(values: np.ndarray, form: str) -> str:
    """The mean of one number per seed, and its bootstrap 95% interval."""
    ((middle,), (low,), (high,)) = plot.interval(values[:, None])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def outcome(ablation: Ablation, points: list[dict], weights: Weights) -> dict[str, np.ndarray]:
    """label -> the outcome of each seed."""
    found = {}
    for label in ablation.values:
        for seed in sorted({point["seed"] for point in points}, key=int):
            mine = [point for point in points if (point["value"], point["seed"]) == (label, seed)]
            answers = np.diff(
                [0.0, *(float(point["global_step"]) for point in mine)]
            )  # in each stretch
            parts = [
                [weight * float(point[column] or "nan") for column, weight in weights]
                for point in mine
            ]
            total = np.sum(
                parts, axis=1
            )  # NaN where a column is empty: lengths are compared within a stretch
            seen = ~np.isnan(total)
            found.setdefault(label, []).append(
                np.average(total[seen], weights=answers[seen]).item()
            )
    return {label: np.array(values) for label, values in found.items()}


def table(ablation: Ablation, runs: list[dict], points: list[dict]) -> list[dict]:
    """An ablation's rows of summary.md, from its rows of runs.csv and curves.csv."""
    found, lines = (
        {name: outcome(ablation, points, weights) for name, weights in ablation.outcomes.items()},
        [],
    )
    for label in ablation.values:
        mine = [run for run in runs if run["value"] == label]
        numbers = {
            name: np.array([float(run[name]) for run in mine])
            for name in mine[0]
            if re.match("pass|wall|warm", name)
        }
        line = {
            "": label,
            "flags": f"`{ablation.values[label]}`",
            "answers": f"{int(mine[0]['total_timesteps']):,}",
        }
        for name, of_label in found.items():
            line[name] = said(of_label[label], ".3f")
            if ablation.default:
                difference = (
                    of_label[label] - of_label[ablation.default]
                )  # of one seed: the same first weights
                _, (low,), (high,) = plot.interval(difference[:, None])
                shown = f"{said(difference, '+.3f')}{', no difference seen' if low <= 0 <= high else ''}"
                line[f"{name}: difference from {ablation.default}"] = (
                    "" if label == ablation.default else shown
                )
        line["pass@1 before"] = f"{numbers['pass@1_before'].mean():.3f}"
        line["pass@1 after"] = said(numbers["pass@1_after"], ".3f")
        line["worst seed"] = f"{numbers['pass@1_after'].min():.3f}"
        for when in ("before", "after"):
            line[f"pass@{mine[0]['k']} {when}"] = f"{numbers[f'pass@k_{when}'].mean():.3f}"
        line["seconds"] = f"{np.median(numbers['wall_seconds']):.0f}"
        line["of them warm-up"] = f"{np.median(numbers['warmup_seconds']):.0f}"
        lines.append(line)
    return lines


def draw(path: Path, ablation: Ablation, points: list[dict]) -> None:
    """A picture of one ablation: its three panels, all values in each."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(ablation.panels))
    for ax, column in zip(axes, ablation.panels, strict=True):
        seen = [point for point in points if point[column]]
        curve = ((p["value"], p["seed"], float(p["global_step"]), float(p[column])) for p in seen)
        plot.curves(ax, plot.gather(("", *point) for point in curve)[""], list(ablation.values))
        ax.set_title(METRICS[column], fontsize="medium")
        ax.set(xlabel="sampled answers", ylabel="")
    count = len(ablation.values)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=count, frameon=False
    )
    figure.savefig(path, dpi=150)


NOTE = """
Shares are means over all answers sampled in training; differences of length are means over the stretches of training
that had both right and wrong answers; then over seeds, with bootstrap 95% intervals over seeds. Differences are between
runs of one seed, which start from the same weights. "No difference seen" stands where the interval of the difference
contains 0: five seeds would miss a small one, and, as a bootstrap of five is too narrow (it covers about 85%), about
one in seven would show where there is none. pass@1 is the share of held-out questions (repeats included) whose greedy
answer is right, pass@16 that of those to which one of 16 sampled answers is; "before" is after any warm-up. Pictures:
means over seeds with bootstrap 95% intervals. Seconds are medians, from the start to the end of the last update, so the
warm-up and the first evaluation are in them, the last evaluation is not; runs may have shared the machine, so they are
no measurement of speed.
"""


def report() -> None:
    """Write summary.md and the pictures from the CSVs, always the same bytes. Raises OSError where there is none."""
    runs, points = (read_csv(RESULTS / name) for name in ("runs.csv", "curves.csv"))
    text = "# GRPO: two tasks and some ablations\n\n"
    for name in dict.fromkeys(run["ablation"] for run in runs):
        ablation = ABLATIONS[name]
        mine, curves = ([row for row in rows if row["ablation"] == name] for rows in (runs, points))
        text += f"## {ablation.title}\n\n"
        seeds = f"{mine[0]['seed']} to {mine[-1]['seed']}"
        text += f"`{f'python grpo_toy.py {ablation.flags}'.strip()}`, seeds {seeds}.\n\n"
        text += f"{markdown(table(ablation, mine, curves))}\n![{ablation.title}]({name}.png)\n\n"
        draw(RESULTS / f"{name}.png", ablation, curves)
    days = sorted(run["started"][:10] for run in runs)
    text += f"{NOTE.strip()}\n\n{' to '.join(dict.fromkeys((days[0], days[-1])))}"
    for name in ("python", "torch", "git_commit", "cpu", "cores"):
        text += f"; {name.replace('_', ' ')} {' and '.join(sorted({run[name] for run in runs}))}"
    (RESULTS / "summary.md").write_text(text + "\n")


def main(argv: list[str]) -> None:
    parser = Parser(
        "Ablations of GRPO: baseline, group size, gradient steps per batch, KL penalty, aggregation."
    )
    parser.add_argument(
        "--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), help="which of them"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time, each on one thread"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the report of the CSVs there are"
    )
    parser.add_argument(
        "--worker", nargs=3, metavar=("ABLATION", "VALUE", "SEED"), help="one run, here and now"
    )
    args = parser.parse_args(argv)
    if args.worker:
        work(Key(args.worker[0], args.worker[1], int(args.worker[2])))
        return
    if not args.report:
        run_all(args.ablations, args.jobs)
    report()
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
