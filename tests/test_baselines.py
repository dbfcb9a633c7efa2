"""benchmark/baselines/ and benchmark/figure3.py: the mathematics by hand, tiny runs, the report."""

import copy
import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import spy_on_restarts, weights_of
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import ppo_continuous as ppo
from benchmark import UserError, baselines, figure3, sweep
from benchmark.baselines import a2c, cem, trpo, vpg

PENDULUM = "--env-id InvertedPendulum-v4 --env-backend envpool --eval-episodes 1"
MODULES = {"trpo": trpo, "vpg": vpg, "a2c": a2c, "cem": cem}


@pytest.fixture(autouse=True)
def one_thread():
    """As in main() of the scripts: the bits of orthogonal weights depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_agent(hidden: int = 64, seed: int = 0) -> ppo.Agent:
    """Three observations, two actions; mean actions that differ."""
    torch.manual_seed(seed)
    agent = ppo.Agent(3, 2, obs_clip=5.0, log_std=-0.3)
    agent.actor = baselines.mlp(3, (hidden, hidden), 2, gain=1.0)
    agent.critic = baselines.mlp(3, (hidden, hidden), 1, gain=1.0)
    return agent


@torch.no_grad()
def make_batch(agent: ppo.Agent, rows: int = 160, scale: float = 1.0) -> dict[str, Tensor]:
    """A batch of this agent's own actions, with advantages and returns that mean nothing."""
    obs = torch.randn(rows, 3, dtype=torch.float64)
    mean, log_std = agent.policy(obs)
    actions = mean + log_std.exp() * torch.randn(rows, 2)
    return {
        "obs": obs,
        "actions": actions,
        "mean": mean,
        "log_std": log_std,
        "log_prob": ppo.log_prob_of(mean, log_std, actions),
        "values": agent.value(obs),
        "advantages": scale * torch.randn(rows),
        "returns": torch.randn(rows),
        "valid": torch.ones(rows, dtype=torch.bool),
    }


def run(name: str, flags: str, folder: Path) -> dict:
    """Train. Returns the summary."""
    module = MODULES[name]
    return module.train(module.parse_args([*flags.split(), "--run-dir", str(folder)]))[1]


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------- SETTINGS
SHARED = {"num_envs": 1, "obs_clip": 5.0, "clip_actions": False, "gamma": 0.99, "hidden": 64}
FIT = {"value_epochs": 5, "value_minibatch": 64, "value_learning_rate": 1e-3}
PUBLISHED = {
    # OpenAI baselines da99706 (July 2017), trpo_mpi; 64 hidden units are the paper's
    "trpo": SHARED
    | FIT
    | {
        "num_steps": 1024,
        "gae_lambda": 0.98,
        "sigma": "learned",
        "max_kl": 0.01,
        "cg_iterations": 10,
        "damping": 0.1,
        "fisher_every": 5,
        "line_search_tries": 10,
    },
    # baselines 3f676f7 (August 2017), acktr_cont; the step size is that of cs294-112, hw4
    "vpg": SHARED
    | FIT
    | {"num_steps": 2500, "gae_lambda": 0.97, "learning_rate": 1e-3, "kl_target": 0.002},
    # baselines 3f676f7, a2c, with 1/2 in its mse; delta and average of its acer
    "a2c": SHARED
    | {
        "num_envs": 16,
        "num_steps": 5,
        "gae_lambda": 1.0,
        "learning_rate": 7e-4,
        "decay": 0.99,
        "eps": 1e-5,
        "vf_coef": 0.25,
        "ent_coef": 0.01,
        "max_grad_norm": 0.5,
        "trust_region": False,
        "delta": 1.0,
        "average": 0.99,
    },
    # modular_rl; that actions are clipped is a guess
    "cem": {
        "num_envs": 50,
        "obs_clip": 5.0,
        "clip_actions": True,
        "action_std": 0.0,
        "candidates": 200,
        "elite": 0.2,
        "std": 1.0,
        "extra_std": 0.01,
        "extra_generations": 150,
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_the_settings_are_what_their_sources_say(name):
    """All that is no matter of the run: what a change elsewhere must not change."""
    run_flags = "env_id seed total_timesteps env_backend eval_episodes run_dir resume track"
    run_flags += " wandb_project checkpoint_every"
    settings = asdict(MODULES[name].Args())
    assert {x: settings[x] for x in settings if x not in run_flags.split()} == PUBLISHED[name]
    assert cem.HIDDEN == (10, 5)
    assert not MODULES[name].Args.sample_actions  # evaluations are greedy


def first_agent(name: str, flags: str) -> ppo.Agent:
    """The agent that a run with these flags begins with."""
    args = baselines.check_args(MODULES[name].parse_args(flags.split()))
    make_agent = cem.make_agent if name == "cem" else baselines.make_agent
    return make_agent(args, ppo.Actors(args, args.num_envs))


def test_an_agent_is_that_of_its_flags():
    """With 64 units it is that of ppo_continuous.py."""
    args = ppo.preset("paper", env_id="InvertedPendulum-v4", env_backend="envpool", seed=3)
    with ppo.torch_threads(1):  # as in training: the bits of the weights depend on it
        agent = first_agent("vpg", f"{PENDULUM} --seed 3 --obs-clip 2")
        script = ppo.begin(args, ppo.Actors(args, 1), None)[1]["agent"]
    assert torch.equal(weights_of(agent), weights_of(script)) and agent.obs_clip == 2
    small = first_agent("vpg", f"{PENDULUM} --hidden 32")
    assert small.actor[0].weight.shape == small.critic[0].weight.shape == (32, 4)
    for net, gain in ((small.actor, 0.01), (small.critic, 1.0)):  # one output: one row, its norm
        assert net[-1].weight.norm().item() == pytest.approx(gain, rel=1e-4)
    one, other = (first_agent("cem", f"{PENDULUM} --obs-clip 2 --seed {seed}") for seed in (3, 4))
    assert one.obs_clip == 2 and not torch.equal(weights_of(one), weights_of(other))


# ------------------------------------------------------------------------------- WHAT THEY SHARE
def test_the_kl_is_that_of_the_old_policy_from_the_new_one():
    """Sigma doubles: log 2 + 1/8 - 1/2 in each of two actions."""
    agent = make_agent()
    batch = make_batch(agent)
    with torch.no_grad():
        agent.log_std += np.log(2)
        kl = baselines.mean_kl(agent, batch).item()
    assert kl == pytest.approx(2 * (np.log(2) + 1 / 8 - 1 / 2), rel=1e-4)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_a_batch_by_hand(end):
    """An episode of two steps, a reset step, and a step of the next episode."""
    agent = make_agent()
    agent.obs_stats.update(2 + torch.randn(100, 3))
    rollout = {
        "obs": 2 + torch.randn(5, 1, 3, dtype=torch.float64),
        "actions": torch.randn(4, 1, 2),
        "rewards": torch.tensor([[1.0], [2.0], [0.0], [4.0]]),
        "terminated": torch.zeros(4, 1, dtype=torch.bool),
        "truncated": torch.zeros(4, 1, dtype=torch.bool),
        "valid": torch.tensor([[True], [True], [False], [True]]),
    }
    rollout[end][1] = True
    batch = baselines.make_batch(agent, rollout, vpg.Args(gamma=0.9, gae_lambda=0.5))
    v = agent.value(rollout["obs"]).flatten().tolist()
    assert min(v[1], v[2], v[4]) > 0.05
    second = 2 - v[1]  # a time limit is an end
    first = 1 + 0.9 * v[1] - v[0] + 0.9 * 0.5 * second
    third = 4 + 0.9 * v[4] - v[3]
    assert batch["advantages"].tolist() == pytest.approx([first, second, third], abs=1e-5)
    returns = [first + v[0], second + v[1], third + v[3]]
    assert batch["returns"].tolist() == pytest.approx(returns, abs=1e-5)
    mean, log_std = agent.policy(rollout["obs"][[0, 1, 3], 0])
    expected = ppo.log_prob_of(mean, log_std, rollout["actions"][[0, 1, 3], 0])
    torch.testing.assert_close(batch["log_prob"], expected)
    torch.testing.assert_close(batch["mean"], mean)


def test_the_value_function_is_fitted_to_the_returns():
    """The loss of one minibatch of all rows, before its step; then many steps."""
    agent = make_agent()
    batch = make_batch(agent)
    batch["obs"] = 100 + 5 * batch["obs"]
    agent.obs_stats.update(batch["obs"])
    batch["returns"] = 2 + agent.normalise(batch["obs"])[:, 0]
    optimizer = baselines.value_optimizer(agent, 1e-2)
    parts = {"agent": agent, "value_optimizer": optimizer, "minibatch_rng": torch.Generator()}
    before = (agent.value(batch["obs"]) - batch["returns"]).square().mean().item()
    args = vpg.Args(value_epochs=1, value_minibatch=160)
    assert baselines.fit_value(parts, batch, args) == pytest.approx(before, rel=1e-4)
    baselines.fit_value(parts, batch, replace(args, value_epochs=60))
    assert before > 1 and (agent.value(batch["obs"]) - batch["returns"]).abs().mean() < 0.2


def test_the_value_function_sees_whole_minibatches_of_shuffled_rows():
    agent = make_agent()
    batch = make_batch(agent)
    seen = []
    agent.critic.register_forward_pre_hook(lambda critic, given: seen.append(given[0]))
    rng = torch.Generator().manual_seed(7)
    optimizer = baselines.value_optimizer(agent, 1e-3)
    parts = {"agent": agent, "value_optimizer": optimizer, "minibatch_rng": rng}
    baselines.fit_value(parts, batch, vpg.Args(value_epochs=2, value_minibatch=64))
    rng.manual_seed(7)
    obs, expected = agent.normalise(batch["obs"]), []
    for _ in range(2):
        order = torch.randperm(160, generator=rng)
        expected += [obs[order[:64]], obs[order[64:128]]]
    assert len(seen) == 4 and torch.equal(torch.stack(seen), torch.stack(expected))


def test_the_loop_draws_from_its_streams_and_updates_the_statistics_first(tmp_path, monkeypatch):
    """Its learn() raises log sigma by 0.1, whose KL is in every row of metrics.csv."""
    seeds, seen = spy_on_restarts(monkeypatch, ppo), []
    flags = f"{PENDULUM} --num-steps 16 --total-timesteps 48 --checkpoint-every 1 --run-dir"
    args = vpg.parse_args([*flags.split(), str(tmp_path / "run")])

    def learn(parts, batch, state, args):
        agent = parts["agent"]
        with torch.no_grad():
            torch.testing.assert_close(batch["values"], agent.value(batch["obs"]))
            torch.testing.assert_close(batch["mean"], agent.policy(batch["obs"])[0])
            agent.log_std += 0.1
        for part, name in (("action_rng", "actions"), ("minibatch_rng", "minibatches")):
            assert parts[part].initial_seed() == ppo.stream(args.seed, name)
        seen.append(batch["obs"])
        assert agent.obs_stats.count == sum(map(len, seen))
        torch.testing.assert_close(agent.obs_stats.mean, torch.cat(seen).mean(0))
        return {}, {}

    agent, summary = baselines.train(args, lambda agent, args: {}, learn)
    assert agent.obs_stats.count == summary["transitions"] < 48  # reset steps do not count
    assert seeds[:3] == [ppo.stream(1, "environments", i) for i in range(3)]
    kls = [float(row["losses/kl_after_update"]) for row in rows(tmp_path / "run/metrics.csv")]
    assert kls == pytest.approx([0.1 + np.exp(-0.2) / 2 - 1 / 2] * 3, rel=1e-3)


def test_a_number_that_is_not_finite_stops_the_run(tmp_path):
    flags = "--env-id GoesBlind-v0 --env-backend gymnasium --num-steps 64"
    with pytest.raises(ppo.NonFiniteError, match="obs not finite in update 1"):
        run("vpg", flags, tmp_path / "blind")
    saved = ppo.load_checkpoint(tmp_path / "blind/checkpoint.pt", "vpg")
    assert saved["state"]["updates"] == 0

    flags = f"{PENDULUM} --num-steps 16 --total-timesteps 16 --run-dir {tmp_path / 'loss'}"
    args = vpg.parse_args(flags.split())
    with pytest.raises(ppo.NonFiniteError, match="loss not finite in update 1"):
        baselines.train(args, lambda *_: {}, lambda *_: ({}, {"loss": np.nan}))


# ------------------------------------------------------------------------------------------ TRPO
def test_the_surrogate_is_the_mean_of_ratio_times_advantage():
    agent = make_agent()
    batch = make_batch(agent)
    batch["log_prob"] -= np.log(2)  # the old policy was half as likely to do so
    told = trpo.surrogate(agent, batch).item()
    assert told == pytest.approx(2 * batch["advantages"].mean().item(), rel=1e-4)


class MeanKL(nn.Module):
    def __init__(self, agent: ppo.Agent):
        super().__init__()
        self.agent = agent

    def forward(self, batch):
        return baselines.mean_kl(self.agent, batch)


@pytest.mark.parametrize("sigma", ["learned", "frozen"])
def test_fisher_product_is_that_of_the_hessian_of_the_kl(sigma):
    agent = make_agent(hidden=3)
    batch = make_batch(agent)
    weights = trpo.trained_weights(agent, trpo.Args(sigma=sigma))
    product = trpo.fisher_product(agent, batch, weights, damping=0.1)
    count = len(parameters_to_vector(weights))
    assert count == (3 * 3 + 3) + (3 * 3 + 3) + (3 * 2 + 2) + (2 if sigma == "learned" else 0)

    module = MeanKL(agent)
    names = {id(weight): name for name, weight in module.named_parameters()}
    mine = {names[id(weight)]: weight for weight in weights}

    def kl(vector: Tensor) -> Tensor:
        parts = vector.split([weight.numel() for weight in mine.values()])
        given = {name: part.view_as(mine[name]) for name, part in zip(mine, parts, strict=True)}
        return torch.func.functional_call(module, given, (batch,))

    hessian = torch.autograd.functional.hessian(kl, parameters_to_vector(weights).detach())
    assert hessian.abs().max() > 0.1
    for v in torch.randn(5, count):
        expected = hessian @ v + 0.1 * v
        torch.testing.assert_close(product(v), expected, rtol=1e-3, atol=1e-4)


def test_conjugate_gradient_is_a_direct_solution():
    root = torch.randn(10, 10, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(10)
    b = torch.randn(10, dtype=torch.float64)
    x, residual = trpo.conjugate_gradient(lambda v: matrix @ v, b, iterations=20)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-4)
    assert residual < 1e-5
    few, left = trpo.conjugate_gradient(lambda v: matrix @ v, b, iterations=3)
    assert left == pytest.approx((b - matrix @ few).norm().item(), rel=1e-6)
    assert left > residual


@pytest.mark.parametrize("sigma", ["learned", "frozen"])
@pytest.mark.parametrize("max_kl", [1e-4, 1.0, 1000.0])
def test_a_step_has_the_length_it_was_given_or_a_half_or_a_quarter_of_it(max_kl, sigma):
    """To second order its KL on the subset is max_kl, with the damping. Far off neither holds."""
    args = trpo.Args(sigma=sigma, max_kl=max_kl)
    halvings = []
    for seed in range(4):
        agent = make_agent(hidden=16, seed=seed)
        batch = make_batch(agent)
        old = copy.deepcopy(agent)
        told = trpo.trust_region_step(agent, batch, args)
        kl = baselines.mean_kl(agent, batch).item()
        assert told["accepted"] and 0 < kl <= 1.5 * max_kl and told["surrogate_gain"] >= 0
        after = agent.state_dict()
        changed = [name for name, x in old.state_dict().items() if not torch.equal(x, after[name])]
        assert ("log_std" in changed) == (sigma == "learned")
        assert not [name for name in changed if name.startswith("critic")]

        weights, moved = (trpo.trained_weights(each, args) for each in (old, agent))
        step = parameters_to_vector(moved) - parameters_to_vector(weights)
        subset = {name: x[::5] for name, x in batch.items()}
        product = trpo.fisher_product(old, subset, weights, args.damping)
        length = 0.5 * (step @ product(step)).item()
        assert length == pytest.approx(max_kl * 0.25 ** told["backtracks"], rel=1e-3)
        halvings.append(told["backtracks"])
    if max_kl == 1e-4:  # so small that both expansions hold
        assert halvings == [0] * 4
    if max_kl == 1000:
        assert max(halvings) > 2


def test_the_step_is_that_of_the_whole_fisher_matrix():
    """Solved directly: sqrt(2 delta / x.g) x with (F + damping I) x = g."""
    agent, args = make_agent(3), trpo.Args(max_kl=1e-4, fisher_every=1, cg_iterations=100)
    batch, weights = make_batch(agent), trpo.trained_weights(agent, args)
    product = trpo.fisher_product(agent, batch, weights, args.damping)
    matrix = torch.stack([product(v) for v in torch.eye(len(parameters_to_vector(weights)))])
    g = baselines.flat_gradient(trpo.surrogate(agent, batch), weights)
    x = torch.linalg.solve(matrix, g)
    before = parameters_to_vector(weights).detach().clone()
    trpo.trust_region_step(agent, batch, args)
    step = parameters_to_vector(weights).detach() - before
    torch.testing.assert_close(step, (2 * args.max_kl / (x @ g)).sqrt() * x, rtol=0, atol=1e-5)


def test_a_step_is_halved_until_the_kl_of_the_whole_batch_is_small(monkeypatch):
    """At most 1.5 times max_kl, 0.015."""
    kls, sizes = iter([0.0151, 0.0149]), []

    def kl(agent, batch):
        sizes.append(len(batch["obs"]))
        return torch.tensor(next(kls))

    monkeypatch.setattr(trpo, "fisher_product", lambda *_: lambda v: v)
    monkeypatch.setattr(trpo, "mean_kl", kl)
    agent = make_agent(16)
    told = trpo.trust_region_step(agent, make_batch(agent), trpo.Args())
    assert (told["accepted"], told["backtracks"], sizes) == (1, 1, [160, 160])


def test_trpo_learns_from_standardised_advantages(monkeypatch):
    """And fits the value function to the returns as they are."""
    agent = make_agent()
    batch = make_batch(agent, scale=10.0)
    seen = []
    monkeypatch.setattr(trpo, "trust_region_step", lambda *given: seen.append(given[1]) or {})
    monkeypatch.setattr(baselines, "fit_value", lambda *given: seen.append(given[1]) or 0.0)
    trpo.learn({"agent": agent}, batch, {}, trpo.Args())
    torch.testing.assert_close(seen[0]["advantages"], ppo.standardise(batch["advantages"]))
    assert seen[1]["returns"] is batch["returns"] and len(seen) == 2


def test_a_step_that_is_not_accepted_is_taken_back():
    """One size, far beyond where the expansions hold; and then no gradient at all."""
    agent = make_agent(hidden=16)
    batch = make_batch(agent)
    before = copy.deepcopy(agent.state_dict())
    told = trpo.trust_region_step(agent, batch, trpo.Args(max_kl=1e6, line_search_tries=1))
    assert (told["accepted"], told["surrogate_gain"]) == (0.0, 0.0)
    batch["advantages"] = torch.zeros(len(batch["obs"]))  # no gradient: the step is 0 / 0
    told = trpo.trust_region_step(agent, batch, trpo.Args())
    assert (told["accepted"], told["surrogate_gain"]) == (0.0, 0.0)
    assert all(torch.equal(before[name], x) for name, x in agent.state_dict().items())


# ------------------------------------------------------------------------------------------- VPG
def test_the_step_size_follows_the_kl():
    assert vpg.adapt_step_size(3e-3, 0.0041, 0.002) == pytest.approx(2e-3)
    assert vpg.adapt_step_size(2e-3, 0.0009, 0.002) == pytest.approx(3e-3)
    for kl in (0.0039, 0.0011):
        assert vpg.adapt_step_size(2e-3, kl, 0.002) == 2e-3
    assert vpg.adapt_step_size(1e-8, 1.0, 0.002) == 1e-8
    assert vpg.adapt_step_size(1.0, 0.0, 0.002) == 1.0


def test_vpgs_next_step_size_is_set_by_the_kl_of_this_step():
    """Any step is too large for this target."""
    agent = make_agent(hidden=8)
    batch, args = make_batch(agent), vpg.Args(value_epochs=1, kl_target=1e-9)
    rng = torch.Generator().manual_seed(0)
    parts = {"agent": agent, "minibatch_rng": rng, **vpg.make_optimizers(agent, args)}
    vpg.learn(parts, batch, {}, args)
    assert parts["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3 / 1.5)


def test_vpg_takes_the_gradient_of_ppos_pg_objective():
    """eq. 2 in ppo_continuous.py, with the policy's weights alone."""
    agent = make_agent(hidden=8)
    batch = make_batch(agent)
    args = vpg.Args(value_epochs=1, kl_target=1.0)
    rng = torch.Generator().manual_seed(0)
    parts = {"agent": agent, "minibatch_rng": rng, **vpg.make_optimizers(agent, args)}
    flags = ppo.Args(norm_adv="minibatch", vf_coef=0.0, max_grad_norm=float("inf"))
    expected, _ = ppo.gradient(agent, batch, ppo.parse_objective("pg"), 0.0, flags)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    charts, _ = vpg.learn(parts, batch, {}, args)
    (weights,) = parts["optimizer"].param_groups[0]["params"]
    torch.testing.assert_close(weights.grad, expected[: len(weights)])
    changed = {name for name, x in agent.state_dict().items() if not torch.equal(before[name], x)}
    assert {"log_std", "actor.0.weight", "critic.0.weight"} <= changed
    assert charts["learning_rate"] == 1e-3  # of this step; the KL was small, so the next is larger
    assert parts["optimizer"].param_groups[0]["lr"] == pytest.approx(1.5e-3)


# ------------------------------------------------------------------------------------------- A2C
@pytest.mark.parametrize("updates", [0, 1])
def test_a2c_is_ppo_with_one_epoch_of_one_minibatch(updates):
    """With the same optimiser, both updates lead to the same weights (Huang et al. 2022).

    Of two updates, the second has half the step size.
    """
    ours = make_agent(hidden=16)
    args = a2c.Args(total_timesteps=160)
    parts = {"agent": ours, **a2c.make_optimizers(ours, args)}
    theirs = copy.deepcopy(ours)
    batch = make_batch(ours, rows=80, scale=10.0)
    flags = ppo.Args(update_epochs=1, num_minibatches=1, norm_adv="none")
    flags = replace(flags, vf_coef=args.vf_coef, ent_coef=args.ent_coef, max_grad_norm=0.5)
    optimizer = a2c.RMSprop(ppo.one_vector(theirs), args.decay, args.eps)
    learning_rate = args.learning_rate / (1 + updates)
    optimizer.param_groups[0]["lr"] = learning_rate
    before = parameters_to_vector(ours.parameters()).detach().clone()
    ppo.update(
        agent=theirs,
        optimizer=optimizer,
        batch=batch,
        objective=ppo.parse_objective("clip:0.2"),
        beta=0.0,
        args=flags,
        rng=torch.Generator().manual_seed(1),
    )
    charts, losses = a2c.learn(parts, batch, {"updates": updates}, args)
    assert charts["learning_rate"] == learning_rate and losses["grad_norm"] > 0.5
    moved = parameters_to_vector(ours.parameters()) - before
    expected = parameters_to_vector(theirs.parameters()) - before
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


def test_a_small_gradient_is_not_made_longer():
    agent = make_agent()
    batch = make_batch(agent, scale=1e-3)
    batch["returns"] = batch["values"]
    gradient, means = a2c.gradient(agent, agent, batch, a2c.Args())
    assert gradient.norm().item() == pytest.approx(means["grad_norm"], rel=1e-4)
    assert gradient.norm() < 0.5


def test_rmsprop_starts_with_squares_of_one_and_eps_under_the_root():
    weights = nn.Parameter(torch.zeros(3))
    optimizer = a2c.RMSprop(weights, decay=0.99, eps=1e-5)
    optimizer.param_groups[0]["lr"] = 0.1
    square, expected = np.ones(3), np.zeros(3)
    for g in ([1.0, -2.0, 0.01], [0.5, 0.0, 0.01]):
        weights.grad = torch.tensor(g)
        optimizer.step()
        square = 0.99 * square + 0.01 * np.square(g)
        expected -= 0.1 * np.array(g) / np.sqrt(square + 1e-5)
        assert weights.detach().numpy() == pytest.approx(expected, rel=1e-5)
    again = a2c.RMSprop(nn.Parameter(torch.zeros(3)), 0.99, 1e-5)
    again.load_state_dict(optimizer.state_dict())
    (state,) = again.state.values()
    assert state["square"].numpy() == pytest.approx(square)


def test_projection_in_closed_form_and_idle_where_the_constraint_holds():
    g, k = torch.randn(2, 50, 4, dtype=torch.float64)
    z = a2c.project(g, k, delta=0.5)
    idle = (k * g).sum(-1) <= 0.5
    assert 10 < idle.sum() < 40
    assert torch.equal(z[idle], g[idle])
    # elsewhere on the border, and straight from g along k: no point within is nearer
    torch.testing.assert_close((k * z).sum(-1)[~idle], torch.full_like(z[~idle, 0], 0.5))
    step = (g - z)[~idle]
    along = (step * k[~idle]).sum(-1)
    assert (along > 0).all()
    torch.testing.assert_close(along, step.norm(dim=-1) * k[~idle].norm(dim=-1))


def test_the_gradient_by_the_distribution_is_projected():
    """Against the closed form of k, where the average policy is far away."""
    args = a2c.Args(trust_region=True, delta=0.1, ent_coef=0.0)
    agent, average = make_agent(seed=0), make_agent(seed=1)
    average.log_std.data += 0.5
    batch = make_batch(agent, rows=40)
    mean, log_std = agent.policy(batch["obs"])
    theirs = average.actor(agent.normalise(batch["obs"])).detach()
    std = average.log_std.detach().expand_as(mean).exp()
    objective = ppo.log_prob_of(mean, log_std, batch["actions"]) * batch["advantages"]
    pair = (mean, log_std), (theirs, std.log())
    term, told = a2c.within_trust_region(objective, *pair, args.delta)
    found = torch.cat(torch.autograd.grad(term.sum(), (mean, log_std)), -1)

    mean, log_std = mean.detach(), log_std.detach()
    variance, apart = (2 * log_std).exp(), mean - theirs
    k = torch.cat([apart / variance, 1 - (std.square() + apart.square()) / variance], -1)
    z = batch["actions"] - mean
    g = torch.cat([z / variance, z.square() / variance - 1], -1) * batch["advantages"][:, None]
    torch.testing.assert_close(found, a2c.project(g, k, 0.1), rtol=1e-4, atol=1e-4)
    assert 0 < told["projected"] < 1
    _, metrics = a2c.gradient(agent, average, batch, args)
    assert metrics["projected"] == pytest.approx(told["projected"].item())
    kl = log_std - std.log() + ((2 * std.log()).exp() + apart.square()) / (2 * variance) - 0.5
    # KL[average, current] of a Gaussian, the mean over states
    assert metrics["kl_from_average"] == pytest.approx(kl.sum(-1).mean().item(), rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(-objective.mean().item(), rel=1e-4)


def test_near_the_average_policy_the_trust_region_is_idle():
    agent = make_agent()
    batch = make_batch(agent)
    plain, _ = a2c.gradient(agent, copy.deepcopy(agent), batch, a2c.Args())
    args = a2c.Args(trust_region=True)
    same, metrics = a2c.gradient(agent, copy.deepcopy(agent), batch, args)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-6)
    assert metrics["projected"] == 0
    far, metrics = a2c.gradient(agent, make_agent(seed=5), batch, args)
    assert metrics["projected"] > 0 and not torch.allclose(far, plain, rtol=1e-2)


def test_the_average_policy_follows_slowly():
    agent = make_agent(hidden=8)
    args = a2c.Args(average=0.9, learning_rate=0.1, trust_region=True)
    parts = {"agent": agent, **a2c.make_optimizers(agent, args)}
    before = parameters_to_vector(baselines.policy_of(agent)).detach().clone()
    a2c.learn(parts, make_batch(agent), {"updates": 0}, args)
    moved = parameters_to_vector(baselines.policy_of(agent)) - before
    followed = parameters_to_vector(baselines.policy_of(parts["average"])) - before
    assert moved.abs().max() > 1e-3 and parts["average"].obs_stats is agent.obs_stats
    torch.testing.assert_close(followed, 0.1 * moved, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------- CEM
def test_cem_finds_the_top_of_a_quadratic():
    target = torch.tensor([3.0, -2.0, 0.5, 0.0, 1.0])
    search = cem.Search(torch.zeros(5), std=1.0)
    rng = torch.Generator().manual_seed(0)
    for generation in range(60):
        extra = 0.1 * max(0.0, 1 - generation / 20)
        candidates = search.draw(100, extra, rng)
        search.update(candidates, -(candidates - target).square().sum(-1).numpy(), 20)
    torch.testing.assert_close(search.mean, target, rtol=0, atol=0.01)
    assert search.variance.max() < 1e-4


def test_the_best_make_the_next_mean_and_variance():
    search = cem.Search(torch.zeros(1), std=2.0)
    assert search.variance.item() == 4
    candidates = torch.tensor([[1.0], [2.0], [4.0], [8.0], [10.0]])
    search.update(candidates, np.array([0.0, 5.0, 1.0, 7.0, 2.0]), num_elite=2)
    assert (search.mean.item(), search.variance.item()) == (5, 9)
    draws = search.draw(20_000, 7.0, torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(5, abs=0.1)
    assert draws.var().item() == pytest.approx(9 + 7, rel=0.05)


class Payer(gym.Env):
    """Observes 1, pays the action, and lets an episode last longer the higher its first one is."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float64)
    action_space = gym.spaces.Box(-9, 9, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.ones(1), {}

    def step(self, action):
        self.count += 1
        terminated = self.count >= 5 + np.clip(3 * action[0], -4, 14)
        return np.ones(1), float(action[0]), terminated, False, {}


gym.register("Payer-v0", Payer, max_episode_steps=1000)


def generation(flags: str, count: int) -> tuple:
    """An agent, so many candidates around its weights, and the environments of these flags."""
    args = baselines.check_args(cem.parse_args(flags.split()))
    actors = ppo.Actors(args, args.num_envs)
    agent = cem.make_agent(args, actors)
    weights = parameters_to_vector(agent.actor.parameters()).detach()
    candidates = cem.Search(weights, 1.0).draw(count, 0.0, torch.Generator().manual_seed(3))
    return agent, candidates, actors


def play_generation(agent, candidates, actors, action_std=0.0, first=False) -> tuple:
    rng = torch.Generator().manual_seed(4)
    return cem.play_generation(agent, candidates, actors, action_std, rng, first)


def test_every_candidate_plays_one_episode_of_its_own(tmp_path):
    """11 candidates in 3 environments, in which their episodes end at different times."""
    flags = "--env-id Payer-v0 --num-envs 3 --candidates 11 --env-backend gymnasium"
    agent, candidates, actors = generation(flags, 11)
    actors.restart(0)
    cem.check_policy(agent, candidates)
    expected = []
    for candidate in candidates:
        nn.utils.vector_to_parameters(candidate.clone(), agent.actor.parameters())
        expected.append(ppo.act(agent, np.ones(1)).item())
    returns, lengths, stats = play_generation(agent, candidates, actors)
    assert len(set(lengths.tolist())) > 4
    assert lengths.tolist() == [np.ceil(5 + np.clip(3 * a, -4, 14)) for a in expected]
    assert returns == pytest.approx(np.array(expected) * lengths, rel=1e-4)
    assert stats.count == lengths.sum() and agent.obs_stats.count == 0

    run("cem", f"{flags} --total-timesteps 150 --eval-episodes 1", tmp_path / "run")
    episodes = rows(tmp_path / "run/episodes.csv")
    ends = [int(row["global_step"]) for row in episodes]
    assert ends == np.cumsum([int(row["length"]) for row in episodes]).tolist()
    metrics = rows(tmp_path / "run/metrics.csv")
    assert [int(row["global_step"]) for row in metrics] == ends[10::11]
    assert len(metrics) > 1 and ends[-1] >= 150 > ends[-12]


@pytest.mark.parametrize("clip, low, high", [("", -130, -60), ("--no-clip-actions", -900, -300)])
def test_clipped_the_first_generation_begins_where_the_papers_curve_does(clip, low, high, tmp_path):
    """On Reacher, whose reward has the squared action with a minus: -95 in the paper."""
    flags = f"--env-id Reacher-v4 --total-timesteps 10000 --eval-episodes 1 {clip}"
    run("cem", flags, tmp_path / "run")
    returns = [float(row["return"]) for row in rows(tmp_path / "run/episodes.csv")]
    assert len(returns) == 200 and low < np.mean(returns) < high


class Blind(Payer):
    """Observes NaN in the end, and pays on."""

    def step(self, action):
        obs, *rest = super().step(action)
        return np.where(self.count >= 4, np.nan, obs), *rest


gym.register("GoesBlind-v0", Blind, max_episode_steps=1000)


def test_a_generation_that_fails_leaves_the_filter_as_it_was(tmp_path):
    flags = "--env-id GoesBlind-v0 --num-envs 3 --candidates 11 --env-backend gymnasium"
    with pytest.raises(ppo.NonFiniteError, match="obs not finite in update 1"):
        run("cem", flags, tmp_path / "run")
    assert ppo.load_checkpoint(tmp_path / "run/checkpoint.pt", "cem")["state"]["updates"] == 0
    agent, candidates, actors = generation(flags, 11)
    actors.restart(0)
    *_, stats = play_generation(agent, candidates, actors)
    assert stats.mean.isnan().all() and agent.obs_stats.mean.isfinite().all()


def test_only_the_first_generation_changes_its_filter_while_it_plays(tmp_path, monkeypatch):
    filters, batched_policy = [], cem.batched_policy

    def spy(layers, mean, std, obs_clip):
        filters.append(mean[0])
        return batched_policy(layers, mean, std, obs_clip)

    monkeypatch.setattr(cem, "batched_policy", spy)
    agent, candidates, actors = generation(f"{PENDULUM} --num-envs 10", 20)
    for first in (True, False):
        filters.clear()
        actors.restart(0)
        before = agent.obs_stats.mean[0].item()
        *_, agent.obs_stats = play_generation(agent, candidates, actors, first=first)
        assert agent.obs_stats.mean[0].item() != before
        assert (len(set(filters)) == len(filters) > 1) if first else set(filters) == {before}

    firsts, counts, original = [], [], cem.play_generation

    def watched(agent, candidates, actors, action_std, rng, first):
        firsts.append(first)
        counts.append(agent.obs_stats.count.item())
        assert action_std == 0.5 and rng.initial_seed() == ppo.stream(1, "actions")
        return original(agent, candidates, actors, action_std, rng, first)

    monkeypatch.setattr(cem, "play_generation", watched)
    flags = f"{PENDULUM} --num-envs 10 --candidates 20 --total-timesteps 500 --action-std 0.5"
    run("cem", flags, tmp_path / "run")
    assert len(firsts) > 1 and firsts[0] and not any(firsts[1:])
    steps = [int(row["global_step"]) for row in rows(tmp_path / "run/metrics.csv")]
    assert counts == [0, *steps[:-1]]  # each generation plays under the filter of those before


def test_the_policy_of_a_run_of_cem_is_the_mean_of_its_search(tmp_path):
    flags = f"{PENDULUM} --num-envs 4 --candidates 4 --elite 0.5 --total-timesteps 100"
    run("cem", flags, tmp_path / "run")
    saved = ppo.load_checkpoint(tmp_path / "run/checkpoint.pt", "cem")
    actor = [x.flatten() for name, x in saved["agent"].items() if name.startswith("actor.")]
    assert torch.equal(torch.cat(actor), saved["search"]["mean"])


def test_noise_is_added_to_every_action(monkeypatch):
    """Candidates whose weights are all zero: what they send is the noise."""
    agent, candidates, actors = generation(f"{PENDULUM} --num-envs 3", 5)
    sent, step = [], actors.step
    monkeypatch.setattr(actors, "step", lambda actions: sent.append(actions) or step(actions))
    actors.restart(0)
    play_generation(agent, torch.zeros_like(candidates), actors, action_std=0.25)
    rng = torch.Generator().manual_seed(4)
    expected = [0.25 * ppo.draw_noise((3, 1), rng) for _ in sent]
    assert len(sent) > 5
    np.testing.assert_array_equal(sent, expected)


def test_every_generation_has_environments_of_its_own_and_less_noise(tmp_path, monkeypatch):
    seeds, extras, draw = spy_on_restarts(monkeypatch, ppo), [], cem.Search.draw

    def watched(search, count, extra_variance, rng):
        assert rng.initial_seed() == ppo.stream(1, "candidates")
        extras.append(extra_variance)
        return draw(search, count, extra_variance, rng)

    monkeypatch.setattr(cem.Search, "draw", watched)
    flags = f"{PENDULUM} --num-envs 4 --candidates 4 --elite 0.5 --total-timesteps 150"
    run("cem", f"{flags} --extra-std 0.5 --extra-generations 2", tmp_path / "run")
    assert extras[:4] == [0.25, 0.125, 0, 0]
    assert seeds[: len(extras)] == [
        ppo.stream(1, "environments", generation) for generation in range(len(extras))
    ]


# -------------------------------------------------------------------------------------- TRAINING
@pytest.mark.parametrize(
    "name, flags",
    [
        ("trpo", "--total-timesteps 8192"),
        ("vpg", "--total-timesteps 10000 --num-steps 500 --kl-target 0.01 --learning-rate 0.01"),
        ("a2c", "--total-timesteps 16000 --learning-rate 0.01 --decay 0.9"),
        ("a2c", "--total-timesteps 16000 --learning-rate 0.01 --decay 0.9 --trust-region"),
        ("cem", "--total-timesteps 16000 --candidates 100"),
    ],
)
def test_each_learns_to_balance_a_pole(name, flags, tmp_path):
    """And to predict its returns: of a critic that learns nothing, 0 of their variance."""
    summary = run(name, f"{PENDULUM} {flags}", tmp_path / "run")
    returns = [float(row["return"]) for row in rows(tmp_path / "run/episodes.csv")]
    assert np.mean(returns[:100]) < 13
    assert summary["last_100_return"] > 3 * np.mean(returns[:100])
    if name != "cem":
        metrics = pd.read_csv(tmp_path / "run/metrics.csv")
        explained = metrics["losses/explained_variance"]
        assert explained[len(metrics) // 2 :].mean() > 0.1


@pytest.mark.parametrize(
    "name, flags",
    [
        ("trpo", "--num-steps 128 --total-timesteps 640 --checkpoint-every 2 --hidden 32"),
        ("vpg", "--num-steps 128 --total-timesteps 640 --checkpoint-every 2"),
        ("a2c", "--total-timesteps 400 --checkpoint-every 2 --trust-region"),
        ("cem", "--candidates 20 --num-envs 10 --total-timesteps 800 --action-std 0.1"),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, flags, tmp_path, monkeypatch):
    flags = f"{PENDULUM} {flags}"
    whole = run(name, flags, tmp_path / "whole")
    log, calls = ppo.Run.log, []

    def stop(run, update, *rest):
        log(run, update, *rest)
        calls.append(update)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo.Run, "log", stop)
        run(name, flags, tmp_path / "stopped")
    module = MODULES[name]
    agent, again = module.train(module.load_run(str(tmp_path / "stopped"))[0])
    clocks = {"wall_seconds": 0, "sps": 0}
    assert whole | clocks == again | clocks
    paths = [tmp_path / where / "checkpoint.pt" for where in ("whole", "stopped")]
    one, other = (ppo.load_checkpoint(path, name) for path in paths)
    assert one["state"] == other["state"] and len(calls) == 3
    for part in [part for part in one if part in ("agent", "average", "search")]:
        assert all(torch.equal(x, other[part][each]) for each, x in one[part].items())
    assert all(torch.equal(x, one["agent"][each]) for each, x in agent.state_dict().items())
    episodes = [path.with_name("episodes.csv").read_bytes() for path in paths]
    assert episodes[0] == episodes[1]
    metrics = [pd.read_csv(path.with_name("metrics.csv")) for path in paths]
    assert len(metrics[0]) > 3
    pd.testing.assert_frame_equal(*(rows.drop(columns="charts/SPS") for rows in metrics))


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("trpo", "--num-steps 0", "--num-steps must be between"),
        ("trpo", "--env-id InvertedPendulum-v4 --num-steps 3", "too small"),
        ("vpg", "--num-steps 100000000", "--num-steps must be between 2 and 1048576"),
        ("vpg", "--num-envs 1000 --num-steps 1000000", "too large"),
        ("vpg", "--learning-rate 5", "--learning-rate must be between 1e-12 and 1, not 5"),
        ("a2c", "--trust-region --average 1.5", "--average must be between"),
        ("a2c", "--average 0.9", "--delta and --average need --trust-region"),
        ("a2c", "--delta 2", "--delta and --average need --trust-region"),
        ("cem", "--candidates 20", "--num-envs must be at most --candidates, 20"),
        ("cem", "--elite 0.007", "--elite 0.007 of 200 candidates are fewer than 2"),
        ("vpg", "--env-id Nothing-v0 --env-backend envpool", "EnvPool does not know"),
    ],
)
def test_flags_that_make_no_sense_leave_nothing_behind(name, flags, message, tmp_path):
    with pytest.raises(ppo.UserError, match=message):
        run(name, flags, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_one_algorithm(tmp_path):
    folder = str(tmp_path / "run")
    run("a2c", f"{PENDULUM} --total-timesteps 160", tmp_path / "run")
    args, saved = a2c.load_run(folder)
    assert (args.total_timesteps, saved["state"]["updates"]) == (160, 2)
    with pytest.raises(ppo.UserError, match=r"a run of a2c\.py, not of vpg\.py"):
        vpg.load_run(folder)
    with pytest.raises(ppo.UserError, match=r"written by a2c\.py"):
        ppo.load_run(folder)
    with pytest.raises(ppo.UserError, match="resume stands alone"):
        a2c.train(a2c.Args(resume=folder, seed=9))
    with pytest.raises(ppo.UserError, match="cannot stand beside --resume"):
        a2c.parse_args(["--resume", folder, "--seed", "9"])
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ppo.UserError, match="has changed since the checkpoint"):
        a2c.load_run(folder)
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(ppo.UserError, match="not a run folder that can be read"):
        a2c.load_run(folder)


# ---------------------------------------------------------------------------------------- FIGURE 3
def in_this_process(calls, layout, tick):
    """An engine without processes."""
    for call in calls:
        yield call, sweep.work(call, layout)


def test_figure3_runs_what_is_missing_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = figure3.Grid(["InvertedPendulum-v4"], list(figure3.ALGORITHMS), [1])
    folder = Path("results")
    figure3.complete(grid, folder, 160, in_this_process)
    runs = rows(folder / "runs.csv")
    assert [row["algorithm"] for row in runs] == list(figure3.ALGORITHMS)
    for row in runs:
        path = Path(row["command"].split()[-1])
        (summary,) = json.loads((path / "summary.json").read_text())
        assert summary["objective"] == row["algorithm"]
        assert float(row["last_100_return"]) == summary["last_100_return"]
        assert int(row["updates"]) == len(rows(path / "metrics.csv"))
        assert " --env-backend envpool " in row["command"]
    assert [row["algorithm"] for row in runs if row["kl_median"] == ""] == ["cem"]
    for name, algorithms in {
        "accepted": "trpo",
        "cg_residual": "trpo",
        "projected": "a2c-tr",
    }.items():
        for row in runs:
            assert (row[name] != "") == row["algorithm"].startswith(algorithms), (row, name)
    points = sweep.read(folder / "curves.csv")
    known = points.groupby("algorithm")["learning_rate"].apply(lambda cells: (cells != "").all())
    assert {name for name, there in known.items() if there} == {"vpg", "a2c", "a2c-tr"}
    before = (folder / "runs.csv").read_bytes()
    figure3.complete(grid, folder, 160, None)  # nothing is missing, so no engine is asked
    assert (folder / "runs.csv").read_bytes() == before
    with pytest.raises(UserError, match="a run of other settings"):
        figure3.complete(grid, folder, 320, None)
    more = figure3.plan(grid._replace(seeds=[2, 1]), sweep.Table(folder, figure3.LAYOUT), 160)
    assert [call.crowd[0].seed for call in more] == [2] * len(grid.algorithms)
    assert [call.crowd[0].name for call in more] == grid.algorithms
    moved = sweep.read(folder / "runs.csv")  # the same runs, with run folders elsewhere
    moved["command"] = moved["command"].str.replace("--run-dir ", "--run-dir elsewhere/")
    sweep.write(folder / "runs.csv", moved)
    figure3.complete(grid, folder, 160, None)
    figure3.report(folder, tmp_path, grid)  # a curve of one point, and no PPO
    assert "All 7 runs of the grid are in" in (folder / "summary.md").read_text()


def write_results(folder: Path, cells: dict[tuple[str, str, int], float]) -> None:
    """runs.csv and curves.csv as figure3.py leaves them, with straight curves."""
    runs, points = [], []
    for (task, name, seed), x in cells.items():
        who = {"env_id": task, "algorithm": name, "seed": seed}
        made = dict.fromkeys(figure3.LAYOUT.columns, "1") | who
        made |= {"last_100_return": x, "kl_median": 0.01, "kl_max": 0.02, "updates": 4 + seed}
        made |= {"total_timesteps": 1_000_000, "started": "2026-01-02T03:04:05"}
        made["projected"] = 0.01 * seed if name == "a2c-tr" else ""
        made["command"] = figure3.call_of((task, name, seed), 1_000_000, "runs/figure3").command
        runs.append(made)
        for step in (1000, 1_000_000):
            point = {"global_step": step, "episodic_return": x, "kl": 0.01}
            points.append(who | point | {"action_std": 1, "learning_rate": ""})
    sweep.write(folder / "runs.csv", pd.DataFrame(runs))
    sweep.write(folder / "curves.csv", pd.DataFrame(points))


def write_ppo(folder: Path, returns: dict[tuple[str, int], float]) -> None:
    """The same of table1.py: clip:0.2, and an objective that is not asked for."""
    runs, points = [], []
    for (task, seed), x in returns.items():
        for objective, shift in (("none", 1e6), ("clip:0.2", 0)):
            who = {"env_id": task, "objective": objective, "seed": seed}
            ends = {"bootstrap_truncated": "False"}
            runs.append(who | ends | {"last_100_return": x + shift})
            for step in (1000, 1_000_000):
                point = {"global_step": step, "episodic_return": x + shift}
                points.append(who | point | {"kl": 0.01, "beta": "", "action_std": 1})
    sweep.write(folder / "runs.csv", pd.DataFrame(runs))
    sweep.write(folder / "curves.csv", pd.DataFrame(points))


def test_report_by_hand(tmp_path):
    """On Hopper PPO beats all but TRPO with a learned sigma; on Swimmer an algorithm is missing."""
    means = {"trpo-frozen": 1500, "trpo-learned": 2500, "trpo-learned-32": 2600, "vpg": 1000}
    means |= {"a2c": 900, "a2c-tr": 800, "cem": 508.2}
    cells = {}
    for name, mean in means.items():
        for seed in (1, 2):
            cells["Hopper-v4", name, seed] = mean + (seed - 1.5)
            if name != "vpg" and (name, seed) != ("cem", 2):
                cells["Swimmer-v4", name, seed] = mean / 10
    cells |= {("Hopper-v4", "trpo-frozen-discount", seed): 2055 + seed for seed in (1, 2)}
    write_results(tmp_path / "t", cells)
    returns = {("Hopper-v4", seed): 1900.0 + 100 * seed for seed in (1, 2, 3)}
    write_ppo(tmp_path / "ppo", returns)
    args = ["--report", "--results", str(tmp_path / "t"), "--ppo", str(tmp_path / "ppo")]
    args += ["--tasks", "Hopper", "Swimmer", "--seeds", "1", "2"]
    written = []
    for _ in range(2):
        figure3.main(args)
        written.append({path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()})
    assert written[0] == written[1]
    names = "runs.csv curves.csv summary.md curves.png beside.png"
    assert set(written[0]) == set(names.split())
    assert written[0]["beside.png"].startswith(b"\x89PNG")
    text = written[0]["summary.md"].decode()
    grid = "2 tasks x 7 algorithms x 2 seeds"
    assert f"**PARTIAL: 25 of 28 runs of the grid are in: {grid}.**" in text
    assert "- `vpg`, seeds 1 2: Swimmer-v4\n- `cem`, seeds 2: Swimmer-v4\n" in text
    assert "- PPO, which benchmark/table1.py runs: Swimmer-v4\n" in text
    assert "- the experiment `" not in text and "runs of other seeds" not in text
    assert "Seeds of PPO: Hopper-v4 3." in text
    # Student's t: 4.303 x 100 / sqrt 3, and 12.71 x 0.7071 / sqrt 2
    assert "| `ppo` | 2,100 [1,852, 2,348], n = 3<br>paper 2,203 | paper 107 |" in text
    assert "| `cem` | 508 [502, 515]<br>paper 508 | 50.8, n = 1<br>paper 1.9 |" in text
    assert "| `trpo-learned` | 2,500 [2,494, 2,506] | 250 [250, 250] |" in text
    # PPO's mean lies 10.4 of its errors above the one, 6.9 below the other: t(2) has 0.5% and 1%
    first = "1 of 6 [1, 1]; first in 100% of the draws"
    second = "2 of 6 [2, 2]; first in 1% of the draws; behind `trpo-learned`"
    assert f"| Hopper-v4 | 2 of 6 | {first} | {second} |" in text
    few = "too few runs: ppo, vpg, cem"
    assert f"| Swimmer-v4 | 2 of 6 | {few} | {few} |" in text
    assert "| **PPO first** | 0 of 2 tasks | 1 of 1 tasks [1, 1] | 0 of 1 tasks [0, 0] |" in text
    # in units of 2323.9 - 508.2 on Hopper and of 121.5 - 1.9 on Swimmer
    paper = "the paper, Vanilla PG adaptive"
    # 12.71 x 0.7071 x the root of 1/2 + 1/3 = 8.2
    three = "[992, 1,008] | no | 0 of 1; not Hopper-v4"
    assert f"| `vpg` | Hopper-v4 | 1,000 [994, 1,006] | 2,324 | {paper} | -73% | {three} |" in text
    assert (
        "| `cem` | Swimmer-v4 | 50.8, n = 1 | 1.9 | the paper, CEM | +41% |  |  | 1 of 1 |" in text
    )
    later = "| 95.0 | TRPO, OpenAI Baselines 2018 | +130% | [250, 250] | no | 0 of 2; not Hopper-v4"
    assert f"| `trpo-learned` | Swimmer-v4 | 250 [250, 250] {later}, Swimmer-v4 |" in text
    with_and_without = "| 2,056 [2,050, 2,063] | 1,500 [1,494, 1,506] | 2,064 | the paper, TRPO |"
    (experiment,) = [line for line in text.splitlines() if with_and_without in line]
    assert experiment.startswith("| `trpo-frozen-discount` | Hopper-v4 | gamma 0.995 and lambda")
    # 7.8 below the paper's end: a mean of three runs lies within 8.2, one of six within 7.3
    assert experiment.endswith("| the paper, TRPO | yes | no |")
    # the paper's TRPO ends at 2,064 on Hopper and at 121.5 on Swimmer
    assert "| `trpo-frozen` | 1,500 [1,494, 1,506] | 150 [150, 150] |\n" in text
    assert "| TRPO, the paper | 2,064 | 122 |\n" in text
    assert "| TRPO, Tianshou | 2,046 | 40.9 |\n" in text
    assert "| A2C + TR, the paper | 951 |" in text and "| A2C, Tianshou | 1,253 | 36.6 |" in text
    for who in ("TRPO, OpenAI Baselines 2018: 6 seeds", "TRPO, Tianshou: 10", "A2C, Tianshou: 10"):
        assert text.count(f"- {who}") == 1
    for name in ("trpo-frozen", "trpo-learned"):
        assert f"the mean of 3 runs of `{name}`: 0 of 2; not Hopper-v4, Swimmer-v4.\n" in text
    assert "6 in OpenAI's results; 3 in the paper" in text
    assert "| Hopper-v4 | 6 | 5 | 6 |" in text and "| Swimmer-v4 | 5 | 5 | 5 | 200,000 |" in text
    assert "changes the gradient in 1.50% of all states, at most in 2.00% of those" in text
    flags = "--env-id TASK --env-backend envpool --sigma frozen --seed S --total-timesteps 1000000"
    assert text.count(f"    python benchmark/baselines/trpo.py {flags}\n") == 1


def test_a_part_is_reported_with_all_that_is_there_and_experiments_are_planned_last(tmp_path):
    cells = {("Hopper-v4", name, 1): 1.0 for name in figure3.ALGORITHMS}
    write_results(tmp_path, cells | {("Reacher-v4", "cem", 1): 1.0})
    args = ["--report", "--results", str(tmp_path), "--ppo", str(tmp_path / "none")]
    figure3.main([*args, "--tasks", "Hopper", "--algorithms", "cem", "--seeds", "1"])
    text = (tmp_path / "summary.md").read_text()
    assert "too few runs: ppo, trpo-frozen, vpg, a2c, a2c-tr, cem |" in text  # one run each
    assert "8 of 14 runs of the grid are in: 2 tasks x 7 algorithms x 1 seeds.**" in text
    assert "- the experiment `trpo-frozen-discount`, seeds 1: Hopper-v4\n" in text
    assert "PPO's runs are in none/.\n" in text
    grid = figure3.Grid(["Hopper-v4", "Reacher-v4"], ["trpo-frozen", "cem"], [1, 2])
    calls = figure3.plan(grid, sweep.Table(tmp_path, figure3.LAYOUT), 1_000_000)
    names = ["trpo-frozen__1"] + ["trpo-frozen__2", "cem__2"] * 2
    experiments = ("trpo-frozen-discount", "cem-unclipped", "cem-noise")
    names += [f"{name}__{s}" for name in experiments for s in (1, 2)]
    assert [call.path.name for call in calls] == names
    assert "--no-clip-actions" in calls[-3].flags and "--action-std" in calls[-1].flags
    assert calls[-1].labels == {"algorithm": "cem-noise"}


def test_ppo_with_other_details_is_no_peer(tmp_path):
    write_results(tmp_path / "t", {("Hopper-v4", "a2c", 1): 900.0})
    write_ppo(tmp_path / "ppo", {("Hopper-v4", 1): 2000.0})
    runs = pd.read_csv(tmp_path / "ppo/runs.csv").assign(bootstrap_truncated="True")
    args = ["--report", "--results", str(tmp_path / "t"), "--ppo", str(tmp_path / "ppo")]
    for rows in (runs, runs.drop(columns="bootstrap_truncated")):  # or of the time before the flag
        sweep.write(tmp_path / "ppo/runs.csv", rows)
        with pytest.raises(UserError, match="go on at a time limit"):
            figure3.main(args)


def test_ranks_by_hand():
    means = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0], [2.0, 3.0, 2.0]])
    assert figure3.rank_of_first(means).tolist() == [1, 3, 1]  # a tie is no defeat
    rng = np.random.default_rng(0)
    rank, draws = figure3.ranks_of_ppo([np.array([0.0, 5.0, 10.0]), np.array([2.0, 2.0])], rng)
    assert rank == 1  # 5 against 2
    expected = stats.t.cdf(3 / (5 / np.sqrt(3)), 2)  # its deviation is 5
    assert (draws == 1).mean() == pytest.approx(expected, abs=0.016)  # 4 deviations of 10,000 draws
    # 5 against 4, and errors of 5 on both sides, drawn apart: their difference is Cauchy's, 10 wide
    pair = [np.array([0.0, 10.0]), np.array([-1.0, 9.0])]
    _, draws = figure3.ranks_of_ppo(pair, rng)
    assert (draws == 1).mean() == pytest.approx(0.5 + np.arctan(1 / 10) / np.pi, abs=0.02)


def test_where_ppo_is_first_in_the_paper_and_here():
    """Three tasks: PPO is first on one of ours, and on two of the paper's."""
    grid = figure3.Grid(["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"], ["vpg"], [1, 2])
    names = [*figure3.LINE_UPS["frozen"], "trpo-learned"]
    returns = {(task, name): np.array([0.0, 1.0]) for task in grid.tasks for name in names}
    for task, x in zip(grid.tasks, (1e6, -1e6, -1e6), strict=True):
        returns[task, "ppo"] = np.array([x, x + 1])
    ends = figure3.published()
    table = figure3.tell_ranks(returns, grid, ends)
    assert "| **PPO first** | 2 of 3 tasks | 1 of 3 tasks [1, 1] | 1 of 3 tasks [1, 1] |" in table


def test_the_largest_disagreement_may_be_downwards():
    """On Walker2d 0.5 lies 1,214.1 below the paper's VPG, and 2,241 are between its algorithms."""
    grid = figure3.Grid(["HalfCheetah-v4", "Walker2d-v4"], ["vpg"], [1, 2])
    # a mean of three runs lies within 12.706 x the root of 2 (1/2 + 1/3) = 16.4 times the spread
    for spread, told in ((74, "no | 1 of 2; not Walker2d-v4"), (75, "yes | 2 of 2")):
        x = 0.5 + np.array([-spread, spread])
        returns = {(task, "vpg"): x for task in grid.tasks}
        text = figure3.tell_disagreements(returns, grid, figure3.published())
        (row,) = [line for line in text.splitlines() if line.startswith("| `vpg` |")]
        assert row.startswith("| `vpg` | Walker2d-v4 |") and row.endswith(f"] | {told} |")
        assert " | -54% | [" in row


def test_the_mean_of_few_runs_varies_more_than_that_of_many():
    """Of 0 and 2 the mean is 1 and the deviation the root of 2; t(1) has 95% within 12.706."""
    x = np.array([0.0, 2.0])
    assert figure3.range_of_mean(x) == pytest.approx((1 - 12.7062, 1 + 12.7062), rel=1e-5)
    half_width = 12.7062 * np.sqrt(2 * (1 / 2 + 1 / 6))
    assert figure3.range_of_mean(x, 6) == pytest.approx((1 - half_width, 1 + half_width), rel=1e-5)
    assert figure3.seeds_of("PPO (clip)") == 3
    assert figure3.seeds_of(figure3.OPENAI) == 6


def test_the_later_trpo_is_compared_with_means_of_six_runs():
    """On Hopper it ends at 1,912.9. Six new runs: 12.706 x the root of 2 (1/2 + 1/6) = 14.67."""
    grid = figure3.Grid(["Hopper-v4"], ["trpo-learned"], [1, 2])
    for spread, told in ((62, "no | 0 of 1; not Hopper-v4"), (63, "yes | 1 of 1")):
        returns = {("Hopper-v4", "trpo-learned"): 1000 + np.array([-spread, spread])}
        text = figure3.tell_disagreements(returns, grid, figure3.published())
        (row,) = [line for line in text.splitlines() if line.startswith("| `trpo-learned` |")]
        assert row.endswith(f"] | {told} |")


def test_an_experiment_with_one_run_has_no_range():
    grid = figure3.Grid(["Hopper-v4"], ["trpo-frozen"], [1])
    returns = {("Hopper-v4", "trpo-frozen-discount"): np.array([2000.0])}
    text = figure3.tell_experiments(returns, grid, figure3.published())
    assert "| 2,000 |  | 2,064 | the paper, TRPO |  |  |" in text


def test_with_which_sigma_trpo_ends_as_in_the_paper():
    """There it ends at 2,064 on Hopper: 904 above these, a mean of three runs lies within 984."""
    tasks, x = ["Hopper-v4", "Swimmer-v4"], np.array([1100.0, 1220.0])
    returns = {("Hopper-v4", "trpo-frozen"): x, ("Swimmer-v4", "trpo-frozen"): x}
    returns["Hopper-v4", "trpo-learned"] = x
    returns["Swimmer-v4", "trpo-learned"] = x[:1]  # one run has no range
    start = "Tasks on which the end of the paper's TRPO could be the mean of 3 runs of"
    expected = f"{start} `trpo-frozen`: 1 of 2; not Swimmer-v4.\n{start} `trpo-learned`: 1 of 1.\n"
    assert figure3.tell_sigma(returns, tasks, figure3.published()) == expected


def test_report_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="has no run yet"):
        figure3.main(["--report", "--results", str(tmp_path)])
