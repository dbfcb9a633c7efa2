"""benchmark/figure1.py, figure2.py and ratchet.py, at toy size."""

import functools
import json
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import vector_to_parameters

import ppo_cartpole
from benchmark import (
    UserError,
    classic,
    figure1,
    figure2,
    lockstep,
    markdown,
    ratchet,
    read_csv,
    sweep,
)

PNG = b"\x89PNG"


# -------------------------------------------------------------------------------------- FIGURE 1
@pytest.fixture(scope="module")
def drawn1(tmp_path_factory) -> dict[tuple[float, int], dict]:
    """The rows of figure1.csv by ratio and advantage."""
    folder = tmp_path_factory.mktemp("figure1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure1, "RESULTS", folder)
        figure1.main([])
    assert (folder / "figure1.png").read_bytes().startswith(PNG)
    rows = read_csv(folder / "figure1.csv")
    assert len(rows) == 2 * len(figure1.RATIOS)
    return {(float(row["ratio"]), int(row["advantage"])): row for row in rows}


@pytest.mark.parametrize("advantage", [1, -1])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.8, 1.0, 1.2, 1.21, 2.0])
def test_figure1_points_are_the_formula(advantage, ratio, drawn1):
    row = drawn1[ratio, advantage]
    expected = min(ratio, 1.2) if advantage > 0 else -max(ratio, 0.8)
    assert float(row["l_clip"]) == pytest.approx(expected, abs=1e-12)
    assert float(row["l_cpi"]) == pytest.approx(ratio * advantage, abs=1e-12)


# -------------------------------------------------------------------------------------- FIGURE 2
TOY2 = "--env-id Hopper-v4 --preset paper --objectives clip:0.2 --seeds 3 1"
TOY2 += " --total-timesteps 128 --num-steps 128 --num-minibatches 4 --no-compile"


@pytest.fixture(scope="module")
def drawn2(tmp_path_factory) -> tuple:
    """The folder that figure2.py wrote at toy size, the agents' flags, the update that it saw."""
    folder, seen = tmp_path_factory.mktemp("figure2"), []
    first_update = figure2.first_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure2, "RESULTS", folder)
        patch.setattr(figure2, "FLAGS", TOY2)
        patch.setattr(figure2, "ALPHAS", np.linspace(-0.5, 2, 11))

        def watched(flags):
            seen.append(first_update(flags))
            return seen[0]

        patch.setattr(figure2, "first_update", watched)
        figure2.main([])
    ((crowd, _, update),) = seen
    return folder, crowd, update


def curve(folder, alpha: float) -> list[dict]:
    """The points of all seeds at this alpha, as numbers."""
    rows = [{name: float(x) for name, x in row.items()} for row in read_csv(folder / "figure2.csv")]
    return [row for row in rows if row["alpha"] == alpha]


def test_figure2_starts_where_the_update_started(drawn2):
    rows = curve(drawn2[0], 0)
    assert [row["seed"] for row in rows] == [3, 1]
    for row in rows:
        assert row["furthest_ratio"] < 1e-5
        assert [row["l_clip"], row["clipped"]] == pytest.approx([row["l_cpi"]] * 2, abs=1e-7)
        assert abs(row["l_cpi"]) < 1e-5 and abs(row["kl"]) < 1e-6  # standardised advantages


def test_figure2_ends_where_train_says_that_it_ended(drawn2, tmp_path):
    flags = [*TOY2.split(), "--run-dir", str(tmp_path / "run"), "--eval-episodes", "1"]
    lockstep.train(*lockstep.parse_args(flags))
    expected = []
    for seed in (3, 1):
        (row,) = read_csv(tmp_path / f"run/clip-0.2__{seed}/metrics.csv")
        expected.append(float(row["losses/kl_after_update"]))
    assert [row["kl"] for row in curve(drawn2[0], 1)] == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0


def test_figure2_curves_are_the_formulas(drawn2):
    folder, crowd, seen = drawn2
    for i, row in enumerate(curve(folder, 1.5)):
        agent, batch = seen["agents"][i], seen["batches"][i]
        valid, actions = batch["valid"], batch["actions"]
        weights = seen["old"][i] + 1.5 * (seen["new"][i] - seen["old"][i])
        vector_to_parameters(weights, agent.parameters())
        with torch.no_grad():
            mean, log_std = agent.policy(batch["obs"])
        old = torch.distributions.Normal(batch["mean"], batch["log_std"].exp())
        new = torch.distributions.Normal(mean, log_std.exp())
        ratio = (new.log_prob(actions) - old.log_prob(actions)).sum(-1).exp()[valid]
        # else nothing is tested
        assert valid.sum() < crowd[i].batch_size and ratio.max() > 1.2 and ratio.min() < 0.8
        advantages = batch["advantages"][valid]
        advantages = (advantages - advantages.mean()) / advantages.std()
        unclipped, clipped = ratio * advantages, ratio.clamp(0.8, 1.2) * advantages
        expected = {
            "l_cpi": unclipped.mean(),
            "clipped": clipped.mean(),
            "l_clip": torch.min(unclipped, clipped).mean(),
            "kl": torch.distributions.kl_divergence(old, new).sum(-1)[valid].mean(),
            "furthest_ratio": (ratio - 1).abs().max(),
        }
        for name, x in expected.items():
            assert row[name] == pytest.approx(x.item(), rel=1e-3, abs=1e-6)


def test_figure2_reports_peaks_beside_the_papers(drawn2):
    folder, *_ = drawn2
    assert (folder / "figure2.png").read_bytes().startswith(PNG)
    lines = (folder / "summary.md").read_text().splitlines()
    lines = [line.strip("| ").split(" | ") for line in lines if "|" in line]
    table = {name: cells for name, *cells in lines}
    rows = [row for row in read_csv(folder / "figure2.csv") if row["seed"] == "3"]
    best = max(rows, key=lambda row: float(row["l_clip"]))
    (kl,) = (float(row["kl"]) for row in rows if float(row["alpha"]) == 1)
    assert table["seed 3"] == [f"{kl:.4f}", best["alpha"], f"{float(best['l_clip']):.4f}"]
    kls = [float(table[f"seed {seed}"][0]) for seed in (1, 3)]
    mean = float(table["mean of the seeds (95% interval)"][0].split()[0])
    assert mean == pytest.approx(np.mean(kls), abs=1e-4)
    assert table["the paper's curve"] == ["0.0165", "1.066", "0.0343"]


# --------------------------------------------------------------------------------------- RATCHET
@pytest.fixture
def toy(tmp_path, monkeypatch):
    """ratchet.py with one experiment of four short runs, of which one is still to be made."""
    flags = "--total-timesteps 2048 --num-envs 4 --num-steps 64 --eval-episodes 1"
    objectives = {"pg": "--update-epochs 1 --num-minibatches 1", "clip:0.2": ""}
    experiment = ratchet.Experiment(flags, objectives, range(1, 3))
    monkeypatch.setattr(ratchet, "EXPERIMENTS", {"toy": experiment})
    monkeypatch.setattr(ratchet, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ratchet, "RESULTS", tmp_path / "results")
    for run in (("pg", 1), ("pg", 2), ("clip:0.2", 1)):
        ppo_cartpole.train(ppo_cartpole.parse_args(list(ratchet.call("toy", *run).flags)))
    return tmp_path


def test_ratchet_runs_what_is_missing_and_reports_from_the_csvs_alone(toy):
    made = (toy / "runs/toy/clip-0.2/1/summary.json").stat().st_mtime_ns
    ratchet.main([])
    assert (toy / "runs/toy/clip-0.2/1/summary.json").stat().st_mtime_ns == made
    metrics = read_csv(toy / "runs/toy/clip-0.2/2/metrics.csv")
    summary = json.loads((toy / "runs/toy/clip-0.2/2/summary.json").read_text())[0]
    shutil.rmtree(toy / "runs")
    written = []
    for _ in range(2):
        written.append({path.name: path.read_bytes() for path in (toy / "results").iterdir()})
        ratchet.main(["--report"])
    assert written[0] == written[1]
    assert set(written[0]) == {"runs.csv", "curves.csv", "summary.md", "toy.png"}

    runs, points = (read_csv(toy / "results" / name) for name in ("runs.csv", "curves.csv"))
    made = [(run["objective"], run["seed"]) for run in runs]
    assert made == [("pg", "1"), ("pg", "2"), ("clip:0.2", "1"), ("clip:0.2", "2")]
    assert float(runs[-1]["last_100_return"]) == summary["last_100_return"]
    mine = [point for point in points if (point["objective"], point["seed"]) == ("clip:0.2", "2")]
    assert 2 <= len(mine) <= 200
    for name, column in ratchet.LAYOUT.curves.items():
        told = [float(p[name]) for p in mine]
        assert told == pytest.approx([float(m[column]) for m in metrics], rel=1e-5)
    # nothing is clipped
    assert all(float(p["clipfrac"]) == 0 for p in points if p["objective"] == "pg")

    mean = np.mean([float(run["last_100_return"]) for run in runs[2:]])
    kl = max(float(p["kl_after_update"]) for p in points if p["objective"] == "clip:0.2")
    text = (toy / "results/summary.md").read_text()
    assert f"| PPO (clip:0.2) | 2 | {mean:.1f} (" in text and f" | {kl:.2g} | " in text
    assert "--objective pg --update-epochs 1 --num-minibatches 1 --seed S  # S = 1 to 2\n" in text


def test_ratchet_refuses_what_it_cannot_report(toy):
    with pytest.raises(OSError, match=r"runs\.csv"):
        ratchet.main(["--report"])
    shutil.copytree(toy / "runs/toy/clip-0.2/1", toy / "runs/toy/clip-0.2/2")
    with pytest.raises(UserError, match=r"clip-0\.2/2 ran with seed 1 instead of 2"):
        ratchet.main([])
    config = toy / "runs/toy/clip-0.2/2/config.json"
    config.write_text(config.read_text().replace('"seed": 1', '"seed": 2'))
    (config.parent / "summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"1 of 4 calls failed: \S*clip-0\.2/2 cannot be collected"):
        ratchet.main([])
    assert not (toy / "results/summary.md").exists()


def test_ratchet_has_the_settings_of_classic():
    for name, experiment in ratchet.EXPERIMENTS.items():
        assert experiment.flags == classic.TASKS[name].flags


def test_a_table_of_an_author_is_a_short_file(tmp_path, monkeypatch, capsys):
    """The example of sweep.py, at toy size, as it stands there."""
    _, _, text = sweep.__doc__.partition("What a new table costs its author:\n")
    text, _, _ = text.partition("\nWhatever stops")
    text = textwrap.dedent(text).replace("Acrobot-v1", "Acrobot-v1 --total-timesteps 256")
    text = text.replace(" --seed ", " --num-envs 2 --num-steps 64 --eval-episodes 1 --seed ")
    monkeypatch.chdir(tmp_path)
    names = {"sweep": sweep, "functools": functools, "Path": Path, "markdown": markdown}
    exec(text, names)
    printed = capsys.readouterr().out
    assert printed.count("| Acrobot-v1 |") == 3 and "| env_id | seed | last_100_return |" in printed
    assert len(read_csv(tmp_path / "mine/curves.csv")) == 3 * 2
