"""benchmark/defaults.py: what its settings are, what its report says."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmark import UserError, defaults, grids, sweep

SETTINGS = [name for name in defaults.SETTINGS if name not in ("norm-adv-batch", "relu")]


def tables(folder, value) -> None:
    """search/ and final/ as long runs would have left them: value(task, setting, seed)."""
    random = []
    for task in defaults.TASKS:
        random.append({"env_id": task, "policy": "gaussian", "seed": "1", "mean_return": "0"})
    sweep.write(folder / "random.csv", pd.DataFrame(random))
    parts = {
        "search": (defaults.SEARCHED, SETTINGS, range(1, 7)),
        "final": (defaults.TASKS, [defaults.FINAL], range(101, 111)),
    }
    for part, cells in parts.items():
        runs, curves = [], []
        for task, setting, seed in itertools.product(*cells):
            key = {"env_id": task, "setting": setting, "seed": str(seed)}
            x = str(value(task, setting, seed))
            row = dict.fromkeys(defaults.LAYOUT.columns, "1") | key
            row |= {"last_100_return": x, "eval_return_mean": x, "started": "2026-01-01T00:00:00"}
            row["diverged_at"] = ""
            flags = ["--preset", "modern", *defaults.flags_of(setting), "--run-dir", "runs/x"]
            runs.append(row | {"command": " ".join(["python", *flags])})
            for step in (1000, 2000):
                point = {"global_step": str(step), "episodic_return": x}
                curves.append(key | point | {"kl": "", "beta": "", "action_std": ""})
        sweep.write(folder / part / "runs.csv", pd.DataFrame(runs))
        sweep.write(folder / part / "curves.csv", pd.DataFrame(curves))


def cells(summary: str, first: str) -> list[str]:
    """The cells of the first row of a table that begins with this one."""
    row = next(line for line in summary.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_setting_is_the_centre_but_for_what_it_names():
    def parsed(name: str) -> dict:
        flags = [*grids.environment("Hopper-v4"), "--seeds", "1", *defaults.flags_of(name)]
        return vars(grids.parse(flags)[0])

    centre = parsed("centre")
    assert parsed(defaults.CHOSEN) == parsed(defaults.FINAL)  # the script does what was chosen
    assert grids.parse(["--preset", "paper", "--seeds", "1"])[0].log_std == 0
    for name, setting in defaults.SETTINGS.items():
        mine = parsed(name)
        different = {key for key in mine if mine[key] != centre[key]}
        assert different == {key.replace("-", "_") for key in setting.flags}
        grids.altered(setting.changes)  # raises where the text is not in the script


def test_a_network_of_relus_is_played_as_it_is_learned():
    script, crowd = grids.altered(defaults.SETTINGS["relu"].changes)
    agent = script.Agent(11, 3, obs_clip=10.0, log_std=-1.0)
    crowd.crowd_policy([agent], check=True)  # raises where the two differ
    assert [type(layer).__name__ for layer in agent.critic][1::2] == ["ReLU", "ReLU"]


def test_calls_are_what_the_table_lacks_and_mean_the_same_whatever_the_defaults_are(tmp_path):
    tables(tmp_path, lambda *_: 1.0)
    table = sweep.Table(tmp_path / "search", defaults.LAYOUT)
    names = ["centre", "relu"]
    plan = defaults.plan(
        names, ["Hopper-v4", *defaults.SEARCHED], [1, 7], ["--preset", "modern"], table
    )
    seeds = [call.flags[call.flags.index("--seeds") + 1 :] for call in plan]
    assert [call.labels["setting"] for call in plan] == ["centre"] * 5 + ["relu"] * 5
    assert seeds[0][:2] == ("1", "7") and all(flags[0] == "7" for flags in seeds[1:5])
    for call in plan:
        assert {f"--{flag}={value}" for flag, value in defaults.CENTRE.items()} <= {*call.flags}
    table.runs.loc[0, "command"] = "python benchmark/lockstep.py --preset modern --run-dir x"
    with pytest.raises(UserError, match="runs of other settings"):
        defaults.plan(names, defaults.SEARCHED, [1], ["--preset", "modern"], table)


def test_the_report_says_what_the_runs_say_twice_the_same(tmp_path):
    def value(task: str, setting: str, seed: int) -> float:
        if setting == defaults.FINAL:
            return {"HalfCheetah-v4": 9000, "Hopper-v4": 2370, "Walker2d-v4": 10}.get(
                task, 50
            ) + seed
        better = {"before": 1000, "lambda-0.9": 4000}.get(setting, 3000)
        return better + seed

    tables(tmp_path, value)
    defaults.report(tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    defaults.report(tmp_path)
    assert (tmp_path / "summary.md").read_text() == summary
    assert (tmp_path / "final.png").stat().st_size > 10_000

    # the scale: 0 untrained, 1 the best run, 4006; the middle half of seeds 1 to 6 has mean 3.5
    assert cells(summary, "`centre`")[2:4] == ["0", "3,004 / 3,004"]
    effect, low, high = cells(summary, "`before`")[2].replace("[", " ").replace(",", "").split()
    assert float(effect) == pytest.approx(-2000 / 4006, abs=0.01)
    assert float(low) <= float(effect) <= float(high.rstrip("]"))
    assert cells(summary, "`before`")[-1] == "0 of 6"
    assert cells(summary, "`centre`")[-1] == "6 of 6"
    assert "Not all runs are there of `norm-adv-batch`, `relu`." in summary

    verdicts = summary[summary.index("Welch's t") :]
    assert [cells(verdicts, f"{name}-v4")[4] for name in ("HalfCheetah", "Hopper", "Walker2d")] == [
        "better",
        "no difference shown",
        "worse",
    ]
    assert "higher on 4 of 7 tasks; by the test, it is better on 3, worse on 3." in verdicts


def test_the_candidate_stands_beside_the_defaults_with_the_same_seeds(tmp_path):
    """Means by hand; seed 110 is far away, and the candidate lacks seed 101."""
    far = {110: 900}
    moved = {"HalfCheetah-v4": 300, "Hopper-v4": -3000}
    tables(tmp_path, lambda task, name, seed: 4900 + seed + far.get(seed, 0))
    tables(
        tmp_path / "other",
        lambda task, name, seed: 4900 + seed + far.get(seed, 0) + moved.get(task, 0),
    )
    (tmp_path / "other/final").rename(tmp_path / "candidate")
    runs = pd.read_csv(tmp_path / "candidate/runs.csv", dtype=str)
    runs.loc[runs["env_id"] == "InvertedPendulum-v4", "last_100_return"] = "5003"
    runs.loc[(runs["env_id"] == "Swimmer-v4") & (runs["seed"] == "110"), "diverged_at"] = "2048"
    runs["eval_return_mean"] = "7"  # the verdicts are about the last 100 episodes
    sweep.write(tmp_path / "candidate/runs.csv", runs[runs["seed"] != "101"])
    defaults.report(tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    told = summary[summary.index("## The best of the search") :]
    assert "is better on 0 and worse on 1 of 7 tasks" in told
    hopper = cells(told, "Hopper-v4")  # 5,002 to 5,009, and 5,910
    assert hopper[1:3] == ["9", "5,106"] and hopper[3].startswith("5,002, 5,003")
    assert hopper[4] == "2,106" and hopper[5].endswith("2,009, 2,910") and hopper[6] == "worse"
    # 300 apart, with an error of 101 on each side: t = 2.1
    assert cells(told, "HalfCheetah-v4")[6:] == ["no difference shown", "0.051"]
    # no spread on one side: t(8) = 1.02
    assert cells(told, "InvertedPendulum-v4")[6:] == ["no difference shown", "0.34"]
    assert "Of the candidate: 1 of 63 runs met a number that was not finite" in told
    assert "finite weights: Swimmer-v4 seed 110 at step 2048." in told
    assert "In that commit `--preset modern` meant `gamma-0.995-none`." in told


def test_a_search_that_would_mean_something_else_is_refused(tmp_path):
    flags = ["--search", "--results", str(tmp_path)]
    with pytest.raises(UserError, match=r"the search is on HalfCheetah-v4 .* alone"):
        defaults.main([*flags, "--tasks", "Hopper-v4"])
    with pytest.raises(UserError, match=r"as it is; leave out --settings relu$"):
        defaults.main([*flags, "--engine", "ray", "--settings", "centre", "relu"])
    assert not list(tmp_path.iterdir())


def test_parts_that_are_not_there_are_left_out(tmp_path):
    with pytest.raises(UserError, match="has no run yet"):
        defaults.report(tmp_path)
    tables(tmp_path, lambda *_: 1.0)
    (tmp_path / "search").rename(tmp_path / "elsewhere")
    defaults.report(tmp_path)
    assert "## The search" not in (tmp_path / "summary.md").read_text()
    runs = pd.read_csv(tmp_path / "elsewhere/runs.csv", dtype=str)
    sweep.write(tmp_path / "search/runs.csv", runs[runs["setting"] != "centre"])
    defaults.report(tmp_path)
    assert cells((tmp_path / "summary.md").read_text(), "`before`")[2] == ""  # beside no centre


def test_two_samples_without_spread_are_told_apart_by_their_means():
    assert defaults.welch((2.0, 0.0, 3), (1.0, 0.0, 3))[0] == "better"
    assert defaults.welch((1.0, 0.0, 3), (1.0, 0.0, 3)) == ("no difference shown", "1")
    assert defaults.welch((2.0, np.nan, 1), (1.0, 1.0, 3)) == ("one run only", "")
    # unequal deviations and sizes: scipy on the data itself
    x, y = np.array([1.0, 2.0, 9.0]), np.array([10.0, 11.0, 12.0, 11.0])
    expected = stats.ttest_ind(x, y, equal_var=False).pvalue
    assert defaults.welch(defaults.moments(x), defaults.moments(y)) == (
        "no difference shown",
        f"{expected:.2g}",
    )
