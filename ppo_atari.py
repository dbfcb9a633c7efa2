"""Proximal Policy Optimization (PPO) from pixels: the Nature CNN on EnvPool's Atari games.

Schulman, Wolski, Dhariwal, Radford, Klimov (2017), https://arxiv.org/abs/1707.06347, with the
settings of its Table 5: step size and clip range both fall linearly to 0. Read ppo_cartpole.py
first: equations, detail numbers and most functions are the same here. Three things are new: pixels,
games that are counted in two ways, and several processes.

Learning follows the protocol of Mnih et al. (2015). An action is held for 4 frames. The network
gets the last 4 images, gray, 84 x 84. A game starts with up to 30 idle frames. Rewards are cut to
their sign. A lost life ends an episode. EnvPool adds three things: it idles after a lost life too,
it presses FIRE at every such start if the game has that button, and it truncates a game after
27,000 steps. What is reported is the whole game: its own points, over all lives. Only points that
fall into idle frames are missing.

The paper cites the small network of Mnih et al. (2016). Its code has the one of Mnih et al. (2015),
filters 32-64-64 and 512 units, and so have Baselines, CleanRL and this script. Table 5 leaves four
more things open, which are here as in OpenAI Baselines' ppo2: orthogonal weights, Adam's epsilon,
advantages standardised within a minibatch, and gradients scaled down to a norm of 0.5. In two more
this script differs from ppo2: the value loss is not clipped, and a time limit is no end.

    python ppo_atari.py --total-timesteps 3000000        # Pong: an hour or two on two cores
    python ppo_atari.py --env-id Breakout-v5 --device cuda
    python ppo_atari.py --no-anneal-clip                 # constant clip range, as in CleanRL
    torchrun --nproc-per-node 2 ppo_atari.py --num-envs 16
    python ppo_atari.py --evaluate RUN_DIR --capture-video

Under torchrun each rank has its part of the actors (above: 8 of 16), and the ranks' gradients are
added up. Their sum is the gradient that one process would have on the same minibatches; but which
rows share a minibatch depends on the number of ranks. Rank 0 writes the run folder. --resume needs
as many ranks as before for the same bits, and on several nodes a folder that all can read. Each
rank computes its own weights, so let all machines be of one kind: on another one the last bits can
differ. When one rank fails, torchrun ends all of them, adds a report, and exits with code 1.

In bfloat16 a CPU may compute minibatches by other kernels than rollouts. Then the ratios before the
first step of an update are not exactly 1: on average they are off by less than 0.001, a hundredth
of the first clip range. With --anneal-clip that range shrinks; in the last percent of a run it is
as small as the difference.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "envpool==1.2.5",
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
import difflib
import gc
import hashlib
import io
import itertools
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
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import envpool
import numpy as np
import torch
import torch.distributed as dist
import tyro
from envpool.registration import registry
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class Args:
    """PPO from pixels on Atari (Schulman et al. 2017: Table 5, and 40M frames)."""

    env_id: str = "Pong-v5"  # one of EnvPool's Atari games: {Game}-v5
    objective: str = "clip:0.1"  # clip:EPS (eq. 7), kl:BETA, adaptive:D_TARG (eq. 8), none, pg
    seed: int = 1  # seed of every random stream: weights, actions, minibatches, environments
    sticky_actions: float = 0.0  # chance that a frame repeats the last action; Machado 2018: 0.25
    full_action_space: bool = False  # all 18 actions of the console, not only those of the game

    total_timesteps: int = 10_000_000  # steps of 4 frames, reset steps included, in whole updates
    num_envs: int = 8  # parallel actors (N), of all ranks together
    num_steps: int = 128  # steps of each actor per update (T)

    gamma: float = 0.99  # discount factor (eq. 10)
    gae_lambda: float = 0.95  # lambda of GAE (eq. 11)
    norm_adv: Literal["batch", "minibatch", "none"] = "minibatch"  # where to standardise advantages
    bootstrap_truncated: bool = True  # a time limit does not end the return: V stands for the rest

    update_epochs: int = 3  # passes over the batch per update (K)
    num_minibatches: int = 4  # minibatches per pass; the paper's M is N * T / num_minibatches
    learning_rate: float = 2.5e-4  # Adam step size
    anneal_lr: bool = True  # decay the step size linearly to 0 over the run (alpha of Table 5)
    anneal_clip: bool = True  # decay the clip range EPS in the same way
    vf_coef: float = 1.0  # c1 of eq. 9: weight of (V - V_targ)^2, which has no factor 1/2
    ent_coef: float = 0.01  # c2 of eq. 9: weight of the entropy bonus
    value_clip: float | None = None  # clip V to this distance from the old V, take the larger loss
    max_grad_norm: float = 0.5  # scale the gradient down to at most this norm; inf never does
    target_kl: float | None = None  # end an update after an epoch whose mean approx_kl exceeds this

    device: str = "cpu"  # cpu or cuda; under torchrun, cuda gives each rank its own GPU
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where it is native
    compile: bool = False  # torch.compile the loss; no gain on a CPU, nor on an H100
    threads: int = 0  # CPU threads of an update; 0: all cores, shared by the ranks
    run_dir: str | None = None  # folder of this run; None makes one under runs/
    checkpoint_every: int = 0  # updates between checkpoints, each cuts games short; 0: few
    resume: str | None = None  # go on with the run in this folder; its config.json has the flags
    track: bool = False  # mirror the run to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "ppo"  # project for --track

    evaluate: str | None = None  # evaluate the run in this folder; the flags below may be given
    eval_episodes: int = 20  # whole games to play, on seeds that training never used
    sample_actions: bool = False  # evaluate sampled actions, not the most probable ones
    capture_video: bool = False  # film every evaluation game: RUN_DIR/videos/*.mp4

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)


# ---------------------------------------------------------------------------------- ENVIRONMENTS
def make_envs(args: Args, num_envs: int, seed: int, render: bool = False):
    """`num_envs` consoles, on the seeds `seed`, `seed` + 1, ..., for training and for evaluation.

    With `render`, their screens can be filmed.  [detail 1]
    """
    return envpool.make(
        args.env_id,
        env_type="gymnasium",
        num_envs=num_envs,
        seed=list(range(seed, seed + num_envs)),
        render_mode="rgb_array" if render else None,
        frame_skip=4,  # an action is held for 4 frames
        stack_num=4,
        gray_scale=True,
        img_height=84,
        img_width=84,
        noop_max=30,
        episodic_life=True,  # a lost life ends an episode, not the game
        reward_clip=True,
        use_fire_reset=True,
        max_episode_steps=27_000,
        repeat_action_probability=args.sticky_actions,
        full_action_space=args.full_action_space,
    )


def channels_last(obs: np.ndarray) -> Tensor:
    """EnvPool's images [..., 4, 84, 84], in the order [..., 84, 84, 4] that convolutions prefer."""
    return torch.as_tensor(obs).movedim(-3, -1)


# ----------------------------------------------------------------------------------------- AGENT
def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights, zero biases.  [detail 2]"""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Policy and value function on one trunk.  [detail 13]

    With `bfloat16`, the trunk computes in that format. Weights and results are float32 still.
    """

    def __init__(self, num_actions: int, bfloat16: bool = False):
        super().__init__()
        self.bfloat16 = bfloat16
        conv1 = nn.Conv2d(4, 32, kernel_size=8, stride=4)
        conv2 = nn.Conv2d(32, 64, kernel_size=4, stride=2)
        conv3 = nn.Conv2d(64, 64, kernel_size=3, stride=1)
        self.trunk = nn.Sequential(
            layer_init(conv1),
            nn.ReLU(),
            layer_init(conv2),
            nn.ReLU(),
            layer_init(conv3),
            nn.ReLU(),
            nn.Flatten(-3),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, num_actions), 0.01)  # a nearly uniform first policy
        self.critic = layer_init(nn.Linear(512, 1), 1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [..., 84, 84, 4], bytes -> log-probabilities of all actions [..., A], V(obs) [...]

        The policy is made here alone: what is changed here is played, learned and evaluated.
        """
        device = obs.device.type
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            pixels = obs.movedim(-1, -3).to(dtype).div_(255)  # in memory still channels last
            hidden = self.trunk(pixels)
        with torch.autocast(device, enabled=False):  # the heads need more than bfloat16's 8 bits
            hidden = hidden.float()
            logits = self.actor(hidden)
            # a logit may be -inf: 0 * inf would be NaN
            log_probs = logits.log_softmax(-1).clamp(min=-1e9)
            return log_probs, self.critic(hidden).squeeze(-1)


def draw_noise(shape: tuple[int, ...], rng: torch.Generator) -> np.ndarray:
    """Standard Gumbel noise: argmax(log_probs + noise) is a sample of the policy.

    Drawn for a whole rollout at once, and on the CPU: the same numbers on every device.
    """
    return -torch.empty(shape).exponential_(generator=rng).log().numpy()


@torch.no_grad()
def act(agent: Agent, obs: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """obs [..., 4, 84, 84] -> actions [...]: samples with noise [..., A], else the likeliest."""
    device = next(agent.parameters()).device
    log_probs, _ = agent(channels_last(obs).contiguous().to(device))
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
    """N of the actors of Algorithm 1: their emulators, and the game that each is in."""

    def __init__(self, args: Args, num_envs: int, render: bool = False):
        self.args = args
        self.num_envs = num_envs
        self.render = render

    def restart(self, seed: int) -> None:
        """Every actor begins a new game, on the seeds `seed`, `seed` + 1, ..."""
        self.envs = make_envs(self.args, self.num_envs, seed, self.render)
        self.obs, info = self.envs.reset()
        self.lives = info["lives"]
        self.ended = np.zeros(self.num_envs, bool)  # the last step was the end of a life or a game
        self.returns = np.zeros(self.num_envs)  # of the game so far, over all its lives
        self.lengths = np.zeros(self.num_envs, int)

    def step(self, actions: np.ndarray) -> tuple:
        """actions [N] -> rewards, terminated, truncated [N], and the games that ended here.

        Rewards and ends are those that learning gets; a game is (actor, return, length), in its own
        points, over all its lives. The step after an end ignores the action and pays 0: it idles up
        to 30 frames, in a new game if the last one is over. There are seven kinds of ending:

        what happens                       EnvPool reports     learning gets       the game
        a life is lost                     terminated          terminated          goes on
        the game ends                      terminated          terminated          is over
        27,000 steps have passed           truncated           truncated           is over
        a life is lost in step 27,000      truncated           truncated           is over
        a game ends in step 27,000         truncated           both                is over
        a game ends while it idles         nothing             nothing             is over
        it ends in the last idle frame     an end, twice       terminated, twice   is over, once

        A game that ends while it idles is noticed by its lives: the new game has more of them than
        the old one had. RoadRunner does this now and then. EnvPool then counts steps on, and so
        truncates the new game earlier. info["terminated"] says that a game is over, also in the two
        cases where the step's own `terminated` does not.
        """
        self.obs, rewards, terminated, truncated, info = self.envs.step(actions)
        game_over = info["terminated"] > 0
        terminated = terminated | game_over
        ended_idling = self.ended & (info["lives"] > self.lives)
        self.returns += info["reward"]
        self.lengths += ~self.ended  # a reset step is no step of the game
        over = (game_over | truncated | ended_idling) & (self.lengths > 0)  # 0: counted already
        self.ended = terminated | truncated
        self.lives = info["lives"]
        games = []
        for i in over.nonzero()[0]:
            games.append((int(i), float(self.returns[i]), int(self.lengths[i])))
            self.returns[i] = 0
            self.lengths[i] = 0
        return rewards, terminated, truncated, games


@torch.no_grad()
def collect(agent: Agent, actors: Actors, noise: Tensor) -> tuple[dict, list]:
    """Every actor takes T steps, sampled with `noise` [T, N, A]. Returns (rollout, games).

    rollout: obs [T+1, N, 84, 84, 4]; values [T+1, N]; log_probs [T, N, A], of all actions; actions,
    rewards, terminated, truncated, valid [T, N]. valid is False in reset steps. games: (step,
    actor, return, length) of each that ended.
    """
    device = noise.device
    num_steps, num_envs, _ = noise.shape
    obs = torch.empty(num_steps + 1, num_envs, 84, 84, 4, dtype=torch.uint8, device=device)
    values = torch.empty(num_steps + 1, num_envs, device=device)
    frames = torch.empty(num_envs, 84, 84, 4, dtype=torch.uint8, pin_memory=noise.is_cuda)
    steps, games = [], []
    # one autocast around all steps: it converts the weights to bfloat16 only once
    with torch.autocast(device.type, torch.bfloat16, enabled=agent.bfloat16):
        for t in range(num_steps + 1):
            frames.copy_(channels_last(actors.obs))
            obs[t].copy_(frames, non_blocking=True)
            log_probs, values[t] = agent(obs[t])
            if t == num_steps:  # of the last state only V is needed
                break
            actions = (log_probs + noise[t]).argmax(-1)
            step = {"log_probs": log_probs, "actions": actions}
            step["valid"] = ~actors.ended  # the step after an end only resets
            played = actors.step(actions.cpu().numpy())
            step["rewards"], step["terminated"], step["truncated"], over = played
            steps.append(step)
            for i, game_return, length in over:
                games.append((t, i, game_return, length))
    rollout = {"obs": obs, "values": values}
    for name in steps[0]:
        rollout[name] = torch.stack([torch.as_tensor(step[name]) for step in steps])
    return rollout, games


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place; x as it is where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_and_variance(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """x, valid [..., B] -> mean and sample variance [..., 1] where valid is 1, over all ranks."""
    count = all_reduce(valid.sum(-1, keepdim=True))
    mean = all_reduce((x * valid).sum(-1, keepdim=True)) / count.clamp(min=1)
    squares = all_reduce(((x - mean).square() * valid).sum(-1, keepdim=True))
    return mean, squares / (count - 1).clamp(min=1)


def standardise(x: Tensor, valid: Tensor) -> Tensor:
    """x [..., B] with mean 0 and standard deviation 1 over the transitions of all ranks."""
    mean, variance = mean_and_variance(x, valid)
    return (x - mean) / (variance.sqrt() + 1e-8)


def minibatch_loss(agent: Agent, minibatch: dict, objective: Objective, beta, args: Args) -> tuple:
    """Minus eq. 9, to be minimised, and the means of ppo_loss's terms. --compile compiles this.

    minibatch: what the rollout recorded, and row_weights [M], which are 0 in reset rows and sum to
    1 over all ranks. So a rank's loss and means are its share; the sum of the shares is the mean.
    """
    log_probs, values = agent(minibatch["obs"])
    terms = ppo_loss(
        log_prob=log_prob_of(log_probs, minibatch["actions"]),
        entropy=entropy_of(log_probs),
        kl=kl_between(minibatch["log_probs"], log_probs),
        values=values,
        batch=minibatch,
        objective=objective,
        beta=beta,
        args=args,
    )
    means = {name: (term * minibatch["row_weights"]).sum() for name, term in terms.items()}
    return total_loss(means, args), {name: mean.detach() for name, mean in means.items()}


def update(agent, optimizer, batch, orders, objective, beta, args, loss_fn=minibatch_loss) -> dict:
    """K epochs of minibatch steps. Returns the means of the metrics over all steps and ranks.

    batch: this rank's B rows of obs, actions, log_probs, of what ppo_loss takes, and of valid: 1,
    or 0 in reset rows. orders [K, P, M]: the M rows of each of P minibatches in K epochs. The p-th
    minibatches of all ranks are one minibatch, so all ranks take the same steps. kl_after_update is
    the exact KL after the last step: of one minibatch, or of all where beta adapts to it.
    """
    parameters = list(agent.parameters())
    device = orders.device
    # tensors, because torch.compile would compile anew for every new number
    beta = torch.tensor(beta, device=device)
    objective = objective._replace(epsilon=torch.tensor(objective.epsilon, device=device))

    advantages = batch["advantages"]
    if args.norm_adv == "batch":
        advantages = standardise(advantages, batch["valid"])
    advantages = advantages[orders]  # [K, P, M]
    valid = batch["valid"][orders]
    if args.norm_adv == "minibatch":  # [detail 7]
        advantages = standardise(advantages, valid)
    row_weights = valid / all_reduce(valid.sum(-1, keepdim=True)).clamp(min=1)

    history, grad_norms = [], []
    for epoch, minibatches in enumerate(orders):
        for i, rows in enumerate(minibatches):  # every row once per epoch  [detail 6]
            # index_select is faster than x[rows]
            minibatch = {name: x.index_select(0, rows) for name, x in batch.items()}
            minibatch["advantages"] = advantages[epoch, i]
            minibatch["row_weights"] = row_weights[epoch, i]
            loss, means = loss_fn(agent, minibatch, objective, beta, args)
            optimizer.zero_grad()
            loss.backward()
            if dist.is_initialized():  # add up the ranks' gradients, in one message
                gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
                dist.all_reduce(gradient)
                parts = gradient.split([parameter.numel() for parameter in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.grad.copy_(part.view_as(parameter))
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # [detail 11]
            optimizer.step()
            grad_norms.append(grad_norm)
            # copies: with CUDA graphs, the next step would overwrite them
            history.append({name: mean.clone() for name, mean in means.items()})
        if args.target_kl is not None:
            kls = [means["approx_kl"] for means in history[-len(minibatches) :]]
            if all_reduce(torch.stack(kls).mean()) > args.target_kl:
                break

    metrics = {}
    for name in history[0]:
        metrics[name] = all_reduce(torch.stack([means[name] for means in history]).mean()).item()
    metrics["grad_norm"] = torch.stack(grad_norms).mean().item()
    kls = []
    measured = orders[0] if objective.kind == "adaptive" else orders[0, :1]
    with torch.no_grad():
        for i, rows in enumerate(measured):
            log_probs, _ = agent(batch["obs"][rows])
            kl = kl_between(batch["log_probs"][rows], log_probs)
            kls.append((kl * row_weights[0, i]).sum())
    metrics["kl_after_update"] = all_reduce(torch.stack(kls).mean()).item()
    _, variance = mean_and_variance(batch["returns"], batch["valid"])
    errors = batch["returns"] - batch["values"]
    _, unexplained = mean_and_variance(errors, batch["valid"])
    metrics["explained_variance"] = float(1 - unexplained / variance) if variance > 0 else 0.0
    return metrics


# -------------------------------------------------------------------------------------- TRAINING
def annealed(args: Args, objective: Objective, iteration: int) -> tuple[float, Objective]:
    """Step size and objective of an update: alpha of Table 5 falls linearly from 1 to 0."""
    alpha = 1 - iteration / args.num_updates
    lr = args.learning_rate
    if args.anneal_lr:  # [detail 4]
        lr = lr * alpha
    if args.anneal_clip:
        objective = objective._replace(epsilon=objective.epsilon * alpha)
    return lr, objective


@contextlib.contextmanager
def torch_threads(count: int):
    """PyTorch uses `count` CPU threads inside; afterwards, whatever happened, as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def begin(args: Args, saved: dict | None) -> tuple[dict, dict]:
    """What a run begins with or goes on with: the state of its loop, and the parts that change."""
    spec = envpool.make_spec(args.env_id, full_action_space=args.full_action_space)
    dims = {"num_actions": int(spec.action_space.n), "bfloat16": args.precision == "bfloat16"}
    seed_globals(stream(args.seed, "weights"))
    agent = Agent(**dims).to(args.device)
    parts = {
        "agent": agent,
        "optimizer": torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True),  # [detail 3]
        "action_rng": torch.Generator().manual_seed(stream(args.seed, "actions")),
        "minibatch_rng": torch.Generator().manual_seed(stream(args.seed, "minibatches")),
    }
    state = {
        "updates": 0,
        "transitions": 0,
        "beta": parse_objective(args.objective).beta,
        "diverged_at": None,  # for benchmark/lockstep.py
        "dims": dims,
    }
    if saved is not None:
        state = saved["state"]
        restore(parts, saved)
    return state, parts


@torch_threads(1)  # updates use more; during rollouts EnvPool needs the other cores
def train(args: Args) -> tuple[Agent, dict]:
    """Algorithm 1, then the evaluation. Returns the agent and what summary.json says of the run.

    Only rank 0 has a summary; the other ranks return {}. Raises UserError for bad input,
    NonFiniteError where a number becomes NaN or infinite, and RuntimeError where the environments
    of rank 0 fail during the training.
    """
    saved = None
    if args.resume is not None:
        args, saved = load_resumed(args)
    args = check_args(args)
    objective = parse_objective(args.objective)
    rank, world = join_ranks(args.device)
    threads = args.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    local_envs = args.num_envs // world
    first_env = rank * local_envs  # an actor's seed and noise depend on its place among all actors
    actors = Actors(args, local_envs)
    state, parts = begin(args, saved)
    agent = parts["agent"]
    loss_fn = torch.compile(minibatch_loss, dynamic=False) if args.compile else minibatch_loss
    space_checkpoints(args)
    if rank == 0:
        who = {"seed": args.seed, "objective": args.objective}
        run = Run(args, {"env_id": args.env_id}, who, saved)
        run.bar.set_postfix_str("the first update compiles" if args.compile else "")

    with contextlib.closing(run) if rank == 0 else contextlib.nullcontext():
        restart = True  # environments cannot be saved: they begin anew after a checkpoint
        for iteration in range(state["updates"], args.num_updates):
            # ROLLOUT
            shape = (args.num_steps, args.num_envs, state["dims"]["num_actions"])
            with run.saving_work(state, parts) if rank == 0 else contextlib.nullcontext():
                if restart:
                    actors.restart(stream(args.seed, "environments", iteration) + first_env)
                # every rank draws the noise of all actors and takes that of its own
                noise = draw_noise(shape, parts["action_rng"])
                noise = noise[:, first_env : first_env + local_envs]
                rollout, games = collect(agent, actors, torch.from_numpy(noise).to(args.device))
            computed = {name: rollout[name] for name in ("rewards", "log_probs", "values")}
            check_finite(computed, iteration + 1)

            # ADVANTAGES
            terminated, truncated = rollout["terminated"], rollout["truncated"]
            if not args.bootstrap_truncated:  # a time limit counts as an end
                terminated = terminated | truncated
            values = rollout["values"].cpu()  # gae takes many small steps, slow on a GPU
            rewards = rollout["rewards"]
            advantages = gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
            batch = {
                "obs": rollout["obs"][:-1],
                "actions": rollout["actions"],
                "log_probs": rollout["log_probs"],
                "log_prob": log_prob_of(rollout["log_probs"], rollout["actions"]),
                "values": values[:-1],
                "advantages": advantages,
                "returns": advantages + values[:-1],  # V_targ: the TD(lambda) return
                "valid": rollout["valid"].float(),
            }
            # [T, N, ...] -> [B, ...]
            batch = {name: x.flatten(0, 1).to(args.device) for name, x in batch.items()}

            # UPDATE
            lr, current = annealed(args, objective, iteration)
            parts["optimizer"].param_groups[0]["lr"] = lr
            beta = state["beta"]
            with torch_threads(threads):
                losses = update(
                    agent=agent,
                    optimizer=parts["optimizer"],
                    batch=batch,
                    orders=draw_orders(args, rank, world, parts["minibatch_rng"]).to(args.device),
                    objective=current,
                    beta=beta,
                    args=args,
                    loss_fn=loss_fn,
                )
            weights = nn.utils.parameters_to_vector(agent.parameters())
            check_finite(losses | {"weights": weights}, iteration + 1)
            if objective.kind == "adaptive":
                state["beta"] = adapt_beta(beta, losses["kl_after_update"], objective)

            # LOG
            state["updates"] += 1
            state["transitions"] += int(all_reduce(batch["valid"].sum()))
            episodes = []
            for t, i, game_return, length in games:
                episodes.append((t * args.num_envs + first_env + i, game_return, length))
            episodes = gathered(episodes)
            epsilon = current.epsilon if objective.kind == "clip" else None
            restart = state["updates"] % args.checkpoint_every == 0
            if rank == 0:
                charts = {"learning_rate": lr, "beta": beta, "epsilon": epsilon}
                run.log(state["updates"], episodes, charts, losses)
                if restart or state["updates"] == args.num_updates:
                    save_checkpoint(run.path / "checkpoint.pt", run.checkpoint(state, parts))
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return agent, {}
    return agent, run.finish(state, evaluate(agent, args, run.path))


@torch_threads(1)
def evaluate(agent: Agent, args: Args, run_path: Path) -> list[float]:
    """The returns of args.eval_episodes whole games, on seeds that training never used.

    All games at once. Greedy actions, or sampled ones with args.sample_actions. Raises UserError
    under torchrun in every rank but the first.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        raise UserError("an agent is evaluated by one process: start it without torchrun")
    seed = 2**30 + stream(args.seed, "evaluation")
    rng = torch.Generator().manual_seed(seed)
    num_games = args.eval_episodes
    actors = Actors(args, num_games, render=args.capture_video)
    actors.restart(seed)
    videos = []
    if args.capture_video:
        shutil.rmtree(run_path / "videos", ignore_errors=True)  # those of an earlier evaluation
        videos = [open_video(run_path / "videos" / f"game-{i}.mp4") for i in range(num_games)]
    noise = np.zeros((num_games, agent.actor.out_features), np.float32)
    actions = np.zeros(num_games, int)
    returns = np.zeros(num_games)
    running = np.ones(num_games, bool)
    while running.any():
        if args.capture_video:
            for i in running.nonzero()[0]:
                videos[i].write_frame(*actors.envs.render(env_ids=[i]))
        if args.sample_actions:
            noise = draw_noise(noise.shape, rng)
        actions[running] = act(agent, actors.obs[running], noise[running])
        *_, games = actors.step(actions)
        for i, game_return, _ in games:
            if running[i]:
                returns[i] = game_return
                running[i] = False
    for video in videos:
        video.close()
    return returns.tolist()


def load_agent(run_dir: str) -> tuple[Agent, Args]:
    """The trained agent of a run folder, on the CPU, and its flags. Raises UserError."""
    args, saved = load_run(run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    agent = Agent(**saved["state"]["dims"])
    restore({"agent": agent}, saved)
    return agent, replace(args, device="cpu", compile=False)


def load_policy(run_dir: str, sample_actions: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """The trained policy of a run folder, as a function from frames to actions.

    It takes what EnvPool gives: the last 4 frames [4, 84, 84] of bytes -> action, or of B games
    [B, 4, 84, 84] -> actions [B]. Gives the most probable actions, or samples. Raises UserError
    where there is no checkpoint.
    """
    agent, args = load_agent(run_dir)
    rng = torch.Generator().manual_seed(stream(args.seed, "policy"))

    def policy(obs: np.ndarray) -> np.ndarray:
        shape = (*np.shape(obs)[:-3], agent.actor.out_features)
        noise = draw_noise(shape, rng) if sample_actions else 0.0
        return act(agent, obs, noise)

    return policy


# --------------------------------------------------------------------------- RANKS, CORES, VIDEOS
def join_ranks(device: str) -> tuple[int, int]:
    """Rank and number of ranks. Under torchrun, joins them; on CUDA, takes this rank's GPU."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return rank, world


def gathered(rows: list) -> list:
    """The rows of all ranks, in order."""
    parts = [rows]
    if dist.is_initialized():
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
    return sorted(itertools.chain(*parts))


def draw_orders(args: Args, rank: int, world: int, rng: torch.Generator) -> Tensor:
    """[K, P, M]: for each epoch a permutation of this rank's rows, cut into P minibatches.

    Every rank draws the permutations of all ranks and takes its own.
    """
    epochs = []
    for _ in range(args.update_epochs):
        orders = [torch.randperm(args.batch_size // world, generator=rng) for _ in range(world)]
        epochs.append(orders[rank])
    return torch.stack(epochs).unflatten(1, (args.num_minibatches, -1))


def cores() -> int:
    """CPU cores that this process may use: taskset or a job scheduler may leave it a part."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_video(path: Path):
    """An mp4 at the speed of the game, 15 steps a second: write_frame(screen), then close()."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # half a second to import

    path.parent.mkdir(exist_ok=True)
    return FFMPEG_VideoWriter(str(path), size=(160, 210), fps=15, pixel_format="rgb24")


# ----------------------------------------------------------------------------------------- FLAGS
RESUME_FLAGS = ("device", "compile", "threads")  # go beside --resume: a run may move
EVALUATION_FLAGS = ("eval_episodes", "sample_actions", "capture_video")  # go beside --evaluate
LIMITS = {
    (0, 2**31 - 1): ["seed"],
    (1, 10**12): ["total_timesteps"],
    (1, 2**20): ["num_envs", "num_steps", "update_epochs", "num_minibatches", "eval_episodes"],
    (0, 1): ["gamma", "gae_lambda", "sticky_actions"],
    (0, 1e12): ["vf_coef", "ent_coef", "checkpoint_every"],
    (0, 1024): ["threads"],
    (1e-12, 1e12): ["learning_rate", "value_clip", "target_kl"],
    (1e-12, math.inf): ["max_grad_norm"],
}


def parse_args(argv: list[str]) -> Args:
    """The command line. Where it is wrong, tyro says so in a box and exits with code 2."""
    given = given_flags(argv)
    return complete_args(tyro.cli(Args, args=argv), given)


def check_args(args: Args) -> Args:
    """A copy of the flags, to work with, in which --precision is decided.

    Raises UserError for the first flag that makes no sense.
    """
    args = check_types(args)
    check_game(args.env_id)
    objective = parse_objective(args.objective)
    for (low, high), names in LIMITS.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not low <= value <= high:  # NaN is in no interval
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be between {low} and {high}, not {value}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % world:
        what = "each needs the same number; change --num-envs"
        raise UserError(f"{args.num_envs} environments cannot be split over {world} ranks, {what}")
    size = f"a batch of {args.num_envs} x {args.num_steps} = {args.batch_size} steps"
    if args.batch_size > 2**20:  # 30 GB of observations
        raise UserError(f"{size} is too large; lower --num-envs or --num-steps")
    if args.batch_size % (args.num_minibatches * world):
        share = f" on each of {world} ranks" if world > 1 else ""
        raise UserError(f"{size} does not divide into {args.num_minibatches} minibatches{share}")
    if args.batch_size < 4 * args.num_minibatches:
        raise UserError(f"{size} is too small: a minibatch must hold at least 4 steps")
    if objective.kind == "pg" and (args.update_epochs, args.num_minibatches) != (1, 1):
        what = "eq. 2 can use a batch once only: add --update-epochs 1 --num-minibatches 1"
        raise UserError(f"--objective pg: {what}")
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA here; use --device cpu")
    if args.device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs are fewer than the ranks")
    if args.compile and not has_compiler():
        raise UserError("--compile needs a C++ compiler such as g++; use --no-compile")
    if args.capture_video and find_spec("moviepy") is None:
        raise UserError("--capture-video needs moviepy: pip install moviepy, or film nothing")
    if args.precision != "auto":
        return args
    if args.device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without instructions for it, bfloat16 is slower than float32
        native = torch.cpu._is_avx512_bf16_supported()
    return replace(args, precision="bfloat16" if native else "float32")


def check_game(env_id: str) -> None:
    """Raises UserError where EnvPool does not have the game."""
    games = [name for name, spec in registry.specs.items() if spec[0] == "envpool.atari"]
    if env_id not in games:
        similar = difflib.get_close_matches(env_id, games, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(f"{env_id!r} is none of EnvPool's Atari games, such as Pong-v5{hint}")


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


def has_compiler() -> bool:
    """Whether torch.compile can work here."""
    compiler = os.environ.get("CXX", "g++")
    return bool(shutil.which(compiler) or shutil.which("clang++"))


def space_checkpoints(args: Args) -> None:
    """Fill in --checkpoint-every: each actor plays 50 games of usual length in between.

    After a checkpoint all games begin anew, and those that are cut short are not reported.
    """
    usual_length = 2560  # steps
    safe = math.ceil(50 * usual_length / args.num_steps)
    first_rank = int(os.environ.get("RANK", 0)) == 0
    if 0 < args.checkpoint_every < min(safe, args.num_updates) and first_rank:
        what = f"--checkpoint-every below {safe} biases reported returns to short episodes"
        print(f"note: {what}", file=sys.stderr)
    args.checkpoint_every = args.checkpoint_every or safe


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
