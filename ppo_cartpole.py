"""Proximal Policy Optimization (PPO) for discrete actions, in one file.

Schulman, Wolski, Dhariwal, Radford, Klimov (2017), https://arxiv.org/abs/1707.06347.
Equation numbers are that paper's:

    eq. 2    L^PG     E[ log pi(a|s) A ]                             --objective pg
    eq. 6    L^CPI    E[ r A ],  r = pi(a|s) / pi_old(a|s)           --objective none
    eq. 7    L^CLIP   E[ min(r A, clip(r, 1-eps, 1+eps) A) ]         --objective clip:0.2
    eq. 8    L^KLPEN  E[ r A - beta KL[pi_old, pi] ]                 --objective kl:1, adaptive:0.01
    eq. 9             one of these, minus c1 (V - V_targ)^2, plus c2 times the entropy
    eqs. 10-12        the advantages A, by GAE

Algorithm 1 is the loop in train(): N actors take T steps each, the advantages are estimated, and K
epochs of minibatch steps follow. "[detail n]" marks detail n of "The 37 Implementation Details of
Proximal Policy Optimization" (Huang et al. 2022).

    python ppo_cartpole.py                                # solves CartPole-v1 in some ten seconds
    python ppo_cartpole.py --objective adaptive:0.01      # a KL penalty instead of the clip
    python ppo_cartpole.py --env-id my_module:MyEnv-v0    # my_module registers it
    python ppo_cartpole.py --evaluate RUN_DIR --capture-video

Any Gymnasium environment with Discrete actions and a one-dimensional Box observation works, your
own too: --env-id my_module:MyEnv-v0. A run leaves config.json, metrics.csv, episodes.csv,
checkpoint.pt and summary.json in a folder under runs/. Expect 500 on CartPole: the maximum.

All of PPO stands above the line FLAGS. What is below can be skipped.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.16",
#     "moviepy==2.2.1",  # --capture-video
#     "wandb==0.31.0",  # --track
# ]
# ///

import contextlib
import csv
import gc
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class Args:
    """PPO for discrete actions (Schulman et al. 2017)."""

    env_id: str = "CartPole-v1"  # Gymnasium id; module:Name-v0 imports the module first
    objective: str = "clip:0.2"  # clip:EPS (eq. 7), kl:BETA, adaptive:D_TARG (eq. 8), none, pg
    seed: int = 1  # seed of every random stream: weights, actions, minibatches, environments

    total_timesteps: int = 100_000  # steps, reset steps included, rounded up to whole updates
    num_envs: int = 32  # parallel actors (N)
    num_steps: int = 64  # steps of each actor per update (T)

    gamma: float = 0.99  # discount factor (eq. 10)
    gae_lambda: float = 0.95  # lambda of GAE (eq. 11)
    norm_adv: Literal["batch", "minibatch", "none"] = "minibatch"  # where to standardise advantages
    bootstrap_truncated: bool = True  # a time limit does not end the return: V stands for the rest

    update_epochs: int = 4  # passes over the batch per update (K)
    num_minibatches: int = 32  # minibatches per pass; the paper's M is N * T / num_minibatches
    learning_rate: float = 2.5e-3  # Adam step size
    anneal_lr: bool = True  # decay the step size linearly to 0 over the run
    vf_coef: float = 0.5  # c1 of eq. 9: weight of (V - V_targ)^2, which has no factor 1/2
    ent_coef: float = 0.0  # c2 of eq. 9: weight of the entropy bonus
    value_clip: float | None = None  # clip V to this distance from the old V, take the larger loss
    max_grad_norm: float = 0.5  # scale the gradient down to at most this norm; inf never does
    target_kl: float | None = None  # end an update after an epoch whose mean approx_kl exceeds this

    device: str = "cpu"  # cpu or cuda; networks this small are faster on the CPU
    compile: bool = False  # torch.compile the gradient: faster, after some twenty seconds
    run_dir: str | None = None  # folder of this run; None makes one under runs/
    checkpoint_every: int = 0  # updates between checkpoints, each cuts episodes short; 0: few
    resume: str | None = None  # go on with the run in this folder; its config.json has the flags
    track: bool = False  # mirror the run to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "ppo"  # project for --track

    evaluate: str | None = None  # evaluate the run in this folder; the flags below may be given
    eval_episodes: int = 20  # evaluation episodes, on seeds that training never used
    sample_actions: bool = False  # evaluate sampled actions, not the most probable ones
    capture_video: bool = False  # film every evaluation episode: RUN_DIR/videos/*.mp4

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)


# ---------------------------------------------------------------------------------- ENVIRONMENTS
def make_envs(args: Args, num_envs: int, render: bool = False) -> gym.vector.VectorEnv:
    """`num_envs` environments behind one interface, for training and for evaluation.  [detail 1]

    Raises UserError where they cannot be made, or do not suit this script.
    """
    options = {"render_mode": "rgb_array"} if render else {}
    module, _, env_id = args.env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gym.spec(env_id)
        # one CartPole is faster than a CartPoleVectorEnv of one
        if spec.vector_entry_point is None or (num_envs == 1 and spec.entry_point is not None):
            options |= {"vectorization_mode": "sync", "wrappers": [Checked]}
            options["disable_env_checker"] = True  # Checked does that
        envs = gym.make_vec(env_id, num_envs, **options)
    except (Exception, SystemExit) as reason:  # an environment may raise anything
        what = f"cannot make {args.env_id!r}: {type(reason).__name__}: {reason}"
        raise UserError(what + import_hint(reason)) from reason
    check_spaces(args, envs)
    return envs


# ----------------------------------------------------------------------------------------- AGENT
def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights, zero biases.  [detail 2]"""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units. `gain` scales the last layer's weights."""
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, outputs), gain),
    )


class Agent(nn.Module):
    """Policy and value function, two separate networks.  [detail 13]"""

    def __init__(self, obs_dim: int, num_actions: int):
        super().__init__()
        self.actor = mlp(obs_dim, num_actions, gain=0.01)  # a nearly uniform first policy
        self.critic = mlp(obs_dim, 1, gain=1.0)

    def policy(self, obs: Tensor) -> Tensor:
        """obs [..., D] -> log-probabilities of all actions [..., A].

        The policy is made here alone: what is changed here is played, learned and evaluated.
        """
        logits = self.actor(obs)
        # finite also for actions that you mask with -inf: 0 * inf in the entropy would be NaN
        return logits.log_softmax(-1).clamp(min=-1e9)

    def value(self, obs: Tensor) -> Tensor:
        """obs [..., D] -> V(obs) [...]"""
        return self.critic(obs).squeeze(-1)


def draw_noise(shape: tuple[int, ...], rng: torch.Generator) -> np.ndarray:
    """Standard Gumbel noise: argmax(log_probs + noise) is a sample of the policy.

    Drawn for a whole rollout at once, and on the CPU: the same numbers on every device.
    """
    return -torch.empty(shape).exponential_(generator=rng).log().numpy()


@torch.no_grad()
def act(agent: Agent, obs: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """obs [..., D] -> actions [...]: samples with noise [..., A], else the most probable ones."""
    device = next(agent.parameters()).device
    log_probs = agent.policy(torch.as_tensor(obs, dtype=torch.float32, device=device))
    return (log_probs.cpu().numpy() + noise).argmax(-1)


def log_prob_of(log_probs: Tensor, actions: Tensor) -> Tensor:
    """log_probs [..., A] of all actions, actions [...] -> log pi(a|s) of the actions taken [...]"""
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy of the policy in each state, [..., A] -> [...]"""
    return -(log_probs.exp() * log_probs).sum(-1)


def kl_between(old: Tensor, new: Tensor) -> Tensor:
    """Exact KL[old, new] in each state, [..., A] each -> [...]"""
    return (old.exp() * (old - new)).sum(-1)


# --------------------------------------------------------------------------------- THE ALGORITHM
def gae(rewards, values, terminated, truncated, gamma, gae_lambda) -> Tensor:
    """Generalized advantage estimation, eqs. 11 and 12.  [detail 5]

    rewards [T, N]; terminated, truncated [T, N], bool; values [T+1, N]. Returns advantages [T, N].

    values[t+1] is V of the state that step t led to, at the end of an episode too: environments
    return the final observation first, and reset with the next step. So a truncated episode is
    bootstrapped with V of its final state, a terminated one with 0. The reset step is no
    transition: its advantage means nothing, and no other row uses it. (The exponents T-t+1 in
    eqs. 10 and 11 should be T-t-1.)
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]  # eq. 12
    decay = gamma * gae_lambda * ~(terminated | truncated)  # the trace ends with the episode
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + decay[t] * advantage  # eq. 11
        advantages[t] = advantage
    return advantages


class Objective(NamedTuple):
    """What --objective names: which of eqs. 2, 6, 7 and 8 the policy maximises."""

    kind: str  # clip, kl, adaptive, none or pg
    epsilon: float = math.inf  # clip range of eq. 7
    beta: float = 0.0  # weight of the KL penalty of eq. 8; with adaptive, its first value
    kl_target: float = math.nan  # d_targ of the adaptive penalty


def ppo_loss(log_prob, entropy, kl, values, batch, objective, beta, args) -> dict[str, Tensor]:
    """The terms of eq. 9 for each of B transitions, by name; the caller averages them.

    log_prob, entropy, kl, values [B]: of the networks as they are now, where log_prob is
    log pi(a|s) of the action taken and kl is KL[old, new], exact.
    batch, [B] each: log_prob and values of the old policy, advantages, returns (V_targ).
    beta: the weight of the KL now; objective.beta is only its first value.
    """
    advantages = batch["advantages"]
    logratio = log_prob - batch["log_prob"]
    ratio = logratio.clamp(max=40).exp()  # of eqs. 6 to 8; no inf, which times 0 is NaN

    if objective.kind == "pg":
        surrogate = log_prob * advantages  # eq. 2
    elif objective.kind == "clip":
        clipped = ratio.clamp(1 - objective.epsilon, 1 + objective.epsilon)
        # eq. 7: no gradient beyond 1+eps where A > 0, nor below 1-eps where A < 0  [detail 8]
        surrogate = torch.min(ratio * advantages, clipped * advantages)
    else:
        surrogate = ratio * advantages  # eq. 6
    if objective.kind in ("kl", "adaptive"):
        surrogate = surrogate - beta * kl  # eq. 8

    value_loss = (values - batch["returns"]).square()
    if args.value_clip is not None:  # [detail 9]
        change = (values - batch["values"]).clamp(-args.value_clip, args.value_clip)
        v_clipped = batch["values"] + change
        value_loss = torch.max(value_loss, (v_clipped - batch["returns"]).square())

    logratio, ratio = logratio.detach(), ratio.detach()
    return {  # the first three are learned from, the others are watched  [detail 12]
        "policy_loss": -surrogate,
        "value_loss": value_loss,
        "entropy": entropy,
        "kl": kl.detach(),
        # estimates of the KL from the actions taken, k3 and k1 of joschu.net/blog/kl-approx.html
        "approx_kl": ratio - 1 - logratio,
        "old_approx_kl": -logratio,
        "clipfrac": ((ratio - 1).abs() > objective.epsilon).float(),
    }


def total_loss(means: dict[str, Tensor], args: Args) -> Tensor:
    """Minus eq. 9, to be minimised, from the means of ppo_loss's terms.  [detail 10]"""
    loss = means["policy_loss"] + args.vf_coef * means["value_loss"]
    if args.ent_coef > 0:  # the gradient of 0 * entropy would cost time
        loss = loss - args.ent_coef * means["entropy"]
    return loss


def adapt_beta(beta: float, kl: float, objective: Objective) -> float:
    """Section 4, after each update: double beta if the KL was too large, halve it if too small."""
    if kl > 1.5 * objective.kl_target:
        return min(2 * beta, 1e30)  # float32 holds both bounds
    if kl < objective.kl_target / 1.5:
        return max(beta / 2, 1e-30)
    return beta


class Actors:
    """The N actors of Algorithm 1: their environments, and the episode that each is in.

    They hold no policy: actions come from outside.
    """

    def __init__(self, args: Args, num_envs: int, videos: Path | None = None):
        seed_globals(args.seed)
        self.envs = make_envs(args, num_envs, render=videos is not None)
        self.num_envs = num_envs
        self.episode_limit = self.envs.spec.max_episode_steps  # None where none is registered
        if videos is not None:  # film every episode
            shutil.rmtree(videos, ignore_errors=True)  # those of an earlier evaluation
            film = gym.wrappers.vector.RecordVideo
            self.envs = film(self.envs, str(videos), episode_trigger=lambda _: True)

    def restart(self, seed: int) -> None:
        """Every actor begins a new episode; `seed` decides which."""
        seed_globals(seed)
        obs, _ = self.envs.reset(seed=seed)
        self.obs = obs.astype(np.float32)
        self.ended = np.zeros(self.num_envs, bool)
        self.returns = np.zeros(self.num_envs)  # of the episode so far
        self.lengths = np.zeros(self.num_envs, int)

    def step(self, actions: np.ndarray) -> tuple:
        """actions [N] -> rewards, terminated, truncated [N], and the episodes that ended here.

        An episode is (actor, return, length). The step after its end ignores the action, pays 0
        and returns the first observation of the next episode.
        """
        first_action = self.envs.single_action_space.start  # Discrete(2, start=1) has 1 and 2
        obs, rewards, terminated, truncated, _ = self.envs.step(actions + first_action)
        self.obs = obs.astype(np.float32)
        self.returns += rewards
        self.lengths += ~self.ended  # a reset step is none
        self.ended = terminated | truncated
        episodes = []
        for i in self.ended.nonzero()[0]:
            episodes.append((int(i), float(self.returns[i]), int(self.lengths[i])))
            self.returns[i] = 0
            self.lengths[i] = 0
        return rewards, terminated, truncated, episodes

    def close(self) -> None:
        """Close the environments. An error there is printed: it must not cost the run."""
        try:
            self.envs.close()
        except Exception as reason:
            print(f"note: the environments did not close: {reason!r}", file=sys.stderr)


def collect(play: Callable, actors: Actors, noise: np.ndarray) -> tuple[dict, list]:
    """Each of N actors takes T steps. Returns (rollout, episodes).

    play: from obs [N, D] and noise [N, A] to actions: act() of an agent. noise [T, N, A].
    rollout: obs [T+1, N, D]; actions, rewards, terminated, truncated, valid [T, N]. valid is False
    in reset steps. episodes: (t * N + actor, return, length) of each that ended in step t.
    """
    steps, episodes = [], []
    for t in range(len(noise)):
        step = {"obs": actors.obs, "valid": ~actors.ended}  # the step after an end only resets
        step["actions"] = play(actors.obs, noise[t])
        rewards, step["terminated"], step["truncated"], ended = actors.step(step["actions"])
        step["rewards"] = rewards.astype(np.float32)
        steps.append(step)
        for i, episode_return, length in ended:
            episodes.append((t * actors.num_envs + i, episode_return, length))
    rollout = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    rollout["obs"] = np.concatenate([rollout["obs"], actors.obs[np.newaxis]])
    return {name: torch.from_numpy(x) for name, x in rollout.items()}, episodes


def standardise(x: Tensor) -> Tensor:
    """x [B] with mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


def loss_terms(agent: Agent, minibatch: dict, objective: Objective, beta, args: Args) -> dict:
    """ppo_loss of the agent on a minibatch."""
    log_probs = agent.policy(minibatch["obs"])
    return ppo_loss(
        log_prob=log_prob_of(log_probs, minibatch["actions"]),
        entropy=entropy_of(log_probs),
        kl=kl_between(minibatch["log_probs"], log_probs),
        values=agent.value(minibatch["obs"]),
        batch=minibatch,
        objective=objective,
        beta=beta,
        args=args,
    )


def gradient(agent: Agent, minibatch: dict, objective: Objective, beta, args: Args) -> tuple:
    """The gradient of minus eq. 9, scaled down: one vector [P]. And the means of all terms."""
    if args.norm_adv == "minibatch":  # [detail 7]
        minibatch = minibatch | {"advantages": standardise(minibatch["advantages"])}
    terms = loss_terms(agent, minibatch, objective, beta, args)
    means = {name: term.mean() for name, term in terms.items()}
    # not loss.backward(), which torch.compile cannot trace
    grads = torch.autograd.grad(total_loss(means, args), list(agent.parameters()))
    grad = torch.cat([each.flatten() for each in grads])
    means["grad_norm"] = grad.norm()
    shrink = (args.max_grad_norm / (means["grad_norm"] + 1e-6)).clamp(max=1)  # [detail 11]
    return shrink * grad, {name: mean.detach() for name, mean in means.items()}


def split_batch(batch: dict, order: Tensor, num_minibatches: int) -> list[dict]:
    """The minibatches of an epoch: the transitions in this order, no reset steps.  [detail 6]"""
    parts = [rows[batch["valid"][rows]] for rows in order.chunk(num_minibatches)]
    parts = [rows for rows in parts if len(rows) > 1]  # one cannot be standardised
    sizes = [len(rows) for rows in parts]
    rows = torch.cat(parts)  # gathered at once and then cut: faster than each minibatch anew
    pieces = {name: x.index_select(0, rows).split(sizes) for name, x in batch.items()}
    return [{name: x[i] for name, x in pieces.items()} for i in range(len(sizes))]


def update(agent, optimizer, batch, objective, beta, args, rng, gradient_fn=gradient) -> dict:
    """K epochs of minibatch steps. Returns the means of their metrics, and batch_metrics().

    batch: what loss_terms takes, and valid, for all B = N * T rows.
    """
    valid = batch["valid"]
    if args.norm_adv == "batch":
        advantages = torch.zeros_like(batch["advantages"])
        advantages[valid] = standardise(batch["advantages"][valid])
        batch = batch | {"advantages": advantages}
    beta = torch.tensor(beta)  # a tensor, or torch.compile would compile every new beta
    # draw all orders first: an early end by --target-kl must not shift those of later updates
    orders = [torch.randperm(len(valid), generator=rng) for _ in range(args.update_epochs)]
    (weights,) = optimizer.param_groups[0]["params"]  # one_vector(agent)
    history = []
    for order in orders:
        epoch = []
        for minibatch in split_batch(batch, order.to(valid.device), args.num_minibatches):
            weights.grad, means = gradient_fn(agent, minibatch, objective, beta, args)
            optimizer.step()
            epoch.append(means)
        history += epoch
        if args.target_kl is not None:
            approx_kl = torch.stack([metrics["approx_kl"] for metrics in epoch]).mean()
            if approx_kl > args.target_kl:
                break
    metrics = {}
    for name in history[0]:
        metrics[name] = torch.stack([step[name] for step in history]).mean().item()
    return metrics | batch_metrics(agent, batch)


@torch.no_grad()
def batch_metrics(agent: Agent, batch: dict[str, Tensor]) -> dict[str, float]:
    """Of the whole batch: the exact KL after the update, and how well the old V predicted."""
    batch = {name: x[batch["valid"]] for name, x in batch.items()}
    kl = kl_between(batch["log_probs"], agent.policy(batch["obs"]))
    variance = batch["returns"].var()
    unexplained = (batch["returns"] - batch["values"]).var()
    return {
        "kl_after_update": kl.mean().item(),
        "explained_variance": float(1 - unexplained / variance) if variance > 0 else 0.0,
    }


# -------------------------------------------------------------------------------------- TRAINING
@contextlib.contextmanager
def torch_threads(count: int):
    """PyTorch uses `count` CPU threads inside; afterwards, whatever happened, as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_vector(agent: Agent) -> nn.Parameter:
    """All weights, one vector [P]; the agent's own become views of it. Adam is faster so."""
    weights = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(weights, agent.parameters())
    return nn.Parameter(weights)


def begin(args: Args, actors: Actors, saved: dict | None) -> tuple[dict, dict]:
    """The state of the loop, plain values, and the parts that learn or draw; new, or restored."""
    obs_space = actors.envs.single_observation_space
    action_space = actors.envs.single_action_space
    dims = {"obs_dim": obs_space.shape[0], "num_actions": int(action_space.n)}
    seed_globals(stream(args.seed, "weights"))
    agent = Agent(**dims).to(args.device)
    parts = {
        "agent": agent,
        # [detail 3]; the step size is set before each update
        "optimizer": torch.optim.Adam([one_vector(agent)], eps=1e-5, fused=True),
        "action_rng": torch.Generator().manual_seed(stream(args.seed, "actions")),
        "minibatch_rng": torch.Generator().manual_seed(stream(args.seed, "minibatches")),
    }
    state = {
        "updates": 0,
        "transitions": 0,
        "beta": parse_objective(args.objective).beta,
        "diverged_at": None,  # for benchmark/lockstep.py
        "dims": dims,
        "first_action": int(action_space.start),
    }
    if saved is not None:
        state = saved["state"]
        restore(parts, saved)
    return state, parts


@torch_threads(1)  # for small networks, more cost more than they save
def train(args: Args) -> tuple[Agent, dict]:
    """Algorithm 1, then the evaluation. Returns the agent and what summary.json says of the run.

    Raises UserError (bad input), NonFiniteError (NaN or infinity), RuntimeError (an environment).
    """
    saved = None
    if args.resume is not None:
        args, saved = load_resumed(args)
    args = check_args(args)
    objective = parse_objective(args.objective)
    actors = Actors(args, args.num_envs)
    check_interface(args, actors.envs)
    state, parts = begin(args, actors, saved)
    agent = parts["agent"]
    gradient_fn = compiled(gradient) if args.compile else gradient
    space_checkpoints(args, actors.episode_limit)
    who = {"seed": args.seed, "objective": args.objective}
    run = Run(args, {"env_id": args.env_id}, who, saved)
    run.bar.set_postfix_str("the first update compiles" if args.compile else "")

    with contextlib.closing(actors), contextlib.closing(run):
        restart = True  # environments cannot be saved: they begin anew after a checkpoint
        for iteration in range(state["updates"], args.num_updates):
            # ROLLOUT
            shape = (args.num_steps, args.num_envs, state["dims"]["num_actions"])
            with run.saving_work(state, parts):
                if restart:
                    actors.restart(stream(args.seed, "environments", iteration))
                    num_episodes = 0
                noise = draw_noise(shape, parts["action_rng"])
                rollout, episodes = collect(partial(act, agent), actors, noise)
                check_finite({"obs": rollout["obs"], "rewards": rollout["rewards"]}, iteration + 1)

            # ADVANTAGES
            rollout = {name: x.to(args.device) for name, x in rollout.items()}
            terminated, truncated = rollout["terminated"], rollout["truncated"]
            if not args.bootstrap_truncated:  # a time limit counts as an end
                terminated = terminated | truncated
            with torch.no_grad():
                # no weight has changed since the rollout: these are of the old policy and the old V
                values = agent.value(rollout["obs"])
                log_probs = agent.policy(rollout["obs"][:-1])
            rewards = rollout["rewards"]
            advantages = gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
            batch = {
                "obs": rollout["obs"][:-1],
                "actions": rollout["actions"],
                "log_probs": log_probs,
                "log_prob": log_prob_of(log_probs, rollout["actions"]),
                "values": values[:-1],
                "advantages": advantages,
                "returns": advantages + values[:-1],  # V_targ: the TD(lambda) return
                "valid": rollout["valid"],
            }
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # [T, N, ...] -> [B, ...]

            # UPDATE
            lr = args.learning_rate
            if args.anneal_lr:  # [detail 4]
                lr = lr * (1 - iteration / args.num_updates)
            parts["optimizer"].param_groups[0]["lr"] = lr
            beta = state["beta"]
            losses = update(
                agent=agent,
                optimizer=parts["optimizer"],
                batch=batch,
                objective=objective,
                beta=beta,
                args=args,
                rng=parts["minibatch_rng"],
                gradient_fn=gradient_fn,
            )
            weights = nn.utils.parameters_to_vector(agent.parameters())
            check_finite(losses | {"weights": weights}, iteration + 1)
            if objective.kind == "adaptive":
                state["beta"] = adapt_beta(beta, losses["kl_after_update"], objective)

            # LOG
            state["updates"] += 1
            state["transitions"] += int(batch["valid"].sum())
            run.log(state["updates"], episodes, {"learning_rate": lr, "beta": beta}, losses)
            num_episodes += len(episodes)
            restart = checkpoint_due(args, state["updates"], num_episodes)
            if restart or state["updates"] == args.num_updates:
                save_checkpoint(run.path / "checkpoint.pt", run.checkpoint(state, parts))
    return agent, run.finish(state, evaluate(agent, args, run.path))


def evaluate(agent: Agent, args: Args, run_path: Path) -> list[float]:
    """The returns of args.eval_episodes episodes, on seeds that training never used.

    Greedy actions, or sampled ones with args.sample_actions. Where no time limit is registered,
    an episode is cut after total_timesteps / eval_episodes steps, but not before 1,000.
    """
    seed = 2**30 + stream(args.seed, "evaluation")
    actors = Actors(args, 1, run_path / "videos" if args.capture_video else None)
    limit = actors.episode_limit or max(1000, args.total_timesteps // args.eval_episodes)
    noise, shape = 0.0, (1, actors.envs.single_action_space.n)
    returns, num_cut = [], 0
    for episode in tqdm(range(args.eval_episodes), "evaluation", leave=False, disable=None):
        actors.restart(seed + episode)
        rng = torch.Generator().manual_seed(seed + episode)
        ended = []
        while not ended and actors.lengths[0] < limit:
            if args.sample_actions:
                noise = draw_noise(shape, rng)
            *_, ended = actors.step(act(agent, actors.obs, noise))
        returns.append(ended[0][1] if ended else float(actors.returns[0]))
        if not ended:
            num_cut += 1
    actors.close()
    check_evaluation(returns, num_cut, limit)
    return returns


def load_agent(run_dir: str) -> tuple[Agent, Args]:
    """The trained agent of a run folder, on the CPU, and its flags. Raises UserError."""
    args, saved = load_run(run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    agent = Agent(**saved["state"]["dims"])
    one_vector(agent)  # the same memory layout as in training: how products round depends on it
    restore({"agent": agent}, saved)
    return agent, replace(args, device="cpu", compile=False)


def load_policy(run_dir: str, sample_actions: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """The trained policy of a run folder, as a function: obs [D] -> action, [B, D] -> actions [B].

    Gives the most probable actions, or samples. Raises UserError where there is no checkpoint.
    """
    agent, args = load_agent(run_dir)
    _, saved = load_run(run_dir)
    num_actions = saved["state"]["dims"]["num_actions"]
    first_action = saved["state"]["first_action"]
    rng = torch.Generator().manual_seed(stream(args.seed, "policy"))

    def policy(obs: np.ndarray) -> np.ndarray:
        shape = (*np.shape(obs)[:-1], num_actions)
        noise = draw_noise(shape, rng) if sample_actions else 0.0
        return act(agent, obs, noise) + first_action

    return policy


# ----------------------------------------------------------------------------------------- FLAGS
EVALUATION_FLAGS = ("eval_episodes", "sample_actions", "capture_video")  # go beside --evaluate
RESUME_FLAGS = ("device", "compile")  # go beside --resume: a run may go on on another machine
LIMITS = {
    (0, 2**31 - 1): ["seed"],
    (1, 10**12): ["total_timesteps"],
    (1, 2**20): ["num_envs", "update_epochs", "num_minibatches", "eval_episodes"],
    (2, 2**20): ["num_steps"],  # every second row may be a reset
    (0, 1): ["gamma", "gae_lambda"],
    (0, 1e12): ["vf_coef", "ent_coef", "checkpoint_every"],
    (1e-12, 1e12): ["learning_rate", "value_clip", "target_kl"],
    (1e-12, math.inf): ["max_grad_norm"],
}


def parse_args(argv: list[str]) -> Args:
    """The command line. Where it is wrong, tyro says so in a box and exits with code 2."""
    given = given_flags(argv)
    return complete_args(tyro.cli(Args, args=argv), given)


def check_args(args: Args) -> Args:
    """A copy of the flags, to work with. Raises UserError for the first that makes no sense."""
    args = check_types(args)
    objective = parse_objective(args.objective)
    for (low, high), names in LIMITS.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not low <= value <= high:  # NaN is in no interval
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be between {low} and {high}, not {value}")
    size = f"a batch of {args.num_envs} x {args.num_steps} = {args.batch_size} steps"
    if args.batch_size > 10**8:
        raise UserError(f"{size} is too large; lower --num-envs or --num-steps")
    if args.batch_size % args.num_minibatches:
        raise UserError(f"{size} does not divide into {args.num_minibatches} minibatches")
    # every second row may be a reset: even then some minibatch of each epoch keeps two rows
    if args.num_envs * (args.num_steps // 2) < 2 * args.num_minibatches:
        raise UserError(f"{size} is too small for {args.num_minibatches} minibatches")
    if objective.kind == "pg" and (args.update_epochs, args.num_minibatches) != (1, 1):
        what = "eq. 2 can use a batch once only: add --update-epochs 1 --num-minibatches 1"
        raise UserError(f"--objective pg: {what}")
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA here; use --device cpu")
    if args.compile and not has_compiler():
        raise UserError("--compile needs a C++ compiler such as g++; use --no-compile")
    if args.capture_video:
        if find_spec("moviepy") is None:
            raise UserError("--capture-video needs moviepy: pip install moviepy, or film nothing")
        check_rendering(args)
    return args


def parse_objective(text: str) -> Objective:
    """clip:0.2, kl:1, adaptive:0.01, none or pg -> Objective. Raises UserError."""
    kind, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if text in ("none", "pg"):
        return Objective(kind)
    if kind == "clip" and 0 < value < math.inf:
        return Objective(kind, epsilon=value)
    if kind == "kl" and 0 < value < math.inf:
        return Objective(kind, beta=value)
    if kind == "adaptive" and 0 < value < math.inf:
        return Objective(kind, beta=1.0, kl_target=value)
    raise UserError(f"{text!r} is no objective: clip:EPS, kl:BETA, adaptive:D_TARG, none or pg")


def import_hint(reason: Exception) -> str:
    """What to try where a module:Name-v0 names a module that Python does not find."""
    missing = isinstance(reason, ModuleNotFoundError)
    return "; is its folder in PYTHONPATH?" if missing else ""


def check_spaces(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Raises UserError where this script cannot handle the environments."""
    actions = envs.single_action_space
    obs = envs.single_observation_space
    if not isinstance(actions, gym.spaces.Discrete):
        raise UserError(f"{args.env_id} takes {actions} actions; this script wants Discrete ones")
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        raise UserError(f"{args.env_id} observes {obs}; this script wants Box vectors")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"{args.env_id} does not reset itself on the step after an end")


def check_interface(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Raises UserError where an environment breaks Gymnasium's interface.

    The first of them is reset, and takes a random step. A vector environment that is not made of
    single ones is trusted.
    """
    if not isinstance(envs, gym.vector.SyncVectorEnv):
        return
    env = envs.envs[0]
    space = env.env.observation_space  # of what Checked wraps
    calls = {
        "reset": lambda: env.reset(seed=0),
        "step": lambda: env.step(env.action_space.sample()),
    }
    for method, call in calls.items():
        try:
            obs = call()[0]
            shape, dtype = np.shape(obs), np.asarray(obs).dtype
        except Exception as reason:  # an environment may raise anything
            what = f"{args.env_id}: the first {method}() failed"
            raise UserError(f"{what}: {type(reason).__name__}: {reason}") from reason
        if shape != space.shape or not np.can_cast(dtype, np.float64, "same_kind"):
            what = f"{args.env_id}: {method}() gives an observation of shape {shape} and {dtype}"
            raise UserError(f"{what}; declared is {space}")


class Checked(gym.Wrapper):
    """An environment whose harmless departures from Gymnasium's interface are smoothed out.

    An observation may be of another dtype than declared: vectors pass as float64, which Actors
    makes float32.
    A reward may be an array of one number. Infos, which nobody reads here, may be anything.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space = env.observation_space
        if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:  # the environment itself may sample from it
            self.env.unwrapped.action_space.seed(seed)
        try:
            result = self.env.reset(seed=seed, options=options)
        except SystemExit as reason:  # this process would end, as if all were well
            raise RuntimeError(f"reset() calls sys.exit({reason.code})") from reason
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"it must give (observation, info), not {type(result).__name__}")
        return result[0], {}

    def step(self, action) -> tuple:
        try:
            obs, reward, terminated, truncated, _ = self.env.step(action)
        except SystemExit as reason:
            raise RuntimeError(f"step() calls sys.exit({reason.code})") from reason
        return obs, float(np.asarray(reward).item()), bool(terminated), bool(truncated), {}

    def render(self) -> np.ndarray:
        """A picture [H, W, 3], with even sides: browsers play no mp4 with odd ones."""
        picture = self.env.render()
        if np.ndim(picture) != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            what = f"{getattr(picture, 'dtype', type(picture).__name__)} {np.shape(picture)}"
            raise ValueError(f"render() gives {what}, which is no uint8 [H, W, 3]")
        height, width, _ = picture.shape
        return picture[: height - height % 2, : width - width % 2]


def check_rendering(args: Args) -> None:
    """Raises UserError where there would be no video: before the training, not after it."""
    envs = make_envs(args, 1, render=True)
    try:
        envs.reset(seed=0)
        envs.render()
    except (Exception, SystemExit) as reason:  # no display, driver or package, or anything
        what = f"cannot render {args.env_id} here: {type(reason).__name__}: {reason}"
        raise UserError(what) from reason
    finally:
        with contextlib.suppress(Exception):
            envs.close()


def has_compiler() -> bool:
    """Whether torch.compile can work here."""
    compiler = os.environ.get("CXX", "g++")
    return bool(shutil.which(compiler) or shutil.which("clang++"))


def compiled(function: Callable) -> Callable:
    """torch.compile, with the switch that lets it trace torch.autograd.grad."""
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, dynamic=True)


def space_checkpoints(args: Args, episode_limit: int | None) -> None:
    """Fill in --checkpoint-every: 50 full episodes of each actor, or a tenth of a long run.

    After a checkpoint every run, resumed or not, restarts its environments, and episodes are cut
    short there. Where no time limit is registered, 0 stays, and checkpoint_due() counts.
    """
    if episode_limit is None:
        return
    safe = math.ceil(50 * episode_limit / args.num_steps)
    # no note for a resumed run: its number may have been chosen by this function
    if not args.resume and 0 < args.checkpoint_every < min(safe, args.num_updates):
        what = f"--checkpoint-every below {safe} biases reported returns to short episodes"
        print(f"note: {what}", file=sys.stderr)
    if args.total_timesteps > 1_000_000:  # a long run saves every tenth of it, too
        safe = min(safe, math.ceil(args.num_updates / 10))
    args.checkpoint_every = args.checkpoint_every or safe


def checkpoint_due(args: Args, updates: int, num_episodes: int) -> bool:
    """Whether a checkpoint follows this update. No clock decides, or the bits would differ.

    If --checkpoint-every is 0, the actors must have ended 50 episodes each since the last one, on
    average; num_episodes is their sum. In a long run a checkpoint follows every tenth of it, too.
    """
    if args.checkpoint_every > 0:
        return updates % args.checkpoint_every == 0
    long = args.total_timesteps > 1_000_000
    tenth = long and updates % math.ceil(args.num_updates / 10) == 0
    return tenth or num_episodes >= 50 * args.num_envs


def check_evaluation(returns: list[float], num_cut: int, limit: int) -> None:
    """Raises NonFiniteError for a return that is not finite; says how many episodes were cut."""
    if not np.isfinite(returns).all():
        raise NonFiniteError(f"a return of the evaluation is not finite: {returns}")
    if num_cut:
        what = f"{num_cut} of {len(returns)} evaluation episodes did not end by themselves"
        print(f"note: {what} and were cut after {limit:,} steps", file=sys.stderr)


def evaluate_run(args: Args) -> None:
    """--evaluate: evaluate the run of a folder, print it, and write evaluation.json there."""
    path = Path(args.evaluate).expanduser().absolute()
    agent, trained = load_agent(args.evaluate)
    options = {name: getattr(args, name) for name in EVALUATION_FLAGS}
    returns = evaluate(agent, check_args(replace(trained, **options)), path)
    result = {
        "seed": trained.seed,
        "objective": trained.objective,
        "actions": "sampled" if args.sample_actions else "greedy",
        "eval_return_mean": float(np.mean(returns)),
        "eval_return_std": float(np.std(returns)),
        "returns": returns,
    }
    print(f"{args.evaluate}, seed {trained.seed}: {describe(returns)}, {result['actions']} actions")
    write_file(path / "evaluation.json", to_json([result]))


# -------------------------------------------------------------------------------- AROUND THE RUN
# The same text in all scripts: random streams, run folder, log, checkpoint and resume, errors.
class UserError(Exception):
    """Something the user can mend: main() prints one line and exits with code 2."""


class NonFiniteError(Exception):
    """A number became NaN or infinite: main() prints one line and exits with code 3."""


def check_finite(named: dict, update: int) -> None:
    """Raises NonFiniteError, with name and update, unless every number in `named` is finite."""
    for name, x in named.items():
        if not torch.isfinite(torch.as_tensor(x)).all():
            raise NonFiniteError(f"{name} not finite in update {update}")


def stream(seed: int, name: str, index: int = 0) -> int:
    """The seed of one random stream of a run: a hash, so that no two streams are related.

    It is below 2^30 - 2^20. So the seeds of up to 2^20 environments, which count on from it, stay
    below 2^30, where those of the evaluation begin.
    """
    key = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return int.from_bytes(key[:8], "little") % (2**30 - 2**20)


def seed_globals(seed: int) -> None:
    """Seed the generators of Python, NumPy and Torch, from which an environment may draw."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextlib.contextmanager
def writing(path: Path):
    """What the disk refuses becomes a UserError that says where."""
    try:
        yield
    except OSError as reason:
        where = reason.filename or path
        raise UserError(f"cannot write to {where}: {reason.strerror}") from reason


def write_file(path: Path, data: bytes) -> None:
    """All of the new content or all of the old, whenever the process or the machine dies."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def to_json(value: dict | list) -> bytes:
    """JSON has no word for infinity, but reads 1e999 as that; NaN as a value becomes null."""
    text = json.dumps(value, indent=2).replace(": Infinity", ": 1e999")
    return text.replace(": NaN", ": null").encode()


def save_checkpoint(path: Path, saved: dict) -> None:
    """A torch file and its SHA-256."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    write_file(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def load_checkpoint(path: Path, script: str = Path(__file__).stem) -> dict:
    """What save_checkpoint wrote. Nothing in it is ever executed.

    Raises UserError where the file is damaged, hostile or another script's.
    """
    data = path.read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise UserError(f"{path} is truncated or damaged; restore a copy, or start the run again")
    try:
        saved = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        complete = {"script", "args"} <= saved.keys()
    except Exception:  # whatever the unpickler meets in a file of unknown origin
        complete = False
    if not complete:
        raise UserError(f"{path} is not a checkpoint of this repository")
    if saved["script"] != script:
        raise UserError(f"{path} was written by {saved['script']}.py, not by {script}.py")
    return saved


def load_run(run_dir: str) -> tuple[Args, dict | None]:
    """The flags of a run folder, and its checkpoint if there is one. Raises UserError."""
    path = Path(run_dir).expanduser()
    try:
        config = json.loads((path / "config.json").read_text())
        script, flags = config["script"], config["args"]
        unknown = ", ".join(sorted(flags.keys() - asdict(Args()).keys()))
        exists = (path / "checkpoint.pt").exists()
        saved = load_checkpoint(path / "checkpoint.pt") if exists else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise UserError(f"{run_dir} is not a run folder that can be read: {reason}") from reason
    if script != Path(__file__).stem:
        raise UserError(f"{run_dir} is a run of {script}.py, not of {Path(__file__).name}")
    if unknown:
        made = "made by another version or by benchmark/lockstep.py"
        raise UserError(f"{run_dir} was {made}: this script has no flags {unknown}")
    if saved is not None and "updates" not in saved.get("state", {}):
        raise UserError(f"{run_dir} was made by another version of {script}.py")
    if saved is not None and saved["args"] != flags:
        raise UserError(f"{path}/config.json has changed since the checkpoint; undo the change")
    return Args(**flags | {"run_dir": run_dir, "resume": run_dir}), saved


def load_resumed(args: Args) -> tuple[Args, dict | None]:
    """load_run() of args.resume, for train().

    args: Args(resume=RUN_DIR) alone, or load_run(RUN_DIR)[0], in which what RESUME_FLAGS names may
    have changed. Raises UserError for anything else.
    """
    run_args, saved = load_run(args.resume)
    if args == Args(resume=args.resume):
        args = run_args
    changes = {name: getattr(args, name) for name in RESUME_FLAGS}
    if args != replace(run_args, **changes):
        what = "Args(resume=RUN_DIR) stands alone, since config.json has the other flags"
        raise UserError(f"{what}; to change {' or '.join(RESUME_FLAGS)}, use load_run(RUN_DIR)[0]")
    if args != run_args:
        what = f"{args.resume} goes on with {', '.join(f'{k} {x}' for k, x in changes.items())}"
        print(f"note: {what}; the last bits may come out otherwise", file=sys.stderr)
    if saved is None:
        print(f"note: {args.resume} has no checkpoint and starts over", file=sys.stderr)
    return args, saved


@contextlib.contextmanager
def saving_work(save: Callable[[], None], generators: list[torch.Generator], where: str):
    """Around what may raise anything in mid-run, such as an environment that has lost its host.

    Puts the generators back, saves what was learned until then, and raises a RuntimeError, or a
    NonFiniteError again, that says where. A resumed run is as valid as any; the same bits as
    without the error are not promised.
    """
    before = [generator.get_state() for generator in generators]
    try:
        yield
    except (Exception, SystemExit) as reason:
        for generator, generator_state in zip(generators, before, strict=True):
            generator.set_state(generator_state)
        kept = "what was learned before is saved, --resume goes on there"
        try:
            save()
        except UserError as failure:
            kept = f"{failure}, so what was learned since the last checkpoint is lost"
        if isinstance(reason, NonFiniteError):
            raise NonFiniteError(f"{where}: {reason}; {kept}") from reason
        raise RuntimeError(f"{where}: {type(reason).__name__}: {reason}; {kept}") from reason


def restore(parts: dict, saved: dict) -> None:
    """Put into modules, optimisers and generators what Run.checkpoint took from them.

    Raises UserError where they have changed since.
    """
    for name, part in parts.items():
        load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
        try:
            load(saved[name])
        except (KeyError, RuntimeError, ValueError) as reason:
            what = f"the checkpoint's {name} does not fit this script or task"
            raise UserError(f"{what}: {reason}") from reason


class Run:
    """The folder of a run, its progress bar and its Weights & Biases mirror.

    task: {"env_id": ...}. who: {"seed": ..., "objective": ...}, which every row of a CSV repeats.
    """

    script = Path(__file__).stem  # whose run it is; in benchmark/ there are other files with runs
    hide_bar = None  # as tqdm takes it: hide it where there is no terminal
    own_checkpoint = True  # benchmark/lockstep.py has one for all of its runs

    def __init__(self, args: Args, task: dict, who: dict, saved: dict | None):
        self.task = task
        self.who = who
        self.batch_size = args.batch_size
        (self.title,) = task.values()
        self.flags = json.loads(json.dumps(asdict(args) | {"run_dir": None, "resume": None}))
        if saved:
            self.flags = saved["args"]  # as in config.json, also where the run has moved
        self.recent = saved["recent"] if saved else []  # [return, length] of the last 100 episodes
        self.started = time.perf_counter()
        self.seconds_before = saved["seconds"] if saved else 0.0  # of earlier processes
        self.seconds = self.seconds_before  # until the end of the last update
        self.sps = saved["sps"] if saved else None
        self.warm_time = None  # when the first update, which may compile, was over
        name = f"{self.title}__{self.script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        path = args.run_dir
        if not path:
            path = "runs/" + re.sub("[/:]", "-", f"{name}-{os.getpid()}")
            if Path(path).exists():  # two short runs in one second
                path += f"-{time.time_ns() % 10**9}"
        self.shown = Path(path).expanduser()
        self.path = self.shown.absolute()  # an environment may change the working directory
        if args.track:
            call_wandb("login")
        self.files = {}
        with writing(self.path):
            if not args.resume:
                self.make_folder()
            for name in ("metrics.csv", "episodes.csv"):
                file = open(self.path / name, "r+" if saved else "a+", newline="")  # noqa: SIM115
                self.files[name] = file
                self.lock(file)
            if saved and self.own_checkpoint:
                self.check_still(saved)
            for name, file in self.files.items():
                length = saved["lengths"][name] if saved else 0
                if file.seek(0, os.SEEK_END) < length:
                    raise UserError(f"{self.shown}/{name} is shorter than at the checkpoint")
                file.seek(length)
                file.truncate()  # the rows after the checkpoint will be written again
        if saved is None:  # a new run, or one that starts over
            self.write_config()
        self.wandb = None
        if args.track:
            config = (self.path / "config.json").read_bytes()  # names this run, and stays the same
            key = hashlib.sha256(config + os.fsencode(self.path)).hexdigest()[:32]
            options = {
                "project": args.wandb_project,
                "name": self.path.name,
                "dir": self.path,
                "id": key,
                "resume": "allow",
                "reinit": "create_new",  # beside open ones, too
                "config": self.flags,
            }
            self.wandb = call_wandb("init", **options)
        done = saved["state"]["updates"] * args.batch_size if saved else 0
        steps = args.num_updates * args.batch_size
        self.bar = tqdm(
            total=steps, initial=done, desc=self.title, unit_scale=True, disable=self.hide_bar
        )

    def make_folder(self) -> None:
        """Raises UserError where there is a folder, and it is not empty."""
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            what = f"choose another --run-dir, or --resume {self.shown}"
            raise UserError(f"{self.shown} is not empty; {what}")

    def write_config(self) -> None:
        """What the run is: its flags, and the versions of what it is made with."""
        packages = ("torch", "numpy", "gymnasium", "envpool", "tyro")
        versions = {name: version(name) for name in packages if name in sys.modules}
        config = {
            "script": self.script,
            "args": self.flags,
            "versions": versions | {"python": sys.version.split()[0]},
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        write_file(self.path / "config.json", to_json(config))

    def lock(self, file) -> None:
        """Raises UserError where another process writes this file. Windows has no such locks."""
        if fcntl is None:
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as reason:
            what = "another process is at work on it; wait until it has ended"
            raise UserError(f"{self.shown}: {what}") from reason
        except OSError:
            return  # a file system that has no locks

    def check_still(self, saved: dict) -> None:
        """Raises UserError where the run has gone on since `saved` was read, before the lock."""
        path = self.path / "checkpoint.pt"
        if path.exists() and load_checkpoint(path, self.script)["state"] != saved["state"]:
            raise UserError(f"{self.shown} has gone on meanwhile; --resume it again")

    def saving_work(self, state: dict, parts: dict):
        """saving_work() for this run."""

        def save() -> None:
            save_checkpoint(self.path / "checkpoint.pt", self.checkpoint(state, parts))

        generators = [part for part in parts.values() if isinstance(part, torch.Generator)]
        return saving_work(save, generators, f"{self.title}, update {state['updates'] + 1}")

    def write_row(self, name: str, row: dict) -> None:
        """A row of a CSV; the first one goes under a header."""
        writer = csv.writer(self.files[name], lineterminator="\n")
        if self.files[name].tell() == 0:
            writer.writerow(row)
        writer.writerow(row.values())

    def log(self, update: int, episodes: list, charts: dict, losses: dict, **more) -> None:
        """The metrics of an update, and its episodes: (row in the batch, return, length) each.

        more: metrics by their whole names.
        """
        step = update * self.batch_size
        for _, episode_return, length in episodes:
            self.recent.append([episode_return, length])
        self.recent = self.recent[-100:]
        mean_return, mean_length = None, None  # empty cells where no episode has ended yet
        if self.recent:
            mean_return, mean_length = np.mean(self.recent, 0).tolist()
        now = time.perf_counter()
        self.seconds = self.seconds_before + now - self.started
        if self.warm_time is None:
            self.warm_time, self.warm_step = now, step
            self.sps = self.batch_size / (now - self.started)
        else:
            self.sps = (step - self.warm_step) / (now - self.warm_time)
        row = {
            "charts/episodic_return": mean_return,
            "charts/episodic_length": mean_length,
            "charts/SPS": self.sps,
        }
        row |= {f"charts/{name}": value for name, value in charts.items()}
        row |= {f"losses/{name}": value for name, value in losses.items()}
        row |= more
        with writing(self.path):
            for place, episode_return, length in episodes:
                ended = {"global_step": step - self.batch_size + place + 1} | self.who
                self.write_row("episodes.csv", ended | {"return": episode_return, "length": length})
            first = {"update": update, "global_step": step}
            self.write_row("metrics.csv", first | self.who | row)
            for file in self.files.values():
                file.flush()
        if self.wandb is not None:
            self.wandb.log({k: x for k, x in row.items() if x is not None}, step=step)
        shown = {"return": mean_return, "KL": losses["kl_after_update"]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(self.batch_size)

    def checkpoint(self, state: dict, parts: dict) -> dict:
        """What --resume needs: the state of the loop and of every part, the lengths of the CSVs."""
        saved = {"script": self.script, "args": self.flags, "state": state}
        saved |= {"recent": self.recent, "seconds": self.seconds, "sps": self.sps, "lengths": {}}
        with writing(self.path):
            for name, file in self.files.items():
                os.fsync(file.fileno())
                saved["lengths"][name] = file.tell()
        for name, part in parts.items():
            take = part.get_state if isinstance(part, torch.Generator) else part.state_dict
            saved[name] = take()
        return saved

    def close(self) -> None:
        """Close the files, which unlocks the folder."""
        self.bar.close()
        with writing(self.path):
            for file in self.files.values():
                file.close()

    def finish(self, state: dict, returns: list[float]) -> dict:
        """Write summary.json, with the returns of the evaluation, and say how the run did."""
        self.close()
        steps = state["updates"] * self.batch_size
        summary = {
            **self.task,
            **self.who,
            "total_timesteps": steps,
            "transitions": state["transitions"],
            "wall_seconds": self.seconds,
            "sps": self.sps,
            "last_100_return": float(np.mean(self.recent, 0)[0]) if self.recent else None,
            "eval_return_mean": float(np.mean(returns)),
            "eval_return_std": float(np.std(returns)),
            "eval_episodes": len(returns),
            "diverged_at": state["diverged_at"],
        }
        write_file(self.path / "summary.json", to_json([summary]))
        if self.wandb is not None:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        how = f"{self.who['objective']}, seed {self.who['seed']}: {describe(returns)}"
        print(f"{self.title}, {how}; {steps:,} steps in {self.seconds:.1f} s; {self.shown}")
        return summary


def describe(returns: list[float]) -> str:
    """The returns of an evaluation in words."""
    mean, std = np.mean(returns), np.std(returns)
    digits = 1 if abs(mean) >= 10 else 3  # small returns need more digits
    return f"evaluation {mean:.{digits}f} +- {std:.{digits}f} in {len(returns)} episodes"


def call_wandb(name: str, /, **options):
    """wandb.login or wandb.init. Raises UserError where there is no account or no network."""
    import wandb  # a second of start-up that only --track pays

    try:
        return getattr(wandb, name)(**options)
    except wandb.Error as reason:
        raise UserError(f"--track: {reason}; or set WANDB_MODE=offline") from reason


def check_types(args: Args) -> Args:
    """A copy of the flags, in plain Python types. Raises UserError for a value of another type."""
    plain = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        allowed = get_args(field.type) or (field.type,)  # float and NoneType; the words of Literal
        kinds = [kind for kind in allowed if isinstance(kind, type)]
        if float in kinds:
            kinds.append(int)
        is_word = isinstance(value, str) and value in allowed
        if not is_word and not isinstance(value, tuple(kinds)):
            wanted = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            wanted = wanted.removeprefix("typing.")
            raise UserError(f"{field.name} must be {wanted}, not {value!r}")
        plain[field.name] = value
    return replace(args, **plain)


def given_flags(argv: list[str]) -> list[str]:
    """The names of the flags on a command line.

    Raises UserError for a switch with a value, and for what cannot stand beside --resume or
    --evaluate.
    """
    given = {}
    truths = ("true", "false", "yes", "no", "on", "off", "1", "0")
    for word, following in zip(argv, [*argv[1:], ""], strict=False):  # each with the word after it
        flag, attached, _ = word.partition("=")
        if not flag.startswith("--"):
            continue
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        given[name] = flag
        is_switch = isinstance(getattr(Args, name, None), bool)
        if is_switch and (attached or following.lower() in truths):
            name = name.replace("_", "-")
            raise UserError(f"{flag} takes no value: it is --{name} or --no-{name}")
    for alone, allowed in (("resume", RESUME_FLAGS), ("evaluate", EVALUATION_FLAGS)):
        for name, flag in given.items():
            if alone in given and name not in (alone, *allowed):
                raise UserError(f"{flag} cannot stand beside --{alone}: config.json decides")
    return list(given)


def complete_args(args: Args, given: list[str]) -> Args:
    """With --resume, the flags of that run, changed by what is given beside it."""
    if args.resume is None:
        return args
    changes = {name: getattr(args, name) for name in RESUME_FLAGS if name in given}
    return replace(load_run(args.resume)[0], **changes)


def command(argv: list[str]) -> None:
    """Train, or evaluate, as the command line says."""
    args = parse_args(argv)
    if args.evaluate is None:
        train(args)
    else:
        evaluate_run(args)


def main(run_command: Callable[[list[str]], None] = command) -> None:
    """Exit codes: 0 done, 2 bad input or a failed write, 3 a number not finite, 130 interrupted.

    And 1, with a traceback, where the environment failed.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame renders without a screen
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # so does MuJoCo
    torch.set_num_threads(1)  # for small networks, more cost more than they save
    gc.freeze()  # what the imports left is no garbage; to search it costs some percent of a run
    try:
        run_command(sys.argv[1:])
    except (UserError, NonFiniteError) as reason:
        print("error: " + " ".join(str(reason).split()), file=sys.stderr)
        sys.exit(3 if isinstance(reason, NonFiniteError) else 2)
    except KeyboardInterrupt:
        what = "--resume RUN_DIR goes on from the last checkpoint, if there is one"
        where = "without --run-dir, RUN_DIR is the newest folder in runs/"
        print(f"interrupted; {what}; {where}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
