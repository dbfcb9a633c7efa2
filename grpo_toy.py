"""Group Relative Policy Optimization (GRPO) from nothing to a solved task, in a minute or two on a laptop's CPU.

Shao et al. (2024), "DeepSeekMath", https://arxiv.org/abs/2402.03300, made known by DeepSeek-R1 (2025),
https://arxiv.org/abs/2501.12948. A policy that writes text is asked a question q, writes a group of G answers o_1 ...
o_G, and a program verifies each of them. What the group got on average is the baseline, so there is no critic:

    advantage    A_i = (R_i - mean(R_1 ... R_G)) / std(R_1 ... R_G), R_i the reward of o_i
    objective    1/G sum_i 1/|o_i| sum_t { min[ r_it A_i, clip(r_it, 1-eps, 1+eps) A_i ] - beta KL[pi, pi_ref] } (eq. 3)
    ratio        r_it = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t), pi_old: which wrote the answers
    KL           pi_ref/pi - log pi_ref/pi - 1, at every token; pi_ref: the policy before RL                    (eq. 4)

Everything is here: tasks with held-out questions and a verifier, a transformer of about 100,000 parameters, sampling
with a key-value cache, the loss, the loop. No pretrained weights, no downloads. Equations are those of DeepSeekMath.

    python grpo_toy.py                     # sort digits: from chance to over 95% of unseen questions
    python grpo_toy.py --task countdown    # reach a target with three numbers: a short warm-up, then five minutes of RL
    python grpo_toy.py --evaluate RUN_DIR

The default is DeepSeekMath's eq. 3 with mu = 2 gradient steps per batch: the form that the name stands for, and with
the second step the ratio leaves 1, so that clipping is not idle. The KL penalty is a little stronger than the paper's
(beta = 0.07 instead of 0.04), which keeps the answers of so small a model diverse. The published relatives are flags:

    R1 (2025), as printed, the ratio of a whole answer      --ratio sequence
    Dr. GRPO (Liu et al. 2025), no 1/|o|, no std            --loss-agg dr_grpo --scale-rewards none --kl-coef 0
    DAPO (Yu et al. 2025), clip-higher, mean over tokens    --loss-agg dapo --clip-high 0.28 --kl-coef 0
    GSPO (Zheng et al. 2025), geometric mean of the ratios  --ratio sequence-mean --clip-low 3e-4 --clip-high 4e-4
                                                            --kl-coef 0
    RLOO (Ahmadian et al. 2024), the others as baseline     --baseline leave-one-out --scale-rewards none
                                                            --ratio sequence --num-iterations 1 --kl-coef 0

Left out are DAPO's dynamic sampling and overlong penalty, RLOO's KL as a part of the reward, and R1's KL of whole
answers: it is one per token here. DAPO's mean is over the tokens of the batch here, in its paper over a group's.
Names of metrics are TRL's where TRL has one. A "step" of this script is one sampled answer. The run folder under runs/
holds config.json, metrics.csv, episodes.csv (a row per answer, group after group: its reward, its length in tokens),
checkpoint.pt and summary.json.
"""

import contextlib
import csv
import datetime
import gc
import hashlib
import io
import json
import math
import operator
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

Batch = dict[str, Tensor]


@dataclass
class Args:
    """GRPO (Shao et al. 2024) and its variants on a task with a verifier."""

    # What is learned
    task: str = "sort"
    """sort (digits) or countdown (an expression of three numbers that equals a target)"""
    seed: int = 1
    """seed of every random stream: initial weights, warm-up, questions, answers; the questions themselves are fixed"""

    # How much data
    total_timesteps: int | None = None
    """answers sampled in all, rounded up to whole updates; None takes the task's own number"""
    num_prompts: int = 64
    """questions per update (P)"""
    group_size: int = 8
    """answers to each question (G)"""
    temperature: float = 1.0
    """divides the logits when answers are sampled and, alike, wherever they are scored"""
    warmup_steps: int | None = None
    """supervised steps before, on answers of the right form, right only by chance; None takes the task's own number"""

    # Advantages
    baseline: Literal["group", "batch", "leave-one-out", "none"] = "group"
    """subtract the mean reward of the group, of the batch, of the other answers in the group, or nothing"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide by the standard deviation of the rewards in the group, in the batch, or not at all (Dr. GRPO)"""

    # The objective
    ratio: Literal["token", "sequence", "sequence-mean"] = "token"
    """of each token (eq. 3); sequence: of the answer, their product (R1); sequence-mean: their geometric mean (GSPO)"""
    loss_agg: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """grpo: mean of each answer, of answers (eq. 3); dr_grpo: sum / (answers * longest possible); dapo: all tokens"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 minus this (epsilon)"""
    clip_high: float = 0.2
    """and above 1 plus this; larger than --clip-low is DAPO's clip-higher"""
    kl_coef: float = 0.07
    """weight of KL[policy, reference] (beta); 0 only measures it"""
    kl_estimator: Literal["k2", "k3", "k3-corrected", "exact"] = "k3"
    """how the penalty is estimated at each token: see kl_terms(); k3 is eq. 4; exact: summed over all words"""
    ref_sync: int = 0
    """updates after which the reference becomes a copy of the policy; 0 keeps the one that training starts from"""

    # Optimisation
    num_iterations: int = 2
    """gradient steps on each batch of answers (mu)"""
    learning_rate: float = 1e-3
    """AdamW step size"""
    weight_decay: float = 0.5
    """AdamW's weight decay: without it, questions are learned by heart and the held-out ones lag behind"""
    anneal_lr: bool = True
    """decay the step size linearly to 0 over the run"""
    max_grad_norm: float = 1.0
    """scale the gradient down to at most this global norm; inf never does"""

    # The run
    threads: int = 1
    """threads of PyTorch: a second one gains a third at best; results depend on it in their last bits"""
    run_dir: str | None = None
    """folder of this run; None makes one under runs/"""
    checkpoint_every: int = 50
    """updates between checkpoints"""
    resume: str | None = None
    """continue the run in this folder; no other flag may be given, all come from its config.json"""
    track: bool = False
    """mirror the run to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project: str = "grpo"
    """project for --track"""

    # Evaluation: at the end of every run, or of a finished one with --evaluate
    evaluate: str | None = None
    """evaluate the run in this folder instead of training; only the two flags below may go with it"""
    eval_prompts: int = 500
    """held-out questions, repeats included, at most as many as the task has"""
    pass_k: int = 16
    """answers sampled to each for pass@k: the share of questions with at least one right answer"""

    @property
    def batch_size(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    @property
    def agents(self) -> list[dict]:
        """What names each agent of the run; here there is one."""
        objective = "/".join((self.ratio, self.loss_agg, self.baseline, self.scale_rewards))
        return [{"seed": self.seed, "objective": objective}]

    def check(self) -> None:
        """Raises UserError for the first flag that makes no sense. (A comparison with NaN is False, so NaN fails.)"""
        counts = {"total_timesteps": (1, 10**12), "num_prompts": (1, 2**16), "group_size": (2, 2**16)}
        counts |= {"warmup_steps": (0, 10**9), "num_iterations": (1, 2**16), "ref_sync": (0, 10**9)}
        counts |= {"threads": (1, 2**10), "checkpoint_every": (1, 10**9), "seed": (0, 2**31 - 1)}
        for name, (least, most) in (counts | {"eval_prompts": (1, 10**9), "pass_k": (1, 2**11)}).items():
            if getattr(self, name) is not None and not least <= getattr(self, name) <= most:
                what = f"must be between {least} and {most}, not {getattr(self, name)}"
                raise UserError(f"--{name.replace('_', '-')} {what}")
        if not 0 < self.clip_low < 1:
            raise UserError(f"--clip-low must be between 0 and 1, not {self.clip_low}")
        if not 1e-3 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be a number from 0.001 on, not {self.temperature}")
        for name in ("learning_rate", "clip_high"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        for name in ("kl_coef", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be a number from 0 on, not {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise UserError(f"--max-grad-norm must be positive (inf does not clip), not {self.max_grad_norm}")
        if self.batch_size > 10**6:
            raise UserError(f"a batch of {self.batch_size} answers is too large; lower --num-prompts or --group-size")
        if self.ratio != "token" and self.loss_agg != "grpo":
            raise UserError(f"--ratio {self.ratio} has one term per answer and takes their mean; leave --loss-agg out")


# ----------------------------------------------------------------------------------------------------------- TASKS
END, BLANK = "<end>", "_"


class Task(NamedTuple):
    """What is asked, and what is a right answer. To train on a task of your own, hand one to train()."""

    name: str
    vocab: list[str]  # all words of questions and answers; the first one ends an answer
    prompts: list[list[str]]  # the questions to learn from, all of one length
    held_out: list[list[str]]  # those to be tested on, in random order; short ones recur, as in training
    max_length: int  # of an answer, its end included; a longer one is cut off
    # question, answer with its end, unless it was cut off -> reward; the answer is right if that is 1
    verify: Callable[[list[str], list[str]], float]
    total_timesteps: int  # default of --total-timesteps
    warmup_steps: int = 0  # default of --warmup-steps
    # for the warm-up: question -> an answer of the right form, without its end
    demonstrate: Callable[[list[str], random.Random], list[str]] | None = None

    def encode(self, sentences: list[list[str]]) -> Tensor:
        """Sentences of one length as token ids [B, L]."""
        ids = {word: i for i, word in enumerate(self.vocab)}
        return torch.tensor([[ids[word] for word in sentence] for sentence in sentences])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """The words of each answer, tokens [N, T], where mask [N, T] is True."""
        pairs = zip(tokens.tolist(), mask.sum(1).tolist(), strict=True)
        return [[self.vocab[token] for token in row[:length]] for row, length in pairs]


def split(prompts: list[list[str]], key: Callable) -> tuple[list, list]:
    """(questions to learn from, held-out ones): a tenth of all keys, and with them every question that has one."""
    held = [stream(0, str(key(prompt))) % 10 == 0 for prompt in prompts]  # stream(): a hash
    return tuple([prompt for prompt, h in zip(prompts, held, strict=True) if h == out] for out in (False, True))


def verify_sorted(prompt: list[str], answer: list[str]) -> float:
    """The share of places, the end among them, that hold the right word: 1 for the sorted digits and nothing else."""
    wanted = [*sorted(word for word in prompt if word != BLANK), END]
    return sum(a == w for a, w in zip(answer, wanted, strict=False)) / len(wanted)


def sort_task() -> Task:
    """From "3 1 3 _ _" to "1 3 3 <end>": two to five digits. No digits that are asked for in a held-out question, in
    whatever order, are ever asked for in training."""
    rng, longest = random.Random(0), 5
    prompts = [rng.choices("0123456789", k=rng.randint(2, longest)) for _ in range(20_000)]
    prompts, held_out = split([prompt + [BLANK] * (longest - len(prompt)) for prompt in prompts], key=sorted)
    return Task("sort", [END, BLANK, *"0123456789"], prompts, held_out, longest + 2, verify_sorted, 200_000)


# ----------------------------------------------------------------------------------------------------------- AGENT
Cache = list[tuple[Tensor, Tensor]]  # of each block, keys and values of the tokens read so far, [B, heads, T, width]


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a two-layer network, each added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor) -> tuple:
        """x [B, T, width], past: keys and values of S earlier tokens, mask [T, S+T] -> x, and all keys and values"""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, width / heads]
        query, key, val = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, val = torch.cat([past[0], key], 2), torch.cat([past[1], val], 2)
        read = F.scaled_dot_product_attention(query, key, val, attn_mask=mask)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x)))), (key, val)


class Agent(nn.Module):
    """The policy: a causal transformer, without dropout, that reads words and says what comes next."""

    def __init__(self, words: int, length: int, width: int = 64, blocks: int = 2, heads: int = 2):
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, words)
        for module in self.modules():  # every layer passes on the variance that it gets
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        nn.init.normal_(self.logits.weight, std=0.02)  # a nearly uniform first policy

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """tokens [B, T] that follow the S in the cache -> logits of what follows each [B, T, V], and the new cache"""
        start, count = cache[0][0].shape[2] if cache else 0, tokens.shape[1]
        mask = torch.ones(count, start + count, dtype=torch.bool).tril(start)  # read what is earlier, and yourself
        x, new = self.word(tokens) + self.place.weight[start : start + count], []
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, pair = block(x, past, mask)
            new.append(pair)
        return self.logits(self.norm(x)), new


def read_prompts(agent: Agent, prompts: Tensor, answers: int) -> tuple[Tensor, Cache]:
    """Reads every question [P, L] once, for all of its answers: logits of their first token [N, 1, V] and the cache,
    N = P * answers, the answers to a question side by side."""
    logits, cache = agent(prompts)
    repeated = [tuple(x.repeat_interleave(answers, 0) for x in pair) for pair in cache]
    return logits[:, -1:].repeat_interleave(answers, 0), repeated


@torch.no_grad()
def sample(agent: Agent, prompts: Tensor, answers: int, max_length: int, temperature: float, rng=None) -> Batch:
    """Writes `answers` answers to each question [P, L], sampled with `rng`, greedy without one. Of the N = P * answers:
    tokens [N, T], log_probs of all words at each place [N, T, V], mask [N, T], True up to the end token, inclusive."""
    logits, cache = read_prompts(agent, prompts, answers)
    going, steps = torch.ones(len(logits), dtype=torch.bool), []
    while going.any() and len(steps) < max_length:
        if steps:
            logits, cache = agent(steps[-1][0].unsqueeze(1), cache)
        log_probs = (logits.squeeze(1) / temperature).log_softmax(-1)  # the whole distribution, no top-k or top-p
        drawn = torch.multinomial(log_probs.exp(), 1, generator=rng) if rng else log_probs.argmax(-1, keepdim=True)
        steps.append((drawn.squeeze(1) * going, log_probs, going))  # after the end: 0, as the end itself
        going = going & (steps[-1][0] != 0)
    tokens, log_probs, mask = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return {"tokens": tokens, "log_probs": log_probs, "mask": mask}


def score(agent: Agent, prompts: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of all words at each place of the answers, tokens [N, T] -> [N, T, V], as sample() has them."""
    first, cache = read_prompts(agent, prompts, len(tokens) // len(prompts))
    logits = torch.cat([first, agent(tokens[:, :-1], cache)[0]], 1)
    return (logits / temperature).log_softmax(-1)


# --------------------------------------------------------------------------------------------------- THE ALGORITHM
def group_advantages(rewards: Tensor, baseline: str, scale: str) -> Tensor:
    """rewards [P, G] -> advantages [P, G], with the mean and standard deviation that `baseline` and `scale` name.

    Equal rewards, found by max == min because their mean may be off by a rounding error, have no advantage over it,
    exactly, and no spread to be divided by: with its own baseline, a group all right or all wrong teaches nothing."""

    def pool(name: str) -> tuple[Tensor, Tensor]:
        x = rewards.view(1, -1) if name == "batch" else rewards
        return x, x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)

    advantages, size = rewards, rewards.shape[1]
    if baseline != "none":
        x, equal = pool(baseline)
        advantages = (x - x.mean(-1, keepdim=True)).masked_fill(equal, 0.0).view_as(rewards)
    if baseline == "leave-one-out":  # r_i - mean of the others = G / (G-1) (r_i - mean of all)
        advantages = advantages * size / (size - 1)
    if scale != "none":
        x, equal = pool(scale)
        advantages = advantages / torch.where(equal, 1.0, x.std(-1, keepdim=True) + 1e-4)  # 1e-4 as in TRL
    return advantages


def categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    """Exact KL[old, new] of log-probabilities [..., V] -> [...]"""
    return (old.exp() * (old - new)).sum(-1)


def kl_terms(new: Tensor, old: Tensor, reference: Tensor) -> Batch:
    """Estimators of KL[policy, reference] from a token's log-probability under the policy, under the policy it was
    sampled from and under the reference, all [...] (Schulman, http://joschu.net/blog/kl-approx.html). What they do as
    a loss is another matter than what they measure. With x = log pi/pi_ref, and averaged over tokens of the policy:
                  value               gradient
    k1            x                   0, so it is never a loss here
    k2            x^2 / 2             that of KL[policy, reference]
    k3            e^-x + x - 1        that of the forward KL[reference, policy]; a measurement without bias (eq. 4)
    k3-corrected  pi/pi_old * k3      that of KL[policy, reference], also when the policy moved on (DeepSeek-V3.2);
                                      pi/pi_old is the token's with every --ratio (TRL's is as --ratio says)"""
    log_ratio = reference - new
    k3 = log_ratio.exp() - log_ratio - 1
    return {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": k3, "k3-corrected": (new - old).exp() * k3}


def grpo_loss(log_probs: Tensor, batch: Batch, max_length: int, args: Args) -> tuple[Tensor, dict]:
    """The negative of eq. 3 or of a variant, to be minimised, and a dict of metrics.

    log_probs [N, T, V] come from the weights being optimised. batch holds tokens and mask [N, T], advantages [N], and
    log_probs and ref_log_probs [N, T, V] of the sampling policy and of the reference.
    """
    tokens, mask, advantages = batch["tokens"].unsqueeze(-1), batch["mask"], batch["advantages"].unsqueeze(-1)
    distributions = log_probs, batch["log_probs"], batch["ref_log_probs"]
    # after the end 0, whatever is there: an overflow times mask would be NaN
    new, old, reference = (x.gather(-1, tokens).squeeze(-1).masked_fill(~mask, 0.0) for x in distributions)  # [N, T]
    lengths = mask.sum(-1, keepdim=True)

    log_ratio = new - old
    if args.ratio != "token":
        log_ratio = log_ratio.sum(-1, keepdim=True)  # of the whole answer [N, 1]: pi(o | q) / pi_old(o | q)
        if args.ratio == "sequence-mean":
            log_ratio = log_ratio / lengths
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # eq. 3 as in PPO

    kl = kl_terms(new, old, reference) | {"exact": categorical_kl(log_probs, batch["ref_log_probs"])}
    terms = (surrogate - args.kl_coef * kl[args.kl_estimator]) * mask  # [N, T]
    if args.loss_agg == "grpo":
        objective = (terms.sum(-1, keepdim=True) / lengths).mean()
    elif args.loss_agg == "dr_grpo":
        objective = terms.sum() / (len(terms) * max_length)
    else:
        objective = terms.sum() / lengths.sum()

    def average(x: Tensor) -> Tensor:  # over tokens, or over answers for what there is one of per answer
        return (x * mask).sum() / lengths.sum() if x.shape[1] == mask.shape[1] else x.float().mean()

    low, high = (ratio < 1 - args.clip_low) & (advantages < 0), (ratio > 1 + args.clip_high) & (advantages > 0)
    metrics = {"kl": kl[args.kl_estimator], "kl_exact": kl["exact"], "kl_k1": kl["k1"]}
    metrics["entropy"] = -(log_probs.exp() * log_probs).sum(-1)
    metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    metrics = {name: average(x).detach() for name, x in metrics.items()}
    return -objective, {"policy_loss": -objective.detach()} | metrics


def update(agent: Agent, optimizer, batch: Batch, max_length: int, args: Args) -> dict:
    """mu gradient steps on one batch: what grpo_loss takes, and prompts [P, L]. Returns the means of the metrics over
    the steps, and the exact KL of the sampling policy to the updated one, a mean over the tokens of 8 questions."""
    history, parameters = [], list(agent.parameters())
    for _ in range(args.num_iterations):
        log_probs = score(agent, batch["prompts"], batch["tokens"], args.temperature)
        loss, metrics = grpo_loss(log_probs, batch, max_length, args)
        optimizer.zero_grad()
        loss.backward()
        history.append(metrics | {"grad_norm": nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)})
        optimizer.step()
    means = {name: torch.stack([metrics[name] for metrics in history]).mean().item() for name in history[0]}
    few = 8 * (len(batch["tokens"]) // len(batch["prompts"]))  # answers; all would cost a tenth of the run
    with torch.no_grad():
        log_probs = score(agent, batch["prompts"][:8], batch["tokens"][:few], args.temperature)
    kl = categorical_kl(batch["log_probs"][:few], log_probs)[batch["mask"][:few]]
    return means | {"kl_after_update": kl.mean().item()}


# -------------------------------------------------------------------------------------------------------- TRAINING
def verify(task: Task, prompts: list[list[str]], batch: Batch) -> Tensor:
    """The rewards [P, G] of the answers in a batch from sample()."""
    answers = task.decode(batch["tokens"], batch["mask"])
    count = len(answers) // len(prompts)
    rewards = [float(task.verify(prompts[i // count], answer)) for i, answer in enumerate(answers)]
    return torch.tensor(rewards).view(len(prompts), count)


def warm_up(agent: Agent, task: Task, args: Args) -> None:
    """Supervised steps on demonstrations: the form of an answer, learned before what a right one is."""
    rng = random.Random(stream(args.seed, "warm-up"))
    optimizer = torch.optim.AdamW(agent.parameters(), weight_decay=args.weight_decay, fused=True)
    for step in range(args.warmup_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / args.warmup_steps)
        prompts = rng.choices(task.prompts, k=256)
        answers = [[*task.demonstrate(prompt, rng), task.vocab[0]] for prompt in prompts]
        padded = [answer + [task.vocab[0]] * (task.max_length - len(answer)) for answer in answers]
        tokens, lengths = task.encode(padded), torch.tensor([[len(answer)] for answer in answers])
        log_probs = score(agent, task.encode(prompts), tokens, 1.0).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        loss = -log_probs[torch.arange(task.max_length) < lengths].mean()  # cross-entropy, up to the end
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(args: Args, task: Task | None = None) -> tuple[Agent, list[dict]]:
    """GRPO on a task, by default the one that args.task names, between two evaluations. Returns the agent and the rows
    of summary.json. Raises UserError for bad input and NonFiniteError where a number becomes NaN or infinite."""
    args, saved = load_run(Args, args.resume) if args.resume is not None else (replace(args), None)
    task = choose_task(args, task)
    torch.set_num_threads(args.threads)
    torch.manual_seed(stream(args.seed, "weights"))
    dims = len(task.vocab), len(task.prompts[0]) + task.max_length
    agent, reference = Agent(*dims), Agent(*dims)
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(agent.parameters(), **settings, fused=True)
    rng = {name: torch.Generator().manual_seed(stream(args.seed, name)) for name in ("prompts", "answers")}
    restore(saved, agent=agent, reference=reference, optimizer=optimizer, **rng)
    run = Run(args, {"task": task.name}, 1, saved)
    if saved is None:
        run.seconds["warmup"] = 0.0
        with run.timed("warmup"):
            warm_up(agent, task, args)
        check_finite({"weights after the warm-up": nn.utils.parameters_to_vector(agent.parameters())}, 0)
        reference.load_state_dict(agent.state_dict())
        before = evaluate(agent, task, args)
        state = {"update": 0, "global_step": 0, "transitions": [0], "diverged_at": [None], "before": before}
        show("before training", before, args.pass_k)
    else:
        state = saved["state"]
    while state["update"] < args.num_updates:
        # ROLLOUT
        rows = torch.randint(len(task.prompts), (args.num_prompts,), generator=rng["prompts"])
        prompts = [task.prompts[row] for row in rows.tolist()]
        batch = {"prompts": task.encode(prompts)}
        with run.timed("policy"):
            how = (args.group_size, task.max_length, args.temperature, rng["answers"])
            batch |= sample(agent, batch["prompts"], *how)
            with torch.no_grad():
                batch["ref_log_probs"] = score(reference, batch["prompts"], batch["tokens"], args.temperature)
        with run.timed("environment"):
            rewards = verify(task, prompts, batch)
        check_finite({"rewards": rewards}, state["update"] + 1)

        # ADVANTAGES
        batch["advantages"] = group_advantages(rewards, args.baseline, args.scale_rewards).flatten()

        # UPDATE
        lr = args.learning_rate * (1 - state["update"] / args.num_updates if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = lr
        with run.timed("update"):
            metrics = update(agent, optimizer, batch, task.max_length, args)
        check_finite(metrics | {"weights": nn.utils.parameters_to_vector(agent.parameters())}, state["update"] + 1)

        # LOG
        lengths = batch["mask"].sum(1)
        episodes = zip(range(args.batch_size), rewards.flatten().tolist(), lengths.tolist(), strict=True)
        run.record(state["global_step"], list(episodes))
        state["update"] += 1
        state["global_step"] += args.batch_size
        state["transitions"][0] += int(lengths.sum())
        losses = {name: metrics.pop(name) for name in ("policy_loss", "grad_norm", "kl_after_update")}
        ended = (batch["tokens"] == 0).any(1)
        run.log(state, [{"charts/learning_rate": lr} | group_metrics(rewards, lengths, ended) | metrics], [losses])
        if args.ref_sync and state["update"] % args.ref_sync == 0:
            reference.load_state_dict(agent.state_dict())
        if state["update"] % args.checkpoint_every == 0 or state["update"] == args.num_updates:
            run.save(state, dims=dims, agent=agent, reference=reference, optimizer=optimizer, **rng)
    after = evaluate(agent, task, args)
    show("after training", after, args.pass_k)
    for when, found in (("before", state["before"]), ("after", after)):
        run.task |= {f"{name}_{when}": found[name] for name in ("pass@1", "pass@k")}  # for summary.json
    run.task |= {"k": args.pass_k, "warmup_seconds": run.seconds["warmup"]}
    return agent, run.finish(state, [after["returns"]])


def evaluate(agent: Agent, task: Task, args: Args) -> dict:
    """On held-out questions: the reward of the greedy answer to each ("returns"), pass@1, the share of greedy answers
    that are right, pass@k, the share of questions to which one of k sampled answers is, and examples to print."""
    prompts, rng = task.held_out[: args.eval_prompts], torch.Generator().manual_seed(stream(args.seed, "evaluation"))
    ids = task.encode(prompts)
    greedy = sample(agent, ids, 1, task.max_length, args.temperature)
    sampled = sample(agent, ids, args.pass_k, task.max_length, args.temperature, rng)
    returns, found = verify(task, prompts, greedy).flatten(), (verify(task, prompts, sampled) == 1).any(1)
    answers = task.decode(greedy["tokens"][:4], greedy["mask"][:4])
    examples = [[" ".join(words) for words in pair] for pair in zip(prompts, answers, strict=False)]
    passes = {"pass@1": (returns == 1).float().mean().item(), "pass@k": found.float().mean().item()}
    return {"returns": returns.tolist(), "examples": examples} | passes


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


# ------------------------------------------------------------------------------------------------- A SECOND TASK
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv)}


def value(words: list[str], rank: int = 0) -> Fraction:
    """The exact value of the infix expression that `words` begin with, as far as its operators are of this rank or
    above; takes it off `words`, which END must follow. Raises ValueError where there is none, ZeroDivisionError."""
    if (word := words.pop(0)) == "(":
        result = value(words)
        if words.pop(0) != ")":
            raise ValueError("a bracket is not closed")
    else:
        result = Fraction(int(word))  # ValueError for all that is no number
    while words[0] in OPERATORS and OPERATORS[words[0]][0] >= rank:
        own, function = OPERATORS[words.pop(0)]
        result = function(result, value(words, own + 1))
    return result


def verify_countdown(prompt: list[str], answer: list[str]) -> float:
    """1 for an expression that has each of the three numbers once and the target as its value; up to 1/2, more the
    nearer it comes, for one that misses the target by less than 10; 0 for all else."""
    *numbers, target = prompt
    if answer[-1] != END or sorted(word for word in answer if word.isdigit()) != sorted(numbers):
        return 0.0
    words = list(answer)
    try:
        distance = float(abs(value(words) - int(target)))
    except (ValueError, ZeroDivisionError):
        return 0.0
    if words != [END]:
        return 0.0
    return max(0.0, 0.5 - distance / 20) if distance else 1.0


def random_expression(prompt: list[str], rng: random.Random) -> list[str]:
    """The three numbers of a question in any order, with any operators, with or without brackets."""
    (a, b, c), (x, y) = rng.sample(prompt[:3], 3), rng.choices("+-*/", k=2)
    return rng.choice([[a, x, b, y, c], ["(", a, x, b, ")", y, c], [a, x, "(", b, y, c, ")"]])


def countdown_task(largest: int = 12, highest: int = 40) -> Task:
    """From "2 3 7 13" to "7 + 3 * 2 <end>", or any other expression of 2, 3 and 7 that equals 13.

    Every target is the value of a random expression. The answers of the warm-up are random expressions of a question's
    numbers, whatever its target: they teach what an expression is, and nothing about arithmetic. Three numbers and a
    target that are held out are never asked for in training."""
    rng, prompts = random.Random(0), []
    while len(prompts) < 40_000:
        numbers = [str(n) for n in sorted(rng.choices(range(1, largest + 1), k=3))]
        with contextlib.suppress(ZeroDivisionError):
            target = value([*random_expression(numbers, rng), END])
            if target.denominator == 1 and 0 <= target <= highest:
                prompts.append([*numbers, str(target)])
    prompts, held_out = split(prompts, key=list)
    vocab = [END, *"+-*/()", *map(str, range(max(largest, highest) + 1))]
    return Task("countdown", vocab, prompts, held_out, 8, verify_countdown, 500_000, 500, random_expression)


TASKS = {"sort": sort_task, "countdown": countdown_task}


# --------------------------------------------------------------------------------------------------------- REPORTS
def group_metrics(rewards: Tensor, lengths: Tensor, ended: Tensor) -> dict:
    """What a batch of answers looks like, by TRL's names where TRL has one: rewards [P, G], lengths and ended [N].
    reward_std is of all rewards, frac_reward_zero_std of groups, whatever --scale-rewards is."""

    def mean(x: Tensor, where: Tensor) -> float | None:
        return x[where].float().mean().item() if where.any() else None

    right, everything = rewards == 1, torch.ones_like(ended)
    metrics = {"reward": rewards.mean(), "reward_std": rewards.std(), "frac_right": right.float().mean()}
    metrics["frac_reward_zero_std"] = (rewards.amax(1) == rewards.amin(1)).float().mean()
    metrics |= {"frac_all_right": right.all(1).float().mean(), "frac_all_wrong": (~right).all(1).float().mean()}
    metrics |= {"completions/min_length": lengths.min(), "completions/max_length": lengths.max()}
    metrics["completions/clipped_ratio"] = (~ended).float().mean()
    where = {"": everything, "_terminated": ended, "_right": right.flatten(), "_wrong": ~right.flatten()}
    means = {f"completions/mean{name}_length": mean(lengths, rows) for name, rows in where.items()}
    return {name: x.item() for name, x in metrics.items()} | means


def show(when: str, found: dict, k: int) -> None:
    """Print what evaluate() found, and a few greedy answers, so that a person sees what is learned."""
    told = f"{when}: pass@1 {found['pass@1']:.1%}, pass@{k} {found['pass@k']:.1%} of held-out questions"
    examples = zip(found["examples"], found["returns"], strict=False)
    lines = [f"  {prompt} -> {answer}  (reward {reward:.2f})" for (prompt, answer), reward in examples]
    tqdm.write("\n".join([told, *lines]))


# -------------------------------------------------------------------------------------------------------- COMMANDS
def choose_task(args: Args, task: Task | None = None) -> Task:
    """`task`, or the one that args.task names; puts its name and its numbers into `args`, and checks both. Raises
    UserError."""
    if task is None and args.task not in TASKS:
        raise UserError(f"--task must be {' or '.join(TASKS)}, not {args.task!r}; others can be handed to train()")
    task = task or TASKS[args.task]()
    if args.resume is not None and args.task != task.name:
        raise UserError(f"{args.resume} is a run on the task {args.task!r}, not {task.name!r}")
    args.task = task.name
    args.total_timesteps = task.total_timesteps if args.total_timesteps is None else args.total_timesteps
    args.warmup_steps = task.warmup_steps if args.warmup_steps is None else args.warmup_steps
    args.check()
    if args.warmup_steps and task.demonstrate is None:
        raise UserError(f"--warmup-steps: the task {task.name} demonstrates nothing; leave the flag out")
    return task


def load_agent(run_dir: str, task: Task | None = None) -> tuple[Agent, Task, Args]:
    """The trained agent of a run folder, its task and its flags. Raises UserError where there is no checkpoint."""
    args, saved = load_run(Args, run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    task, agent = choose_task(args, task), Agent(*saved["dims"])
    restore(saved, agent=agent)
    torch.set_num_threads(args.threads)
    return agent, task, args


def evaluate_run(args: Args) -> None:
    """--evaluate: load, evaluate, print, and write evaluation.json into the run folder."""
    agent, task, trained = load_agent(args.evaluate)
    trained.eval_prompts, trained.pass_k = args.eval_prompts, args.pass_k
    trained.check()
    path, (who,), found = Path(args.evaluate), trained.agents, evaluate(agent, task, trained)
    row = {"k": trained.pass_k} | {name: found[name] for name in ("pass@1", "pass@k")}
    row |= {"eval_return_mean": np.mean(found["returns"]).item(), "eval_return_std": np.std(found["returns"]).item()}
    results = [who | row | {"returns": found["returns"]}]
    write_file(path / "evaluation.json", json.dumps(results, indent=2).encode())
    show(str(path), found, trained.pass_k)


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
