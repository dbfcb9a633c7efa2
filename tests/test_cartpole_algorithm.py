"""The algorithm of ppo_cartpole.py: every equation against an independent computation, then learning."""

import math

import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_cartpole as ppo
from ppo_cartpole import Agent, Args, Objective, gae, parse_objective, ppo_loss

CLOCKS = {"policy": 0.0, "environment": 0.0}
ALL_OBJECTIVES = ("clip:0.2", "kl:1", "adaptive:0.01", "none", "pg")


# ------------------------------------------------------------------------------------------------------ advantages
def random_rollout(rng: np.random.Generator, steps: int, actors: int):
    """Rewards, values and ends as a next-step-autoreset environment would give them, and which rows are transitions."""
    rewards, values = rng.normal(size=(steps, actors)), rng.normal(size=(steps + 1, actors))
    terminated, truncated = rng.random((2, steps, actors)) < 0.2
    valid = np.ones((steps, actors), bool)
    for t in range(1, steps):
        valid[t] = ~(terminated[t - 1] | truncated[t - 1])
        rewards[t][~valid[t]] = 0
        terminated[t] &= valid[t]
        truncated[t] &= valid[t]
    return rewards, values, terminated, truncated, valid


def oracle(rewards, values, terminated, truncated, valid, gamma, lam):
    """The definition, row by row and with no recursion: sum over l of (gamma lambda)^l delta_{t+l}, to the end."""
    out = np.zeros_like(rewards)
    for t, i in np.argwhere(valid):
        discount = 1.0
        for k in range(t, len(rewards)):
            bootstrap = 0.0 if terminated[k, i] else values[k + 1, i]
            out[t, i] += discount * (rewards[k, i] + gamma * bootstrap - values[k, i])
            discount *= gamma * lam
            if terminated[k, i] or truncated[k, i]:
                break
    return out


def tensors(*arrays):
    return [torch.tensor(x, dtype=torch.float64 if x.dtype != bool else torch.bool) for x in arrays]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_definition_through_terminations_truncations_and_autoresets(seed, steps, actors, gamma, lam):
    *rollout, valid = random_rollout(np.random.default_rng(seed), steps, actors)
    got = gae(*tensors(*rollout), gamma, lam).numpy()
    np.testing.assert_allclose(got[valid], oracle(*rollout, valid, gamma, lam)[valid], atol=1e-5)


def test_lambda_one_is_equation_10():
    rng = np.random.default_rng(0)
    rewards, values, none = rng.normal(size=(9, 1)), rng.normal(size=(10, 1)), np.zeros((9, 1), bool)
    got = gae(*tensors(rewards, values, none, none), 0.9, 1.0)
    for t in range(9):
        to_come = sum(0.9 ** (k - t) * rewards[k, 0] for k in range(t, 9))
        assert got[t, 0].item() == pytest.approx(-values[t, 0] + to_come + 0.9 ** (9 - t) * values[9, 0])


def test_gae_is_the_discounted_sum_of_rewards_shaped_by_the_value_function():
    rng = np.random.default_rng(1)
    rewards, values, none = rng.normal(size=(7, 2)), rng.normal(size=(8, 2)), np.zeros((7, 2), bool)
    shaped = rewards + 0.97 * values[1:] - values[:-1]  # r + gamma phi(s') - phi(s) with phi = V
    expected = [sum((0.97 * 0.9) ** (k - t) * shaped[k] for k in range(t, 7)) for t in range(7)]
    np.testing.assert_allclose(gae(*tensors(rewards, values, none, none), 0.97, 0.9), expected, atol=1e-5)


def test_a_truncated_episode_is_bootstrapped_from_its_own_last_observation():
    """ProbeCounter truncates after 3 steps; with V(s) = 10 s everything about its rollout is known by hand."""
    actors = ppo.start_actors(Args(env_id="ProbeCounter-v0", num_envs=2), 0)
    agent = Agent(1, 2)
    agent.critic.forward = lambda obs: 10 * obs
    rollout, episodes = ppo.collect(agent, actors, 6, torch.Generator(), dict(CLOCKS))
    assert rollout["obs"][:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2]  # the final observation, 3, then the reset
    assert rollout["valid"][:, 0].tolist() == [True, True, True, False, True, True]
    assert rollout["truncated"][:, 0].tolist() == [False, False, True, False, False, False]
    assert not rollout["terminated"].any()
    assert rollout["rewards"][:, 0].tolist() == [1, 2, 3, 0, 1, 2]
    assert episodes == [(2 * 2 + i, 6.0, 3) for i in range(2)]
    got = gae(*(rollout[k] for k in ("rewards", "values", "terminated", "truncated")), 0.5, 0.5)[:, 0]
    deltas = [1 + 5 - 0, 2 + 10 - 10, 3 + 15 - 20]  # r + gamma 10 s' - 10 s; the last one looks at s' = 3, not at 0
    assert got[2].item() == deltas[2]
    assert got[0].item() == deltas[0] + 0.25 * deltas[1] + 0.0625 * deltas[2]
    assert got[4].item() == 6 + 0.25 * 2  # the second episode owes nothing to the first


# ------------------------------------------------------------------------------------------------------------ loss
def two_action_batch(ratio: float, advantage: float):
    """One transition whose taken action, 0, had probability 0.4 and now has 0.4 * ratio."""
    old, new = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.4, 0.4 * ratio))
    column = {"advantages": advantage, "values": 0.5, "returns": 2.0}
    batch = {name: torch.tensor([value], dtype=torch.float64) for name, value in column.items()}
    return new.requires_grad_(), batch | {"actions": torch.tensor([0]), "log_probs": old}


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_policy_loss_and_gradient_in_closed_form(objective, ratio, advantage):
    log_probs, batch = two_action_batch(ratio, advantage)
    loss, metrics = ppo_loss(log_probs, batch["values"], batch, parse_objective(objective), 3.0, Args(vf_coef=0))
    (grad,) = torch.autograd.grad(loss, log_probs)
    p, q = 0.4, 0.4 * ratio
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    outside = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)  # where eq. 7 is flat
    expected, slope, penalty = -ratio * advantage, -ratio * advantage, 0.0  # slope: d loss / d log pi(a|s)
    if objective == "clip:0.2" and outside:
        expected, slope = -(1.2 if advantage > 0 else 0.8) * advantage, 0.0
    if objective == "pg":
        expected, slope = -math.log(q) * advantage, -advantage
    if objective in ("kl:1", "adaptive:0.01"):
        expected, penalty = expected + 3.0 * kl, 3.0
    assert loss.item() == pytest.approx(expected)
    assert grad[0].tolist() == pytest.approx([slope - penalty * p, -penalty * (1 - p)])
    assert metrics["kl"].item() == pytest.approx(kl)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert metrics["old_approx_kl"].item() == pytest.approx(-math.log(ratio))
    assert metrics["clipfrac"].item() == (objective == "clip:0.2" and abs(ratio - 1) > 0.2)


@pytest.mark.parametrize(("value", "expected"), [(0.6, 1.4**2), (1.9, 1.3**2), (-0.5, 2.5**2), (3.9, 1.9**2)])
def test_value_clip_takes_the_larger_of_the_two_errors(value, expected):
    _, batch = two_action_batch(1.0, 1.0)  # old value 0.5, target 2, so the clipped value stays within [0.3, 0.7]
    log_probs, values = batch["log_probs"], torch.tensor([value], dtype=torch.float64)
    _, metrics = ppo_loss(log_probs, values, batch, Objective(), 0.0, Args(value_clip=0.2))
    assert metrics["value_loss"].item() == pytest.approx(expected)
    _, metrics = ppo_loss(log_probs, values, batch, Objective(), 0.0, Args())
    assert metrics["value_loss"].item() == pytest.approx((value - 2) ** 2)


def test_the_whole_of_equation_9():
    log_probs, batch = two_action_batch(1.0, 1.0)
    loss, _ = ppo_loss(log_probs, batch["values"], batch, Objective(), 0.0, Args(vf_coef=0.7, ent_coef=0.3))
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert loss.item() == pytest.approx(-1.0 + 0.7 * 1.5**2 - 0.3 * entropy)


def random_batch(rows: int, seed: int = 0):
    """A batch as the agent `of_batch` itself would have collected it."""
    torch.manual_seed(seed)
    agent, obs = Agent(4, 3), torch.randn(rows, 4)
    with torch.no_grad():
        log_probs, values = agent(obs)
    batch = {"obs": obs, "actions": torch.randint(3, (rows,)), "log_probs": log_probs, "values": values}
    return agent, batch | {"advantages": torch.randn(rows), "returns": values + torch.randn(rows)}


def test_pg_and_cpi_have_one_gradient_at_theta_old():
    agent, batch = random_batch(50)
    grads = []
    for text in ("pg", "none"):
        loss, _ = ppo_loss(*agent(batch["obs"]), batch, parse_objective(text), 0.0, Args(vf_coef=0))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.actor.parameters()))]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    assert grads[0].norm() > 0.01


def test_exact_kl_is_that_of_torch_distributions():
    old, new = torch.randn(2, 100, 5, dtype=torch.float64).log_softmax(-1)
    both = (torch.distributions.Categorical(logits=x) for x in (old, new))
    torch.testing.assert_close(ppo.categorical_kl(old, new), torch.distributions.kl_divergence(*both))


def test_the_adaptive_rule_has_three_branches_and_the_fixed_one_none():
    adaptive, fixed = parse_objective("adaptive:0.01"), parse_objective("kl:3")
    kls = (0.0151, 0.0149, 0.0067, 0.0066)  # 1.5 d_targ and d_targ / 1.5 from both sides
    assert [adaptive.adapt(4.0, kl) for kl in kls] == [8.0, 4.0, 4.0, 2.0]
    assert [fixed.adapt(3.0, kl) for kl in kls] == [3.0] * 4
    assert torch.tensor(adaptive.adapt(1e30, math.inf)).isfinite()  # doubled for ever, it would be inf in float32
    assert (adaptive.beta, fixed.beta) == (1.0, 3.0)


# ---------------------------------------------------------------------------------------------- rollout and update
def test_the_first_minibatch_has_ratio_one_and_rows_drop_out_exactly_at_resets():
    actors = ppo.start_actors(Args(num_envs=8), 0)
    agent = Agent(4, 2)
    rollout, episodes = ppo.collect(agent, actors, 200, torch.Generator().manual_seed(0), dict(CLOCKS))
    valid, ended = rollout["valid"], rollout["terminated"] | rollout["truncated"]
    assert torch.equal(valid[1:], ~ended[:-1])
    assert ended.sum() == len(episodes) > 20
    assert rollout["rewards"].sum() == valid.sum()  # CartPole pays 1 a step, and a reset is none
    assert sum(ret for _, ret, _ in episodes) == sum(length for *_, length in episodes)
    rows = torch.randperm(int(valid.sum()))[:64]
    log_probs, _ = agent(rollout["obs"][:-1][valid][rows])
    index = rollout["actions"][valid][rows].unsqueeze(-1)
    ratio = (log_probs.gather(-1, index) - rollout["log_probs"][valid][rows].gather(-1, index)).exp()
    assert (ratio - 1).abs().max() < 1e-5


def test_actions_are_samples_of_the_policy():
    actors, agent = ppo.start_actors(Args(env_id="ProbeCounter-v0", num_envs=50), 0), Agent(1, 2)
    agent.actor.forward = lambda obs: torch.tensor([0.2, 0.8]).log().expand(*obs.shape[:-1], 2)
    rollout, _ = ppo.collect(agent, actors, 400, torch.Generator().manual_seed(0), dict(CLOCKS))
    assert rollout["actions"].float().mean().item() == pytest.approx(0.8, abs=4 * (0.16 / 20_000) ** 0.5)


@pytest.mark.parametrize("norm_adv", ["minibatch", "none"])
def test_update_is_that_of_stable_baselines3(norm_adv, monkeypatch):
    """The same weights, rollout and minibatch order give the same parameters after 4 epochs of 4 minibatches."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    import gymnasium as gym

    agent, batch = random_batch(64)
    env = gym.make("CartPole-v1")
    env.unwrapped.action_space = env.action_space = gym.spaces.Discrete(3)
    args = Args(update_epochs=4, num_minibatches=4, ent_coef=0.02, vf_coef=0.4, learning_rate=3e-3, norm_adv=norm_adv)
    same = {"ent_coef": 0.02, "vf_coef": 0.4, "learning_rate": 3e-3, "max_grad_norm": 0.5, "clip_range": 0.2}
    sizes = {"n_steps": 64, "batch_size": 16, "n_epochs": 4, "normalize_advantage": norm_adv == "minibatch"}
    peer = stable_baselines3.PPO("MlpPolicy", env, device="cpu", **same, **sizes)
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    net = peer.policy.mlp_extractor
    theirs = [*net.policy_net.parameters(), *peer.policy.action_net.parameters()]
    theirs += [*net.value_net.parameters(), *peer.policy.value_net.parameters()]
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    buffer, taken = peer.rollout_buffer, batch["log_probs"].gather(-1, batch["actions"].unsqueeze(-1))
    stored = {name: batch[name] for name in ("values", "returns", "advantages", "actions")}
    for name, x in (stored | {"observations": batch["obs"], "log_probs": taken}).items():
        getattr(buffer, name)[:] = x.numpy().reshape(getattr(buffer, name).shape)
    buffer.full, peer._logger = True, stable_baselines3.common.logger.Logger(None, [])
    rng = torch.Generator().manual_seed(5)
    orders = iter([torch.randperm(64, generator=rng).numpy() for _ in range(4)])
    monkeypatch.setattr(np.random, "permutation", lambda n: next(orders))
    peer.train()

    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5, fused=True)
    before = torch.cat([p.detach().flatten().clone() for p in ours])
    metrics = ppo.update(agent, optimizer, batch, Objective(epsilon=0.2), 0.0, args, torch.Generator().manual_seed(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (torch.cat([p.detach().flatten() for p in ours]) - before).abs().max() > 1e-3
    said = peer.logger.name_to_value
    assert metrics["policy_loss"] == pytest.approx(said["train/policy_gradient_loss"], rel=1e-4)
    assert metrics["value_loss"] == pytest.approx(said["train/value_loss"], rel=1e-4)
    assert metrics["entropy"] == pytest.approx(-said["train/entropy_loss"], rel=1e-4)
    assert metrics["clipfrac"] == pytest.approx(said["train/clip_fraction"], rel=1e-4)


def updated(batch, agent, seed=0, **flags):
    """Weights after one update of a copy of the agent, and its metrics."""
    copy = Agent(4, 3)
    copy.load_state_dict(agent.state_dict())
    objective = parse_objective(flags.pop("objective", "clip:0.2"))
    optimizer = torch.optim.Adam(copy.parameters(), lr=1e-2, eps=1e-5, fused=True)
    rng = torch.Generator().manual_seed(seed)
    metrics = ppo.update(copy, optimizer, batch, objective, objective.beta, Args(num_minibatches=4, **flags), rng)
    return torch.nn.utils.parameters_to_vector(copy.parameters()).detach(), metrics


def test_target_kl_ends_the_update_after_the_epoch_that_exceeds_it():
    agent, batch = random_batch(64)
    stopped, _ = updated(batch, agent, update_epochs=9, target_kl=1e-9)
    one_epoch, _ = updated(batch, agent, update_epochs=1)
    all_epochs, _ = updated(batch, agent, update_epochs=9, target_kl=1e9)
    assert torch.equal(stopped, one_epoch) and not torch.equal(stopped, all_epochs)


def test_advantages_are_standardised_where_norm_adv_says():
    agent, batch = random_batch(64)
    scaled = batch | {"advantages": 7 + 3 * batch["advantages"]}
    for norm_adv, same in (("batch", True), ("minibatch", True), ("none", False)):
        pair = [updated(x, agent, norm_adv=norm_adv, vf_coef=0.0, update_epochs=1)[0] for x in (batch, scaled)]
        assert torch.allclose(*pair, atol=1e-4) is same, norm_adv
    batch_mode, minibatch_mode = (updated(batch, agent, norm_adv=mode)[0] for mode in ("batch", "minibatch"))
    assert not torch.allclose(batch_mode, minibatch_mode, atol=1e-4)


def test_entropy_bonus_gradient_clip_and_kl_penalty_each_do_what_their_name_says():
    agent, batch = random_batch(256)
    _, plain = updated(batch, agent)
    _, bonus = updated(batch, agent, ent_coef=1.0)
    _, tied = updated(batch, agent, objective="kl:1000")
    _, free = updated(batch, agent, objective="none")
    assert bonus["entropy"] > plain["entropy"]
    assert tied["kl_after_update"] < 0.1 * free["kl_after_update"]
    torch.manual_seed(0)
    parameters = list(agent.parameters())
    ppo.gradient(agent, parameters, batch, Objective(), torch.tensor(0.0), Args(max_grad_norm=1e-3))
    assert torch.cat([p.grad.flatten() for p in parameters]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_compiled_gradient_is_the_eager_one():
    agent, batch = random_batch(64)
    parameters = list(agent.parameters())
    compiled = ppo.compiled(ppo.gradient)
    for rows, objective in ((64, Objective(epsilon=0.2)), (61, Objective(epsilon=0.2)), (61, Objective(beta=2.0))):
        part = {name: x[:rows] for name, x in batch.items()}
        results = []
        for function in (ppo.gradient, compiled):
            metrics = function(agent, parameters, part, objective, torch.tensor(2.0), Args())
            results.append((torch.cat([p.grad.flatten() for p in parameters]), metrics))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- learning
def trained(tmp_path, **flags):
    defaults = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "eval_episodes": 5, "learning_rate": 1e-2}
    agent, _ = ppo.train(Args(**defaults | {"run_dir": str(tmp_path / "run"), "gamma": 0.5} | flags))
    return lambda obs: agent(torch.tensor([[obs]]))


def test_probe_constant_reward_the_value_goes_to_it(tmp_path):
    run = trained(tmp_path, env_id="ProbeConstant-v0", total_timesteps=8_000)
    assert run(0.0)[1].item() == pytest.approx(1.0, abs=0.05)


def test_probe_reward_by_observation_the_value_tells_them_apart(tmp_path):
    run = trained(tmp_path, env_id="ProbeSees-v0", total_timesteps=8_000)
    assert [run(sign)[1].item() for sign in (-1.0, 1.0)] == pytest.approx([-1.0, 1.0], abs=0.05)


def test_probe_delayed_reward_is_discounted(tmp_path):
    run = trained(tmp_path, env_id="ProbeDelayed-v0", total_timesteps=8_000)
    assert [run(phase)[1].item() for phase in (0.0, 0.5)] == pytest.approx([0.5, 1.0], abs=0.05)


def test_probe_reward_by_action_the_policy_takes_it(tmp_path):
    run = trained(tmp_path, env_id="ProbeActs-v0", total_timesteps=8_000)
    assert run(0.0)[0].exp()[0, 1].item() > 0.95


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_probe_reward_by_observation_and_action_needs_all_of_it(tmp_path, objective):
    flags = {"env_id": "ProbeSeesAndActs-v0", "total_timesteps": 16_000, "objective": objective}
    run = trained(tmp_path, **flags | ({"update_epochs": 1} if objective == "pg" else {}))
    assert run(-1.0)[0].exp()[0, 0].item() > 0.9
    assert run(1.0)[0].exp()[0, 1].item() > 0.9
    assert run(1.0)[1].item() > 0.7


@pytest.mark.parametrize("flags", [{}, {"objective": "adaptive:0.01"}])
def test_the_default_run_solves_cartpole(tmp_path, flags):
    _, (summary,) = ppo.train(Args(run_dir=str(tmp_path / "run"), seed=7, **flags))
    assert summary["eval_return_mean"] == 500.0 and summary["eval_episodes"] == 20
    assert summary["last_100_return"] >= 475
