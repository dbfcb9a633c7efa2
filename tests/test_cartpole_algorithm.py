"""The algorithm of ppo_cartpole.py: each equation computed in another way, then learning.

A function named check_* takes the script that it checks. tests/test_mutations.py gives it the other
scripts and broken copies.
"""

import csv
import gc
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the probe environments)
import pytest
import torch
from conftest import spy_on_restarts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

import ppo_cartpole as ppo
from ppo_cartpole import Actors, Agent, Args, Objective, act, parse_objective

OBJECTIVES = ("clip:0.2", "kl:1", "adaptive:0.01", "none", "pg")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------ advantages
def random_rollout(rng: np.random.Generator, steps: int, actors: int):
    """What an environment with next-step autoreset would give, and which rows are transitions."""
    rewards = rng.normal(size=(steps, actors))
    values = rng.normal(size=(steps + 1, actors))
    terminated, truncated = rng.random((2, steps, actors)) < 0.2
    valid = np.ones((steps, actors), bool)
    for t in range(1, steps):
        valid[t] = ~(terminated[t - 1] | truncated[t - 1])
        rewards[t][~valid[t]] = 0
        terminated[t] &= valid[t]
        truncated[t] &= valid[t]
    return rewards, values, terminated, truncated, valid


def gae_by_definition(rewards, values, terminated, truncated, valid, gamma, lam):
    """Row by row, with no recursion: the sum over l of (gamma lambda)^l delta_{t+l}, to the end."""
    advantages = np.zeros_like(rewards)
    for t, i in np.argwhere(valid):
        discount = 1.0
        for k in range(t, len(rewards)):
            bootstrap = 0.0 if terminated[k, i] else values[k + 1, i]
            delta = rewards[k, i] + gamma * bootstrap - values[k, i]
            advantages[t, i] += discount * delta
            discount *= gamma * lam
            if terminated[k, i] or truncated[k, i]:
                break
    return advantages


def check_gae(script, seed, steps, actors, gamma, lam) -> None:
    *rollout, valid = random_rollout(np.random.default_rng(seed), steps, actors)
    got = script.gae(*map(torch.from_numpy, rollout), gamma, lam).numpy()
    expected = gae_by_definition(*rollout, valid, gamma, lam)
    # gamma lambda is rounded to float32: l 2^-24 |delta| in the l-th of 12 terms, |delta| < 12
    np.testing.assert_allclose(got[valid], expected[valid], rtol=0, atol=5e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1)
)
def test_gae_is_its_definition_through_terminations_truncations_and_autoresets(
    seed, steps, actors, gamma, lam
):
    check_gae(ppo, seed, steps, actors, gamma, lam)


def endless(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """gae() where no episode ends."""
    never = torch.zeros(rewards.shape, dtype=torch.bool)
    rewards, values = torch.from_numpy(rewards), torch.from_numpy(values)
    return ppo.gae(rewards, values, never, never, gamma, lam).numpy()


def test_lambda_one_is_equation_10():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(9, 1)), rng.normal(size=(10, 1))
    got = endless(rewards, values, 0.9, 1.0)
    for t in range(9):
        to_come = sum(0.9 ** (k - t) * rewards[k] for k in range(t, 9))
        assert got[t] == pytest.approx(-values[t] + to_come + 0.9 ** (9 - t) * values[9])


def test_gae_is_the_discounted_sum_of_rewards_shaped_by_the_value_function():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(7, 2)), rng.normal(size=(8, 2))
    shaped = rewards + 0.97 * values[1:] - values[:-1]  # r + gamma phi(s') - phi(s) with phi = V
    expected = [sum((0.97 * 0.9) ** (k - t) * shaped[k] for k in range(t, 7)) for t in range(7)]
    np.testing.assert_allclose(endless(rewards, values, 0.97, 0.9), expected, atol=1e-5)


def watch_batches(patch: pytest.MonkeyPatch, script) -> tuple[list, list]:
    """What collect() gives from now on, and what update() gets, which learns nothing."""
    rollouts, batches, real = [], [], script.collect

    def collect(*given):
        rollouts.append(real(*given))
        return rollouts[-1]

    def update(batch, **rest):
        batches.append(batch)
        return {"kl_after_update": 0.0}

    patch.setattr(script, "collect", collect)
    patch.setattr(script, "update", update)
    return rollouts, batches


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_time_limit_is_bootstrapped_from_its_own_last_observation_or_cut(
    bootstrap, tmp_path, monkeypatch
):
    """ProbeCounter stops after 3 steps; with V(s) = 10 s all of its batch is known by hand."""
    monkeypatch.setattr(Agent, "value", lambda agent, obs: 10 * obs[..., 0])
    rollouts, batches = watch_batches(monkeypatch, ppo)
    words = "--env-id ProbeCounter-v0 --num-envs 2 --num-steps 6 --num-minibatches 1 --gamma 0.5"
    words += f" --total-timesteps 12 --gae-lambda 0.25 --eval-episodes 1 --run-dir {tmp_path}/run"
    words += "" if bootstrap else " --no-bootstrap-truncated"
    ppo.train(ppo.parse_args(words.split()))
    ((rollout, episodes),) = rollouts
    assert rollout["obs"][:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2]  # 3 is final, then the reset
    assert rollout["truncated"][:, 0].tolist() == [False, False, True, False, False, False]
    assert not rollout["terminated"].any()
    assert rollout["rewards"][:, 0].tolist() == [1, 2, 3, 0, 1, 2]
    assert episodes == [(2 * 2 + i, 6.0, 3) for i in range(2)]

    batch = {name: x.unflatten(0, (6, 2))[:, 0] for name, x in batches[0].items()}
    assert batch["valid"].tolist() == [True, True, True, False, True, True]
    assert batch["values"].tolist() == [0, 10, 20, 30, 0, 10]
    last = 3 + 15 - 20 if bootstrap else 3 - 20  # V of the final observation, which is 3, not 0
    deltas = [1 + 5 - 0, 2 + 10 - 10, last]  # r + gamma 10 s' - 10 s
    assert batch["advantages"][2].item() == deltas[2]
    assert batch["advantages"][0].item() == deltas[0] + deltas[1] / 8 + deltas[2] / 64
    assert batch["advantages"][4].item() == 6 + 2 / 8  # this episode owes the first one nothing
    assert torch.equal(batch["returns"], batch["advantages"] + batch["values"])


# ------------------------------------------------------------------------------------------ loss
RATIOS = (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0)  # times 0.4 a probability
FAR = 100.0  # of no probability: pi_old would be below 0.01
ADVANTAGES = (2.0, -2.0)


def policy_loss_by_hand(objective, ratio, advantage, log_prob, kl, beta) -> tuple:
    """The policy's part of the loss, and its derivatives by log_prob and by kl."""
    flat = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    if objective == "clip:0.2" and flat:
        return -(1.2 if advantage > 0 else 0.8) * advantage, 0.0, 0.0
    if objective == "pg":
        return -log_prob * advantage, -advantage, 0.0
    if objective in ("kl:1", "adaptive:0.01"):
        return -ratio * advantage + beta * kl, -ratio * advantage, beta
    return -ratio * advantage, -ratio * advantage, 0.0


def check_loss(script, objective: str, ratio: float, advantage: float) -> None:
    """Eq. 9 of one transition with pi_old(a|s) = 0.4: its value, and its slope in every input."""
    numbers = {"log_prob": math.log(0.4 * ratio), "entropy": 0.6, "kl": 0.3, "values": 0.9}
    leaves = {}
    for name, x in numbers.items():
        leaves[name] = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    recorded = {"log_prob": math.log(0.4), "values": 0.5, "advantages": advantage, "returns": 2.0}
    batch = {name: torch.tensor([x], dtype=torch.float64) for name, x in recorded.items()}
    args = script.Args(vf_coef=0.7, ent_coef=0.3)
    terms = script.ppo_loss(
        **leaves, batch=batch, objective=script.parse_objective(objective), beta=3.0, args=args
    )
    means = {name: term.mean() for name, term in terms.items()}
    loss = script.total_loss(means, args)
    loss.backward()
    policy_loss, slope, penalty = policy_loss_by_hand(
        objective, ratio, advantage, numbers["log_prob"], numbers["kl"], beta=3.0
    )
    slopes = {name: 0.0 if x.grad is None else x.grad.item() for name, x in leaves.items()}
    expected = {"log_prob": slope, "entropy": -0.3, "kl": penalty, "values": 0.7 * 2 * (0.9 - 2)}
    assert loss.item() == pytest.approx(policy_loss + 0.7 * (0.9 - 2) ** 2 - 0.3 * 0.6)
    assert slopes == pytest.approx(expected)
    metrics = {name: mean.item() for name, mean in means.items()}
    assert metrics == pytest.approx(
        {
            "policy_loss": policy_loss,
            "value_loss": (0.9 - 2) ** 2,
            "entropy": 0.6,
            "kl": 0.3,
            "approx_kl": ratio - 1 - math.log(ratio),
            "old_approx_kl": -math.log(ratio),
            "clipfrac": float(objective == "clip:0.2" and abs(ratio - 1) > 0.2),
        }
    )
    without = script.total_loss(means, script.Args(vf_coef=0.0, ent_coef=0.0))
    assert without.item() == pytest.approx(policy_loss)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_in_closed_form(objective, ratio, advantage):
    check_loss(ppo, objective, ratio, advantage)

    # the same through the policy: action 0, of two, had probability 0.4 and has 0.4 * ratio now
    p, q = 0.4, 0.4 * ratio
    old, new = (torch.tensor([[x, 1 - x]], dtype=torch.float64).log() for x in (p, q))
    new.requires_grad_()
    agent = SimpleNamespace(policy=lambda obs: new, value=lambda obs: torch.zeros(1))
    recorded = {"obs": 0.0, "values": 0.0, "returns": 0.0, "advantages": advantage}
    batch = {name: torch.tensor([x], dtype=torch.float64) for name, x in recorded.items()}
    batch |= {"actions": torch.tensor([0]), "log_probs": old, "log_prob": old[:, 0]}
    terms = ppo.loss_terms(agent, batch, parse_objective(objective), 3.0, Args())
    (grad,) = torch.autograd.grad(terms["policy_loss"].mean(), new)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    loss, slope, penalty = policy_loss_by_hand(
        objective, ratio, advantage, math.log(q), kl, beta=3.0
    )
    assert terms["policy_loss"].item() == pytest.approx(loss)
    assert grad[0].tolist() == pytest.approx([slope - penalty * p, -penalty * (1 - p)])
    assert terms["kl"].item() == pytest.approx(kl)
    assert terms["entropy"].item() == pytest.approx(-q * math.log(q) - (1 - q) * math.log(1 - q))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_large_ratio_keeps_its_gradient(objective, advantage):
    check_loss(ppo, objective, FAR, advantage)


def check_value_loss(script) -> None:
    """Old value 0.5, target 2: --value-clip 0.2 takes the larger of two errors."""
    for value, clipped in ((0.6, 1.4**2), (1.9, 1.3**2), (-0.5, 2.5**2), (3.9, 1.9**2)):
        one = torch.ones(1, dtype=torch.float64)
        batch = {"log_prob": one, "advantages": one, "values": 0.5 * one, "returns": 2 * one}
        for value_clip, expected in ((0.2, clipped), (None, (value - 2) ** 2)):
            terms = script.ppo_loss(
                log_prob=one,
                entropy=one,
                kl=one,
                values=value * one,
                batch=batch,
                objective=script.Objective("none"),
                beta=0.0,
                args=script.Args(value_clip=value_clip),
            )
            assert terms["value_loss"].item() == pytest.approx(expected)


def test_value_clip_takes_the_larger_of_the_two_errors():
    check_value_loss(ppo)


def check_flat_side(script, logratio: float, advantage: float) -> None:
    """Ratios that float32 does not hold, or only just: no NaN, and no gradient where eq. 7 is flat.

    The one transition has these numbers, in float32.
    """
    for objective in OBJECTIVES:
        names = ("log_prob", "entropy", "kl", "values")
        leaves = {name: torch.zeros(1, requires_grad=True) for name in names}
        batch = {"log_prob": -logratio, "values": 0.0, "advantages": advantage, "returns": 0.0}
        batch = {name: torch.tensor([x]) for name, x in batch.items()}
        args = script.Args()
        terms = script.ppo_loss(
            **leaves, batch=batch, objective=script.parse_objective(objective), beta=1.0, args=args
        )
        script.total_loss({name: term.mean() for name, term in terms.items()}, args).backward()
        for name, term in terms.items():
            assert term.isfinite().all(), (objective, name)
        assert leaves["log_prob"].grad.isfinite().all(), objective
        if objective == "clip:0.2" and logratio * advantage > 0:
            edge = 1.2 if logratio > 0 else 0.8
            assert leaves["log_prob"].grad.item() == 0.0
            assert terms["policy_loss"].item() == pytest.approx(-edge * advantage)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("logratio", [89.0, 200.0, 1e4, -89.0, -200.0, -1e4])
def test_a_ratio_that_float32_does_not_hold_makes_no_nan(logratio, advantage):
    check_flat_side(ppo, logratio, advantage)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_action_whose_logit_is_minus_infinity_is_never_played_and_makes_no_nan(objective):
    def mask(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([0]), -math.inf)

    torch.manual_seed(0)
    agent, old = Agent(4, 3), Agent(4, 3)
    for one in (agent, old):
        one.actor.register_forward_hook(mask)
        torch.nn.init.normal_(one.actor[-1].bias)
    obs = torch.randn(500, 4)
    actions = act(old, obs.numpy(), ppo.draw_noise((500, 3), seeded(0)))
    assert set(actions) == {1, 2} >= set(act(old, obs.numpy()))
    with torch.no_grad():
        log_probs = old.policy(obs)
    batch = {"obs": obs, "actions": torch.from_numpy(actions), "log_probs": log_probs}
    batch |= {name: torch.randn(500) for name in ("values", "advantages", "returns")}
    batch |= {"log_prob": ppo.log_prob_of(log_probs, batch["actions"])}
    terms = ppo.loss_terms(agent, batch, parse_objective(objective), 2.0, Args())
    new = Categorical(logits=agent.policy(obs)[:, 1:])  # of the actions that are left
    torch.testing.assert_close(terms["entropy"], new.entropy())
    torch.testing.assert_close(
        terms["kl"], kl_divergence(Categorical(logits=log_probs[:, 1:]), new)
    )
    args = Args(ent_coef=0.1)
    grad, metrics = ppo.gradient(agent, batch, parse_objective(objective), 2.0, args)
    assert all(metric.isfinite() for metric in metrics.values()), metrics
    assert grad.isfinite().all() and metrics["grad_norm"] > 0
    torch.nn.utils.vector_to_parameters(grad, agent.parameters())
    assert agent.actor[-1].bias[0] == 0  # the gradient of the action that is masked


def random_batch(script, rows: int, resets: float = 0.0) -> tuple:
    """An agent, and a batch as that agent would have collected it; this share of it are resets."""
    rng = seeded(0)
    torch.manual_seed(0)
    gaussian = hasattr(script, "RunningStats")
    agent = script.Agent(4, 3, obs_clip=10.0, log_std=0.0) if gaussian else script.Agent(4, 3)
    batch = {"obs": torch.randn(rows, 4, generator=rng)}
    with torch.no_grad():
        values = agent.value(batch["obs"])
        if gaussian:
            mean, log_std = agent.policy(batch["obs"])
            actions = mean + log_std.exp() * torch.randn(rows, 3, generator=rng)
            log_prob = script.log_prob_of(mean, log_std, actions)
            batch |= {"mean": mean, "log_std": log_std}
        else:
            log_probs = agent.policy(batch["obs"])
            actions = torch.randint(3, (rows,), generator=rng)
            log_prob = script.log_prob_of(log_probs, actions)
            batch |= {"log_probs": log_probs}
    batch |= {"actions": actions, "log_prob": log_prob, "values": values}
    batch["advantages"] = torch.randn(rows, generator=rng)
    batch["returns"] = values + torch.randn(rows, generator=rng)
    batch["valid"] = torch.rand(rows, generator=rng) >= resets
    return agent, batch


def test_pg_and_cpi_have_one_gradient_at_theta_old():
    agent, batch = random_batch(ppo, 50)
    grads = []
    for text in ("pg", "none"):
        terms = ppo.loss_terms(agent, batch, parse_objective(text), 0.0, Args())
        grad = torch.autograd.grad(terms["policy_loss"].mean(), list(agent.actor.parameters()))
        grads.append(torch.cat([g.flatten() for g in grad]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    assert grads[0].norm() > 0.01


def test_log_prob_entropy_and_kl_are_those_of_torch_distributions():
    old, new = torch.randn(2, 100, 5, dtype=torch.float64).log_softmax(-1)
    actions = torch.randint(5, (100,))
    peer, old_peer = Categorical(logits=new), Categorical(logits=old)
    torch.testing.assert_close(ppo.log_prob_of(new, actions), peer.log_prob(actions))
    torch.testing.assert_close(ppo.entropy_of(new), peer.entropy())
    torch.testing.assert_close(ppo.kl_between(old, new), kl_divergence(old_peer, peer))


def check_adapt_beta(script) -> None:
    adaptive, fixed = (script.parse_objective(text) for text in ("adaptive:0.01", "kl:3"))
    assert (adaptive.beta, fixed.beta) == (1.0, 3.0)
    kls = (0.0151, 0.0149, 0.0067, 0.0066)  # 1.5 d_targ and d_targ / 1.5 from both sides
    assert [script.adapt_beta(4.0, kl, adaptive) for kl in kls] == [8.0, 4.0, 4.0, 2.0]
    # doubled or halved for ever, it would be inf or 0 in float32
    assert torch.tensor(script.adapt_beta(1e30, math.inf, adaptive)).isfinite()
    assert torch.tensor(script.adapt_beta(1e-30, 0.0, adaptive)) > 0


def test_the_adaptive_rule_has_three_branches():
    check_adapt_beta(ppo)


# ---------------------------------------------------------------------------- rollout and update
def played(agent: Agent, num_steps: int, num_actors: int, **flags) -> tuple:
    """A rollout of this agent, on seed 0, and its episodes."""
    actors = Actors(Args(**flags), num_actors)
    actors.restart(0)
    num_actions = actors.envs.single_action_space.n
    noise = ppo.draw_noise((num_steps, num_actors, num_actions), seeded(0))
    return ppo.collect(partial(act, agent), actors, noise)


def test_rows_drop_out_exactly_at_resets():
    rollout, episodes = played(Agent(4, 2), 200, 8)
    valid, ended = rollout["valid"], rollout["terminated"] | rollout["truncated"]
    assert torch.equal(valid[1:], ~ended[:-1])
    assert ended.sum() == len(episodes) > 20
    assert [divmod(row, 8) for row, *_ in episodes] == [tuple(x) for x in ended.nonzero().tolist()]
    assert rollout["rewards"].sum() == valid.sum()  # CartPole pays 1 a step, and a reset is none
    assert sum(ret for _, ret, _ in episodes) == sum(length for *_, length in episodes)


def test_actions_are_samples_of_the_policy():
    agent = Agent(1, 2)
    odds = torch.tensor([0.2, 0.8]).log()
    agent.actor.forward = lambda obs: odds.expand(*obs.shape[:-1], 2)
    rollout, _ = played(agent, 400, 50, env_id="ProbeCounter-v0")
    deviation = (0.2 * 0.8 / 20_000) ** 0.5
    assert rollout["actions"].float().mean().item() == pytest.approx(0.8, abs=4 * deviation)


def test_each_of_three_actions_has_the_probability_of_the_policy():
    agent, odds = Agent(1, 3), [0.05, 0.15, 0.8]
    agent.actor.forward = lambda obs: torch.tensor(odds).log().expand(*obs.shape[:-1], 3)
    obs = np.zeros((20_000, 1), np.float32)
    actions = act(agent, obs, ppo.draw_noise((20_000, 3), seeded(0)))
    for action, p in enumerate(odds):
        deviation = (p * (1 - p) / 20_000) ** 0.5
        assert (actions == action).mean() == pytest.approx(p, abs=4 * deviation)


def updated(script, batch, agent, beta=None, **flags) -> tuple[dict, dict]:
    """Weights after one update of a copy of the agent, and its metrics."""
    copy, _ = random_batch(script, 2)
    copy.load_state_dict(agent.state_dict())
    objective = script.parse_objective(flags.pop("objective", "clip:0.2"))
    metrics = script.update(
        agent=copy,
        optimizer=torch.optim.Adam([script.one_vector(copy)], lr=1e-2, eps=1e-5),
        batch=batch,
        objective=objective,
        beta=objective.beta if beta is None else beta,
        args=script.Args(**{"num_minibatches": 4, "update_epochs": 4} | flags),
        rng=seeded(0),
    )
    return copy.state_dict(), metrics


def same(one: dict, other: dict) -> bool:
    """Whether two agents have the same weights, to the bit."""
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def check_minibatches(script) -> None:
    """Parts of a permutation of all rows, reset rows struck out; all epochs are drawn at first."""
    agent, batch = random_batch(script, 64, resets=0.3)
    batch["advantages"] = torch.arange(64.0)  # the number of each row
    # the KL of each epoch, and how many there are: --target-kl ends an update, not its drawing. In
    # the last case the mean of all epochs so far is 0.4, below 0.5
    for kls, epochs in (((0.0, 0.0, 0.0), 3), ((1.0, 0.0, 0.0), 1), ((0.0, 0.8, 0.0), 2)):
        parts = []

        def gradient(agent, minibatch, *rest, parts=parts, kls=kls):
            parts.append(minibatch["advantages"].int().tolist())
            return None, {"approx_kl": torch.tensor(kls[(len(parts) - 1) // 4])}

        rng, expected_rng, expected = seeded(5), seeded(5), []
        orders = [torch.randperm(64, generator=expected_rng) for _ in range(3)]
        script.update(
            agent=agent,
            optimizer=torch.optim.Adam([script.one_vector(agent)]),
            batch=batch,
            objective=script.parse_objective("clip:0.2"),
            beta=0.0,
            args=script.Args(update_epochs=3, num_minibatches=4, norm_adv="none", target_kl=0.5),
            rng=rng,
            gradient_fn=gradient,
        )
        for order in orders[:epochs]:
            for part in order.split(16):
                expected.append([row for row in part.tolist() if batch["valid"][row]])
        assert parts == expected
        assert torch.equal(rng.get_state(), expected_rng.get_state())
        for i in range(epochs):  # each transition once, no reset
            epoch = [row for part in parts[4 * i : 4 * i + 4] for row in part]
            assert sorted(epoch) == batch["valid"].nonzero().flatten().tolist()


def check_resets(script) -> None:
    """Whatever stands in the rows of resets, the update and its metrics are the same."""
    agent, batch = random_batch(script, 64, resets=0.3)
    spoiled = {name: x.clone() for name, x in batch.items()}
    for name in ("advantages", "returns", "values", "log_prob"):
        spoiled[name][~batch["valid"]] = 7.0
    for norm_adv in ("batch", "minibatch", "none"):
        weights, metrics = updated(script, batch, agent, norm_adv=norm_adv)
        spoiled_weights, spoiled_metrics = updated(script, spoiled, agent, norm_adv=norm_adv)
        assert same(weights, spoiled_weights), norm_adv
        assert metrics == spoiled_metrics, norm_adv


def check_beta_of_the_update(script) -> None:
    """The penalty has the weight that update() is given, not the objective's first one."""
    agent, batch = random_batch(script, 64)
    kls = []
    for beta in (0.0, 1.0, 1000.0):
        _, metrics = updated(script, batch, agent, beta=beta, objective="adaptive:0.01")
        kls.append(metrics["kl_after_update"])
    assert kls[0] > 1.1 * kls[1] > 10 * kls[2] > 0


def test_the_penalty_has_the_weight_that_the_update_is_given():
    check_beta_of_the_update(ppo)


def test_every_transition_is_in_one_minibatch_of_an_epoch_and_no_reset_in_any():
    check_minibatches(ppo)
    check_resets(ppo)


def test_a_part_with_fewer_than_two_transitions_is_left_out():
    agent, batch = random_batch(ppo, 16)
    first, second, *_ = torch.randperm(16, generator=seeded(0)).chunk(4)
    batch["valid"][:] = False
    batch["valid"][first] = True
    weights, _ = updated(ppo, batch, agent, update_epochs=1)
    batch["valid"][second[0]] = True
    assert same(updated(ppo, batch, agent, update_epochs=1)[0], weights)
    batch["valid"][second[1]] = True
    assert not same(updated(ppo, batch, agent, update_epochs=1)[0], weights)


@pytest.mark.parametrize("norm_adv", ["minibatch", "none"])
def test_update_is_that_of_stable_baselines3(norm_adv, monkeypatch):
    """Same weights, rollout and minibatch order: same parameters after 4 epochs of 4 steps."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    agent, batch = random_batch(ppo, 64)
    env = gym.make("CartPole-v1")
    env.unwrapped.action_space = env.action_space = gym.spaces.Discrete(3)
    shared = {"ent_coef": 0.02, "vf_coef": 0.4, "learning_rate": 3e-3, "max_grad_norm": 0.5}
    peer = stable_baselines3.PPO(
        "MlpPolicy",
        env,
        device="cpu",
        clip_range=0.2,
        n_steps=64,
        batch_size=16,
        n_epochs=4,
        normalize_advantage=norm_adv == "minibatch",
        **shared,
    )
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    net = peer.policy.mlp_extractor
    theirs = [*net.policy_net.parameters(), *peer.policy.action_net.parameters()]
    theirs += [*net.value_net.parameters(), *peer.policy.value_net.parameters()]
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    names = ("values", "returns", "advantages", "actions")
    stored = {name: batch[name] for name in names}
    stored |= {"observations": batch["obs"], "log_probs": batch["log_prob"]}
    buffer = peer.rollout_buffer
    for name, x in stored.items():
        getattr(buffer, name)[:] = x.numpy().reshape(getattr(buffer, name).shape)
    buffer.full = True
    peer._logger = stable_baselines3.common.logger.Logger(None, [])
    rng = seeded(5)
    orders = iter([torch.randperm(64, generator=rng).numpy() for _ in range(4)])
    monkeypatch.setattr(np.random, "permutation", lambda n: next(orders))
    peer.train()

    before = torch.nn.utils.parameters_to_vector(ours).detach().clone()
    metrics = ppo.update(
        agent=agent,
        optimizer=torch.optim.Adam([ppo.one_vector(agent)], lr=3e-3, eps=1e-5, fused=True),
        batch=batch,
        objective=parse_objective("clip:0.2"),
        beta=0.0,
        args=Args(update_epochs=4, num_minibatches=4, norm_adv=norm_adv, **shared),
        rng=seeded(5),
    )
    ours, theirs = map(torch.nn.utils.parameters_to_vector, (ours, theirs))
    assert (ours - before).abs().max() > 1e-3
    # Adam divides a gradient by no less than 1e-5. So where one is nearly 0, its rounding, of some
    # 1e-8, moves a weight by a thousandth of a step more or less. The others agree better.
    steps = 16 * 3e-3
    assert (ours - theirs).abs().max() < 1e-3 * steps
    assert (ours - theirs).abs().mean() < 1e-5 * steps
    reported = peer.logger.name_to_value
    for name, theirs, sign in (
        ("policy_loss", "policy_gradient_loss", 1),
        ("value_loss", "value_loss", 1),
        ("entropy", "entropy_loss", -1),
        ("clipfrac", "clip_fraction", 1),
    ):
        assert metrics[name] == pytest.approx(sign * reported[f"train/{theirs}"], rel=1e-4), name


def test_target_kl_ends_the_update_after_the_epoch_that_exceeds_it():
    agent, batch = random_batch(ppo, 64)
    stopped, _ = updated(ppo, batch, agent, update_epochs=9, target_kl=1e-9)
    one_epoch, _ = updated(ppo, batch, agent, update_epochs=1)
    all_epochs, _ = updated(ppo, batch, agent, update_epochs=9, target_kl=1e9)
    assert same(stopped, one_epoch) and not same(stopped, all_epochs)


def test_advantages_are_standardised_where_norm_adv_says():
    agent, batch = random_batch(ppo, 64)
    scaled = batch | {"advantages": 7 + 3 * batch["advantages"]}
    flags = {"vf_coef": 0.0, "update_epochs": 1}
    for norm_adv, equal in (("batch", True), ("minibatch", True), ("none", False)):
        one, _ = updated(ppo, batch, agent, norm_adv=norm_adv, **flags)
        other, _ = updated(ppo, scaled, agent, norm_adv=norm_adv, **flags)
        close = [torch.allclose(one[name], other[name], atol=1e-4) for name in one]
        assert all(close) is equal, norm_adv
    one, _ = updated(ppo, batch, agent, norm_adv="batch")
    other, _ = updated(ppo, batch, agent, norm_adv="minibatch")
    assert not all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    x = ppo.standardise(5 + 3 * torch.randn(100, dtype=torch.float64))
    assert (x.mean().item(), x.std().item()) == pytest.approx((0, 1))


def test_entropy_bonus_gradient_clip_and_kl_penalty_each_do_what_their_name_says():
    agent, batch = random_batch(ppo, 256)
    _, plain = updated(ppo, batch, agent)
    _, bonus = updated(ppo, batch, agent, ent_coef=1.0)
    _, penalised = updated(ppo, batch, agent, objective="kl:1000")
    _, unconstrained = updated(ppo, batch, agent, objective="none")
    assert bonus["entropy"] > plain["entropy"]
    assert penalised["kl_after_update"] < 0.1 * unconstrained["kl_after_update"]
    norms = []
    for max_grad_norm in (math.inf, 1e-3):
        args = Args(max_grad_norm=max_grad_norm)
        grad, metrics = ppo.gradient(agent, batch, Objective("none"), 0.0, args)
        norms += [grad.norm().item(), metrics["grad_norm"].item()]  # the latter before the clip
    whole, metric, clipped, metric_again = norms
    assert whole == pytest.approx(metric) and metric == metric_again > 0.01
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_the_metrics_after_an_update_are_of_all_transitions():
    _, batch = random_batch(ppo, 64, resets=0.3)
    agent = Agent(4, 3)
    torch.nn.init.normal_(agent.actor[-1].bias)
    got = ppo.batch_metrics(agent, batch)
    valid = {name: x[batch["valid"]] for name, x in batch.items()}
    old, new = (Categorical(logits=x) for x in (valid["log_probs"], agent.policy(valid["obs"])))
    error = np.var((valid["returns"] - valid["values"]).numpy())
    expected = {
        "kl_after_update": kl_divergence(old, new).mean().item(),
        "explained_variance": 1 - error / np.var(valid["returns"].numpy()),
    }
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)  # float32 holds log 3 to 1e-7
    constant = batch | {"returns": torch.ones(64)}
    assert ppo.batch_metrics(agent, constant)["explained_variance"] == 0.0


def test_a_compiled_gradient_is_the_eager_one():
    """And one program for minibatches of all sizes: resets leave each with another."""
    agent, batch = random_batch(ppo, 64)
    compiled = ppo.compiled(ppo.gradient)
    for rows, objective, is_new in (
        (64, "clip:0.2", True),
        (61, "clip:0.2", False),
        (61, "kl:1", True),
    ):
        part = {name: x.index_select(0, torch.arange(rows)) for name, x in batch.items()}
        results = []
        with torch._dynamo.config.patch(error_on_recompile=not is_new):
            for function in (ppo.gradient, compiled):
                beta = torch.tensor(2.0)
                results.append(function(agent, part, parse_objective(objective), beta, Args()))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------- around updates
def check_parts(script, parts: dict, seed: int) -> None:
    """What begin() gives a run of this seed to learn and draw with."""
    optimizer = parts["optimizer"]
    expected = {"betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0, "amsgrad": False}
    assert type(optimizer) is torch.optim.Adam
    assert {name: optimizer.defaults[name] for name in expected} == expected
    for part, name in (("action_rng", "actions"), ("minibatch_rng", "minibatches")):
        assert parts[part].initial_seed() == script.stream(seed, name), part


def check_orthogonal(layer, gain: float) -> None:
    """Detail 2: rows or columns, whichever are fewer, are orthogonal with this gain; no bias."""
    rows = layer.weight.detach().flatten(1) / gain
    rows = rows if len(rows) <= rows.shape[1] else rows.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-4)
    assert not layer.bias.any()


def test_weights_are_orthogonal_with_the_gains_of_detail_2():
    agent = Agent(4, 3)
    for net, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in ((net[0], 2**0.5), (net[2], 2**0.5), (net[4], last)):
            check_orthogonal(layer, gain)


def test_a_run_begins_with_adam_and_two_streams_of_its_own():
    args = Args(seed=3)
    _, parts = ppo.begin(args, Actors(args, 1), None)
    check_parts(ppo, parts, 3)


def test_the_defaults_are_those_of_the_committed_runs():
    """benchmark/results/classic is made with these: whoever changes one must make it again."""
    expected = {
        "env_id": "CartPole-v1",
        "objective": "clip:0.2",
        "total_timesteps": 100_000,
        "num_envs": 32,
        "num_steps": 64,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "norm_adv": "minibatch",
        "bootstrap_truncated": True,
        "update_epochs": 4,
        "num_minibatches": 32,
        "learning_rate": 2.5e-3,
        "anneal_lr": True,
        "vf_coef": 0.5,
        "ent_coef": 0.0,
        "value_clip": None,
        "max_grad_norm": 0.5,
        "target_kl": None,
    }
    assert {name: getattr(Args(), name) for name in expected} == expected


def check_first_weights(script, begin) -> None:
    """begin: a seed -> the agent that a run of this seed begins with. One seed, one start."""
    with script.torch_threads(1):
        first, again, other = (begin(seed).state_dict() for seed in (3, 3, 4))
    weights = [name for name, x in first.items() if "weight" in name]
    assert weights
    for name in weights:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_a_seed_has_first_weights_of_its_own():
    def begin(seed: int) -> Agent:
        args = Args(seed=seed)
        return ppo.begin(args, Actors(args, 1), None)[1]["agent"]

    check_first_weights(ppo, begin)


def check_evaluation_noise(script, agent, args, path, monkeypatch) -> list[int]:
    """Every step of an evaluation draws noise, or none; every episode has a stream of its own.

    Returns the seed of the stream of each draw.
    """
    drawn, draw_noise = [], script.draw_noise

    def watched(shape, rng):
        drawn.append(rng.initial_seed())
        return draw_noise(shape, rng)

    steps, step = [], script.Actors.step

    def counted(actors, actions):
        *rest, ended = step(actors, actions)
        steps.append(len(ended))
        return *rest, ended

    monkeypatch.setattr(script, "draw_noise", watched)
    monkeypatch.setattr(script.Actors, "step", counted)
    script.evaluate(agent, args, path)
    first = 2**30 + script.stream(args.seed, "evaluation")
    episode_of = np.cumsum([0, *steps[:-1]])  # of every step
    assert sum(steps) == args.eval_episodes == 2
    assert drawn == [first + i for i in episode_of] * args.sample_actions
    return drawn


@pytest.mark.parametrize("sample", [True, False])
def test_every_step_of_an_evaluation_has_its_own_noise_or_none(sample, tmp_path, monkeypatch):
    args = Args(sample_actions=sample, eval_episodes=2)
    check_evaluation_noise(ppo, Agent(4, 2), args, tmp_path, monkeypatch)


def check_three_updates(script, args) -> list[dict]:
    """The step size and beta of each, and the seeds of environments. Returns what update() got.

    update() learns nothing, and reports a KL that is too large after it, and 0 while it went on.
    """
    args.checkpoint_every, args.eval_episodes = 1, 1
    assert args.num_updates == 3
    updates = []

    def update(optimizer, **given):
        updates.append(given | {"lr": optimizer.param_groups[0]["lr"]})
        return {"kl": 0.0, "approx_kl": 0.0, "kl_after_update": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", update)
        seeds = spy_on_restarts(patch, script)
        script.train(args)
    falling = (1, 2 / 3, 1 / 3) if args.anneal_lr else (1, 1, 1)
    lrs = [given["lr"] / args.learning_rate for given in updates]
    assert lrs == pytest.approx(falling)
    adaptive = args.objective == "adaptive:0.01"
    assert [given["beta"] for given in updates] == ([1, 2, 4] if adaptive else [0, 0, 0])
    with open(Path(args.run_dir) / "metrics.csv", newline="") as file:
        charts = list(csv.DictReader(file))
    for chart, name in (("charts/learning_rate", "lr"), ("charts/beta", "beta")):
        used = [given[name] for given in updates]
        assert [float(row[chart]) for row in charts] == pytest.approx(used)
    expected = [script.stream(args.seed, "environments", i) for i in range(3)]
    assert seeds == [*expected, 2**30 + script.stream(args.seed, "evaluation")]
    return updates


SCHEDULES = [("adaptive:0.01", True), ("clip:0.2", False)]
THREE = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 96}


@pytest.mark.parametrize(("objective", "anneal_lr"), SCHEDULES)
def test_each_update_has_its_step_size_its_beta_and_its_seed(objective, anneal_lr, tmp_path):
    run = str(tmp_path / "run")
    args = Args(**THREE, objective=objective, anneal_lr=anneal_lr, run_dir=run)
    updates = check_three_updates(ppo, args)
    assert {given["rng"].initial_seed() for given in updates} == {ppo.stream(1, "minibatches")}


# -------------------------------------------------------------------------------------- learning
def trained(tmp_path, **flags) -> tuple:
    """The trained agent's probabilities of actions, and its value, as functions of a number."""
    defaults = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "eval_episodes": 5}
    defaults |= {"learning_rate": 1e-2, "gamma": 0.5, "total_timesteps": 8_000}
    agent, _ = ppo.train(Args(**defaults | {"run_dir": str(tmp_path / "run")} | flags))

    def probabilities(obs: float) -> list[float]:
        return agent.policy(torch.tensor([obs])).exp().tolist()

    def value(obs: float) -> float:
        return agent.value(torch.tensor([obs])).item()

    return probabilities, value


def test_probe_constant_reward_the_value_goes_to_it(tmp_path):
    _, value = trained(tmp_path, env_id="ProbeConstant-v0")
    assert value(0.0) == pytest.approx(1.0, abs=0.05)


def test_probe_reward_by_observation_the_value_tells_them_apart(tmp_path):
    _, value = trained(tmp_path, env_id="ProbeSees-v0")
    assert [value(-1.0), value(1.0)] == pytest.approx([-1.0, 1.0], abs=0.05)


def test_probe_delayed_reward_is_discounted(tmp_path):
    _, value = trained(tmp_path, env_id="ProbeDelayed-v0")
    assert [value(0.0), value(0.5)] == pytest.approx([0.5, 1.0], abs=0.05)


def test_probe_reward_by_action_the_policy_takes_it(tmp_path):
    probabilities, _ = trained(tmp_path, env_id="ProbeActs-v0")
    assert probabilities(0.0)[1] > 0.95


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_probe_reward_by_observation_and_action_needs_all_of_it(tmp_path, objective):
    flags = {"env_id": "ProbeSeesAndActs-v0", "total_timesteps": 16_000, "objective": objective}
    if objective == "pg":  # one step an update, so more and smaller updates
        flags |= {"update_epochs": 1, "num_minibatches": 1, "num_steps": 16}
    probabilities, value = trained(tmp_path, **flags)
    assert probabilities(-1.0)[0] > 0.9
    assert probabilities(1.0)[1] > 0.9
    assert value(1.0) > 0.7


@pytest.mark.parametrize("flags", [{}, {"objective": "adaptive:0.01"}])
def test_the_default_run_solves_cartpole(tmp_path, flags):
    _, summary = ppo.train(Args(run_dir=str(tmp_path / "run"), seed=7, **flags))
    assert summary["eval_return_mean"] >= 475 and summary["eval_episodes"] == 20
    assert summary["last_100_return"] >= 475  # where CartPole counts as solved


def test_in_a_notebook(tmp_path):
    """What the reader imports and calls, with no command line; it changes no global for good."""
    from ppo_cartpole import Agent, Args, gae, load_policy, ppo_loss, train

    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    torch.set_num_threads(2)
    try:
        run_dir = str(tmp_path / "run")
        args = Args(total_timesteps=512, num_envs=4, num_steps=16, eval_episodes=1, run_dir=run_dir)
        with pytest.raises(ppo.UserError, match="too small for 32 minibatches"):
            train(args)
        args.num_minibatches = 4
        agent, summary = train(args)
        assert torch.get_num_threads() == 2
        assert gc.get_freeze_count() <= frozen  # less where something frozen earlier has died
    finally:
        torch.set_num_threads(threads)
    assert isinstance(agent, Agent) and summary["total_timesteps"] == 512
    assert args.checkpoint_every == 0  # train() works on a copy
    assert load_policy(run_dir)(np.zeros(4)) in (0, 1)
    assert gae.__doc__ and ppo_loss.__doc__
