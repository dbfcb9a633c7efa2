"""ppo_atari.py: the network on pixels, the game's own score, annealing, several ranks, a whole run.

What it shares with ppo_cartpole.py is the same text, and is tested there.
"""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import envpool
import numpy as np
import pytest
import test_cartpole_algorithm as checks
import torch
from conftest import LIMIT, environment, rounding, spoil_updates
from gymnasium.spaces import Discrete
from torch.nn.functional import conv2d, linear, relu

import ppo_atari as ppo
from benchmark import UserError, atari, read_csv
from ppo_atari import Actors, Agent, Args, check_args, parse_objective

ROOT = Path(__file__).parent.parent
SCRIPT = Path(ppo.__file__)
OBJECTIVES = ("clip:0.1", "kl:1", "adaptive:0.01", "none", "pg")
# Breakout ends soon: a player that never meets the ball loses five lives in 120 steps
TINY = "--env-id Breakout-v5 --num-envs 4 --num-steps 64 --num-minibatches 2 --update-epochs 1"
TINY += " --total-timesteps 1536 --eval-episodes 2 --threads 1 --checkpoint-every 3"
TINY += " --precision float32"  # auto is another one on another CPU


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def script():
    return ppo


def text_between(script: str, start: str, end: str) -> str:
    text = (ROOT / script).read_text()
    return text[text.index(start) : text.index(end, text.index(start))]


FUNCTIONS = "draw_noise log_prob_of entropy_of kl_between parse_args has_compiler evaluate_run"


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_what_it_shares_with_cartpole_alone_is_the_same_text(name):
    """What all PPO scripts share, tests/test_continuous.py compares."""
    ours = text_between("ppo_atari.py", f"def {name}(", "\n\n\n")
    assert ours == text_between("ppo_cartpole.py", f"def {name}(", "\n\n\n")


def recorded(rows: int = 32, actions: int = 4, seed: int = 0) -> dict:
    """A batch of random images and whatever else an update takes, some of its rows resets."""
    rng = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, rows, generator=rng)
    batch = {
        "obs": torch.randint(0, 256, (rows, 84, 84, 4), dtype=torch.uint8, generator=rng),
        "log_probs": torch.randn(rows, actions, generator=rng).log_softmax(-1),
        "actions": torch.randint(0, actions, (rows,), generator=rng),
        "advantages": draw(),
        "values": draw(),
        "returns": draw(),
        "valid": (torch.rand(rows, generator=rng) > 0.2).float(),
    }
    assert 0 < batch["valid"].sum() < rows
    return batch | {"log_prob": ppo.log_prob_of(batch["log_probs"], batch["actions"])}


def orders(args: Args, rows: int, seed: int = 0) -> torch.Tensor:
    """[K, P, M]"""
    rng = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(rows, generator=rng) for _ in range(args.update_epochs)]
    return torch.stack(drawn).unflatten(1, (args.num_minibatches, -1))


def started(module, args: Args, seed: int, num_envs: int) -> Actors:
    actors = module.Actors(args, num_envs)
    actors.restart(seed)
    return actors


def csv_rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------ the network
def test_bytes_become_fractions_inside_the_network():
    torch.manual_seed(0)
    agent, obs = Agent(6), torch.randint(0, 256, (5, 84, 84, 4), dtype=torch.uint8)
    x = obs.permute(0, 3, 1, 2).contiguous().double() / 255
    conv1, conv2, conv3, hidden = (agent.trunk[i] for i in (0, 2, 4, 7))
    for layer, stride in ((conv1, 4), (conv2, 2), (conv3, 1)):
        x = relu(conv2d(x, layer.weight.double(), layer.bias.double(), stride))
    assert x.shape == (5, 64, 7, 7)
    x = relu(linear(x.flatten(1), hidden.weight.double(), hidden.bias.double()))
    heads = agent.actor, agent.critic
    logits, values = (linear(x, head.weight.double(), head.bias.double()) for head in heads)
    log_probs, our_values = agent(obs)
    torch.testing.assert_close(log_probs.double(), logits.log_softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(our_values.double(), values.squeeze(-1), rtol=0, atol=1e-5)
    # 32-64-64 filters, 512 units, 6 actions, 1 value
    assert sum(p.numel() for p in agent.parameters()) == 1_687_719


def test_bfloat16_is_close_to_float32_and_stays_out_of_weights_and_results():
    torch.manual_seed(0)
    full, obs = Agent(6), torch.randint(0, 256, (64, 84, 84, 4), dtype=torch.uint8)
    half = Agent(6, bfloat16=True)
    half.load_state_dict(full.state_dict())
    for ours, theirs, allowed in zip(half(obs), full(obs), (1e-3, 3e-2), strict=True):
        assert ours.dtype == torch.float32 and 0 < (ours - theirs).abs().max() < allowed
    gradients = []
    for agent in (full, half):
        log_probs, values = agent(obs)
        (log_probs[:, 0].sum() + values.sum()).backward()
        assert {p.grad.dtype for p in agent.parameters()} == {torch.float32}
        # fused Adam walks memory in order: where a gradient is laid out unlike its weight, other
        # weights would get it, unnoticed
        assert all(p.grad.stride() == p.stride() for p in agent.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_an_action_is_the_most_probable_one_or_a_sample_for_one_game_or_many():
    torch.manual_seed(0)
    agent, obs = Agent(4), np.random.default_rng(0).integers(0, 256, (500, 4, 84, 84), np.uint8)
    agent.actor.weight.data *= 0
    agent.actor.bias.data = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()
    with torch.no_grad():
        assert (ppo.act(agent, obs) == 2).all() and ppo.act(agent, obs[0]) == 2
        noise = ppo.draw_noise((500, 4), torch.Generator().manual_seed(0))
        shares = np.bincount(ppo.act(agent, obs, noise), minlength=4) / 500
    for share, p in zip(shares, (0.1, 0.2, 0.4, 0.3), strict=True):
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 500))


# -------------------------------------------------------------------------------- the mathematics
# A check takes the script, or an edited copy of it; the table MUTATIONS says which edit it catches.
def check_the_loss_is_equation_9_in_closed_form(module: ModuleType) -> None:
    """Two transitions and a reset row; the policy moved, the value too; nothing else is known."""
    old, new = (torch.tensor([[p, 1 - p]] * 3).log() for p in (0.4, 0.44))
    batch = {
        "obs": torch.zeros(3),
        "log_probs": old,
        "log_prob": old[:, 0],
        "actions": torch.zeros(3, dtype=torch.int64),
        "advantages": torch.tensor([2.0, -1.0, 1e3]),
        "values": torch.full((3,), 0.5),
        "returns": torch.tensor([2.0, 1.0, 1e3]),
        "row_weights": torch.tensor([0.5, 0.5, 0.0]),
    }
    args = module.Args(vf_coef=0.7, ent_coef=0.3)
    kl = 0.4 * math.log(0.4 / 0.44) + 0.6 * math.log(0.6 / 0.56)
    entropy = -(0.44 * math.log(0.44) + 0.56 * math.log(0.56))
    value_loss = 0.5 * ((0.9 - 2) ** 2 + (0.9 - 1) ** 2)
    for text, gain in {  # the ratio is 1.1
        "none": 0.5 * (1.1 * 2 - 1.1),
        "clip:0.05": 0.5 * (1.05 * 2 - 1.1),
        "kl:1": 0.5 * (1.1 * 2 - 1.1) - 3 * kl,
        "adaptive:0.01": 0.5 * (1.1 * 2 - 1.1) - 3 * kl,
        "pg": 0.5 * math.log(0.44) * (2 - 1),
    }.items():
        objective = module.parse_objective(text)
        policy = lambda obs: (new, torch.full((3,), 0.9))  # noqa: E731
        loss, means = module.minibatch_loss(policy, batch, objective, 3.0, args)
        assert means["policy_loss"].item() == pytest.approx(-gain, rel=1e-5)
        assert means["value_loss"].item() == pytest.approx(value_loss)
        assert means["entropy"].item() == pytest.approx(entropy)
        assert means["kl"].item() == pytest.approx(kl, rel=1e-4)
        assert means["clipfrac"].item() == (text == "clip:0.05")
        whole = -gain + 0.7 * value_loss - 0.3 * entropy
        assert loss.item() == pytest.approx(whole, rel=1e-5)


def test_the_loss_is_equation_9_in_closed_form():
    check_the_loss_is_equation_9_in_closed_form(ppo)


def test_the_defaults_are_those_of_table_5():
    """Where it is silent, of OpenAI Baselines' ppo2, except value_clip and bootstrap_truncated."""
    paper = {
        "total_timesteps": 10_000_000,  # 40M frames, the caption of Table 6
        "num_envs": 8,
        "num_steps": 128,
        "learning_rate": 2.5e-4,
        "anneal_lr": True,
        "objective": "clip:0.1",
        "anneal_clip": True,
        "update_epochs": 3,
        "num_minibatches": 4,  # of 8 * 128 / 4 = 32 * 8 steps
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "vf_coef": 1.0,
        "ent_coef": 0.01,
    }
    rest = {"norm_adv": "minibatch", "max_grad_norm": 0.5}  # ppo2
    rest |= {"value_clip": None, "bootstrap_truncated": True}  # not as in ppo2
    # what neither has is off
    rest |= {"target_kl": None, "sticky_actions": 0.0, "full_action_space": False}
    expected = paper | rest
    assert {name: getattr(Args(), name) for name in expected} == expected


def test_alpha_anneals_step_size_and_clip_range():
    args, objective = Args(total_timesteps=1000 * 1024), parse_objective("clip:0.1")
    for iteration, alpha in ((0, 1.0), (500, 0.5), (999, 0.001)):
        lr, now = ppo.annealed(args, objective, iteration)
        assert (lr, now.epsilon) == pytest.approx((2.5e-4 * alpha, 0.1 * alpha))
    constant_clip = Args(total_timesteps=1000 * 1024, anneal_clip=False)
    lr, now = ppo.annealed(constant_clip, objective, 999)
    assert (lr, now.epsilon) == (pytest.approx(2.5e-7), 0.1)
    lr, now = ppo.annealed(Args(total_timesteps=1000 * 1024, anneal_lr=False), objective, 999)
    assert (lr, now.epsilon) == (2.5e-4, pytest.approx(1e-4))
    for text in ("kl:1", "none"):
        assert ppo.annealed(args, parse_objective(text), 500)[1] == parse_objective(text)


def check_standardise(module: ModuleType) -> None:
    """As torch's mean() and std() of the valid entries, alone and where two ranks share them."""
    torch.manual_seed(0)
    x, valid = 3 + 5 * torch.randn(2, 3, 8), (torch.rand(2, 3, 8) > 0.3).float()
    results = module.standardise(x, valid)
    for got, row, used in zip(*(t.flatten(0, 1) for t in (results, x, valid > 0)), strict=True):
        expected = (row - row[used].mean()) / row[used].std()  # n - 1
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    nothing = module.standardise(x, torch.zeros_like(valid))
    one = module.standardise(x, torch.zeros_like(valid).index_fill_(-1, torch.tensor(2), 1))
    assert nothing.isfinite().all() and not one[..., 2].any()


def test_standardise_takes_the_sample_deviation():
    check_standardise(ppo)


def updated(module, batch: dict, args: Args, objective: str, seed: int = 0) -> tuple:
    """Metrics and weights after an update of a fresh agent."""
    torch.manual_seed(seed)
    agent, parsed = module.Agent(4), module.parse_objective(objective)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    order = orders(args, len(batch["valid"]))
    metrics = module.update(agent, optimizer, batch, order, parsed, parsed.beta, args)
    return metrics, torch.nn.utils.parameters_to_vector(agent.parameters()).detach(), agent


def test_an_update_is_a_loop_over_its_minibatches():
    """Against autograd over the transitions of each minibatch, written plainly."""
    for norm_adv in ("batch", "minibatch", "none"):
        args = small(norm_adv=norm_adv, max_grad_norm=0.1, ent_coef=0.02, vf_coef=0.7)
        batch, order = recorded(), orders(args, 32)
        valid, advantages, history = batch["valid"] > 0, batch["advantages"], []
        torch.manual_seed(0)
        ours, plain = Agent(4), Agent(4)
        plain.load_state_dict(ours.state_dict())
        before = torch.nn.utils.parameters_to_vector(plain.parameters()).detach().clone()
        objective = parse_objective("clip:0.1")
        optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
        metrics = ppo.update(ours, optimizer, batch, order, objective, 0.0, args)
        if norm_adv == "batch":
            used = advantages[valid]
            advantages = (advantages - used.mean()) / (used.std() + 1e-8)
        optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
        for rows in order.flatten(0, 1):
            rows = rows[valid[rows]]
            a = advantages[rows]
            if norm_adv == "minibatch":
                a = (a - a.mean()) / (a.std() + 1e-8)
            log_probs, values = plain(batch["obs"][rows])
            log_prob = log_probs.gather(-1, batch["actions"][rows].unsqueeze(-1)).squeeze(-1)
            ratio = (log_prob - batch["log_prob"][rows]).exp()
            policy_loss = -torch.min(ratio * a, ratio.clamp(0.9, 1.1) * a).mean()
            value_loss = (values - batch["returns"][rows]).square().mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            optimizer.zero_grad()
            (policy_loss + 0.7 * value_loss - 0.02 * entropy).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            history.append([policy_loss.item(), value_loss.item(), entropy.item()])
        after = torch.nn.utils.parameters_to_vector(plain.parameters()).detach()
        difference = torch.nn.utils.parameters_to_vector(ours.parameters()).detach() - after
        assert difference.norm() < 1e-3 * (after - before).norm()
        got = [metrics[name] for name in ("policy_loss", "value_loss", "entropy")]
        assert got == pytest.approx(np.mean(history, 0).tolist(), rel=1e-3, abs=1e-5)


def small(**flags) -> Args:
    return check_args(Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=2, **flags))


def check_reset_rows_change_nothing(module: ModuleType) -> None:
    cases = {"batch": "clip:0.1", "minibatch": "adaptive:0.01", "none": "none"}
    for norm_adv, objective in cases.items():
        batch, args = recorded(), small(norm_adv=norm_adv)
        garbage = dict(batch)
        for name in ("advantages", "values", "returns"):
            garbage[name] = torch.where(batch["valid"] > 0, batch[name], 1e3)
        metrics, weights, _ = updated(module, batch, args, objective)
        assert all(math.isfinite(x) for x in metrics.values()) and metrics["kl_after_update"] > 0
        same_metrics, same_weights, _ = updated(module, garbage, args, objective)
        assert metrics == same_metrics and torch.equal(weights, same_weights)


def test_reset_rows_change_nothing():
    check_reset_rows_change_nothing(ppo)


def test_the_penalty_has_the_weight_that_the_update_is_given():
    """Not the one that the objective began with, which is 1."""
    agent, seen, args = Agent(4), [], small()

    def loss_fn(agent, minibatch, objective, beta, args):
        seen.append(float(beta))
        return agent.critic.bias.sum(), {"approx_kl": torch.tensor(0.0)}

    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    adaptive = parse_objective("adaptive:0.01")
    ppo.update(agent, optimizer, recorded(), orders(args, 32), adaptive, 7.0, args, loss_fn)
    assert seen == [7.0] * 4  # two epochs of two minibatches


def test_metrics_are_means_and_an_adapting_beta_takes_the_kl_of_the_batch_metrics():
    batch = recorded() | {"valid": torch.ones(32)}
    metrics, _, agent = updated(ppo, batch, small(), "adaptive:0.01")
    with torch.no_grad():
        log_probs, _ = agent(batch["obs"])
        kl = ppo.kl_between(batch["log_probs"], log_probs)
    assert metrics["kl_after_update"] == pytest.approx(kl.mean().item(), rel=1e-5)
    first = orders(small(), 32)[0, 0]
    metrics, _, agent = updated(ppo, batch, small(), "clip:0.1")
    with torch.no_grad():
        log_probs, _ = agent(batch["obs"][first])
        kl = ppo.kl_between(batch["log_probs"][first], log_probs)
    assert metrics["kl_after_update"] == pytest.approx(kl.mean().item(), rel=1e-5)
    unexplained = (batch["returns"] - batch["values"]).var() / batch["returns"].var()
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)


def test_target_kl_ends_the_update_after_the_epoch_that_exceeds_it():
    batch = recorded()
    _, stopped, _ = updated(ppo, batch, small(target_kl=1e-9), "none")
    one_epoch = check_args(Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=1))
    _, one, _ = updated(ppo, batch, one_epoch, "none")
    _, both, _ = updated(ppo, batch, small(target_kl=1e9), "none")
    assert torch.equal(stopped, one) and not torch.equal(stopped, both)


def test_target_kl_is_held_against_the_mean_of_one_epoch():
    """Of three epochs of two minibatches the second ends it: 0.6. All so far have 0.5."""
    agent, kls = Agent(4), iter([0.0, 0.8, 0.8, 0.4, 0.0, 0.0])

    def loss_fn(agent, *rest):
        return agent.critic.bias.sum(), {"approx_kl": torch.tensor(next(kls))}

    args = Args(num_minibatches=2, update_epochs=3, target_kl=0.55)
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    clip = parse_objective("clip:0.1")
    ppo.update(agent, optimizer, recorded(), orders(args, 32), clip, 0.0, args, loss_fn)
    assert list(kls) == [0.0, 0.0]  # the third epoch did not come


def test_a_gradient_is_scaled_down_to_max_grad_norm():
    torch.manual_seed(0)
    agent, args = Agent(4), Args(num_minibatches=1, update_epochs=1, max_grad_norm=0.1)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    clip = parse_objective("clip:0.1")
    metrics = ppo.update(agent, optimizer, recorded(), orders(args, 32), clip, 0.0, args)
    after = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert metrics["grad_norm"] > 0.2  # as it was


def rolled_out(module, steps: int, num_envs: int, seed: int = 0, agent=None, **flags) -> tuple:
    """A rollout on Breakout, its games, and the agent that played."""
    actors = started(module, Args(env_id="Breakout-v5", **flags), seed, num_envs)
    actions = int(actors.envs.action_space.n)
    torch.manual_seed(seed)
    agent = agent or module.Agent(actions)
    rng = torch.Generator().manual_seed(seed)
    noise = torch.from_numpy(module.draw_noise((steps, num_envs, actions), rng))
    rollout, games = module.collect(agent, actors, noise)
    return rollout, games, agent


def test_the_actions_of_a_rollout_are_samples_of_the_policy_in_it():
    rollout, _, _ = rolled_out(ppo, 16, 4)
    noise = ppo.draw_noise((16, 4, 4), torch.Generator().manual_seed(0))
    samples = (rollout["log_probs"] + torch.from_numpy(noise)).argmax(-1)
    assert torch.equal(rollout["actions"], samples) and len(samples.unique()) == 4


def check_the_first_minibatch_has_ratio_1(module: ModuleType, bfloat16: bool = False) -> None:
    """Although a rollout computes 8 screens at a time and a minibatch 64. The policy is far from
    the uniform one that it would start from, which would hide differences."""
    torch.manual_seed(0)
    agent = module.Agent(4, bfloat16=bfloat16)
    agent.actor.weight.data *= 3000
    rollout, _, _ = rolled_out(module, 16, 8, agent=agent)
    rows = torch.randperm(128)[:64]
    with torch.no_grad():
        new, _ = agent(rollout["obs"][:-1].flatten(0, 1)[rows])
    old, taken = rollout["log_probs"].flatten(0, 1)[rows], rollout["actions"].flatten()[rows]
    logratio = module.log_prob_of(new - old, taken)
    # float32: sums of some thousand terms; bfloat16: results of four layers are rounded
    terms, dtype = (4, torch.bfloat16) if bfloat16 else (1000, torch.float32)
    assert logratio.abs().max() < rounding(terms, new.abs().max(), dtype)
    # and too little to matter beside the clip range
    assert logratio.abs().mean() < parse_objective(Args().objective).epsilon / 100
    assert new.exp().max() > 0.75


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_first_minibatch_has_ratio_1(bfloat16):
    check_the_first_minibatch_has_ratio_1(ppo, bfloat16)


# ----------------------------------------------------------------------------- games and episodes
def limit_games(patch, steps: int) -> None:
    """Every console truncates its games after so many steps."""
    real = envpool.make
    options = {"max_episode_steps": steps}
    patch.setattr(envpool, "make", lambda env_id, **given: real(env_id, **given | options))


@pytest.mark.parametrize("limit", [27_000, 100])
def test_games_are_whole_and_in_raw_points(limit, monkeypatch):
    """Against EnvPool's own counters in a twin. elapsed_step is 0 in the first row of a game, and
    only there."""
    limit_games(monkeypatch, limit)
    steps, num_envs = 250, 3
    rollout, games, _ = rolled_out(ppo, steps, num_envs, seed=7)
    twin = started(ppo, Args(env_id="Breakout-v5"), 7, num_envs)
    expected, lives, ended = [], twin.lives, np.zeros(num_envs, bool)
    returns, lengths = np.zeros((2, num_envs))
    lost, cut = 0, 0
    for t in range(steps):
        actions = rollout["actions"][t].numpy()
        obs, rewards, terminated, truncated, info = twin.envs.step(actions)
        fresh = info["elapsed_step"] == 0  # this row is the reset after a game's end
        for i in fresh.nonzero()[0]:
            expected.append((t - 1, int(i), returns[i], int(lengths[i])))
            returns[i] = 0
        assert not rewards[fresh].any()
        returns, lengths = returns + info["reward"], info["elapsed_step"]
        assert np.array_equal(rollout["rewards"][t], np.sign(info["reward"]))
        assert np.array_equal(rollout["obs"][t + 1], obs.transpose(0, 2, 3, 1))
        assert np.array_equal(rollout["terminated"][t], terminated)
        assert np.array_equal(rollout["truncated"][t], truncated)
        assert np.array_equal(rollout["valid"][t], ~ended)
        dying = (info["lives"] < lives) & ~fresh
        assert (terminated | truncated)[dying].all()  # to learning, that is an end
        lost += (dying & (info["lives"] > 0)).sum()
        cut += truncated.sum()
        lives, ended = info["lives"], terminated | truncated
    assert [game for game in games if game[0] < steps - 1] == expected != []
    assert any(game_return for _, _, game_return, _ in expected)
    assert lost > 0 and (cut > 0) == (limit == 100)


def test_a_truncated_game_is_bootstrapped_with_its_final_screen_and_a_lost_life_is_not():
    with pytest.MonkeyPatch.context() as patch:
        limit_games(patch, 40)
        rollout, _, agent = rolled_out(ppo, 64, 2)
    with torch.no_grad():
        values = agent(rollout["obs"].flatten(0, 1))[1].view(65, 2)
    torch.testing.assert_close(rollout["values"], values, rtol=1e-4, atol=1e-5)
    recorded = [rollout[name] for name in ("rewards", "values", "terminated", "truncated")]
    advantages = ppo.gae(*recorded, 0.99, 0.95)
    for name, gamma in (("truncated", 0.99), ("terminated", 0.0)):
        ends = rollout[name].nonzero().tolist()
        assert ends != []
        for t, i in ends:
            delta = rollout["rewards"][t, i] + gamma * values[t + 1, i] - values[t, i]
            assert advantages[t, i].item() == pytest.approx(delta.item(), abs=1e-5)


class Tape:
    """In place of a pool: plays back what EnvPool says in each step of one actor."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def step(self, actions):
        reward, terminated, truncated, lives, over = (np.array([x]) for x in next(self.steps))
        info = {"lives": lives, "reward": 10 * reward, "terminated": over}
        return None, reward, terminated, truncated, info


# What EnvPool says in each step: reward, terminated, truncated, lives, game over. Then: whether
# learning gets a termination; the (return, length) of a game that ends here.
ENDINGS = {
    "while it idles": [
        ((1.0, False, False, 2, 0), False, None),
        ((0.0, True, False, 1, 0), True, None),  # a life lost
        ((0.0, False, False, 1, 0), False, None),  # idle frames
        ((0.0, True, False, 1, 0), True, None),
        ((0.0, False, False, 3, 0), False, (10.0, 3)),  # more lives than before: another game
        ((1.0, False, False, 4, 0), False, None),  # but a life may also be won
    ],
    "by its time limit, as a life is lost": [
        ((1.0, False, True, 1, 0), False, (10.0, 1)),
        ((0.0, False, False, 3, 0), False, None),
    ],
    "in its last step": [
        ((1.0, False, True, 0, 1), True, (10.0, 1)),
        ((0.0, False, False, 3, 0), False, None),
    ],
    "in the last idle frame": [
        ((1.0, True, False, 1, 0), True, None),
        ((0.0, False, False, 0, 1), True, (10.0, 1)),
        ((0.0, True, False, 0, 1), True, None),
        ((0.0, False, False, 3, 0), False, None),
        ((1.0, False, False, 3, 0), False, None),
    ],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_games_that_envpool_ends_in_an_odd_way_are_counted_once(ending):
    actors = Actors(Args(), 1)
    actors.lives, actors.envs = np.array([2]), Tape(step for step, *_ in ENDINGS[ending])
    actors.ended = np.zeros(1, bool)
    actors.returns, actors.lengths = np.zeros(1), np.zeros(1, int)
    for _, terminates, game in ENDINGS[ending]:
        _, terminated, _, games = actors.step(None)
        assert terminated[0] == terminates and games == ([(0, *game)] if game else [])


def test_the_flags_of_the_console_reach_it():
    for flags, actions in (({}, 4), ({"full_action_space": True, "sticky_actions": 0.25}, 18)):
        envs = ppo.make_envs(Args(env_id="Breakout-v5", **flags), 1, 1)
        config = envs.spec.config
        assert envs.action_space.n == actions
        assert config.repeat_action_probability == flags.get("sticky_actions", 0.0)
        assert (config.frame_skip, config.stack_num, config.noop_max) == (4, 4, 30)
        assert config.max_episode_steps == 27_000
        assert config.episodic_life and config.reward_clip and config.gray_scale
        assert config.use_fire_reset


def test_a_run_begins_with_the_network_that_its_flags_name():
    for precision, full, actions in (("float32", False, 4), ("bfloat16", True, 18)):
        flags = {"precision": precision, "full_action_space": full}
        _, parts = ppo.begin(Args(env_id="Breakout-v5", seed=3, **flags), None)
        ppo.seed_globals(ppo.stream(3, "weights"))
        expected, ours = Agent(actions).state_dict(), parts["agent"].state_dict()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert parts["agent"].bfloat16 == (precision == "bfloat16")


def test_weights_are_orthogonal_with_the_gains_of_detail_2():
    agent = Agent(4)
    layers = [(agent.trunk[i], 2**0.5) for i in (0, 2, 4, 7)]
    for layer, gain in [*layers, (agent.actor, 0.01), (agent.critic, 1.0)]:
        checks.check_orthogonal(layer, gain)


class Lights:
    """In place of a pool: one of three bands of the screen is lit, and the action that says which
    pays 1. A game has 8 steps."""

    def __init__(self, env_id, *, num_envs, seed, **_):
        self.rng, self.count = np.random.default_rng(seed), np.zeros(num_envs, int)

    def look(self):
        self.light = self.rng.integers(0, 3, len(self.count))
        screens = 200 * np.eye(3, dtype=np.uint8).repeat(28, 1)[self.light]  # [N, 84]
        shape = len(self.count), 4, 84, 84
        return np.ascontiguousarray(np.broadcast_to(screens[:, None, :, None], shape))

    def info(self, reward):
        lives = np.zeros(len(self.count), int)
        return {"reward": reward, "lives": lives, "terminated": self.count == 8}

    def reset(self):
        return self.look(), self.info(0.0 * self.count)

    def step(self, actions):
        new = self.count == 8
        self.count = np.where(new, 0, self.count + 1)
        reward = ((actions == self.light) & ~new).astype(np.float32)
        terminated, truncated = self.count == 8, np.zeros(len(new), bool)
        return self.look(), reward, terminated, truncated, self.info(reward)


@pytest.fixture
def lights(monkeypatch, tmp_path) -> Args:
    """Games of Lights are played in place of Pong. Some flags that suit them."""
    spec = SimpleNamespace(action_space=Discrete(3))
    monkeypatch.setattr(envpool, "make", Lights)
    monkeypatch.setattr(envpool, "make_spec", lambda env_id, **_: spec)
    flags = {"num_envs": 8, "num_steps": 16, "learning_rate": 1e-3, "gamma": 0.0}
    run = {"run_dir": str(tmp_path / "run"), "threads": 1, "eval_episodes": 4}
    run["precision"] = "float32"
    return Args(total_timesteps=128 * 12, **flags, **run)


def test_it_learns_to_tell_screens_apart(lights):
    _, summary = ppo.train(lights)
    assert summary["eval_return_mean"] == 8.0
    episodes = csv_rows(Path(lights.run_dir) / "episodes.csv")
    assert np.mean([float(row["return"]) for row in episodes[:8]]) < 5


def test_a_run_begins_with_adam_and_two_streams_of_its_own(lights):
    lights.seed = 3
    _, parts = ppo.begin(lights, None)
    checks.check_parts(ppo, parts, 3)


@pytest.mark.parametrize(("objective", "anneal_lr"), checks.SCHEDULES)
def test_each_update_has_its_step_size_its_clip_range_its_beta_and_its_seed(
    objective, anneal_lr, lights
):
    lights.objective, lights.anneal_lr, lights.total_timesteps = objective, anneal_lr, 3 * 128
    updates = checks.check_three_updates(ppo, lights)
    epsilons = [given["objective"].epsilon for given in updates]
    first = parse_objective(objective).epsilon  # infinite where nothing is clipped
    assert epsilons == pytest.approx([first, first * 2 / 3, first / 3])


def test_a_batch_is_a_rollout_its_advantages_and_its_returns(lights, monkeypatch):
    rollouts, batches = checks.watch_batches(monkeypatch, ppo)
    lights.total_timesteps, lights.gamma, lights.gae_lambda = 128, 0.9, 0.5
    ppo.train(lights)
    ((rollout, _),), (batch,) = rollouts, batches
    given = [rollout[name] for name in ("rewards", "values", "terminated", "truncated")]
    advantages, values = ppo.gae(*given, 0.9, 0.5), rollout["values"][:-1]
    expected = {name: rollout[name] for name in ("actions", "log_probs")}
    expected |= {"obs": rollout["obs"][:-1], "valid": rollout["valid"].float(), "values": values}
    expected |= {"advantages": advantages, "returns": advantages + values}
    expected["log_prob"] = ppo.log_prob_of(rollout["log_probs"], rollout["actions"])
    assert batch.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(batch[name], x.flatten(0, 1)), name


def test_a_run_gives_back_the_threads_it_took_whatever_happens(lights, monkeypatch):
    before, inside, real = 3, [], ppo.update

    def update(**given):
        inside.append(torch.get_num_threads())
        if len(inside) == 3:
            raise KeyboardInterrupt
        return real(**given)

    monkeypatch.setattr(ppo, "update", update)
    torch.set_num_threads(before)
    lights.total_timesteps, lights.threads, first_dir = 256, 2, lights.run_dir
    ppo.train(lights)
    assert torch.get_num_threads() == before
    lights.run_dir = f"{first_dir}-2"
    with pytest.raises(KeyboardInterrupt):
        ppo.train(lights)
    assert torch.get_num_threads() == before and inside == [2, 2, 2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no system call for it here")
def test_cores_are_those_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert ppo.cores() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert ppo.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------------------------- several ranks
RANKS = """
import sys
import torch
import torch.distributed as dist
import ppo_atari as ppo

batch_file, folder = sys.argv[1:]
args, batch, orders = torch.load(batch_file, weights_only=False)
rank, world = ppo.join_ranks("cpu")
torch.manual_seed(0)
agent = ppo.Agent(4)
own = torch.arange(rank * 4, rank * 4 + 4)  # of 8 actors, in each of the rows [T, N]
batch = {name: x.unflatten(0, (-1, 8))[:, own].flatten(0, 1) for name, x in batch.items()}
standardised = ppo.standardise(batch["advantages"], batch["valid"])
optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
objective = ppo.parse_objective("clip:0.1")
metrics = ppo.update(agent, optimizer, batch, orders[rank], objective, 0.0, args)
torch.save((metrics, agent.state_dict(), standardised), f"{folder}/update{rank}")

flags = "--env-id Breakout-v5 --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 3"
flags += " --threads 1 --total-timesteps 1600 --eval-episodes 1 --learning-rate 0.001"
flags += f" --target-kl 0.001 --precision float32 --run-dir {folder}/run"
steps, clip = [], torch.nn.utils.clip_grad_norm_

def counted(*args):
    steps.append(1)
    return clip(*args)

torch.nn.utils.clip_grad_norm_ = counted
agent, summary = ppo.train(ppo.parse_args(flags.split()))
torch.save((summary, agent.state_dict(), len(steps)), f"{folder}/train{rank}")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> SimpleNamespace:
    """What two ranks made of one update on recorded data, and of a run of 50 updates."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = {"num_envs": 8, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1}
    args = check_args(Args(**flags, max_grad_norm=math.inf, vf_coef=0.1))
    batch = recorded(64)
    # orders [2 ranks, K, P, M] of rows t * 4 + i: on one rank these are rows t * 8 + 4 * rank + i
    split = torch.stack([orders(args, 32, seed) for seed in (1, 2)])
    parts = [rows // 4 * 8 + rows % 4 + 4 * rank for rank, rows in enumerate(split)]
    whole = torch.cat(parts, -1)
    assert sorted(whole.flatten().tolist()) == list(range(64))
    torch.save((args, batch, split), folder / "batch")
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", folder / "ranks.py", folder / "batch", folder]
    quiet = {"capture_output": True, "text": True, "timeout": LIMIT}
    done = subprocess.run(command, env=environment(), **quiet)
    assert done.returncode == 0, done.stderr
    load = partial(torch.load, weights_only=True)
    return SimpleNamespace(
        args=args,
        batch=batch,
        whole=whole,
        updated=[load(folder / f"update{rank}") for rank in (0, 1)],
        trained=[load(folder / f"train{rank}") for rank in (0, 1)],
        run=folder / "run",
    )


def test_the_gradient_of_two_ranks_is_that_of_one_on_the_same_minibatches(ranks):
    torch.manual_seed(0)
    agent = Agent(4)
    before = {name: weight.clone() for name, weight in agent.state_dict().items()}
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    objective = parse_objective("clip:0.1")
    metrics = ppo.update(agent, optimizer, ranks.batch, ranks.whole, objective, 0.0, ranks.args)
    for their_metrics, weights, _ in ranks.updated:
        assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for name, theirs in weights.items():
            moved = agent.state_dict()[name] - before[name]
            assert moved.abs().max() > 0
            allowed = {"rtol": 1e-3, "atol": 1e-3 * moved.abs().max().item()}
            torch.testing.assert_close(theirs - before[name], moved, **allowed)


def test_advantages_are_standardised_over_the_transitions_of_both_ranks(ranks):
    parts = [standardised.view(8, 4) for _, _, standardised in ranks.updated]
    x, valid = ranks.batch["advantages"], ranks.batch["valid"] > 0
    expected = (x - x[valid].mean()) / x[valid].std()
    torch.testing.assert_close(torch.cat(parts, 1).flatten(), expected, rtol=1e-5, atol=1e-6)


def test_two_ranks_hold_the_same_weights_after_fifty_updates_and_leave_one_folder(ranks):
    (summary, weights, steps), (nothing, others, as_many) = ranks.trained
    # --target-kl stopped some updates, and the same ones on both
    assert steps == as_many and 50 * 2 < steps < 50 * 6
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert nothing == {} and [summary] == json.loads((ranks.run / "summary.json").read_text())
    assert summary["total_timesteps"] == 1600 and 1500 < summary["transitions"] < 1600
    assert len(csv_rows(ranks.run / "metrics.csv")) == 50
    steps = [int(row["global_step"]) for row in csv_rows(ranks.run / "episodes.csv")]
    assert steps == sorted(steps)
    assert {(step - 1) % 4 for step in steps} == {0, 1, 2, 3}  # games of all four actors


def test_what_belongs_to_an_actor_depends_on_its_place_among_all_of_them():
    args = Args(env_id="Breakout-v5")
    whole, left, right = (started(ppo, args, *which).obs for which in ((5, 8), (5, 4), (9, 4)))
    assert np.array_equal(whole, np.concatenate([left, right]))
    assert not np.array_equal(left, right)
    args = Args(num_envs=8, num_steps=4, num_minibatches=2, update_epochs=3)
    drawn = [ppo.draw_orders(args, rank, 2, torch.Generator().manual_seed(0)) for rank in (0, 1)]
    assert drawn[0].shape == (3, 2, 8) and not torch.equal(*drawn)
    assert all(sorted(epoch.flatten().tolist()) == list(range(16)) for epoch in torch.cat(drawn))


def test_the_seeds_and_the_noise_of_two_ranks_are_those_of_one(lights, monkeypatch):
    """What train() gives to its first rollout."""
    seeds, noises, real = [], [], ppo.make_envs

    def make_envs(args, num_envs, seed, render):
        seeds.append(torch.arange(seed, seed + num_envs))
        return real(args, num_envs, seed, render)

    def collect(agent, actors, noise):
        noises.append(noise.transpose(0, 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "make_envs", make_envs)
    monkeypatch.setattr(ppo, "collect", collect)
    folder = lights.run_dir
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(ppo, "join_ranks", lambda device, place=(rank, world): place)
        lights.run_dir = f"{folder}-{rank}-of-{world}"
        with pytest.raises(KeyboardInterrupt):
            ppo.train(lights)
    for whole, left, right in (seeds, noises):
        assert torch.equal(whole, torch.cat([left, right])) and not torch.equal(left, right)


# ------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of 6 updates; look, do not touch."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ppo.train(ppo.parse_args([*TINY.split(), "--run-dir", str(path)]))
    return path


def test_a_run_leaves_finite_metrics_under_their_names(finished):
    metrics, episodes = csv_rows(finished / "metrics.csv"), csv_rows(finished / "episodes.csv")
    names = ["update", "global_step", "seed", "objective"]
    charts = "episodic_return episodic_length SPS learning_rate beta epsilon"
    losses = "policy_loss value_loss entropy kl approx_kl old_approx_kl clipfrac grad_norm"
    names += [f"charts/{name}" for name in charts.split()]
    names += [f"losses/{name}" for name in losses.split()]
    names += ["losses/kl_after_update", "losses/explained_variance"]
    assert len(metrics) == 6 and list(metrics[0]) == names
    for row in metrics:
        assert all(math.isfinite(float(row[name] or 0)) for name in names if name != "objective")
        assert all(row[name] for name in names if not name.startswith("charts/episodic"))
    annealed = [1 - i / 6 for i in range(6)]
    assert [float(row["charts/epsilon"]) / 0.1 for row in metrics] == pytest.approx(annealed)
    assert float(metrics[3]["charts/learning_rate"]) == pytest.approx(1.25e-4)
    assert list(episodes[0]) == ["global_step", "seed", "objective", "return", "length"]
    assert all(int(row["length"]) >= 100 for row in episodes)  # whole games, not lives
    (summary,) = json.loads((finished / "summary.json").read_text())
    assert summary["total_timesteps"] == 1536 and 1400 < summary["transitions"] < 1536
    returns = [float(row["return"]) for row in episodes]
    assert summary["last_100_return"] == pytest.approx(np.mean(returns))
    config = json.loads((finished / "config.json").read_text())
    assert config["args"]["precision"] == "float32"
    assert "envpool" in config["versions"]


def content(run: Path) -> dict:
    """All that must come out the same bit for bit: what a run leaves, its clocks apart."""
    saved = ppo.load_checkpoint(run / "checkpoint.pt")
    (summary,) = json.loads((run / "summary.json").read_text())
    names = ("agent", "optimizer", "action_rng", "minibatch_rng", "state", "recent")
    metrics = csv_rows(run / "metrics.csv")
    return {
        "metrics": [{k: v for k, v in row.items() if k != "charts/SPS"} for row in metrics],
        "episodes": (run / "episodes.csv").read_text(),
        "checkpoint": flat({name: saved[name] for name in names}),
        "summary": {k: v for k, v in summary.items() if k not in ("wall_seconds", "sps")},
    }


def flat(x):
    """Tensors as bytes, all the way down, so that == compares bits."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.flatten().numpy().tobytes()
    if isinstance(x, dict):
        return {name: flat(value) for name, value in x.items()}
    return [flat(value) for value in x] if isinstance(x, list | tuple) else x


def test_a_run_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(
    finished, main, monkeypatch
):
    """Stopped in its first update; in its fifth, after a checkpoint at the third; there again."""
    command, real = [*TINY.split(), "--run-dir", "run"], ppo.update
    for stop in (1, 5, 2):
        calls = iter(range(1, 100))

        def update(calls=calls, stop=stop, **given):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(**given)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "update", update)
            assert main(*command).code == 130
        command = ["--resume", "run"]
    assert main(*command).code == 0
    ours, theirs = content(Path("run")), content(finished)
    for name in theirs:
        assert ours[name] == theirs[name], name


def test_what_was_learned_before_an_error_of_the_environment_is_saved(lights, monkeypatch):
    """It stops in its third rollout. No checkpoint is due until then."""
    real, calls = ppo.collect, iter(range(1, 100))

    def collect(*args):
        if next(calls) == 3:
            raise OSError("the host is gone")
        return real(*args)

    monkeypatch.setattr(ppo, "collect", collect)
    lights.checkpoint_every = 4
    with pytest.raises(RuntimeError, match=r"update 3: OSError: the host is gone; .* is saved"):
        ppo.train(lights)
    saved = ppo.load_checkpoint(Path(lights.run_dir) / "checkpoint.pt")
    assert saved["state"]["updates"] == 2
    _, summary = ppo.train(Args(resume=lights.run_dir))
    assert summary["total_timesteps"] == lights.num_updates * lights.batch_size


def test_a_run_that_is_no_longer_finite_stops_with_code_3(main, monkeypatch, tmp_path):
    real = ppo.total_loss
    monkeypatch.setattr(ppo, "total_loss", lambda *args: real(*args) * math.nan)
    code, out, err = main(*TINY.split(), "--run-dir", "run")
    assert code == 3 and out == [] and re.match(r"error: \w+ not finite in update 1$", err[-1])


def test_evaluation_is_repeatable_and_captures_the_screen(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (summary,) = json.loads((finished / "summary.json").read_text())
    results = []
    for flags in ("", "--sample-actions", "--sample-actions --capture-video"):
        code, (line,), err = main("--evaluate", "run", "--eval-episodes", 2, *flags.split())
        (result,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert code == 0 and err == [] and f"{result['eval_return_mean']:.1f}" in line
        assert result["actions"] == ("sampled" if flags else "greedy")
        results.append(result["returns"])
    assert np.mean(results[0]) == summary["eval_return_mean"]
    assert results[1] == results[2] and len(results[1]) == 2
    videos = sorted((tmp_path / "run" / "videos").iterdir())
    assert [video.name for video in videos] == ["game-0.mp4", "game-1.mp4"]
    for video in videos:
        assert video.read_bytes()[4:8] == b"ftyp" and video.stat().st_size > 3000


@pytest.mark.parametrize("sample", [True, False])
def test_every_step_of_an_evaluation_has_its_own_noise_or_none(sample, lights, monkeypatch):
    """Each of the four games has eight steps."""
    noises, act = [], ppo.act

    def watched(agent, obs, noise):
        noises.append(noise.copy())
        return act(agent, obs, noise)

    monkeypatch.setattr(ppo, "act", watched)
    lights.sample_actions = sample
    ppo.evaluate(Agent(3), lights, Path())
    rng = torch.Generator().manual_seed(2**30 + ppo.stream(1, "evaluation"))
    expected = [ppo.draw_noise((4, 3), rng) * sample for _ in range(8)]
    np.testing.assert_array_equal(noises, expected)


def test_a_weight_that_is_not_finite_stops_the_run(lights, monkeypatch):
    spoil_updates(monkeypatch, ppo, lambda agent: agent.critic.bias)
    lights.total_timesteps = 128
    with pytest.raises(ppo.NonFiniteError, match="weights not finite in update 1"):
        ppo.train(lights)
    assert not (Path(lights.run_dir) / "checkpoint.pt").exists()


def test_each_film_shows_one_game_from_its_first_step_to_its_last(lights, monkeypatch):
    """Three games of 8, 4 and 6 steps."""
    films = {}

    class Film:
        def __init__(self, path):
            self.frames = films.setdefault(path.name, [])

        def write_frame(self, frame):
            self.frames.append(frame)

        def close(self):
            self.frames.append("closed")

    def step(actors, actions):
        given, count = real(actors, actions)[:3], actors.envs.count[0]
        return *given, [(i, 1.0, count) for i, last in enumerate((8, 4, 6)) if last == count]

    real = Actors.step
    monkeypatch.setattr(Actors, "step", step)
    monkeypatch.setattr(ppo, "open_video", Film)
    render = lambda envs, env_ids: [(i, int(envs.count[i])) for i in env_ids]  # noqa: E731
    monkeypatch.setattr(Lights, "render", render, raising=False)
    lights.capture_video, lights.eval_episodes = True, 3
    ppo.evaluate(Agent(3), lights, Path("none"))
    for i, steps in enumerate((8, 4, 6)):
        assert films[f"game-{i}.mp4"] == [*((i, t) for t in range(steps)), "closed"]


def test_the_ranks_of_a_machine_share_its_cores(lights, monkeypatch):
    inside, real = [], ppo.update

    def update(**given):
        inside.append(torch.get_num_threads())
        return real(**given)

    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(ppo, "cores", lambda: 3)
    lights.threads, lights.total_timesteps, folder = 0, 128, lights.run_dir
    for ranks in ("1", "2", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        lights.run_dir = f"{folder}-{ranks}"
        ppo.train(lights)
    assert inside == [3, 1, 1]


def test_an_evaluation_takes_the_first_game_of_each_console(lights, monkeypatch):
    ended = iter([[(0, 1.0, 5)], [(0, 9.0, 5)], [(1, 2.0, 9)]])
    real = Actors.step
    monkeypatch.setattr(Actors, "step", lambda *given: (*real(*given)[:3], next(ended)))
    lights.eval_episodes = 2
    assert ppo.evaluate(Agent(3), lights, Path()) == [1.0, 2.0]


def test_a_saved_policy_is_a_function_of_what_envpool_gives(finished):
    agent, args = ppo.load_agent(str(finished))
    actors = started(ppo, args, 0, 3)
    with torch.no_grad():
        log_probs, _ = agent(torch.from_numpy(actors.obs).permute(0, 2, 3, 1))
    greedy = ppo.load_policy(str(finished))
    for got, expected in (
        (greedy(actors.obs), log_probs),
        (greedy(actors.obs[0]), log_probs[0]),
    ):
        best = ppo.log_prob_of(expected, torch.as_tensor(got))  # or as good, but for rounding
        torch.testing.assert_close(best, expected.max(-1).values, rtol=0, atol=1e-5)
    sampled = ppo.load_policy(str(finished), sample_actions=True)
    actions = np.concatenate([sampled(actors.obs) for _ in range(100)])
    assert set(actions) == {0, 1, 2, 3}  # after 6 updates the policy is still nearly uniform
    assert args.device == "cpu" and not args.compile


def test_training_and_evaluation_make_their_environments_in_one_place(lights, monkeypatch):
    made, real = [], ppo.make_envs

    def make_envs(args, num_envs, *rest):
        made.append(num_envs)
        return real(args, num_envs, *rest)

    monkeypatch.setattr(ppo, "make_envs", make_envs)
    lights.total_timesteps = 128
    ppo.train(lights)
    assert made == [8, 4]


def test_without_bootstrapping_a_time_limit_is_an_end(lights, monkeypatch):
    """What train() hands to gae(), for games that are truncated."""
    handed, real, step = [], ppo.gae, Lights.step

    def truncating(self, actions):
        *rest, terminated, truncated, info = step(self, actions)
        return *rest, truncated, terminated, info | {"terminated": truncated}

    def gae(rewards, values, terminated, truncated, *rest):
        handed.append((terminated, truncated))
        return real(rewards, values, terminated, truncated, *rest)

    monkeypatch.setattr(Lights, "step", truncating)
    monkeypatch.setattr(ppo, "gae", gae)
    lights.total_timesteps, folder = 128, lights.run_dir
    for bootstrap in (True, False):
        lights.bootstrap_truncated, lights.run_dir = bootstrap, f"{folder}{bootstrap}"
        ppo.train(lights)
        terminated, truncated = handed.pop()
        assert truncated.any()
        assert torch.equal(terminated, torch.zeros_like(truncated) if bootstrap else truncated)


def test_a_compiled_run_learns_the_same_from_one_program(finished, main, monkeypatch, tmp_path):
    """Traced as for any device, but run eagerly. Neither annealing nor another update asks for
    another program."""
    programs, real = [], torch.compile

    def keep(program, inputs):
        programs.append([x for x in inputs if not isinstance(x, torch.Tensor)])
        return program.forward

    monkeypatch.setattr(torch, "compile", partial(real, backend=keep))
    assert main(*TINY.split(), "--run-dir", "run", "--compile").code == 0
    # no size is an input: of convolutions of an unknown size, Inductor makes slower ones
    assert programs == [[]]
    ours, theirs = csv_rows(tmp_path / "run" / "metrics.csv"), csv_rows(finished / "metrics.csv")
    for row in (*ours, *theirs):
        del row["charts/SPS"]
    assert ours == theirs


# ------------------------------------------------------------------------- what an edit would break
def edited(folder: Path, old: str, new: str) -> ModuleType:
    """A copy of the script in which `old` is replaced by `new`, imported."""
    text = SCRIPT.read_text()
    assert text.count(old) == 1, old
    path = folder / "ppo_atari.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited_ppo_atari", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


MUTATIONS = {
    "plain means in place of weighted ones": (
        '(term * minibatch["row_weights"]).sum()',
        "term.mean()",
        check_the_loss_is_equation_9_in_closed_form,
    ),
    "reset rows kept": (
        "row_weights = valid /",
        "row_weights = torch.ones_like(valid) /",
        check_reset_rows_change_nothing,
    ),
    "population deviation": ("(count - 1).clamp", "count.clamp", check_standardise),
    "a rollout by another network": (
        "log_probs, values[t] = agent(obs[t])",
        "log_probs, values[t] = agent(255 - obs[t])",
        check_the_first_minibatch_has_ratio_1,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_edit_is_caught(name, tmp_path):
    old, new, check = MUTATIONS[name]
    with pytest.raises(AssertionError):
        check(edited(tmp_path, old, new))


def test_another_activation_in_the_agent_is_played_learned_and_evaluated(tmp_path):
    text = "layer_init(conv3),\n            nn.ReLU(),"
    module = edited(tmp_path, text, text.replace("ReLU", "Tanh"))
    check_the_first_minibatch_has_ratio_1(module)
    torch.manual_seed(0)
    other, agent = module.Agent(4), Agent(4)
    other.load_state_dict(agent.state_dict())
    obs = np.random.default_rng(0).integers(0, 256, (64, 4, 84, 84), np.uint8)
    frames = torch.from_numpy(obs).permute(0, 2, 3, 1)
    with torch.no_grad():
        log_probs, _ = other(frames)
        assert not torch.equal(log_probs, agent(frames)[0])
        assert np.array_equal(module.act(other, obs), log_probs.argmax(-1))


def test_an_action_masked_in_the_agent_is_never_taken_and_learning_stays_finite(tmp_path):
    masked = "logits = self.actor(hidden)\n            logits[..., 2] = -torch.inf\n"
    module = edited(tmp_path, "logits = self.actor(hidden)\n", masked)
    rollout, _, _ = rolled_out(module, 32, 4)
    assert set(rollout["actions"].flatten().tolist()) == {0, 1, 3}
    run = tmp_path / "run"
    agent, _ = module.train(module.parse_args([*TINY.split(), "--run-dir", str(run)]))
    for row in csv_rows(run / "metrics.csv"):
        assert all(math.isfinite(float(row[name])) for name in row if name.startswith("losses/"))
    obs = np.random.default_rng(0).integers(0, 256, (64, 4, 84, 84), np.uint8)
    agent.actor.bias.data[2] = 1e9
    policy = module.load_policy(str(run), sample_actions=True)
    actions = [module.act(agent, obs), policy(obs), policy(obs)]
    assert 2 not in np.concatenate(actions)


def test_a_metric_added_to_the_loss_changes_nothing_that_is_learned(tmp_path):
    _, weights, _ = updated(ppo, recorded(), small(), "clip:0.1")
    metrics, _, _ = updated(ppo, recorded(), small(), "clip:0.1")
    for place in ('"policy_loss": -surrogate,', '"entropy": entropy,'):
        new = f'"ratio": ratio,\n        {place}'
        module = edited(tmp_path, place, new)
        more_metrics, same_weights, _ = updated(module, recorded(), small(), "clip:0.1")
        assert torch.equal(weights, same_weights) and more_metrics.pop("ratio") > 0
        assert more_metrics == metrics


# ----------------------------------------------------------------------------------------- errors
def test_threads_may_stand_beside_resume(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    code, _, err = main("--resume", "run", "--threads", 2)
    assert code == 0 and "threads 2;" in err[0]


FLAGS = {
    "--env-id Breakot-v5": "'Breakot-v5' is none of EnvPool's Atari games, such as Pong-v5; did you"
    " mean Breakout-v5?",
    "--env-id ALE/Pong-v5": "did you mean Pong-v5?",
    "--env-id HalfCheetah-v4": "'HalfCheetah-v4' is none of EnvPool's Atari games",
    "--env-id=": "'' is none of EnvPool's Atari games",
    "--num-envs 9 --num-minibatches 5": "9 x 128 = 1152 steps does not divide into 5 minibatches",
    "--num-envs 1 --num-steps 8": "at least 4 steps",
    "--num-envs 100000 --num-steps 1000": "= 100000000 steps is too large",
    "--total-timesteps 0": "--total-timesteps must be between 1 and",
    "--sticky-actions 1.5": "--sticky-actions must be between 0 and 1, not 1.5",
    "--sticky-actions nan": "--sticky-actions must be between 0 and 1, not nan",
    "--threads -1": "--threads must be between 0 and",
    "--objective clip": "'clip' is no objective",
    "--objective pg": "--objective pg: eq. 2 can use a batch once only: add --update-epochs 1",
    "--objective pg --update-epochs 1": "--num-minibatches 1",
    "--seed -1": "--seed must be between 0",
    "--learning-rate 0": "--learning-rate must be",
    "--max-grad-norm nan": "--max-grad-norm must be",
    "--device cuda": "no CUDA",
    "--device tpu": "--device must be cpu or cuda",
    "--compile": "--compile needs a C++ compiler",
    "--capture-video": "--capture-video needs moviepy",
    "--resume nowhere": "nowhere is not a run folder",
    "--evaluate nowhere": "nowhere is not a run folder",
    "--run-dir /proc/nope": "cannot write to /proc/nope",
}


@pytest.mark.parametrize("command", FLAGS)
def test_a_bad_flag_is_one_line(command, main, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(ppo, "find_spec", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = main(*command.split(" "))
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ") and FLAGS[command] in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "complaint"),
    [("--precision float16", "float16"), ("--anneal-clp", "--anneal-clip")],
)
def test_what_tyro_does_not_understand_it_says_itself(command, complaint, main, tmp_path):
    code, out, err = main(*command.split())
    assert code == 2 and out == [] and complaint in " ".join(err)
    assert list(tmp_path.iterdir()) == []


def test_one_epoch_and_one_minibatch_are_enough_for_the_policy_gradient():
    flags = {"objective": "pg", "update_epochs": 1, "num_minibatches": 1}
    assert check_args(Args(**flags)).num_minibatches == 1


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_bfloat16_where_the_cpu_has_it(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert check_args(Args()).precision == ("bfloat16" if native else "float32")


def test_a_default_run_has_a_checkpoint_every_thousand_updates():
    args = Args()
    ppo.space_checkpoints(args)
    assert args.checkpoint_every == 1000


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--num-envs 2", "2 environments cannot be split over 3 ranks"),
        ("--num-envs 8", "8 environments cannot be split over 3 ranks, each needs the same number"),
        (
            "--num-envs 9 --num-minibatches 128 --num-steps 32",
            "9 x 32 = 288 steps does not divide into 128 minibatches on each of 3 ranks",
        ),
    ],
)
def test_ranks_that_do_not_suit_say_so_before_they_meet(
    flags, complaint, main, monkeypatch, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, out, err = main(*flags.split())
    assert (code, out, len(err)) == (2, [], 1) and complaint in err[0]
    assert list(tmp_path.iterdir()) == []


def test_evaluation_under_torchrun_is_refused(finished, main, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    code, out, err = main("--evaluate", "run")
    said = "error: an agent is evaluated by one process: start it without torchrun"
    assert (code, out, err) == (2, [], [said])
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_folder_of_another_script_is_refused(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config |= {"script": "ppo_cartpole", "args": {}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "a run of ppo_cartpole.py, not of ppo_atari.py" in main("--resume", "run").err[0]
    beside = main("--evaluate", "run", "--seed", "2").err[0]
    assert "--seed cannot stand beside --evaluate" in beside
    assert os.listdir(tmp_path) == ["run"]


# -------------------------------------------------------------------------------------- benchmark/
def test_the_documented_runs_can_be_made_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(atari, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(atari, "RESULTS", tmp_path / "results")
    tasks = {}
    for name in ("float32", "bfloat16"):
        tasks[name] = atari.Task("toy", f"{TINY} --precision {name}", 1)
    monkeypatch.setattr(atari, "TASKS", tasks)
    with pytest.raises(FileNotFoundError):
        atari.main(["--report"])
    atari.main(["--runs", "float32"])
    first = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert set(first) == {"runs.csv", "curves.csv", "summary.md", "toy.png"}
    (row,) = read_csv(tmp_path / "results" / "runs.csv")
    assert (row["run"], row["precision"], row["total_timesteps"]) == ("float32", "float32", "1536")
    assert int(row["games"]) > 0
    assert f"| {float(row['mean_return']):.1f} |" in first["summary.md"].decode()
    assert b"Not run yet:\n\n    python ppo_atari.py" in first["summary.md"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    atari.main(["--runs", "float32"])  # is left alone
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    atari.main(["--report"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()} == first
    shutil.rmtree(tmp_path / "runs" / "float32")
    atari.main(["--runs", "bfloat16"])  # of the other one, what the CSVs have stays
    assert read_csv(tmp_path / "results" / "runs.csv")[0] == row
    assert b"Not run yet" not in (tmp_path / "results" / "summary.md").read_bytes()
    changed = f"{TINY} --precision bfloat16 --gamma 0.9"
    monkeypatch.setitem(tasks, "bfloat16", atari.Task("toy", changed, 1))
    with pytest.raises(UserError, match=r"gamma 0\.99 instead of 0\.9"):
        atari.main(["--runs", "bfloat16"])
