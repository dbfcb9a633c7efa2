"""The paper's Figure 2: surrogate objectives along the direction of the first update on Hopper.

    python benchmark/figure2.py

Ten seeds of ppo_continuous.py with the paper's settings make their first update, side by side in
benchmark/lockstep.py. Then the weights go along the line theta_old + alpha (theta_new - theta_old),
from alpha = -0.5 to 2, and at each of its points the batch of that update is scored again: L^CPI
(eq. 6), L^CLIP (eq. 7), E[clip(r) A] (eq. 7 without its minimum), E[KL[old, new]].

The update is train()'s own: what it hands to update(), and the weights before and after, is all
that is taken from it. Writes figure2.csv, summary.md and figure2.png to benchmark/results/figure2/.
The paper's curves beside ours are those of its Figure 2, digitised (benchmark/paper/).
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous as ppo
from benchmark import Parser, cli, git_commit, lockstep, machine, markdown, plot, scores
from ppo_continuous import Agent, Args, parse_objective

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/figure2"
CLIP = "clip:0.2"
FLAGS = f"--env-id Hopper-v4 --preset paper --objectives {CLIP} --seeds 1 2 3 4 5 6 7 8 9 10"
FLAGS += " --total-timesteps 2048 --no-compile"  # one update is done before it would be compiled
ALPHAS = np.linspace(-0.5, 2, 101)  # the paper's range, 0 and 1 among them
CURVES = {  # ours -> the same in the file of the paper's curves, and in the picture
    "l_cpi": ("L_CPI", "$L^{CPI} = E[rA]$"),
    "clipped": ("E[clip(r)A]", "$E[\\mathrm{clip}(r)A]$"),
    "l_clip": ("L_CLIP", "$L^{CLIP}$"),
    "kl": ("E[KL]", "$E[KL]$"),
}
Curves = dict[str, np.ndarray]  # by name, each [P points, S seeds]


# --------------------------------------------------------------------------------------- MEASURE
def first_update(flags: list[str]) -> tuple[list[Args], dict, dict]:
    """The flags of every agent, one's config.json, and what the only update was about.

    That is, of every agent: the agent itself, its old and new weights, and the batch. Raises
    ppo_continuous.UserError for flags that make no sense.
    """
    crowd = lockstep.crowd_args(*lockstep.parse_args(flags))
    learn, seen = lockstep.update, {}

    def watched(**given) -> tuple:
        agents = given["agents"]
        seen["agents"] = agents
        seen["batches"] = [dict(batch) for batch in given["batches"]]
        seen["old"] = [parameters_to_vector(agent.parameters()).detach() for agent in agents]
        learned = learn(**given)
        seen["new"] = [parameters_to_vector(agent.parameters()).detach() for agent in agents]
        return learned

    torch.set_num_threads(1)  # as in the script: the bits of initial weights depend on it
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(lockstep, "update", watched),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        flags = [*flags, "--run-dir", folder, "--eval-episodes", "1"]
        lockstep.train(*lockstep.parse_args(flags))
        path = Path(folder) / lockstep.agent_name(crowd[0]) / "config.json"
        config = json.loads(path.read_text())
    return crowd, config, seen


def transitions(args: Args, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that are no reset steps, advantages standardised as update() does it."""
    batch = {name: x[batch["valid"]] for name, x in batch.items()}
    assert args.norm_adv == "batch"
    return batch | {"advantages": ppo.standardise(batch["advantages"])}


def score(agent: Agent, args: Args, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an agent gets for a batch: CURVES, and how far any transition's ratio is from 1."""
    mean, log_std = agent.policy(batch["obs"])
    log_prob = ppo.log_prob_of(mean, log_std, batch["actions"])
    ratio = (log_prob - batch["log_prob"]).exp()
    epsilon = parse_objective(CLIP).epsilon
    terms = {}
    for name, objective in (("l_cpi", "none"), ("l_clip", CLIP)):
        losses = ppo.ppo_loss(
            log_prob=log_prob,
            entropy=ppo.entropy_of(log_std),
            kl=ppo.kl_between(batch["mean"], batch["log_std"], mean, log_std),
            values=batch["values"],
            batch=batch,
            objective=parse_objective(objective),
            beta=0.0,
            args=args,
        )
        terms[name] = -losses["policy_loss"].mean()
    terms["clipped"] = (ratio.clamp(1 - epsilon, 1 + epsilon) * batch["advantages"]).mean()
    terms["kl"] = losses["kl"].mean()
    terms["furthest_ratio"] = (ratio - 1).abs().max()
    return terms


@torch.no_grad()
def along_the_line(crowd: list[Args], seen: dict) -> Curves:
    """score() of every agent at theta_old + alpha (theta_new - theta_old), for each of ALPHAS."""
    names = ("l_cpi", "l_clip", "clipped", "kl", "furthest_ratio")
    curves = {name: np.zeros((len(ALPHAS), len(crowd))) for name in names}
    for i, args in enumerate(crowd):
        agent = seen["agents"][i]
        batch = transitions(args, seen["batches"][i])
        for j, alpha in enumerate(ALPHAS.tolist()):
            weights = seen["old"][i].lerp(seen["new"][i], alpha)
            vector_to_parameters(weights, agent.parameters())
            terms = score(agent, args, batch)
            for name in names:
                curves[name][j, i] = terms[name]
    return curves


# ---------------------------------------------------------------------------------------- REPORT
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
    alphas, theirs = paper["l_clip"]
    numbers = {  # for each: of every seed, of the paper's curve, digits after the point
        "E[KL] at alpha = 1": (curves["kl"][at(1)], np.interp(1, *paper["kl"]), 4),
        "L^CLIP peaks at alpha": (ALPHAS[clip.argmax(0)], alphas[theirs.argmax()], 3),
        "L^CLIP there": (clip.max(0), theirs.max(), 4),
    }
    names = [f"seed {seed}" for seed in seeds]
    names += ["mean of the seeds (95% interval)", "least and largest of them", "the paper's curve"]
    table = [{"": name} for name in names]
    for name, (ours, theirs, digits) in numbers.items():
        mean, low, high, least, largest = (
            f"{x:.{digits}f}" for x in (*scores.mean_interval(ours), ours.min(), ours.max())
        )
        cells = [f"{x:.{digits}f}" for x in ours]
        cells += [f"{mean} ({low} to {high})", f"{least} to {largest}"]
        for row, cell in zip(table, [*cells, f"{theirs:.{digits}f}"], strict=True):
            row[name] = cell
    return table


def draw(path: Path, curves: Curves, paper: Curves) -> None:
    """Left the paper's figure, right L^CLIP alone with its peaks.

    Ours with the interval of the mean, theirs dashed.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 3])
    right.plot(ALPHAS, curves["l_clip"], color="0.6", linewidth=0.5)
    for ax, names in ((left, list(CURVES)), (right, ["l_clip"])):
        for name in names:
            colour = plot.COLOURS[list(CURVES).index(name)]
            mean, low, high = scores.mean_interval(curves[name].T)
            ax.fill_between(ALPHAS, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(ALPHAS, mean, color=colour, linewidth=2)
            ax.plot(*paper[name], "--", color=colour, linewidth=1.2)
            if ax is left:
                where = {"xytext": (5, 0), "textcoords": "offset points"}
                where |= {"va": "center", "annotation_clip": False}
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


def report(crowd: list[Args], config: dict, curves: Curves) -> None:
    """Write everything in RESULTS."""
    seeds = [args.seed for args in crowd]
    tables = []
    for i, seed in enumerate(seeds):
        table = pd.DataFrame({name: curve[:, i] for name, curve in curves.items()})
        table = table.map(lambda x: f"{x:.6g}")
        table.insert(0, "alpha", [f"{alpha:.3f}" for alpha in ALPHAS])
        table.insert(0, "seed", seed)
        tables.append(table)
    pd.concat(tables).to_csv(RESULTS / "figure2.csv", index=False)
    paper = read_paper()
    draw(RESULTS / "figure2.png", curves, paper)
    versions = "; ".join(f"{name} {number}" for name, number in config["versions"].items())
    apart = np.abs(curves["l_cpi"] - curves["l_clip"])[at(0)].max()
    furthest = curves["furthest_ratio"][at(0)].max()
    (RESULTS / "summary.md").write_text(f"""# Figure 2: surrogates along the first update

    python benchmark/figure2.py

The update is the first one of `python benchmark/lockstep.py {FLAGS}`.

{config["started"][:10]}; {versions}; git commit {git_commit()}; cpu {machine()["cpu"]}

{markdown(summarise(seeds, curves, paper))}
At alpha = 0, L^CPI and L^CLIP differ by {apart:.1g}, and the ratio furthest from 1 does by \
{furthest:.1g}.

![Surrogates along the first update](figure2.png)
""")


def main(argv: list[str]) -> None:
    parser = Parser("Draw the paper's Figure 2: surrogates along the first update on Hopper.")
    parser.parse_args(argv)
    crowd, config, seen = first_update(FLAGS.split())
    report(crowd, config, along_the_line(crowd, seen))
    print(RESULTS / "summary.md")


if __name__ == "__main__":
    cli(main)
