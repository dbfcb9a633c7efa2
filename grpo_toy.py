"""Group Relative Policy Optimization (GRPO), from random weights to a solved task, in one file.

Shao et al. (2024), "DeepSeekMath", https://arxiv.org/abs/2402.03300, made known by DeepSeek-R1
(2025), https://arxiv.org/abs/2501.12948. Equation numbers are those of DeepSeekMath.

A policy that writes text is asked a question q. It writes a group of G answers o_1 ... o_G, and a
program verifies each of them. The mean reward of the group is the baseline, so no critic is needed:

    advantage   A_i = (R_i - mean(R_1 ... R_G)) / std(R_1 ... R_G), where R_i is the reward of o_i
    eq. 3       E[ 1/G sum_i 1/|o_i| sum_t ( min(r A_i, clip(r, 1-eps, 1+eps) A_i) - beta KL ) ]
    ratio       r = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t), where pi_old wrote the answers
    eq. 4       KL = pi_ref/pi - log(pi_ref/pi) - 1 at every token; pi_ref: the policy before RL

Everything is here: two tasks with held-out questions, a transformer of about 100,000 parameters,
sampling with a key-value cache, the loss, the loop. No pretrained weights, no downloads.

    python grpo_toy.py                     # sort digits; one to two minutes
    python grpo_toy.py --task countdown    # reach a target with three numbers; some five minutes
    python grpo_toy.py --evaluate RUN_DIR

On questions that were never trained on, expect 99% right answers in sort (0% before training) and
54% in countdown (7% after a short supervised warm-up, which teaches what an expression is).

These defaults are ours and not the papers'. DeepSeekMath has beta = 0.04, G = 64 and one gradient
step per batch (mu = 1). Here beta is 0.07, which keeps the answers of so small a model diverse. G
is 8. mu is 2: in the first step every ratio is 1, and only later steps can be clipped. The step
size, the weight decay of 0.5, the tasks and the size of the network are ours too.

The published relatives are flags:

    R1, as printed               --ratio sequence --clip-low 10 --clip-high 10 --kl-coef 0.001
    Dr. GRPO (Liu et al. 2025)   --loss-agg dr_grpo --scale-rewards none --kl-coef 0
    DAPO (Yu et al. 2025)        --loss-agg dapo --clip-high 0.28 --kl-coef 0
    GSPO (Zheng et al. 2025)     --ratio sequence-mean --clip-low 3e-4 --clip-high 4e-4 --kl-coef 0
    RLOO (Ahmadian et al. 2024)  --baseline leave-one-out --scale-rewards none --ratio sequence
                                 --num-iterations 1 --kl-coef 0

Not here: DAPO's dynamic sampling and its penalty on long answers, RLOO's KL as part of the reward,
and R1's KL of a whole answer (here it is one per token). DAPO's paper averages over the tokens of
a group; here the average is over the tokens of the batch.

Metrics have TRL's names where TRL has one. A "step" is one sampled answer. A run leaves
config.json, metrics.csv, episodes.csv (a row per answer: its reward, its length in tokens),
checkpoint.pt and summary.json in a folder under runs/.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "numpy==2.4.6",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.16",
#     "wandb==0.31.0",  # --track
# ]
# ///

import contextlib
import csv
import gc
import hashlib
import io
import json
import math
import operator
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class Args:
    """GRPO (Shao et al. 2024) and its variants, on a task with a verifier."""

    task: str = "sort"  # sort (digits) or countdown (reach a target with three numbers)
    seed: int = 1  # seed of every random stream; the questions themselves never change

    total_timesteps: int | None = None  # answers sampled, in whole updates; None: as the task says
    num_prompts: int = 64  # questions per update (P)
    group_size: int = 8  # answers to each question (G)
    temperature: float = 1.0  # divides the logits of answers sampled or scored; not in warm-up
    warmup_steps: int | None = None  # supervised steps before RL; None: as the task says

    baseline: Literal["group", "batch", "leave-one-out", "none"] = "group"  # whose mean to subtract
    scale_rewards: Literal["group", "batch", "none"] = "group"  # divide by the std of these rewards

    # whose ratio to clip: a token's, an answer's (a product), or its geometric mean per token
    ratio: Literal["token", "sequence", "sequence-mean"] = "token"
    loss_agg: Literal["grpo", "dr_grpo", "dapo"] = "grpo"  # how the terms of eq. 3 are averaged
    clip_low: float = 0.2  # the ratio is clipped below 1 minus this (epsilon)
    clip_high: float = 0.2  # the ratio is clipped above 1 plus this; DAPO: 0.28
    kl_coef: float = 0.07  # weight of KL[policy, reference] (beta); with 0 it is only measured
    kl_estimator: Literal["k2", "k3", "k3-corrected", "exact"] = "k3"  # see kl_terms; k3 is eq. 4
    ref_sync: int = 0  # updates after which the reference becomes a copy of the policy; 0: never

    num_iterations: int = 2  # gradient steps on each batch of answers (mu)
    learning_rate: float = 1e-3  # AdamW step size
    weight_decay: float = 0.5  # of AdamW: against learning questions by heart
    anneal_lr: bool = True  # decay the step size linearly to 0 over the run
    max_grad_norm: float = 1.0  # scale the gradient down to at most this norm; inf never does

    threads: int = 1  # threads of PyTorch; the last bits of the results depend on it
    run_dir: str | None = None  # folder of this run; None makes one under runs/
    checkpoint_every: int = 50  # updates between checkpoints
    resume: str | None = None  # go on with the run in this folder; its config.json has the flags
    track: bool = False  # mirror the run to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "grpo"  # project for --track

    evaluate: str | None = None  # evaluate the run in this folder; the flags below may be given
    eval_prompts: int = 500  # held-out questions to ask, at most as many as the task has
    pass_k: int = 16  # pass@k: the share of questions with a right answer among this many samples

    @property
    def batch_size(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    @property
    def objective(self) -> str:
        return f"{self.ratio}/{self.loss_agg}/{self.baseline}/{self.scale_rewards}"


# ----------------------------------------------------------------------------------------- TASKS
END = "<end>"  # the last word of an answer
END_ID = 0  # so it must be word 0 of every vocabulary
BLANK = "_"  # fills up short questions


class Task(NamedTuple):
    """What is asked, and which answers are right. Hand a task of your own to train()."""

    name: str
    vocab: list[str]  # all words of questions and answers, END first; in the same order at --resume
    prompts: list[list[str]]  # the questions to learn from, all of one length
    held_out: list[list[str]]  # those to be tested on, of the same length, in random order
    max_length: int  # of an answer, with its END; a longer one is cut off
    # question, answer (with its END, unless it was cut off) -> reward; 1 says that it is right
    verify: Callable[[list[str], list[str]], float]
    total_timesteps: int  # default of --total-timesteps
    warmup_steps: int = 0  # default of --warmup-steps
    # for the warm-up: question -> an answer of the right form, without its END
    demonstrate: Callable[[list[str], random.Random], list[str]] | None = None

    def encode(self, sentences: list[list[str]]) -> Tensor:
        """B sentences of L words each -> token ids [B, L]"""
        ids = {word: i for i, word in enumerate(self.vocab)}
        return torch.tensor([[ids[word] for word in sentence] for sentence in sentences])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """tokens [N, T], mask [N, T] -> the words of N answers: those where the mask is True."""
        answers = []
        for row, length in zip(tokens.tolist(), mask.sum(1).tolist(), strict=True):
            answers.append([self.vocab[token] for token in row[:length]])
        return answers


def split(prompts: list[list[str]], key: Callable) -> tuple[list, list]:
    """(questions to learn from, held-out questions): questions of one key stay together."""
    training, held_out = [], []
    for prompt in prompts:
        if stream(0, str(key(prompt))) % 10 == 0:  # a hash: one key in ten is held out
            held_out.append(prompt)
        else:
            training.append(prompt)
    return training, held_out


def sort_task() -> Task:
    """From "3 1 3 _ _" to "1 3 3 <end>": two to five digits.

    The digits of a held-out question never occur in training, in any order.
    """
    rng = random.Random(0)
    longest = 5
    prompts = []
    for _ in range(20_000):
        digits = rng.choices("0123456789", k=rng.randint(2, longest))
        prompts.append(digits + [BLANK] * (longest - len(digits)))
    training, held_out = split(prompts, key=sorted)
    return Task(
        name="sort",
        vocab=[END, BLANK, *"0123456789"],
        prompts=training,
        held_out=held_out,
        max_length=longest + 2,
        verify=verify_sorted,
        total_timesteps=200_000,
    )


def verify_sorted(prompt: list[str], answer: list[str]) -> float:
    """The share of right words, END included, each in its place."""
    digits = [word for word in prompt if word != BLANK]
    wanted = [*sorted(digits), END]
    right = sum(a == w for a, w in zip(answer, wanted, strict=False))
    return right / len(wanted)


def countdown_task(largest: int = 12, highest: int = 40) -> Task:
    """From "2 3 7 13" to "7 + 3 * 2 <end>", or another expression of 2, 3 and 7 that equals 13.

    Every target is the value of a random expression. Three numbers and a target that are held out
    are never asked for in training. The warm-up shows random expressions of a question's numbers,
    whatever its target: they teach what an expression is, and nothing about arithmetic.
    """
    rng = random.Random(0)
    prompts = []
    while len(prompts) < 40_000:
        numbers = [str(n) for n in sorted(rng.choices(range(1, largest + 1), k=3))]
        try:
            target = value([*random_expression(numbers, rng), END])
        except ZeroDivisionError:
            continue
        if target.denominator == 1 and 0 <= target <= highest:
            prompts.append([*numbers, str(target)])
    training, held_out = split(prompts, key=list)
    return Task(
        name="countdown",
        vocab=[END, *"+-*/()", *map(str, range(max(largest, highest) + 1))],
        prompts=training,
        held_out=held_out,
        max_length=8,
        verify=verify_countdown,
        total_timesteps=500_000,
        warmup_steps=500,
        demonstrate=random_expression,
    )


def verify_countdown(prompt: list[str], answer: list[str]) -> float:
    """1 if the answer uses each of the three numbers once and its value is the target.

    An expression whose value is off by less than 10 gets up to 1/2, anything else 0.
    """
    *numbers, target = prompt
    used = [word for word in answer if word.isdigit()]
    if answer[-1] != END or sorted(used) != sorted(numbers):
        return 0.0
    words = list(answer)
    try:
        distance = abs(value(words) - int(target))
    except (ValueError, ZeroDivisionError):
        return 0.0
    if words != [END]:  # something follows the expression
        return 0.0
    if distance == 0:
        return 1.0
    return max(0.0, 0.5 - float(distance) / 20)


def random_expression(prompt: list[str], rng: random.Random) -> list[str]:
    """The three numbers of a question in any order, any operators, with or without brackets."""
    a, b, c = rng.sample(prompt[:3], 3)
    x, y = rng.choices("+-*/", k=2)
    plain = [a, x, b, y, c]
    left = ["(", a, x, b, ")", y, c]
    right = [a, x, "(", b, y, c, ")"]
    return rng.choice([plain, left, right])


PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
FUNCTIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def value(words: list[str], lowest: int = 1) -> Fraction:
    """The exact value of the expression that `words` begins with; takes it off the list.

    The expression goes on as long as an operator of at least the precedence `lowest` follows. END
    must stand after it. Raises ValueError where there is no expression, and ZeroDivisionError.
    """
    word = words.pop(0)
    if word == "(":
        result = value(words)
        if words.pop(0) != ")":
            raise ValueError("a bracket is not closed")
    else:
        result = Fraction(int(word))  # ValueError where it is no number
    while PRECEDENCE.get(words[0], 0) >= lowest:
        word = words.pop(0)
        result = FUNCTIONS[word](result, value(words, PRECEDENCE[word] + 1))
    return result


TASKS = {"sort": sort_task, "countdown": countdown_task}


# ----------------------------------------------------------------------------------------- AGENT
Cache = list[tuple[Tensor, Tensor]]  # of each block: keys, values [B, heads, S, width / heads]


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then two layers, each added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple | None, mask: Tensor) -> tuple[Tensor, tuple]:
        """x [B, T, width] of T tokens that follow S earlier ones -> x, (keys, values) of all S + T.

        past: keys and values of the S, None if S = 0. mask [T, S + T]: which token reads which.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, width / heads] each
        if past is not None:
            keys = torch.cat([past[0], keys], 2)
            values = torch.cat([past[1], values], 2)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return x, (keys, values)


class Agent(nn.Module):
    """The policy: a causal transformer that reads words and predicts the next. No dropout."""

    def __init__(self, num_words: int, length: int, width=64, blocks=2, heads=2):
        super().__init__()
        self.word = nn.Embedding(num_words, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, num_words)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # the output keeps the variance of the input
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        nn.init.normal_(self.logits.weight, std=0.02)  # a nearly uniform first policy

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Reads tokens [B, T], which follow the S tokens in the cache.

        Returns the logits of the word after each of them [B, T, V], and the cache of all S + T.
        """
        start = 0 if cache is None else cache[0][0].shape[2]  # S
        end = start + tokens.shape[1]  # S + T
        # every token reads the earlier ones and itself
        mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        x = self.word(tokens) + self.position.weight[start:end]
        new_cache = []
        for i, block in enumerate(self.blocks):
            x, keys_and_values = block(x, None if cache is None else cache[i], mask)
            new_cache.append(keys_and_values)
        return self.logits(self.norm(x)), new_cache

    def policy(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits from forward() [..., V] -> log-probabilities of the next word [..., V].

        The policy is made here alone: what is changed here is played, learned and evaluated. It is
        the whole distribution, without top-k or top-p.
        """
        log_probs = (logits / temperature).log_softmax(-1)
        return log_probs.clamp(min=-1e9)  # a logit may be -inf: 0 * inf would be NaN


def agent_dims(task: Task) -> dict[str, int]:
    """What Agent() takes, for the words and the longest text of a task."""
    # int: a checkpoint cannot hold a number of NumPy
    return {"num_words": len(task.vocab), "length": len(task.prompts[0]) + int(task.max_length)}


def read_prompts(agent: Agent, prompts: Tensor, group_size: int) -> tuple[Tensor, Cache]:
    """Reads each of P questions [P, L] once, for the G answers to it.

    Returns the logits of the first word of N = P * G answers [N, 1, V], and their cache. The
    answers to one question stand side by side.
    """
    logits, cache = agent(prompts)
    logits = logits[:, -1:].repeat_interleave(group_size, 0)
    repeated = []
    for keys, values in cache:
        keys = keys.repeat_interleave(group_size, 0)
        values = values.repeat_interleave(group_size, 0)
        repeated.append((keys, values))
    return logits, repeated


@torch.no_grad()
def sample(agent, prompts, group_size, max_length, temperature, rng=None) -> dict[str, Tensor]:
    """Writes G answers to each question [P, L]: sampled with `rng`, greedy without.

    Returns tokens [N, T], log_probs [N, T, V] of all words at each place, and mask [N, T], which is
    True up to and including END. N = P * G; T is the length of the longest answer.
    """
    logits, cache = read_prompts(agent, prompts, group_size)
    unfinished = torch.ones(len(logits), dtype=torch.bool)
    tokens, log_probs, mask = [], [], []
    for t in range(max_length):
        if t > 0:
            logits, cache = agent(tokens[-1].unsqueeze(1), cache)
        log_prob = agent.policy(logits.squeeze(1), temperature)
        if rng is None:
            word = log_prob.argmax(-1)
        else:
            word = torch.multinomial(log_prob.exp(), 1, generator=rng).squeeze(1)
        tokens.append(word.where(unfinished, END_ID))  # END fills up what is finished
        log_probs.append(log_prob)
        mask.append(unfinished)
        unfinished = unfinished & (word != END_ID)
        if not unfinished.any():
            break
    return {
        "tokens": torch.stack(tokens, 1),
        "log_probs": torch.stack(log_probs, 1),
        "mask": torch.stack(mask, 1),
    }


def score(agent, prompts, tokens, group_size, temperature) -> Tensor:
    """log_probs [N, T, V] as in sample(), for answers that are written already: tokens [N, T]."""
    first, cache = read_prompts(agent, prompts, group_size)
    later, _ = agent(tokens[:, :-1], cache)
    return agent.policy(torch.cat([first, later], 1), temperature)


# --------------------------------------------------------------------------------- THE ALGORITHM
def group_advantages(rewards: Tensor, baseline: str, scale: str) -> Tensor:
    """rewards [P, G] -> advantages [P, G]: (R - mean) / std of the group, or a variant of that."""
    group_mean, group_std = mean_and_std(rewards)  # [P, 1]
    batch_mean, batch_std = mean_and_std(rewards.view(1, -1))  # [1, 1]
    if baseline == "group":
        advantages = rewards - group_mean
    elif baseline == "batch":
        advantages = rewards - batch_mean
    elif baseline == "leave-one-out":  # R - mean of the others is G / (G - 1) * (R - mean of all)
        group_size = rewards.shape[1]
        advantages = (rewards - group_mean) * group_size / (group_size - 1)
    else:
        advantages = rewards

    if scale == "group":
        advantages = advantages / group_std
    elif scale == "batch":
        advantages = advantages / batch_std
    return advantages


def mean_and_std(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row, [P, G] -> [P, 1] each.

    A row of equal rewards has nothing to teach: reward minus mean must be exactly 0. But the
    computed mean of equal numbers can be off by a rounding error, and the std to divide by is
    almost 0. So equal rewards are found by max == min: their mean is the reward, their std is 1.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    mean = torch.where(equal, rewards[:, :1], rewards.mean(1, keepdim=True))
    std = torch.where(equal, 1.0, rewards.std(1, keepdim=True) + 1e-4)  # 1e-4 as in TRL
    return mean, std


def of_tokens(log_probs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """log_probs [N, T, V] of all words -> those of the answers' own tokens [N, T]; 0 after END."""
    tokens = batch["tokens"].unsqueeze(-1)
    return log_probs.gather(-1, tokens).squeeze(-1).masked_fill(~batch["mask"], 0.0)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy of each distribution, [..., V] -> [...]"""
    return -(log_probs.exp() * log_probs).sum(-1)


def kl_between(old: Tensor, new: Tensor) -> Tensor:
    """Exact KL[old, new] of each pair of distributions, [..., V] each -> [...]"""
    return (old.exp() * (old - new)).sum(-1)


def kl_terms(new: Tensor, old: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Estimates of KL[policy, reference] at each token (Schulman, joschu.net/blog/kl-approx.html).

    new, old, reference [...]: the token's log-probability under the policy that is being optimised,
    under the policy that sampled it, and under the reference. What an estimate measures and
    where its gradient leads are two questions. While the policy is still pi_old, all but k2 measure
    the KL, on average over tokens; k3-corrected does so afterwards, too. With x = log(pi / pi_ref),
    on average over tokens of the policy:

                  estimate          gradient
    k1            x                 0, so it is a metric only
    k2            x^2 / 2           that of KL[policy, reference]
    k3            e^-x + x - 1      that of the forward KL[reference, policy]   (eq. 4)
    k3-corrected  pi/pi_old * k3    that of KL[policy, reference], also after the policy has left
                                    pi_old (DeepSeek-V3.2); a token's ratio, whatever --ratio is

    --kl-estimator exact needs none of them: kl_between() adds up over all words.
    """
    x = new - reference
    x_bounded = x.clamp(min=-40)  # so that e^-x cannot overflow; k3 is flat below
    k3 = (-x_bounded).exp() + x_bounded - 1
    ratio = (new - old).clamp(max=40).exp()
    return {"k1": x, "k2": x.square() / 2, "k3": k3, "k3-corrected": ratio * k3}


def grpo_loss(log_probs: Tensor, batch: dict, max_length: int, args: Args) -> tuple[Tensor, dict]:
    """Minus eq. 3, or minus a variant of it, to be minimised; and metrics by name.

    log_probs [N, T, V]: of the policy that is being optimised.
    batch: tokens and mask [N, T] and advantages [N] of the answers; log_probs and ref_log_probs
    [N, T, V] of the policy that sampled them and of the reference.
    max_length: of an answer, for --loss-agg dr_grpo.
    """
    mask = batch["mask"]
    lengths = mask.sum(-1, keepdim=True)  # [N, 1]
    advantages = batch["advantages"].unsqueeze(-1)  # [N, 1]
    new = of_tokens(log_probs, batch)
    old = of_tokens(batch["log_probs"], batch)
    reference = of_tokens(batch["ref_log_probs"], batch)

    logratio = new - old
    if args.ratio == "sequence":  # the product of all ratios of an answer, [N, 1]
        logratio = logratio.sum(-1, keepdim=True)
    elif args.ratio == "sequence-mean":  # their geometric mean, [N, 1]
        logratio = logratio.sum(-1, keepdim=True) / lengths
    ratio = logratio.clamp(max=40).exp()  # inf would make 0 * inf = NaN below
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # as in PPO

    kl = kl_terms(new, old, reference)
    kl["exact"] = kl_between(log_probs, batch["ref_log_probs"])
    terms = (surrogate - args.kl_coef * kl[args.kl_estimator]) * mask  # [N, T]

    if args.loss_agg == "grpo":  # the mean of each answer, then of all answers
        objective = (terms.sum(-1, keepdim=True) / lengths).mean()
    elif args.loss_agg == "dr_grpo":  # every answer is divided by the same length
        objective = terms.sum() / (len(terms) * max_length)
    else:  # dapo: the mean of all tokens
        objective = terms.sum() / lengths.sum()

    def token_mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / lengths.sum()

    def ratio_mean(x: Tensor) -> Tensor:  # of tokens, or of answers where each has one ratio
        return token_mean(x) if args.ratio == "token" else x.float().mean()

    with torch.no_grad():
        clipped_low = (ratio < 1 - args.clip_low) & (advantages < 0)
        clipped_high = (ratio > 1 + args.clip_high) & (advantages > 0)
        metrics = {
            "policy_loss": -objective,
            "kl": token_mean(kl[args.kl_estimator]),
            "kl_exact": token_mean(kl["exact"]),
            "kl_k1": token_mean(kl["k1"]),
            "entropy": token_mean(entropy_of(log_probs)),
            "clip_ratio/low_mean": ratio_mean(clipped_low),
            "clip_ratio/high_mean": ratio_mean(clipped_high),
            "clip_ratio/region_mean": ratio_mean(clipped_low | clipped_high),
        }
    return -objective, metrics


def update(agent: Agent, optimizer, batch: dict, max_length: int, args: Args) -> dict[str, float]:
    """mu gradient steps on one batch. Returns the means of the metrics over these steps.

    batch: what grpo_loss takes, and prompts [P, L]. kl_after_update is the exact KL[old, new] after
    the last step, of the answers to 8 questions: all of them would cost a tenth of the run.
    """
    prompts = batch["prompts"]
    tokens = batch["tokens"]
    parameters = list(agent.parameters())
    history = []
    for _ in range(args.num_iterations):
        log_probs = score(agent, prompts, tokens, args.group_size, args.temperature)
        loss, metrics = grpo_loss(log_probs, batch, max_length, args)
        optimizer.zero_grad()
        loss.backward()
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        history.append(metrics)
    means = {}
    for name in history[0]:
        means[name] = torch.stack([metrics[name] for metrics in history]).mean().item()

    count = 8 * args.group_size
    with torch.no_grad():
        log_probs = score(agent, prompts[:8], tokens[:count], args.group_size, args.temperature)
    kl = kl_between(batch["log_probs"][:count], log_probs)
    means["kl_after_update"] = kl[batch["mask"][:count]].mean().item()
    return means


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


def verify(task: Task, prompts: list[list[str]], batch: dict, group_size: int) -> Tensor:
    """The rewards [P, G] of the answers in a batch from sample(). Raises what reward_of raises."""
    rewards = []
    for i, answer in enumerate(task.decode(batch["tokens"], batch["mask"])):
        prompt = prompts[i // group_size]  # answers to one question stand side by side
        rewards.append(reward_of(task, prompt, answer))
    return torch.tensor(rewards).view(len(prompts), group_size)


def reward_of(task: Task, question: list[str], answer: list[str]) -> float:
    """What task.verify gives.

    Raises RuntimeError from what verify raised, and NonFiniteError where it gave no finite number.
    """
    try:
        given = task.verify(list(question), list(answer))  # copies: some take words off a list
    except Exception as reason:
        call = f"Task.verify({question}, {answer})"
        raise RuntimeError(f"{call} raised {reason!r}") from reason
    try:
        number = given.item() if hasattr(given, "item") else given  # of NumPy or PyTorch
        reward = math.nan if isinstance(number, str) else float(number)
    except (TypeError, ValueError, RuntimeError):
        reward = math.nan
    if not abs(reward) <= 1e12:  # so NaN too; squares of larger numbers overflow in float32
        problem = f"gave {given!r}; a reward must be a number between -1e12 and 1e12"
        raise NonFiniteError(f"Task.verify({question}, {answer}) {problem}")
    return reward


def demonstration(task: Task, question: list[str], vocab: set, rng: random.Random) -> list[str]:
    """What task.demonstrate gives, with its END. vocab: that of the task.

    Raises RuntimeError from what demonstrate raised, and UserError where it gave no answer.
    """
    try:
        answer = list(task.demonstrate(list(question), rng))
    except Exception as reason:
        raise RuntimeError(f"Task.demonstrate({question}) raised {reason!r}") from reason
    what = f"Task.demonstrate({question}): the answer"
    count = check_words(what, answer, vocab)
    if count >= task.max_length or END in answer:
        limit = f"{task.max_length - 1} words without {END!r}, which is added"
        raise UserError(f"{what} {answer} has {count} words; Task.max_length allows {limit}")
    return [*answer, END]


def warm_up(agent: Agent, task: Task, args: Args) -> None:
    """Supervised steps on demonstrations: they teach the form of an answer, not what is right."""
    rng = random.Random(stream(args.seed, "warm-up"))
    optimizer = torch.optim.AdamW(agent.parameters(), weight_decay=args.weight_decay, fused=True)
    vocab = set(task.vocab)
    for step in range(args.warmup_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / args.warmup_steps)
        prompts = rng.choices(task.prompts, k=256)
        answers, lengths = [], []
        for prompt in prompts:
            answer = demonstration(task, prompt, vocab, rng)
            answers.append(answer + [END] * (task.max_length - len(answer)))
            lengths.append(len(answer))
        tokens = task.encode(answers)
        log_probs = score(agent, task.encode(prompts), tokens, group_size=1, temperature=1.0)
        mask = torch.arange(task.max_length) < torch.tensor(lengths).unsqueeze(1)
        log_prob = of_tokens(log_probs, {"tokens": tokens, "mask": mask})
        loss = -log_prob[mask].mean()  # cross-entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch_threads(1)
def train(args: Args, task: Task | None = None) -> tuple[Agent, dict]:
    """GRPO between two evaluations. Returns the agent and what summary.json says of the run.

    task: one of your own; without it, args.task names one. Raises UserError for bad input,
    NonFiniteError where a number becomes NaN or infinite, and RuntimeError where the task's own
    code raises something. If that is in an update, a checkpoint of the state before it is written.
    """
    saved = None
    if args.resume is not None:
        args, saved = load_resumed(args)
    task = choose_task(args, task)
    args = check_args(args, task)
    torch.set_num_threads(args.threads)
    check_task(task, args, saved)
    dims = agent_dims(task)
    seed_globals(stream(args.seed, "weights"))
    agent = Agent(**dims)
    reference = Agent(**dims)
    optimizer = torch.optim.AdamW(agent.parameters(), weight_decay=args.weight_decay, fused=True)
    prompt_rng = torch.Generator().manual_seed(stream(args.seed, "prompts"))
    answer_rng = torch.Generator().manual_seed(stream(args.seed, "answers"))

    state = {"updates": 0, "transitions": 0, "diverged_at": None, "dims": dims}
    state["vocab"] = [str(word) for word in task.vocab]  # str: it may be a string of NumPy
    parts = {
        "agent": agent,
        "reference": reference,
        "optimizer": optimizer,
        "prompt_rng": prompt_rng,
        "answer_rng": answer_rng,
    }
    if saved is not None:
        state = saved["state"]
        restore(parts, saved)
    who = {"seed": args.seed, "objective": args.objective}
    run = Run(args, {"task": task.name}, who, saved)

    with contextlib.closing(run):
        if saved is None:
            start = time.perf_counter()
            warm_up(agent, task, args)
            state["warmup_seconds"] = time.perf_counter() - start
            weights = nn.utils.parameters_to_vector(agent.parameters())
            check_finite({"weights after the warm-up": weights}, 0)
            reference.load_state_dict(agent.state_dict())
            state["before"] = evaluate(agent, task, args)
            show("before training", state["before"], args.pass_k)

        for iteration in range(state["updates"], args.num_updates):
            # ROLLOUT
            with run.saving_work(state, parts):  # the verifier may be the user's
                rows = torch.randint(len(task.prompts), (args.num_prompts,), generator=prompt_rng)
                questions = [task.prompts[row] for row in rows.tolist()]
                prompts = task.encode(questions)
                answers = sample(
                    agent, prompts, args.group_size, task.max_length, args.temperature, answer_rng
                )
                rewards = verify(task, questions, answers, args.group_size)

            # ADVANTAGES
            advantages = group_advantages(rewards, args.baseline, args.scale_rewards)
            with torch.no_grad():
                ref_log_probs = score(
                    reference, prompts, answers["tokens"], args.group_size, args.temperature
                )
            batch = {
                "prompts": prompts,
                "tokens": answers["tokens"],
                "mask": answers["mask"],
                "advantages": advantages.flatten(),
                "log_probs": answers["log_probs"],
                "ref_log_probs": ref_log_probs,
            }

            # UPDATE
            lr = args.learning_rate
            if args.anneal_lr:
                lr = lr * (1 - iteration / args.num_updates)
            optimizer.param_groups[0]["lr"] = lr
            metrics = update(agent, optimizer, batch, task.max_length, args)
            weights = nn.utils.parameters_to_vector(agent.parameters())
            check_finite(metrics | {"weights": weights}, iteration + 1)

            # LOG
            lengths = answers["mask"].sum(1)
            state["updates"] += 1
            state["transitions"] += int(lengths.sum())
            pairs = zip(rewards.flatten().tolist(), lengths.tolist(), strict=True)
            episodes = [(row, reward, length) for row, (reward, length) in enumerate(pairs)]
            losses = {name: metrics.pop(name) for name in LOSSES}
            metrics = group_metrics(rewards, answers) | metrics
            run.log(state["updates"], episodes, {"learning_rate": lr}, losses, **metrics)
            if args.ref_sync and state["updates"] % args.ref_sync == 0:
                reference.load_state_dict(agent.state_dict())
            if (
                state["updates"] % args.checkpoint_every == 0
                or state["updates"] == args.num_updates
            ):
                save_checkpoint(run.path / "checkpoint.pt", run.checkpoint(state, parts))
    after = evaluate(agent, task, args)
    show("after training", after, args.pass_k)
    run.task |= {  # for summary.json
        "pass@1_before": state["before"]["pass@1"],
        "pass@k_before": state["before"]["pass@k"],
        "pass@1_after": after["pass@1"],
        "pass@k_after": after["pass@k"],
        "k": args.pass_k,
        "warmup_seconds": state["warmup_seconds"],
    }
    return agent, run.finish(state, after["returns"])


def evaluate(agent: Agent, task: Task, args: Args) -> dict:
    """How the agent answers args.eval_prompts held-out questions.

    returns: the reward of the greedy answer to each. pass@1: the share of greedy answers that are
    right. pass@k: the share of questions with a right answer among args.pass_k samples. examples:
    a few questions and greedy answers, to print.
    """
    questions = task.held_out[: args.eval_prompts]
    prompts = task.encode(questions)
    rng = torch.Generator().manual_seed(stream(args.seed, "evaluation"))
    greedy = sample(agent, prompts, 1, task.max_length, args.temperature)
    sampled = sample(agent, prompts, args.pass_k, task.max_length, args.temperature, rng)
    returns = verify(task, questions, greedy, 1).flatten()
    right = verify(task, questions, sampled, args.pass_k) == 1
    if returns.max() > 1:
        what = f"Task.verify gave {returns.max():g}; only answers with a reward of 1 count as right"
        print(f"note: {what}", file=sys.stderr)
    answers = task.decode(greedy["tokens"][:4], greedy["mask"][:4])
    examples = []
    for question, answer, reward in zip(questions, answers, returns, strict=False):
        examples.append(f"{' '.join(question)} -> {' '.join(answer)}  (reward {reward:.2f})")
    return {
        "returns": returns.tolist(),
        "examples": examples,
        "pass@1": (returns == 1).float().mean().item(),
        "pass@k": right.any(1).float().mean().item(),
    }


def load_agent(run_dir: str, task: Task | None = None) -> tuple[Agent, Task, Args]:
    """The trained agent of a run folder, its task and its flags. Raises UserError.

    task: the one that was handed to train(), if it was one of your own.
    """
    args, saved = load_run(run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    task = choose_task(args, task)
    check_task(task, args, saved)
    agent = Agent(**saved["state"]["dims"])
    restore({"agent": agent}, saved)
    return agent, task, args


# --------------------------------------------------------------------------------------- REPORTS
def group_metrics(rewards: Tensor, answers: dict[str, Tensor]) -> dict[str, float | None]:
    """What a batch of answers looks like: rewards [P, G], and the answers from sample().

    reward_std is the mean over the groups of their standard deviations, whatever --scale-rewards
    is. A mean length is None where there is no such answer.
    """
    lengths = answers["mask"].sum(1)
    ended = (answers["tokens"] == END_ID).any(1)
    right = rewards == 1
    equal = rewards.amax(1) == rewards.amin(1)

    def mean_length(where: Tensor) -> float | None:
        return lengths[where].float().mean().item() if where.any() else None

    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),
        "frac_right": right.float().mean().item(),
        "frac_reward_zero_std": equal.float().mean().item(),
        "frac_all_right": right.all(1).float().mean().item(),
        "frac_all_wrong": (~right).all(1).float().mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": (~ended).float().mean().item(),
        "completions/mean_length": lengths.float().mean().item(),
        "completions/mean_terminated_length": mean_length(ended),
        "completions/mean_right_length": mean_length(right.flatten()),
        "completions/mean_wrong_length": mean_length(~right.flatten()),
    }


LOSSES = ("policy_loss", "grad_norm", "kl_after_update")  # get the prefix losses/


def show(when: str, found: dict, k: int) -> None:
    """Print what evaluate() found, and a few greedy answers."""
    passes = f"pass@1 (greedy) {found['pass@1']:.1%}, pass@{k} {found['pass@k']:.1%}"
    lines = [f"{when}: {passes} of held-out questions", *found["examples"]]
    tqdm.write("\n  ".join(lines))  # print() would tear the progress bar


# ----------------------------------------------------------------------------------------- FLAGS
RESUME_FLAGS = ("threads",)  # go beside --resume
EVALUATION_FLAGS = ("eval_prompts", "pass_k")  # go beside --evaluate
LIMITS = {
    (0, 2**31 - 1): ["seed"],
    (1, 10**12): ["total_timesteps"],
    (0, 10**9): ["warmup_steps", "ref_sync"],
    (1, 10**9): ["checkpoint_every", "eval_prompts"],
    (1, 2**16): ["num_prompts", "num_iterations"],
    (2, 2**16): ["group_size"],
    (1, 2**11): ["pass_k"],
    (1, 2**10): ["threads"],
    (1e-3, 1e12): ["temperature"],
    (0, 1e12): ["kl_coef", "weight_decay"],
    (1e-12, 1e12): ["clip_low", "clip_high", "learning_rate"],
    (1e-12, math.inf): ["max_grad_norm"],
}


def parse_args(argv: list[str]) -> Args:
    """The command line. Where it is wrong, tyro says so in a box and exits with code 2."""
    given = given_flags(argv)
    return complete_args(tyro.cli(Args, args=argv), given)


def check_args(args: Args, task: Task) -> Args:
    """A copy of the flags, to work with: what was None is as the task says. Raises UserError."""
    args = replace(args, task=task.name)
    for name in ("total_timesteps", "warmup_steps"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(task, name))
    args = check_types(args)
    for (low, high), names in LIMITS.items():
        for name in names:
            value = getattr(args, name)
            if value is None or not low <= value <= high:  # NaN is in no interval
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be between {low} and {high}, not {value}")
    if args.batch_size > 10**6:
        size = f"a batch of {args.batch_size} answers"
        raise UserError(f"{size} is too large; lower --num-prompts or --group-size")
    if args.ratio != "token" and args.loss_agg != "grpo":
        what = "one ratio per answer, so the loss is the mean of answers; leave --loss-agg out"
        raise UserError(f"--ratio {args.ratio} gives {what}")
    if args.warmup_steps > 0 and task.demonstrate is None:
        what = f"the task {task.name} demonstrates nothing; Task.demonstrate is missing"
        raise UserError(f"--warmup-steps: {what}")
    return args


def choose_task(args: Args, task: Task | None) -> Task:
    """`task`, or the one that args.task names, checked. Raises UserError."""
    if task is None:
        if args.task not in list(TASKS):  # a list: what is given may have no hash
            names = " or ".join(TASKS)
            what = "hand a task of your own to train() or load_agent()"
            raise UserError(f"--task must be {names}, not {args.task!r:.80}; {what}")
        task = TASKS[args.task]()
    if getattr(task, "_fields", None) != Task._fields:
        raise UserError(f"a task of your own must be a Task, not {task!r:.80}")
    if not isinstance(task.name, str):
        raise UserError(f"Task.name must be a string, not {task.name!r}")
    if args.resume is not None and args.task != task.name:
        raise UserError(f"{args.resume} is a run on the task {args.task!r}, not {task.name!r}")
    return task


def check_task(task: Task, args: Args, saved: dict | None) -> None:
    """Raises UserError, with field and question, where the task cannot be learned or evaluated.

    Tries verify on the shortest answer. Before a warm-up it also tries demonstrate on a batch of
    questions, and verify on the first answer of these.
    saved: the checkpoint of a run that goes on, or is evaluated, with this task.
    """
    purposes = {"vocab": "every text", "prompts": "training", "held_out": "the evaluation"}
    for field, purpose in purposes.items():
        given = getattr(task, field)
        if not isinstance(given, Sequence | np.ndarray) or len(given) == 0:
            raise UserError(f"Task.{field} must be a list and not be empty: {purpose} needs it")
    vocab = set()
    for word in task.vocab:
        if not isinstance(word, str) or word in vocab:
            raise UserError(f"Task.vocab must have strings only, each once, but has {word!r}")
        vocab.add(word)
    if task.vocab[END_ID] != END:
        raise UserError(f"Task.vocab must begin with {END!r}, not with {task.vocab[END_ID]!r}")
    try:
        fits = 1 <= operator.index(task.max_length) <= 2**16
    except TypeError:
        fits = False
    if not fits:
        what = f"a whole number between 1 and {2**16}, not {task.max_length!r}"
        raise UserError(f"Task.max_length must be {what}")
    for field in ("prompts", "held_out"):
        for question in getattr(task, field):
            count = check_words(f"Task.{field}: the question", question, vocab)
            length = len(task.prompts[0])
            if not 0 < count == length:
                what = f"the question {question} has {count} words, the first {length}"
                fix = "all need one length above 0: fill up with a blank word"
                raise UserError(f"Task.{field}: {what}; {fix}")

    try:
        tries = [(task.prompts[0], [END]), (task.held_out[0], [END])]
        if saved is None and args.warmup_steps > 0:
            rng = random.Random(0)
            shown = [demonstration(task, question, vocab, rng) for question in task.prompts[:256]]
            tries.append((task.prompts[0], shown[0]))  # one is enough: a verifier may be slow
        for question, answer in tries:
            reward_of(task, question, answer)
    except (RuntimeError, NonFiniteError) as reason:
        raise UserError(str(reason)) from reason

    if saved is None:
        learned = set(map(tuple, task.prompts))
        shared = sum(tuple(question) in learned for question in task.held_out)
        if shared:
            what = f"{shared} of {len(task.held_out)} questions in Task.held_out"
            what += " are in Task.prompts too, where they may be learned by heart"
            print(f"note: {what}", file=sys.stderr)
    else:
        state = saved["state"]
        if (state["vocab"], state["dims"]) != (list(task.vocab), agent_dims(task)):
            what = "words, another order of them, or other lengths of questions and answers"
            raise UserError(f"{args.resume} is a run on a Task with other {what}")


def check_words(what: str, words: list[str], vocab: set[str]) -> int:
    """How many words these are. Raises UserError unless all are in the vocabulary."""
    try:
        count = len(words)
        unknown = set(words) - vocab
    except TypeError as reason:
        raise UserError(f"{what} {words!r} is not a list of words: {reason}") from reason
    if unknown:
        missing = ", ".join(sorted(map(repr, unknown)))
        raise UserError(f"{what} {words} has what is not in Task.vocab: {missing}")
    return count


@torch_threads(1)
def evaluate_run(args: Args) -> None:
    """--evaluate: evaluate the run of a folder, print it, and write evaluation.json there."""
    path = Path(args.evaluate).expanduser().absolute()
    agent, task, trained = load_agent(args.evaluate)
    options = {name: getattr(args, name) for name in EVALUATION_FLAGS}
    trained = check_args(replace(trained, **options), task)
    torch.set_num_threads(trained.threads)
    found = evaluate(agent, task, trained)
    result = {
        "seed": trained.seed,
        "objective": trained.objective,
        "k": trained.pass_k,
        "pass@1": found["pass@1"],
        "pass@k": found["pass@k"],
        "eval_return_mean": float(np.mean(found["returns"])),
        "eval_return_std": float(np.std(found["returns"])),
        "returns": found["returns"],
    }
    show(args.evaluate, found, trained.pass_k)
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
