"""Proximal Policy Optimization (PPO) for Gaussian policies, and many agents side by side.

Schulman, Wolski, Dhariwal, Radford, Klimov (2017), https://arxiv.org/abs/1707.06347: MuJoCo with the hyperparameters of
Table 3 and every objective of Table 1. Read ppo_cartpole.py first; equation and detail numbers mean the same here. What
is new: a Gaussian with a learned, state-independent standard deviation; running statistics of the observations, saved
and frozen in evaluation; and lockstep. A run trains one agent per pair of seed and objective,

    python ppo_continuous.py --seeds 1 2 3 --objectives none clip:0.2 kl:1 adaptive:0.01      # 12 agents

for far less than the price of twelve. Agent, loss and Adam step are written for ONE agent; torch.func adds the leading
axis A of agents, torch.compile fuses what comes out. Every random stream of an agent is keyed by its seed alone, so it
is the same agent alone or in a crowd (on the same simulator: from four environments on, --env-backend auto takes
EnvPool), and objectives with one seed share weights, noise and environments: they can be compared in pairs.

    python ppo_continuous.py                                    # HalfCheetah-v4, clip:0.2, one agent
    python ppo_continuous.py --env-id Hopper-v4 --seeds 1 2 3   # three agents
    python ppo_continuous.py --preset paper --objectives none clip:0.2    # the paper's own details
    python ppo_continuous.py --evaluate RUN_DIR --capture-video

Any Gymnasium environment with one-dimensional Box actions and observations works, your own too: --env-id module:Id-v0.
The observation statistics are renewed once per rollout, before the update, as in the first public code (baselines
ppo1): what the ratio is measured against, mean and log std of the old policy, is computed under the new statistics.
"""

import contextlib
import csv
import datetime
import difflib
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import envpool
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from tqdm import tqdm

Batch = dict[str, Tensor]  # by name, all with the same leading dimensions


PRESETS = {
    "modern": {"norm_adv": "minibatch", "anneal_lr": True, "max_grad_norm": 0.5, "vf_coef": 0.25}
    | {"clip_actions": True, "scale_rewards": True, "obs_clip": 10.0},
    "paper": {"norm_adv": "batch", "anneal_lr": False, "max_grad_norm": math.inf, "vf_coef": 1.0}
    | {"clip_actions": False, "scale_rewards": False, "obs_clip": 5.0},
}


@dataclass
class Args:
    """PPO for Gaussian policies (Schulman et al. 2017), many agents in lockstep."""

    # What is learned
    env_id: str = "HalfCheetah-v4"
    """environment id (one-dimensional Box actions and observations); module:Name-v0 imports module first"""
    objectives: tuple[str, ...] = ("clip:0.2",)
    """clip:EPS (eq. 7), kl:BETA (eq. 8), adaptive:D_TARG (section 4), none (eq. 6), pg (eq. 2: 1 epoch, 1 minibatch)"""
    seeds: tuple[int, ...] = (1,)
    """one agent for every pair of seed and objective; a seed fixes weights, noise, minibatch order, environments"""
    preset: Literal["modern", "paper"] = "modern"
    """defaults for the flags marked *: what everybody does today, or, as far as known, what was done for the paper"""

    # How much data
    total_timesteps: int = 1_000_000
    """environment steps of each agent, reset steps included, rounded up to whole updates"""
    num_envs: int = 1
    """environments of each agent (N)"""
    num_steps: int = 2048
    """steps of each environment per update, the horizon (T)"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """who simulates; auto takes EnvPool where it knows the id and at least four environments run"""

    # Observations, actions, rewards
    obs_clip: float | None = None
    """* observations are standardised with running statistics, then clipped to +- this (paper 5, modern 10)"""
    clip_actions: bool | None = None
    """* clip actions to the environment's bounds; the policy's own, raw ones enter the loss (paper no, modern yes)"""
    scale_rewards: bool | None = None
    """* divide rewards by the running deviation of the discounted return, clip to +-10 (paper no, modern yes)"""

    # Advantages
    gamma: float = 0.99
    """discount factor (gamma, eq. 10)"""
    gae_lambda: float = 0.95
    """trace decay of GAE (lambda, eq. 11); 1 is eq. 10: all rewards to the end of the segment, then V"""
    norm_adv: Literal["batch", "minibatch", "none"] | None = None
    """* standardise advantages over the whole batch (paper), within each minibatch (modern), or not at all"""

    # Optimisation
    update_epochs: int = 10
    """passes over the batch per update (K)"""
    num_minibatches: int = 32
    """minibatches per pass; the paper's M is N * T / num_minibatches"""
    learning_rate: float = 3e-4
    """Adam step size (alpha)"""
    anneal_lr: bool | None = None
    """* decay the step size linearly to 0 over the run (paper no, modern yes)"""
    vf_coef: float | None = None
    """* weight of the value loss (V - V_targ)^2 (c1, eq. 9) (paper 1, modern 0.25)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (c2, eq. 9)"""
    value_clip: float | None = None
    """clip V to this distance from the old V and take the larger of both squared errors; None: plain squared error"""
    max_grad_norm: float | None = None
    """* largest global norm of an agent's gradient (paper inf: no clipping, modern 0.5)"""
    target_kl: float | None = None
    """end an agent's update after the first epoch whose mean approx_kl exceeds this; None never does"""

    # The run
    device: str = "cpu"
    """cpu or cuda, for the update; acting stays on the CPU, beside the simulators"""
    compile: bool = True
    """compile the update; without a C++ compiler it runs eagerly, several times slower"""
    run_dir: str | None = None
    """folder of this run; None makes one under runs/"""
    checkpoint_every: int = 0
    """updates between checkpoints; each abandons unfinished episodes, so 0 spaces them by 50 episodes of full length"""
    resume: str | None = None
    """continue the run in this folder; no other flag may be given, all come from its config.json"""
    track: bool = False
    """mirror every agent to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project: str = "ppo"
    """project for --track"""

    # Evaluation: at the end of every run, or of a finished one with --evaluate
    evaluate: str | None = None
    """evaluate the agents of this run folder instead of training; only the three flags below may go with it"""
    eval_episodes: int = 20
    """evaluation episodes of each agent, on seeds that training never used"""
    sample_actions: bool = False
    """evaluate with sampled actions instead of the mean of the Gaussian"""
    capture_video: bool = False
    """write an mp4 of every evaluation episode to RUN_DIR/videos"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    @property
    def agents(self) -> list[dict]:
        """What names each agent, in the order of the agent axis."""
        return [{"seed": seed, "objective": objective} for objective in self.objectives for seed in self.seeds]

    def check(self) -> None:
        """Fills in the preset. Raises UserError for the first flag that makes no sense. (NaN fails all comparisons.)"""
        for name, value in PRESETS[self.preset].items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        for objective in self.objectives:
            parse_objective(objective)
        for name in ("objectives", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"--{name} needs at least one value, and each only once")
        for seed in self.seeds:
            if not 0 <= seed < 2**31:
                raise UserError(f"--seeds must be between 0 and {2**31 - 1}, not {seed}")
        for name in ("total_timesteps", "num_envs", "num_steps", "update_epochs", "num_minibatches", "eval_episodes"):
            most = 10**12 if name == "total_timesteps" else 2**20  # 2^20: stream() has room for the seeds of so many
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"--{name.replace('_', '-')} must be between 1 and {most}, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("learning_rate", "value_clip", "target_kl"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        for name in ("vf_coef", "ent_coef", "checkpoint_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        for name in ("max_grad_norm", "obs_clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, or inf, not {getattr(self, name)}")
        if self.batch_size % self.num_minibatches:
            raise UserError(
                f"a batch of {self.num_envs} x {self.num_steps} = {self.batch_size} steps does not divide into "
                f"{self.num_minibatches} minibatches; change --num-envs, --num-steps or --num-minibatches"
            )
        if self.batch_size * len(self.agents) > 10**8:
            raise UserError(f"{len(self.agents)} batches of {self.batch_size} steps are too large; lower --num-steps")
        if self.num_envs * (self.num_steps // 2) < 2 * self.num_minibatches:  # every second row may be a reset
            raise UserError(f"too few steps for {self.num_minibatches} minibatches; raise --num-steps or --num-envs")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device must be cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine or this build of PyTorch has no CUDA; leave the flag out")


class Objective(NamedTuple):
    """The policy part of eq. 9, as --objective names it: eq. 2, 6, 7 or 8."""

    log_prob: bool = False  # eq. 2: log pi in place of the ratio r
    epsilon: float = math.inf  # clip range of eq. 7; inf does not clip
    beta: float = 0.0  # weight of KL[old, new] in eq. 8; for adaptive, its first value
    kl_target: float | None = None  # d_targ of the adaptive penalty

    def adapt(self, beta: float, kl: float) -> float:
        """Section 4, once per update: double beta where KL[old, new] came out too large, halve it where too small."""
        if self.kl_target is None:
            return beta
        if kl > 1.5 * self.kl_target:
            return min(2 * beta, 1e30)  # which float32 still holds
        return beta / 2 if kl < self.kl_target / 1.5 else beta


def parse_objective(text: str) -> Objective:
    """clip:0.2, kl:1, adaptive:0.01, none or pg -> Objective. Raises UserError for anything else."""
    if text in ("pg", "none"):
        return Objective(log_prob=text == "pg")
    kind, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf:
        if kind == "clip":
            return Objective(epsilon=value)
        if kind == "kl":
            return Objective(beta=value)
        if kind == "adaptive":
            return Objective(beta=1.0, kl_target=value)
    raise UserError(f"{text!r} is no objective: clip:EPS, kl:BETA, adaptive:D_TARG with a positive number, none or pg")


# ---------------------------------------------------------------------------------------------------- ENVIRONMENTS
def start_actors(args: Args, update: int) -> SimpleNamespace:
    """The N actors of Algorithm 1 for each of A agents, in new environments; the seeds depend on the agent's alone."""
    firsts, shape = [stream(agent["seed"], "environments", update) for agent in args.agents], (-1, args.num_envs)
    envs = make_envs(args, [first + i for first in firsts for i in range(args.num_envs)])  # [detail 1]
    returns, lengths, discounted = np.zeros((3, len(firsts), args.num_envs))  # of the episode that each is in
    now = {"obs": envs.obs.reshape(*shape, envs.obs.shape[-1]), "ended": np.zeros(returns.shape, bool)}
    return SimpleNamespace(envs=envs, **now, returns=returns, lengths=lengths, discounted=discounted)


# ----------------------------------------------------------------------------------------------------------- AGENT
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights, zero biases.  [detail 2]"""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """ONE agent: the mean of a Gaussian and a value, two separate tanh networks, and a free log std.  [detail 13]"""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()

        def mlp(outputs: int, gain: float) -> nn.Sequential:
            first, second = layer_init(nn.Linear(obs_dim, 64)), layer_init(nn.Linear(64, 64))
            return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), layer_init(nn.Linear(64, outputs), gain))

        self.actor, self.critic = mlp(action_dim, gain=0.01), mlp(1, gain=1.0)  # actions start around 0
        self.log_std = nn.Parameter(torch.zeros(action_dim))  # independent of the state

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs [..., D] -> mean [..., U], log std [..., U], values [...]"""
        mean = self.actor(obs)
        return mean, self.log_std.expand_as(mean), self.critic(obs).squeeze(-1)


def merge(stats: Batch, x: Tensor, valid: Tensor, alive: Tensor) -> Batch:
    """Running count [A, 1], mean and var [A, D] of each agent after the valid rows of x [A, B, D] (Chan, Golub, LeVeque
    1983). An agent that is not alive [A] keeps what it had."""
    x, valid = x.double().mT, valid.double().unsqueeze(1)
    n = valid.sum(-1)
    total, shift = stats["count"] + n, average(x, valid) - stats["mean"]
    # sums of squares: before, within x, and between the two means
    squares = stats["var"] * stats["count"] + variance(x, valid) * (n - 1) + shift.square() * stats["count"] * n / total
    merged = {"count": total, "mean": stats["mean"] + shift * n / total, "var": squares / total}
    return {name: torch.where(alive.unsqueeze(-1), merged[name], stats[name]) for name in stats}


def standardised(obs: Tensor, stats: Batch, clip: float) -> Tensor:
    """obs [A, B, D] as the networks see it."""
    mean, std = stats["mean"].float().unsqueeze(1), (stats["var"] + 1e-8).sqrt().float().unsqueeze(1)
    return ((obs - mean) / std).clamp(-clip, clip)


def policies(weights: Batch, stats: Batch, clip: float) -> Callable:
    """All actors as one function of obs [A, N, D] and standard normal noise [A, N, U], or 0, to actions [A, N, U]. In
    NumPy: with networks this small it is several times faster."""
    layers = [(weights[f"actor.{i}.weight"].mT, weights[f"actor.{i}.bias"].unsqueeze(1)) for i in (0, 2, 4)]
    (w0, b0), (w1, b1), (w2, b2) = [(weight.cpu().numpy(), bias.cpu().numpy()) for weight, bias in layers]
    mean, std = stats["mean"].float().unsqueeze(1).numpy(), (stats["var"] + 1e-8).sqrt().float().unsqueeze(1).numpy()
    spread = weights["log_std"].cpu().exp().unsqueeze(1).numpy()

    def act(obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        seen = ((obs - mean) / std).clip(-clip, clip)
        return np.tanh(np.tanh(seen @ w0 + b0) @ w1 + b1) @ w2 + b2 + noise * spread

    return act


# --------------------------------------------------------------------------------------------------- THE ALGORITHM
def gae(rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation, eqs. 11-12.  [detail 5]

    rewards, terminated, truncated: [T, N]; values: [T+1, N]. Returns advantages [T, N].
    values[t+1] is V of the state that step t led to, at an episode's end too: next-step autoreset returns the final
    observation and resets one step later. So a truncated episode is bootstrapped with V of its final state, a
    terminated one with 0. The reset step is no transition: the caller drops its advantage, which no other row uses.
    (The exponents T-t+1 in eqs. 10 and 11 should be T-t-1.)
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]  # eq. 12
    decay = gamma * lam * ~(terminated | truncated)
    advantages, trace = [], torch.zeros_like(rewards[0])
    for delta, keep in zip(reversed(deltas.unbind()), reversed(decay.unbind()), strict=True):
        advantages.append(trace := delta + keep * trace)  # eq. 11 as a recursion
    return torch.stack(advantages[::-1])


def average(x: Tensor, valid: Tensor) -> Tensor:
    """The mean of x [..., B] over its transitions: autoreset rows, valid = 0, do not count."""
    return (x * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def variance(x: Tensor, valid: Tensor) -> Tensor:
    """The sample variance of x [..., B] over its transitions."""
    squares = (x - average(x, valid).unsqueeze(-1)).square() * valid
    return squares.sum(-1) / (valid.sum(-1) - 1).clamp(min=1)


def standardise(x: Tensor, valid: Tensor) -> Tensor:
    """x [..., B] with mean 0 and standard deviation 1 over its transitions."""
    return (x - average(x, valid).unsqueeze(-1)) / (variance(x, valid).sqrt().unsqueeze(-1) + 1e-8)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log pi(a|s) of diagonal Gaussians, [..., U] each -> [...]"""
    return (-0.5 * ((action - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Exact KL[old, new] of diagonal Gaussians, [..., U] each -> [...]"""
    spread = ((2 * old_log_std).exp() + (old_mean - mean).square()) / (2 * (2 * log_std).exp())
    return (log_std - old_log_std + spread - 0.5).sum(-1)


def ppo_loss(policy: tuple[Tensor, Tensor, Tensor], batch: Batch, objective: Batch, args: Args) -> tuple[Tensor, Batch]:
    """Eq. 9 of ONE agent with its sign turned, to be minimised, and a dict of means worth logging.  [detail 12]

    policy: mean [B, U], log std [B, U], values [B] from the weights being optimised. batch, from those that collected
    it: actions, mean, log_std [B, U]; log_prob, values, advantages, returns, valid [B]. objective: scalar tensors
    log_prob, epsilon, beta. A term that an objective lacks is cut off at its inputs, since 0 * inf is NaN."""
    mean, log_std, values = policy
    log_prob = gaussian_log_prob(mean, log_std, batch["actions"])  # of the policy's own action, not of a clipped one
    log_ratio, advantages = log_prob - batch["log_prob"], batch["advantages"]
    ratio = torch.where(objective["log_prob"], 0.0, log_ratio).exp()  # r of eqs. 6-8
    free = torch.where(objective["log_prob"], log_prob, ratio)  # eq. 2 or eq. 6
    limited = free.where(objective["log_prob"], ratio.clamp(1 - objective["epsilon"], 1 + objective["epsilon"]))
    surrogate = torch.min(free * advantages, limited * advantages)  # eq. 7, and eq. 6 at epsilon = inf  [detail 8]
    old, new = (batch["mean"], batch["log_std"]), (mean, log_std)
    penalised = (torch.where(objective["beta"] > 0, x, was) for x, was in zip(new, old, strict=True))
    penalty = objective["beta"] * gaussian_kl(*old, *penalised)  # eq. 8; without a penalty KL[old, old], which is 0
    policy_loss = -average(surrogate - penalty, batch["valid"])

    value_loss = (values - batch["returns"]).square()
    if args.value_clip is not None:  # the larger of two errors  [detail 9]
        near = batch["values"] + (values - batch["values"]).clamp(-args.value_clip, args.value_clip)
        value_loss = torch.max(value_loss, (near - batch["returns"]).square())
    value_loss = average(value_loss, batch["valid"])
    entropy = average((log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1), batch["valid"])

    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # eq. 9  [detail 10]
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    # approx_kl, old_approx_kl: KL from the actions taken, k3 and k1 of joschu.net/blog/kl-approx.html
    each = {"kl": gaussian_kl(*old, *new), "approx_kl": log_ratio.exp() - 1 - log_ratio, "old_approx_kl": -log_ratio}
    each["clipfrac"] = ((ratio - 1).abs() > objective["epsilon"]).float()
    metrics |= {name: average(x, batch["valid"]) for name, x in each.items()}
    return loss, {name: value.detach() for name, value in (metrics | {"loss": loss}).items()}


def gradient_step(model: Agent, args: Args, learner: dict, batch: Batch, rows: Tensor, objective: Batch, lr) -> dict:
    """One minibatch step of ONE agent: the clipped gradient of ppo_loss, then Adam (Kingma and Ba 2015, Algorithm 1).

    learner: weights; Adam's m, v and t; sums of the metrics over the steps taken; active: whether to take this one;
    alive: whether all was finite so far. A step that is not taken, or is not finite, leaves the weights as they are."""
    minibatch = {name: x[rows] for name, x in batch.items()}
    if args.norm_adv == "minibatch":  # [detail 7]
        minibatch["advantages"] = standardise(minibatch["advantages"], minibatch["valid"])
    gradient, metrics = torch.func.grad(
        lambda weights: ppo_loss(functional_call(model, weights, minibatch["obs"]), minibatch, objective, args),
        has_aux=True,
    )(learner["weights"])
    norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
    finite = norm.isfinite() & metrics.pop("loss").isfinite()
    shrink = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # [detail 11]
    taken, t = learner["active"] & finite, learner["t"] + 1
    new = {"weights": {}, "m": {}, "v": {}, "t": torch.where(taken, t, learner["t"])}
    for name, g in gradient.items():
        new["m"][name] = m = 0.9 * learner["m"][name] + 0.1 * shrink * g
        new["v"][name] = v = 0.999 * learner["v"][name] + 0.001 * (shrink * g).square()
        step = lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)  # [detail 3]
        new["weights"][name] = learner["weights"][name] - step
    metrics |= {"grad_norm": norm, "steps": torch.ones_like(norm)}
    new["sums"] = {name: learner["sums"][name] + x for name, x in metrics.items()}
    for part in ("weights", "m", "v", "sums"):
        new[part] = {name: torch.where(taken, new[part][name], x) for name, x in learner[part].items()}
    new |= {"active": taken, "alive": learner["alive"] & (finite | ~learner["active"])}
    return {name: new[name] for name in learner}  # in the same order, or torch.compile takes it for another program


def update(step, learners: dict, batch: Batch, objective: Batch, orders: Tensor, lr: float, args: Args) -> dict:
    """K epochs of minibatch steps of all agents; returns the new learners. step: gradient_step under vmap; batch
    [A, B, ...]: what ppo_loss takes, and obs; objective: [A] each; orders [A, K, B]: permutations of the B rows."""
    zeros = {name: torch.zeros_like(x) for name, x in learners["sums"].items()}
    learners = learners | {"active": learners["alive"].clone(), "sums": zeros}
    lr = torch.tensor(lr, device=orders.device)  # a tensor, or every new step size would be compiled anew
    for epoch in range(args.update_epochs):
        before = learners["sums"]
        for rows in orders[:, epoch].chunk(args.num_minibatches, -1):  # every row once per epoch  [detail 6]
            learners = step(learners, batch, rows.contiguous(), objective, lr)
        if args.target_kl is not None:
            kl, steps = (learners["sums"][name] - before[name] for name in ("approx_kl", "steps"))
            learners["active"] = learners["active"] & (kl / steps <= args.target_kl)
            if not learners["active"].any():
                break
    return learners


def collect(weights: Batch, stats: Batch, actors: SimpleNamespace, noise: Tensor, args: Args, seconds: dict) -> tuple:
    """Every actor takes T steps with standard normal noise [T, A, N, U]. Returns raw obs [T+1, A, N, D], actions [T, A,
    N, U] and [T, A, N] each: rewards, terminated, truncated, valid (False in autoreset rows); and per agent (row over
    its actors, return, length) of every episode that ended. Adds to `seconds` where the time went."""
    shape, policy = noise.shape[:3], policies(weights, stats, args.obs_clip)
    obs, actions = np.empty((shape[0] + 1, *actors.obs.shape), np.float32), np.empty(noise.shape, np.float32)
    rewards, (terminated, truncated, valid) = np.empty(shape, np.float32), np.empty((3, *shape), bool)
    noise, episodes = noise.numpy(), [[] for _ in range(shape[1])]
    for t in range(shape[0]):
        obs[t], valid[t], start = actors.obs, ~actors.ended, time.perf_counter()  # the step after an end only resets
        # the actor alone: the weights rest during a rollout, so all else is computed at once, in train()
        actions[t] = policy(obs[t], noise[t])
        between = time.perf_counter()
        stepped = actors.envs.step(actions[t])
        seconds["policy"] += between - start
        seconds["environment"] += time.perf_counter() - between
        actors.obs = stepped[0].reshape(actors.obs.shape)
        rewards[t], terminated[t], truncated[t] = (x.reshape(shape[1:]) for x in stepped[1:4])
        actors.returns, actors.lengths = actors.returns + rewards[t], actors.lengths + valid[t]
        actors.ended = terminated[t] | truncated[t]
        for a, i in zip(*actors.ended.nonzero(), strict=True):
            episodes[a].append((int(t * shape[2] + i), float(actors.returns[a, i]), int(actors.lengths[a, i])))
            actors.returns[a, i] = actors.lengths[a, i] = 0
    obs[-1] = actors.obs
    rollout = {"obs": obs, "actions": actions, "rewards": rewards, "terminated": terminated, "truncated": truncated}
    return {name: torch.from_numpy(x) for name, x in (rollout | {"valid": valid}).items()}, episodes


def scaled_rewards(rollout: Batch, stats: Batch, actors: SimpleNamespace, alive: Tensor, gamma: float) -> tuple:
    """Rewards [T, A, N] over the running deviation of the discounted return so far, actors.discounted [A, N], clipped
    to +-10; and the new statistics."""
    sums, goes_on = [], ~(rollout["terminated"] | rollout["truncated"])
    for reward, keep in zip(rollout["rewards"].numpy(), goes_on.numpy(), strict=True):
        sums.append(actors.discounted * gamma + reward)
        actors.discounted = sums[-1] * keep
    sums = torch.from_numpy(np.stack(sums))
    stats = merge(stats, by_agent(sums).unsqueeze(-1), by_agent(rollout["valid"]), alive)
    return (rollout["rewards"] / (stats["var"] + 1e-8).sqrt().float()).clamp(-10, 10), stats


# -------------------------------------------------------------------------------------------------------- TRAINING
def train(args: Args) -> tuple[dict, list[dict]]:
    """Algorithm 1 for all agents, and the closing evaluation. Returns what the checkpoint says of the agents, and what
    summary.json holds. Raises UserError before anything is written, NonFiniteError where no agent is left alive."""
    args, saved = load_run(Args, args.resume) if args.resume is not None else (replace(args), None)
    args.check()
    compiling = check_machine(args)
    torch.set_num_threads(1)  # here and in rollouts: bits depend on it, and EnvPool needs the other cores
    agents, objectives = args.agents, [parse_objective(agent["objective"]) for agent in args.agents]
    state = saved["state"] if saved else new_state(objectives)
    actors = start_actors(args, state["update"])
    dims = actors.obs.shape[-1], actors.envs.actions.shape[0]
    learners = tree_map(lambda x: x.to(args.device), saved["learners"] if saved else new_learners(args, dims))
    stats = saved["stats"] if saved else new_stats(args, dims)
    rng = new_generators(args)
    restore(saved, **rng)
    model = Agent(*dims).to(args.device)  # lends its structure; the weights are those of the learners
    look = torch.vmap(partial(functional_call, model))
    step = torch.vmap(partial(gradient_step, model, args), in_dims=(0, 0, 0, 0, None))
    step = torch.compile(step, dynamic=False) if compiling else step
    fixed = {"log_prob": [o.log_prob for o in objectives], "epsilon": [o.epsilon for o in objectives]}
    run = Run(args, {"env_id": args.env_id}, math.ceil(50 * actors.envs.longest / args.num_steps), saved)
    threads = cores() if len(agents) >= 4 else 1  # one agent's steps are too small to share
    while state["update"] < args.num_updates:
        # ROLLOUT
        torch.set_num_threads(1)
        shape = (args.num_steps, args.num_envs, dims[1])
        noise = {seed: torch.randn(shape, generator=rng[f"actions {seed}"]) for seed in args.seeds}
        noise = torch.stack([noise[agent["seed"]] for agent in agents], 1)
        rollout, episodes = collect(learners["weights"], stats["obs"], actors, noise, args, run.seconds)

        # ADVANTAGES
        torch.set_num_threads(threads)
        started, valid = time.perf_counter(), by_agent(rollout["valid"])
        finite = {name: by_agent(rollout[name]).flatten(1).isfinite().all(1) for name in ("obs", "rewards")}
        rollout |= {name: rollout[name].nan_to_num(0.0, 0.0, 0.0) for name in finite}  # no NaN in anybody's kernels
        alive = learners["alive"].cpu() & finite["obs"] & finite["rewards"]
        stats["obs"] = merge(stats["obs"], by_agent(rollout["obs"][:-1]), valid, alive)
        if args.scale_rewards:
            rollout["rewards"], stats["returns"] = scaled_rewards(rollout, stats["returns"], actors, alive, args.gamma)
        seen = standardised(by_agent(rollout["obs"]), stats["obs"], args.obs_clip).to(args.device)
        mean, log_std, values = look(learners["weights"], (seen,))  # under the new statistics, as the update sees it
        values = values.cpu().unflatten(1, (-1, args.num_envs)).transpose(0, 1)  # [T+1, A, N]
        recorded = (rollout["rewards"], values, rollout["terminated"], rollout["truncated"])
        batch = {"actions": by_agent(rollout["actions"]), "values": by_agent(values[:-1]), "valid": valid.float()}
        batch["advantages"] = by_agent(gae(*recorded, args.gamma, args.gae_lambda))
        batch["returns"] = batch["advantages"] + batch["values"]  # V_targ, the TD(lambda) return
        batch |= {"obs": seen, "mean": mean, "log_std": log_std}  # and, as values, of the last observations: left out
        batch = {name: x[:, : args.batch_size].to(args.device).contiguous() for name, x in batch.items()}
        batch["log_prob"] = gaussian_log_prob(batch["mean"], batch["log_std"], batch["actions"])
        if args.norm_adv == "batch":
            batch["advantages"] = standardise(batch["advantages"], batch["valid"])

        # UPDATE
        lr = args.learning_rate * (1 - state["update"] / args.num_updates if args.anneal_lr else 1)  # [detail 4]
        rows = {seed: torch.stack([torch.randperm(args.batch_size, generator=rng[f"minibatches {seed}"])
                                   for _ in range(args.update_epochs)]) for seed in args.seeds}  # fmt: skip
        orders = torch.stack([rows[agent["seed"]] for agent in agents]).to(args.device)
        knobs = {name: torch.tensor(x, device=args.device) for name, x in (fixed | {"beta": state["beta"]}).items()}
        learners["alive"] = alive.to(args.device)
        learners = update(step, learners, batch, knobs, orders, lr, args)
        mean, log_std, _ = look(learners["weights"], (batch["obs"],))
        metrics = {name: x / learners["sums"]["steps"] for name, x in learners["sums"].items() if name != "steps"}
        kl = average(gaussian_kl(batch["mean"], batch["log_std"], mean, log_std), batch["valid"])
        left, all_of_it = (variance(x, batch["valid"]) for x in (batch["returns"] - batch["values"], batch["returns"]))
        metrics |= {"kl_after_update": kl, "explained_variance": (1 - left / all_of_it).nan_to_num(0.0, 0.0, 0.0)}
        run.seconds["update"] += time.perf_counter() - started

        # LOG
        state["update"] += 1
        metrics, alive, charts, losses = {k: x.tolist() for k, x in metrics.items()}, learners["alive"].tolist(), [], []
        for i, objective in enumerate(objectives):
            run.record(state["global_step"], episodes[i], i)
            state["transitions"][i] += int(valid[i].sum())
            std = learners["weights"]["log_std"][i].exp().mean().item()
            charts.append({"charts/learning_rate": lr, "charts/beta": state["beta"][i], "charts/action_std": std})
            losses.append({name: x[i] if alive[i] else None for name, x in metrics.items()})
            if alive[i]:
                state["beta"][i] = objective.adapt(state["beta"][i], metrics["kl_after_update"][i])
            elif state["diverged_at"][i] is None:
                state["diverged_at"][i] = state["global_step"] + args.batch_size
                source = next((name for name, x in finite.items() if not x[i]), "loss or gradient")
                if not any(alive):
                    check_finite({source: math.nan}, state["update"])
                tqdm.write(f"{source} not finite in update {state['update']}: {agents[i]} is frozen", file=sys.stderr)
        state["global_step"] += args.batch_size
        run.log(state, charts, losses)
        if state["update"] % args.checkpoint_every == 0 or state["update"] == args.num_updates:
            run.save(state, learners=learners, stats=stats, **rng)
            actors.envs.close()  # environments cannot be saved: every run, resumed or not, starts new episodes here
            actors = start_actors(args, state["update"])
    actors.envs.close()
    trained = {"learners": learners, "stats": stats}
    return trained, run.finish(state, evaluate(trained, args, run.path))


def evaluate(trained: dict, args: Args, run_path: Path) -> list[list[float]]:
    """Returns [A, E] of E = args.eval_episodes episodes of every agent, all side by side on seeds that training never
    used, with the mean action or, for args.sample_actions, sampled ones; weights and statistics stay as they are."""
    firsts, episodes = [2**30 + stream(agent["seed"], "evaluation") for agent in args.agents], args.eval_episodes
    if args.capture_video:
        return film(trained, args, firsts, run_path / "videos")
    envs = make_envs(args, [first + i for first in firsts for i in range(episodes)])
    policy = policies(trained["learners"]["weights"], trained["stats"]["obs"], args.obs_clip)
    rng, shape = [torch.Generator().manual_seed(first) for first in firsts], (episodes, *envs.actions.shape)
    obs, returns, running = envs.obs, np.zeros(len(envs.obs)), np.ones(len(envs.obs), bool)
    while running.any():
        noise = np.stack([torch.randn(shape, generator=generator) for generator in rng]) if args.sample_actions else 0.0
        actions = policy(obs.astype(np.float32).reshape(len(firsts), episodes, -1), noise)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        returns, running = returns + rewards * running, running & ~(terminated | truncated)
    envs.close()
    return returns.reshape(-1, episodes).tolist()


# ---------------------------------------------------------------------------------------------------- AROUND THE RUN
# The same text in every script of this repository: run folder, logging, checkpoint and resume, seeding, errors.


CLOCKS = ("environment", "policy", "update")


class UserError(Exception):
    """Something the user can mend: main() prints it as one line and exits with code 2."""


class NonFiniteError(Exception):
    """A number became NaN or infinite: main() prints it as one line and exits with code 3."""


def check_finite(named: dict, update: int) -> None:
    """Raises NonFiniteError, with the name and the update, unless every number in `named` is finite."""
    for name, x in named.items():
        if not torch.isfinite(torch.as_tensor(x)).all():
            raise NonFiniteError(f"{name} not finite in update {update}; the run stopped; any checkpoint is older")


def stream(seed: int, name: str, index: int = 0) -> int:
    """The seed of one random stream of a run: a hash, so that all streams are independent. Below 2^30 - 2^20, so that
    up to 2^20 environments can count on from it and evaluation, from 2^30 on, meets none of their seeds."""
    key = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return int.from_bytes(key[:8], "little") % (2**30 - 2**20)


def write_file(path: Path, data: bytes) -> None:
    """All of the new content or all of the old, whenever the process or the machine dies."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """What Run.save wrote: a torch file and the SHA-256 of its bytes. Nothing in it is ever executed.

    Raises UserError where the file is damaged, hostile or another script's.
    """
    data = path.read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise UserError(f"{path} is truncated or damaged; restore it from a copy or start the run again")
    try:
        saved = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        script, *_ = (saved[name] for name in ("script", "args", "state", "seconds", "recent", "lengths"))
    except Exception as reason:  # whatever the unpickler meets in a file of unknown origin
        raise UserError(f"{path} is not a checkpoint of this repository") from reason
    if script != Path(__file__).stem:
        raise UserError(f"{path} was written by {script}.py, not by {Path(__file__).name}")
    return saved


def restore(saved: dict | None, **parts) -> None:
    """Put what Run.save took from modules, optimizers and generators back into them, if anything was saved."""
    for name, part in parts.items() if saved else ():
        part.set_state(saved[name]) if isinstance(part, torch.Generator) else part.load_state_dict(saved[name])


def load_run(cls: type, run_dir: str) -> tuple[Args, dict | None]:
    """The flags of a run folder and its checkpoint, None where none has been written yet. Raises UserError."""
    path = Path(run_dir)
    try:
        config = json.loads((path / "config.json").read_text())
        if config["script"] != Path(__file__).stem:
            raise UserError(f"{run_dir} is a run of {config['script']}.py, not of {Path(__file__).name}")
        args = cls(**config["args"])
        saved = load_checkpoint(path / "checkpoint.pt") if (path / "checkpoint.pt").exists() else None
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{run_dir} is not a run folder that can be read: {reason}") from reason
    if saved is not None and saved["args"] != config["args"]:
        raise UserError(f"{path / 'config.json'} has changed since the checkpoint was written; undo the change")
    args.run_dir = args.resume = str(path)
    return args, saved


class Run:
    """A run's folder, clock, progress bar and Weights & Biases mirror.

    task: the summary's first entry, such as {"env_id": ...}; args.agents: a dict per agent that names it, seed first;
    safest: the fewest updates between checkpoints that leave reported returns as they are, and the default;
    saved: the checkpoint to go on from.
    """

    def __init__(self, args: Args, task: dict, safest: int, saved: dict | None):
        self.task, self.agents, (self.title,) = task, args.agents, task.values()
        args.checkpoint_every = args.checkpoint_every or safest
        self.recent = saved["recent"] if saved else [[] for _ in self.agents]  # of the last 100 episodes
        # first: up to the end of the first update of each process, with any compilation; starts: how many these were
        self.seconds = saved["seconds"] if saved else dict.fromkeys(("wall", "first", "starts", *CLOCKS), 0.0)
        self.started, self.settled = time.perf_counter() - self.seconds["wall"], False

        script, seeds = Path(__file__).stem, "-".join(dict.fromkeys(str(agent["seed"]) for agent in self.agents))
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        self.path = Path(args.run_dir or "runs/" + re.sub(r"[/:]", "-", f"{self.title}__{script}__{seeds}__{stamp}"))
        self.config = json.loads(json.dumps(asdict(args) | {"run_dir": None, "resume": None}))  # as it is read back
        if args.track:
            import wandb  # a second of start-up that only --track pays

            try:
                wandb.login()
            except wandb.Error as reason:
                raise UserError(f"--track: {reason}; or set WANDB_MODE=offline") from reason
        try:
            if not args.resume:
                self.path.mkdir(parents=True, exist_ok=True)
                if any(self.path.iterdir()):
                    raise UserError(f"{self.path} is not empty; choose another --run-dir, or --resume {self.path}")
                write_file(self.path / "config.json", json.dumps(self.provenance(), indent=2).encode())
            self.files = {}
            for name, length in (saved["lengths"] if saved else {"metrics.csv": 0, "episodes.csv": 0}).items():
                self.files[name] = open(self.path / name, "r+" if saved else "w", newline="")  # noqa: SIM115
                if self.files[name].seek(0, os.SEEK_END) < length:
                    raise UserError(f"{self.path / name} is shorter than when the checkpoint was written; start again")
                self.files[name].seek(length)
                self.files[name].truncate()  # rows later than the checkpoint will be written again
        except OSError as reason:
            raise UserError(f"cannot write to {reason.filename or self.path}: {reason.strerror}") from reason
        if 0 < args.checkpoint_every < min(safest, args.num_updates):
            print(f"note: --checkpoint-every below {safest} biases reported returns to short episodes", file=sys.stderr)
        self.writers = {name: csv.writer(file, lineterminator="\n") for name, file in self.files.items()}
        self.mirrors = self.mirror(args.wandb_project) if args.track else []
        steps, done = args.batch_size * args.num_updates, saved["state"]["global_step"] if saved else 0
        self.bar = tqdm(total=steps, initial=done, desc=self.title, unit=" steps", unit_scale=True, disable=None)

    def provenance(self) -> dict:
        """What config.json holds."""
        here = Path(__file__).resolve()
        command = ["git", "-C", str(here.parent), "status", "--porcelain=v2", "--branch", "--", here.name]
        try:
            said = subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:  # no git on this machine
            said = ""
        commit = re.search(r"^# branch.oid ([0-9a-f]{40,})$", said, re.M)
        commit = commit and commit[1] + "-dirty" * bool(re.search("^[^#]", said, re.M))  # this script has changes
        used = [name for name in ("torch", "numpy", "gymnasium", "envpool", "tyro") if name in sys.modules]
        versions = {name: version(name) for name in used}
        versions["python"], now = sys.version.split()[0], datetime.datetime.now().isoformat(timespec="seconds")
        return {"script": here.stem, "args": self.config, "versions": versions, "git_commit": commit, "started": now}

    def mirror(self, project: str) -> list:
        """One Weights & Biases run per agent."""
        import wandb

        runs, where = [], {"project": project, "group": self.path.name, "dir": self.path, "reinit": "create_new"}
        start = (self.path / "config.json").read_bytes()  # flags and the time: no other run's, and kept by --resume
        for agent in self.agents:
            name = "__".join(re.sub(r"[^\w.=-]", "-", str(part)) for part in (self.path.name, *agent.values()))
            where["id"] = hashlib.sha256(start + name.encode()).hexdigest()[:32]
            try:
                runs.append(wandb.init(name=name, resume="allow", config=self.config | agent, **where))
            except wandb.Error as reason:
                raise UserError(f"--track: {reason}; or set WANDB_MODE=offline") from reason
        return runs

    @contextlib.contextmanager
    def timed(self, name: str):
        """Add the seconds spent inside to self.seconds[name]."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def record(self, global_step: int, episodes: list[tuple[int, float, int]], agent: int = 0) -> None:
        """Take (rows after global_step, return, length) of each finished episode into episodes.csv and the means."""
        if self.files["episodes.csv"].tell() == 0:
            self.writers["episodes.csv"].writerow(["global_step", *self.agents[agent], "return", "length"])
        for row, ret, length in episodes:
            self.writers["episodes.csv"].writerow([global_step + row + 1, *self.agents[agent].values(), ret, length])
        self.recent[agent] = (self.recent[agent] + [[ret, length] for _, ret, length in episodes])[-100:]

    def log(self, state: dict, charts: list[dict], losses: list[dict]) -> None:
        """One row per agent in metrics.csv; None, and a mean over no episode, are left empty."""
        before, self.seconds["wall"] = self.seconds["wall"], time.perf_counter() - self.started
        if not self.settled:
            self.seconds["first"] += self.seconds["wall"] - before
            self.seconds["starts"] += 1
            gc.collect()  # all that exists after an update stays; searching it for garbage again cost 4% of a run
            gc.freeze()
            self.settled = True
        for i, agent in enumerate(self.agents):
            returns, lengths = zip(*self.recent[i], strict=True) if self.recent[i] else ((), ())
            row = {"charts/episodic_return": np.mean(returns).item() if returns else None}
            row["charts/episodic_length"] = np.mean(lengths).item() if lengths else None
            row["charts/SPS"] = state["global_step"] * len(self.agents) / self.seconds["wall"]
            row |= charts[i] | {f"losses/{name}": value for name, value in losses[i].items()}
            where = {"update": state["update"], "global_step": state["global_step"]} | agent
            if self.files["metrics.csv"].tell() == 0:
                self.writers["metrics.csv"].writerow(where | row)
            self.writers["metrics.csv"].writerow((where | row).values())
            if self.mirrors:
                logged = {name: value for name, value in row.items() if value is not None}
                self.mirrors[i].log(logged, step=state["global_step"])
        for file in self.files.values():
            file.flush()
        means = [np.mean([ret for ret, _ in recent]) for recent in self.recent if recent]
        kls = [row["kl_after_update"] for row in losses if row["kl_after_update"] is not None]
        shown = [f"return {np.mean(means):.1f}"] if means else []
        shown += [f"KL {np.mean(kls):.4f}"] if kls else []
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update(state["global_step"] - self.bar.n)

    def save(self, state: dict, **parts) -> None:
        """Write checkpoint.pt: the loop's state, where the CSVs stand, and the state of every part."""
        for file in self.files.values():
            os.fsync(file.fileno())
        saved = {"script": Path(__file__).stem, "args": self.config, "state": state, "seconds": self.seconds}
        saved |= {"recent": self.recent, "lengths": {name: file.tell() for name, file in self.files.items()}}
        for name, part in parts.items():
            take = getattr(part, "get_state", None) or getattr(part, "state_dict", None)
            saved[name] = take() if take else part
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        write_file(self.path / "checkpoint.pt", buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())

    def finish(self, state: dict, returns: list[list[float]]) -> list[dict]:
        """Write summary.json from the evaluation's returns, one list per agent, and say how each agent did."""
        self.bar.close()
        gc.unfreeze()
        rows, wall = [], self.seconds["wall"]
        steps = state["global_step"] * len(self.agents)
        timed = steps * (1 - self.seconds["starts"] / state["update"]), wall - self.seconds["first"]
        for i, (agent, recent, evaluated) in enumerate(zip(self.agents, self.recent, returns, strict=True)):
            row = self.task | agent | {"total_timesteps": state["global_step"], "transitions": state["transitions"][i]}
            row |= {"wall_seconds": wall, "seconds": {name: self.seconds[name] for name in CLOCKS}}
            row |= {"sps": timed[0] / timed[1] if timed[1] > 0 else steps / wall}
            row |= {"last_100_return": np.mean([ret for ret, _ in recent]).item() if recent else None}
            row |= {"eval_return_mean": np.mean(evaluated).item(), "eval_return_std": np.std(evaluated).item()}
            rows.append(row | {"eval_episodes": len(evaluated), "diverged_at": state["diverged_at"][i]})
        write_file(self.path / "summary.json", json.dumps(rows, indent=2).encode())
        for mirror, row in zip(self.mirrors, rows, strict=False):
            mirror.summary.update(row)
            mirror.finish()
        for file in self.files.values():
            file.close()
        for agent, row in zip(self.agents, rows, strict=True):
            who = " ".join(f"{name} {value}" for name, value in agent.items())
            score = f"{row['eval_return_mean']:.1f} +- {row['eval_return_std']:.1f} in {row['eval_episodes']} episodes"
            cost = f"{state['global_step']:,} steps in {wall:.1f} s"
            print(f"{self.title}, {who}: evaluation {score}; {cost}; {self.path}")
        return rows


def parse_args(cls: type, argv: list[str]) -> Args:
    """The command line as an object of `cls`. Raises UserError, with what tyro says on it, in one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            args = tyro.cli(cls, args=argv)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = "\n".join(line.strip(" │") for line in told.getvalue().splitlines()[1:])  # without the box's title
        complaint, *rest = (" ".join(part.split()) for part in re.split("(?m)^[─-]{4,}$", lines) if part.strip())
        hint = re.search(r"(?:Perhaps you meant|Arguments similar to \S+): (--[\w-]+)", " ".join(rest))
        raise UserError(complaint + (f"; did you mean {hint[1]}?" if hint else "")) from stop
    flags = {flag.partition("=")[0].replace("_", "-").replace("--no-", "--") for flag in argv if flag.startswith("--")}
    names = ["--" + name.replace("_", "-") for name in cls.__dataclass_fields__]
    own = set(names[names.index("--evaluate") + 1 :])  # the flags of an evaluation are declared last
    for alone, beside in (("--resume", set()), ("--evaluate", own)):
        if alone in flags and (extra := sorted(flags - beside - {alone})):
            raise UserError(f"{extra[0]} cannot stand beside {alone}: the run's own config.json decides")
    return args


# ------------------------------------------------------------------------------------------------------ SETTING UP
def cores() -> int:
    """CPU cores that this process may use: those of the machine, or fewer under taskset or a job scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_backend(args: Args) -> str:
    """What --env-backend means here. Raises UserError where EnvPool is asked for and does not know the id."""
    known = envpool.list_all_envs()
    if args.env_backend == "envpool" and args.env_id not in known:
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(args.env_id, known, 1))
        raise UserError(f"EnvPool does not know {args.env_id!r}{near}")
    if args.env_backend == "auto":  # below four environments a pool's hand-over costs more than it saves
        return "envpool" if args.env_id in known and args.num_envs * len(args.agents) >= 4 else "gymnasium"
    return args.env_backend


def check_machine(args: Args) -> bool:
    """Settles who simulates; returns whether to compile. Raises UserError where --capture-video cannot render."""
    args.env_backend = choose_backend(args)
    if args.capture_video:
        open_env(args.env_id, render=True).close()
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        print("note: no C++ compiler on this machine, so updates run eagerly, several times slower", file=sys.stderr)
        return False
    return args.compile


def make_envs(args: Args, seeds: list[int], videos: Path | None = None) -> SimpleNamespace:
    """One new environment per seed, autoreset on the next step in both backends: step, close, the first obs [., D],
    the action space, the longest episode. step clips actions if it should. Raises UserError where nothing suits."""
    try:
        if args.env_backend == "envpool" and videos is None:
            envs = envpool.make(args.env_id, env_type="gymnasium", num_envs=len(seeds), seed=seeds)
            observes, acts, longest = envs.observation_space, envs.action_space, envs.spec.config.max_episode_steps
            obs, _ = envs.reset()
        else:
            maker = partial(open_env, args.env_id, videos is not None, videos)
            envs = gym.vector.SyncVectorEnv([maker] * len(seeds), copy=False)  # its arrays are copied before a step
            observes, acts = envs.single_observation_space, envs.single_action_space
            obs, longest = envs.reset(seed=seeds)[0], envs.envs[0].spec.max_episode_steps
    except UserError:
        raise
    except Exception as reason:  # an environment's constructor may raise anything
        raise UserError(f"cannot make the environment {args.env_id!r}: {reason}") from reason
    for space, what in ((acts, f"takes {acts} actions"), (observes, f"observes {observes}")):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"{args.env_id} {what}; this script handles only one-dimensional Box spaces")
    low, high = (acts.low, acts.high) if args.clip_actions else (-np.inf, np.inf)
    return SimpleNamespace(
        step=lambda actions: envs.step(actions.reshape(len(seeds), -1).clip(low, high)),
        close=envs.close,
        obs=obs,
        actions=acts,
        longest=longest,
    )


def open_env(env_id: str, render: bool, videos: Path | None = None) -> gym.Env:
    """One environment; with `render`, every episode is recorded into the folder `videos`.

    One without a time limit gets a limit of 100,000 steps. Raises UserError where it cannot be made or rendered.
    """
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if render else {}))
        if env.spec.max_episode_steps is None:
            env = gym.wrappers.TimeLimit(env, 100_000)
        if render:
            env.reset()
            env.render()
        if render and videos:
            env = gym.wrappers.RecordVideo(env, str(videos), episode_trigger=lambda _: True, disable_logger=True)
    except Exception as reason:  # no display, driver or package: each raises a type of its own
        raise UserError(f"cannot {'render' if render else 'make'} {env_id} here: {reason}") from reason
    return env


def by_agent(x: Tensor) -> Tensor:
    """[T, A, N, ...] -> [A, T * N, ...]"""
    return x.transpose(0, 1).flatten(1, 2)


def new_state(objectives: list[Objective]) -> dict:
    """What a run counts, and for every agent its beta, its transitions, and the step at which it was frozen."""
    state = {"update": 0, "global_step": 0, "beta": [objective.beta for objective in objectives]}
    return state | {"transitions": [0] * len(objectives), "diverged_at": [None] * len(objectives)}


def new_learners(args: Args, dims: tuple[int, int]) -> dict:
    """What learning changes, stacked over agents [A, ...]: see gradient_step."""
    weights = []
    for agent in args.agents:
        torch.manual_seed(stream(agent["seed"], "weights"))
        weights.append({name: w.detach() for name, w in Agent(*dims).named_parameters()})
    weights = {name: torch.stack([w[name] for w in weights]) for name in weights[0]}
    zeros, ones = (torch.full((len(args.agents),), x) for x in (0.0, True))
    losses = ("policy_loss", "value_loss", "entropy", "kl", "approx_kl", "old_approx_kl", "clipfrac", "grad_norm")
    learners = {"weights": weights, "m": tree_map(torch.zeros_like, weights), "v": tree_map(torch.zeros_like, weights)}
    learners |= {"t": zeros, "sums": {name: zeros.clone() for name in ("steps", *losses)}}
    return learners | {"active": ones, "alive": ones.clone()}


def new_stats(args: Args, dims: tuple[int, int]) -> dict[str, Batch]:
    """Running statistics of the observations and of the discounted return, which have seen nothing yet."""
    stats = {}
    for name, width in (("obs", dims[0]), ("returns", 1)):
        zeros = torch.zeros(len(args.agents), width).double()
        stats[name] = {"count": zeros[:, :1].clone(), "mean": zeros, "var": torch.ones_like(zeros)}
    return stats


def new_generators(args: Args) -> dict[str, torch.Generator]:
    """What draws noise and minibatches, for every seed; objectives with one seed share the draws."""
    names = [(name, seed) for name in ("actions", "minibatches") for seed in args.seeds]
    return {f"{name} {seed}": torch.Generator().manual_seed(stream(seed, name)) for name, seed in names}


# -------------------------------------------------------------------------------------------------------- COMMANDS
def film(trained: dict, args: Args, firsts: list[int], folder: Path) -> list[list[float]]:
    """evaluate() with an mp4 of every episode, AGENT-EPISODE/ below the folder: one after another, since the pictures
    of a thousand steps, which are kept until the episode is over, are close to a gigabyte."""
    returns = []
    for a, first in enumerate(firsts):
        weights, stats = ({name: x[a : a + 1] for name, x in part.items()}
                          for part in (trained["learners"]["weights"], trained["stats"]["obs"]))  # fmt: skip
        policy, rng, mine = policies(weights, stats, args.obs_clip), torch.Generator().manual_seed(first), []
        for episode in range(args.eval_episodes):
            envs = make_envs(args, [first + episode], folder / f"{a}-{episode}")
            obs, total, over = envs.obs, 0.0, False
            while not over:
                shape = (1, 1, *envs.actions.shape)
                noise = torch.randn(shape, generator=rng).numpy() if args.sample_actions else 0.0
                obs, (reward,), (terminated,), (truncated,), _ = envs.step(policy(obs.astype(np.float32)[None], noise))
                total, over = total + reward, terminated or truncated
            envs.close()
            mine.append(float(total))
        returns.append(mine)
    return returns


def load_agent(run_dir: str) -> tuple[dict, Args]:
    """The trained agents of a run folder, on the CPU, and the flags. Raises UserError where there is no checkpoint."""
    args, saved = load_run(Args, run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    args.device, args.compile = "cpu", False
    return {"learners": saved["learners"], "stats": saved["stats"]}, args


def evaluate_run(args: Args) -> None:
    """--evaluate: load, evaluate, print, and write evaluation.json into the run folder."""
    agent, trained = load_agent(args.evaluate)
    trained.eval_episodes, trained.sample_actions = args.eval_episodes, args.sample_actions
    trained.capture_video = args.capture_video
    trained.check()
    path, how, results = Path(args.evaluate), "sampled" if args.sample_actions else "greedy", []
    for who, returns in zip(trained.agents, evaluate(agent, trained, path), strict=True):
        row = {"eval_return_mean": np.mean(returns).item(), "eval_return_std": np.std(returns).item()}
        results.append(who | {"actions": how} | row | {"returns": returns})
    write_file(path / "evaluation.json", json.dumps(results, indent=2).encode())
    for who, row in zip(trained.agents, results, strict=True):
        label = " ".join(f"{name} {value}" for name, value in who.items())
        score = f"{row['eval_return_mean']:.1f} +- {row['eval_return_std']:.1f}"
        print(f"{path}, {label}: {score} in {len(row['returns'])} {how} episodes")


def main() -> None:
    """Exit codes: 0 done, 2 bad input or a failed write, 3 a number not finite, 130 interrupted."""
    try:
        args = parse_args(Args, sys.argv[1:])
        train(args) if args.evaluate is None else evaluate_run(args)
    except (UserError, NonFiniteError, OSError) as reason:  # OSError: a full disk, a folder that cannot be written
        print("error: " + " ".join(str(reason).split()), file=sys.stderr)
        sys.exit(3 if isinstance(reason, NonFiniteError) else 2)
    except KeyboardInterrupt:
        print("interrupted; --resume RUN_DIR goes on from its last checkpoint, if it has one", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
