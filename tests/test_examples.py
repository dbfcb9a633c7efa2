"""The patches in examples/ apply to ppo_cartpole.py as it stands, and each copy does its idea.

When a change of the script breaks a patch, apply the patch to a copy of the old script, make the
change there too, and write the patch anew: docs/changing.md says how.
"""

import functools
import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TINY, rounding
from torch.distributions import Categorical, kl_divergence

import ppo_atari
import ppo_cartpole
from benchmark import recurrent, sweep
from benchmark.sweep import read

ROOT = Path(ppo_cartpole.__file__).parent
EXAMPLES = ROOT / "examples"
# changed lines, added or removed; a longer patch is no lesson any more
LIMITS = {"recurrent": 68, "multidiscrete": 43, "action-mask": 30, "my-loss": 30}
TOOLS = {
    "git": ["git", "apply", "-v"],
    "patch": ["patch", "--strip=1", "--fuzz=0", "--input"],
}


# ------------------------------------------------------------------------------------ the patches
def patched_text(name: str, folder: Path, tool: str = "git") -> str:
    """ppo_cartpole.py with a patch of examples/, written by this tool into an empty folder."""
    path = folder / "ppo_cartpole.py"
    path.write_text((ROOT / "ppo_cartpole.py").read_text())
    command = [*TOOLS[tool], str(EXAMPLES / f"{name}.patch")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return path.read_text()


def imported(path: Path, name: str) -> ModuleType:
    """A changed script as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclass() looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A function: the name of a patch -> ppo_cartpole.py with it, imported."""

    @functools.cache
    def make(name: str) -> ModuleType:
        folder = tmp_path_factory.mktemp(name)
        patched_text(name, folder)
        return imported(folder / "ppo_cartpole.py", f"patched_{name.replace('-', '_')}")

    return make


def test_every_patch_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.patch")} == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_a_patch_applies_and_is_short_and_tidy(name, tmp_path):
    texts = set()
    for tool in TOOLS:
        (tmp_path / tool).mkdir()
        texts.add(patched_text(name, tmp_path / tool, tool))
    (text,) = texts
    assert text != (ROOT / "ppo_cartpole.py").read_text()

    lines = (EXAMPLES / f"{name}.patch").read_text().splitlines()
    changed = [x for x in lines if x[:1] in ("+", "-") and not x.startswith(("+++", "---"))]
    assert len(changed) <= LIMITS[name]

    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), str(tmp_path / "git/ppo_cartpole.py")]
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run([*ruff, *command, *config], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------- environments
class Recall(gym.Env):
    """The first observation says which action will pay at the fourth step; the others say nothing.

    Then the episode is truncated.
    """

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.paying = int(self.np_random.integers(2))
        self.count = 0
        return np.array([2.0 * self.paying - 1], np.float32), {}

    def step(self, action):
        self.count += 1
        reward = 0.0
        if self.count == 4:
            reward = 1.0 if action == self.paying else -1.0
        return np.zeros(1, np.float32), reward, False, self.count == 4, {}


class Dials(gym.Env):
    """Two dials, of 2 and 3 positions, counted from 1 and from 0. Each one set right pays 1/2."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.MultiDiscrete([2, 3], start=[1, 0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def observe(self):
        self.right = self.np_random.integers([1, 0], [3, 3])
        return (self.right - 1).astype(np.float32)

    def step(self, action):
        if not self.action_space.contains(np.asarray(action)):
            raise ValueError(f"no such positions: {action}")
        reward = float(np.mean(action == self.right))
        return self.observe(), reward, False, False, {}


class Doors(gym.Env):
    """Four doors, of which two can be opened; the one further to the right pays 1.

    An observation is a number that says nothing, and the mask. The last one of an episode allows
    nothing.
    """

    observation_space = gym.spaces.Box(0, 1, (5,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def observe(self):
        self.mask = np.zeros(4, np.float32)
        if self.count < 5:
            self.mask[self.np_random.choice(4, 2, replace=False)] = 1
        return np.append(np.float32(self.np_random.random()), self.mask)

    def step(self, action):
        if not self.mask[action]:
            raise ValueError(f"door {action} is locked")
        reward = float(action == self.mask.nonzero()[0].max())
        self.count += 1
        return self.observe(), reward, self.count == 5, False, {}


class Ragged(gym.Env):
    """Random observations and rewards. Episodes of 2 to 6 steps end one way or the other."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2, 7))
        return self.observe(), {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def step(self, action):
        self.left -= 1
        terminated = self.left == 0 and self.np_random.random() < 0.5
        truncated = self.left == 0 and not terminated
        return self.observe(), float(self.np_random.normal()), terminated, truncated, {}


gym.register("Recall-v0", Recall)
gym.register("Ragged-v0", Ragged)
gym.register("Dials-v0", Dials, max_episode_steps=5)
gym.register("Doors-v0", Doors, max_episode_steps=100)

SMALL = "--num-envs 16 --num-steps 32 --num-minibatches 4 --learning-rate 0.01 --eval-episodes 40"


def trained(module: ModuleType, flags: str, folder: Path) -> float:
    """The mean return of the evaluation after a training; the run stays in folder/run."""
    args = module.parse_args([*flags.split(), "--run-dir", str(folder / "run")])
    _, summary = module.train(args)
    return summary["eval_return_mean"]


class Recorder:
    """What a script's collect(), update() and ppo_loss() take and give."""

    def __init__(self, module: ModuleType, patch: pytest.MonkeyPatch):
        self.rollouts, self.batches, self.losses = [], [], []
        self.real = {name: getattr(module, name) for name in ("collect", "update", "ppo_loss")}
        for name in self.real:
            patch.setattr(module, name, getattr(self, name))

    def collect(self, play, actors, noise):
        rollout, episodes = self.real["collect"](play, actors, noise)
        self.rollouts.append(rollout | {"noise": torch.from_numpy(noise)})
        return rollout, episodes

    def update(self, agent, batch, **rest):
        self.agent = agent
        self.batches.append(batch)
        return self.real["update"](agent=agent, batch=batch, **rest)

    def ppo_loss(self, **given):
        self.losses.append(given)
        return self.real["ppo_loss"](**given)

    def over_time(self, name: str) -> torch.Tensor:
        """Of all rollouts, one after another: [all steps, N, ...]"""
        return torch.cat([rollout[name][: len(rollout["noise"])] for rollout in self.rollouts])


# ------------------------------------------------------------------------------------- recurrent
RAGGED = "--env-id Ragged-v0 --num-envs 4 --num-steps 32 --num-minibatches 2 --eval-episodes 1"
RAGGED += " --no-anneal-lr --gamma 0.9 --checkpoint-every 1000"


@pytest.fixture(scope="module")
def still(patched, tmp_path_factory):
    """The recurrent script on Ragged-v0 for three updates that learn nothing: what it recorded."""
    module = patched("recurrent")
    flags = f"{RAGGED} --total-timesteps 384 --learning-rate 1e-12"
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(module, patch)
        trained(module, flags, tmp_path_factory.mktemp("still"))
    return recorder


def begins(recorder: Recorder) -> torch.Tensor:
    """Whether an episode begins in a row, [all steps, N]: in the first, and after every reset."""
    valid = recorder.over_time("valid")
    return torch.cat([torch.ones_like(valid[:1]), ~valid[:-1]])


def remember(recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory before every row and after it, [all steps, N, H]: told anew, by the episodes."""
    obs, first = recorder.over_time("obs"), begins(recorder)
    before, after = [], [torch.zeros(4, 64)]
    with torch.no_grad():
        for t in range(len(obs)):
            before.append(after[-1].masked_fill(first[t].unsqueeze(1), 0))
            after.append(recorder.agent.gru(obs[t], before[-1]))
    return torch.stack(before), torch.stack(after[1:])


@pytest.fixture(scope="module")
def memories(still):
    return remember(still)


CLOSE = {"rtol": 0, "atol": rounding(128, 1)}  # sums of some hundred products below 1


def test_the_memory_is_empty_where_an_episode_begins_and_nowhere_else(still, memories):
    before, _ = memories
    recorded = still.over_time("memory")
    assert recorded.shape == (3 * 32, 4, 64)
    torch.testing.assert_close(recorded, before, **CLOSE)
    empty = (recorded == 0).all(-1)
    assert torch.equal(empty, begins(still))
    assert (empty.any(1) & ~empty.all(1)).any()  # of some actors, while others remember
    # so it goes on from one rollout to the next, in whose middle an episode may be
    assert not empty[32].all() and not empty[64].all()


def test_the_recurrent_policy_is_one_in_rollout_and_update(still, memories):
    _, after = memories
    with torch.no_grad():
        log_probs = still.agent.policy(after)
    actions = still.over_time("actions")
    valid = still.over_time("valid")
    played = (log_probs + still.over_time("noise")).argmax(-1)
    assert (played == actions)[valid].all()

    recorded = torch.cat([batch["log_probs"].transpose(0, 1) for batch in still.batches])
    torch.testing.assert_close(recorded, log_probs, **CLOSE)
    assert len(still.losses) == 3 * 4 * 2  # updates, epochs, minibatches
    for loss in still.losses:
        torch.testing.assert_close(loss["log_prob"], loss["batch"]["log_prob"], **CLOSE)
        torch.testing.assert_close(loss["kl"], torch.zeros_like(loss["kl"]), **CLOSE)
        torch.testing.assert_close(loss["values"], loss["batch"]["values"], **CLOSE)
        assert loss["log_prob"].requires_grad and loss["values"].requires_grad
        advantages = loss["batch"]["advantages"]  # standardised, over transitions alone
        assert abs(advantages.mean()) < 1e-5 and advantages.std() == pytest.approx(1, abs=1e-4)
    # every transition once in an epoch, no reset step
    for update, batch in enumerate(still.batches):
        expected = batch["returns"][batch["valid"]].sort().values
        for epoch in range(4):
            first = update * 8 + epoch * 2
            parts = [loss["batch"]["returns"] for loss in still.losses[first : first + 2]]
            assert torch.equal(torch.cat(parts).sort().values, expected)


def test_a_truncated_sequence_is_bootstrapped_with_the_memory_of_its_last_observation(
    still, memories
):
    _, after = memories
    with torch.no_grad():
        values = still.agent.value(after)
    rewards = still.over_time("rewards")
    advantages = torch.cat([batch["advantages"].transpose(0, 1) for batch in still.batches])
    ends = {"terminated": 0, "truncated": 0}
    for name in ends:
        for t, i in still.over_time(name).nonzero().tolist():
            if t + 1 < len(values):
                last = 0.9 * values[t + 1, i] if name == "truncated" else 0.0
                expected = rewards[t, i] + last - values[t, i]
                assert advantages[t, i].item() == pytest.approx(expected.item(), abs=1e-5)
                ends[name] += 1
    assert min(ends.values()) > 10
    # and where a rollout ends in mid-episode, with that of the next observation
    ended = still.over_time("terminated") | still.over_time("truncated")
    for t in (31, 63):
        expected = rewards[t] + 0.9 * values[t + 1] - values[t]
        inside = still.over_time("valid")[t] & ~ended[t]
        assert inside.any()
        torch.testing.assert_close(advantages[t][inside], expected[inside], rtol=0, atol=1e-5)


def test_gradients_flow_through_time_and_not_through_an_end(still, patched):
    batch = {name: x[:1] for name, x in still.batches[0].items()}
    obs = batch["obs"].clone().requires_grad_()
    rows = patched("recurrent").unroll(still.agent, batch | {"obs": obs})
    valid = batch["valid"][0]
    places = valid.nonzero().squeeze(1).tolist()
    assert rows["obs"].shape == (valid.sum(), 64)
    assert torch.equal(rows["actions"], batch["actions"][0][valid])
    for place, memory in zip(places, rows["obs"], strict=True):
        (grad,) = torch.autograd.grad(memory.sum(), obs, retain_graph=True)
        reached = (grad[0] != 0).any(-1).nonzero().squeeze(1).tolist()
        start = begins(still)[: place + 1, 0].nonzero().max().item()
        assert reached == list(range(start, place + 1))

    # what the value function learns does not reach the memory
    value = still.agent.value(rows["obs"]).sum()
    grads = torch.autograd.grad(value, list(still.agent.gru.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)


def test_the_kl_after_an_update_is_that_of_the_memories_it_has_now(patched, tmp_path, monkeypatch):
    module = patched("recurrent")
    recorder = Recorder(module, monkeypatch)
    trained(module, f"{RAGGED} --total-timesteps 128 --learning-rate 0.01", tmp_path)
    _, after = remember(recorder)
    with torch.no_grad():
        new = recorder.agent.policy(after)
    old = recorder.batches[0]["log_probs"].transpose(0, 1)
    valid = recorder.over_time("valid")
    expected = (old.exp() * (old - new)).sum(-1)[valid].mean().item()
    found = float(read(tmp_path / "run/metrics.csv")["losses/kl_after_update"][0])
    assert expected > 1e-3 and found == pytest.approx(expected, rel=1e-3)


RECALL = f"--env-id Recall-v0 --total-timesteps 8192 {SMALL}"


@pytest.fixture(scope="module")
def recalled(patched, tmp_path_factory):
    """A finished run of the recurrent script on Recall-v0, and its evaluation."""
    folder = tmp_path_factory.mktemp("recall")
    return folder / "run", trained(patched("recurrent"), RECALL, folder)


def test_recurrent_learns_what_needs_a_memory_and_the_plain_script_cannot(recalled, tmp_path):
    _, score = recalled
    assert score > 0.9
    assert trained(ppo_cartpole, RECALL, tmp_path) < 0.5


def test_the_loaded_recurrent_policy_keeps_its_memory_too(recalled, patched):
    policy = patched("recurrent").load_policy(str(recalled[0]))
    env = Recall()
    total = 0.0
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        memory = np.zeros(64, np.float32)
        truncated = False
        while not truncated:
            action, memory = policy(obs, memory)
            obs, reward, _, truncated, _ = env.step(action)
            total += reward
    assert total / 20 > 0.9
    actions, memory = policy(np.zeros((3, 1), np.float32), np.zeros((3, 64), np.float32))
    assert actions.shape == (3,) and memory.shape == (3, 64)


def test_the_recurrent_policy_samples_with_noise_and_counts_as_the_environment_does(
    patched, tmp_path, monkeypatch
):
    """Noise makes one action all but certain. Levers are numbered from 1; the third one pays."""
    module = patched("recurrent")
    trained(module, f"--env-id Lever-v0 --total-timesteps 512 {SMALL}", tmp_path)
    agent, args = module.load_agent(str(tmp_path / "run"))
    args = replace(args, sample_actions=True, eval_episodes=2)
    policy = module.load_policy(str(tmp_path / "run"), sample_actions=True)
    for i, noise in enumerate(1000 * np.eye(3, dtype=np.float32)):
        draw = lambda shape, rng, noise=noise: np.broadcast_to(noise, shape)  # noqa: E731
        monkeypatch.setattr(module, "draw_noise", draw)
        assert module.evaluate(agent, args, tmp_path) == [5.0 if i == 2 else 0.0] * 2
        actions, _ = policy(np.zeros((4, 3), np.float32), np.zeros((4, 64), np.float32))
        assert actions.tolist() == [i + 1] * 4


def test_a_resumed_recurrent_run_ends_with_the_same_bits(patched, tmp_path, monkeypatch):
    module = patched("recurrent")
    flags = "--env-id examples:PositionOnlyCartPole-v1 --total-timesteps 1024 --num-envs 4"
    flags += " --num-steps 64 --num-minibatches 2 --eval-episodes 1 --checkpoint-every 2"
    whole = tmp_path / "whole"
    trained(module, flags, whole)

    def log(run, update, *rest, real=module.Run.log):
        if update == 3:
            raise KeyboardInterrupt
        real(run, update, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "log", log)
        with pytest.raises(KeyboardInterrupt):
            trained(module, flags, tmp_path)
    module.train(module.parse_args(["--resume", str(tmp_path / "run")]))
    tables = []
    for folder in (whole, tmp_path):
        tables.append(read(folder / "run/metrics.csv").drop(columns="charts/SPS"))
    assert tables[0].equals(tables[1]) and len(tables[0]) == 4


def test_recurrent_wants_minibatches_of_whole_actors(patched):
    module = patched("recurrent")
    flags = "--num-envs 8 --num-steps 64 --num-minibatches 16"
    with pytest.raises(module.UserError, match="--num-minibatches must divide --num-envs"):
        module.check_args(module.parse_args(flags.split()))


# --------------------------------------------------------------------------------- multidiscrete
def test_multidiscrete_is_independent_categoricals(patched):
    module = patched("multidiscrete")
    agents = [module.Agent(2, [2, 3]) for _ in range(2)]
    obs = torch.randn(100, 2)
    actions = torch.stack([torch.randint(2, (100,)), torch.randint(3, (100,))], -1)
    outputs, parts = [], []
    for agent in agents:
        torch.nn.init.orthogonal_(agent.actor[-1].weight)
        log_probs = agent.policy(obs)
        outputs.append(log_probs)
        logits = agent.actor(obs)  # the third of the first dial stands for nothing
        parts.append([Categorical(logits=logits[:, :2]), Categorical(logits=logits[:, 3:])])
    old, new = parts
    columns = range(2)
    log_prob = sum(old[k].log_prob(actions[:, k]) for k in columns)
    torch.testing.assert_close(module.log_prob_of(outputs[0], actions), log_prob)
    entropy = sum(old[k].entropy() for k in columns)
    torch.testing.assert_close(module.entropy_of(outputs[0]), entropy)
    kl = sum(kl_divergence(old[k], new[k]) for k in columns)
    torch.testing.assert_close(module.kl_between(*outputs), kl, rtol=1e-4, atol=1e-6)

    noise = module.draw_noise((100, 2, 3), torch.Generator().manual_seed(1))
    drawn = module.act(agents[0], obs.numpy(), noise)
    assert [set(drawn[:, k]) for k in columns] == [{0, 1}, {0, 1, 2}]


def test_multidiscrete_learns(patched, tmp_path, monkeypatch):
    module = patched("multidiscrete")
    with monkeypatch.context() as patch:
        recorder = Recorder(module, patch)
        score = trained(module, f"--env-id Dials-v0 --total-timesteps 10240 {SMALL}", tmp_path)
    first = recorder.rollouts[0]["actions"].flatten(0, 1).tolist()
    assert len(set(map(tuple, first))) == 6  # each dial has a noise of its own
    assert score > 4.5  # of 5; chance gives 2.1
    policy = module.load_policy(str(tmp_path / "run"))
    obs = np.array([[0, -1], [1, 1], [0, 0]], np.float32)
    assert policy(obs).tolist() == [[1, 0], [2, 2], [1, 1]]
    assert policy(obs[0]).tolist() == [1, 0]
    agent, args = module.load_agent(str(tmp_path / "run"))
    sampled = module.evaluate(agent, replace(args, sample_actions=True), tmp_path)
    assert np.mean(sampled) > 4
    shapes, draw_noise = [], module.draw_noise
    draw = lambda shape, rng: shapes.append(shape) or draw_noise(shape, rng)  # noqa: E731
    monkeypatch.setattr(module, "draw_noise", draw)
    sampling = module.load_policy(str(tmp_path / "run"), sample_actions=True)
    assert sampling(obs).shape == (3, 2) and sampling(obs[0]).shape == (2,)
    assert shapes == [(3, 2, 3), (2, 3)]  # each dial has its own here, too
    wrong = module.parse_args(["--env-id", "Lever-v0", "--run-dir", str(tmp_path / "none")])
    with pytest.raises(module.UserError, match="wants MultiDiscrete"):
        module.train(wrong)


# ----------------------------------------------------------------------------------- action mask
DOORS = f"--env-id Doors-v0 --total-timesteps 5120 {SMALL}"


def test_a_masked_action_is_never_taken(patched, tmp_path, monkeypatch):
    """Doors-v0 fails where a locked door is opened: in rollouts and evaluations."""
    module = patched("action-mask")
    with monkeypatch.context() as patch:
        recorder = Recorder(module, patch)
        score = trained(module, DOORS, tmp_path)
    assert score > 4.8  # of 5; chance gives 2.5

    # in updates it has no probability, no part in entropy or KL, and no gradient
    for batch in recorder.batches:
        mask = batch["obs"][batch["valid"]][:, 1:] > 0
        probabilities = batch["log_probs"][batch["valid"]].exp()
        assert (probabilities[~mask] == 0).all()
        assert torch.isfinite(batch["log_probs"]).all()  # after the end, where none is allowed
    for loss in recorder.losses:
        taken = loss["batch"]["actions"].unsqueeze(-1)
        assert (loss["batch"]["obs"][:, 1:].gather(-1, taken) == 1).all()
        assert (loss["entropy"] <= np.log(2) + 1e-6).all()
        assert torch.isfinite(loss["kl"]).all()

    agent, args = module.load_agent(str(tmp_path / "run"))
    module.evaluate(agent, replace(args, sample_actions=True), tmp_path)
    for sample_actions in (False, True):
        policy = module.load_policy(str(tmp_path / "run"), sample_actions)
        obs = np.tile(np.array([1, 0, 1, 1, 0], np.float32), (1000, 1))
        assert set(policy(obs)) <= {1, 2}


def test_without_the_patch_a_masked_action_is_taken(tmp_path):
    with pytest.raises(RuntimeError, match="is locked"):
        trained(ppo_cartpole, DOORS, tmp_path)


# --------------------------------------------------------------------------------------- my loss
def spo_terms(module: ModuleType, log_prob: torch.Tensor, old_log_prob: float, advantage: float):
    """ppo_loss() of one transition, [1] each."""
    one = torch.ones(1)
    batch = {"log_prob": old_log_prob * one, "advantages": advantage * one}
    return module.ppo_loss(
        log_prob=log_prob,
        entropy=one,
        kl=one,
        values=one,
        batch=batch | {"returns": one, "values": one},
        objective=module.parse_objective("spo:0.2"),
        beta=0.0,
        args=module.Args(),
    )


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.5, 2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, 1.2, 1.5])
def test_spo_is_its_formula(patched, ratio, advantage):
    module = patched("my-loss")
    log_prob = torch.tensor([-1.0], requires_grad=True)
    terms = spo_terms(module, log_prob, -1 - math.log(ratio), advantage)
    gain = ratio * advantage - abs(advantage) / (2 * 0.2) * (ratio - 1) ** 2
    assert -terms["policy_loss"].item() == pytest.approx(gain, abs=1e-5)
    terms["policy_loss"].sum().backward()
    # the gain is largest where the ratio is 1 + eps, or 1 - eps; beyond, it is pulled back
    best = 1 + 0.2 * np.sign(advantage)
    expected = ratio * abs(advantage) * (best - ratio) / 0.2
    assert -log_prob.grad.item() == pytest.approx(expected, abs=1e-5)


def test_spo_learns_by_its_flag(patched, tmp_path):
    module = patched("my-loss")
    flags = f"--env-id Lever-v0 --objective spo:0.2 --total-timesteps 5120 {SMALL}"
    assert trained(module, flags, tmp_path) == 5
    for text in ("spo", "spo:0", "spo:nan"):
        with pytest.raises(module.UserError, match="spo:EPS"):
            module.parse_objective(text)
    assert module.parse_objective("clip:0.1") == tuple(ppo_cartpole.parse_objective("clip:0.1"))


@pytest.mark.parametrize("logratio", [22.0, 89.0, 1e4])
def test_spo_is_finite_where_the_ratio_is_not(patched, logratio):
    module = patched("my-loss")
    log_prob = torch.tensor([logratio], requires_grad=True)
    terms = spo_terms(module, log_prob, 0.0, -1.0)
    terms["policy_loss"].sum().backward()
    assert all(torch.isfinite(term).all() for term in terms.values())
    assert torch.isfinite(log_prob.grad.square()).all()  # as the norm of the gradient takes it


# ------------------------------------------------------------------------ benchmark/recurrent.py
def test_the_report_holds_both_policies_against_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(recurrent, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recurrent, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recurrent, "SEEDS", range(1, 2))
    flags = "--env-id examples:PositionOnlyCartPole-v1 --total-timesteps 2048"
    flags += " --num-envs 4 --num-steps 64 --num-minibatches 2 --eval-episodes 1"
    monkeypatch.setattr(recurrent, "FLAGS", flags)

    def here(calls, layout, tick):  # an engine without processes
        for call in calls:
            yield call, sweep.work(call, layout)

    monkeypatch.setattr(sweep, "choose_engine", lambda args: here)
    monkeypatch.setattr(sys, "path", [*sys.path])  # main() adds the folder of the patched copy
    recurrent.main([])
    del sys.modules["ppo_recurrent"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert set(written) == {"runs.csv", "curves.csv", "curves.png", "summary.md"}
    rows = read(tmp_path / "results/runs.csv")
    assert list(rows["policy"]) == ["feed-forward", "recurrent"]
    text = written["summary.md"].decode()
    assert f"python ppo_recurrent.py {flags} --seed S" in text
    for row in rows.to_dict("records"):
        assert f"| {row['policy']} | {float(row['eval_return_mean']):.1f}" in text
    quotient = float(rows["sps"][0]) / float(rows["sps"][1])
    assert f"{quotient:.1f} times as long per step" in text
    recurrent.main(["--report"])
    for name, content in written.items():
        assert (tmp_path / "results" / name).read_bytes() == content


# -------------------------------------------------------------------------------- docs/changing.md
PAGE = (ROOT / "docs/changing.md").read_text()


def test_the_changes_on_the_page_fit_the_script_and_train(tmp_path):
    """All of them at once, in one copy."""
    text = (ROOT / "ppo_cartpole.py").read_text()
    snippets = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    for snippet in snippets:
        lines = snippet.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    assert len(snippets) >= 5
    (tmp_path / "changed.py").write_text(text)
    module = imported(tmp_path / "changed.py", "changed_ppo_cartpole")
    trained(module, f"{TINY} --drift-coef 0.5", tmp_path)
    assert (read(tmp_path / "run/metrics.csv")["losses/drift"].astype(float) > 0).all()


def test_the_page_names_what_there_is():
    links = re.findall(r"\]\(([^)]*)\)", PAGE)
    for link in links:
        if "/results/" not in link:  # written by benchmark/recurrent.py
            assert (ROOT / "docs" / link).exists(), link
    assert {Path(link).stem for link in links if link.endswith(".patch")} == set(LIMITS)
    for name in re.findall(r"`([a-z_]+)`", PAGE.partition("## Examples")[0]):
        in_a_script = hasattr(ppo_cartpole, name) or hasattr(ppo_atari, name)
        assert in_a_script or name == "returns", name
