"""benchmark/collapse.py: every suspect is what it says, and the report holds what ran."""

import contextlib
import sys
from types import ModuleType

import pytest
import torch

import ppo_continuous
from benchmark import UserError, collapse, read_csv, table1

TASK = "InvertedPendulum-v4"
SMALL = ["--no-compile", "--num-steps", "64", "--num-minibatches", "2", "--update-epochs", "2"]
SMALL += ["--eval-episodes", "1", "--checkpoint-every", "16"]


def trained(module: ModuleType, path, *flags: str) -> dict:
    """The learners after a short run of `none`; its horizon ends in the middle of an episode of Pendulum."""
    argv = ["--env-id", "Pendulum-v1", "--objectives", "none", "--preset", "paper", "--total-timesteps", "512", *SMALL]
    argv += ["--num-steps", "256", "--learning-rate", "0.01", "--run-dir", str(path)]
    args = module.parse_args(module.Args, [*argv, *flags])
    with open(path.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log):
        return module.train(args)[0]["learners"]["weights"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    return trained(ppo_continuous, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("name", collapse.SUSPECTS)
def test_every_suspect_changes_what_is_learned(name, plain, tmp_path):
    """Except the floor, below which no deviation of Pendulum's observations falls, and Pendulum's only simulator."""
    suspect = collapse.SUSPECTS[name]
    other = trained(collapse.altered(suspect.changes), tmp_path / "other", *suspect.flags)
    same = all(torch.equal(plain[part], other[part]) for part in plain)
    assert same == (name in ("as-it-is", "filter-floor", "simulator"))
    assert sys.modules["ppo_continuous"] is ppo_continuous


def test_normc_scales_every_unit():
    torch.manual_seed(0)
    agent = collapse.altered(collapse.NORMC).Agent(5, 3)
    for layer, norm in {agent.actor[0]: 1, agent.actor[2]: 1, agent.actor[4]: 0.01, agent.critic[4]: 1}.items():
        assert torch.allclose(layer.weight.norm(dim=1), torch.full((len(layer.weight),), float(norm)))
        assert not layer.bias.any()


def test_the_floor_is_a_tenth():
    stats = {"mean": torch.zeros(1, 2), "var": torch.tensor([[1e-6, 4.0]]), "count": torch.ones(1, 1)}
    seen = collapse.altered(collapse.FLOOR).standardised(torch.ones(1, 1, 2), stats, 50.0)
    assert torch.allclose(seen, torch.tensor([10.0, 0.5]))


def test_time_limit_is_terminal(tmp_path, monkeypatch):
    """What gae is given: no row is truncated, and the ends of episodes, after 200 steps, are terminal."""
    module, given = collapse.altered(collapse.TERMINAL), []
    gae = module.gae
    monkeypatch.setattr(module, "gae", lambda *args: given.append(args) or gae(*args))
    trained(module, tmp_path / "run")
    ends = [(terminated.flatten().nonzero().tolist(), bool((truncated & ~terminated).any()))
            for _, _, terminated, truncated, *_ in given]  # fmt: skip
    assert ends[0] == ([[199]], False)


def test_moments_of_the_filter(tmp_path, monkeypatch):
    """Which statistics the update sees, and which the old policy: of the rollout, or of the one before."""
    counts = {}
    for name in ("as-it-is", "filter-after", "filter-acting"):
        module, seen = collapse.altered(collapse.SUSPECTS[name].changes), []
        plain = module.standardised
        monkeypatch.setattr(
            module,
            "standardised",
            lambda obs, stats, clip, f=plain, s=seen: s.append(stats["count"].item()) or f(obs, stats, clip),
        )
        trained(module, tmp_path / name)
        counts[name] = seen
    assert counts == {"as-it-is": [255, 510], "filter-after": [0, 255], "filter-acting": [255, 0, 510, 255]}


def test_a_change_that_finds_nothing_is_refused():
    with pytest.raises(UserError, match="no longer says 'no such line'"):
        collapse.altered((("no such line", ""),))


def test_runs_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--suspects", "adam-epsilon", "as-it-is", "--seeds", "1", "--results", "small", "--task", TASK]
    with pytest.raises(FileNotFoundError):
        collapse.main(["--report", *flags])
    more = ["--total-timesteps", "2048", "--", *SMALL]
    collapse.main([*flags, *more])
    runs = {name: read_csv(tmp_path / f"small/{TASK}/{name}/runs.csv") for name in ("as-it-is", "adam-epsilon")}
    for name, rows in runs.items():
        assert [row["objective"] for row in rows] == ["none", "clip:0.2"]
        assert all(f"--run-dir runs/collapse/{TASK}/{name}/" in row["command"] for row in rows)
    assert runs["as-it-is"][0]["kl_median"] != runs["adam-epsilon"][0]["kl_median"]  # the worker ran the altered text
    text = (tmp_path / f"small/{TASK}/summary.md").read_text()
    assert text.startswith(f"# {TASK}, ")
    returns = {name: table1.number(float(rows[0]["last_100_return"])) for name, rows in runs.items()}
    assert f"| `as-it-is` | nothing: --preset paper | {returns['as-it-is']} |" in text
    assert "-.sqrt() + 1e-5)\n+.sqrt() + 1e-8)" in text
    written = {path: path.read_bytes() for path in (tmp_path / "small").rglob("*") if path.is_file()}
    collapse.main([*flags, *more])  # all is done
    collapse.main(["--report", "--results", "small", "--task", TASK])  # of all that have run
    assert {path: path.read_bytes() for path in written} == written
