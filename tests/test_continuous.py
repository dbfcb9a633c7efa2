"""ppo_continuous.py: its mathematics against independent computations, its loop, its folder."""

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import test_cartpole_algorithm as checks
import torch
from conftest import spoil_updates
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import ppo_continuous as ppo
from ppo_continuous import Agent, Args, parse_objective, preset

ROOT = Path(__file__).parent.parent
OBJECTIVES = ("clip:0.2", "kl:1", "adaptive:0.01", "none", "pg")
SMALL = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 2}
SMALL |= {"compile": False, "eval_episodes": 2}
ONCE = {"update_epochs": 1, "num_minibatches": 1}  # what pg wants


def small(**flags) -> Args:
    return ppo.check_args(Args(**SMALL | flags))


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def text_between(script: str, start: str, end: str) -> str:
    text = (ROOT / script).read_text()
    return text[text.index(start) : text.index(end, text.index(start))]


@pytest.mark.parametrize("script", ["ppo_continuous.py", "ppo_atari.py", "grpo_toy.py"])
def test_around_the_run_is_the_same_text_in_all_scripts(script):
    ours = text_between("ppo_cartpole.py", "AROUND THE RUN\n", "    main()\n")
    theirs = text_between(script, "AROUND THE RUN\n", "    main()\n")
    assert len(ours) > 5000 and ours == theirs


SHARED = "def layer_init(|def gae(|class Objective(|def ppo_loss(|def total_loss(|def adapt_beta("
SHARED += "|def torch_threads("


@pytest.mark.parametrize("script", ["ppo_continuous.py", "ppo_atari.py"])
@pytest.mark.parametrize("start", [*SHARED.split("|"), "def parse_objective("])
def test_the_algorithm_is_the_same_text_in_the_ppo_scripts(script, start):
    ours, theirs = (text_between(name, start, "\n\n\n") for name in ("ppo_cartpole.py", script))
    assert len(ours) > 100 and ours == theirs


WITH_CARTPOLE = "standardise gradient split_batch update one_vector space_checkpoints"
WITH_CARTPOLE += " checkpoint_due check_evaluation"


@pytest.mark.parametrize("name", WITH_CARTPOLE.split())
def test_what_it_shares_with_cartpole_alone_is_the_same_text(name):
    scripts = ("ppo_cartpole.py", "ppo_continuous.py")
    ours, theirs = (text_between(script, f"\ndef {name}(", "\n\n\n") for script in scripts)
    assert len(ours) > 70 and ours == theirs


# ---------------------------------------------------------------------------------- mathematics
def test_the_gaussian_is_that_of_torch_distributions():
    mean, old_mean, action = torch.randn(3, 50, 4, dtype=torch.float64)
    log_std, old_log_std = torch.randn(2, 50, 4, dtype=torch.float64)
    new = Independent(Normal(mean, log_std.exp()), 1)
    old = Independent(Normal(old_mean, old_log_std.exp()), 1)
    torch.testing.assert_close(ppo.log_prob_of(mean, log_std, action), new.log_prob(action))
    torch.testing.assert_close(ppo.entropy_of(log_std), new.entropy())
    kl = ppo.kl_between(old_mean, old_log_std, mean, log_std)
    torch.testing.assert_close(kl, kl_divergence(old, new))


def one_action(ratio: float, advantage: float) -> tuple[nn.Module, dict]:
    """One action at +1 under N(0, 1). A shift of the mean by x multiplies its density by
    exp(x - x^2 / 2). Where no shift reaches the ratio, a narrower Gaussian at the action does."""
    one = torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    shift, log_std = 1.0, 0.5 - math.log(ratio)
    if ratio < math.exp(0.5):
        shift, log_std = 1 - math.sqrt(1 - 2 * math.log(ratio)), 0.0

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(zero + shift)

        def policy(self, obs):
            return self.mean, zero + log_std

        def value(self, obs):
            return one

    batch = {"obs": zero, "actions": zero + 1, "mean": zero, "log_std": zero, "values": one}
    batch |= {"returns": one, "advantages": advantage * one}
    batch["log_prob"] = ppo.log_prob_of(zero, zero, zero + 1)
    return Fixed(), batch


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_in_closed_form(objective, ratio, advantage):
    agent, batch = one_action(ratio, advantage)
    terms = ppo.loss_terms(agent, batch, parse_objective(objective), 3.0, Args(vf_coef=0.0))
    means = {name: term.mean() for name, term in terms.items()}
    loss = ppo.total_loss(means, Args(vf_coef=0.0))
    (grad,) = torch.autograd.grad(loss, agent.mean)
    shift, log_std = agent.mean.item(), agent.policy(None)[1].item()
    kl = log_std + (1 + shift**2) / (2 * math.exp(2 * log_std)) - 0.5
    slope = (1 - shift) / math.exp(2 * log_std)  # of log pi, by the mean
    flat = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    expected, gradient = -ratio * advantage, -ratio * advantage * slope
    if objective == "clip:0.2" and flat:
        expected, gradient = -(1.2 if advantage > 0 else 0.8) * advantage, 0.0
    if objective == "pg":
        expected = -(batch["log_prob"].item() + math.log(ratio)) * advantage
        gradient = -advantage * slope
    if objective in ("kl:1", "adaptive:0.01"):
        expected += 3 * kl
        gradient += 3 * shift / math.exp(2 * log_std)
    assert loss.item() == pytest.approx(expected)
    assert grad.item() == pytest.approx(gradient, abs=1e-9)
    assert means["kl"].item() == pytest.approx(kl)
    assert means["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert means["old_approx_kl"].item() == pytest.approx(-math.log(ratio))
    assert means["clipfrac"].item() == (objective == "clip:0.2" and abs(ratio - 1) > 0.2)


def test_running_statistics_are_those_of_all_rows_at_once():
    data = torch.from_numpy(np.random.default_rng(0).normal(3e6, 5, (90, 4)))
    stats = ppo.RunningStats(4)
    for part in data.split([1, 39, 50]):
        stats.update(part)
    torch.testing.assert_close(stats.mean, data.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.var, data.var(0, correction=0), rtol=1e-6, atol=0)
    assert stats.count == 90


def test_observations_far_from_zero_keep_their_digits():
    """They are subtracted in float64: float32 has steps of 0.5 around 5 million."""
    agent = Agent(1, 1, obs_clip=10.0, log_std=0.0)
    near = torch.linspace(-0.2, 0.2, 9, dtype=torch.float64).unsqueeze(1)
    seen = []
    for offset in (0.0, 5_412_345.0):
        agent.obs_stats = ppo.RunningStats(1)
        agent.obs_stats.update(near + offset)
        seen.append(agent.normalise(near + offset))
    # float64 has steps of 2^-30 at 5 million, some 1e-8 of the deviation
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-5)
    assert seen[0].std() > 0.9


def test_the_scale_of_rewards_is_a_discounted_sum_that_ends_with_the_episode():
    rewards = np.array([[1.0], [2.0], [4.0], [0.0], [8.0]])
    ended = np.array([[False], [False], [True], [False], [False]])
    sums, rest = ppo.discounted_returns(rewards, ended, np.array([16.0]), 0.5)
    assert sums[:, 0].tolist() == [9.0, 6.5, 7.25, 0.0, 8.0] and rest.tolist() == [8.0]

    # the actors keep the rest for their next rollout, and the reset, which is row 3, does not count
    valid = torch.tensor([[True], [True], [True], [False], [True]])
    rollout = {"rewards": torch.from_numpy(rewards), "terminated": torch.from_numpy(ended)}
    rollout |= {"truncated": torch.zeros(5, 1, dtype=torch.bool), "valid": valid}
    actors, stats = SimpleNamespace(discounted=np.array([16.0])), ppo.RunningStats(1)
    scaled = ppo.scale_rewards(rollout, actors, stats, 0.5)
    assert actors.discounted.tolist() == [8.0] and stats.count == 4
    np.testing.assert_allclose(scaled, rewards / np.std([9.0, 6.5, 7.25, 8.0]), rtol=1e-6)


# ----------------------------------------------------------------------------- one policy, played
def test_what_is_played_fast_is_the_policy_and_a_changed_policy_is_played_slowly():
    torch.manual_seed(0)
    agent = Agent(5, 2, obs_clip=3.0, log_std=-0.5)
    agent.obs_stats.update(2 + 3 * torch.randn(100, 5))
    obs, noise = 5 * np.random.default_rng(0).normal(size=(50, 5)), np.ones((50, 2), np.float32)
    fast = ppo.in_numpy(agent)
    assert "numpy_policy" in fast.__qualname__
    np.testing.assert_allclose(fast(obs, noise), ppo.act(agent, obs, noise), rtol=1e-4, atol=1e-5)

    class Changed(Agent):
        def policy(self, obs):
            mean, log_std = super().policy(obs)
            return mean, log_std - 1

    agent.__class__ = Changed
    slow = ppo.in_numpy(agent)
    assert np.array_equal(slow(obs, noise), ppo.act(agent, obs, noise))
    assert not np.allclose(slow(obs, noise), fast(obs, noise))

    class Renamed(Agent):
        def policy(self, obs):
            return torch.zeros(len(obs), 2), torch.zeros(len(obs), 2)

    del agent.actor, agent.log_std
    agent.__class__ = Renamed
    assert np.array_equal(ppo.in_numpy(agent)(obs, noise), noise)


def test_the_value_function_takes_standardised_observations():
    agent, obs = Agent(5, 2, obs_clip=1.5, log_std=0.0), 200 + 30 * torch.randn(20, 5)
    agent.obs_stats.update(obs)
    standardised = ((obs - obs.mean(0)) / obs.std(0, correction=0)).clamp(-1.5, 1.5)
    expected = agent.critic(standardised).squeeze(-1)
    torch.testing.assert_close(agent.value(obs), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_no_gradient_hides_in_what_the_policy_gives():
    agent = Agent(5, 2, obs_clip=3.0, log_std=0.0)
    with torch.no_grad():
        mean, log_std = agent.policy(torch.zeros(4, 5).double())
    assert not mean.requires_grad and not log_std.requires_grad


def test_the_raw_action_is_stored_and_the_clipped_one_is_sent(monkeypatch):
    args, sent = small(env_id="Pendulum-v1"), []
    actors = ppo.Actors(args, 1)
    actors.restart(0)
    step = actors.envs.step
    monkeypatch.setattr(actors.envs, "step", lambda a: sent.append(a.copy()) or step(a))
    noise = 5 * ppo.draw_noise((64, 1, 1), torch.Generator().manual_seed(0))
    agent = Agent(3, 1, obs_clip=10.0, log_std=0.0)
    rollout, _ = ppo.collect(ppo.in_numpy(agent), actors, noise)
    assert rollout["actions"].abs().max() > 4 and np.abs(sent).max() == 2.0
    raw = ppo.Actors(small(env_id="Pendulum-v1", clip_actions=False), 1)
    assert raw.high.tolist() == [math.inf]


def test_the_environments_of_a_pool_have_seeds_that_count_on():
    """Three are those that one pool each has on 5, 6 and 7."""
    together, _ = ppo.EnvPool("Hopper-v4", 3).reset(5)
    apart = [ppo.EnvPool("Hopper-v4", 1).reset(seed)[0] for seed in (5, 6, 7)]
    assert np.array_equal(together, np.concatenate(apart))
    assert len(np.unique(together, axis=0)) == 3


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
@pytest.mark.parametrize(("env_id", "terminates"), [("HalfCheetah-v4", False), ("Hopper-v4", True)])
def test_both_backends_end_episodes_alike(backend, env_id, terminates):
    args = small(env_id=env_id, env_backend=backend, num_envs=2)
    actors = ppo.Actors(args, 2)
    actors.restart(7)
    width = len(actors.low)
    agent = Agent(actors.obs.shape[1], width, obs_clip=10.0, log_std=0.0)
    noise = ppo.draw_noise((1005, 2, width), torch.Generator().manual_seed(0))
    rollout, episodes = ppo.collect(ppo.in_numpy(agent), actors, noise)
    ended = rollout["terminated"] | rollout["truncated"]
    assert torch.equal(rollout["valid"][1:], ~ended[:-1]) and rollout["valid"][0].all()
    assert (rollout["rewards"][~rollout["valid"]] == 0).all()
    assert not ended[~rollout["valid"]].any() and len(episodes) == ended.sum()
    if terminates:
        assert rollout["terminated"].any() and not rollout["truncated"].any()
    else:
        assert ended.nonzero().tolist() == [[999, 0], [999, 1]]
        assert not rollout["terminated"].any() and [e[2] for e in episodes] == [1000, 1000]
        assert (rollout["obs"][1001].abs() < 1).all() and (rollout["obs"][1000].abs() > 1).any()
    for i in (0, 1):
        mine = [episode for episode in episodes if episode[0] % 2 == i]
        steps = rollout["valid"][: mine[-1][0] // 2 + 1, i].sum()  # until the last one's end
        assert sum(length for *_, length in mine) == steps
    row, episode_return, _ = next(e for e in episodes if e[0] % 2 == 0)
    assert episode_return == pytest.approx(
        rollout["rewards"][: row // 2 + 1, 0].sum().item(), rel=1e-4
    )


# -------------------------------------------------------------------------------------- the loop
def test_a_run_begins_with_adam_two_streams_and_the_agent_of_its_flags():
    args = small(env_id="Pendulum-v1", seed=3, obs_clip=3.0, log_std=0.5)
    _, parts = ppo.begin(args, ppo.Actors(args, 1), None)
    checks.check_parts(ppo, parts, 3)
    assert parts["agent"].obs_clip == 3.0 and parts["agent"].log_std.tolist() == [0.5]
    assert ppo.Agent(3, 2, 10.0, log_std=-1).log_std.tolist() == [-1.0, -1.0]  # a whole number


def test_a_run_keeps_the_bounds_that_its_actions_have():
    for clip, bound in ((True, 2.0), (False, math.inf)):
        args = small(env_id="Pendulum-v1", clip_actions=clip)
        state, _ = ppo.begin(args, ppo.Actors(args, 1), None)
        assert (state["low"], state["high"]) == ([-bound], [bound])


def test_the_chart_of_sigma_is_that_of_the_agent(tmp_path):
    flags = {"env_id": "Pendulum-v1", "log_std": -0.5, "total_timesteps": 64}
    agent, _ = ppo.train(small(**flags, run_dir=str(tmp_path / "run")))
    (row,) = rows(tmp_path / "run/metrics.csv")
    sigma = agent.log_std.exp().mean().item()
    assert float(row["charts/action_std"]) == pytest.approx(sigma, rel=1e-6)


def test_the_metrics_after_an_update_are_of_all_transitions():
    agent, batch = checks.random_batch(ppo, 64, resets=0.3)
    with torch.no_grad():
        agent.log_std += 0.2
    valid = {name: x[batch["valid"]] for name, x in batch.items()}
    with torch.no_grad():
        mean, log_std = agent.policy(valid["obs"])
    old, new = Normal(valid["mean"], valid["log_std"].exp()), Normal(mean, log_std.exp())
    error = np.var((valid["returns"] - valid["values"]).numpy())
    assert ppo.batch_metrics(agent, batch) == pytest.approx(
        {
            "kl_after_update": kl_divergence(old, new).sum(-1).mean().item(),
            "explained_variance": 1 - error / np.var(valid["returns"].numpy()),
        },
        rel=1e-4,
        abs=1e-6,
    )


def test_the_penalty_has_the_weight_that_the_update_is_given():
    checks.check_beta_of_the_update(ppo)


@pytest.mark.parametrize("sample", [True, False])
def test_every_step_of_an_evaluation_has_its_own_noise_or_none(sample, tmp_path, monkeypatch):
    """Two episodes of 200 steps; each has a stream of its own."""
    args = small(env_id="Pendulum-v1", sample_actions=sample)
    agent = Agent(3, 1, obs_clip=10.0, log_std=0.0)
    drawn = checks.check_evaluation_noise(ppo, agent, args, tmp_path, monkeypatch)
    first = 2**30 + ppo.stream(1, "evaluation")
    assert drawn == ([first] * 200 + [first + 1] * 200) * sample


def test_a_seed_has_first_weights_of_its_own():
    def begin(seed: int) -> Agent:
        args = small(env_id="Pendulum-v1", seed=seed)
        return ppo.begin(args, ppo.Actors(args, 1), None)[1]["agent"]

    checks.check_first_weights(ppo, begin)


@pytest.mark.parametrize(("objective", "anneal_lr"), checks.SCHEDULES)
def test_each_update_has_its_step_size_its_beta_and_its_seed(objective, anneal_lr, tmp_path):
    flags = checks.THREE | {"env_id": "Pendulum-v1", "compile": False}
    flags |= {"objective": objective, "anneal_lr": anneal_lr, "run_dir": str(tmp_path / "run")}
    checks.check_three_updates(ppo, Args(**flags))


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_a_time_limit_is_bootstrapped_or_an_end(backend, bootstrap, tmp_path, monkeypatch):
    seen, gae, update = {}, ppo.gae, ppo.update

    def watched_gae(*given):
        seen["recorded"], seen["advantages"] = given, gae(*given)
        return seen["advantages"]

    def watched_update(**given):
        seen["batch"] = given["batch"]
        seen["weights"] = {n: x.clone() for n, x in given["agent"].state_dict().items()}
        return update(**given)

    monkeypatch.setattr(ppo, "gae", watched_gae)
    monkeypatch.setattr(ppo, "update", watched_update)
    flags = {"num_steps": 1024, "total_timesteps": 1024, "update_epochs": 1, "gamma": 0.99}
    flags |= {"norm_adv": "none", "scale_rewards": False, "bootstrap_truncated": bootstrap}
    flags["env_backend"] = backend
    ppo.train(Args(**SMALL | flags, run_dir=str(tmp_path / "run")))
    rewards, values, terminated, truncated, *_ = seen["recorded"]
    batch = seen["batch"]
    agent = Agent(17, 6, obs_clip=10.0, log_std=0.0)
    agent.load_state_dict(seen["weights"])
    with torch.no_grad():
        last, final = agent.value(batch["obs"][[999, 1000]])
        mean, log_std = agent.policy(batch["obs"])
    assert truncated.nonzero().tolist() == [[999, 0]]  # HalfCheetah has no other end
    assert terminated.any() == (not bootstrap)
    torch.testing.assert_close(values[[999, 1000], 0], torch.stack([last, final]))
    expected = rewards[999] - last + (0.99 * final if bootstrap else 0.0)
    assert (seen["advantages"][999] - expected).abs() < 1e-4 and rewards[1000] == 0
    assert batch["valid"].tolist() == [row != 1000 for row in range(1024)]
    # the raw action is scored, under the new statistics: so the first minibatch has ratio 1
    assert batch["actions"].abs().max() > 1  # the bounds are +-1
    density = Independent(Normal(mean, log_std.exp()), 1).log_prob(batch["actions"])
    torch.testing.assert_close(batch["log_prob"], density)


def test_a_compiled_gradient_is_the_eager_one_and_one_program(monkeypatch):
    """Minibatches vary in size, since reset rows are struck out; one program serves them all."""
    rng = torch.Generator().manual_seed(0)
    agent = Agent(11, 3, obs_clip=10.0, log_std=0.0)
    agent.obs_stats.update(torch.randn(100, 11, generator=rng))
    obs = torch.randn(64, 11, generator=rng).double()
    with torch.no_grad():
        mean, log_std = agent.policy(obs)
        actions = mean + torch.randn(64, 3, generator=rng)
        log_prob, values = ppo.log_prob_of(mean, log_std, actions), agent.value(obs)
    batch = {"obs": obs, "actions": actions, "mean": mean, "log_std": log_std}
    batch |= {"log_prob": log_prob, "values": values}
    batch |= {name: torch.randn(64, generator=rng) for name in ("advantages", "returns")}
    compile_ = torch.compile

    def one_graph(function, **options):
        return compile_(function, fullgraph=True, **options)  # a graph break is an error

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", one_graph)
    compiled = ppo.compiled(ppo.gradient)
    for size in (64, 61, 57):
        part = {name: x[:size] for name, x in batch.items()}
        results = []
        for function in (ppo.gradient, compiled):
            beta = torch.tensor(2.0)
            results.append(function(agent, part, parse_objective("kl:1"), beta, Args()))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one more for odd sizes


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    flags = {"env_id": "InvertedPendulum-v4", "objective": "adaptive:0.01", "num_envs": 4}
    flags |= {"total_timesteps": 256 * 6, "checkpoint_every": 2}
    _, whole = ppo.train(Args(**SMALL | flags, run_dir=str(tmp_path / "whole")))
    log = ppo.Run.log

    def stop(run, update, *rest):
        log(run, update, *rest)
        if update == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo.Run, "log", stop)
        ppo.train(Args(**SMALL | flags, run_dir=str(tmp_path / "stopped")))
    _, again = ppo.train(Args(resume=str(tmp_path / "stopped")))
    clocks = {"wall_seconds": 0, "sps": 0}
    assert whole | clocks == again | clocks
    one, other = (ppo.load_checkpoint(tmp_path / x / "checkpoint.pt") for x in ("whole", "stopped"))
    for part in ("agent", "return_stats"):
        assert all(torch.equal(x, other[part][name]) for name, x in one[part].items())
    for i, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(x, other["optimizer"]["state"][i][n]) for n, x in moments.items())
    assert (tmp_path / "whole/episodes.csv").read_bytes() == (
        tmp_path / "stopped/episodes.csv"
    ).read_bytes()
    lines = (rows(tmp_path / x / "metrics.csv") for x in ("whole", "stopped"))
    for mine, theirs in zip(*lines, strict=True):
        assert mine | {"charts/SPS": ""} == theirs | {"charts/SPS": ""}
    config = json.loads((tmp_path / "stopped" / "config.json").read_text())
    assert config["args"]["env_backend"] == "envpool"  # from four environments on


def test_a_compiled_run_goes_on_where_there_is_no_compiler(tmp_path, monkeypatch, capsys):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 192, "checkpoint_every": 1}
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ppo.Run, "hide_bar", False)
    log = ppo.Run.log

    def stop(run, update, *rest):
        log(run, update, *rest)
        if update == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo.Run, "log", stop)
        ppo.train(Args(**SMALL | flags | {"compile": True}, run_dir=str(tmp_path / "run")))
    assert "the first update compiles" in capsys.readouterr().err
    monkeypatch.setattr(ppo.shutil, "which", lambda _: None)
    _, summary = ppo.train(Args(resume=str(tmp_path / "run")))
    assert summary["total_timesteps"] == 192
    said = capsys.readouterr().err
    assert said.count("note: no C++ compiler") == 1 and "compiles" not in said


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_promised_metric_is_there_and_finite(objective, tmp_path):
    flags = {"env_id": "Pendulum-v1", "objective": objective, "total_timesteps": 512, "num_envs": 2}
    flags |= ONCE if objective == "pg" else {}
    _, summary = ppo.train(Args(**SMALL | flags, run_dir=str(tmp_path / "run")))
    metrics = rows(tmp_path / "run" / "metrics.csv")
    losses = "policy_loss value_loss entropy kl approx_kl old_approx_kl clipfrac grad_norm"
    losses += " kl_after_update explained_variance"
    promised = [f"losses/{name}" for name in losses.split()]
    promised += ["charts/SPS", "charts/learning_rate", "charts/beta", "charts/action_std"]
    assert list(metrics[0])[:4] == ["update", "global_step", "seed", "objective"]
    assert len(metrics) == 4 and set(promised) <= metrics[0].keys()
    assert all(math.isfinite(float(row[name])) for row in metrics for name in promised)
    assert summary["objective"] == objective and math.isfinite(summary["eval_return_mean"])


def test_a_loaded_policy_plays_what_the_evaluation_played(tmp_path, monkeypatch, capsys):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 256}
    agent, summary = ppo.train(Args(**SMALL | flags, run_dir=str(tmp_path / "run")))
    policy = ppo.load_policy(str(tmp_path / "run"))
    env = gym.make("Pendulum-v1")
    returns = []
    for episode in range(2):
        obs, _ = env.reset(seed=2**30 + ppo.stream(1, "evaluation") + episode)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert np.mean(returns) == pytest.approx(summary["eval_return_mean"], rel=1e-3)
    batch = np.random.default_rng(0).normal(size=(7, 3)) * 100
    assert policy(batch).shape == (7, 1) and policy(batch[0]).shape == (1,)
    samples = ppo.load_policy(str(tmp_path / "run"), sample_actions=True)
    assert not np.array_equal(samples(batch), policy(batch)) and np.abs(samples(batch)).max() <= 2
    assert agent.obs_stats.count == 256 - summary["total_timesteps"] + summary["transitions"]
    monkeypatch.setattr(
        sys, "argv", ["x", "--evaluate", str(tmp_path / "run"), "--eval-episodes", "2"]
    )
    ppo.main()
    (evaluated,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluated["eval_return_mean"] == summary["eval_return_mean"]
    assert "greedy actions" in capsys.readouterr().out


def test_videos_show_every_episode_that_is_counted(tmp_path):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 64, "env_backend": "gymnasium"}
    agent, _ = ppo.train(Args(**SMALL | flags, run_dir=str(tmp_path / "run")))
    plain = ppo.evaluate(agent, small(**flags), tmp_path)
    filmed = ppo.evaluate(agent, small(**flags, capture_video=True), tmp_path / "film")
    assert filmed == plain
    videos = sorted((tmp_path / "film" / "videos").iterdir())
    assert [video.suffix for video in videos] == [".mp4", ".mp4"]
    assert all(video.stat().st_size > 1000 for video in videos)


def test_the_camera_of_a_film_follows_the_body():
    for env_id, follows in (
        ("HalfCheetah-v4", True),
        ("Humanoid-v5", True),
        ("Pendulum-v1", False),
    ):
        envs = ppo.make_envs(small(env_id=env_id), 1, render=True)
        renderer = getattr(envs.envs[0].unwrapped, "mujoco_renderer", None)
        envs.close()
        assert (renderer is not None) == follows
        if follows:
            camera = renderer.model.camera(renderer.camera_id)
            assert (
                camera.name == "track" and camera.mode[0] == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
            )


@pytest.mark.parametrize("source", ["rewards", "obs"])
def test_a_number_that_is_not_finite_stops_the_run(source, tmp_path, monkeypatch):
    collect = ppo.collect

    def spoil(*given):
        rollout, episodes = collect(*given)
        rollout[source][10] = math.nan
        return rollout, episodes

    monkeypatch.setattr(ppo, "collect", spoil)
    with pytest.raises(ppo.NonFiniteError, match=f"{source} not finite in update 1"):
        ppo.train(
            Args(**SMALL, env_id="Pendulum-v1", total_timesteps=64, run_dir=str(tmp_path / "x"))
        )
    assert not (tmp_path / "x" / "summary.json").exists()


def test_a_weight_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoil_updates(monkeypatch, ppo, lambda agent: agent.critic[0].bias)
    flags = SMALL | {"env_id": "Pendulum-v1", "total_timesteps": 64}
    with pytest.raises(ppo.NonFiniteError, match="weights not finite in update 1"):
        ppo.train(Args(**flags, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run/checkpoint.pt").exists()


# ------------------------------------------------------------------------------------- the flags
def test_presets_are_flags_and_nothing_else():
    assert preset("modern") == Args() == ppo.parse_args([])
    paper = preset("paper", env_id="Hopper-v4", gamma=0.9)
    assert paper == ppo.parse_args(["--preset", "paper", "--env-id", "Hopper-v4", "--gamma", "0.9"])
    assert paper.norm_adv == "batch" and not paper.bootstrap_truncated and paper.gamma == 0.9
    assert ppo.parse_args(["--anneal-lr", "--preset=paper"]).anneal_lr
    with pytest.raises(TypeError, match="preset"):
        Args(preset="paper")
    zero = torch.zeros(1)  # Args() is usable as it is
    batch = {"log_prob": zero, "values": zero, "advantages": zero, "returns": zero}
    ppo.ppo_loss(zero, zero, zero, zero, batch, parse_objective("none"), 0.0, Args())


# modern, paper. Table 3 of the paper in both. Where it is silent, modern is mostly what is usual
# today; paper is what OpenAI's code of its time did, ppo1 in Baselines.
PRESETS = {
    "objective": ("clip:0.2", "clip:0.2"),  # the best of Table 1
    "total_timesteps": (1_000_000, 1_000_000),
    "num_envs": (1, 1),
    "num_steps": (2048, 2048),  # Table 3, as are the next five
    "learning_rate": (3e-4, 3e-4),
    "update_epochs": (10, 10),
    "num_minibatches": (32, 32),  # of 2048 / 32 = 64 steps
    "gamma": (0.99, 0.99),
    "gae_lambda": (0.95, 0.95),
    "ent_coef": (0.0, 0.0),  # section 6.1 has no entropy bonus
    "obs_clip": (10.0, 5.0),
    "clip_actions": (True, False),
    "scale_rewards": (True, False),
    "log_std": (-1.0, 0.0),
    "norm_adv": ("minibatch", "batch"),
    "bootstrap_truncated": (True, False),
    "anneal_lr": (True, False),
    "vf_coef": (0.25, 1.0),
    "value_clip": (None, None),
    "max_grad_norm": (0.5, math.inf),
    "target_kl": (None, None),
}


def test_presets_are_what_their_sources_say():
    for i, name in enumerate(("modern", "paper")):
        expected = {flag: values[i] for flag, values in PRESETS.items()}
        assert {flag: getattr(preset(name), flag) for flag in PRESETS} == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--env-id CartPole-v1", "CartPole-v1 takes Discrete(2)"),
        ("--env-id HalfCheeta-v4", "Did you mean: `HalfCheetah`?"),
        ("--env-id HalfCheetah-v44 --env-backend envpool", "did you mean HalfCheetah-v4?"),
        ("--seed -1", "--seed must be between 0"),
        ("--seeds 1 2", "--seeds is a flag of benchmark/lockstep.py"),
        ("--objectives none", "--objectives is a flag of benchmark/lockstep.py"),
        ("--objective clip", "'clip' is no objective"),
        ("--objective pg", "--objective pg: eq. 2 can use a batch once only"),
        ("--obs-clip 0", "--obs-clip must be between"),
        ("--log-std nan", "--log-std must be between"),
        ("--max-grad-norm nan", "--max-grad-norm must be between"),
        ("--num-minibatches 33", "does not divide into 33 minibatches"),
        ("--evaluate nowhere", "nowhere is not a run folder"),
        ("--resume nowhere --seed 2", "--seed cannot stand beside --resume"),
        ("--preset fast", "--preset must be modern or paper, not 'fast'"),
        ("--resume nowhere --preset paper", "--preset cannot stand beside --resume"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", ["--gama 0.9", "--seed one"])
def test_a_command_line_that_cannot_be_read_ends_with_code_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 2 and argv.split()[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_an_old_crowd_gets_one_line(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"script": "ppo_continuous", "args": {"seeds": [1, 2], "objectives": ["none"]}})
    )
    with pytest.raises(ppo.UserError, match=r"benchmark/lockstep\.py: .* objectives, seeds$"):
        ppo.load_run(str(tmp_path))


def test_it_learns(tmp_path):
    """Compiled, as by default; to the eager gradient a test above has compared it."""
    flags = {"env_id": "InvertedPendulum-v4", "num_envs": 8, "num_steps": 128}
    flags |= {"num_minibatches": 16, "total_timesteps": 60_000, "learning_rate": 1e-3}
    flags |= {"eval_episodes": 5}
    _, summary = ppo.train(Args(**flags, run_dir=str(tmp_path / "run")))
    assert summary["eval_return_mean"] > 500, summary
