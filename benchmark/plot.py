"""Learning curves of any runs: the mean over seeds and its bootstrap 95% interval.

    python benchmark/plot.py RUN_DIR... [-o picture.png]
    python benchmark/plot.py runs/CROWD/*         # all agents of a run of benchmark/lockstep.py

One panel per environment; in it one line per objective, per script, or per pair of them, whichever
differs between the runs. From Python: panels from read_runs (run folders) or gather (a curves.csv),
a picture from draw (a file), side_by_side, or curves (into axes of your own).
"""

import io
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # made without pyplot, it draws with Agg: no display needed
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, UserError, cli, scores

# line -> (steps, returns) of each of its seeds
Groups = dict[str, list[tuple[np.ndarray, np.ndarray]]]
# safe for the colour-blind, the most different first, without the yellow that white paper swallows
COLOURS = [color_sequences["okabe_ito"][i] for i in (5, 6, 3, 1, 7, 2, 0)] + ["0.6"]
POINTS = 200
RETURN = "charts/episodic_return"


def groups_of(points: pd.DataFrame, line: str, value: str) -> Groups:
    """Rows of curves.csv -> the curves of a panel, in order of appearance, without empty cells.

    line, value: the columns that tell lines apart, and that are drawn over global_step.
    """
    numbers = {
        "global_step": points["global_step"].astype(float),
        value: pd.to_numeric(points[value]),
    }
    groups = {}
    points = points.assign(**numbers).dropna(subset=[value])
    for (label, _), curve in points.groupby([line, "seed"], sort=False):
        groups.setdefault(label, []).append(tuple(curve[["global_step", value]].to_numpy().T))
    return groups


def drawable(groups: Groups) -> Groups:
    """Without curves of a single point, and without lines that have no other."""
    found = {
        line: [curve for curve in seeds if len(curve[0]) > 1] for line, seeds in groups.items()
    }
    return {line: seeds for line, seeds in found.items() if seeds}


def gather(points: pd.DataFrame, panel: str, line: str, value: str) -> dict[str, Groups]:
    """Rows of curves.csv -> for each value of the column `panel`, the groups_of() its rows."""
    panels = {}
    for title, mine in points.groupby(panel, sort=False):
        panels[title] = groups_of(mine, line, value)
    return panels


def read_runs(folders: Sequence[str | Path]) -> dict[str, Groups]:
    """The curves of run folders: env_id -> line -> (steps, returns) of each seed.

    Plain files are passed over: CROWD/* names those of the crowd beside the folders of its agents.
    Raises UserError for a folder that is none, for an agent without a finished episode, and for two
    runs of the same script, environment, objective and seed.
    """
    folders = [folder for folder in dict.fromkeys(map(Path, folders)) if not folder.is_file()]
    if not folders:
        raise UserError("there is no run folder to draw")
    agents = {}  # (env_id, script, objective, seed) -> its folder
    found = []
    for folder in folders:
        try:
            config = json.loads((folder / "config.json").read_text())
            where = config["args"].get("env_id") or config["args"]["task"]  # of grpo_toy.py
            text = (folder / "metrics.csv").read_text()
            text = text[: text.rfind("\n") + 1] or "seed"  # the last line may be being written
            rows = pd.read_csv(io.StringIO(text), dtype={"seed": str, "objective": str})
            if rows.empty:
                raise UserError(f"{folder} has no metrics yet")
            rows = rows[["global_step", "seed", "objective", RETURN]].astype({RETURN: float})
        except (OSError, ValueError, KeyError, TypeError) as reason:
            what = f"{folder} is not a run folder with curves to draw"
            raise UserError(f"{what}: {reason!r}") from reason
        for (objective, seed), mine in rows.groupby(["objective", "seed"], sort=False):
            if mine[RETURN].isna().all():
                what = f"no episode of seed {seed}, {objective}, has finished"
                raise UserError(f"{folder} has no metrics yet: {what}")
            key = (where, config["script"], objective, seed)
            if key in agents:
                what = f"{agents[key]} and {folder} are both"
                what += f" {key[1]}.py on {where}, {objective}, seed {seed}"
                raise UserError(f"{what}; draw them in separate pictures")
            agents[key] = folder
        found.append(rows.assign(env_id=where, script=config["script"]))
    points = pd.concat(found)
    differ = [name for name in ("script", "objective") if points[name].nunique() > 1]
    line = points[differ or ["objective"]].agg(", ".join, axis=1)
    return gather(points.assign(line=line), "env_id", "line", RETURN)


def on_grid(seeds: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, returns) of each seed -> steps [200] and returns [S, 200].

    Interpolated between the first and the last step that every seed has: no point lacks a seed.
    Raises UserError where there is nothing between the two.
    """
    first, last = max(steps[0] for steps, _ in seeds), min(steps[-1] for steps, _ in seeds)
    if not first < last:
        raise UserError("a line needs two steps, at least, that all of its seeds went through")
    grid = np.linspace(first, last, POINTS)
    return grid, np.array([np.interp(grid, *curve) for curve in seeds])


def curves(
    ax: Axes, groups: Groups, lines: Sequence[str] = (), threshold: float | None = None
) -> None:
    """Draw every group into `ax`.

    lines: fixes which label gets which colour, in all pictures of a page alike. threshold: a thin
    dashed line. Raises UserError where a group's seeds share no stretch of steps.
    """
    lines = list(lines or groups)
    for label, seeds in groups.items():
        steps, returns = on_grid(seeds)
        mean, low, high = scores.mean_interval(returns)
        place = lines.index(label)
        colour, dashes = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
        ax.plot(steps, mean, dashes, color=colour, linewidth=1.5, label=label)
        if len(seeds) > 1:
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    finish(ax, [] if threshold is None else [threshold])
    ax.set(ylabel="episodic return (last 100)")


def finish(ax: Axes, levels: Sequence[float]) -> None:
    """Thin dashed lines at these levels, steps as 50k and 1M, and two axes in place of a frame."""
    for level in levels:
        ax.axhline(level, color="0.4", linewidth=0.8, linestyle="--")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(xlabel="steps")
    ax.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, where: str, **style) -> None:
    """One of all panels, below or above them, each line once."""
    handles = {}
    for ax in figure.axes:
        handles |= {
            label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
    figure.legend(handles.values(), handles, loc=f"outside {where} center", frameon=False, **style)


def sheet(panels: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, list]:
    """A figure and the axes of so many panels, of that size in inches each."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes[panels:]:
        ax.remove()
    return figure, list(axes[:panels])


def side_by_side(
    points: pd.DataFrame, columns: dict[str, str], line: str, lines: Sequence[str]
) -> Figure:
    """A panel for each column of curves.csv, under its title, with all lines in it."""
    figure, axes = sheet(len(columns), len(columns), (10 / len(columns), 3.4))
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        curves(ax, groups_of(points, line, column), lines)
        ax.set_title(title, fontsize="medium")
        ax.set_ylabel("")
    return figure


def draw(path: str | Path, panels: dict[str, Groups], threshold: float | None = None) -> None:
    """One picture, a panel per environment and a legend where lines differ.

    Raises UserError where nothing can be drawn or written.
    """
    lines = list(dict.fromkeys(itertools.chain(*panels.values())))
    columns = min(len(panels), 4)
    figure, axes = sheet(len(panels), columns, (max(5 / columns, 3.6), 3.2))
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        curves(ax, groups, lines, threshold)
        counts = [len(seeds) for seeds in groups.values()]
        told = f"{max(counts)} seed{'s' * (max(counts) > 1)}"
        if min(counts) < max(counts):
            told = f"{min(counts)} to {told}"
        ax.set_title(f"{title}, {told}", fontsize="medium")
    if len(lines) > 1:
        legend(figure, "lower", ncols=3 * columns, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as reason:  # no such folder or permission; no such format
        raise UserError(f"cannot write {path}: {reason}") from reason


def main(argv: list[str]) -> None:
    parser = Parser("Learning curves: the mean over seeds and its bootstrap 95% interval.")
    what = "run folders of any script, or of agents of a crowd"
    parser.add_argument("run_dir", nargs="+", help=what)
    what = "the picture; its suffix says the format"
    parser.add_argument("-o", "--output", default="curves.png", help=what)
    args = parser.parse_args(argv)
    draw(args.output, read_runs(args.run_dir))
    print(args.output)


if __name__ == "__main__":
    cli(main)
