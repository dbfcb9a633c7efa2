"""Proximal Policy Optimization (PPO) for discrete actions, on one page.

Schulman, Wolski, Dhariwal, Radford, Klimov (2017), https://arxiv.org/abs/1707.06347. Equation numbers are that paper's:

    eq. 2    L^PG     E[ log pi(a|s) A ]                              --objective pg
    eq. 6    L^CPI    E[ r A ],  r = pi(a|s) / pi_old(a|s)            --objective none
    eq. 7    L^CLIP   E[ min(r A, clip(r, 1-eps, 1+eps) A) ]          --objective clip:0.2
    eq. 8    L^KLPEN  E[ r A - beta KL[pi_old, pi] ]                  --objective kl:1 or adaptive:0.01
    eq. 9    the whole objective: one of these, minus c1 (V - V_targ)^2, plus c2 times the entropy
    eqs. 10-12        advantages A: GAE, here with exact bootstrapping of truncated episodes

Algorithm 1 is the loop in train(): N actors collect T steps each, advantages are estimated, K epochs of minibatch
gradient steps follow. "[detail n]" marks core implementation detail n of Huang et al. (2022), "The 37 Implementation
Details of Proximal Policy Optimization".

    python ppo_cartpole.py                                   # solves CartPole-v1 in some ten seconds, then evaluates it
    python ppo_cartpole.py --objective adaptive:0.01         # the KL penalty of section 4 instead of the clip
    python ppo_cartpole.py --env-id Acrobot-v1 --num-steps 256 --learning-rate 0.001 --total-timesteps 500000
    python ppo_cartpole.py --evaluate RUN_DIR --capture-video

Any Gymnasium environment with Discrete actions and a one-dimensional Box observation works, your own too:
--env-id my_module:MyEnv-v0. The run folder under runs/ holds config.json, metrics.csv, episodes.csv, checkpoint.pt and
summary.json. Expect a return of 500, the maximum, on CartPole.
"""

import contextlib
import csv
import datetime
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
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

Batch = dict[str, Tensor]  # by name, all with the same leading dimensions


@dataclass
class Args:
    """PPO for discrete actions (Schulman et al. 2017)."""

    # What is learned
    env_id: str = "CartPole-v1"
    """Gymnasium id (Discrete actions, one-dimensional Box observations); module:Name-v0 imports module first"""
    objective: str = "clip:0.2"
    """clip:EPS (eq. 7), kl:BETA (eq. 8), adaptive:D_TARG (section 4), none (eq. 6), pg (eq. 2: 1 epoch, 1 minibatch)"""
    seed: int = 1
    """seed of every random stream: initial weights, actions, minibatch order, environments"""

    # How much data
    total_timesteps: int = 100_000
    """environment steps in all, reset steps included, rounded up to whole updates"""
    num_envs: int = 32
    """parallel actors (N)"""
    num_steps: int = 64
    """steps of each actor per update, the horizon (T)"""

    # Advantages
    gamma: float = 0.99
    """discount factor (gamma, eq. 10)"""
    gae_lambda: float = 0.95
    """trace decay of GAE (lambda, eq. 11); 1 is eq. 10: all rewards to the end of the segment, then V"""
    norm_adv: Literal["batch", "minibatch", "none"] = "minibatch"
    """standardise advantages over the whole batch, within each minibatch, or not at all"""

    # Optimisation
    update_epochs: int = 4
    """passes over the batch per update (K)"""
    num_minibatches: int = 32
    """minibatches per pass; the paper's M is N * T / num_minibatches"""
    learning_rate: float = 2.5e-3
    """Adam step size (alpha)"""
    anneal_lr: bool = True
    """decay the step size linearly to 0 over the run"""
    vf_coef: float = 0.5
    """weight of the value loss (V - V_targ)^2 (c1, eq. 9); the loss has no factor 1/2"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (c2, eq. 9)"""
    value_clip: float | None = None
    """clip V to this distance from the old V and take the larger of both squared errors; None: plain squared error"""
    max_grad_norm: float = 0.5
    """scale the gradient down to at most this global norm; inf never does"""
    target_kl: float | None = None
    """end an update after the first epoch whose mean approx_kl exceeds this; None never does"""

    # The run
    device: str = "cpu"
    """cpu or cuda; networks this small are faster on the CPU"""
    compile: bool = False
    """torch.compile the gradient: half the time for each, after twenty seconds of compiling; needs a C++ compiler"""
    run_dir: str | None = None
    """folder of this run; None makes one under runs/"""
    checkpoint_every: int = 0
    """updates between checkpoints; each abandons unfinished episodes, so 0 spaces them by 50 episodes of full length"""
    resume: str | None = None
    """continue the run in this folder; no other flag may be given, all come from its config.json"""
    track: bool = False
    """mirror the run to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project: str = "ppo"
    """project for --track"""

    # Evaluation: at the end of every run, or of a finished one with --evaluate
    evaluate: str | None = None
    """evaluate the run in this folder instead of training; only the three flags below may go with it"""
    eval_episodes: int = 20
    """evaluation episodes, on seeds that training never used"""
    sample_actions: bool = False
    """evaluate with sampled actions instead of the most probable ones"""
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
        """What names each agent of the run; here there is one."""
        return [{"seed": self.seed, "objective": self.objective}]

    def check(self) -> None:
        """Raises UserError for the first flag that makes no sense. (A comparison with NaN is False, so NaN fails.)"""
        parse_objective(self.objective)
        for name in ("total_timesteps", "num_envs", "num_steps", "update_epochs", "num_minibatches", "eval_episodes"):
            most = 10**12 if name == "total_timesteps" else 2**20  # 2^20: stream() has room for the seeds of so many
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"--{name.replace('_', '-')} must be between 1 and {most}, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must be between 0 and {2**31 - 1}, not {self.seed}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("learning_rate", "value_clip", "target_kl"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        for name in ("vf_coef", "ent_coef", "checkpoint_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise UserError(f"--max-grad-norm must be positive (inf does not clip), not {self.max_grad_norm}")
        if self.batch_size % self.num_minibatches:
            raise UserError(
                f"a batch of {self.num_envs} x {self.num_steps} = {self.batch_size} steps does not divide into "
                f"{self.num_minibatches} minibatches; change --num-envs, --num-steps or --num-minibatches"
            )
        if self.batch_size > 10**8:
            raise UserError(f"a batch of {self.batch_size} steps is too large; lower --num-envs or --num-steps")
        if self.num_envs * (self.num_steps // 2) < 2 * self.num_minibatches:  # every second row may be a reset
            raise UserError(f"too few steps for {self.num_minibatches} minibatches; raise --num-steps or --num-envs")
        if self.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise UserError("--compile needs a C++ compiler such as g++; leave the flag out")
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
def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """`num_envs` copies of an environment behind one vector interface.  [detail 1]
    Raises UserError where the environment cannot be made or its spaces do not suit this script."""
    try:
        envs = gym.make_vec(env_id, num_envs)
    except Exception as reason:  # an environment's constructor may raise anything
        raise UserError(f"cannot make the environment {env_id!r}: {reason}") from reason
    if not isinstance(envs.single_action_space, gym.spaces.Discrete):
        raise UserError(f"{env_id} takes {envs.single_action_space} actions; this script handles only Discrete ones")
    if not isinstance(envs.single_observation_space, gym.spaces.Box) or len(envs.single_observation_space.shape) != 1:
        raise UserError(f"{env_id} observes {envs.single_observation_space}; this script handles only Box vectors")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"{env_id} does not reset itself on the step after an episode's end, as this script expects")
    return envs


def start_actors(args: Args, update: int) -> SimpleNamespace:
    """The N actors of Algorithm 1 in new environments, at the start of new episodes."""
    envs, seed = make_envs(args.env_id, args.num_envs), stream(args.seed, "environments", update)
    no_end, zeros = np.zeros(args.num_envs, bool), np.zeros(args.num_envs)  # returns and lengths: of the episode so far
    return SimpleNamespace(envs=envs, obs=envs.reset(seed=seed)[0], ended=no_end, returns=zeros, lengths=zeros.copy())


# ----------------------------------------------------------------------------------------------------------- AGENT
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights, zero biases.  [detail 2]"""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Policy and value function, two separate tanh networks.  [detail 13]"""

    def __init__(self, obs_dim: int, num_actions: int):
        super().__init__()

        def mlp(outputs: int, gain: float) -> nn.Sequential:
            first, second = layer_init(nn.Linear(obs_dim, 64)), layer_init(nn.Linear(64, 64))
            return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), layer_init(nn.Linear(64, outputs), gain))

        self.actor, self.critic = mlp(num_actions, gain=0.01), mlp(1, gain=1.0)  # a nearly uniform first policy

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [..., D] -> log-probabilities of all actions [..., A], values [...]"""
        return self.actor(obs).log_softmax(-1), self.critic(obs).squeeze(-1)


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


def standardise(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-8)


def categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    """Exact KL[old, new] of log-probabilities [..., A] -> [...]"""
    return (old.exp() * (old - new)).sum(-1)


def ppo_loss(log_probs: Tensor, values: Tensor, batch: Batch, objective: Objective, beta, args: Args) -> tuple:
    """The negative of eq. 9, to be minimised, and a dict of metrics, each a mean over the batch.  [detail 12]

    log_probs [B, A] and values [B] come from the weights being optimised. batch holds what the rollout recorded:
    actions [B], log_probs [B, A], values [B], advantages [B], returns [B] (V_targ). beta: float or scalar tensor.
    """
    actions, advantages = batch["actions"].unsqueeze(-1), batch["advantages"]
    log_prob = log_probs.gather(-1, actions).squeeze(-1)
    log_ratio = log_prob - batch["log_probs"].gather(-1, actions).squeeze(-1)
    ratio = log_ratio.exp()  # r of eqs. 6-8
    kl, entropy = categorical_kl(batch["log_probs"], log_probs), -(log_probs.exp() * log_probs).sum(-1).mean()

    if objective.log_prob:
        surrogate = log_prob * advantages  # eq. 2
    else:
        clipped = ratio.clamp(1 - objective.epsilon, 1 + objective.epsilon)
        surrogate = torch.min(ratio * advantages, clipped * advantages)  # eq. 7, and eq. 6 at epsilon = inf  [detail 8]
    if objective.beta > 0:
        surrogate = surrogate - beta * kl  # eq. 8
    policy_loss = -surrogate.mean()

    value_loss = (values - batch["returns"]).square()
    if args.value_clip is not None:  # the larger of two squared errors  [detail 9]
        near = batch["values"] + (values - batch["values"]).clamp(-args.value_clip, args.value_clip)
        value_loss = torch.max(value_loss, (near - batch["returns"]).square())
    value_loss = value_loss.mean()

    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # eq. 9  [detail 10]
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl.mean()}
    # KL[old, new] estimated from the actions taken: k3 and k1 of joschu.net/blog/kl-approx.html
    metrics |= {"approx_kl": (ratio - 1 - log_ratio).mean(), "old_approx_kl": -log_ratio.mean()}
    metrics["clipfrac"] = ((ratio - 1).abs() > objective.epsilon).float().mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def collect(agent: Agent, actors: SimpleNamespace, num_steps: int, rng: torch.Generator, seconds: dict) -> tuple:
    """Every actor takes `num_steps` steps; the time they take is added to `seconds`. Returns (rollout, episodes).
    rollout: obs [T+1, N, D], values [T+1, N], log_probs [T, N, A]; actions, rewards, terminated, truncated and valid,
    [T, N] each; valid is False in reset steps. episodes: (t * N + i, return, length) of each that ended at step t."""
    envs, space, device = actors.envs, actors.envs.single_action_space, next(agent.parameters()).device
    shape = (num_steps, envs.num_envs)
    obs = np.empty((num_steps + 1, *actors.obs.shape), np.float32)
    actions, rewards = np.empty(shape, np.int64), np.empty(shape, np.float32)
    terminated, truncated, valid = np.empty((3, *shape), bool)
    # argmax(logits + Gumbel noise) is a sample of softmax(logits); one draw serves the whole rollout
    gumbel = -torch.empty(*shape, int(space.n)).exponential_(generator=rng).log().numpy()
    episodes = []
    for t in range(num_steps):
        obs[t], valid[t], start = actors.obs, ~actors.ended, time.perf_counter()  # the step after an end only resets
        # sampling needs the actor alone; values and log_probs of the whole rollout are computed in one pass below
        actions[t] = (agent.actor(torch.from_numpy(obs[t]).to(device)).cpu().numpy() + gumbel[t]).argmax(-1)
        between = time.perf_counter()
        actors.obs, rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t] + space.start)
        seconds["policy"] += between - start
        seconds["environment"] += time.perf_counter() - between
        actors.returns, actors.lengths = actors.returns + rewards[t], actors.lengths + valid[t]
        actors.ended = terminated[t] | truncated[t]
        for i in actors.ended.nonzero()[0]:
            episodes.append((int(t * envs.num_envs + i), float(actors.returns[i]), int(actors.lengths[i])))
            actors.returns[i] = actors.lengths[i] = 0
    obs[num_steps] = actors.obs
    rollout = {"obs": obs, "actions": actions, "rewards": rewards, "terminated": terminated, "truncated": truncated}
    rollout = {name: torch.from_numpy(x).to(device) for name, x in (rollout | {"valid": valid}).items()}
    log_probs, values = agent(rollout["obs"])
    return rollout | {"log_probs": log_probs[:-1], "values": values}, episodes


def gradient(agent: Agent, parameters: list, minibatch: Batch, objective: Objective, beta, args: Args) -> Batch:
    """Leave the clipped gradient of ppo_loss in the agent's `parameters`; returns the metrics of this step."""
    if args.norm_adv == "minibatch":  # [detail 7]
        minibatch = minibatch | {"advantages": standardise(minibatch["advantages"])}
    loss, metrics = ppo_loss(*agent(minibatch["obs"]), minibatch, objective, beta, args)
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad  # in place of loss.backward(), which torch.compile cannot trace
    return metrics | {"grad_norm": nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)}  # [detail 11]


def update(agent, optimizer, batch: Batch, objective, beta: float, args: Args, rng, gradient=gradient) -> dict:
    """K epochs of minibatch steps on a batch of B transitions: what ppo_loss takes, and obs [B, D]. Returns the means
    of the metrics over all steps, and the exact KL of the whole batch after the last one."""
    if args.norm_adv == "batch":
        batch = batch | {"advantages": standardise(batch["advantages"])}
    history, parameters, beta = [], list(agent.parameters()), torch.tensor(beta)
    for _ in range(args.update_epochs):
        rows = torch.randperm(len(batch["obs"]), generator=rng).to(batch["obs"].device)
        shuffled = {name: x[rows].tensor_split(args.num_minibatches) for name, x in batch.items()}
        for i in range(args.num_minibatches):  # every transition once per epoch  [detail 6]
            minibatch = {name: parts[i] for name, parts in shuffled.items()}
            history.append(gradient(agent, parameters, minibatch, objective, beta, args))
            optimizer.step()
        epoch = history[-args.num_minibatches :]
        if args.target_kl is not None and torch.stack([m["approx_kl"] for m in epoch]).mean() > args.target_kl:
            break
    means = {name: torch.stack([metrics[name] for metrics in history]).mean().item() for name in history[0]}
    with torch.no_grad():
        kl = categorical_kl(batch["log_probs"], agent.actor(batch["obs"]).log_softmax(-1))
    return means | {"kl_after_update": kl.mean().item()}


# -------------------------------------------------------------------------------------------------------- TRAINING
def train(args: Args) -> tuple[Agent, list[dict]]:
    """Algorithm 1, then the evaluation. Returns the agent and the rows of summary.json. Raises UserError for bad input
    and NonFiniteError where a number becomes NaN or infinite."""
    args, saved = load_run(Args, args.resume) if args.resume is not None else (replace(args), None)
    args.check()
    torch.set_num_threads(1)  # for networks this small, synchronising threads costs more than it saves
    gradient_fn = compiled(gradient) if args.compile else gradient
    objective = parse_objective(args.objective)
    state = {"update": 0, "global_step": 0, "beta": objective.beta, "transitions": [0], "diverged_at": [None]}
    state = saved["state"] if saved else state  # its lists have one entry per agent, and here there is one
    actors = start_actors(args, state["update"])
    torch.manual_seed(stream(args.seed, "weights"))
    dims = actors.obs.shape[1], int(actors.envs.single_action_space.n)
    agent = Agent(*dims).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [detail 3]
    rng = {name: torch.Generator().manual_seed(stream(args.seed, name)) for name in ("actions", "minibatches")}
    restore(saved, agent=agent, optimizer=optimizer, **rng)
    open_env(args.env_id, args.capture_video).close()  # where rendering does not work, say so now
    longest = actors.envs.spec.max_episode_steps or 1000
    run = Run(args, {"env_id": args.env_id}, math.ceil(50 * longest / args.num_steps), saved)
    while state["update"] < args.num_updates:
        # ROLLOUT
        rollout, episodes = collect(agent, actors, args.num_steps, rng["actions"], run.seconds)
        check_finite({name: rollout[name] for name in ("obs", "rewards", "log_probs", "values")}, state["update"] + 1)

        # ADVANTAGES
        batch = {"obs": rollout["obs"][:-1], "values": rollout["values"][:-1]}
        recorded = (rollout[name] for name in ("rewards", "values", "terminated", "truncated"))
        batch["advantages"] = gae(*recorded, args.gamma, args.gae_lambda)
        batch["returns"] = batch["advantages"] + batch["values"]  # V_targ, the TD(lambda) return
        batch |= {name: rollout[name] for name in ("actions", "log_probs")}
        batch = {name: x[rollout["valid"]] for name, x in batch.items()}  # [T, N, ...] -> [B, ...], no autoreset rows

        # UPDATE
        lr = args.learning_rate * (1 - state["update"] / args.num_updates if args.anneal_lr else 1)  # [detail 4]
        optimizer.param_groups[0]["lr"] = lr
        with run.timed("update"):
            metrics = update(agent, optimizer, batch, objective, state["beta"], args, rng["minibatches"], gradient_fn)
        check_finite(metrics | {"weights": nn.utils.parameters_to_vector(agent.parameters())}, state["update"] + 1)

        # LOG
        run.record(state["global_step"], episodes)
        state["update"] += 1
        state["global_step"] += args.batch_size
        state["transitions"][0] += len(batch["obs"])
        variance, unexplained = batch["returns"].var(), (batch["returns"] - batch["values"]).var()
        metrics["explained_variance"] = float(1 - unexplained / variance) if variance > 0 else 0.0
        run.log(state, [{"charts/learning_rate": lr, "charts/beta": state["beta"]}], [metrics])
        state["beta"] = objective.adapt(state["beta"], metrics["kl_after_update"])
        if state["update"] % args.checkpoint_every == 0 or state["update"] == args.num_updates:
            run.save(state, dims=dims, agent=agent, optimizer=optimizer, **rng)
            actors.envs.close()  # environments cannot be saved: every run, resumed or not, starts new episodes here
            actors = start_actors(args, state["update"])
    actors.envs.close()
    return agent, run.finish(state, evaluate(agent, args, run.path))


def evaluate(agent: Agent, args: Args, run_path: Path) -> list[list[float]]:
    """Plays E = args.eval_episodes episodes, on seeds that training never used, and gives their returns as [1, E].
    Greedy actions, or sampled ones with args.sample_actions. Raises UserError where rendering does not work."""
    seed, returns = 2**30 + stream(args.seed, "evaluation"), [0.0] * args.eval_episodes
    rng = torch.Generator().manual_seed(seed)
    with open_env(args.env_id, args.capture_video, run_path / "videos") as env, torch.no_grad():
        for episode in range(args.eval_episodes):
            (obs, _), ended = env.reset(seed=seed + episode), False
            while not ended:
                logits = agent.actor(torch.as_tensor(obs, dtype=torch.float32, device=args.device)).cpu()
                if args.sample_actions:
                    logits -= torch.empty_like(logits).exponential_(generator=rng).log()
                obs, reward, terminated, truncated, _ = env.step(int(logits.argmax()) + env.action_space.start)
                returns[episode] += float(reward)
                ended = terminated or truncated
    return [returns]


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


# -------------------------------------------------------------------------------------------------------- COMMANDS
def compiled(function: Callable) -> Callable:
    """torch.compile, with the switch that lets it trace torch.autograd.grad; not part of PyTorch's stable interface."""
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, dynamic=True)


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


def load_agent(run_dir: str) -> tuple["Agent", Args]:
    """The trained agent of a run folder, on the CPU, and its flags. Raises UserError where there is no checkpoint."""
    args, saved = load_run(Args, run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    agent = Agent(*saved["dims"])
    restore(saved, agent=agent)
    args.device, args.compile = "cpu", False
    return agent, args


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
