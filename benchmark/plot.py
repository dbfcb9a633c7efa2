"""Learning curves of any runs: the mean over seeds and its bootstrap 95% interval.

    python benchmark/plot.py RUN_DIR... [-o picture.png]
    python benchmark/plot.py runs/CROWD/*         # all agents of a run of benchmark/lockstep.py

One panel per environment; in it one line per objective, per script, or per pair of them, whichever
differs between the runs. From Python: panels from read_runs (run folders) or read_curves (a small
CSV), a picture from draw (a file) or curves (into axes of your own).
"""

import csv
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # made without pyplot, it draws with Agg: no display needed
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import Parser, UserError, cli, read_csv

# line -> (steps, returns) of each of its seeds
Groups = dict[str, list[tuple[np.ndarray, np.ndarray]]]
# safe for the colour-blind, the most different first, without the yellow that white paper swallows
COLOURS = [color_sequences["okabe_ito"][i] for i in (5, 6, 3, 1, 7, 2, 0)]
POINTS = 200


def gather(rows: Iterable[tuple[str, str, str, float, float]]) -> dict[str, Groups]:
    """(panel, line, seed, step, return) -> panel -> line -> a curve per seed.

    Everything is in order of appearance.
    """
    points = {}
    for panel, line, seed, step, ret in rows:
        points.setdefault(panel, {}).setdefault(line, {}).setdefault(seed, []).append((step, ret))
    panels = {}
    for panel, lines in points.items():
        panels[panel] = {}
        for line, seeds in lines.items():
            panels[panel][line] = [tuple(np.array(curve).T) for curve in seeds.values()]
    return panels


def read_runs(folders: Sequence[str | Path]) -> dict[str, Groups]:
    """The curves of run folders: env_id -> line -> (steps, returns) of each seed.

    Plain files are passed over: CROWD/* names those of the crowd beside the folders of its agents.
    Raises UserError for a folder that is none, for an agent without a finished episode, and for two
    agents that only something unnamed tells apart.
    """
    folders = [folder for folder in dict.fromkeys(map(Path, folders)) if not folder.is_file()]
    if not folders:
        raise UserError("there is no run folder to draw")
    agents = {}  # (env_id, script, objective, seed) -> (folder, [(step, return), ...])
    for folder in folders:
        try:
            config = json.loads((folder / "config.json").read_text())
            rows = read_csv(folder / "metrics.csv")
            rows = [row for row in rows if None not in row.values()]  # None: being written
            where = config["args"].get("env_id") or config["args"]["task"]  # of grpo_toy.py
            who = [(where, config["script"], row["objective"], row["seed"]) for row in rows]
            returns = [float(row["charts/episodic_return"] or "nan") for row in rows]
            points = [(int(row["global_step"]), x) for row, x in zip(rows, returns, strict=True)]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as reason:
            what = f"{folder} is not a run folder with curves to draw"
            raise UserError(f"{what}: {reason!r}") from reason
        if not rows:
            raise UserError(f"{folder} has no metrics yet")
        for key in dict.fromkeys(who):
            mine = [point for k, point in zip(who, points, strict=True) if k == key]
            curve = [point for point in mine if not math.isnan(point[1])]
            if not curve:
                what = f"no episode of seed {key[3]}, {key[2]}, has finished"
                raise UserError(f"{folder} has no metrics yet: {what}")
            if key in agents:
                what = f"{agents[key][0]} and {folder} are both"
                what += f" {key[1]}.py on {key[0]}, {key[2]}, seed {key[3]}"
                raise UserError(f"{what}; draw them in separate pictures")
            agents[key] = folder, curve
    differ = [part for part in (1, 2) if len({key[part] for key in agents}) > 1] or [2]
    return gather(
        (key[0], ", ".join(key[part] for part in differ), key[3], *point)
        for key, (_, curve) in agents.items()
        for point in curve
    )


def read_curves(path: Path, panel: str = "env_id", line: str = "objective") -> dict[str, Groups]:
    """The curves of a CSV.

    Its columns: seed, global_step, episodic_return and those that `panel` and `line` name.
    """
    names = panel, line, "seed"
    return gather(
        (*(row[name] for name in names), int(row["global_step"]), float(row["episodic_return"]))
        for row in read_csv(path)
    )


def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """returns [S seeds, P points] -> mean [P], and its bootstrap 95% interval: low [P], high [P].

    The mean is over seeds. The same numbers at every call.
    """
    seeds = len(returns)
    # how often each seed is drawn in each of 10,000 resamples: whole seeds, so that the points of a
    # curve stay together
    counts = np.random.default_rng(0).multinomial(seeds, [1 / seeds] * seeds, size=10_000)
    return returns.mean(0), *np.percentile(counts @ returns / seeds, [2.5, 97.5], axis=0)


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
        mean, low, high = interval(returns)
        place = lines.index(label)
        colour, dashes = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
        ax.plot(steps, mean, dashes, color=colour, linewidth=1.5, label=label)
        if len(seeds) > 1:
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if threshold is not None:
        ax.axhline(threshold, color="0.4", linewidth=0.8, linestyle="--")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1M
    ax.set(xlabel="steps", ylabel="episodic return (last 100)")
    ax.spines[["top", "right"]].set_visible(False)


def draw(path: str | Path, panels: dict[str, Groups], threshold: float | None = None) -> None:
    """One picture, a panel per environment and a legend where lines differ.

    Raises UserError where nothing can be drawn or written.
    """
    lines = list(dict.fromkeys(label for groups in panels.values() for label in groups))
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(5, 3.6 * columns), 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (title, groups) in zip(axes, panels.items(), strict=False):
        curves(ax, groups, lines, threshold)
        fewest, *_, most = sorted([len(seeds) for seeds in groups.values()] * 2)
        counts = f"{f'{fewest} to ' * (fewest < most)}{most} seed{'s' * (most > 1)}"
        ax.set_title(f"{title}, {counts}", fontsize="medium")
    for ax in axes[len(panels) :]:
        ax.remove()
    if len(lines) > 1:
        handles = {}
        for ax in figure.axes:
            handles |= {handle.get_label(): handle for handle in ax.get_legend_handles_labels()[0]}
        shown = [handles[label] for label in lines]
        style = {"ncols": 3 * columns, "frameon": False, "fontsize": "small"}
        figure.legend(handles=shown, loc="outside lower center", **style)
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
