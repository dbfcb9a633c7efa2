"""The paper's Figure 2: what the surrogate objectives say along the direction of the first policy update on Hopper.

    python benchmark/figure2.py

Ten seeds of ppo_continuous.py with the paper's settings make their first update, side by side. Then the weights go
along the line theta_old + alpha (theta_new - theta_old), from alpha = -0.5 to 2, and at each of its points the batch of
that update is scored again: L^CPI (eq. 6), L^CLIP (eq. 7), E[clip(r) A] (eq. 7 without its minimum), E[KL[old, new]].

The update is train()'s own: what it hands to update(), and what it gets back, is all that is taken from it. Writes
figure2.csv, summary.md and figure2.png to benchmark/results/figure2/. The paper's curves beside ours are those of its
Figure 2, digitised (benchmark/paper/).
"""

import contextlib
import io
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous
from benchmark import Parser, cli, machine, markdown, plot, write_csv
from ppo_continuous import Agent, Args, Batch, average, gaussian_log_prob, parse_args, parse_objective, ppo_loss

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/figure2"
CLIP = "clip:0.2"
FLAGS = f"--env-id Hopper-v4 --preset paper --objectives {CLIP} --seeds 1 2 3 4 5 6 7 8 9 10 --total-timesteps 2048"
FLAGS += " --no-compile"  # one update is done before it would be compiled
ALPHAS = np.linspace(-0.5, 2, 101)  # the paper's range, 0 and 1 among them
CURVES = {  # ours -> the same in the file of the paper's curves, and in the picture
    "l_cpi": ("L_CPI", "$L^{CPI} = E[rA]$"),
    "clipped": ("E[clip(r)A]", "$E[\\mathrm{clip}(r)A]$"),
    "l_clip": ("L_CLIP", "$L^{CLIP}$"),
    "kl": ("E[KL]", "$E[KL]$"),
}
Curves = dict[str, np.ndarray]  # by name, each [P points, S seeds]


# --------------------------------------------------------------------------------------------------------- MEASURE
def first_update(flags: list[str]) -> tuple[Args, dict, dict]:
    """The flags with the preset filled in, the run's config.json, and of its only update: old and new weights and the
    batch, stacked over agents. Raises ppo_continuous.UserError for flags that make no sense."""
    args, seen = parse_args(Args, flags), {}
    args.check()
    learn = ppo_continuous.update

    def watched(step, learners: dict, batch: Batch, *rest) -> dict:
        learned = learn(step, learners, batch, *rest)
        seen.update(old=learners["weights"], new=learned["weights"], batch=batch)
        return learned

    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, patch.object(ppo_continuous, "update", watched), quiet:
        ppo_continuous.train(parse_args(Args, [*flags, "--run-dir", folder, "--eval-episodes", "1"]))
        config = json.loads((Path(folder) / "config.json").read_text())
    return args, config, seen


def score(model: Agent, args: Args, weights: Batch, batch: Batch) -> Batch:
    """What ONE agent with these weights gets for the batch: CURVES, and how far any transition's ratio is from 1."""
    policy, terms, epsilon = functional_call(model, weights, (batch["obs"],)), {}, parse_objective(CLIP).epsilon
    for name, objective in (("l_cpi", "none"), ("l_clip", CLIP)):
        knobs = {key: torch.tensor(x) for key, x in parse_objective(objective)._asdict().items() if x is not None}
        _, metrics = ppo_loss(policy, batch, knobs, args)
        terms[name] = -metrics["policy_loss"]
    ratio = (gaussian_log_prob(*policy[:2], batch["actions"]) - batch["log_prob"]).exp()
    terms["clipped"] = average(ratio.clamp(1 - epsilon, 1 + epsilon) * batch["advantages"], batch["valid"])
    return terms | {"kl": metrics["kl"], "furthest_ratio": ((ratio - 1).abs() * batch["valid"]).amax()}


@torch.no_grad()
def along_the_line(args: Args, seen: dict) -> Curves:
    """score() of every agent at theta_old + alpha (theta_new - theta_old), for each of ALPHAS."""
    old, new, batch = seen["old"], seen["new"], seen["batch"]
    model = Agent(batch["obs"].shape[-1], batch["actions"].shape[-1])
    scores = torch.vmap(partial(score, model, args))
    points = [scores({name: w.lerp(new[name], alpha) for name, w in old.items()}, batch) for alpha in ALPHAS.tolist()]
    return {name: torch.stack([point[name] for point in points]).double().numpy() for name in points[0]}


# ---------------------------------------------------------------------------------------------------------- REPORT
def at(alpha: float) -> int:
    """Its place in ALPHAS."""
    return int(np.abs(ALPHAS - alpha).argmin())


def read_paper() -> Curves:
    """The paper's curves, under our names: [2, P] each, alphas and values."""
    found = json.loads((ROOT / "benchmark/paper/figure2_surrogates.json").read_text())
    return {name: np.array(found[theirs]).T for name, (theirs, _) in CURVES.items()}


def summarise(seeds: tuple[int, ...], curves: Curves, paper: Curves) -> list[dict]:
    """The table of summary.md: every seed, all of them, the paper's curve."""
    clip = curves["l_clip"]
    numbers = {  # for each: of every seed, of the paper's curve, digits after the point
        "E[KL] at alpha = 1": (curves["kl"][at(1)], np.interp(1, *paper["kl"]), 4),
        "L^CLIP peaks at alpha": (ALPHAS[clip.argmax(0)], paper["l_clip"][0][paper["l_clip"][1].argmax()], 3),
        "L^CLIP there": (clip.max(0), paper["l_clip"][1].max(), 4),
    }
    table = [{"": f"seed {seed}"} for seed in seeds]
    table += [{"": "mean of the seeds (95% interval)"}, {"": "least and largest of them"}, {"": "the paper's curve"}]
    for name, (ours, theirs, digits) in numbers.items():
        mean, low, high, least, largest = (
            f"{x:.{digits}f}" for x in (*np.ravel(plot.interval(ours[:, None])), ours.min(), ours.max())
        )
        cells = [f"{x:.{digits}f}" for x in ours] + [f"{mean} ({low} to {high})", f"{least} to {largest}"]
        for row, cell in zip(table, [*cells, f"{theirs:.{digits}f}"], strict=True):
            row[name] = cell
    return table


def draw(path: Path, curves: Curves, paper: Curves) -> None:
    """Left the paper's figure, right L^CLIP alone with its peaks; ours with the interval of the mean, theirs dashed."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 3])
    right.plot(ALPHAS, curves["l_clip"], color="0.6", linewidth=0.5)
    for ax, names in ((left, list(CURVES)), (right, ["l_clip"])):
        for name in names:
            colour = plot.COLOURS[list(CURVES).index(name)]
            mean, low, high = plot.interval(curves[name].T)
            ax.fill_between(ALPHAS, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(ALPHAS, mean, color=colour, linewidth=2)
            ax.plot(*paper[name], "--", color=colour, linewidth=1.2)
            if ax is left:
                where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
                ax.annotate(CURVES[name][1], (ALPHAS[-1], mean[-1]), color=colour, **where)
        ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        ax.set_xticks([-0.5, 0, 1, 2], ["-0.5", "0\n$\\theta_{old}$", "1\n$\\theta_{new}$", "2"])
        ax.set(xlabel="$\\alpha$", xlim=(-0.5, 2))
        ax.spines[["top", "right"]].set_visible(False)
    for alphas, clip in ((ALPHAS, curves["l_clip"].mean(1)), paper["l_clip"]):
        right.plot(alphas[clip.argmax()], clip.max(), "o", color="0.1", markersize=5, zorder=3)
    left.set_title("surrogates along the first update, Hopper-v4", fontsize="medium")
    right.set_title("$L^{CLIP}$ alone", fontsize="medium")
    styles = {
        f"mean of {curves['kl'].shape[1]} seeds, 95% interval": {"color": "0.2", "linewidth": 2},
        "each seed": {"color": "0.6", "linewidth": 0.5},
        "the paper's figure": {"color": "0.2", "linewidth": 1.2, "linestyle": "--"},
        "maximum": {"color": "0.1", "linewidth": 0, "marker": "o", "markersize": 5},
    }
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def report(args: Args, config: dict, curves: Curves) -> None:
    """Write everything in RESULTS."""
    rows = [
        {"seed": seed, "alpha": f"{alpha:.3f}"} | {name: f"{curve[j, i]:.6g}" for name, curve in curves.items()}
        for i, seed in enumerate(args.seeds)
        for j, alpha in enumerate(ALPHAS)
    ]
    write_csv(RESULTS / "figure2.csv", rows)
    paper = read_paper()
    draw(RESULTS / "figure2.png", curves, paper)
    versions = "; ".join(f"{name} {number}" for name, number in config["versions"].items())
    apart, furthest = (x[at(0)].max() for x in (np.abs(curves["l_cpi"] - curves["l_clip"]), curves["furthest_ratio"]))
    (RESULTS / "summary.md").write_text(f"""# Figure 2: surrogates along the first update

    python benchmark/figure2.py

The update is the first one of `python ppo_continuous.py {FLAGS}`.

{config["started"][:10]}; {versions}; git commit {config["git_commit"]}; cpu {machine()["cpu"]}

{markdown(summarise(args.seeds, curves, paper))}
At alpha = 0, L^CPI and L^CLIP differ by {apart:.1g}, and the ratio furthest from 1 does by {furthest:.1g}.

![Surrogates along the first update](figure2.png)
""")


def main(argv: list[str]) -> None:
    Parser("Draw the paper's Figure 2: surrogates along the first update on Hopper.").parse_args(argv)
    args, config, seen = first_update(FLAGS.split())
    report(args, config, along_the_line(args, seen))
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
