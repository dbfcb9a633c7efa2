"""Copies of the scripts in which somebody has changed one text.

Where the change makes sense, the copy must be one algorithm still: it plays, learns and evaluates
what Agent.policy says, and a new metric changes nothing. Where the change is a mistake, a check
that the ordinary tests use must fail on the copy. (tests/test_atari.py does the same for what
ppo_atari.py does in its own way, tests/test_grpo.py for grpo_toy.py.)
"""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import test_cartpole_algorithm as checks
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import ppo_cartpole

ROOT = Path(ppo_cartpole.__file__).parent
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32's 2^-24, after sums of some hundred numbers near 1


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function: a script's name and edits (old text, new text) -> the edited copy, imported.

    An old text must be there exactly once.
    """

    def make(script: str, *edits: tuple[str, str]) -> ModuleType:
        text = (ROOT / f"{script}.py").read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{script}.py has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        path = tmp_path / f"{script}.py"
        path.write_text(text)
        name = f"edited_{script}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclass() looks there
        spec.loader.exec_module(module)
        return module

    return make


# ------------------------------------------------------------------------------------ one policy
def distribution(agent, obs):
    """What Agent.policy says, for observations as the environment gives them."""
    output = agent.policy(torch.as_tensor(obs))
    if isinstance(output, tuple):
        mean, log_std = output
        return Independent(Normal(mean, log_std.exp()), 1)
    return Categorical(logits=output)


@torch.no_grad()
def assert_played(agent, obs, noise, actions, bounds=(-np.inf, np.inf)) -> None:
    """These actions are what Agent.policy gives with this noise; 0.0 for the likeliest."""
    policy = distribution(agent, obs)
    if isinstance(policy, Categorical):
        scores = policy.logits.numpy() + noise
        chosen = np.take_along_axis(scores, np.asarray(actions)[..., np.newaxis], -1)[..., 0]
        assert (scores.max(-1) - chosen < CLOSE["atol"]).all()  # the best, or as good
    else:
        expected = policy.base_dist.loc.numpy() + policy.base_dist.scale.numpy() * noise
        np.testing.assert_allclose(actions, expected.clip(*bounds), **CLOSE)


class Witness:
    """Stands in for functions of a script, and holds what each is given against Agent.policy."""

    def __init__(self, script, patch: pytest.MonkeyPatch):
        self.counts = dict.fromkeys(("steps", "minibatches", "greedy", "sampled"), 0)
        self.evaluated = []  # observations of the evaluations
        self.evaluation = None  # the flags of the evaluation that is going on
        self.real = {}
        for name in ("begin", "draw_noise", "collect", "update", "ppo_loss", "evaluate"):
            self.real[name] = getattr(script, name)
            patch.setattr(script, name, getattr(self, name))
        real_step = script.Actors.step

        def step(actors, actions):
            if self.evaluation is not None:
                self.see_action(actors.obs, actions)
            return real_step(actors, actions)

        patch.setattr(script.Actors, "step", step)

    def begin(self, *given):
        state, parts = self.real["begin"](*given)
        self.agent, self.action_rng = parts["agent"], parts["action_rng"]
        return state, parts

    def draw_noise(self, *given):
        self.noise, self.noise_rng = self.real["draw_noise"](*given), given[1]
        return self.noise

    def collect(self, play, actors, noise):
        """Every actor has noise of its own, from the stream of actions."""
        assert noise is self.noise and self.noise_rng is self.action_rng
        assert noise.shape[1] == actors.num_envs
        rollout, episodes = self.real["collect"](play, actors, noise)
        assert_played(self.agent, rollout["obs"][:-1], noise, rollout["actions"].numpy())
        self.counts["steps"] += len(noise)
        return rollout, episodes

    def update(self, batch, **rest):
        """log_prob is that of the policy; kl_after_update is how far the policy has gone."""
        with torch.no_grad():
            old = distribution(self.agent, batch["obs"])
        torch.testing.assert_close(batch["log_prob"], old.log_prob(batch["actions"]), **CLOSE)
        self.is_first = True
        metrics = self.real["update"](batch=batch, **rest)
        with torch.no_grad():
            kl = kl_divergence(old, distribution(self.agent, batch["obs"]))[batch["valid"]].mean()
        assert metrics["kl_after_update"] == pytest.approx(kl.item(), rel=1e-3, abs=1e-5)
        return metrics

    def ppo_loss(self, log_prob, entropy, kl, batch, **rest):
        """All three are the policy's. The ratio of the first minibatch is 1, others have moved."""
        policy = distribution(self.agent, batch["obs"])
        torch.testing.assert_close(log_prob, policy.log_prob(batch["actions"]), **CLOSE)
        torch.testing.assert_close(entropy, policy.entropy(), **CLOSE)
        assert log_prob.requires_grad and kl.requires_grad
        ratio = (log_prob - batch["log_prob"]).exp()
        if self.is_first:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), **CLOSE)
            torch.testing.assert_close(kl, torch.zeros_like(kl), **CLOSE)
        else:
            assert (ratio - 1).abs().max() > 1e-3
        self.is_first = False
        self.counts["minibatches"] += 1
        return self.real["ppo_loss"](log_prob=log_prob, entropy=entropy, kl=kl, batch=batch, **rest)

    def evaluate(self, agent, args, path):
        self.agent = agent
        self.evaluation = args
        returns = self.real["evaluate"](agent, args, path)
        self.evaluation = None
        return returns

    def see_action(self, obs, actions):
        """An action of an evaluation."""
        sampled = self.evaluation.sample_actions
        assert_played(self.agent, obs, self.noise if sampled else 0.0, actions)
        self.counts["sampled" if sampled else "greedy"] += 1
        self.evaluated.append(obs[0])


ENVIRONMENTS = {
    "ppo_cartpole": "conftest:Lever-v0",  # three actions, 5 steps
    "ppo_continuous": "Reacher-v4",  # two actions, 50 steps
}


def check_one_policy(script, folder: Path, monkeypatch) -> None:
    """Trains, evaluates, loads: all that acts or learns is held against Agent.policy."""
    run = str(folder / "run")
    args = script.Args(
        env_id=ENVIRONMENTS[Path(script.__file__).stem],
        total_timesteps=128,
        num_envs=2,
        num_steps=32,
        num_minibatches=2,
        update_epochs=2,
        learning_rate=1e-2,
        eval_episodes=10,
        compile=False,
        run_dir=run,
    )
    with monkeypatch.context() as patch:
        witness = Witness(script, patch)
        script.train(args)
        agent, args = script.load_agent(run)
        script.evaluate(agent, replace(args, sample_actions=True), folder)
        assert (witness.counts["steps"], witness.counts["minibatches"]) == (2 * 32, 2 * 2 * 2)
        assert witness.counts["greedy"] == witness.counts["sampled"] >= 10 * 5

        space = gym.make(args.env_id).action_space
        obs = np.stack(witness.evaluated)
        for sample_actions in (False, True):
            policy = script.load_policy(run, sample_actions=sample_actions)
            for given in (obs, obs[0]):  # a batch, and one
                actions = policy(given)
                noise = witness.noise if sample_actions else 0.0
                if isinstance(space, gym.spaces.Discrete):
                    assert_played(agent, given, noise, actions - space.start)
                else:
                    assert_played(agent, given, noise, actions, (space.low, space.high))


TANH = """        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
"""
RELU = (TANH, TANH.replace("Tanh", "ReLU"))
LOGITS = "        logits = self.actor(obs)\n"
MASK = (LOGITS, LOGITS + "        logits[..., 0] = -math.inf\n")
MEAN = "        mean = self.actor(self.normalise(obs))\n"
FIXED = (
    MEAN,
    MEAN + "        mean = torch.cat([torch.full_like(mean[..., :1], 0.3), mean[..., 1:]], -1)\n",
)
POLICIES = [
    ("ppo_cartpole", "another activation", RELU),
    ("ppo_cartpole", "a masked action", MASK),
    ("ppo_continuous", "another activation", RELU),
    ("ppo_continuous", "an action that is constant", FIXED),
]


@pytest.mark.parametrize(("script", "what", "edit"), POLICIES)
def test_a_policy_edited_in_its_one_place_is_played_learned_and_evaluated(
    script, what, edit, edited, monkeypatch, tmp_path
):
    module = edited(script, edit)
    check_one_policy(module, tmp_path, monkeypatch)

    # and the edit is one: the same weights give another policy
    original = importlib.import_module(script)
    agent, _ = checks.random_batch(module, 2)
    torch.nn.init.orthogonal_(agent.actor[-1].weight)
    unchanged, _ = checks.random_batch(original, 2)
    unchanged.load_state_dict(agent.state_dict())
    obs = torch.randn(100, 4, generator=checks.seeded(1))
    assert kl_divergence(distribution(agent, obs), distribution(unchanged, obs)).mean() > 0.01
    if edit is MASK:
        noise = module.draw_noise((100, 3), checks.seeded(1))
        assert set(module.act(agent, obs.numpy(), noise)) == {1, 2}
    if edit is FIXED:
        assert (module.act(agent, obs.numpy())[:, 0] == np.float32(0.3)).all()
    if script == "ppo_continuous":  # the fast copy of the policy has given way
        assert module.in_numpy(agent).func is module.act
        assert original.in_numpy(unchanged).__name__ == "fast"


ACT = "agent.policy(torch.as_tensor(obs, dtype=torch.float32, device=device))"
RECORD = 'agent.policy(rollout["obs"][:-1])'
LOSS = 'agent.policy(minibatch["obs"])'
AFTER = 'agent.policy(batch["obs"])'
GUARD = "np.allclose(fast(obs, 1), exact(obs, 1), rtol=1e-4, atol=1e-5)"
SAMPLE = "(agent.actor(torch.as_tensor(obs)).detach().numpy() + noise).argmax(-1)"
BYPASSES = {
    "to act": ("ppo_cartpole", MASK, (ACT, ACT.replace("policy", "actor"))),
    "to record": ("ppo_cartpole", MASK, (RECORD, RECORD.replace("policy", "actor"))),
    "to learn": ("ppo_cartpole", MASK, (LOSS, LOSS.replace("policy", "actor"))),
    "to measure": ("ppo_cartpole", MASK, (AFTER, AFTER.replace("policy", "actor"))),
    "to evaluate": (
        "ppo_cartpole",
        MASK,
        ("act(agent, actors.obs, noise)", SAMPLE.replace("obs", "actors.obs")),
    ),
    "to be loaded": ("ppo_cartpole", MASK, ("act(agent, obs, noise) +", f"{SAMPLE} +")),
    "to act in NumPy": ("ppo_continuous", RELU, (GUARD, "True")),
    "with the noise of another actor": (
        "ppo_cartpole",
        MASK,
        ("shape = (args.num_steps, args.num_envs, ", "shape = (args.num_steps, 1, "),
    ),
    "with noise of another stream": (
        "ppo_continuous",
        RELU,
        ('draw_noise(shape, parts["action_rng"])', 'draw_noise(shape, parts["minibatch_rng"])'),
    ),
}


@pytest.mark.parametrize("purpose", BYPASSES)
def test_a_way_past_the_policy_is_caught(purpose, edited, monkeypatch, tmp_path):
    """So the test above has eyes. Most of these are mistakes that the scripts once made."""
    script, *edits = BYPASSES[purpose]
    module = edited(script, *edits)
    # in a rollout, train() makes a RuntimeError of it, which says in which update it was
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_one_policy(module, tmp_path, monkeypatch)
    assert "AssertionError" in repr(caught.value)


# --------------------------------------------------------------------------------------- metrics
LAST = '        "clipfrac": ((ratio - 1).abs() > objective.epsilon).float(),\n'
FIRST = "    return {  # the first three are learned from, the others are watched  [detail 12]\n"
METRIC = '        "surprise": advantages.abs(),\n'


@pytest.mark.parametrize(
    "edit",
    [(LAST, LAST + METRIC), (FIRST, FIRST + METRIC)],
    ids=["added", "first"],
)
@pytest.mark.parametrize("script", ["ppo_cartpole", "ppo_continuous"])
def test_a_new_metric_changes_nothing_wherever_it_stands(script, edit, edited):
    results = []
    for module in (importlib.import_module(script), edited(script, edit)):
        agent, batch = checks.random_batch(module, 64, resets=0.2)
        flags = {"ent_coef": 0.01, "objective": "kl:1", "compile": False}
        results.append(checks.updated(module, batch, agent, **flags))
    (weights, metrics), (new_weights, new_metrics) = results
    assert checks.same(weights, new_weights)
    assert new_metrics.pop("surprise") > 0 and metrics == new_metrics


# -------------------------------------------------------------------------------------- mistakes
def check_gae(script) -> None:
    for seed in range(20):
        checks.check_gae(script, seed, steps=12, actors=3, gamma=0.9, lam=0.8)


def check_loss(script) -> None:
    for objective in checks.OBJECTIVES:
        for ratio in (*checks.RATIOS, checks.FAR):
            for advantage in checks.ADVANTAGES:
                checks.check_loss(script, objective, ratio, advantage)


def check_flat_side(script) -> None:
    for logratio in (89.0, 200.0, 1e4, -89.0, -200.0, -1e4):
        for advantage in checks.ADVANTAGES:
            checks.check_flat_side(script, logratio, advantage)


ONE = ("ppo_cartpole",)  # for gae, ppo_loss, total_loss, adapt_beta: one text in all PPO scripts
TWO = ("ppo_cartpole", "ppo_continuous")
STRIKE = 'rows[batch["valid"][rows]] for rows in order'
# what was done wrong: the text, the wrong one, the check that fails, the scripts
MISTAKES = {
    "policy and value term swapped": (
        'loss = means["policy_loss"] + args.vf_coef * means["value_loss"]',
        'loss = means["value_loss"] + args.vf_coef * means["policy_loss"]',
        check_loss,
        ONE,
    ),
    "entropy penalised": (
        'loss - args.ent_coef * means["entropy"]',
        'loss + args.ent_coef * means["entropy"]',
        check_loss,
        ONE,
    ),
    "KL rewarded": ("surrogate - beta * kl", "surrogate + beta * kl", check_loss, ONE),
    "min and max of eq. 7 swapped": (
        "torch.min(ratio * advantages, clipped * advantages)",
        "torch.max(ratio * advantages, clipped * advantages)",
        check_loss,
        ONE,
    ),
    "ends of the clip swapped": (
        "ratio.clamp(1 - objective.epsilon, 1 + objective.epsilon)",
        "ratio.clamp(1 + objective.epsilon, 1 - objective.epsilon)",
        check_loss,
        ONE,
    ),
    "ratio not capped": ("logratio.clamp(max=40).exp()", "logratio.exp()", check_flat_side, ONE),
    "the smaller of two value losses": (
        "value_loss = torch.max(value_loss,",
        "value_loss = torch.min(value_loss,",
        checks.check_value_loss,
        ONE,
    ),
    "terminated states bootstrapped": (
        "gamma * values[1:] * ~terminated -",
        "gamma * values[1:] -",
        check_gae,
        ONE,
    ),
    "truncated states not bootstrapped": (
        "gamma * values[1:] * ~terminated -",
        "gamma * values[1:] * ~(terminated | truncated) -",
        check_gae,
        ONE,
    ),
    "trace goes on over a time limit": (
        "gae_lambda * ~(terminated | truncated)",
        "gae_lambda * ~terminated",
        check_gae,
        ONE,
    ),
    "beta adapted the wrong way": (
        "kl > 1.5 * objective.kl_target",
        "kl < 1.5 * objective.kl_target",
        checks.check_adapt_beta,
        ONE,
    ),
    "reset rows kept": (STRIKE, "rows for rows in order", checks.check_resets, TWO),
    "rows drawn with replacement": (
        "torch.randperm(len(valid), generator=rng)",
        "torch.randint(len(valid), (len(valid),), generator=rng)",
        checks.check_minibatches,
        TWO,
    ),
    "advantages of resets in the mean": (
        'advantages[valid] = standardise(batch["advantages"][valid])',
        'advantages = standardise(batch["advantages"])',
        checks.check_resets,
        TWO,
    ),
}


@pytest.mark.parametrize(
    ("script", "mistake"),
    [(script, mistake) for mistake, (*_, scripts) in MISTAKES.items() for script in scripts],
)
def test_a_mistake_is_caught_by_a_check_that_the_script_passes(script, mistake, edited):
    right, wrong, check, _ = MISTAKES[mistake]
    check(importlib.import_module(script))
    module = edited(script, (right, wrong))
    with pytest.raises(AssertionError):
        check(module)
