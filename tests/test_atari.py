"""ppo_atari.py: the network on pixels, the true game's score, annealing, several ranks, a run and all around it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import envpool
import numpy as np
import pytest
import torch
from conftest import environment
from gymnasium.spaces import Discrete
from torch.nn.functional import conv2d, linear, relu

import ppo_atari as ppo
import ppo_cartpole
from benchmark import UserError, atari, read_csv
from ppo_atari import Agent, Args, parse_objective

ROOT = Path(__file__).parent.parent
SCRIPT = Path(ppo.__file__)
OBJECTIVES = ("clip:0.1", "kl:1", "adaptive:0.01", "none", "pg")
# Breakout ends soon: a player that never meets the ball loses five lives in 120 steps
TINY = "--env-id Breakout-v5 --num-envs 4 --num-steps 64 --num-minibatches 2 --update-epochs 1 --total-timesteps 1536"
TINY += " --eval-episodes 2 --threads 1 --checkpoint-every 3"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def text_between(script: str, start: str, end: str) -> str:
    text = (ROOT / script).read_text()
    return text[text.index(start) : text.index(end, text.index(start))]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("AROUND THE RUN\n", "# -----"),
        ("class Objective(", "# -----"),
        ("def layer_init(", "\n\n\n"),
        ("def gae(", "\n\n\n"),
        ("def categorical_kl(", "\n\n\n"),
        ("def evaluate_run(", "\n\n\n"),
        ("def main(", "__main__"),
    ],
)
def test_what_the_scripts_share_is_the_same_text(start, end):
    assert text_between("ppo_cartpole.py", start, end) == text_between("ppo_atari.py", start, end)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot restrict a process to a core")
def test_cores_are_those_the_process_may_use():
    allowed, text = os.sched_getaffinity(0), text_between("ppo_atari.py", "def cores(", "\n\n\n")
    assert ppo.cores() == len(allowed) and text == text_between("ppo_continuous.py", "def cores(", "\n\n\n")
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert ppo.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def arguments(**flags) -> Args:
    args = Args(**flags)
    args.check()
    return args


def recorded(rows: int = 32, actions: int = 4, seed: int = 0) -> dict:
    """A batch of random images and whatever else an update takes, some of its rows resets."""
    rng = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, rows, generator=rng)
    batch = {"obs": torch.randint(0, 256, (rows, 84, 84, 4), dtype=torch.uint8, generator=rng)}
    batch["log_probs"] = torch.randn(rows, actions, generator=rng).log_softmax(-1)
    batch["actions"] = torch.randint(0, actions, (rows,), generator=rng)
    batch |= {"advantages": draw(), "values": draw(), "returns": draw()}
    return batch | {"valid": (torch.rand(rows, generator=rng) > 0.2).float()}


def orders(args: Args, rows: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(rows, generator=rng) for _ in range(args.update_epochs)]
    return torch.stack(drawn).unflatten(1, (args.num_minibatches, -1))


def csv_rows(path: Path) -> list[dict]:
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


# ------------------------------------------------------------------------------------------------------- the network
def test_bytes_become_fractions_inside_the_network():
    torch.manual_seed(0)
    agent, obs = Agent(6, low=False), torch.randint(0, 256, (5, 84, 84, 4), dtype=torch.uint8)
    x = obs.permute(0, 3, 1, 2).contiguous().double() / 255
    conv1, conv2, conv3, hidden = (agent.trunk[i] for i in (0, 2, 4, 7))
    for layer, stride in ((conv1, 4), (conv2, 2), (conv3, 1)):
        x = relu(conv2d(x, layer.weight.double(), layer.bias.double(), stride))
    assert x.shape == (5, 64, 7, 7)
    x = relu(linear(x.flatten(1), hidden.weight.double(), hidden.bias.double()))
    logits, values = (linear(x, head.weight.double(), head.bias.double()) for head in (agent.actor, agent.critic))
    log_probs, seen = agent(obs)
    torch.testing.assert_close(log_probs.double(), logits.log_softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.double(), values.squeeze(-1), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in agent.parameters()) == 1_687_719  # 32-64-64 filters, 512 units, 6 actions, 1 value


def test_bfloat16_is_close_to_float32_and_stays_out_of_weights_and_results():
    torch.manual_seed(0)
    full, obs = Agent(6, low=False), torch.randint(0, 256, (64, 84, 84, 4), dtype=torch.uint8)
    half = Agent(6, low=True)
    half.load_state_dict(full.state_dict())
    for (ours, theirs), allowed in zip(zip(half(obs), full(obs), strict=True), (1e-3, 3e-2), strict=True):
        assert ours.dtype == torch.float32 and 0 < (ours - theirs).abs().max() < allowed
    gradients = []
    for agent in (full, half):
        log_probs, values = agent(obs)
        (log_probs[:, 0].sum() + values.sum()).backward()
        assert {p.grad.dtype for p in agent.parameters()} == {torch.float32}
        # fused Adam walks memory in order: a gradient laid out unlike its weight would go to other weights, unnoticed
        assert all(p.grad.stride() == p.stride() for p in agent.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


# ---------------------------------------------------------------------------------------------------- the mathematics
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_that_of_ppo_cartpole(objective):
    batch, parsed = recorded(64), parse_objective(objective)
    log_probs, values = (0.3 * torch.randn(64, 4)).log_softmax(-1), torch.randn(64)
    shared = {"value_clip": 0.2, "vf_coef": 0.7, "ent_coef": 0.01}
    ours = ppo.ppo_loss(log_probs, values, batch | {"weights": torch.full((64,), 1 / 64)}, parsed, 3.0, Args(**shared))
    theirs = ppo_cartpole.ppo_loss(log_probs, values, batch, parsed, 3.0, ppo_cartpole.Args(**shared))
    torch.testing.assert_close(ours, theirs)


def test_alpha_anneals_step_size_and_clip_range():
    args, objective = Args(total_timesteps=1000 * 1024), parse_objective("clip:0.1")
    for update, alpha in ((0, 1.0), (500, 0.5), (999, 0.001)):
        lr, now = ppo.annealed(args, objective, update)
        assert (lr, now.epsilon) == pytest.approx((2.5e-4 * alpha, 0.1 * alpha))
    lr, now = ppo.annealed(Args(total_timesteps=1000 * 1024, anneal_clip=False), objective, 999)
    assert (lr, now.epsilon) == (pytest.approx(2.5e-7), 0.1)
    lr, now = ppo.annealed(Args(total_timesteps=1000 * 1024, anneal_lr=False), objective, 999)
    assert (lr, now.epsilon) == (2.5e-4, pytest.approx(1e-4))
    assert ppo.annealed(args, parse_objective("kl:1"), 500)[1] == parse_objective("kl:1")


@pytest.mark.parametrize(
    ("norm_adv", "objective"), [("batch", "clip:0.1"), ("minibatch", "adaptive:0.01"), ("none", "none")]
)
def test_reset_rows_change_nothing(norm_adv, objective):
    args = arguments(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=2, norm_adv=norm_adv)
    batch, results = recorded(), []
    assert 0 < batch["valid"].sum() < 32
    garbage = {name: torch.where(batch["valid"] > 0, batch[name], 1e3) for name in ("advantages", "values", "returns")}
    for data in (batch, batch | garbage):
        torch.manual_seed(0)
        agent = Agent(4, low=False)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
        parsed = parse_objective(objective)
        metrics = ppo.update(agent, optimizer, data, orders(args, 32), parsed, parsed.beta, args)
        assert all(math.isfinite(x) for x in metrics.values()) and metrics["kl_after_update"] > 0
        results.append((metrics, torch.nn.utils.parameters_to_vector(agent.parameters())))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("low", [False, True])
def test_the_first_minibatch_has_ratio_1(low):
    """In either precision, although a rollout looks at 8 screens at a time and a minibatch at 64; and for a policy that
    has long left the uniform one it starts from, which would hide differences."""
    torch.manual_seed(0)
    actors = ppo.start_actors(Args(env_id="Breakout-v5"), 0, 8)
    actions = int(actors.envs.action_space.n)
    agent, noise = Agent(actions, low=low), -torch.empty(16, 8, actions).exponential_().log()
    agent.actor.weight.data *= 3000
    rollout, _ = ppo.collect(agent, actors, noise, dict.fromkeys(ppo.CLOCKS, 0.0))
    rows = torch.randperm(128)[:64]
    with torch.no_grad():
        new, _ = agent(rollout["obs"][:-1].flatten(0, 1)[rows])
    change = new - rollout["log_probs"].flatten(0, 1)[rows]
    ratio = change.gather(1, rollout["actions"].flatten()[rows].unsqueeze(1)).exp()
    assert (ratio - 1).abs().max() < 1e-5
    assert new.exp().max() > 0.75


def test_standardised_advantages_of_a_minibatch_have_mean_0_and_deviation_1():
    x, valid = 3 + 5 * torch.randn(2, 3, 64), (torch.rand(2, 3, 64) > 0.3).float()
    for row, used in zip(ppo.standardise(x, valid).flatten(0, 1), valid.flatten(0, 1) > 0, strict=True):
        assert row[used].mean().item() == pytest.approx(0, abs=1e-5)
        assert row[used].std(correction=0).item() == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------------------------- games and episodes
@pytest.mark.parametrize("limit", [27_000, 100])
def test_episodes_are_whole_games_in_raw_points(limit):
    """Against EnvPool's own counters in a twin: elapsed_step is 0 in the first row of a game, and only there."""
    args, steps, num_envs = Args(env_id="Breakout-v5"), 250, 3
    actors, twin = (ppo.start_actors(args, 7, num_envs, max_episode_steps=limit) for _ in range(2))
    noise = torch.empty(steps, num_envs, actors.envs.action_space.n).exponential_().log().neg()
    agent = Agent(noise.shape[-1], low=False)
    rollout, episodes = ppo.collect(agent, actors, noise, dict.fromkeys(ppo.CLOCKS, 0.0))
    expected, lives, returns, lengths, ended = [], twin.lives, *np.zeros((2, num_envs)), np.zeros(num_envs, bool)
    lost, cut = 0, 0
    for t in range(steps):
        obs, rewards, terminated, truncated, info = twin.envs.step(rollout["actions"][t].numpy())
        fresh = info["elapsed_step"] == 0  # this row is the reset after a game's end
        for i in fresh.nonzero()[0]:
            expected.append((t - 1, int(i), returns[i], int(lengths[i])))
            returns[i] = 0
        assert not rewards[fresh].any()
        returns, lengths = returns + info["reward"], info["elapsed_step"]
        assert np.array_equal(rollout["rewards"][t], np.sign(info["reward"]))
        assert np.array_equal(rollout["obs"][t + 1], obs.transpose(0, 2, 3, 1))
        assert np.array_equal(rollout["terminated"][t], terminated) and np.array_equal(rollout["valid"][t], ~ended)
        assert np.array_equal(rollout["truncated"][t], truncated)
        dying = (info["lives"] < lives) & ~fresh
        assert (terminated | truncated)[dying].all()  # to learning, that is an end
        lost, cut = lost + (dying & (info["lives"] > 0)).sum(), cut + truncated.sum()
        lives, ended = info["lives"], terminated | truncated
    assert [episode for episode in episodes if episode[0] < steps - 1] == expected != []
    assert any(ret for _, _, ret, _ in expected)
    assert lost > 0 and (cut > 0) == (limit == 100)


def test_a_truncated_game_is_bootstrapped_with_its_final_screen_and_a_lost_life_is_not():
    args, agent = Args(env_id="Breakout-v5"), Agent(4, low=False)
    actors = ppo.start_actors(args, 0, 2, max_episode_steps=40)
    noise = torch.empty(64, 2, 4).exponential_().log().neg()
    rollout, _ = ppo.collect(agent, actors, noise, dict.fromkeys(ppo.CLOCKS, 0.0))
    ends = {name: rollout[name].nonzero().tolist() for name in ("truncated", "terminated")}
    recorded = (rollout[name] for name in ("rewards", "values", "terminated", "truncated"))
    advantages = ppo.gae(*recorded, 0.99, 0.95)
    values = agent(rollout["obs"].flatten(0, 1))[1].detach().view(65, 2)
    torch.testing.assert_close(rollout["values"], values, rtol=0, atol=1e-5)
    for name, gamma in (("truncated", 0.99), ("terminated", 0.0)):
        assert ends[name] != []
        for t, i in ends[name]:
            delta = rollout["rewards"][t, i] + gamma * values[t + 1, i] - values[t, i]
            assert advantages[t, i].item() == pytest.approx(delta.item(), abs=1e-5)


class Tape:
    """In place of a pool: plays back (rewards, terminated, truncated, lives, game over) of each step of one actor."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def step(self, actions):
        reward, terminated, truncated, lives, over = (np.array([x]) for x in next(self.steps))
        return None, reward, terminated, truncated, {"lives": lives, "reward": 10 * reward, "terminated": over}


def test_games_that_envpool_ends_in_silence_or_by_both_ways_at_once():
    """It may start a new game while idling after a lost life, and calls a game over at the time limit truncated."""
    start = {"obs": None, "lives": np.array([2]), "returns": np.zeros(1), "lengths": np.zeros(1)}
    start |= {"ended": np.array([False]), "lost": np.array([False])}
    # what EnvPool says in each step: reward, terminated, truncated, lives, game over; then: learning's end; the game's
    silent = [
        ((1.0, False, False, 2, 0), False, False),
        ((0.0, True, False, 1, 0), True, False),  # a life lost
        ((0.0, False, False, 1, 0), False, False),  # idle frames
        ((0.0, True, False, 1, 0), True, False),
        ((0.0, False, False, 3, 0), False, True),  # more lives than before: another game
        ((1.0, False, False, 4, 0), False, False),  # but a life may also be won
    ]
    both = [((1.0, False, True, 0, 1), True, True), ((0.0, False, False, 3, 0), False, False)]
    for steps, (ret, length) in ((silent, (10.0, 3)), (both, (10.0, 1))):
        actors = SimpleNamespace(**start, envs=Tape(step for step, *_ in steps))
        for _, dies, ends in steps:
            _, terminated, _, over = ppo.play(actors, None)
            assert (terminated[0], over[0]) == (dies, ends)
            if ends:
                assert (actors.returns[0], actors.lengths[0]) == (ret, length)


def test_the_flags_of_the_console_reach_it():
    for flags, actions in (({}, 4), ({"full_action_space": True, "sticky_actions": 0.25}, 18)):
        envs = ppo.start_actors(Args(env_id="Breakout-v5", **flags), 1, 1).envs
        config = envs.spec.config
        assert envs.action_space.n == actions
        assert config.repeat_action_probability == flags.get("sticky_actions", 0.0)
        assert (config.frame_skip, config.stack_num, config.noop_max, config.max_episode_steps) == (4, 4, 30, 27_000)
        assert config.episodic_life and config.reward_clip and config.gray_scale


class Lights:
    """In place of a pool: one of three bands of the screen is lit, and the action that says which pays 1. 8 steps."""

    def __init__(self, env_id, *, num_envs, seed, **_):
        self.action_space, self.rng, self.count = Discrete(3), np.random.default_rng(seed), np.zeros(num_envs, int)

    def look(self):
        self.light = self.rng.integers(0, 3, len(self.count))
        screens = 200 * np.eye(3, dtype=np.uint8).repeat(28, 1)[self.light]  # [N, 84]
        return np.ascontiguousarray(np.broadcast_to(screens[:, None, :, None], (len(self.count), 4, 84, 84)))

    def info(self, reward):
        return {"reward": reward, "lives": np.zeros(len(self.count), int), "terminated": self.count == 8}

    def reset(self):
        return self.look(), self.info(0.0 * self.count)

    def step(self, actions):
        new = self.count == 8
        self.count = np.where(new, 0, self.count + 1)
        reward = ((actions == self.light) & ~new).astype(np.float32)
        return self.look(), reward, self.count == 8, np.zeros(len(new), bool), self.info(reward)

    def close(self):
        pass


def test_it_learns_to_tell_screens_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(envpool, "make", Lights)
    flags = {"num_envs": 8, "num_steps": 16, "total_timesteps": 128 * 12, "learning_rate": 1e-3, "gamma": 0.0}
    _, (summary,) = ppo.train(Args(**flags, run_dir=str(tmp_path / "run"), threads=1, eval_episodes=4))
    assert summary["eval_return_mean"] == 8.0
    assert np.mean([float(row["return"]) for row in csv_rows(tmp_path / "run" / "episodes.csv")[:8]]) < 5


# ------------------------------------------------------------------------------------------------------ several ranks
RANKS = """
import sys
import torch
import torch.distributed as dist
import ppo_atari as ppo

batch_file, folder = sys.argv[1:]
args, batch, orders = torch.load(batch_file, weights_only=False)
rank, world = ppo.join("cpu")
torch.manual_seed(0)
agent = ppo.Agent(4, low=False)
own = torch.arange(rank * 4, rank * 4 + 4)  # of 8 actors, in each of the rows [T, N]
batch = {name: x.unflatten(0, (-1, 8))[:, own].flatten(0, 1) for name, x in batch.items()}
optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
metrics = ppo.update(agent, optimizer, batch, orders[rank], ppo.parse_objective("clip:0.1"), 0.0, args)
torch.save((metrics, agent.state_dict()), f"{folder}/update{rank}")

flags = "--env-id Breakout-v5 --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 3 --threads 1"
flags += f" --total-timesteps 1600 --eval-episodes 1 --learning-rate 0.001 --target-kl 0.001 --run-dir {folder}/run"
steps, step = [], ppo.sum_gradients
ppo.sum_gradients = lambda parameters: step(parameters) or steps.append(1)
agent, rows = ppo.train(ppo.parse_args(ppo.Args, flags.split()))
torch.save((rows, agent.state_dict(), len(steps)), f"{folder}/train{rank}")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> SimpleNamespace:
    """What two ranks made of one update on recorded data, and of a run of 50 updates."""
    folder = tmp_path_factory.mktemp("ranks")
    args = arguments(num_envs=8, num_steps=8, num_minibatches=2, update_epochs=1, max_grad_norm=math.inf, vf_coef=0.1)
    batch = recorded(64)
    # orders [2 ranks, K, P, M] of rows t * 4 + i: on one rank these are rows t * 8 + 4 * rank + i
    split = torch.stack([orders(args, 32, seed) for seed in (1, 2)])
    whole = torch.cat([rows // 4 * 8 + rows % 4 + 4 * rank for rank, rows in enumerate(split)], -1)
    assert sorted(whole.flatten().tolist()) == list(range(64))
    torch.save((args, batch, split), folder / "batch")
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [folder / "ranks.py", folder / "batch", folder]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    load = partial(torch.load, weights_only=True)
    updated, trained = ([load(folder / f"{name}{rank}") for rank in (0, 1)] for name in ("update", "train"))
    return SimpleNamespace(args=args, batch=batch, whole=whole, updated=updated, trained=trained, run=folder / "run")


def test_the_gradient_of_two_ranks_is_that_of_one_on_the_same_minibatches(ranks):
    torch.manual_seed(0)
    agent = Agent(4, low=False)
    before, optimizer = (
        {k: v.clone() for k, v in agent.state_dict().items()},
        torch.optim.SGD(agent.parameters(), lr=1.0),
    )
    metrics = ppo.update(agent, optimizer, ranks.batch, ranks.whole, parse_objective("clip:0.1"), 0.0, ranks.args)
    for told, weights in ranks.updated:
        assert told == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for name, theirs in weights.items():
            moved = agent.state_dict()[name] - before[name]
            assert moved.abs().max() > 0
            torch.testing.assert_close(theirs - before[name], moved, rtol=1e-3, atol=1e-3 * moved.abs().max().item())


def test_two_ranks_hold_the_same_weights_after_fifty_updates_and_leave_one_folder(ranks):
    (rows, weights, steps), (silent, others, as_many) = ranks.trained
    assert steps == as_many and 50 * 2 < steps < 50 * 6  # --target-kl stopped some updates, and the same on both
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert silent == [] and rows == json.loads((ranks.run / "summary.json").read_text())
    assert rows[0]["total_timesteps"] == 1600 and 1500 < rows[0]["transitions"] < 1600
    assert (ranks.run / "metrics.csv").read_text().count("\n") == 51
    steps = [int(row.split(",")[0]) for row in (ranks.run / "episodes.csv").read_text().splitlines()[1:]]
    assert steps == sorted(steps) and {(step - 1) % 4 for step in steps} == {0, 1, 2, 3}  # games of all four actors


def test_actors_are_keyed_by_their_place_among_all_of_them():
    args = Args(env_id="Breakout-v5")
    whole, left, right = (ppo.start_actors(args, *which).obs for which in ((5, 8), (5, 4), (9, 4)))
    assert np.array_equal(whole, np.concatenate([left, right])) and not np.array_equal(left, right)


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def script():
    return ppo


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of 6 updates; look, do not touch."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ppo.train(ppo.parse_args(Args, [*TINY.split(), "--run-dir", str(path)]))
    return path


def test_a_run_leaves_finite_metrics_under_their_names(finished):
    metrics, episodes = csv_rows(finished / "metrics.csv"), csv_rows(finished / "episodes.csv")
    names = ["update", "global_step", "seed", "objective", "charts/episodic_return", "charts/episodic_length"]
    names += [f"charts/{name}" for name in ("SPS", "learning_rate", "beta", "epsilon")]
    losses = "policy_loss value_loss entropy kl approx_kl old_approx_kl clipfrac grad_norm kl_after_update"
    names += [f"losses/{name}" for name in f"{losses} explained_variance".split()]
    assert len(metrics) == 6 and list(metrics[0]) == names
    for row in metrics:
        assert all(math.isfinite(float(row[name] or 0)) for name in names if name != "objective")
        assert all(row[name] for name in names if not name.startswith("charts/episodic"))
    assert [float(row["charts/epsilon"]) for row in metrics] == pytest.approx([0.1 * (1 - i / 6) for i in range(6)])
    assert [float(row["charts/learning_rate"]) for row in metrics][3] == pytest.approx(1.25e-4)
    assert list(episodes[0]) == ["global_step", "seed", "objective", "return", "length"]
    assert all(int(row["length"]) >= 100 for row in episodes)  # whole games, not lives
    (summary,) = json.loads((finished / "summary.json").read_text())
    assert summary["total_timesteps"] == 1536 and 1400 < summary["transitions"] < 1536
    assert summary["last_100_return"] == pytest.approx(np.mean([float(row["return"]) for row in episodes]))
    config = json.loads((finished / "config.json").read_text())
    assert config["args"]["precision"] in ("bfloat16", "float32") and "envpool" in config["versions"]


def content(run: Path) -> dict:
    """All that must come out the same bit for bit: everything a run leaves, its clocks apart."""
    saved, (summary,) = ppo.load_checkpoint(run / "checkpoint.pt"), json.loads((run / "summary.json").read_text())
    buffers = {
        name: saved[name] for name in ("agent", "optimizer", "actions", "minibatches", "state", "recent", "dims")
    }
    clocks = {"wall_seconds", "seconds", "sps"}
    return {
        "metrics": [{k: v for k, v in row.items() if k != "charts/SPS"} for row in csv_rows(run / "metrics.csv")],
        "episodes": (run / "episodes.csv").read_text(),
        "checkpoint": flat(buffers),
        "summary": {k: v for k, v in summary.items() if k not in clocks},
    }


def flat(x):
    """Tensors as bytes, all the way down, so that == compares bits."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.flatten().numpy().tobytes()
    if isinstance(x, dict):
        return {name: flat(value) for name, value in x.items()}
    return [flat(value) for value in x] if isinstance(x, list | tuple) else x


def test_a_run_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(finished, main, monkeypatch):
    """Stopped in its first update; in its fifth, after a checkpoint at the third; there again."""
    command, real = [*TINY.split(), "--run-dir", "run"], ppo.update
    for stop in (1, 5, 2):
        calls = iter(range(1, 100))

        def update(*args, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "update", update)
            assert main(*command).code == 130
        command = ["--resume", "run"]
    assert main(*command).code == 0
    ours, theirs = content(Path("run")), content(finished)
    for name in theirs:
        assert ours[name] == theirs[name], name


def test_a_run_that_is_no_longer_finite_stops_with_code_3(main, monkeypatch, tmp_path):
    real = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: (real(*args)[0] * math.nan, real(*args)[1]))
    code, out, err = main(*TINY.split(), "--run-dir", "run")
    assert code == 3 and out == [] and re.match(r"error: \w+ not finite in update 1;", err[-1])


def test_evaluation_is_repeatable_and_captures_the_screen(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (summary,) = json.loads((finished / "summary.json").read_text())
    results = []
    for flags in ("", "--sample-actions", "--sample-actions --capture-video"):
        code, (line,), err = main("--evaluate", "run", "--eval-episodes", 2, *flags.split())
        (result,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert code == 0 and err == [] and f"{result['eval_return_mean']:.1f}" in line
        results.append(result["returns"])
    assert np.mean(results[0]) == summary["eval_return_mean"] and results[1] == results[2] and len(results[1]) == 2
    videos = sorted((tmp_path / "run" / "videos").iterdir())
    assert [video.name for video in videos] == ["game-0.mp4", "game-1.mp4"]
    assert all(video.read_bytes()[4:8] == b"ftyp" and video.stat().st_size > 3000 for video in videos)


def test_a_compiled_run_learns_the_same_from_one_program(finished, main, monkeypatch, tmp_path):
    """Traced as for any device, but run eagerly: neither annealing nor another update asks for another program."""
    programs, real = [], torch.compile

    def keep(program, inputs):
        programs.append([x for x in inputs if not isinstance(x, torch.Tensor)])
        return program.forward

    monkeypatch.setattr(torch, "compile", partial(real, backend=keep))
    assert main(*TINY.split(), "--run-dir", "run", "--compile").code == 0
    assert programs == [[]]  # no size is an input: of convolutions of an unknown size, Inductor makes slower ones
    ours, theirs = csv_rows(tmp_path / "run" / "metrics.csv"), csv_rows(finished / "metrics.csv")
    for row in (*ours, *theirs):
        del row["charts/SPS"]
    assert ours == theirs


# -------------------------------------------------------------------------------------------------------------- errors
FLAGS = {
    "--env-id Breakot-v5": "'Breakot-v5' is none of EnvPool's Atari games, such as Pong-v5; did you mean Breakout-v5?",
    "--env-id ALE/Pong-v5": "did you mean Pong-v5?",
    "--env-id HalfCheetah-v4": "'HalfCheetah-v4' is none of EnvPool's Atari games, such as Pong-v5",
    "--env-id=": "'' is none of EnvPool's Atari games",
    "--num-envs 9 --num-minibatches 5": "9 x 128 = 1152 steps does not divide into 5 minibatches",
    "--num-envs 1 --num-steps 8": "at least 4 steps",
    "--num-envs 100000 --num-steps 1000": "a batch of 100000000 steps is too large",
    "--total-timesteps 0": "--total-timesteps must be between 1 and",
    "--sticky-actions 1.5": "--sticky-actions must be between 0 and 1, not 1.5",
    "--sticky-actions nan": "--sticky-actions must be between 0 and 1, not nan",
    "--threads -1": "--threads must be 0 or more, not -1",
    "--objective clip": "'clip' is no objective",
    "--seed -1": "--seed must be between 0",
    "--learning-rate 0": "--learning-rate must be a positive number",
    "--max-grad-norm nan": "--max-grad-norm must be positive",
    "--precision float16": "Expected one of ('auto', 'bfloat16', 'float32')",
    "--device cuda": "no CUDA",
    "--device tpu": "--device must be cpu or cuda",
    "--compile": "--compile needs a C++ compiler",
    "--capture-video": "--capture-video needs moviepy",
    "--resume nowhere": "nowhere is not a run folder",
    "--evaluate nowhere": "nowhere is not a run folder",
    "--run-dir /proc/nope": "cannot write to /proc/nope",
    "--anneal-clp": "did you mean --anneal-clip?",
}


@pytest.mark.parametrize("command", FLAGS)
def test_a_bad_flag_is_one_line(command, main, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(ppo, "find_spec", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = main(*command.split(" "))
    assert (code, out, len(err)) == (2, [], 1) and err[0].startswith("error: ") and FLAGS[command] in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-envs 2", "2 environments cannot be split over 3 ranks, there are more ranks than environments"),
        ("--num-envs 8", "8 environments cannot be split over 3 ranks, each rank needs as many"),
        ("--num-envs 9 --num-minibatches 128 --num-steps 32", "9 x 32 / 3 ranks = 96 steps does not divide into 128"),
    ],
)
def test_ranks_that_do_not_suit_are_told_before_they_meet(flags, said, main, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, out, err = main(*flags.split())
    assert (code, out, len(err)) == (2, [], 1) and said in err[0] and list(tmp_path.iterdir()) == []


def test_evaluation_under_torchrun_is_refused(finished, main, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    code, out, err = main("--evaluate", "run")
    assert (code, out) == (2, []) and err == ["error: an agent is evaluated by one process: start it without torchrun"]
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_folder_of_another_script_is_refused(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"script": "ppo_cartpole", "args": {}}))
    assert "a run of ppo_cartpole.py, not of ppo_atari.py" in main("--resume", "run").err[0]
    assert "--seed cannot stand beside --evaluate" in main("--evaluate", "run", "--seed", "2").err[0]
    assert os.listdir(tmp_path) == ["run"]


# ------------------------------------------------------------------------------------------------------- benchmark/
def test_the_documented_runs_can_be_made_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(atari, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(atari, "RESULTS", tmp_path / "results")
    tasks = {name: atari.Task("toy", f"{TINY} --precision {name}", 1) for name in ("float32", "bfloat16")}
    monkeypatch.setattr(atari, "TASKS", tasks)
    with pytest.raises(FileNotFoundError):
        atari.main(["--report"])
    atari.main(["--runs", "float32"])
    first = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert set(first) == {"runs.csv", "curves.csv", "summary.md", "toy.png"}
    (row,) = read_csv(tmp_path / "results" / "runs.csv")
    assert (row["run"], row["precision"], row["total_timesteps"]) == ("float32", "float32", "1536")
    assert int(row["games"]) > 0 and f"| {float(row['mean_return']):.1f} |" in first["summary.md"].decode()
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
    monkeypatch.setitem(tasks, "bfloat16", atari.Task("toy", f"{TINY} --precision bfloat16 --gamma 0.9", 1))
    with pytest.raises(UserError, match=r"gamma 0\.99 instead of 0\.9"):
        atari.main(["--runs", "bfloat16"])
