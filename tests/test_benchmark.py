"""benchmark/: plot.py, classic.py and speed.py, at toy size."""

import ast
import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import LIMIT
from matplotlib.figure import Figure

import benchmark
import ppo_cartpole
from benchmark import (
    UserError,
    classic,
    git_commit,
    gpu,
    lockstep,
    plot,
    read_csv,
    scores,
    speed,
    sweep,
)
from benchmark.baselines import trpo

ROOT = Path(__file__).resolve().parents[1]
TOY = "--total-timesteps 4096 --num-envs 4 --num-steps 64 --num-minibatches 8 --eval-episodes 1"
LONGER = TOY.replace("4096", "16384") + " --checkpoint-every 5"
QUIET = {"capture_output": True, "text": True, "cwd": ROOT}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    """Finished runs of TOY in toy/1 and toy/2, as classic.py would leave them."""
    root = tmp_path_factory.mktemp("classic")
    for seed in (1, 2):
        flags = f"{TOY} --seed {seed} --run-dir {root / 'toy' / str(seed)}"
        ppo_cartpole.train(ppo_cartpole.parse_args(flags.split()))
    return root


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """classic.py with one task of two seeds, and folders of its own for runs and results.

    Returns set_flags.
    """
    monkeypatch.setattr(classic, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(classic, "RESULTS", tmp_path / "results")

    def set_flags(flags: str, seeds: range = range(1, 3), threshold: float = 20) -> Path:
        monkeypatch.setattr(classic, "TASKS", {"toy": classic.Task(flags, seeds, threshold)})
        return tmp_path

    return set_flags


def write_run(
    folder: Path, agents: list[tuple[int, str]], rows: list[tuple[int, str]], **config
) -> Path:
    """A run folder with the same (global_step, episodic_return) rows for every agent."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"script": "ppo_cartpole", "args": {"env_id": "E-v0"}} | config)
    )
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["update", "global_step", "seed", "objective", "charts/episodic_return"])
        for update, (step, ret) in enumerate(rows, 1):
            writer.writerows([update, step, seed, objective, ret] for seed, objective in agents)
    return folder


# ---------------------------------------------------------------------------------------- ARROWS
SHARED = {"lockstep": set(), "scores": set(), "sweep": set(), "plot": {"scores"}}
SHARED["grids"] = {"sweep", "lockstep"}
SHARED["gpu"] = {*SHARED, "speed"}  # the same measurements, on another device
SHARED["speed"] = {"lockstep", "sweep", "baselines"}  # TRPO has a suite
SHARED["humanoid"] = {"sweep", "scores", "plot", "humanoid_ppo"}  # the runs of its own script
FILES = sorted(path.stem for path in (ROOT / "benchmark").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_imported_from_a_table(name):
    """Tables and figures -> grids, sweep, scores, plot -> lockstep -> the scripts."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"benchmark/{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "benchmark":
            imported |= {alias.name for alias in node.names} & set(FILES)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("benchmark."):
            imported.add(node.module.removeprefix("benchmark."))
    assert imported <= SHARED.get(name, set(SHARED))


def test_no_file_is_named_as_a_package():
    """Python looks beside the file that it runs first: benchmark/mujoco.py would be `mujoco`."""
    assert len(FILES) > 10
    assert [name for name in FILES if importlib.util.find_spec(name)] == []


# -------------------------------------------------------------------------------------- VERSIONS
def test_the_commit_is_marked_where_code_has_changed_and_not_where_results_have(
    tmp_path, monkeypatch
):
    def git(*argv: str) -> str:
        who = ["user.name=me", "user.email=me@example.org", "commit.gpgsign=false"]
        options = [word for setting in who for word in ("-c", setting)]
        command = ["git", *options, "-C", tmp_path, *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    code, results = tmp_path / "benchmark/code.py", tmp_path / "benchmark/results.csv"
    code.parent.mkdir()
    monkeypatch.setattr(benchmark, "__file__", str(code))
    assert git_commit() == ""  # no repository
    git("init", "-q")
    code.write_text("1\n")
    results.write_text("1\n")
    assert git_commit() == ""  # no commit
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD").strip()
    assert git_commit() == head
    results.write_text("2\n")
    (code.parent / "new.txt").write_text("1\n")
    assert git_commit() == head
    code.write_text("2\n")
    assert git_commit() == f"{head}-dirty"
    git("commit", "-qam", "second")
    assert git_commit() == git("rev-parse", "HEAD").strip() != head
    monkeypatch.setenv("PATH", "")
    assert git_commit() == ""  # no git


# ------------------------------------------------------------------------------------------ PLOT
def test_plot_draws_runs(two_runs, tmp_path):
    picture = tmp_path / "a.png"
    runs = [two_runs / "toy/1", two_runs / "toy/2"]
    command = [sys.executable, "benchmark/plot.py", *runs, "-o", picture]
    done = subprocess.run(command, **QUIET)
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert shape(*runs) == {"CartPole-v1": {"clip:0.2": 2}}


def shape(*folders) -> dict:
    """How many curves each line of each panel has."""
    panels = plot.read_runs(folders)
    return {env: {line: len(c) for line, c in lines.items()} for env, lines in panels.items()}


def test_what_has_one_point_cannot_be_drawn():
    line, point = (np.arange(2), np.ones(2)), (np.arange(1), np.ones(1))
    found = plot.drawable({"a": [line, point], "b": [point], "c": []})
    assert list(found) == ["a"] and len(found["a"]) == 1 and found["a"][0] is line


def test_plot_takes_the_folders_of_a_crowd(tmp_path):
    """All of them by *, which names the crowd's own files too."""
    flags = "--env-id Pendulum-v1 --num-steps 64 --total-timesteps 512 --no-compile"
    flags += " --num-minibatches 2 --update-epochs 1 --seeds 1 2 --objectives none clip:0.2"
    flags += f" --eval-episodes 1 --checkpoint-every 8 --run-dir {tmp_path / 'crowd'}"
    lockstep.train(*lockstep.parse_args(flags.split()))
    names = list((tmp_path / "crowd").iterdir())
    assert {path.name for path in names if path.is_file()} == {"config.json", "checkpoint.pt"}
    assert shape(*names) == {"Pendulum-v1": {"none": 2, "clip:0.2": 2}}
    plot.main([*map(str, names), "-o", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no run folder"):
        plot.read_runs([path for path in names if path.is_file()])


@pytest.mark.parametrize(
    "what, flags",
    [
        ("missing", ["no/such/run"]),
        ("unwritable", ["-o", "no/such/folder/a.png"]),
        ("format", ["-o", "a.nonsense"]),
    ],
)
def test_plot_refuses_in_one_line(what, flags, two_runs, tmp_path):
    runs = [] if what == "missing" else [two_runs / "toy/1"]
    done = subprocess.run([sys.executable, "benchmark/plot.py", *runs, *flags], **QUIET)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr)


def test_plot_says_what_is_wrong_with_a_run(tmp_path):
    whole = write_run(tmp_path / "whole", [(1, "a")], [(10, "1"), (20, "2")])
    again = write_run(tmp_path / "again", [(1, "a")], [(10, "1"), (20, "2")])
    young = write_run(tmp_path / "young", [(1, "a")], [(10, "")])
    empty = write_run(tmp_path / "empty", [(1, "a")], [])
    short = write_run(tmp_path / "short", [(1, "a")], [(10, "1")])
    broken = write_run(tmp_path / "broken", [(1, "a")], [(10, "1")], args={})
    garbled = write_run(tmp_path / "garbled", [(1, "a")], [(10, "1"), (20, "x")])
    for folders, complaint in {
        (whole, again): "both ppo_cartpole.py on E-v0, a, seed 1",
        (young,): "no metrics yet",
        (empty,): "no metrics yet",
        (broken,): "not a run folder with curves",
        (garbled,): "not a run folder with curves",
        (short,): "needs two steps",
    }.items():
        with pytest.raises(UserError, match=complaint):
            plot.draw(tmp_path / "a.png", plot.read_runs(folders))
    plot.draw(tmp_path / "a.png", plot.read_runs([whole, whole]))  # named twice is drawn once


def test_plot_groups_by_what_differs(tmp_path):
    rows = [(10, ""), (20, "1"), (30, "3")]  # the first row precedes the first finished episode
    six = [(seed, objective) for seed in (1, 2, 3) for objective in ("none", "clip:0.2")]
    many = write_run(tmp_path / "many", six, rows)
    made = {"script": "ppo_continuous"}
    other = write_run(tmp_path / "other", [(1, "none"), (1, "clip:0.2")], rows, **made)
    made["args"] = {"env_id": "F-v0"}
    third = write_run(tmp_path / "third", [(1, "none")], rows, **made)
    assert shape(many) == {"E-v0": {"none": 3, "clip:0.2": 3}}
    lines = {"ppo_cartpole, none": 3, "ppo_cartpole, clip:0.2": 3, "ppo_continuous, none": 1}
    assert shape(many, other, third) == {
        "E-v0": lines | {"ppo_continuous, clip:0.2": 1},
        "F-v0": {"ppo_continuous, none": 1},
    }
    steps, returns = plot.on_grid(plot.read_runs([many])["E-v0"]["none"])
    assert (steps[0], steps[-1], len(steps)) == (20, 30, plot.POINTS)
    assert returns.shape == (3, plot.POINTS) and np.allclose(returns, 1 + (steps - 20) / 5)
    plot.draw(tmp_path / "a.png", plot.read_runs([many, other, third]), threshold=2)


def test_plot_draws_answers_too(tmp_path):
    made = {"script": "grpo_toy", "args": {"task": "sort"}}
    run = write_run(tmp_path / "a", [(1, "grpo")], [(10, "0.5"), (20, "1.0")], **made)
    ((steps, returns),) = plot.read_runs([run])["sort"]["grpo"]
    assert steps.tolist() == [10, 20] and returns.tolist() == [0.5, 1.0]


def test_curves_never_extrapolate_and_colour_by_place():
    a, b = ([(np.arange(0.0, end), np.ones(int(end)))] for end in (50_001, 40_001))
    ax = Figure().subplots()
    plot.curves(ax, {"b": a + b}, lines=["a", "b"])
    (line,) = ax.lines
    assert line.get_xdata()[-1] == 40_000 and line.get_color() == plot.COLOURS[1]
    ticks = [ax.xaxis.get_major_formatter()(x) for x in (0, 50_000, 1e6, 1.5e6)]
    assert ticks == ["0", "50k", "1M", "1.5M"]
    assert ax.get_ylabel() == "episodic return (last 100)"


def test_a_line_is_the_mean_and_its_band_the_interval():
    steps = np.array([0.0, 10.0])
    ax = Figure().subplots()
    plot.curves(ax, {"a": [(steps, np.zeros(2)), (steps, np.full(2, 2.0))]})
    assert (ax.lines[0].get_ydata() == 1).all()
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0, 2)


def test_a_line_begins_where_its_last_seed_does():
    seeds = [(np.array([0.0, 10.0]),) * 2, (np.array([4.0, 12.0]),) * 2]
    steps, returns = plot.on_grid(seeds)
    assert (steps[0], steps[-1]) == (4, 10) and np.allclose(returns, steps)


def test_every_panel_shows_its_own_column():
    points = pd.DataFrame({"run": "a", "seed": "1", "global_step": [1, 2], "x": [1, 2]})
    points["y"] = [10, 20]
    figure = plot.side_by_side(points, {"x": "X", "y": "Y"}, "run", ["a"])
    ends = {ax.get_title(): ax.lines[0].get_ydata()[-1] for ax in figure.axes}
    assert ends == {"X": 2, "Y": 20}


def test_interval_is_the_bootstrap_of_the_mean_over_seeds():
    returns = np.array([[0.0, 5.0, 1.0], [10.0, 5.0, 2.0], [20.0, 5.0, 9.0], [30.0, 5.0, 4.0]])
    mean, low, high = scores.mean_interval(returns)
    assert np.array_equal(mean, [15, 5, 4])
    assert (low <= mean).all() and (mean <= high).all() and low[1] == high[1] == 5
    assert np.array_equal(scores.mean_interval(returns), (mean, low, high))
    # exactly: all 4^4 resamples of the first column, of which 2.5% lie at or below 5, and 2.5% at
    # or above 25
    resampled = np.stack(np.meshgrid(*[returns[:, 0]] * 4)).reshape(4, -1).mean(0)
    assert np.allclose((low[0], high[0]), np.percentile(resampled, [2.5, 97.5]), atol=2.5)
    assert np.array_equal(
        scores.mean_interval(returns[:1]), [returns[0]] * 3
    )  # one seed has no interval


# --------------------------------------------------------------------------------------- CLASSIC
def test_a_seed_that_never_reaches_the_threshold_is_the_slowest():
    cells = {"env_id": "CartPole-v1", "last_100_return": "500", "eval_return_mean": "500"}
    steps = ["100", "", ""]
    runs = pd.DataFrame([cells | {"first_step_at_threshold": x} for x in steps])
    told = classic.summarise("cartpole", runs)
    assert told["seeds that reach it"] == "1 of 3"
    assert told["steps to threshold, median"] == "never"


def test_first_step_at_threshold_needs_a_hundred_episodes(tmp_path):
    returns = {10: np.nan, 20: 600, 30: 475, 40: 474.9, 50: 475.0, 60: 500}
    metrics = pd.DataFrame(returns.items(), columns=["global_step", plot.RETURN])

    def first_step(ends: list[int], threshold: float | None) -> int | None:
        pd.DataFrame({"global_step": ends}).to_csv(tmp_path / "episodes.csv")
        found = sweep.first_step_at_threshold({"threshold": threshold}, metrics, tmp_path)
        return found["first_step_at_threshold"]

    early = [15] * 99
    assert first_step([31, *early], 475) == 50
    assert first_step([30, *early], 475) == 30
    assert first_step(early, 475) is None
    assert first_step(early * 2, 601) is None
    assert first_step(early * 2, None) is None


def test_report_is_the_same_bytes_again(toy, two_runs):
    root = toy(TOY)
    shutil.copytree(two_runs, root / "runs")
    (root / "results").mkdir()
    walltime = "seed,seconds,started,git_commit,torch,gymnasium,python,cpu,cores\n"
    walltime += "".join(f"{i},{10 + i},2026-01-02T03:04:05,abc,1,2,3,none,2\n" for i in (1, 2, 4))
    (root / "results/walltime.csv").write_text(walltime)
    written = []
    for flags in ([], ["--report"], []):  # all runs are finished
        classic.main(flags)
        written.append({path.name: path.read_bytes() for path in (root / "results").iterdir()})
    assert written[0] == written[1] == written[2]
    assert set(written[0]) == {"runs.csv", "curves.csv", "summary.md", "toy.png", "walltime.csv"}

    rows = read_csv(root / "results/runs.csv")
    for row, seed in zip(rows, (1, 2), strict=True):
        (summary,) = json.loads((root / f"runs/toy/{seed}/summary.json").read_text())
        where = f"--seed {seed} --run-dir {root / 'runs/toy'}/{seed}"
        assert row["command"] == f"python ppo_cartpole.py {TOY} {where}"
        names = "wall_seconds sps last_100_return eval_return_mean total_timesteps"
        for name in names.split():
            assert float(row[name]) == summary[name]
        metrics = read_csv(root / f"runs/toy/{seed}/metrics.csv")
        returns = {row["global_step"]: row[plot.RETURN] for row in metrics}
        points = read_csv(root / "results/curves.csv")
        points = [point for point in points if point["seed"] == str(seed)]
        assert 2 <= len(points) <= 100
        for point in points:
            expected = f"{float(returns[point['global_step']]):.6g}"
            assert point["episodic_return"] == expected
    text = (root / "results/summary.md").read_text()
    reached = sum(bool(row["first_step_at_threshold"]) for row in rows)
    assert f"| toy | CartPole-v1 | 20 | {reached} of 2 |" in text
    command = rows[0]["command"].rpartition("/")[0].replace("--seed 1", "--seed S")
    assert f"    {command}/S  # S = 1 to 2\n" in text
    assert "12.0 s, median of 3 runs" in text


def test_other_tasks_stay(toy, two_runs, monkeypatch):
    root = toy(TOY)
    shutil.copytree(two_runs, root / "runs")
    classic.main([])
    first = {name: read_csv(root / "results" / name) for name in ("runs.csv", "curves.csv")}
    shutil.move(root / "runs/toy", root / "runs/other")
    for path in root.glob("runs/other/*/config.json"):
        path.write_text(path.read_text().replace("runs/toy", "runs/other"))
    monkeypatch.setattr(classic, "TASKS", {"other": classic.TASKS["toy"], **classic.TASKS})
    classic.main(["--tasks", "other"])
    for name, rows in first.items():
        others = [row | {"task": "other"} for row in rows]
        if name == "runs.csv":
            for row in others:
                row["command"] = row["command"].replace("runs/toy", "runs/other")
        assert read_csv(root / "results" / name) == others + rows
    text = (root / "results/summary.md").read_text()
    assert text.index("| other |") < text.index("| toy |") and (root / "results/other.png").exists()


def test_report_refuses_what_it_cannot_vouch_for(toy, two_runs):
    root = toy(TOY + " --gamma 0.5")  # the runs were made with the default
    shutil.copytree(two_runs, root / "runs")
    with pytest.raises(UserError, match=r"toy/1 ran with gamma 0\.99 instead of 0\.5"):
        classic.main([])
    toy(TOY)
    (root / "runs/toy/2/summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"1 of 2 calls failed: \S*toy/2 cannot be collected"):
        classic.main([])
    assert [row["seed"] for row in read_csv(root / "results/runs.csv")] == ["1"]
    assert not (root / "results/summary.md").exists()
    shutil.rmtree(root / "results")
    with pytest.raises(FileNotFoundError):
        classic.main(["--report"])


def test_classic_continues_skips_and_restarts(toy):
    """Seed 1 is killed in mid-run, seed 2 died before its config.json, seed 3 has finished."""
    root = toy(LONGER, seeds=range(1, 4))
    folders = {seed: root / "runs/toy" / str(seed) for seed in (1, 2, 3)}
    command = [sys.executable, *classic.call("toy", 1).command.split()[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + LIMIT
    while not (folders[1] / "checkpoint.pt").exists() and time.monotonic() < give_up:
        time.sleep(0.005)
    process.kill()
    process.wait()
    started = (folders[1] / "config.json").read_bytes()
    done_before = len(read_csv(folders[1] / "metrics.csv"))
    assert (folders[1] / "checkpoint.pt").exists() and not (folders[1] / "summary.json").exists()
    folders[2].mkdir()
    (folders[2] / "config.json.tmp").write_text("{")
    folders[3].mkdir()
    (folders[3] / "config.json").write_bytes(started.replace(b'"seed": 1', b'"seed": 3'))
    (folders[3] / "summary.json").write_bytes(b"[]")  # what is skipped is not opened for training

    with pytest.raises(UserError, match=r"1 of 3 calls failed: \S*toy/3 cannot be collected"):
        classic.main([])
    assert (folders[1] / "config.json").read_bytes() == started  # continued, not started again
    assert len(read_csv(folders[1] / "metrics.csv")) == 64 > done_before
    assert (folders[2] / "summary.json").exists() and not (folders[2] / "config.json.tmp").exists()
    assert (folders[3] / "summary.json").read_bytes() == b"[]"
    assert len(list(folders[3].iterdir())) == 2
    assert [row["seed"] for row in read_csv(root / "results/runs.csv")] == ["1", "2"]


def test_classic_says_why_a_run_failed(toy):
    root = toy(TOY + " --env-id NoSuch-v0", seeds=range(1, 2))
    with pytest.raises(UserError, match=r"1 of 1 calls failed: .*toy/1 failed: cannot make"):
        classic.main([])
    assert "cannot make" in (root / "runs/toy/1.log").read_text()
    assert not list((root / "results").iterdir())


def test_walltime_measures_whole_processes(toy, monkeypatch):
    root = toy(TOY)
    monkeypatch.setattr(classic, "WALLTIME_SEEDS", range(1, 3))
    slept = []

    def execute(arguments):  # the default run takes ten seconds
        slept.append(arguments)
        time.sleep(0.1)
        versions = dict.fromkeys(("torch", "gymnasium", "python"), "1")
        config = {"started": "now", "versions": versions}
        (ROOT / arguments[-1]).mkdir(parents=True)
        (ROOT / arguments[-1] / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(classic, "execute", execute)
    (root / "runs/walltime/1").mkdir(parents=True)  # a measurement that was interrupted
    start = time.perf_counter()
    classic.main(["--walltime"])
    whole = time.perf_counter() - start
    rows = read_csv(root / "results/walltime.csv")
    assert [row["command"] for row in rows] == [
        f"python {' '.join(arguments)}" for arguments in slept
    ]
    seconds = [float(row["seconds"]) for row in rows]
    assert min(seconds) >= 0.1 and sum(seconds) <= whole
    assert all(int(row["cores"]) >= 1 for row in rows)


# ----------------------------------------------------------------------------------------- SPEED
def test_speed_has_a_row_per_contestant_and_a_ratio(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    keys = ["ours", "sb3"]  # to compile takes longer than all other tests
    speed.main(["cartpole", "--contestants", *keys, "--rounds", "1", "--total-timesteps", "4096"])
    rows = read_csv(tmp_path / "cartpole.csv")
    contestants = speed.SUITES["cartpole"].contestants
    assert [row["contestant"] for row in rows] == [contestants[key].title for key in keys]
    assert all(row["threads"] == "1" and row["total_timesteps"] == "4096" for row in rows)
    assert all(float(row["first_update_seconds"]) > 0 for row in rows)
    assert all(float(row["memory_gb"]) > 0.1 for row in rows)
    ours, theirs = (float(row["steps_per_second"]) for row in rows)
    printed = capsys.readouterr().out
    assert f"| {ours / theirs:.2f} |" in printed and "| 1.00 |" in printed
    text = (tmp_path / "cartpole.md").read_text()
    assert text.endswith(printed) and "One measurement of each" in text
    rows = sweep.read(tmp_path / "cartpole.csv")
    faster = rows.assign(round="2")  # in a second round only we are twice as fast
    faster.loc[0, "steps_per_second"] = str(2 * ours)
    both = speed.report("cartpole", pd.concat([rows, faster], ignore_index=True))
    ratio = ours / theirs
    assert f"| {1.5 * ratio:.2f} ({ratio:.2f} to {2 * ratio:.2f}) |" in both
    assert "Medians of 2 rounds" in both


@pytest.mark.parametrize(
    ("suite", "key", "timesteps"),
    [
        # the processes of sb3-crowd are sb3
        *(("mujoco", key, 4096) for key in ("one-eager", "sb3-crowd", "simulator", "simulators")),
        *(("atari", key, 2048) for key in ("ours", "sb3", "emulators", "network")),
        *(("grpo", key, 1024) for key in ("ours", "writing")),
        ("cartpole", "environments", 2048),
        ("process", "ours", 4096),
        ("trpo", "ours", 2048),
    ],
)
def test_speed_measures_every_kind_of_contestant(suite, key, timesteps, monkeypatch, capsys):
    monkeypatch.setattr(speed.ppo_atari, "envpool", speed.ppo_atari.envpool)  # `network` changes it
    for script in (speed.ppo_continuous, speed.ppo_atari):

        @dataclass
        class Quick(script.Args):
            update_epochs: int = 1

        monkeypatch.setattr(script, "Args", Quick)
    speed.main([suite, "--worker", key, "--total-timesteps", str(timesteps)])
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps_per_second"] > 0 and printed["threads"] in (1, speed.CORES)


def test_speed_gives_peers_our_settings(monkeypatch):
    """All keywords of sb3-contrib's TRPO, which need not be installed; and who standardises."""
    told, wrapped = {}, {}

    class Model:
        num_timesteps = 2048

        def __init__(self, policy, envs, **flags):
            told.update(flags)
            wrapped.update(reward=envs.norm_reward, clip=envs.clip_obs)

        def learn(self, steps):
            pass

    monkeypatch.setitem(sys.modules, "sb3_contrib", SimpleNamespace(TRPO=Model))
    speed.sb3_trpo(2048, 1)
    args = trpo.Args()
    assert told == {
        "learning_rate": args.value_learning_rate,
        "n_steps": args.num_steps,
        "batch_size": args.value_minibatch,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "cg_max_steps": args.cg_iterations,
        "cg_damping": args.damping,
        "line_search_shrinking_factor": 0.5,
        "line_search_max_iter": args.line_search_tries,
        "n_critic_updates": args.value_epochs,
        "target_kl": args.max_kl,
        "sub_sampling_factor": args.fisher_every,
        "seed": 1,
        "device": "cpu",
    }
    assert wrapped == {"reward": False, "clip": args.obs_clip}
    for norm_adv, expected in (("minibatch", True), ("none", False)):
        args = speed.ppo_continuous.Args(norm_adv=norm_adv)
        assert speed.common(args)["normalize_advantage"] is expected


def test_peers_get_our_hyperparameters():
    args = speed.ppo_cartpole.Args()
    told = speed.common(args)
    assert told.pop("learning_rate")(0.25) == 0.25 * args.learning_rate
    assert told == {
        "n_steps": 64,
        "batch_size": 64,  # 32 actors x 64 steps in 32 minibatches
        "seed": 1,
        "n_epochs": 4,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "clip_range": 0.2,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef,
        "max_grad_norm": args.max_grad_norm,
        "normalize_advantage": True,
    }


def test_the_first_updates_of_a_peer_do_not_count(monkeypatch):
    """It takes 50 seconds to begin, and learns from 100 steps in a second."""
    clock, calls = [0.0], []

    class Model:
        def learn(self, steps):
            clock[0] += steps / 100 + 50 * (not calls)
            calls.append(steps)
            self.num_timesteps = steps

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    args = speed.ppo_cartpole.Args(total_timesteps=3 * 2048)
    told = speed.learned(Model(), args)
    assert calls == [2048, 2048, 4096]
    assert told["steps_per_second"] == pytest.approx(100)
    assert told["first_update_seconds"] == pytest.approx(70.48)


def test_a_check_of_the_gpu_agrees_where_all_of_it_does():
    about = {"check": "c", "started": "2026-01-01", "git_commit": "x", "card": "H100", "bound": "1"}
    differences = {"weights": ("0.5", "False"), "losses/a": ("1e-6", "True")}
    differences |= {"losses/b": ("2e-6", "True")}
    checks = [
        about | {"of": name, "difference": x, "passed": passed, "error": "", "device": "cuda"}
        for name, (x, passed) in differences.items()
    ]
    text = gpu.report([], checks)
    assert "| 5.0e-01 | 2.0e-06, losses/b | DOES NOT AGREE |" in text
    checks.append(checks[1] | {"of": "losses/c", "difference": "nan", "passed": "False"})
    assert "| nan, losses/c | DOES NOT AGREE |" in gpu.report([], checks)
    fine = checks[1:3]
    assert "|  | 2.0e-06, losses/b | agrees |" in gpu.report([], fine)


def test_speed_adds_up_the_agents_of_a_crowd(monkeypatch):
    monkeypatch.setattr(speed, "SEEDS", [1, 2])
    monkeypatch.setattr(speed, "OBJECTIVES", ["clip:0.2"])
    summaries, train = [], speed.lockstep.train

    def watched(*given):
        summaries.extend(train(*given))
        return summaries

    monkeypatch.setattr(speed.lockstep, "train", watched)
    measured = speed.side_by_side(4096, 1, compile=False)
    assert len(summaries) == 2 and summaries[0]["total_timesteps"] == 4096
    assert measured["steps_per_second"] == sum(summary["sps"] for summary in summaries)
    assert 0 < measured["first_update_seconds"] < summaries[0]["wall_seconds"]


@pytest.mark.parametrize("key, expected", [("ours", 1), ("sb3", 3), ("sb3-default", 0)])
def test_speed_gives_threads_to_peers_alone(key, expected, monkeypatch, capsys):
    contestants = speed.SUITES["cartpole"].contestants
    spy = contestants[key]._replace(measure=lambda *given: {"seen": given})
    monkeypatch.setitem(contestants, key, spy)
    speed.main(["cartpole", "--worker", key, "--threads", "3", "--total-timesteps", "7"])
    assert json.loads(capsys.readouterr().out)["seen"] == [7, expected]


def test_speed_takes_ratios_within_a_round_and_shares_among_agents_and_cores():
    suite = speed.SUITES["mujoco"]

    rows = []
    for speeds in [(3300, 1000), (6600, 2000), (9900, 1000)]:  # of medians: 6.6
        for key, steps_per_second in zip(("grid", "sb3"), speeds, strict=True):
            row = {"contestant": suite.contestants[key].title, "threads": 1, "memory_gb": 0.5}
            row |= {"steps_per_second": steps_per_second, "first_update_seconds": None}
            rows.append(row)
    ours, theirs = speed.table(suite, pd.DataFrame(rows))
    assert ours["times Stable-Baselines3 PPO"] == "3.30 (3.30 to 9.90)"
    assert ours["steps/s"] == "6,600"
    assert ours["per agent"] == "200" and ours["per core"] == f"{6600 / speed.CORES:,.0f}"
    assert theirs["times Stable-Baselines3 PPO"] == "1.00 (1.00 to 1.00)"


def test_speed_tells_how_near_the_ceiling_is():
    suite = speed.SUITES["atari"]
    speeds = {"ours": (75, 60), "emulators": (300, 300), "network": (100, 100)}
    rows = []
    for key, mine in speeds.items():
        title = suite.contestants[key].title
        rows += [{"contestant": title, "steps_per_second": x} for x in mine]
    said = speed.of_ceiling(suite, pd.DataFrame(rows))
    assert said.endswith("the first row reaches 90% (80% to 100%) of that.")
    assert "here '8 environments alone, EnvPool' and 'ppo_atari.py without environments'; " in said


def test_speed_refuses_what_it_cannot_time(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results")
    for flags, complaint in {
        "cartpole --total-timesteps 2048": "first update",
        "cartpole --rounds 0": "at least 1",
        "chess": "no suite",
        "cartpole --contestants one": "no contestant",
        "--contestants sb3": "one suite",
    }.items():
        with pytest.raises(UserError, match=complaint):
            speed.main(flags.split())
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------- GPU
def gpu_worker(capsys, *words: str) -> dict:
    """What a process of gpu.py prints, run in this process, on the CPU."""
    capsys.readouterr()
    gpu.main(["--device", "cpu", "--toy", "--worker", *words])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("key", gpu.CHECKS)
def test_gpu_checks_find_nothing_where_the_device_is_the_cpu(key, capsys):
    rows = gpu_worker(capsys, key)["rows"]
    assert {"weights", "losses/policy_loss", "losses/kl_after_update"} < {row["of"] for row in rows}
    numbers = any(row["of"].startswith("rollout/") for row in rows)
    assert numbers == (key != "check-cartpole")  # whose rollouts must be equal
    assert all(row["passed"] and row["difference"] <= 1e-6 for row in rows)


def test_gpu_checks_find_another_arithmetic(monkeypatch):
    """A step size that is wrong on the device alone."""
    train = gpu.lockstep.train

    def spoilt(args, *crowd):
        if not args.run_dir.endswith("cpu"):
            args.learning_rate *= 1.1
        return train(args, *crowd)

    monkeypatch.setattr(gpu.lockstep, "train", spoilt)
    passed = {row["of"]: row["passed"] for row in gpu.check_lockstep("cpu", toy=True)}
    assert not passed["weights"] and passed["rollout/actions"]


@pytest.mark.parametrize("key", ["8-eager", "33-cpu", "8-alone", "33-alone", "continuous"])
def test_gpu_measures_every_kind_of_contestant(key, capsys):
    result = gpu_worker(capsys, key)
    assert result["steps_per_second"] > 0 and result["memory_gb"] > 0.1
    assert result["total_timesteps"] >= 32
    assert ("alone" in key) == (result["first_update_seconds"] is None)


def test_gpu_learns_breakout(tmp_path, capsys):
    flags = f"breakout --like 128-graphs --steps 48 --run-dir {tmp_path / 'run'}"
    result = gpu_worker(capsys, *flags.split())
    assert gpu.breakout_result(tmp_path / "run", result)["total_timesteps"] == "48"
    config = json.loads((tmp_path / "run/config.json").read_text())["args"]
    assert (config["env_id"], config["compile"]) == ("Breakout-v5", False)  # toys are eager
    assert gpu.breakout_result(tmp_path, {"error": "why"}) == {"error": "why"}


def test_gpu_ends_a_process_that_is_slow_or_fails(tmp_path):
    log = tmp_path / "log"
    started = time.monotonic()
    assert gpu.measured(["--worker", "33-alone"], 0.2, log) == {"error": "not done in 0 s"}
    assert time.monotonic() - started < 30
    failed = gpu.measured(["--worker", "no-such"], 120, log)
    assert failed == {"error": "exit code 1: KeyError: 'no-such'"}
    assert "$ gpu.py --worker no-such" in log.read_text()


def test_gpu_keeps_each_result_and_stops_in_time(tmp_path, monkeypatch, capsys):
    """Nineteen contestants and four checks; each takes a minute of a clock that is not real."""
    clock, limits = [0.0], []

    def fake(words, seconds, log):
        clock[0] += 60
        key = words[1]
        limits.append((key, seconds))
        if key == "check-lockstep":
            return {"error": "exit code 1: why"}
        if key in gpu.CHECKS:
            row = {"check": key, "of": "weights", "difference": 1e-5, "bound": 1e-2}
            return {"rows": [row | {"passed": True}]}
        return {"steps_per_second": 1000.0 + 100 * (key == "128-compiled"), "memory_gb": 0.5}

    about = gpu.about

    def sitting(*given):
        return about(*given) | {"started": f"after {len(limits)} measurements"}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "measured", fake)
    monkeypatch.setattr(gpu, "about", sitting)
    flags = ["--device", "cpu", "--output", str(tmp_path), "--run-dir", str(tmp_path / "none")]
    with pytest.raises(UserError, match="the same as on the CPU: check-lockstep"):
        gpu.main([*flags, "--minutes", "20"])  # 30% of which are for Breakout
    assert [key for key, _ in limits] == [*gpu.CHECKS, *list(gpu.CONTESTANTS)[:10], "breakout"]
    assert all(seconds <= 20 * 60 * 0.7 for _, seconds in limits[:-1])
    assert limits[-1][1] == 6 * 60
    rows = read_csv(tmp_path / "gpu.csv")
    assert [row["contestant"] for row in rows][-1].endswith("minibatches of 512, compiled")
    late = [row["contestant"] for row in rows if row["error"] == "no time left"]
    assert late == [mine.title for mine in list(gpu.CONTESTANTS.values())[10:]]
    shown = (tmp_path / "gpu.md").read_text()
    assert "| check-lockstep | CPU |  | exit code 1: why | DOES NOT AGREE |" in shown
    assert "| check-atari | CPU | 1.0e-05 | 1.0e-05, weights | agrees |" in shown
    assert "| atari | 128 environments, compiled | CPU |  | 1,100 |" in shown
    assert capsys.readouterr().out.endswith(shown)

    clock[0] = 0.0
    capsys.readouterr()
    with pytest.raises(UserError):  # a second call fills in what the first had no time for
        gpu.main([*flags, "lockstep", "small", "--minutes", "11"])
    rows = read_csv(tmp_path / "gpu.csv")
    assert len(rows) == 20 and not any(row["error"] for row in rows)
    gpu.main(["--report", "--output", str(tmp_path)])
    shown = (tmp_path / "gpu.md").read_text()
    assert shown.count("1,000") == 19
    first = "started after 0 measurements (git commit "  # of Breakout alone, by now
    assert first in shown and f"), after {len(limits) - 10} measurements (" in shown


def test_gpu_refuses_what_makes_no_sense(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    for flags, complaint in {
        "chess": "no part",
        "breakout": "after atari",
        "breakout --like 128-eager": "go together",
        "check": "no CUDA here",
        "--report": "neither",
    }.items():
        with pytest.raises(UserError, match=complaint):
            gpu.main(flags.split())
    assert not list(tmp_path.iterdir())
