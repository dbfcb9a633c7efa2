"""The paper's Figure 1: one term of L^CLIP against the probability ratio.

For a good action and for a bad one:

    python benchmark/figure1.py

Every point is a call of ppo_loss in ppo_cartpole.py with a batch of one transition, so what is
drawn is what the script minimises, its sign turned. Writes figure1.csv and figure1.png to
benchmark/results/figure1/.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, cli, plot
from ppo_cartpole import Args, parse_objective, ppo_loss

RESULTS = Path(__file__).resolve().parents[1] / "benchmark/results/figure1"
CLIP = "clip:0.2"
RATIOS = np.linspace(0.01, 2, 200)  # with 1 - epsilon, 1 and 1 + epsilon among them
OLD = 0.4  # the old policy's probability of the action; below 1 / max(RATIOS) it does not matter


def term(objective: str, ratio: float, advantage: float) -> float:
    """The policy part of eq. 9 for one transition.

    Its action has become `ratio` times as probable as it was.
    """
    nothing = torch.zeros(1, dtype=torch.float64)
    batch = {
        "log_prob": torch.tensor([OLD], dtype=torch.float64).log(),
        "values": nothing,
        "advantages": nothing + advantage,
        "returns": nothing,
    }
    terms = ppo_loss(
        log_prob=torch.tensor([OLD * ratio], dtype=torch.float64).log(),
        entropy=nothing,
        kl=nothing,
        values=nothing,
        batch=batch,
        objective=parse_objective(objective),
        beta=0.0,
        args=Args(),
    )
    return -terms["policy_loss"].item()


def draw(ax: Axes, advantage: int, rows: pd.DataFrame) -> None:
    """One sign of the advantage, laid out as in the paper, with L^CPI and the shade beside it."""
    mine = rows[rows["advantage"] == advantage]
    edge = 1 + advantage * parse_objective(CLIP).epsilon
    good = advantage > 0
    blue, orange, *_ = plot.COLOURS
    ax.axvspan(edge, 2.1 if good else 0, color="0.94", linewidth=0, label="no gradient")
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.vlines([1, edge], 0, [advantage, advantage * edge], color="0.4", linewidth=1, linestyle=":")
    ax.plot(mine["ratio"], mine["l_clip"], color=blue, linewidth=2.6, label="$L^{CLIP}$, eq. 7")
    dashed = {"color": orange, "linewidth": 1.3, "zorder": 1}
    ax.plot(mine["ratio"], mine["l_cpi"], "--", **dashed, label="$L^{CPI} = r A$, eq. 6")
    ax.plot(1, advantage, "o", color="0.1", markersize=6, zorder=3, label="where an update starts")
    ax.set_title("$A > 0$: a good action" if good else "$A < 0$: a bad action", fontsize="medium")
    ax.set_xticks([0, 1, edge], ["0", "1", "$1 + \\epsilon$" if good else "$1 - \\epsilon$"])
    ax.set(xlabel="probability ratio $r$", xlim=(0, 2.1), ylim=(-0.2, 2.1) if good else (-2.1, 0.2))
    ax.set_yticks([0, advantage, 2 * advantage], ["0", "$A$", "$2A$"])
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def main(argv: list[str]) -> None:
    Parser("Draw the paper's Figure 1 with the script's own loss.").parse_args(argv)
    rows = []
    for advantage in (1, -1):
        for ratio in RATIOS.round(2).tolist():
            row = {"advantage": advantage, "ratio": ratio}
            row["l_cpi"] = term("none", ratio, advantage)
            row["l_clip"] = term(CLIP, ratio, advantage)
            rows.append(row)
    rows = pd.DataFrame(rows)
    rows.to_csv(RESULTS / "figure1.csv", index=False)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, 1, rows)
    draw(right, -1, rows)
    plot.legend(figure, "lower", ncols=4)
    figure.savefig(RESULTS / "figure1.png", dpi=150)
    print(RESULTS / "figure1.png")


if __name__ == "__main__":
    cli(main)
