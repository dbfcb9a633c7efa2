"""Proximal Policy Optimization (PPO) from pixels: the Nature CNN on EnvPool's Atari games.

Schulman, Wolski, Dhariwal, Radford, Klimov (2017), https://arxiv.org/abs/1707.06347, with the settings of Table 5: step
size and clip range both fall linearly to zero. Of what the table leaves open, four things are those of OpenAI
Baselines' ppo2: orthogonal weights, Adam's epsilon, advantages standardised within a minibatch, and gradients scaled
down to a norm of 0.5. Read ppo_cartpole.py first; equation and detail numbers mean
the same here. What is new: pixels, a game that is counted in two ways, and several processes.

Learning sees the protocol of Mnih et al. (2015): an action is held for 4 frames, 4 gray 84 x 84 images are stacked, a
game starts with up to 30 idle frames, rewards are cut to their sign, a lost life ends an episode. Besides, EnvPool
idles after a lost life as well, presses FIRE at every such start if the game has it, and truncates a game after 27,000
steps. What is reported is the whole game: raw points over all lives, except those that fall into idle frames. The
network has filters 32-64-64 and 512 units, as in Mnih et al. (2015); the paper cites the smaller one of Mnih et al.
(2016), but its code and everybody since took this.

    python ppo_atari.py --total-timesteps 3000000              # Pong; an hour or two on two cores
    python ppo_atari.py --env-id Breakout-v5 --device cuda --compile
    python ppo_atari.py --no-anneal-clip                       # a constant clip range, as most codes have it since 2019
    torchrun --nproc-per-node 2 ppo_atari.py --num-envs 16     # data-parallel, 8 environments in each process
    python ppo_atari.py --evaluate RUN_DIR --capture-video

Under torchrun the actors are split over the ranks, and the sum of the ranks' gradients is that of one process with the
same minibatches; which rows share a minibatch depends on the number of ranks. Rank 0 writes the run folder (which, on
several nodes, --resume must be able to read everywhere; it repeats the same bits only with as many ranks as before).
Nodes that are not alike need --precision, which each would else choose for itself. Every rank says what is wrong with
the flags; torchrun adds a report, ends all ranks as soon as one has failed, and ends with code 1.
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import envpool
import numpy as np
import torch
import torch.distributed as dist
import tyro
from envpool.registration import registry
from torch import Tensor, nn
from tqdm import tqdm

Batch = dict[str, Tensor]  # by name, all with the same leading dimensions


@dataclass
class Args:
    """PPO from pixels on Atari (Schulman et al. 2017, Table 5)."""

    # What is learned
    env_id: str = "Pong-v5"
    """one of EnvPool's Atari games: {Game}-v5"""
    objective: str = "clip:0.1"
    """clip:EPS (eq. 7), kl:BETA (eq. 8), adaptive:D_TARG (section 4), none (eq. 6), pg (eq. 2: 1 epoch, 1 minibatch)"""
    seed: int = 1
    """seed of every random stream: initial weights, actions, minibatch order, environments"""
    sticky_actions: float = 0.0
    """probability that the console holds on to the previous action for a frame (Machado et al. 2018: 0.25)"""
    full_action_space: bool = False
    """all 18 actions of the console instead of those that the game knows"""

    # How much data
    total_timesteps: int = 10_000_000
    """steps of 4 frames in all, reset steps included, rounded up to whole updates; 10M are the paper's 40M frames"""
    num_envs: int = 8
    """parallel actors (N), over all ranks"""
    num_steps: int = 128
    """steps of each actor per update, the horizon (T)"""

    # Advantages
    gamma: float = 0.99
    """discount factor (gamma, eq. 10)"""
    gae_lambda: float = 0.95
    """trace decay of GAE (lambda, eq. 11); 1 is eq. 10: all rewards to the end of the segment, then V"""
    norm_adv: Literal["batch", "minibatch", "none"] = "minibatch"
    """standardise advantages over the whole batch, within each minibatch, or not at all"""

    # Optimisation
    update_epochs: int = 3
    """passes over the batch per update (K)"""
    num_minibatches: int = 4
    """minibatches per pass; the paper's M is N * T / num_minibatches"""
    learning_rate: float = 2.5e-4
    """Adam step size"""
    anneal_lr: bool = True
    """decay the step size linearly to 0 over the run (factor alpha of Table 5)"""
    anneal_clip: bool = True
    """decay the clip range EPS linearly to 0 over the run (factor alpha of Table 5)"""
    vf_coef: float = 1.0
    """weight of the value loss (V - V_targ)^2 (c1, eq. 9); the loss has no factor 1/2"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (c2, eq. 9)"""
    value_clip: float | None = None
    """clip V to this distance from the old V and take the larger of both squared errors; None: plain squared error"""
    max_grad_norm: float = 0.5
    """scale the gradient down to at most this global norm; inf never does"""
    target_kl: float | None = None
    """end an update after the first epoch whose mean approx_kl exceeds this; None never does"""

    # The run
    device: str = "cpu"
    """cpu or cuda; under torchrun, cuda gives each process of a machine its own GPU"""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the convolutions and the layer after them (float32: TF32 in a GPU's convolutions); auto: bfloat16 if native"""
    compile: bool = False
    """torch.compile the loss, for a GPU; on a CPU it gains nothing, the convolutions being what takes the time"""
    threads: int = 0
    """CPU threads of an update, in each process; 0 shares out all cores: on a busy machine 1 is many times faster"""
    run_dir: str | None = None
    """folder of this run; None makes one under runs/"""
    checkpoint_every: int = 0
    """updates between checkpoints, which abandon unfinished games; 0: 50 games of 2,560 steps; raise it for longer"""
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
    """whole games to play, on seeds that training never used"""
    sample_actions: bool = False
    """evaluate with sampled actions instead of the most probable ones"""
    capture_video: bool = False
    """write an mp4 of every evaluation game's screen to RUN_DIR/videos"""

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
        """Settles precision. Raises UserError for the first flag that makes no sense. (NaN fails all comparisons.)"""
        parse_objective(self.objective)
        for name in ("total_timesteps", "num_envs", "num_steps", "update_epochs", "num_minibatches", "eval_episodes"):
            most = 10**12 if name == "total_timesteps" else 2**20  # stream() keeps the seeds of so many actors apart
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"--{name.replace('_', '-')} must be between 1 and {most}, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must be between 0 and {2**31 - 1}, not {self.seed}")
        for name in ("gamma", "gae_lambda", "sticky_actions"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("learning_rate", "value_clip", "target_kl"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        for name in ("vf_coef", "ent_coef", "checkpoint_every", "threads"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise UserError(f"--max-grad-norm must be positive (inf does not clip), not {self.max_grad_norm}")
        world = int(os.environ.get("WORLD_SIZE", 1))
        if self.num_envs % world:
            why = "there are more ranks than environments" if world > self.num_envs else "each rank needs as many"
            raise UserError(
                f"{self.num_envs} environments cannot be split over {world} ranks, {why}; change --num-envs"
            )
        if self.batch_size // world % self.num_minibatches:
            share = f" / {world} ranks" if world > 1 else ""
            raise UserError(
                f"a batch of {self.num_envs} x {self.num_steps}{share} = {self.batch_size // world} steps does not "
                f"divide into {self.num_minibatches} minibatches; change --num-envs, --num-steps or --num-minibatches"
            )
        if self.batch_size > 2**20:  # 30 GB of observations
            raise UserError(f"a batch of {self.batch_size} steps is too large; lower --num-envs or --num-steps")
        if self.batch_size < 4 * self.num_minibatches:
            raise UserError("a minibatch must hold at least 4 steps; raise --num-steps or lower --num-minibatches")
        if self.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise UserError("--compile needs a C++ compiler such as g++; leave the flag out")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device must be cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "--device cuda: this machine or this build of PyTorch has no CUDA; use another, or --device cpu"
            )
        if self.device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs are fewer than the ranks; start fewer")
        if self.capture_video and find_spec("moviepy") is None:
            raise UserError("--capture-video needs moviepy: pip install moviepy, or start without the flag")
        if self.precision == "auto":  # on a CPU without instructions for it, bfloat16 is slower than float32
            cuda, cpu = torch.cuda.is_bf16_supported, torch.cpu._is_avx512_bf16_supported
            native = cuda(including_emulation=False) if self.device == "cuda" else cpu()
            self.precision = "bfloat16" if native else "float32"


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
def start_actors(args: Args, seed: int, num_envs: int, **options) -> SimpleNamespace:
    """Actors at the start of new games, with consecutive seeds. Raises UserError for a game that EnvPool lacks."""
    games = [name for name, (source, *_) in registry.specs.items() if source == "envpool.atari"]
    if args.env_id not in games:
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(args.env_id, games, 1))
        raise UserError(f"{args.env_id!r} is none of EnvPool's Atari games, such as Pong-v5{near}")
    protocol = {"frame_skip": 4, "stack_num": 4, "gray_scale": True, "img_height": 84, "img_width": 84, "noop_max": 30}
    protocol |= {"episodic_life": True, "reward_clip": True, "use_fire_reset": True, "max_episode_steps": 27_000}
    protocol |= {"repeat_action_probability": args.sticky_actions, "full_action_space": args.full_action_space}
    pool = {"env_type": "gymnasium", "num_envs": num_envs, "seed": list(range(seed, seed + num_envs))}
    envs = envpool.make(args.env_id, **pool | protocol | options)
    (obs, info), (returns, lengths) = envs.reset(), np.zeros((2, num_envs))  # of the game so far, over all lives
    ended, lost = np.zeros((2, num_envs), bool)  # did the last step end a life or the game; did it end a life alone?
    state = {"obs": obs, "lives": info["lives"], "returns": returns, "lengths": lengths, "ended": ended, "lost": lost}
    return SimpleNamespace(envs=envs, **state)


def play(actors: SimpleNamespace, actions: np.ndarray) -> tuple:
    """One step. Returns rewards, terminated and truncated, as learning sees them, and over: whether the game ended.

    To learning, a lost life is the end. The step after an end ignores the action: after a lost life it idles up to 30
    frames in the same game, otherwise it starts the next. A game may end within these idle frames, and EnvPool starts
    the next without a word (RoadRunner, now and then); that there are more lives than before tells. Points that fall
    into the idle frames are nobody's.
    """
    actors.obs, rewards, terminated, truncated, info = actors.envs.step(actions)
    actors.returns, actors.lengths = actors.returns + info["reward"], actors.lengths + ~actors.ended
    unseen = actors.lost & (info["lives"] > actors.lives)
    terminated = terminated | (info["terminated"] > 0)  # EnvPool has a game over at the time limit truncated
    over = ((info["terminated"] > 0) | truncated | unseen) & (actors.lengths > 0)  # EnvPool may tell of an end twice
    actors.ended, actors.lives = terminated | truncated, info["lives"]
    actors.lost = actors.ended & ~over
    return rewards, terminated, truncated, over


# ----------------------------------------------------------------------------------------------------------- AGENT
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights, zero biases.  [detail 2]"""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Policy and value function on one trunk. Weights are float32; with `low`, the trunk computes in bfloat16."""

    def __init__(self, num_actions: int, low: bool):
        super().__init__()
        self.low = low
        first, second, third = nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3)
        convolutions = [part for layer in (first, second, third) for part in (layer_init(layer), nn.ReLU())]
        self.trunk = nn.Sequential(*convolutions, nn.Flatten(), layer_init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU())
        self.actor, self.critic = layer_init(nn.Linear(512, num_actions), 0.01), layer_init(nn.Linear(512, 1), 1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, 84, 84, 4] of bytes -> log-probabilities of all actions [B, A], values [B], in float32"""
        kind, dtype = obs.device.type, torch.bfloat16 if self.low else torch.float32
        with torch.autocast(kind, torch.bfloat16, enabled=self.low):
            pixels = obs.permute(0, 3, 1, 2).to(dtype).div_(255)  # [B, 4, 84, 84], in memory as before: channels_last
            hidden = self.trunk(pixels)
        with torch.autocast(kind, enabled=False):  # 8 bits are too few for log-probabilities and values
            hidden = hidden.float()
            return self.actor(hidden).log_softmax(-1), self.critic(hidden).squeeze(-1)


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


def total(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place; x as it is where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients, in one flat message."""
    if dist.is_initialized():
        flat = total(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def average(x: Tensor, valid: Tensor) -> Tensor:
    """x [..., B] -> [..., 1], its mean over the transitions of all ranks: autoreset rows, valid = 0, do not count."""
    return total((x * valid).sum(-1, keepdim=True)) / total(valid.sum(-1, keepdim=True)).clamp(min=1)


def standardise(x: Tensor, valid: Tensor) -> Tensor:
    """x [..., B] with mean 0 and standard deviation 1 over the transitions of all ranks."""
    x = x - average(x, valid)
    return x / (average(x.square(), valid).sqrt() + 1e-8)


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor) -> float:
    """1 - var[returns - values] / var[returns] over the transitions of all ranks; 0 where all returns are the same."""
    left, whole = (average((x - average(x, valid)).square(), valid).item() for x in (returns - values, returns))
    return 1 - left / whole if whole > 0 else 0.0


def categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    """Exact KL[old, new] of log-probabilities [..., A] -> [...]"""
    return (old.exp() * (old - new)).sum(-1)


def ppo_loss(log_probs: Tensor, values: Tensor, batch: Batch, objective: Objective, beta, args: Args) -> tuple:
    """The negative of eq. 9, to be minimised, and a dict of metrics.  [detail 12]

    log_probs [B, A] and values [B] come from the weights being optimised. batch holds what the rollout recorded:
    actions [B], log_probs [B, A], values [B], advantages [B], returns [B] (V_targ); and weights [B], 0 in autoreset
    rows, which sum to 1 over the minibatch, over all ranks of it: the sum of the ranks' losses is the minibatch's.
    """
    actions, advantages, weights = batch["actions"].unsqueeze(-1), batch["advantages"], batch["weights"]
    log_prob = log_probs.gather(-1, actions).squeeze(-1)
    log_ratio = log_prob - batch["log_probs"].gather(-1, actions).squeeze(-1)
    ratio = log_ratio.exp()  # r of eqs. 6-8
    kl, entropy = categorical_kl(batch["log_probs"], log_probs), -(log_probs.exp() * log_probs).sum(-1)

    if objective.log_prob:
        surrogate = log_prob * advantages  # eq. 2
    else:
        clipped = ratio.clamp(1 - objective.epsilon, 1 + objective.epsilon)
        surrogate = torch.min(ratio * advantages, clipped * advantages)  # eq. 7, and eq. 6 at epsilon = inf  [detail 8]
    if objective.beta > 0:
        surrogate = surrogate - beta * kl  # eq. 8

    value_loss = (values - batch["returns"]).square()
    if args.value_clip is not None:  # the larger of two squared errors  [detail 9]
        near = batch["values"] + (values - batch["values"]).clamp(-args.value_clip, args.value_clip)
        value_loss = torch.max(value_loss, (near - batch["returns"]).square())

    each = {"policy_loss": -surrogate, "value_loss": value_loss, "entropy": entropy, "kl": kl}
    # KL[old, new] estimated from the actions taken: k3 and k1 of joschu.net/blog/kl-approx.html
    each |= {"approx_kl": ratio - 1 - log_ratio, "old_approx_kl": -log_ratio}
    each["clipfrac"] = ((ratio - 1).abs() > objective.epsilon).float()
    metrics = {name: (x * weights).sum() for name, x in each.items()}
    policy_loss, value_loss, entropy, *_ = metrics.values()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # eq. 9  [detail 10]
    return loss, {name: value.detach() for name, value in metrics.items()}


def minibatch_loss(agent: Agent, minibatch: Batch, objective: Objective, beta: Tensor, args: Args) -> tuple:
    """What --compile compiles: ppo_loss of the agent on a minibatch."""
    return ppo_loss(*agent(minibatch["obs"]), minibatch, objective, beta, args)


@torch.no_grad()
def collect(agent: Agent, actors: SimpleNamespace, noise: Tensor, seconds: dict) -> tuple:
    """N actors take T steps each, with Gumbel noise [T, N, A]; the time they take is added to `seconds`. Returns
    (rollout, episodes). rollout: obs [T+1, N, 84, 84, 4] of bytes, values [T+1, N], log_probs [T, N, A]; actions,
    rewards, terminated, truncated and valid, [T, N] each; valid is False in reset steps. episodes: (t, i, return,
    length) of every whole game: of actor i, over at step t."""
    device, shape = noise.device, noise.shape[:2]
    frames = torch.empty(shape[1], 84, 84, 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    obs = torch.empty(shape[0] + 1, *frames.shape, dtype=torch.uint8, device=device)
    values, log_probs = torch.empty(shape[0] + 1, shape[1], device=device), torch.empty_like(noise)
    actions, episodes = torch.empty(shape, dtype=torch.int64, device=device), []
    rewards, (terminated, truncated, valid) = np.empty(shape, np.float32), np.empty((3, *shape), bool)
    with torch.autocast(device.type, torch.bfloat16, enabled=agent.low):  # one context, so weights are cast once
        for t in range(shape[0] + 1):
            start = time.perf_counter()
            frames.copy_(torch.from_numpy(actors.obs).permute(0, 2, 3, 1))
            obs[t].copy_(frames, non_blocking=True)
            log_prob, values[t] = agent(obs[t])  # with one trunk, all that is wanted later costs nothing now
            if t == shape[0]:
                break
            log_probs[t], actions[t] = log_prob, (log_prob + noise[t]).argmax(-1)  # a sample of the policy
            chosen, valid[t], between = actions[t].cpu().numpy(), ~actors.ended, time.perf_counter()
            rewards[t], terminated[t], truncated[t], over = play(actors, chosen)
            seconds["policy"] += between - start
            seconds["environment"] += time.perf_counter() - between
            for i in over.nonzero()[0]:
                episodes.append((t, int(i), float(actors.returns[i]), int(actors.lengths[i])))
                actors.returns[i] = actors.lengths[i] = 0
    rollout = {"rewards": rewards, "terminated": terminated, "truncated": truncated, "valid": valid}
    rollout = {name: torch.from_numpy(x) for name, x in rollout.items()}
    return rollout | {"obs": obs, "values": values, "log_probs": log_probs, "actions": actions}, episodes


def update(agent, optimizer, batch: Batch, orders: Tensor, objective, beta, args, loss_fn=minibatch_loss) -> dict:
    """K epochs of minibatch steps on this rank's B rows: obs, valid and what ppo_loss takes but weights. orders [K, P,
    M]: the M rows of each of P minibatches; the p-th ones of all ranks make one gradient step. Returns the means of the
    metrics over all steps, and the exact KL after the last: on a minibatch's rows, on all if the objective adapts."""
    parameters, history, ranks = list(agent.parameters()), [], total(torch.ones((), device=orders.device))
    # tensors, as torch.compile would take every new float for another program
    beta, epsilon = (torch.tensor(x, device=orders.device) for x in (beta, objective.epsilon))
    objective, valid, advantages = objective._replace(epsilon=epsilon), batch["valid"], batch["advantages"]
    if args.norm_adv == "batch":
        advantages = standardise(advantages, valid)
    valid, advantages = valid[orders], advantages[orders]
    if args.norm_adv == "minibatch":  # [detail 7]
        advantages = standardise(advantages, valid)
    weights = valid / total(valid.sum(-1, keepdim=True)).clamp(min=1)
    for epoch, minibatches in enumerate(orders):
        for i, rows in enumerate(minibatches):  # every row once per epoch  [detail 6]
            minibatch = {name: x.index_select(0, rows) for name, x in batch.items()}  # 8 times as fast as x[rows]
            minibatch |= {"advantages": advantages[epoch, i], "weights": weights[epoch, i]}
            loss, metrics = loss_fn(agent, minibatch, objective, beta, args)
            optimizer.zero_grad()
            loss.backward()
            sum_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # [detail 11]
            optimizer.step()
            history.append(metrics | {"grad_norm": norm / ranks})  # the same on all ranks, and total() will add it up
        epoch_kls = [metrics["approx_kl"] for metrics in history[-len(minibatches) :]]
        if args.target_kl is not None and total(torch.stack(epoch_kls).mean()) > args.target_kl:
            break
    metrics = {name: torch.stack([step[name] for step in history]).mean() for name in history[0]}
    looked = orders[0] if objective.kl_target is not None else orders[0, :1]
    with torch.no_grad():
        kls = torch.stack([categorical_kl(batch["log_probs"][rows], agent(batch["obs"][rows])[0]) for rows in looked])
    metrics["kl_after_update"] = (kls * weights[0, : len(kls)]).sum(-1).mean()
    return dict(zip(metrics, total(torch.stack(list(metrics.values()))).tolist(), strict=True))


# -------------------------------------------------------------------------------------------------------- TRAINING
def annealed(args: Args, objective: Objective, update: int) -> tuple[float, Objective]:
    """Step size and objective of an update: alpha of Table 5 falls linearly from 1 to 0 over the run.  [detail 4]"""
    alpha = 1 - update / args.num_updates
    lr, epsilon = args.learning_rate * (alpha if args.anneal_lr else 1), objective.epsilon
    return lr, objective._replace(epsilon=epsilon * alpha if args.anneal_clip else epsilon)


def join(device: str) -> tuple[int, int]:
    """Rank and number of processes. Under torchrun, enters their group, and on CUDA takes the GPU of this process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return rank, world


def gathered(rows: list) -> list:
    """The rows of all ranks, in order."""
    parts = [rows] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(parts, rows)
    return sorted(row for part in parts for row in part)


def train(args: Args) -> tuple[Agent, list[dict]]:
    """Algorithm 1, then the evaluation. Returns the agent and the rows of summary.json, which only rank 0 has. Raises
    UserError for bad input and NonFiniteError where a number becomes NaN or infinite."""
    args, saved = load_run(Args, args.resume) if args.resume is not None else (replace(args), None)
    args.check()
    rank, world = join(args.device)
    threads = args.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(1)  # but in updates: bits depend on it, and EnvPool needs the other cores
    loss_fn = torch.compile(minibatch_loss, dynamic=False) if args.compile else minibatch_loss
    objective, own = parse_objective(args.objective), args.num_envs // world
    state = {"update": 0, "global_step": 0, "beta": objective.beta, "transitions": [0], "diverged_at": [None]}
    state = saved["state"] if saved else state  # its lists have one entry per agent, and here there is one
    first = rank * own  # of this rank's actors: whatever belongs to an actor is keyed by its place among all of them
    actors = start_actors(args, stream(args.seed, "environments", state["update"]) + first, own)
    torch.manual_seed(stream(args.seed, "weights"))
    dims = int(actors.envs.action_space.n), args.precision == "bfloat16"
    agent = Agent(*dims).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [detail 3]
    rng = {name: torch.Generator().manual_seed(stream(args.seed, name)) for name in ("actions", "minibatches")}
    restore(saved, agent=agent, optimizer=optimizer, **rng)
    run = (Run if rank == 0 else Silence)(args, {"env_id": args.env_id}, math.ceil(50 * 2560 / args.num_steps), saved)
    while state["update"] < args.num_updates:
        # ROLLOUT
        # argmax(logits + Gumbel noise) is a sample of softmax(logits); every rank draws the noise of all actors
        noise = -torch.empty(args.num_steps, args.num_envs, dims[0]).exponential_(generator=rng["actions"]).log()
        noise = noise[:, first : first + own].to(args.device)
        rollout, episodes = collect(agent, actors, noise, run.seconds)
        check_finite({name: rollout[name] for name in ("rewards", "log_probs", "values")}, state["update"] + 1)

        # ADVANTAGES
        torch.set_num_threads(threads)
        values = rollout["values"].cpu()
        recorded = rollout["rewards"], values, rollout["terminated"], rollout["truncated"]
        batch = {"values": values[:-1], "advantages": gae(*recorded, args.gamma, args.gae_lambda)}
        batch["returns"] = batch["advantages"] + batch["values"]  # V_targ, the TD(lambda) return
        batch |= {"valid": rollout["valid"].float(), "obs": rollout["obs"][:-1]}
        batch |= {"actions": rollout["actions"], "log_probs": rollout["log_probs"]}
        batch = {name: x.flatten(0, 1).to(args.device) for name, x in batch.items()}  # [T, N, ...] -> [B, ...]

        # UPDATE
        lr, now = annealed(args, objective, state["update"])
        optimizer.param_groups[0]["lr"] = lr
        # a permutation for each epoch and rank, of which all draw all: the minibatches of a rank never change in size
        orders = [torch.randperm(own * args.num_steps, generator=rng["minibatches"])
                  for _ in range(args.update_epochs * world)][rank::world]  # fmt: skip
        orders = torch.stack(orders).unflatten(1, (args.num_minibatches, -1)).to(args.device)
        with run.timed("update"):
            metrics = update(agent, optimizer, batch, orders, now, state["beta"], args, loss_fn)
        torch.set_num_threads(1)
        check_finite(metrics | {"weights": nn.utils.parameters_to_vector(agent.parameters())}, state["update"] + 1)

        # LOG
        episodes = [(t * args.num_envs + first + i, *scored) for t, i, *scored in episodes]
        run.record(state["global_step"], gathered(episodes))
        state["update"] += 1
        state["global_step"] += args.batch_size
        state["transitions"][0] += int(total(batch["valid"].sum()))
        charts = {"charts/learning_rate": lr, "charts/beta": state["beta"]}
        charts["charts/epsilon"] = now.epsilon if now.epsilon < math.inf else None
        metrics["explained_variance"] = explained_variance(batch["values"], batch["returns"], batch["valid"])
        run.log(state, [charts], [metrics])
        state["beta"] = objective.adapt(state["beta"], metrics["kl_after_update"])
        if state["update"] % args.checkpoint_every == 0 or state["update"] == args.num_updates:
            run.save(state, dims=dims, agent=agent, optimizer=optimizer, **rng)
            actors.envs.close()  # environments cannot be saved: every run, resumed or not, starts new games here
            actors = start_actors(args, stream(args.seed, "environments", state["update"]) + first, own)
    actors.envs.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return agent, run.finish(state, evaluate(agent, args, run.path)) if rank == 0 else []


@torch.no_grad()
def evaluate(agent: Agent, args: Args, run_path: Path) -> list[list[float]]:
    """Plays E = args.eval_episodes whole games side by side, on seeds that training never used, and gives their
    returns, in the game's own points, as [1, E]. Greedy actions, or sampled ones with args.sample_actions."""
    seed, games = 2**30 + stream(args.seed, "evaluation"), args.eval_episodes
    rng, returns, running = torch.Generator().manual_seed(seed), np.zeros(games), np.ones(games, bool)
    actors = start_actors(args, seed, games, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    videos = [video(run_path / "videos" / f"game-{i}.mp4") for i in range(games if args.capture_video else 0)]
    while running.any():
        for i in running.nonzero()[0] if videos else ():
            videos[i].write_frame(*actors.envs.render(env_ids=[i]))
        seen = torch.from_numpy(actors.obs[running]).permute(0, 2, 3, 1).contiguous().to(args.device)
        logits = torch.zeros(games, int(actors.envs.action_space.n))
        logits[running] = agent(seen)[0].cpu()
        if args.sample_actions:
            logits -= torch.empty_like(logits).exponential_(generator=rng).log()
        *_, over = play(actors, logits.argmax(-1).numpy())
        returns, running = np.where(running & over, actors.returns, returns), running & ~over
    for writer in videos:
        writer.close()
    return [returns.tolist()]


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
class Silence(Run):
    """Run on every rank but 0: takes everything and writes nothing."""

    def __init__(self, args: Args, task: dict, safest: int, saved: dict | None):
        args.checkpoint_every = args.checkpoint_every or safest
        self.seconds = dict.fromkeys(CLOCKS, 0.0)

    def record(self, *_) -> None:
        pass

    def log(self, *_) -> None:
        pass

    def save(self, *_, **__) -> None:
        pass


def video(path: Path):
    """An mp4 at the speed of the game, 15 steps of 4 frames a second: write_frame(screen) appends, close() ends it."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # half a second of start-up for --capture-video alone

    path.parent.mkdir(exist_ok=True)
    return FFMPEG_VideoWriter(str(path), size=(160, 210), fps=15, pixel_format="rgb24")


def cores() -> int:
    """CPU cores that this process may use: those of the machine, or fewer under taskset or a job scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_agent(run_dir: str) -> tuple["Agent", Args]:
    """The trained agent of a run folder, on the CPU, and its flags. Raises UserError where there is no checkpoint, and
    in all processes of torchrun but the first."""
    if int(os.environ.get("RANK", 0)) > 0:
        raise UserError("an agent is evaluated by one process: start it without torchrun")
    torch.set_num_threads(1)  # as in train()
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
