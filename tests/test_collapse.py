"""benchmark/collapse.py: every suspect is what it says, and the report holds what ran."""

import contextlib
import shutil
import sys
from types import ModuleType

import pytest
import torch

import ppo_continuous
from benchmark import UserError, collapse, grids, lockstep, number, read_csv, sweep

TASK = "InvertedPendulum-v4"
SMALL = ["--no-compile", "--num-steps", "64", "--num-minibatches", "2", "--update-epochs", "2"]
SMALL += ["--eval-episodes", "1", "--checkpoint-every", "16"]


def trained(modules: tuple[ModuleType, ModuleType], path, *flags: str) -> dict:
    """The agent after a short run of `none`; its horizon ends in mid-episode of Pendulum."""
    script, crowd = modules
    argv = ["--env-id", "Pendulum-v1", "--objectives", "none", "--preset", "paper"]
    argv += ["--bootstrap-truncated", "--total-timesteps", "512", *SMALL]
    argv += ["--num-steps", "256", "--learning-rate", "0.01", "--run-dir", str(path)]
    with open(path.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log):
        crowd.train(*crowd.parse_args([*argv, *flags]))
        agent, _ = script.load_agent(str(path / "none__1"))
    return dict(agent.named_parameters())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    return trained((ppo_continuous, lockstep), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("name", collapse.SUSPECTS)
def test_every_suspect_changes_what_is_learned(name, plain, tmp_path):
    """But for two: no deviation of Pendulum is below the floor, and it has only one simulator."""
    suspect = collapse.SUSPECTS[name]
    other = trained(grids.altered(suspect.changes), tmp_path / "other", *suspect.flags)
    same = all(torch.equal(plain[part], other[part]) for part in plain)
    assert same == (name in ("as-it-is", "filter-floor", "simulator"))
    assert sys.modules["ppo_continuous"] is ppo_continuous
    assert sys.modules["benchmark.lockstep"] is lockstep


def test_the_altered_crowd_has_the_altered_script():
    script, crowd = grids.altered(collapse.NORMC)
    assert crowd.ppo is script and crowd.Agent is script.Agent
    assert crowd is not lockstep and script is not ppo_continuous


def test_normc_scales_every_unit():
    torch.manual_seed(0)
    script, _ = grids.altered(collapse.NORMC)
    agent = script.Agent(obs_dim=5, action_dim=3, obs_clip=5.0, log_std=0.0)
    norms = {agent.actor[0]: 1, agent.actor[2]: 1, agent.actor[4]: 0.01, agent.critic[4]: 1}
    for layer, norm in norms.items():
        expected = torch.full((len(layer.weight),), float(norm))
        assert torch.allclose(layer.weight.norm(dim=1), expected)
        assert not layer.bias.any()


def test_the_floor_is_a_tenth():
    script, _ = grids.altered(collapse.FLOOR)
    agent = script.Agent(obs_dim=2, action_dim=1, obs_clip=50.0, log_std=0.0)
    agent.obs_stats.var.copy_(torch.tensor([1e-6, 4.0]))
    assert torch.allclose(agent.normalise(torch.ones(2)), torch.tensor([10.0, 0.5]))


def test_time_limit_is_terminal(tmp_path, monkeypatch):
    """What gae is given: every end is terminal; an episode of Pendulum has 200 steps."""
    given, gae = [], ppo_continuous.gae
    monkeypatch.setattr(ppo_continuous, "gae", lambda *args: given.append(args) or gae(*args))
    trained((ppo_continuous, lockstep), tmp_path / "run", *collapse.TERMINAL)
    _, _, terminated, truncated, *_ = given[0]
    assert truncated.flatten().nonzero().tolist() == [[199]]
    assert torch.equal(terminated, truncated)


def test_moments_of_the_filter(tmp_path, monkeypatch):
    """Which statistics the update sees, and whether it has the old policy under the same ones."""
    found = {}
    for name in ("as-it-is", "filter-after", "filter-acting"):
        script, crowd = grids.altered(collapse.SUSPECTS[name].changes)
        found[name] = []

        def watched(*, update=crowd.update, seen=found[name], **given):
            ((agent,), (batch,)) = given["agents"], given["batches"]
            with torch.no_grad():
                mean, _ = agent.policy(batch["obs"])
            seen.append((agent.obs_stats.count.item(), torch.equal(mean, batch["mean"])))
            return update(**given)

        monkeypatch.setattr(crowd, "update", watched)
        trained((script, crowd), tmp_path / name)
    assert found == {  # a rollout has 255 transitions
        "as-it-is": [(255, True), (510, True)],
        "filter-after": [(0, True), (255, True)],
        "filter-acting": [(255, False), (510, False)],
    }


@pytest.mark.parametrize("old", ["no such line", "import torch\n"])
def test_a_change_that_finds_no_place_or_two_is_refused(old):
    with pytest.raises(UserError, match=r"times, not once: mend the table"):
        grids.altered(((old, ""),))


def test_runs_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suspects = ["as-it-is", "adam-epsilon"]
    flags = ["--suspects", *suspects, "--seeds", "1", "--results", "small", "--task", TASK]
    with pytest.raises(UserError, match="has no run yet"):
        collapse.main(["--report", *flags])
    more = ["--total-timesteps", "2048", "--", *SMALL]
    collapse.main([*flags, *more])
    folder = tmp_path / f"small/{TASK}"
    runs = {name: read_csv(folder / name / "runs.csv") for name in suspects}
    for name, rows in runs.items():
        assert [row["objective"] for row in rows] == ["none", "clip:0.2"]
        where = f"--run-dir small/{TASK}/runs/{name}/"
        assert all(where in row["command"] for row in rows)
    # the worker ran the altered text
    assert runs["as-it-is"][0]["kl_median"] != runs["adam-epsilon"][0]["kl_median"]
    text = (folder / "summary.md").read_text()
    assert text.startswith(f"# {TASK}, ")
    last = number(float(runs["as-it-is"][0]["last_100_return"]))
    assert f"| `as-it-is` | nothing: --preset paper --bootstrap-truncated | {last} |" in text
    assert "-.sqrt() + 1e-5\n+.sqrt() + 1e-8" in text and "`as-it-is`:\n" not in text
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    collapse.main([*flags, *more])  # all is done
    collapse.main(["--report", "--results", "small", "--task", TASK])  # of all that have run
    assert {path: path.read_bytes() for path in written} == written

    (folder / "adam-epsilon/change.diff").write_text("-another\n+change\n")
    collapse.main([*flags, *more])  # all is done: the report shows what ran
    assert "-another\n+change\n" in (folder / "summary.md").read_text()
    flags[flags.index("1")] = "2"
    with pytest.raises(UserError, match="adam-epsilon holds runs of another change"):
        collapse.main([*flags, *more])


@pytest.mark.parametrize("task", ["HalfCheetah-v4", "InvertedDoublePendulum-v4"])
def test_the_committed_results_lack_nothing(task, tmp_path, monkeypatch):
    """Some of their changes of the text are flags today."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(collapse.RESULTS / task, tmp_path / "mine" / task)
    planned = []
    monkeypatch.setattr(sweep, "run", lambda calls, *_: planned.extend(calls))
    monkeypatch.setattr(collapse, "report", lambda *_: None)
    names = [name for name in collapse.SUSPECTS if (collapse.RESULTS / task / name).exists()]
    assert names == collapse.TRIED[task]
    flags = ["--task", task, "--results", "mine"]
    collapse.main(flags)
    assert planned == []
    with pytest.raises(UserError, match="holds runs of other settings"):
        collapse.main([*flags, "--", "--gamma", "0.9"])
