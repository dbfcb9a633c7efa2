"""benchmark/humanoid_ppo.py and humanoid.py: the rules of the recipe, its runs, and its report."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import test_cartpole_algorithm as checks
import torch
from conftest import rounding, spoil_updates, spy_on_restarts
from torch import nn
from torch.distributions import Normal, kl_divergence

import ppo_continuous as ppo
from benchmark import UserError, humanoid, humanoid_ppo, read_csv, sweep
from benchmark.humanoid_ppo import Agent, Args

SMALL = {"num_envs": 4, "num_steps": 16, "update_epochs": 2, "compile": False, "eval_episodes": 1}
FLAGS = "--num-envs 4 --num-steps 16 --update-epochs 2 --no-compile --eval-episodes 1"
pytestmark = pytest.mark.filterwarnings("ignore:.*Humanoid-v4 is out of date")
CLIP = ppo.parse_objective("clip:0.2")


def small_agent() -> Agent:
    """An agent of 5 observations and 2 actions whose statistics are not those of the start."""
    agent = Agent(obs_dim=5, bounds=[0.4, 0.4], obs_clip=5.0, log_std=-0.92)
    agent.obs_stats.update(2 * torch.randn(50, 5) + 1)
    agent.value_stats.update(3 * torch.randn(50, 1) + 7)
    with torch.no_grad():  # or all means would be near 0
        agent.actor.weight.normal_()
    return agent


def small_rollout() -> dict:
    """Of 6 steps and 3 actors: one terminates, one is truncated, each followed by a reset step."""
    terminated, truncated = torch.zeros(2, 6, 3, dtype=torch.bool)
    terminated[1, 0] = True
    truncated[3, 1] = True
    valid = torch.ones(6, 3, dtype=torch.bool)
    valid[2, 0] = False
    valid[4, 1] = False
    return {
        "obs": torch.randn(7, 3, 5, dtype=torch.float64),
        "actions": torch.randn(6, 3, 2),
        "rewards": torch.rand(6, 3) * valid,
        "terminated": terminated,
        "truncated": truncated,
        "valid": valid,
    }


# --------------------------------------------------------------------------------- THE ALGORITHM
def test_the_recipe_is_what_its_source_says():
    """rl_games' humanoid_envpool.yaml, in our units: what a change elsewhere must not change."""
    recipe = {
        "total_timesteps": 10_000_000,
        "num_envs": 64,
        "num_steps": 128,
        "objective": "clip:0.2",
        "obs_clip": 5.0,
        "clip_actions": True,
        "scale_rewards": False,
        "reward_scale": 0.1,
        "log_std": -0.92,
        "norm_values": True,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "bootstrap_truncated": True,
        "norm_adv": "batch",
        "update_epochs": 5,
        "num_minibatches": 4,
        "learning_rate": 3e-4,
        "adapt_lr": True,
        "desired_kl": 0.008,
        "kl_since": "visit",
        "anneal_lr": False,
        "vf_coef": 2.0,  # 4, with 1/2
        "ent_coef": 0.0,
        "value_clip": 0.2,
        "max_grad_norm": 1.0,
    }
    assert {name: getattr(Args(), name) for name in recipe} == recipe
    own = {name: kind for name, kind in Args.__annotations__.items() if name != "env_id"}
    assert own.keys() == recipe.keys()  # all of it stands in the file, and nothing else does
    assert Args().target_kl is None


def test_the_network_by_hand():
    torch.manual_seed(0)
    agent, obs = small_agent(), torch.randn(3, 5, dtype=torch.float64)
    sizes = [tuple(x.shape) for name, x in agent.named_parameters() if "weight" in name]
    assert sizes == [(512, 5), (256, 512), (128, 256), (2, 128), (1, 128)]
    assert all((x == 0).all() for name, x in agent.named_parameters() if "bias" in name)
    fresh = Agent(5, [0.4], 5.0, -0.92)
    for layer in (fresh.trunk[0], fresh.trunk[2], fresh.trunk[4]):
        checks.check_orthogonal(layer, 2**0.5)
    checks.check_orthogonal(fresh.actor, 0.01)
    checks.check_orthogonal(fresh.critic, 1.0)
    x = agent.normalise(obs)
    for layer in (agent.trunk[0], agent.trunk[2], agent.trunk[4]):
        x = x @ layer.weight.T + layer.bias
        x = torch.where(x > 0, x, x.exp() - 1)
    mean, log_std, values = agent(obs)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(mean, 0.4 * (x @ agent.actor.weight.T + agent.actor.bias), **near)
    torch.testing.assert_close(
        values, (x @ agent.critic.weight.T + agent.critic.bias)[:, 0], **near
    )
    assert log_std.shape == mean.shape and (log_std == -0.92).all()
    values.sum().backward()
    assert agent.trunk[0].weight.grad.abs().max() > 0  # the value function teaches the trunk too


def test_the_step_size_in_three_branches_and_within_its_bounds():
    desired = 0.008
    assert humanoid_ppo.adapt_lr(3e-4, 0.0161, desired) == 3e-4 / 1.5
    assert humanoid_ppo.adapt_lr(3e-4, 0.0039, desired) == 3e-4 * 1.5
    for kl in (0.004, 0.008, 0.016):  # the bounds themselves change nothing
        assert humanoid_ppo.adapt_lr(3e-4, kl, desired) == 3e-4
    assert humanoid_ppo.adapt_lr(1.2e-6, 1.0, desired) == 1e-6
    assert humanoid_ppo.adapt_lr(9e-3, 0.0, desired) == 1e-2
    assert humanoid_ppo.adapt_lr(3e-4, math.nan, desired) == 3e-4  # check_finite() will say it


@pytest.mark.parametrize("since", ["visit", "rollout"])
def test_every_minibatch_sets_the_step_size_and_what_its_kl_is_measured_from(since):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-3)
    batch = {"last_mean": torch.zeros(4, 2), "last_log_std": torch.zeros(4, 2)}
    kls = iter([0.1, 0.0, 0.008])

    def gradient(agent, minibatch, objective, args):
        count = len(minibatch["row"])
        return None, {"kl": torch.tensor(next(kls))}, torch.ones(count, 2), torch.ones(count, 2)

    gradient_fn = humanoid_ppo.adapting(gradient, optimizer, batch)
    lrs = []
    for rows in ([0, 3], [1], [1]):
        args = Args(kl_since=since)
        gradient_fn(None, {"row": torch.tensor(rows)}, CLIP, 0.0, args)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == [1e-3 / 1.5, 1e-3 / 1.5 * 1.5, 1e-3 / 1.5 * 1.5]
    renewed = [1.0, 1.0, 0.0, 1.0] if since == "visit" else [0.0] * 4
    for name in ("last_mean", "last_log_std"):
        assert batch[name][:, 0].tolist() == renewed and batch[name][:, 1].tolist() == renewed
    fixed = humanoid_ppo.adapting(lambda *_: (None, {}, None, None), optimizer, batch)
    fixed(None, {}, CLIP, 0.0, Args(adapt_lr=False, kl_since="rollout"))
    assert optimizer.param_groups[0]["lr"] == lrs[-1]


def test_values_are_normalised_as_by_hand_and_restored_for_the_bootstrap(monkeypatch):
    agent, rollout, args = small_agent(), small_rollout(), Args(gamma=0.9, gae_lambda=0.8)
    count = agent.value_stats.count.item()
    mean, var = agent.value_stats.mean.item(), agent.value_stats.var.item()
    assert abs(mean) > 1 and abs(var - 1) > 1  # or nothing below would tell
    given, gae = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *rest: given.append(rest) or gae(*rest))
    batch = humanoid_ppo.make_batch(agent, rollout, args)

    with torch.no_grad():
        _, _, head = agent(rollout["obs"])  # what the network says: mean 0, deviation 1
    values = head.double() * math.sqrt(var + 1e-8) + mean
    assert torch.allclose(given[0][1].double(), values, rtol=1e-6)
    advantages = torch.zeros(6, 3, dtype=torch.float64)
    for i in range(3):
        advantage = 0.0
        for t in reversed(range(6)):
            goes_on = 0.0 if rollout["terminated"][t, i] else 1.0
            ended = bool(rollout["terminated"][t, i] | rollout["truncated"][t, i])
            delta = 0.1 * rollout["rewards"][t, i].item() - values[t, i].item()
            delta += 0.9 * values[t + 1, i].item() * goes_on  # the bootstrap, in units of rewards
            advantage = delta + (0.0 if ended else 0.9 * 0.8 * advantage)
            advantages[t, i] = advantage
    valid = rollout["valid"].flatten()
    assert torch.allclose(batch["advantages"].double(), advantages.flatten(), atol=1e-4)
    returns = (advantages + values[:-1]).flatten()
    seen = returns[valid]
    total = count + len(seen)
    new_mean = (count * mean + seen.sum().item()) / total
    squares = count * (var + mean**2) + seen.square().sum().item()
    new_std = math.sqrt(squares / total - new_mean**2 + 1e-8)
    assert agent.value_stats.count.item() == total
    assert torch.allclose(batch["returns"].double(), (returns - new_mean) / new_std, atol=1e-4)
    old = (values[:-1].flatten() - new_mean) / new_std
    assert torch.allclose(batch["values"].double(), old, atol=1e-4)


def test_normalising_is_undone_and_can_be_left_away():
    agent = small_agent()
    values = 100 * torch.randn(1000)
    there_and_back = agent.restore_values(agent.normalise_values(values))
    largest = values.abs().max() + agent.value_stats.mean.abs()
    assert (there_and_back - values).abs().max() <= rounding(2, largest)

    agent.value_stats = ppo.RunningStats(1)
    rollout = small_rollout()
    batch = humanoid_ppo.make_batch(agent, rollout, Args(norm_values=False))
    with torch.no_grad():
        _, _, head = agent(rollout["obs"])
    assert torch.equal(batch["values"], head[:-1].flatten())
    assert torch.equal(batch["returns"], batch["advantages"] + batch["values"])
    assert agent.value_stats.count == 0


def test_a_time_limit_may_count_as_an_end():
    """The truncated step and those before it: nothing comes after it, as if it were terminal."""
    agent, rollout = small_agent(), small_rollout()
    ended = rollout | {"terminated": rollout["terminated"] | rollout["truncated"]}
    stats = {name: x.clone() for name, x in agent.state_dict().items()}
    advantages = []
    for given, bootstrap in ((rollout, True), (rollout, False), (ended, True)):
        agent.load_state_dict(stats)
        args = Args(bootstrap_truncated=bootstrap)
        advantages.append(humanoid_ppo.make_batch(agent, given, args)["advantages"])
    assert not torch.equal(advantages[0], advantages[1])
    assert torch.equal(advantages[1], advantages[2])


def test_the_policy_is_that_of_actions_within_one_times_the_bound():
    """rl_games' Gaussian within [-1, 1], whose sample is multiplied by 0.4: other units, no more.

    The density of a sample differs by the factor 0.4 for each action, and ratios do not.
    """
    agent = small_agent()
    obs, actions = torch.randn(10, 5, dtype=torch.float64), torch.randn(10, 2)
    mean, log_std = agent.policy(obs)
    within = agent.actor(agent.trunk(agent.normalise(obs)))
    assert torch.allclose(mean, 0.4 * within)
    assert abs(log_std[0, 0].exp().item() - 0.4) < 0.002
    theirs = ppo.log_prob_of(within, log_std - math.log(0.4), actions / 0.4)
    ours = ppo.log_prob_of(mean, log_std, actions)
    assert torch.allclose(ours, theirs - 2 * math.log(0.4), rtol=1e-4)


def test_an_input_that_never_varied_counts_for_nothing():
    agent = Agent(obs_dim=3, bounds=[0.4], obs_clip=5.0, log_std=-0.92)
    seen = torch.randn(50, 3)
    seen[:, 1] = 2.0
    agent.obs_stats.update(seen)
    obs = torch.tensor([[0.5, 2.0, -0.5], [0.5, 9.0, -0.5]])
    normalised = agent.normalise(obs)
    assert torch.equal(normalised[0], normalised[1]) and (normalised[:, 1] == 0).all()
    assert torch.equal(normalised[:, ::2], ppo.Agent.normalise(agent, obs)[:, ::2])

    small = Agent(obs_dim=1, bounds=[0.4], obs_clip=5.0, log_std=-0.92)
    small.obs_stats.update(torch.tensor([[-1e-3], [1e-3]]))
    assert small.normalise(torch.tensor([[1e-3]])).item() == pytest.approx(1, abs=0.01)


def test_a_batch_is_the_rollout_under_the_new_statistics():
    agent, rollout = small_agent(), small_rollout()
    count, mean = agent.obs_stats.count.item(), agent.obs_stats.mean.clone()
    batch = humanoid_ppo.make_batch(agent, rollout, Args())
    valid = rollout["valid"]
    seen = rollout["obs"][:-1][valid]  # 16 of 18: a step that only resets is no observation
    assert agent.obs_stats.count == count + 16 == count + len(seen)
    expected = (count * mean + seen.sum(0)) / (count + 16)
    torch.testing.assert_close(agent.obs_stats.mean, expected)
    with torch.no_grad():
        policy = agent.policy(rollout["obs"][:-1].flatten(0, 1))
    for name, x in zip(("mean", "log_std"), policy, strict=True):
        torch.testing.assert_close(batch[name], x, rtol=1e-4, atol=1e-5)
        assert torch.equal(batch[f"last_{name}"], batch[name])
        batch[f"last_{name}"] += 1  # as an update does: the policy of the rollout stays
        torch.testing.assert_close(batch[name], x, rtol=1e-4, atol=1e-5)
    log_prob = ppo.log_prob_of(*policy, rollout["actions"].flatten(0, 1))
    torch.testing.assert_close(batch["log_prob"], log_prob, rtol=1e-4, atol=1e-4)
    assert torch.equal(batch["obs"], rollout["obs"][:-1].flatten(0, 1))
    assert batch["row"].tolist() == list(range(18))


@pytest.mark.parametrize("norm_adv", ["batch", "minibatch"])
def test_the_gradient_is_the_scripts(norm_adv):
    agent = small_agent()
    args = Args(norm_adv=norm_adv, max_grad_norm=0.3, ent_coef=0.01)
    batch = humanoid_ppo.make_batch(agent, small_rollout(), args)
    with torch.no_grad():  # the weights have moved since
        agent.actor.bias += 0.1
        agent.critic.bias += 0.5
    agent.value = lambda obs: agent(obs)[2]  # the loss compares what is normalised
    expected, means = ppo.gradient(agent, batch, CLIP, 0.0, args)
    found, our_means, mean, log_std = humanoid_ppo.gradient_and_policy(agent, batch, CLIP, args)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.norm().item() == pytest.approx(0.3) and means["grad_norm"] > 0.3
    assert our_means.keys() == means.keys() and means["kl"] > 0
    for name, x in means.items():
        assert torch.allclose(x, our_means[name], rtol=1e-4, atol=1e-6), name
    with torch.no_grad():
        assert torch.equal(torch.stack([mean, log_std]), torch.stack(agent.policy(batch["obs"])))

    whole, *_ = humanoid_ppo.gradient_and_policy(
        agent, batch, CLIP, replace(args, max_grad_norm=1e6)
    )
    assert whole.norm().item() == pytest.approx(means["grad_norm"].item(), rel=1e-4)  # not longer


def test_the_kl_is_that_from_the_last_visit_to_now():
    agent = small_agent()
    batch = humanoid_ppo.make_batch(agent, small_rollout(), Args())
    _, means, *_ = humanoid_ppo.gradient_and_policy(agent, batch, CLIP, Args())
    assert abs(means["kl"].item()) < 1e-6
    batch["last_mean"] += 0.3
    batch["last_log_std"] -= 0.5
    _, means, mean, log_std = humanoid_ppo.gradient_and_policy(agent, batch, CLIP, Args())
    old = Normal(batch["last_mean"], batch["last_log_std"].exp())
    expected = kl_divergence(old, Normal(mean, log_std.exp())).sum(-1).mean()
    assert means["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(means["approx_kl"].item()) < 1e-6  # that one is since the rollout


# ----------------------------------------------------------------------------------------- RUNS
def test_a_short_run_learns_to_stand_longer(tmp_path):
    """And that its curve begins where an untrained policy's is."""
    args = Args(
        num_envs=16,
        num_steps=64,
        total_timesteps=12 * 1024,
        compile=False,
        eval_episodes=1,
        run_dir=str(tmp_path / "run"),
    )
    humanoid_ppo.train(args)
    episodes = pd.read_csv(tmp_path / "run/episodes.csv")
    metrics = pd.read_csv(tmp_path / "run/metrics.csv")
    untrained = episodes["length"][episodes["global_step"] <= 1024].mean()
    assert 15 < untrained < 30
    assert metrics[humanoid.LENGTH].iloc[-1] > 1.5 * untrained
    assert (metrics["losses/kl_after_update"] > 0).all()
    assert metrics["charts/learning_rate"].nunique() > 3


def train(folder: Path, **flags) -> None:
    humanoid_ppo.train(Args(**SMALL | {"run_dir": str(folder)} | flags))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Stopped in its fourth update, it goes on from the checkpoint after the second."""
    flags = {"total_timesteps": 6 * 64, "checkpoint_every": 2}
    train(tmp_path / "whole", **flags)
    update, calls = ppo.update, []

    def stopping(**given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(**given)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", **flags)
    assert humanoid_ppo.load_run(str(tmp_path / "stopped"))[1]["state"]["updates"] == 2
    humanoid_ppo.train(Args(resume=str(tmp_path / "stopped")))

    whole, resumed = (
        humanoid_ppo.load_run(str(tmp_path / name))[1] for name in ("whole", "stopped")
    )
    assert whole["state"] == resumed["state"] and whole["state"]["updates"] == 6
    for name, x in whole["agent"].items():
        assert torch.equal(x, resumed["agent"][name]), name
    for name, x in whole["optimizer"]["state"][0].items():
        assert torch.equal(x, resumed["optimizer"]["state"][0][name]), name
    lr = whole["optimizer"]["param_groups"][0]["lr"]
    assert lr == resumed["optimizer"]["param_groups"][0]["lr"] != 3e-4
    for name in ("metrics.csv", "episodes.csv"):
        tables = [pd.read_csv(tmp_path / run / name) for run in ("whole", "stopped")]
        same = [table.drop(columns="charts/SPS", errors="ignore") for table in tables]
        pd.testing.assert_frame_equal(*same, check_exact=True)


def test_every_random_stream_is_that_of_the_seed(tmp_path, monkeypatch):
    seeds = spy_on_restarts(monkeypatch, ppo)
    train(tmp_path / "run", seed=3, checkpoint_every=1, total_timesteps=192)
    expected = [ppo.stream(3, "environments", update) for update in range(3)]
    assert seeds == [*expected, 2**30 + ppo.stream(3, "evaluation")] and len(set(seeds)) == 4

    spaces = {"single_observation_space": gym.spaces.Box(-1, 1, (5,))}
    spaces["single_action_space"] = gym.spaces.Box(-0.4, 0.4, (2,))
    actors = SimpleNamespace(envs=SimpleNamespace(**spaces))
    _, parts = humanoid_ppo.begin(Args(seed=3), actors, None)
    checks.check_parts(ppo, parts, 3)
    ppo.seed_globals(ppo.stream(3, "weights"))
    fresh = Agent(5, [0.4, 0.4], 5.0, -0.92)
    for name, x in parts["agent"].state_dict().items():
        torch.testing.assert_close(x, fresh.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_what_is_compiled_is_the_gradient_of_this_file(tmp_path, monkeypatch):
    compiled = []

    def compile(function, **_):
        compiled.append(function)
        return function

    monkeypatch.setattr(ppo, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "run", compile=True, total_timesteps=64)
    assert compiled == [humanoid_ppo.gradient_and_policy]


def test_what_was_learned_before_a_simulator_failed_is_kept(tmp_path, monkeypatch):
    collect, calls = ppo.collect, []

    def fail(*given):
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionResetError("the host is gone")
        return collect(*given)

    monkeypatch.setattr(ppo, "collect", fail)
    with pytest.raises(RuntimeError, match="Humanoid-v4, update 3: ConnectionResetError"):
        train(tmp_path / "run", total_timesteps=64 * 4)
    assert humanoid_ppo.load_run(str(tmp_path / "run"))[1]["state"]["updates"] == 2


@pytest.mark.parametrize("source", ["rewards", "obs", "weights"])
def test_a_number_that_is_not_finite_stops_the_run(source, tmp_path, monkeypatch):
    collect = ppo.collect

    def spoil(*given):
        rollout, episodes = collect(*given)
        if source in rollout:
            rollout[source][10] = math.nan
        return rollout, episodes

    monkeypatch.setattr(ppo, "collect", spoil)
    if source == "weights":
        spoil_updates(monkeypatch, ppo, lambda agent: agent.critic.bias)
    with pytest.raises(ppo.NonFiniteError, match=f"{source} not finite in update 1"):
        train(tmp_path / "run", total_timesteps=64)
    assert not (tmp_path / "run/summary.json").exists()


def test_another_device_or_compiler_may_go_on(tmp_path, capsys):
    train(tmp_path / "run", total_timesteps=64)
    args = humanoid_ppo.parse_args(["--resume", str(tmp_path / "run"), "--compile"])
    assert args.compile and args.num_envs == 4
    agent, _ = humanoid_ppo.train(replace(args, compile=False))  # nothing is left to do
    loaded, trained = humanoid_ppo.load_agent(str(tmp_path / "run"))
    for name, x in agent.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[name]), name
    assert trained.device == "cpu"
    capsys.readouterr()
    humanoid_ppo.command(["--evaluate", str(tmp_path / "run"), "--eval-episodes", "2"])
    assert "in 2 episodes" in capsys.readouterr().out


def test_without_a_folder_one_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    humanoid_ppo.command(
        [*FLAGS.split(), "--total-timesteps", "64", "--no-adapt-lr", "--anneal-lr"]
    )
    (path,) = tmp_path.glob("runs/Humanoid-v4__benchmark-humanoid_ppo__1__*")
    assert json.loads((path / "config.json").read_text())["script"] == humanoid_ppo.SCRIPT
    assert float(read_csv(path / "metrics.csv")[0]["charts/learning_rate"]) == 3e-4


@pytest.mark.parametrize("anneal, second", [(False, 1e-4), (True, 5e-5)])
def test_a_run_does_what_its_flags_say(anneal, second, tmp_path, monkeypatch):
    rollouts, collect = [], ppo.collect

    def spy(*given):
        rollout, episodes = collect(*given)
        rollouts.append(rollout)
        return rollout, episodes

    monkeypatch.setattr(ppo, "collect", spy)
    flags = {"learning_rate": 1e-4, "adapt_lr": False, "anneal_lr": anneal, "num_steps": 64}
    train(tmp_path, total_timesteps=512, log_std=0.0, obs_clip=3.0, **flags)
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert metrics["charts/learning_rate"].tolist() == pytest.approx([1e-4, second])
    assert metrics["charts/action_std"].tolist() == pytest.approx([1, 1], abs=0.01)
    assert humanoid_ppo.load_agent(str(tmp_path))[0].obs_clip == 3
    speeds, valid = [], 0
    for rollout in rollouts:
        mine = []
        for t, i in rollout["valid"].nonzero().tolist():
            mine.append(rollout["obs"][t + 1, i, 22].item())
        speeds.append(np.mean(mine))
        valid += len(mine)
    assert metrics["charts/forward_speed"].tolist() == pytest.approx(speeds, rel=1e-4)
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert summary["transitions"] == valid < 512  # some steps only reset


def test_beside_resume_no_other_flag_may_change(tmp_path):
    train(tmp_path, total_timesteps=64)
    args, _ = humanoid_ppo.load_run(str(tmp_path))
    with pytest.raises(ppo.UserError, match="resume stands alone"):
        humanoid_ppo.train(replace(args, gamma=0.9))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ({"env_id": "Hopper-v4"}, "not for Hopper-v4"),
        ({"objective": "kl:1"}, "must be clip:EPS here"),
        ({"scale_rewards": True}, "--reward-scale"),
        ({"anneal_lr": True}, "only one can set the step size"),
        ({"desired_kl": 0.0}, "--desired-kl must be between"),
        ({"reward_scale": math.nan}, "--reward-scale must be between"),
        ({"num_envs": 3, "num_steps": 3}, "does not divide"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, complaint, tmp_path):
    with pytest.raises(ppo.UserError, match=complaint):
        train(tmp_path / "run", **flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    folder = tmp_path / "run"
    train(folder, total_timesteps=64)
    with pytest.raises(ppo.UserError, match="humanoid_ppo"):
        ppo.load_run(str(folder))
    text = (folder / "config.json").read_text()
    for old, new, complaint in (
        ('"gamma": 0.99', '"gamma": 0.9', "has changed since the checkpoint"),
        (humanoid_ppo.SCRIPT, "ppo_continuous", "is a run of ppo_continuous.py"),
        ('"gamma"', '"gramma"', "not a run folder that can be read"),
    ):
        (folder / "config.json").write_text(text.replace(old, new))
        with pytest.raises(ppo.UserError, match=complaint):
            humanoid_ppo.load_run(str(folder))
    (folder / "config.json").write_text(text)
    run_args, saved = humanoid_ppo.load_run(str(folder))
    saved["state"]["updates"] = 0
    who = {"seed": 1, "objective": "clip:0.2"}
    with pytest.raises(ppo.UserError, match="has gone on meanwhile"):
        humanoid_ppo.Run(run_args, {"env_id": "Humanoid-v4"}, who, saved)
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(ppo.UserError, match="no checkpoint yet"):
        humanoid_ppo.load_agent(str(folder))


# ------------------------------------------------------------------------------------ BOTH TABLES
@pytest.mark.parametrize("simulator", humanoid.SIMULATORS)
def test_play_plays_one_episode_of_each_environment(simulator):
    """In Gymnasium, the same as a plain loop over one environment."""
    torch.manual_seed(1)
    agent = Agent(obs_dim=376, bounds=[0.4] * 17, obs_clip=5.0, log_std=-0.92)
    envs = humanoid.make_envs(simulator, 3)
    played = humanoid.play(agent, envs, first_seed=5)
    envs.close()
    assert {len(cells) for cells in played.values()} == {3}
    assert all(10 < length < 200 for length in played["length"])
    for episode_return, length in zip(played["return"], played["length"], strict=True):
        assert 4 * length < episode_return < 6 * length
    if simulator == "envpool":
        return
    env = gym.make(humanoid.ENV_ID)
    obs, _ = env.reset(seed=6)
    rewards, speeds, ended = [], [], False
    while not ended:
        action = ppo.act(agent, obs).clip(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        speeds.append(info["x_velocity"])
        ended = terminated or truncated
    assert played["length"][1] == len(rewards)
    assert played["return"][1] == pytest.approx(sum(rewards), rel=1e-3)
    assert played["speed"][1] == pytest.approx(np.mean(speeds), abs=1e-2)


def test_both_simulators_are_played_on_the_seeds_of_the_evaluation(tmp_path, monkeypatch):
    played = []

    def make_envs(simulator, count):
        return SimpleNamespace(simulator=simulator, count=count, close=lambda: None)

    def play(agent, envs, first_seed):
        played.append((agent, envs.simulator, envs.count, first_seed))
        return {}

    monkeypatch.setattr(humanoid, "make_envs", make_envs)
    monkeypatch.setattr(humanoid, "play", play)
    monkeypatch.setattr(humanoid_ppo, "load_agent", lambda folder: ("agent", None))
    humanoid.play_both(humanoid.AGENT, tmp_path, 3)
    first = 2**30 + ppo.stream(3, "evaluation")
    assert played == [("agent", "gymnasium", 20, first), ("agent", "envpool", 20, first)]


class TwoEnds:
    """Two humanoids, of which one falls in its third step and one reaches a limit in its fifth.

    The reward is the largest action, the speed 10 and 20 metres per second.
    """

    single_action_space = gym.spaces.Box(-0.4, 0.4, (17,))

    def reset(self, seed):
        self.count = 0
        return np.zeros((2, 376)), {}

    def step(self, actions):
        self.count += 1
        ends = np.array([self.count == 3, False]), np.array([False, self.count == 5])
        speeds = {"x_velocity": np.array([10.0, 20.0])}
        return np.zeros((2, 376)), np.abs(actions).max(1).astype(float), *ends, speeds


def test_an_episode_is_played_to_a_fall_or_a_limit_within_the_bounds():
    agent = Agent(obs_dim=376, bounds=[0.4] * 17, obs_clip=5.0, log_std=-0.92)
    with torch.no_grad():
        agent.actor.bias.fill_(9)
    played = humanoid.play(agent, TwoEnds(), first_seed=0)
    assert played["length"] == [3, 5] and played["speed"] == [10, 20]
    assert played["return"] == pytest.approx([3 * 0.4, 5 * 0.4])


def test_the_speed_is_that_of_all_steps_played(monkeypatch):
    episodes = {"return": [1.0, 3.0], "length": [10.0, 30.0], "speed": [2.0, 1.0]}
    played = {"mujoco": "3", "gymnasium": episodes, "envpool": episodes}
    monkeypatch.setattr(humanoid, "play_both", lambda *where: played)
    facts = {"trainer": humanoid.AGENT, "seed": 1}
    measured = humanoid.measure(facts, pd.DataFrame({humanoid.LENGTH: [5.0, 6.0]}), Path())
    assert measured["gymnasium_speed"] == measured["envpool_speed"] == 50 / 40
    assert (measured["gymnasium_return"], measured["gymnasium_return_std"]) == (2, 1)
    assert (measured["envpool_length"], measured["last_100_length"]) == (20, 6)


def test_the_forward_speed_is_where_it_is_read():
    env = gym.make(humanoid.ENV_ID)
    env.reset(seed=1)
    for _ in range(5):
        obs, *_ = env.step(env.action_space.sample())
    assert obs[humanoid_ppo.FORWARD] == env.unwrapped.data.qvel[0] != 0


def test_contact_forces_are_what_only_one_simulator_has():
    """The reason for dropping inputs that never varied. The layout is that of Humanoid-v4."""
    found = {}
    for simulator in humanoid.SIMULATORS:
        envs = humanoid.make_envs(simulator, 4)
        envs.reset(seed=1)
        seen = [envs.step(np.zeros((4, 17)))[0] for _ in range(40)]
        envs.close()
        found[simulator] = bool(np.stack(seen)[..., 292:].any())
    assert found == {"gymnasium": True, "envpool": False}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Runs and results in folders of the test; runs in this process."""

    def in_this_process(calls, layout, tick):
        for call in calls:
            yield call, sweep.work(call, layout)

    monkeypatch.setattr(humanoid, "ROOT", tmp_path)
    monkeypatch.setattr(humanoid, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(humanoid, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(humanoid, "EPISODES", 2)
    monkeypatch.setattr(sweep, "choose_engine", lambda args, jobs: in_this_process)
    return tmp_path


def test_runs_and_report(here, monkeypatch):
    script = "--num-steps 64 --num-minibatches 2 --update-epochs 1 --no-compile --eval-episodes 1"
    settings = {
        "recipe": humanoid.SETTINGS["recipe"]._replace(flags=FLAGS, seeds=range(1, 3)),
        "defaults": humanoid.SETTINGS["defaults"]._replace(flags=script),
        "fixed-lr": humanoid.SETTINGS["fixed-lr"],
    }
    monkeypatch.setattr(humanoid, "SETTINGS", settings)
    steps = ["--total-timesteps", "512"]
    humanoid.main([*steps, "--ablation", "defaults"])
    assert [row["run"] for row in read_csv(here / "results/runs.csv")] == ["defaults"]
    humanoid.main(steps)
    rows = read_csv(here / "results/runs.csv")
    assert [(row["run"], row["seed"]) for row in rows] == [
        ("recipe", "1"),
        ("recipe", "2"),
        ("defaults", "1"),
    ]
    for row in rows:
        both = json.loads((here / f"runs/{row['run']}/{row['seed']}/both.json").read_text())
        for simulator in humanoid.SIMULATORS:
            played = both[simulator]
            assert len(played["return"]) == 2
            assert float(row[f"{simulator}_return"]) == np.mean(played["return"])
            assert float(row[f"{simulator}_return_std"]) == np.std(played["return"])
            assert float(row[f"{simulator}_length"]) == np.mean(played["length"])
            metres = np.dot(played["speed"], played["length"])
            expected = metres / np.sum(played["length"])
            assert float(row[f"{simulator}_speed"]) == pytest.approx(expected)
    points = sweep.read(here / "results/curves.csv")
    mine = points[(points["run"] == "recipe") & (points["seed"] == "1")]
    metrics = pd.read_csv(here / "runs/recipe/1/metrics.csv")
    for name, column in humanoid.LAYOUT.curves.items():
        told = pd.to_numeric(mine[name]).tolist()
        assert told == pytest.approx(metrics[column].tolist(), rel=1e-5, nan_ok=True), name
    speeds = points.groupby("run")["forward_speed"]
    assert speeds.apply(lambda cells: (cells != "").all()).to_dict() == {
        "defaults": False,
        "recipe": True,
    }
    assert (points["forward_speed"][points["run"] == "defaults"] == "").all()
    text = (here / "results/summary.md").read_text()
    assert "- `fixed-lr`, seed 1: `python benchmark/humanoid.py --ablation fixed-lr`" in text
    assert "`recipe`, seed" not in text
    monkeypatch.setattr(humanoid, "play", None)  # all is done, and nothing is played again
    humanoid.main(steps)
    humanoid.main([*steps, "--ablation", "defaults"])
    assert (here / "results/summary.md").read_text() == text
    (here / "runs/recipe/1/both.json").unlink()
    (here / "runs/recipe/1/checkpoint.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint yet"):
        humanoid.play_both(humanoid.AGENT, here / "runs/recipe/1", 1)


def test_the_speed_beside_the_simulators(here, monkeypatch):
    made = iter([100.0, 200.0, 10.0, 50.0, 400.0, 800.0])  # a ratio of 0.5, of 0.2, and of 0.5
    monkeypatch.setattr(humanoid, "time_recipe", lambda: next(made))
    monkeypatch.setattr(humanoid, "time_simulator", lambda: next(made))
    bound = []
    monkeypatch.setattr(humanoid.os, "sched_setaffinity", lambda *core: bound.append(core))
    write_tables(here / "results", {("recipe", 1): 6000.0})
    humanoid.main(["--speed"])
    assert bound == [(0, sweep.CORES[:1])]
    assert len(read_csv(here / "results/speed.csv")) == 3
    text = (here / "results/summary.md").read_text()
    assert ": 100 steps/s, 0.50 of the 200 of" in text


def test_both_speeds_are_measured(monkeypatch):
    args = humanoid_ppo.Args(num_envs=4, num_steps=16, compile=False)
    monkeypatch.setattr(humanoid.humanoid_ppo, "Args", lambda **more: replace(args, **more))
    monkeypatch.setattr(humanoid, "UPDATES", 2)
    monkeypatch.setattr(humanoid, "STEPS_ALONE", 4)
    assert humanoid.time_recipe() > 0 and humanoid.time_simulator() > 0
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(humanoid, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert humanoid.time_simulator() == 4 * 4 / 2.0  # four steps of four environments


def write_tables(folder: Path, done: dict[tuple[str, int], float]) -> None:
    """runs.csv and curves.csv in which the run of a name and seed has this return in Gymnasium."""
    rows, points = [], []
    for (name, seed), episode_return in done.items():
        row = dict.fromkeys(humanoid.LAYOUT.columns, "1")
        row |= {"run": name, "seed": seed, "gymnasium_return": episode_return}
        row |= {"total_timesteps": 10_002_432 - seed, "started": f"2026-01-0{seed}T03:04:05"}
        row |= {"gymnasium_speed": 1.23456 * seed, "envpool_return": 7000, "command": f"c {seed}"}
        rows.append(row)
        for step in (1, 2):
            point = {"run": name, "seed": seed, "global_step": step}
            cells = dict.fromkeys(humanoid.LAYOUT.curves, step * seed)
            points.append(point | cells)
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    pd.DataFrame(points).to_csv(folder / "curves.csv", index=False)


def test_the_report_of_what_is_there(here):
    with pytest.raises(FileNotFoundError):
        humanoid.main(["--report"])
    results = here / "results"
    write_tables(results, {("recipe", 1): 5000, ("recipe", 3): 6000, ("fixed-lr", 1): 400})
    humanoid.main(["--report"])
    text = (results / "summary.md").read_text()
    assert "| `recipe` | all of the recipe | 2 of 3 | 10 | 5,500 (5,000 to 6,000) |" in text
    assert "| 1 of 1 | 10 | 400 | 1.23 |" in text  # one seed has no interval
    assert "| `recipe` | 3 | 6,000 +- 1.0 | 3.70 |" in text
    assert "- `recipe`, seed 2: `python benchmark/humanoid.py`\n" in text
    assert "- `defaults`, seed 1: `python benchmark/humanoid.py --ablation defaults`\n" in text
    assert "fixed-lr`, seed" not in text and "film" not in text
    assert (results / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = {path.name: path.read_bytes() for path in results.iterdir()}
    humanoid.main(["--report"])
    assert {path.name: path.read_bytes() for path in results.iterdir()} == written

    every = {(name, seed): 1 for name, one in humanoid.SETTINGS.items() for seed in one.seeds}
    write_tables(results, every)
    humanoid.main(["--report"])
    assert "## Not run" not in (results / "summary.md").read_text()


def test_the_film_is_of_the_best_and_the_worst_seed(here, monkeypatch):
    from moviepy import ImageSequenceClip

    frames = [np.full((32, 32, 3), 20 * i, np.uint8) for i in range(10)]
    ImageSequenceClip(frames, fps=10).write_videofile(str(here / "film.mp4"), logger=None)

    def evaluate(agent, args, folder):
        assert args.capture_video and args.eval_episodes == 1
        (folder / "videos").mkdir(parents=True)
        shutil.copy(here / "film.mp4", folder / "videos/rl-video-episode-0.mp4")
        return [float(folder.name)]

    monkeypatch.setattr(ppo, "evaluate", evaluate)
    monkeypatch.setattr(ppo, "check_rendering", lambda args: None)
    monkeypatch.setattr(humanoid_ppo, "load_agent", lambda folder: (None, Args()))
    write_tables(here / "results", {("fixed-lr", 1): 1})
    with pytest.raises(UserError, match="nothing to film"):
        humanoid.main(["--film"])
    returns = {("recipe", 1): 5000, ("recipe", 2): 900, ("recipe", 3): 6000, ("fixed-lr", 1): 1}
    write_tables(here / "results", returns)
    humanoid.main(["--film"])
    films = read_csv(here / "results/films.csv")
    assert films == [
        {"film": "best", "seed": "3", "return": "3.0"},
        {"film": "worst", "seed": "2", "return": "2.0"},
    ]
    text = (here / "results/summary.md").read_text()
    assert "[The best seed, 3, in an episode of return 3.0](best.mp4)" in text
    write_tables(here / "results", returns | {("recipe", 3): 100})  # now seed 1 is the best
    humanoid.main(["--report"])
    text = (here / "results/summary.md").read_text()
    assert "best.mp4" not in text and "worst.mp4" not in text
    for name in ("best", "worst"):
        assert (here / f"results/{name}.mp4").read_bytes() == (here / "film.mp4").read_bytes()
        assert (here / f"results/{name}.png").read_bytes().startswith(b"\x89PNG")

    def no_screen(args):
        raise ppo.UserError("cannot render")

    monkeypatch.setattr(ppo, "check_rendering", no_screen)
    with pytest.raises(UserError, match="cannot render"):
        humanoid.main(["--film"])


def test_the_flags_of_all_runs_are_flags_of_their_trainers():
    planned = humanoid.calls(list(humanoid.SETTINGS), 1000)
    assert len({call.path for call in planned}) == len(planned) == 9
    for call in planned:
        (args,) = call.crowd
        assert args.total_timesteps == 1000 and args.env_id == "Humanoid-v4"
    assert [call.crowd[0].seed for call in planned[:3]] == [1, 2, 3]


def test_every_ablation_is_the_recipe_except_for_what_it_says():
    """`defaults` is of another script, with its defaults."""
    changes = {}
    for call in humanoid.calls(list(humanoid.SETTINGS), humanoid.STEPS):
        if call.trainer == humanoid.AGENT:
            own, recipe = vars(call.crowd[0]), vars(Args())
            ignored = ("seed", "run_dir", "checkpoint_every")
            names = [x for x in own if x not in ignored and own[x] != recipe[x]]
            changes[call.labels["run"]] = {name: own[name] for name in names}
    assert changes == {
        "recipe": {},
        "fixed-lr": {"adapt_lr": False},
        "raw-values": {"norm_values": False, "value_clip": None},
        "no-value-clip": {"value_clip": None},
        "sigma-1": {"log_std": 0.0},
        "8-actors": {"num_envs": 8},
    }
