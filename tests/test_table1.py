"""benchmark/table1.py and what it stands on: sweep.py, grids.py, scores.py.

The scores by hand; small grids, killed, continued, on a Ray cluster.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from conftest import LIMIT

from benchmark import UserError, grids, read_csv, scores, sweep, table1
from benchmark.grids import LAYOUT, Grid

ROOT = Path(__file__).resolve().parents[1]
PAPER = grids.PAPER["avg_normalized_score"]
TASKS = ["InvertedPendulum-v4", "Reacher-v4"]
GRID = ["--tasks", *TASKS, "--objectives", "none", "clip:0.2"]
GRID += ["--seeds", "1"]  # from 4 agents on threads would interfere
SMALL = ["--no-compile", "--num-steps", "128", "--num-minibatches", "2", "--update-epochs", "1"]
SMALL += ["--checkpoint-every", "2", "--eval-episodes", "1"]
TIMING = ("wall_seconds", "sps", "started", "git_commit")


def flags(updates: int) -> list[str]:
    return [*GRID, "--total-timesteps", str(128 * updates), "--results", "small", "--", *SMALL]


def untimed(path: Path) -> list[dict]:
    rows = read_csv(path)
    return [{name: cell for name, cell in row.items() if name not in TIMING} for row in rows]


def cell_of(row: dict) -> tuple:
    return tuple(row[name] for name in LAYOUT.key)


def settings(updates: int) -> list[str]:
    return grids.common_flags("paper", 128 * updates, SMALL)


def wait_for(condition, seconds: float = LIMIT) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "what the test waits for did not happen"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_committed(tmp_path, monkeypatch) -> None:
    """No scale, and no ten bootstrapped seeds: what is committed must not change what is tested."""
    monkeypatch.setattr(table1, "SCALE", tmp_path / "none/scale.csv")
    monkeypatch.setattr(table1, "TIME_LIMITS", tmp_path / "none")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Where GRID has run to its end, undisturbed: folders small/ and small/runs/.

    Look, do not touch.
    """
    path = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(path):
        table1.main(flags(24))
    return path


def row(task: str, objective: str, seed: int, ret: float | str, **more) -> dict:
    """A row of runs.csv, as the report needs it."""
    told = {"env_id": task, "objective": objective, "seed": seed}
    told |= {"last_100_return": ret, "diverged_at": "", "kl_median": 0.01, "kl_max": 0.5}
    told |= {"wall_seconds": 3600.0, "started": "2026-01-02T03:04:05"}
    names = ("total_timesteps", "python", *sweep.PACKAGES, "git_commit", "cpu", "cores")
    about = dict.fromkeys(names, "1")
    made = " ".join(grids.common_flags("paper", 1_000_000, []))
    command = f"python benchmark/lockstep.py --env-id {task} {made} --run-dir runs/x"
    return told | about | {"command": command, "bootstrap_truncated": False} | more


def write_folder(folder: Path, runs: list[dict], untrained: dict[str, tuple[float, float]]) -> Path:
    """CSVs as table1.py would leave them, with straight learning curves.

    untrained: uniform, Gaussian by task.
    """
    points, policies = [], []
    for run in runs:
        for step in (1000, 2000):
            point = {name: run[name] for name in ("env_id", "objective", "seed")}
            point |= {"global_step": step, "episodic_return": run["last_100_return"]}
            points.append(point | {"kl": 0.01, "beta": 2, "action_std": 1})
    for task, values in untrained.items():
        for policy, value in zip(("uniform", "gaussian"), values, strict=True):
            for seed, shift in ((1, -1), (2, 1), (3, 0)):
                row = {"env_id": task, "policy": policy, "seed": seed}
                policies.append(row | {"mean_return": value + shift})
    for name, rows in {"runs": runs, "curves": points, "random": policies}.items():
        sweep.write(folder / f"{name}.csv", pd.DataFrame(rows))
    return folder


# --------------------------------------------------------------------------------------- SCORING
def test_normalisation_puts_random_at_0_and_the_best_at_1():
    # [2 tasks, 2 objectives, 2 seeds]
    raw = np.array([[[0.0, 10.0], [20.0, 30.0]], [[-100.0, -60.0], [-20.0, -80.0]]])
    zero = np.array([-10.0, -120.0])
    assert np.array_equal(scores.best_returns(raw, "run"), [30, -20])
    assert np.array_equal(scores.best_returns(raw, "objective"), [25, -50])
    found = scores.normalise(raw, zero, np.array([30.0, -20.0]))
    assert np.allclose(found, [[[0.25, 0.5], [0.75, 1.0]], [[0.2, 0.6], [1.0, 0.4]]])
    assert np.allclose(scores.by_objective(found), [[0.25, 0.5, 0.2, 0.6], [0.75, 1.0, 1.0, 0.4]])
    assert np.allclose(scores.means(found), [1.55 / 4, 3.15 / 4])


def test_interquartile_mean_drops_a_quarter_at_each_end():
    four = np.array([9.0, -50.0, 1.0, 3.0]).reshape(2, 1, 2)  # 2 tasks x 1 objective x 2 seeds
    assert scores.interquartile_means(four) == 2
    runs = np.concatenate([[-1e6] * 5, np.arange(11), [1e6] * 5])  # 21 runs: 5 + 11 + 5
    shuffled = np.random.default_rng(0).permutation(runs).reshape(7, 1, 3)
    both = np.concatenate([shuffled, shuffled + 2], axis=1)
    assert np.allclose(scores.interquartile_means(both), [5, 7])


def test_bootstrap_resamples_seeds_within_tasks():
    raw = np.array([[[0.0, 3.0, 6.0], [1.0, 1.0, 4.0]], [[10.0, 10.0, 40.0], [0.0, 0.0, 0.0]]])
    draws = scores.resample(raw)
    assert draws.shape == (10_000, 2, 2, 3) and np.array_equal(draws, scores.resample(raw))
    assert set(np.unique(draws[:, 0, 0])) == {0, 3, 6}
    assert set(np.unique(draws[:, 1, 0])) == {10, 40}
    both = np.corrcoef(draws[:, 0, 0].ravel(), draws[:, 0, 1].ravel())[0, 1]
    assert abs(both) < 4 / np.sqrt(30_000)  # each objective draws seeds of its own
    # exactly: all 27 x 27 equally likely resamples of the first objective
    first = itertools.product((0, 3, 6), repeat=3)
    second = itertools.product((10, 10, 40), repeat=3)
    means = [np.mean(a + b) for a, b in itertools.product(first, second)]
    drawn = scores.means(draws)[:, 0]
    assert np.allclose(scores.interval(drawn), np.percentile(means, [2.5, 97.5]), atol=0.5)
    assert np.isclose(drawn.mean(), np.mean(means), atol=0.15)


def test_probability_of_improvement_counts_pairs_within_tasks_and_ties_by_half():
    x = np.array([[1.0, 3.0], [5.0, 5.0]])  # 2 tasks x 2 seeds
    y = np.array([[2.0, 0.0], [5.0, 9.0]])
    # 1 > 0, 3 > 2, 3 > 0 of four pairs; 5 = 5 twice of four pairs
    assert scores.improvement(x, y) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert scores.improvement(y, x) == pytest.approx(1 - (3 / 4 + 1 / 4) / 2)
    assert scores.improvement(x, x) == 0.5
    draws = scores.resample(np.stack([x, y], axis=1))
    drawn = scores.improvement(draws[:100, :, 0], draws[:100, :, 1])
    for i in (0, 50, 99):
        a, b = draws[i, :, 0, :, None], draws[i, :, 1, None, :]
        assert drawn[i] == pytest.approx(np.mean((a > b) + 0.5 * (a == b)))


def test_a_permutation_test_deals_runs_out_within_tasks():
    x = np.array([[3.0, 4.0], [30.0, 40.0]])  # 2 tasks x 2 seeds
    y = np.array([[1.0, 2.0], [10.0, 20.0]])
    # exactly: 2 of 4 runs to x's side, in each task; 36 deals, of which two are as far apart
    deals = []
    for mine in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        both = np.concatenate([x, y], axis=1)
        sums = [both[task, list(pair)].sum() for task, pair in enumerate(mine)]
        deals.append(abs(2 * sum(sums) - both.sum()))
    exact = np.mean(np.array(deals) >= max(deals) - 1e-9)
    assert exact == 2 / 36
    assert scores.permutation_test(x, y) == pytest.approx(exact, abs=0.0022)  # 3 deviations
    assert scores.permutation_test(x, x) == 1
    assert scores.permutation_test(x, y) == scores.permutation_test(y, x)
    # sums of large numbers round more coarsely: still, two deals are as far apart
    assert scores.permutation_test(x + 1e6 / 3, y + 1e6 / 3) == pytest.approx(exact, abs=0.0022)


def test_holm_corrects_as_in_a_known_case():
    p = np.array([0.01, 0.04, 0.03, 0.005])  # of R's help page on p.adjust's methods, by hand:
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not be below the one before it
    assert scores.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert scores.holm(np.array([0.5, 0.6])) == pytest.approx([1, 1])


def test_a_difference_that_can_be_seen_is_seen_four_times_of_five():
    """By the permutation test itself, where the tasks disagree on which side is better."""
    rng = np.random.default_rng(0)
    spread = np.array([0.1, 0.5])[:, np.newaxis]  # of the two tasks
    crossing = np.array([0.6, -0.6])[:, np.newaxis]
    x, y = rng.normal(0, spread, (2, 2, 100_000))
    for apart in (0 * crossing, crossing):
        steps = [step / 100 for step in range(1, 100)]
        seen = [scores.is_seen(x + apart, y, step, 20, 0.05) for step in steps]
        assert seen == sorted(seen)  # a larger one is seen, too
        smallest = steps[seen.index(True)]
        assert abs(scores.seeds_to_detect(x + apart, y, smallest, 0.05) - 20) < 2
        found = []
        for i in range(300):
            mine = np.s_[:, 20 * i : 20 * (i + 1)]
            found.append(scores.permutation_test(x[mine] + apart + smallest, y[mine], 1000) < 0.05)
        assert np.mean(found) == pytest.approx(0.8, abs=0.07)  # 3 deviations of 300
    few = x[:, :20], y[:, :20]
    smallest = scores.detectable(*few, 0.05)
    assert scores.is_seen(*few, smallest, 20, 0.05)
    assert not scores.is_seen(*few, smallest - 0.002, 20, 0.05)
    assert scores.detectable(x[:1, :2], y[:1, :2], 0.05) == math.inf  # of 6 deals, no 5% are left


def test_the_correlation_of_seeds_is_of_what_the_means_leave():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2, 2, 3, 500))  # 2 tasks x 3 objectives x 500 seeds
    together = shared[:, :1] + own + np.array([0, 10, -10])[:, np.newaxis]
    assert scores.seed_correlation(together) == pytest.approx(0.5, abs=0.06)
    assert scores.seed_correlation(own) == pytest.approx(0, abs=0.06)
    assert math.isnan(scores.seed_correlation(0 * own))


def test_time_limits_ten_seeds_stand_in_for_three(tmp_path):
    many = [row("HalfCheetah-v4", "none", seed, 1000.0 + seed) for seed in (1, 2, 3, 4)]
    many += [row("Hopper-v4", "none", seed, 1.0) for seed in (1, 2, 3)]  # no more than there are
    pendulum = ("InvertedDoublePendulum-v4", "clip:0.2")
    many += [row(*pendulum, seed, x) for seed, x in enumerate((9000.0, 9000.0, 500.0, 500.0))]
    folder = write_folder(tmp_path / "many", many, {})
    found = table1.bootstrapped_runs(folder)
    counts = found.runs.groupby(["env_id", "objective"]).size()
    assert counts["HalfCheetah-v4", "none"] == counts[pendulum] == 4
    hoppers = found.runs.query("env_id == 'Hopper-v4' and objective == 'none'")
    assert len(hoppers) == 3 and "1.0" not in list(hoppers["last_100_return"])
    assert len(found.curves.query("env_id == 'HalfCheetah-v4' and objective == 'none'")) == 8
    mine = [row("HalfCheetah-v4", "none", seed, -900.0 + seed) for seed in (1, 2, 3, 4)]
    table = sweep.Table(write_folder(tmp_path / "mine", mine, {}), LAYOUT)
    grid = Grid(["HalfCheetah-v4"], ["none"], [1, 2, 3, 4])
    text = table1.tell_time_limits(tmp_path, table, found, grid)
    # 1,900 apart; each side has a variance of 5/3, and t(6) has 2.447
    half = 2.447 * math.sqrt(2 * 5 / 3 / 4)
    cells = "-898 (-899 to -896), 4 | 1,002 (1,001 to 1,004), 4"
    apart = f"1,900 [{1900 - half:,.0f}, {1900 + half:,.0f}]"
    assert f"| HalfCheetah-v4 | `none` | {cells} | {apart} |" in text
    # of 70 ways to deal out four among eight, 2 are as far apart
    assert "`none`: ends below the untrained policy, -644 | 4 of 4 | 0 of 4 | 0.0286 |" in text
    assert "in the second half below the untrained policy, -644 | 4 of 4 | 0 of 4 |" in text
    assert "climbs above 8,000 | 0 of 0 | 2 of 4 |  |" in text
    assert "of these, falls below 1,200 afterwards | 0 of 0 | 0 of 2 |  |" in text


def test_a_profile_counts_the_runs_above():
    runs = np.array([[[0.1, 0.5], [0.9, 0.9]], [[0.3, 0.7], [0.0, 1.0]]])  # 2 x 2 x 2
    found = scores.profiles(runs, np.array([0.0, 0.3, 0.95]))
    assert np.allclose(found, [[1, 0.5, 0], [0.75, 0.75, 0.25]])


def test_spearman_shares_ranks_among_equals():
    y = np.array([1.0, 2.0, 3.0, 4.0])
    # 1 - 6 * (1 + 1) / (4 * 15)
    assert np.isclose(scores.spearman(np.array([1.0, 3.0, 2.0, 40.0]), y), 0.8)
    assert np.allclose(scores.spearman(np.array([[9.0, 8.0, 1.0, 0.0], y, y**3]), y), [-1, 1, 1])
    assert np.isclose(
        scores.spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])), np.sqrt(3) / 2
    )


@pytest.mark.parametrize("ret", [None, "", "nan", "inf"])
def test_a_missing_run_is_an_error(ret):
    grid = Grid(["A-v4", "B-v4"], ["none", "kl:1"], [1, 2])
    returns = dict.fromkeys(grid.cells, "5.0")

    def raw() -> np.ndarray:
        index = pd.MultiIndex.from_tuples(returns, names=LAYOUT.key)
        return table1.raw_returns(pd.DataFrame({"last_100_return": returns.values()}, index), grid)

    assert raw().tolist() == [[[5, 5], [5, 5]], [[5, 5], [5, 5]]]
    returns["B-v4", "kl:1", 1] = ret
    if ret is None:
        del returns["B-v4", "kl:1", 1]
    what = r"^1 of 8 runs are missing or have no return: B-v4 kl:1 1$"
    with pytest.raises(UserError, match=what):
        raw()


# ---------------------------------------------------------------------------------------- REPORT
def test_report_by_hand(tmp_path):
    """Hopper: 100 is 0 and 500 is 1. Reacher: -103.5 is 0 and -16 is 1."""
    returns = {
        ("Hopper-v4", "none"): (100, 200),  # 0, 0.25
        ("Hopper-v4", "clip:0.2"): (260, 500),  # 0.4, 1
        ("Reacher-v4", "none"): (-86, -86),  # 0.2, 0.2
        ("Reacher-v4", "clip:0.2"): (-86, -16),  # 0.2, 1
    }
    runs = [row(*cell, seed, both[seed - 1]) for cell, both in returns.items() for seed in (1, 2)]
    runs[3] |= {"diverged_at": 4096}
    folder = write_folder(
        tmp_path / "t", runs, {"Hopper-v4": (20, 100), "Reacher-v4": (-43, -103.5)}
    )
    args = ["--report", "--results", str(folder), "--tasks", "Hopper", "Reacher"]
    args += ["--seeds", "1", "2", "--objectives", "none", "clip:0.2"]
    written = []
    for _ in range(2):
        table1.main(args)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    names = "runs.csv curves.csv random.csv summary.md scores.md learning.md"
    names += " scores.png curves.png kl.png learning.png profile.png time-limits.png"
    assert set(written[0]) == set(names.split())
    text = (folder / "summary.md").read_text()
    assert "All 8 runs are in: 2 tasks x 2 objectives x 2 seeds. Every run is a row" in text
    assert "6c4213f" not in text  # no command of the time when the script trained crowds
    assert "| `none` | -0.39 | 0.16 [" in text and "| `clip:0.2` | 0.82 | 0.65 [" in text
    best_objective = (260 - 100) / (380 - 100), (500 - 100) / (380 - 100), 17.5 / 52.5, 87.5 / 52.5
    assert f"| `clip:0.2` | 0.82 | 0.65 | {np.mean(best_objective):.2f} | " in text
    assert "| Hopper-v4 | 20.0 | 100 | 500 (`clip:0.2`, seed 2) | 380 (`clip:0.2`) |" in text
    assert "Highest is `clip:0.2`" in text and "Lowest is `none`" in text
    assert "1 of 8 runs met a number that was not finite" in text
    assert "Hopper-v4 clip:0.2 seed 2 at step 4096" in text
    assert "| `clip:0.2` | 380 (260 to 500) | -51.0 (-86.0 to -16.0) |" in text
    assert "| Hopper-v4 | 260 | 500 | 380 | 2,383 ± 272 | 2,741 ± 269 | 2,203 |" in text
    assert (folder / "scores.md").read_text() in text
    assert (folder / "learning.md").read_text() in text
    assert "Spearman" not in text  # of eleven rows, or none
    # mean scores 0.65 and 0.1625; of the 8 pairs within tasks, 7 are won and 0.2 = 0.2 twice, tied
    contrast = next(line for line in text.splitlines() if line.startswith("| `none` | 0.49 ["))
    assert f"| {(4 + 2 * 0.5 + 2) / 8:.2f} [" in contrast
    assert "On the scale of this table" in text
    assert "about 29% too narrow" in text  # 1 - sqrt(1/2)
    limits = next(line for line in text.splitlines() if line.startswith("| Hopper-v4 | `none` |"))
    assert limits.startswith("| Hopper-v4 | `none` | 150 (100 to 200), 2 | 416 (")
    # the committed runs of the other table, which the page on the double pendulum tells of
    assert "`clip:0.2`: climbs above 8,000 | 0 of 0 | 3 of 3 |" in text
    assert "of these, falls below 1,200 afterwards | 0 of 0 | 3 of 3 |" in text


def test_a_fall_comes_after_a_climb():
    steps = np.arange(4)
    for returns, climbs, falls in (
        ([100, 9000, 9000, 1300], True, False),
        ([100, 9000, 1100, 9000], True, True),
        ([100, 7000, 1100, 7000], False, False),
    ):
        curve = steps, np.array(returns)
        assert (table1.climbs(curve), table1.falls(curve)) == (climbs, falls)


@pytest.mark.parametrize("missing", ["nan", ""])
def test_a_run_without_a_return_counts_as_the_lowest_of_its_task(missing):
    cells = [("A", "none", 1), ("A", "none", 2), ("A", "clip:0.2", 1), ("A", "clip:0.2", 2)]
    index = pd.MultiIndex.from_tuples(cells, names=["env_id", "objective", "seed"])
    runs = pd.DataFrame({"last_100_return": [missing, "50", "10", "100"]}, index=index)
    filled, gaps = table1.fill_gaps(runs)
    assert filled["last_100_return"].tolist() == [10, 50, 10, 100] and gaps == ["A none 1"]


def test_the_scale_is_from_the_untrained_policy_to_the_best_run_of_the_plan(tmp_path, monkeypatch):
    """Not to the best mean, 400. Seed 3 is none of the plan."""
    returns = {("none", 1): 100, ("none", 2): 200, ("clip:0.2", 1): 300, ("clip:0.2", 2): 500}
    runs = [row("Hopper-v4", *cell, x) for cell, x in returns.items()]
    folder = write_folder(tmp_path, runs, {"Hopper-v4": (20, 100)})
    random = sweep.read(folder / "random.csv")
    more = random[random["seed"] == "1"].assign(seed="3", mean_return="900")
    sweep.write(folder / "random.csv", pd.concat([random, more]))
    monkeypatch.setattr(table1, "SCALE", folder / "scale.csv")
    monkeypatch.setattr(table1, "PLAN", Grid(["Hopper-v4"], ["none", "clip:0.2"], [1, 2]))
    table1.freeze_scale(folder)
    assert table1.frozen_scale(["Hopper-v4"]) == (100, 500)


def test_a_frozen_scale_outlives_the_runs_that_set_it(tmp_path, monkeypatch):
    runs = [row("Hopper-v4", o, 1, x) for o, x in (("none", 100), ("clip:0.2", 500))]
    first = write_folder(tmp_path / "first", runs, {"Hopper-v4": (20, 100)})
    monkeypatch.setattr(table1, "SCALE", first / "scale.csv")
    whole = table1.PLAN
    monkeypatch.setattr(table1, "PLAN", Grid(["Hopper-v4"], ["none", "clip:0.2"], [1, 2]))
    assert table1.frozen_scale(["Hopper-v4"]) is None
    args = ["--report", "--tasks", "Hopper", "--objectives", "none", "clip:0.2", "--results"]
    with pytest.raises(UserError, match="the scale is that of"):
        table1.main([*args, str(tmp_path), "--seeds", "1", "--freeze-scale"])
    with pytest.raises(UserError, match="2 of 4 runs are missing"):  # of the plan
        table1.main([*args, str(first), "--seeds", "1", "--freeze-scale"])
    monkeypatch.setattr(table1, "PLAN", Grid(["Hopper-v4"], ["none", "clip:0.2"], [1]))
    rows = {name: sweep.read(first / f"{name}.csv") for name in ("runs", "random")}
    others = rows["runs"].replace("--preset paper", "--preset modern", regex=True)
    sweep.write(first / "runs.csv", others)
    with pytest.raises(UserError, match="holds runs of other settings"):
        table1.main([*args, str(first), "--seeds", "1", "--freeze-scale"])
    sweep.write(first / "runs.csv", rows["runs"])
    sweep.write(first / "random.csv", rows["random"].query("seed != '1'"))
    with pytest.raises(UserError, match="no Gaussian policy for Hopper-v4 1;"):
        table1.main([*args, str(first), "--seeds", "1", "--freeze-scale"])
    assert not table1.SCALE.exists()
    sweep.write(first / "random.csv", rows["random"])
    table1.main([*args, str(first), "--seeds", "1", "--freeze-scale"])
    with pytest.raises(UserError, match="is frozen already"):
        table1.main([*args, str(first), "--seeds", "1", "--freeze-scale"])
    monkeypatch.setattr(table1, "PLAN", whole)
    assert table1.frozen_scale(["Hopper-v4"]) == (99, 500)  # the untrained policy of seed 1 has 99
    assert table1.frozen_scale(["Hopper-v4", "Reacher-v4"]) is None
    cells = itertools.product(("none", "clip:0.2"), (1, 2))
    runs = [row("Hopper-v4", o, seed, 300 if o == "none" else 900) for o, seed in cells]
    later = write_folder(tmp_path / "later", runs, {"Hopper-v4": (20, 200)})
    table1.main([*args, str(later), "--seeds", "1", "2"])
    text = (later / "summary.md").read_text()
    assert "On the frozen scale" in text and "| `none` | 1.50 [" in text  # (900 - 300) / 401
    assert re.search(r"^\| `clip:0.2` \| 0.82 \|.* 2.00 \|$", text, re.M)  # (900 - 99) / 401


def test_report_of_a_part_says_so(tmp_path):
    cells = [
        (task, objective, 1)
        for task in ("Hopper-v4", "Swimmer-v4")
        for objective in ("none", "clip:0.2")
    ]
    folder = write_folder(
        tmp_path / "t",
        [row(*cell, 1.0 + i) for i, cell in enumerate(cells[:3])],
        {"Hopper-v4": (0, 0)},
    )
    args = [
        "--report",
        "--results",
        str(folder),
        "--tasks",
        "Hopper",
        "Swimmer",
        "--seeds",
        "1",
        "--objectives",
    ]
    table1.main([*args, "none", "clip:0.2"])
    text = (folder / "summary.md").read_text()
    assert (
        "**PARTIAL: 3 of 4 runs are in**" in text
        and "Scored is what has no gap: Hopper-v4; seeds 1." in text
    )
    assert "averaged over 1 tasks x 1 seeds" in text and "| Swimmer-v4 | 0" not in text
    table1.main([*args, "none", "clip:0.2", "kl:1"])
    text = (folder / "summary.md").read_text()
    assert (
        "**PARTIAL: 3 of 6 runs are in**" in text
        and "No scores yet." in text
        and "## Scores" not in text
    )
    # left from before
    assert not (folder / "scores.md").exists() and not (folder / "scores.png").exists()
    table1.main(["--report", "--results", str(folder)])
    assert "**PARTIAL: 3 of 770 runs are in**" in (folder / "summary.md").read_text()


def test_seeds_that_all_tasks_have_are_scored_and_no_return_counts_as_the_lowest(
    tmp_path, monkeypatch
):
    tasks, objectives = ["Hopper-v4", "Swimmer-v4"], ("none", "clip:0.2", "kl:1")
    monkeypatch.setattr(table1, "TASKS", tasks)  # or nothing is compared with the paper
    cells = list(itertools.product(tasks, objectives, (1, 2, 3, 4)))
    runs = [row(*cell, (10 if cell[0] == tasks[0] else 5) * cell[2]) for cell in cells[:-1]]
    runs[2]["last_100_return"] = "nan"  # Hopper, none, seed 3
    folder = write_folder(tmp_path / "t", runs, dict.fromkeys(tasks, (0, 0)))
    args = ["--report", "--results", str(folder), "--tasks", *tasks, "--objectives", *objectives]
    table1.main([*args, "--seeds", "1", "2", "3", "4"])
    text = (folder / "summary.md").read_text()
    assert "PARTIAL: 23 of 24" in text and "no gap: Hopper-v4, Swimmer-v4; seeds 1, 2, 3." in text
    assert "without a finite return counts as the lowest of its task: Hopper-v4 none 3." in text
    assert "| nan (10.0 to 40.0) |" in text  # where all returns are listed, it has none
    # Hopper 1/3, 2/3 and 1/3 in place of 1; Swimmer 1/3, 2/3 and 1
    assert "averaged over 2 tasks x 3 seeds" in text and "| `none` | -0.39 | 0.56 [" in text
    assert "The tests wait until all runs of the plan are in" in text and "p, Holm" not in text
    ours = theirs = np.array([[1.0, 2.0, 3.0]] * 2) / 3  # of clip:0.2 and of kl:1
    seen = [scores.detectable(ours, theirs, level) for level in (0.05, 0.025)]
    gap = PAPER["clip:0.2"] - PAPER["kl:1"]
    seeds = [scores.seeds_to_detect(ours, theirs, gap, level) for level in (0.05, 0.025)]
    told = f"{seen[0]:.2f} / {seen[1]:.2f} | 0.11 | {seeds[0]} / {seeds[1]}"
    assert f"| {told} |" in text and 3 < seeds[0] < seeds[1]
    assert "With 3 seeds, 1 of 2 differences as large as the paper's can be detected" in text
    assert f"to detect all of them takes {seeds[1]} seeds.\n" in text


def test_report_compares_all_eleven_with_the_paper(tmp_path, monkeypatch):
    """Returns that are the paper's own scores must correlate with it perfectly."""
    theirs = grids.PAPER["avg_normalized_score"]
    cells = itertools.product(grids.TASKS, theirs.index, (1, 2, 3))
    runs = [row(task, o, seed, 1000 * theirs[o]) for task, o, seed in cells]
    more = [row("Hopper-v4", "kl:1", 4, 5000)]  # beyond the plan: it changes no score
    folder = write_folder(tmp_path / "t", runs + more, dict.fromkeys(grids.TASKS, (0, 0)))
    monkeypatch.setattr(table1, "PLAN", table1.PLAN._replace(seeds=[1, 2, 3]))
    monkeypatch.setattr(table1, "SCALE", folder / "scale.csv")
    args = ["--report", "--results", str(folder), "--seeds", "1", "2", "3"]
    table1.main(args)
    text = (folder / "summary.md").read_text()
    assert "the plan are in and the scale is frozen.\n" in text and "p, Holm" not in text
    table1.main([*args, "--freeze-scale"])
    text = (folder / "summary.md").read_text()
    assert "Scored is the plan: HalfCheetah-v4" in text and "On the frozen scale" in text
    assert "**PARTIAL: 232 of 308 runs are in**" in text and "7 tasks x 3 seeds" in text
    correlation = " | 1.00 [1.00, 1.00]" * 4
    assert f"| Spearman correlation with the paper [95%] | {correlation} |" in text
    assert "We chose these tests when 99 of the 770" in text and "| p | p, Holm |" in text
    # no spread: a difference of any size would be seen, with as few seeds as there can be
    assert re.search(
        r"^\| `none` \| 1\.48 \[.* < 0.0001 .* 0.00 / 0.00 \| 1.21 \| 2 / 2 \|$", text, re.M
    )
    assert (folder / "beta.png").exists()
    when = []
    monkeypatch.setattr(table1, "tell_contrasts", lambda *given: when.append(given[-1]) or "")
    table1.main(args)
    left = sweep.read(folder / "runs.csv")
    gone = (left["env_id"] == "Walker2d-v4") & (left["objective"] == "kl:10")
    sweep.write(folder / "runs.csv", left[~(gone & (left["seed"] == "3"))])
    table1.main(args)
    assert when == ["planned", "before"]  # the scale is there, but a run is missing


def test_report_refuses_runs_of_other_settings(tmp_path):
    folder = write_folder(tmp_path, [row("Hopper-v4", "none", 1, 1.0)], {"Hopper-v4": (0, 0)})
    for flags in (["--preset", "modern"], ["--", "--bootstrap-truncated"]):
        with pytest.raises(UserError, match="holds runs of other settings"):
            table1.main(["--report", "--results", str(folder), *flags])


def test_report_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="has no run yet"):
        table1.main(["--report", "--results", str(tmp_path)])
    grid = Grid(["Hopper-v4"], ["none", "kl:1"], [1])
    folder = write_folder(
        tmp_path / "t", [row(*cell, 1.0) for cell in grid.cells], {"Swimmer-v4": (0, 0)}
    )
    with pytest.raises(UserError, match=r"random.csv has no gaussian policy for Hopper-v4"):
        table1.report(folder, grid, grids.common_flags("paper", 1_000_000, []))


# ------------------------------------------------------------------------------------------ RUNS
def test_only_missing_cells_are_planned():
    grid = Grid(["Hopper-v4", "Swimmer-v4"], ["none", "clip:0.2", "kl:1"], [1, 2])
    done = {("Hopper-v4", "clip:0.2", 1), ("Hopper-v4", "clip:0.2", 2), ("Swimmer-v4", "kl:1", 2)}
    calls = grids.plan(grid, done, ["--preset", "modern"], "runs/x")
    named = [call.flags[-1].removeprefix("runs/x/") for call in calls]
    assert named == [
        "Hopper-v4__1-2__none_kl-1",
        "Swimmer-v4__1-2__none_clip-0.2",
        "Swimmer-v4__1__kl-1",
    ]
    assert [len(call.crowd) for call in calls] == [4, 4, 1]
    crowd = [args for call in calls for args in call.crowd]
    trained = [(args.env_id, args.objective, args.seed) for args in crowd]
    assert len(trained) == 9 and set(trained) == set(grid.cells) - done
    assert all(args.scale_rewards and args.anneal_lr for args in crowd)  # modern
    assert calls == grids.plan(grid, done, ["--preset", "modern"], "runs/x")
    assert grids.plan(grid, set(grid.cells), [], "runs/x") == []
    ten = Grid(grid.tasks, table1.OBJECTIVES["paper"], list(range(1, 11)))
    calls = grids.plan(ten, set(), [], "runs/x")  # 110 agents of each task, in three calls
    assert [len(call.crowd) for call in calls] == [44, 44, 44, 44, 22, 22]
    assert [call.crowd[0].env_id for call in calls] == grid.tasks * 3  # the first seeds first
    many = Grid(["Hopper-v4"], [f"clip:0.{i}" for i in range(1, 10)], [1, 2, 3, 4, 5])
    assert [len(call.crowd) for call in grids.plan(many, set(), [], "runs/x")] == [36, 9]


def test_rows_say_what_the_run_folder_says(whole):
    runs, curves = read_csv(whole / "small/runs.csv"), read_csv(whole / "small/curves.csv")
    cells = [(task, objective, "1") for task in TASKS for objective in ("none", "clip:0.2")]
    assert [(run["env_id"], run["objective"], run["seed"]) for run in runs] == cells
    for run in runs:
        (folder,) = (whole / "small/runs").glob(f"{run['env_id']}__*/")
        mine = folder / f"{run['objective'].replace(':', '-')}__{run['seed']}"
        metrics = read_csv(mine / "metrics.csv")
        (summary,) = json.loads((mine / "summary.json").read_text())
        assert float(run["sps"]) == 2 * summary["sps"]  # of both agents together
        assert float(run["last_100_return"]) == float(metrics[-1]["charts/episodic_return"])
        kl = [float(m["losses/kl_after_update"]) for m in metrics]
        assert float(run["kl_max"]) == max(kl) and float(run["kl_median"]) == np.median(kl)
        points = [p for p in curves if cell_of(p) == cell_of(run)]
        # fewer than 200: all of them
        assert [p["global_step"] for p in points] == [m["global_step"] for m in metrics]
        for name, column in LAYOUT.curves.items():
            told = [float(p[name]) for p in points]
            assert np.allclose(told, [float(m[column]) for m in metrics], rtol=1e-5)
        assert run["agents"] == "2"
        script, *words = run["command"].removeprefix("python ").split()
        assert script == "benchmark/lockstep.py" and words[-1] == f"small/runs/{folder.name}"
        cells = [(args.objective, args.seed) for args in grids.parse(words)]
        assert cells == [("none", 1), ("clip:0.2", 1)]
        config = json.loads((mine / "config.json").read_text())
        assert not config["args"]["bootstrap_truncated"] and not config["args"]["scale_rewards"]


def test_curves_are_thinned(whole):
    grid = Grid(TASKS[:1], ["none", "clip:0.2"], [1])
    (call,) = grids.plan(grid, set(), settings(24), "small/runs")
    assert LAYOUT.points == 200
    _, points = sweep.collect(replace(call, root=str(whole)), replace(LAYOUT, points=10))
    steps = points[points["objective"] == "none"]["global_step"].astype(int).tolist()
    assert len(steps) == 10 and steps[0] == 128 and steps[-1] == 128 * 24


def test_stretches_of_a_curve_are_averaged():
    metrics = pd.DataFrame({"global_step": [1, 2, 3, 4, 5], "x": [1.0, 3.0, np.nan, 5.0, np.nan]})
    points = sweep.average(metrics, 2)
    assert points["global_step"].tolist() == [3, 5] and points["x"].tolist() == [2, 5]
    assert sweep.average(metrics, 9)["global_step"].tolist() == [1, 2, 3, 4, 5]


def test_untrained_policies_score_as_others_measured(whole):
    """Reacher: uniform actions -43.0 +- 3.9 (JAT); the untrained Gaussian, not clipped, -88 to -112
    (the paper's Figure 3). InvertedPendulum: 6.1 +- 3.5 and 9 to 19.
    """
    rows = read_csv(whole / "small/random.csv")
    told = {(row["env_id"], row["policy"], row["seed"]): float(row["mean_return"]) for row in rows}
    assert len(told) == len(rows) == 4 and all(row["episodes"] == "100" for row in rows)
    assert -45 < told["Reacher-v4", "uniform", "1"] < -41
    assert -115 < told["Reacher-v4", "gaussian", "1"] < -85
    assert 5 < told["InvertedPendulum-v4", "uniform", "1"] < 7.5
    assert 6 < told["InvertedPendulum-v4", "gaussian", "1"] < 19


def test_the_first_episode_of_every_actor_counts_for_an_untrained_policy(monkeypatch):
    ends = iter([[(0, 1.0, 1)], [(0, 2.0, 1)], [(1, 7.0, 3)]])
    actors = SimpleNamespace(num_envs=2, restart=lambda seeds: None, close=lambda: None)
    actors.envs = SimpleNamespace(single_action_space=gym.spaces.Box(-1, 1, (1,)))
    actors.step = lambda actions: (None, next(ends))
    monkeypatch.setattr(grids.ppo, "Actors", lambda args, count: actors)
    assert grids.uniform([grids.ppo.Args(eval_episodes=2)]) == [[1.0, 7.0]]


def test_every_seed_has_untrained_policies_of_its_own(tmp_path):
    """And keeps them, whoever else is measured."""
    for seeds in ([1], [1, 2, 3]):
        grid = Grid(TASKS[1:], [], seeds)
        grids.measure(grid, settings(1), tmp_path / "random.csv")
    both = read_csv(tmp_path / "random.csv")
    grids.measure(Grid(TASKS[1:], [], [3]), settings(1), tmp_path / "alone.csv")
    assert [row["policy"] + row["seed"] for row in both] == [
        p + s for p in ("uniform", "gaussian") for s in "123"
    ]
    assert len({row["mean_return"] for row in both}) == 6
    alone = [row["mean_return"] for row in read_csv(tmp_path / "alone.csv")]
    assert alone == [row["mean_return"] for row in both if row["seed"] == "3"]


def test_killed_at_a_random_moment_it_ends_with_the_same_files(whole, tmp_path):
    """SIGKILL strikes the master, while either task is at a random update.

    Its worker must not outlive it.
    """
    rng = random.Random("kill")
    task, update = rng.choice(TASKS), rng.randrange(2, 20)
    folder = tmp_path / f"small/runs/{task}__1__none_clip-0.2"
    metrics = folder / "clip-0.2__1/metrics.csv"
    command = [sys.executable, str(ROOT / "benchmark/table1.py"), *flags(24)]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    wait_for(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > update)
    process.kill()
    process.wait()
    where = f"killed in update {update} of {task}"
    sizes = []

    def rests():
        sizes.append(metrics.stat().st_size)
        time.sleep(0.3)
        return metrics.stat().st_size == sizes[-1]

    wait_for(rests, seconds=30)
    assert not metrics.with_name("summary.json").exists(), where
    with contextlib.chdir(tmp_path):
        table1.main(flags(24))
    for name in ("runs.csv", "curves.csv", "random.csv"):
        assert untimed(tmp_path / "small" / name) == untimed(whole / "small" / name), where
    log = folder.with_name(f"{folder.name}.log").read_text()
    assert log.count("evaluation") == 2  # of 2 agents, once
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "small/runs").rglob("*")}
    with contextlib.chdir(tmp_path):
        table1.main(flags(24))  # all is done: nothing runs
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "small/runs").rglob("*")
    }


def test_a_crowd_that_was_stopped_at_its_last_files_is_completed(whole, tmp_path, monkeypatch):
    """Killed when only one of its agents had a summary."""
    shutil.copytree(whole / "small/runs", tmp_path / "small/runs")
    grid = Grid(TASKS[:1], ["none", "clip:0.2"], [1])
    (call,) = grids.plan(grid, set(), settings(24), "small/runs")
    expected = sweep.collect(replace(call, root=str(whole)), LAYOUT)
    call = replace(call, root=str(tmp_path))
    (call.folders[1] / "summary.json").unlink()
    monkeypatch.setattr(sweep, "git_commit", lambda: "later")
    before, _ = sweep.commits_of(call.path), sweep.work(call, LAYOUT)
    assert len(before) == 1
    assert set(sweep.work(call, LAYOUT).runs["git_commit"]) == {f"{before[0]} and later"}
    for rows, others in zip(sweep.work(call, LAYOUT), expected, strict=True):
        timing = rows.columns.intersection(TIMING)
        pd.testing.assert_frame_equal(rows.drop(columns=timing), others.drop(columns=timing))


def test_missing_cells_are_filled_in_beside_those_that_are_there(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = TASKS[0]
    all_of_it = flags(24)
    all_of_it.remove(TASKS[1])
    part = all_of_it.copy()
    part.remove("none")
    table1.main(part)
    (first,) = read_csv("small/runs.csv")
    assert (first["objective"], first["agents"]) == ("clip:0.2", "1")
    table1.main(all_of_it)
    runs = read_csv("small/runs.csv")
    assert [run["objective"] for run in runs] == ["none", "clip:0.2"] and runs[1] == first
    folders = {path.name for path in Path("small/runs").glob("*/")}
    assert folders == {f"{task}__1__none", f"{task}__1__clip-0.2"}
    expected = [row for row in untimed(whole / "small/random.csv") if row["env_id"] == task]
    assert untimed(Path("small/random.csv")) == expected


def test_a_worker_whose_disk_fails_says_so(tmp_path):
    (call,) = grids.plan(Grid(TASKS[:1], ["none"], [1]), set(), settings(2), "runs/x")
    (tmp_path / "runs").write_text("a file where a folder should be")
    engine = sweep.local([replace(call, root=str(tmp_path))], LAYOUT, lambda: None, jobs=1)
    ((_, told),) = engine
    assert isinstance(told, UserError) and "NotADirectoryError" in str(told)


def test_two_tables_never_share_a_run():
    assert sweep.runs_of(ROOT / "benchmark/results/collapse/x") == "runs/collapse/x"
    assert sweep.runs_of(Path("mine/table1")) == "mine/table1/runs"


def test_only_what_a_trainer_fills_in_may_differ(tmp_path):
    """A run folder of other flags would be reported under this command."""
    made = {"value_clip": None, "checkpoint_every": 7, "env_backend": "envpool", "run_dir": "x"}
    (tmp_path / "config.json").write_text(json.dumps({"args": made}))
    given = {"checkpoint_every": 0, "env_backend": "auto", "run_dir": None, "value_clip": None}
    assert sweep.read_config(tmp_path, SimpleNamespace(**given))["args"] == made
    for other in ({"checkpoint_every": 5}, {"env_backend": "gymnasium"}, {"value_clip": 0.2}):
        with pytest.raises(UserError, match="ran with"):
            sweep.read_config(tmp_path, SimpleNamespace(**given | other))
    (tmp_path / "config.json").write_text(json.dumps({"args": made | {"value_clip": 0.2}}))
    with pytest.raises(UserError, match=r"ran with value_clip 0\.2 instead of None"):
        sweep.read_config(tmp_path, SimpleNamespace(**given))


def test_a_worker_that_dies_stops_nobody_else(tmp_path):
    calls = grids.plan(Grid(TASKS, ["clip:0.2"], [1]), set(), settings(2), "runs/x")
    calls = [replace(call, root=str(tmp_path)) for call in calls]
    killed = []

    def tick():
        if not killed:
            (child,) = multiprocessing.active_children()
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    (first, died), (second, done) = sweep.local(calls, LAYOUT, tick, jobs=1)
    assert first == calls[0] and isinstance(died, UserError) and "its process died" in str(died)
    assert second == calls[1] and done.runs["env_id"].tolist() == ["Reacher-v4"]

    shutil.rmtree(tmp_path / "runs")  # or what is done would be collected without an engine
    table = sweep.Table(tmp_path / "small", LAYOUT)
    with pytest.raises(UserError, match=r"^1 of 2 calls failed: .*InvertedPendulum.* process died"):
        both = [(first, died), (second, done)]
        sweep.run(calls, lambda *_: iter(both), lambda call: table)
    assert [run["env_id"] for run in read_csv(tmp_path / "small/runs.csv")] == ["Reacher-v4"]


def meet(call, layout, mine, pipe):
    """In a worker, instead of training: wait for the other one, and tell the cores there are."""

    def work(call, layout):
        mark = Path(call.root, call.flags[1])
        mark.touch()
        wait_for(lambda: len(list(mark.parent.iterdir())) == 2)
        return sorted(os.sched_getaffinity(0)), mine

    sweep.work = work
    sweep.answer(call, layout, mine, pipe)


@pytest.mark.skipif(len(sweep.CORES) < 2, reason="one core has nothing to share out")
def test_side_by_side_each_has_its_own_cores(tmp_path):
    calls = grids.plan(Grid(TASKS, ["clip:0.2"], [1]), set(), settings(2), "runs/x")
    calls = [replace(call, root=str(tmp_path)) for call in calls]
    found = dict(sweep.local(calls, LAYOUT, lambda: None, jobs=2, target=meet))
    (one, given), (two, other) = (found[call] for call in calls)
    assert one == given and two == other and not set(one) & set(two)
    assert len(one) == len(two) == len(sweep.CORES) // 2


def test_hours_on_the_clock_count_what_overlaps_once():
    calls = [("2026-01-01T10:00:00", 3600.0), ("2026-01-01T10:30:00", 3600.0)]
    calls += [("2026-01-02T08:00:00", 1800.0), ("2026-01-01T10:45:00", 60.0)]
    calls += [("2026-01-01T10:00:00", 3600.0)]
    calls = pd.DataFrame(calls, columns=["started", "wall_seconds"])
    assert sweep.on_the_clock(calls) == 1.5 * 3600 + 1800


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--objectives", "nonsense"], "'nonsense' is no objective"),
        (["--seeds", "-1"], "--seed must be between 0"),
        (["--", "--seed", "1"], "--seed: here it is --seeds"),
        (["--tasks", "Nonsense"], "cannot make 'Nonsense-v4'"),
        (["--preset", "ancient"], "invalid choice: 'ancient'"),
        (["--total-timesteps", "0"], "at least 1"),
        (["--engine", "ray", "--jobs", "2"], "--jobs is for this machine alone"),
    ],
)
def test_bad_flags_are_refused_in_one_line(more, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        table1.main(["--results", "small", *more])
    assert not list(tmp_path.rglob("*.csv")) and not (tmp_path / "small/runs").exists()


def test_flags_that_do_not_exist_get_the_box_of_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        table1.main(["--results", "small", "--", "--no-such-flag"])
    assert stop.value.code == 2 and "no-such-flag" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.csv")) and not (tmp_path / "small/runs").exists()


COMMITTED = {  # folder -> its preset and flags, how many seeds, whether it bootstraps time limits
    "table1": ("paper", [], 10, False),
    "table1-bootstrapped": ("paper", ["--bootstrap-truncated"], 3, True),
    "table1-modern": ("modern", [], 5, True),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_table_lacks_nothing_and_takes_no_run_of_another_meaning(
    name, tmp_path, monkeypatch
):
    """Those of table1-bootstrapped say `--preset paper`, which bootstrapped at that time."""
    monkeypatch.chdir(tmp_path)
    preset, more, count, bootstraps = COMMITTED[name]
    seeds = [str(seed) for seed in range(1, count + 1)]
    shutil.copytree(ROOT / "benchmark/results" / name, tmp_path / "mine")
    planned = []
    monkeypatch.setattr(sweep, "run", lambda calls, *_: planned.extend(calls))
    monkeypatch.setattr(table1, "report", lambda *_: None)
    flags = ["--preset", preset, "--results", "mine", "--seeds", *seeds]
    table1.main([*flags, "--", *more])
    assert planned == []
    table1.main([*flags, "99", "--tasks", "Hopper", "--", *more])
    assert {args.bootstrap_truncated for call in planned for args in call.crowd} == {bootstraps}
    assert {args.seed for call in planned for args in call.crowd} == {99}
    other = "--no-bootstrap-truncated" if bootstraps else "--bootstrap-truncated"
    with pytest.raises(UserError, match="holds runs of other settings"):
        table1.main([*flags, "--", other])
    table = sweep.Table(tmp_path / "mine", LAYOUT)
    if more:  # without them the preset means something else today
        with pytest.raises(UserError, match="holds runs of other settings"):
            grids.check(table, grids.common_flags(preset, 1_000_000, []))
    grids.check(table, grids.common_flags(preset, 1_000_000, more))
    table.runs.loc[0, "bootstrap_truncated"] = str(not bootstraps)
    with pytest.raises(UserError, match="holds runs of other settings"):
        grids.check(table, grids.common_flags(preset, 1_000_000, more))


def test_results_of_other_settings_are_left_alone(whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = (whole / "small/runs.csv").read_bytes()
    with pytest.raises(UserError, match=r"holds runs of other settings: .*--total-timesteps 3072"):
        table1.main(flags(25))
    assert (whole / "small/runs.csv").read_bytes() == before


def test_a_run_folder_of_other_flags_is_refused(whole):
    grid = Grid(TASKS[:1], ["none", "clip:0.2"], [1])
    (call,) = grids.plan(grid, set(), settings(25), "small/runs")
    what = "ran with total_timesteps 3072 instead of 3200; remove the folder"
    with pytest.raises(UserError, match=what):
        sweep.work(replace(call, root=str(whole)), LAYOUT)


def test_two_at_once_are_refused(tmp_path):
    with (
        sweep.alone(tmp_path),
        pytest.raises(UserError, match=r"another process is at work"),
        sweep.alone(tmp_path),
    ):
        pass
    with sweep.alone(tmp_path):  # and nothing is left behind
        assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- RAY
def test_ray_gives_the_same_files_though_a_machine_dies(whole, tmp_path, monkeypatch):
    """A cluster of two machines with a task on each; one is shut off in the middle of its task."""
    pytest.importorskip("ray", reason="Ray is optional: pip install -r requirements-ray.txt")
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in TASKS]
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        folders = [tmp_path / f"small/runs/{task}__1__none_clip-0.2" for task in TASKS]
        agents = [folder / "clip-0.2__1" for folder in folders]
        unfinished = []

        def at_work(agent: Path) -> bool:
            path = agent / "metrics.csv"
            return path.exists() and len(path.read_bytes().splitlines()) > 4

        def shut_off():
            wait_for(lambda: any(map(at_work, agents)))
            unfinished.extend(agent for agent in agents if not (agent / "summary.json").exists())
            cluster.remove_node(nodes[0], allow_graceful=False)

        thread = threading.Thread(target=shut_off)
        thread.start()
        table1.main([*GRID, "--engine", "ray", *flags(24)[len(GRID) :]])
        thread.join()
    finally:
        cluster.shutdown()
    # both were at work, and one no longer is
    assert len(unfinished) == 2 and not nodes[0].any_processes_alive()
    for name in ("runs.csv", "curves.csv", "random.csv"):
        assert untimed(tmp_path / "small" / name) == untimed(whole / "small" / name)
