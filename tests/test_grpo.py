"""grpo_toy.py: its mathematics against hand-computed values, exact derivatives and TRL; its tasks;
what it promises about its runs; that it learns; and what happens when somebody edits it."""

import contextlib
import csv
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMIT, rounding
from torch.nn.utils import parameters_to_vector

import grpo_toy as grpo
from grpo_toy import BLANK, END, Agent, Args, Task, group_advantages, grpo_loss, kl_terms, score

ROOT = Path(grpo.__file__).parent
SCRIPT = Path(grpo.__file__)
EXPECTED = json.loads((ROOT / "tests/trl_expected.json").read_text())
BASELINES = ("group", "batch", "leave-one-out", "none")
SCALES = ("group", "batch", "none")
RATIOS = ("token", "sequence", "sequence-mean")
AGGREGATIONS = ("grpo", "dr_grpo", "dapo")
ESTIMATORS = ("k2", "k3", "k3-corrected", "exact")
COMBINATIONS = [
    *(("token", loss_agg) for loss_agg in AGGREGATIONS),
    ("sequence", "grpo"),
    ("sequence-mean", "grpo"),
]


def example() -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The example that TRL was given: log-probabilities under new weights [12, 6, 5], the batch
    that grpo_loss takes, and rewards [3, 4]. Answers of one to six tokens, one without an end."""
    data = {name: torch.tensor(x) for name, x in EXPECTED["example"].items()}
    mask = torch.arange(data["tokens"].shape[1]) < data["lengths"].unsqueeze(1)
    batch = {
        "tokens": data["tokens"],
        "mask": mask,
        "log_probs": data["old"],
        "ref_log_probs": data["reference"],
        "advantages": group_advantages(data["rewards"], "group", "group").flatten(),
    }
    return data["new"], batch, data["rewards"]


# ------------------------------------------------------------------------------------- advantages
def check_advantages(module) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.5, 0.0]])
    by_hand = {
        "group": [[0.75, -0.25, -0.25, -0.25], [0.0, 0.5, 0.0, -0.5]],
        "leave-one-out": [[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0, 2 / 3, 0.0, -2 / 3]],
        "batch": [[0.625, -0.375, -0.375, -0.375], [0.125, 0.625, 0.125, -0.375]],
        "none": rewards.tolist(),
    }
    spreads = {
        "group": torch.tensor([[0.5], [math.sqrt(0.5 / 3)]]) + 1e-4,
        "batch": math.sqrt(1.375 / 7) + 1e-4,
        "none": 1.0,
    }
    for baseline in BASELINES:
        for scale in SCALES:
            expected = torch.tensor(by_hand[baseline]) / spreads[scale]
            found = module.group_advantages(rewards, baseline, scale)
            torch.testing.assert_close(found, expected)


def test_group_statistics_by_hand():
    check_advantages(grpo)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_a_group_of_equal_rewards_has_no_advantage_exactly(size, reward):
    """Although the mean of equal numbers may be off by a rounding error, divided by 1e-4."""
    rewards = torch.full((2, size), reward)
    rewards[1, 0] = 0.7
    for scale in SCALES:
        for baseline in ("group", "leave-one-out"):
            advantages = group_advantages(rewards, baseline, scale)
            assert advantages[0].tolist() == [0.0] * size
            assert advantages[1].abs().min() > 0.01
        equal = rewards[:1]
        assert group_advantages(equal, "batch", scale).tolist() == [[0.0] * size]
        assert group_advantages(equal, "none", scale).tolist() == equal.tolist()  # nor any spread


def test_the_mean_of_equal_rewards_is_off_where_the_test_above_needs_it():
    rewards = [torch.full((size,), reward) for size in (2, 3, 7, 16) for reward in (0.1, 1 / 3)]
    assert any((x - x.mean()).abs().max() > 0 for x in rewards)


def test_grpo_without_std_is_leave_one_out_times_a_constant():
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    theirs = group_advantages(rewards, "leave-one-out", "none") * 7 / 8
    torch.testing.assert_close(group_advantages(rewards, "group", "none"), theirs)
    others = (rewards.sum(1, keepdim=True) - rewards) / 7  # and leave-one-out is what it is called
    expected = rewards - others
    torch.testing.assert_close(group_advantages(rewards, "leave-one-out", "none"), expected)


# --------------------------------------------------------------------------------------- the loss
def loss_by_hand(args: Args, new: torch.Tensor, batch: dict, max_length: int) -> float:
    """The loss in plain Python, token by token, in double precision."""
    means, total, tokens = [], 0.0, 0
    for i in range(len(batch["tokens"])):
        length = int(batch["mask"][i].sum())
        advantage = batch["advantages"][i].item()
        chosen = batch["tokens"][i, :length].tolist()
        p = [float(new[i, t, word]) for t, word in enumerate(chosen)]
        old = [float(batch["log_probs"][i, t, word]) for t, word in enumerate(chosen)]
        ref = [float(batch["ref_log_probs"][i, t, word]) for t, word in enumerate(chosen)]
        logs = [a - b for a, b in zip(p, old, strict=True)]
        ratios = [math.exp(x) for x in logs]
        if args.ratio == "sequence":
            ratios = [math.exp(sum(logs))] * length
        if args.ratio == "sequence-mean":
            ratios = [math.exp(sum(logs) / length)] * length
        terms = []
        for t, ratio in enumerate(ratios):
            clipped = min(max(ratio, 1 - args.clip_low), 1 + args.clip_high)
            kl = math.exp(ref[t] - p[t]) - (ref[t] - p[t]) - 1
            if args.kl_estimator == "k2":
                kl = (p[t] - ref[t]) ** 2 / 2
            if args.kl_estimator == "k3-corrected":
                kl *= math.exp(logs[t])
            if args.kl_estimator == "exact":
                pairs = zip(new[i, t].tolist(), batch["ref_log_probs"][i, t].tolist(), strict=True)
                kl = sum(math.exp(a) * (a - b) for a, b in pairs)
            terms.append(min(ratio * advantage, clipped * advantage) - args.kl_coef * kl)
        means.append(sum(terms) / length)
        total += sum(terms)
        tokens += length
    if args.loss_agg == "grpo":
        return -sum(means) / len(means)
    if args.loss_agg == "dr_grpo":
        return -total / (len(means) * max_length)
    return -total / tokens


def check_loss(module, ratio="token", loss_agg="grpo", kl_estimator="k3", clip_high=0.28) -> None:
    """The loss of a module like grpo_toy.py against loss_by_hand."""
    new, batch, _ = example()
    variant = {"ratio": ratio, "loss_agg": loss_agg, "kl_estimator": kl_estimator}
    args = Args(**variant, kl_coef=0.3, clip_high=clip_high)
    loss, metrics = module.grpo_loss(new, batch, 9, args)
    assert loss.item() == pytest.approx(loss_by_hand(args, new, batch, 9), abs=1e-6)
    low, high = (metrics[f"clip_ratio/{side}_mean"].item() for side in ("low", "high"))
    assert low > 0 and high > 0  # both sides were tried
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(low + high)
    assert metrics["policy_loss"].item() == loss.item()
    batch["advantages"] = torch.zeros(len(batch["advantages"]))  # nothing but the KL is left
    tokens = Args(loss_agg="dapo", kl_estimator=kl_estimator, kl_coef=1.0)
    kl = loss_by_hand(tokens, new, batch, 9)
    assert metrics["kl"].item() == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("ratio", "loss_agg"), COMBINATIONS)
def test_every_variant_of_the_loss_against_plain_python(ratio, loss_agg, estimator, clip_high):
    check_loss(grpo, ratio, loss_agg, estimator, clip_high)


def test_one_answer_of_two_tokens_in_numbers():
    """A = 2, ratios 1.5 and 0.5: eq. 3 takes 1.2 and 0.5; their geometric mean is sqrt(0.75)."""
    old = torch.full((1, 2, 2), 0.5).log()
    new = torch.tensor([[[0.75, 0.25], [0.75, 0.25]]]).log()
    batch = {
        "tokens": torch.tensor([[0, 1]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "log_probs": old,
        "ref_log_probs": old,
        "advantages": torch.tensor([2.0]),
    }
    expected = {
        ("token", "grpo"): 1.7,
        ("token", "dr_grpo"): 3.4 / 8,  # an answer may have 8 tokens
        ("token", "dapo"): 1.7,
        ("sequence", "grpo"): 1.5,  # 0.75 is below 0.8, but a good answer is clipped above only
        ("sequence-mean", "grpo"): 2 * math.sqrt(0.75),
    }
    for (ratio, loss_agg), objective in expected.items():
        args = Args(ratio=ratio, loss_agg=loss_agg, kl_coef=0.0)
        assert -grpo_loss(new, batch, 8, args)[0].item() == pytest.approx(objective)
    bad = batch | {"advantages": torch.tensor([-2.0])}
    loss, _ = grpo_loss(new, bad, 8, Args(ratio="sequence", kl_coef=0.0))
    assert loss.item() == pytest.approx(1.6)
    loss, _ = grpo_loss(new, bad, 8, Args(kl_coef=0.0))
    assert loss.item() == pytest.approx((3.0 + 1.6) / 2)
    _, metrics = grpo_loss(new, batch, 8, Args(kl_coef=0.0))
    kl = [math.log(1.5), math.log(0.5)]
    by_hand = {
        "kl_k1": sum(kl) / 2,
        "kl": sum(math.exp(-x) + x - 1 for x in kl) / 2,
        "kl_exact": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "entropy": -0.75 * math.log(0.75) - 0.25 * math.log(0.25),
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.5,
        "clip_ratio/region_mean": 0.5,
    }
    assert {name: metrics[name].item() for name in by_hand} == pytest.approx(by_hand)


def far_apart(logratio: float, advantage: float) -> tuple[torch.Tensor, dict]:
    """Four answers of one token whose log-ratio is this, under the old policy and the reference."""
    likely = torch.tensor([-1e-3, -2.0, -3.0])
    unlikely = likely + torch.tensor([-abs(logratio), 0.0, 0.0])
    new, old = (likely, unlikely) if logratio > 0 else (unlikely, likely)
    batch = {
        "tokens": torch.zeros(4, 1, dtype=torch.long),
        "mask": torch.ones(4, 1, dtype=torch.bool),
        "log_probs": old.expand(4, 1, 3),
        "ref_log_probs": old.expand(4, 1, 3),
        "advantages": torch.full((4,), advantage),
    }
    return new.repeat(4, 1, 1).requires_grad_(), batch


def check_far_apart(module) -> None:
    """Where a ratio has left float32, every metric is finite, and the gradient is 0 where the clip
    is flat: in exact arithmetic on the side of the advantage, here beyond e^40 on both."""
    for size in (89.0, 200.0, 1e4):
        for logratio in (size, -size):
            for advantage in (1.0, -1.0):
                for ratio, loss_agg in COMBINATIONS:
                    new, batch = far_apart(logratio, advantage)
                    args = Args(ratio=ratio, loss_agg=loss_agg, kl_coef=0.0)
                    loss, metrics = module.grpo_loss(new, batch, 1, args)
                    (gradient,) = torch.autograd.grad(loss, new)
                    assert loss.isfinite() and all(x.isfinite() for x in metrics.values())
                    flat = logratio > 0 or advantage < 0
                    assert gradient.isfinite().all()
                    assert not flat or gradient.abs().max() == 0


def check_kl_far_apart(module) -> None:
    """The same of the KL estimates; a log-ratio of old and reference each, in all combinations."""
    for size in (89.0, 200.0, 1e4):
        for to_old in (size, 0.0, -size):
            for to_reference in (size, 0.0, -size):
                new = torch.tensor([-2e4], requires_grad=True)
                old = torch.tensor([-2e4 - to_old])
                reference = torch.tensor([-2e4 - to_reference])
                terms = module.kl_terms(new, old, reference)
                for name, term in terms.items():
                    (gradient,) = torch.autograd.grad(term, new, retain_graph=True)
                    assert term.isfinite() and gradient.isfinite(), (name, to_old, to_reference)
                    if to_reference < 0 and name.startswith("k3") and to_old >= 0:
                        assert gradient == 0 or (name, to_old) == ("k3-corrected", 0.0)


def test_where_the_ratio_has_left_float32_everything_is_finite_and_the_flat_side_has_no_gradient():
    check_far_apart(grpo)
    check_kl_far_apart(grpo)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_an_update_from_far_apart_is_finite(estimator, advantage):
    for logratio in (89.0, 200.0, 1e4, -89.0, -200.0, -1e4):
        new, batch = far_apart(logratio, advantage)
        loss, metrics = grpo_loss(new, batch, 1, Args(kl_estimator=estimator, kl_coef=0.07))
        (gradient,) = torch.autograd.grad(loss, new)
        assert loss.isfinite() and gradient.isfinite().all()
        assert all(x.isfinite() for x in metrics.values())


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_stands_after_the_end_changes_nothing(ratio):
    new, batch, _ = example()
    args = Args(ratio=ratio, kl_coef=0.3)
    outside = ~batch["mask"]
    loss, metrics = grpo_loss(new, batch, 6, args)
    noise = 200 * torch.randn(new.shape, generator=torch.Generator().manual_seed(1))
    noise = noise.log_softmax(-1)  # exp() of a difference overflows
    where = outside.unsqueeze(-1)
    other = batch | {
        "log_probs": torch.where(where, noise, batch["log_probs"]),
        "ref_log_probs": torch.where(where, noise, batch["ref_log_probs"]),
        "tokens": torch.where(outside, 3, batch["tokens"]),
    }
    changed = torch.where(where, noise.flip(0), new).requires_grad_()
    same, same_metrics = grpo_loss(changed, other, 6, args)
    assert outside.sum() > 10 and same.item() == loss.item() and metrics == same_metrics
    (gradient,) = torch.autograd.grad(same, changed)
    assert gradient[outside].abs().max() == 0 and gradient[batch["mask"]].abs().max() > 0


@pytest.mark.parametrize("index", range(len(EXPECTED["cases"])))
def test_advantages_and_loss_are_those_of_trl(index):
    """Of the installed TRL where there is one, else of the one that trl_expected.json names."""
    case = EXPECTED["cases"][index]
    new, batch, rewards = example()
    args = Args(**case["flags"])
    batch["advantages"] = group_advantages(rewards, args.baseline, args.scale_rewards).flatten()
    loss, _ = grpo_loss(new, batch, batch["tokens"].shape[1], args)
    if importlib.util.find_spec("trl"):
        from benchmark.trl_reference import reference

        case = reference(EXPECTED["example"], case["flags"])
    expected = torch.tensor(case["advantages"])
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_the_table_of_trl_has_every_variant_that_trl_has():
    flags = [Args(**case["flags"]) for case in EXPECTED["cases"]]
    theirs = {*(("token", loss_agg) for loss_agg in AGGREGATIONS), ("sequence-mean", "grpo")}
    assert {(a.ratio, a.loss_agg) for a in flags} == theirs
    assert {a.scale_rewards for a in flags} == set(SCALES)
    assert {a.kl_estimator for a in flags if a.kl_coef} == {"k3", "k3-corrected"}
    assert any(a.clip_high != a.clip_low for a in flags)
    assert EXPECTED["versions"].keys() == {"trl", "transformers", "torch"}


# ---------------------------------------------------------------------------------- KL estimators
def test_gradients_of_the_kl_estimators_on_a_categorical():
    """In expectation over the tokens of the policy that sampled them: a sum here, so exact."""
    rng = torch.Generator().manual_seed(0)
    start, moved, reference = torch.randn(3, 7, generator=rng, dtype=torch.float64)
    reference = reference.log_softmax(0)
    old = start.log_softmax(0)

    def forward(new):
        return (reference.exp() * (reference - new)).sum()

    def reverse(new):
        return (new.exp() * (new - reference)).sum()

    def expected(name):
        return lambda new: (old.exp() * kl_terms(new, old, reference)[name]).sum()

    def gradient(logits, function):
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]

    assert gradient(start, expected("k1")).abs().max() < 1e-12
    for name, kl in (("k2", reverse), ("k3", forward), ("k3-corrected", reverse)):
        torch.testing.assert_close(gradient(start, expected(name)), gradient(start, kl))
    assert (gradient(start, forward) - gradient(start, reverse)).abs().max() > 0.01
    # once the policy has left the one that sampled, only the corrected one is still right
    torch.testing.assert_close(gradient(moved, expected("k3-corrected")), gradient(moved, reverse))
    for name, kl in (("k2", reverse), ("k3", forward)):
        assert (gradient(moved, expected(name)) - gradient(moved, kl)).abs().max() > 0.01
    # as measurements on the policy's own samples all but k2 are unbiased
    for name in ("k1", "k3", "k3-corrected"):
        torch.testing.assert_close(expected(name)(old), reverse(old))


def test_the_exact_kl_and_the_entropy_are_those_of_torch_distributions():
    new, batch, _ = example()
    p, q = (torch.distributions.Categorical(logits=x) for x in (batch["log_probs"], new))
    kl = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(grpo.kl_between(batch["log_probs"], new), kl)
    torch.testing.assert_close(grpo.entropy_of(new), q.entropy())


# ------------------------------------------------------------------------------------- the policy
TASKS = {name: make() for name, make in grpo.TASKS.items()}
QUESTIONS = {"sort": "740d87a3df226edb", "countdown": "048dc3aa78201a52"}  # hashes of all of them


def count_task(**changes) -> Task:
    """As many "a" as the question's digit says: seconds to learn, and small."""
    digits = [str(n) for n in range(1, 7)]

    def verify(prompt, answer):
        wanted = ["a"] * int(prompt[0]) + [END]
        right = sum(a == w for a, w in zip(answer, wanted, strict=False))
        return right / max(len(wanted), len(answer))

    task = Task(
        name="count",
        vocab=[END, "a", *"xyz", *digits],
        prompts=[[digit, x] for digit in digits for x in "xy"],
        held_out=[[digit, "z"] for digit in digits],
        max_length=8,
        verify=verify,
        total_timesteps=20_000,
    )
    return task._replace(**changes)


def policy(task: Task = TASKS["sort"], seed: int = 0, module=grpo) -> Agent:
    """An untrained agent whose words are far from equally likely."""
    torch.manual_seed(seed)
    agent = module.Agent(len(task.vocab), len(task.prompts[0]) + task.max_length)
    with torch.no_grad():
        agent.logits.weight *= 20
    return agent


def written(agent, task, questions=8, answers=16, temperature=1.0, module=grpo) -> dict:
    """Questions, and answers to them, as sample() writes them."""
    prompts = task.encode(task.prompts[:questions])
    rng = torch.Generator().manual_seed(3)
    sampled = module.sample(agent, prompts, answers, task.max_length, temperature, rng)
    return {"prompts": prompts} | sampled


def test_the_first_policy_is_nearly_uniform():
    agent, prompts = Agent(12, 12), TASKS["sort"].encode(TASKS["sort"].prompts[:64])
    with torch.no_grad():
        log_probs = agent(prompts)[0].log_softmax(-1)
    assert grpo.entropy_of(log_probs).mean() > math.log(12) - 0.05


def test_the_agent_has_about_a_hundred_thousand_weights():
    for task in TASKS.values():
        count = sum(w.numel() for w in policy(task).parameters())
        assert 90_000 < count < 120_000


def test_the_mask_ends_with_the_first_end_token():
    task = count_task()
    batch = written(policy(task), task, questions=12, answers=64)
    lengths = set()
    for tokens, mask in zip(batch["tokens"].tolist(), batch["mask"].tolist(), strict=True):
        length = sum(mask)
        lengths.add(length)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert 0 not in tokens[: length - 1] and set(tokens[length:]) <= {0}
        assert tokens[length - 1] == 0 or length == task.max_length
    assert len(lengths) > 4 and task.max_length in lengths
    words = task.decode(batch["tokens"], batch["mask"])
    assert all(END not in answer[:-1] for answer in words)
    assert sum(answer[-1] != END for answer in words) > 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_cache_changes_nothing_and_what_is_scored_is_what_was_sampled_from(temperature):
    task = count_task()
    agent = policy(task)
    batch = written(agent, task, temperature=temperature)
    scored = score(agent, batch["prompts"], batch["tokens"], 16, temperature)
    mask = batch["mask"]
    allowed = {"atol": rounding(agent.logits.in_features, scored[mask].abs().max()), "rtol": 0}
    torch.testing.assert_close(scored[mask], batch["log_probs"][mask], **allowed)
    # and without any cache: one pass over questions and answers
    whole = torch.cat([batch["prompts"].repeat_interleave(16, 0), batch["tokens"]], 1)
    logits = agent(whole)[0][:, batch["prompts"].shape[1] - 1 : -1]
    log_probs = agent.policy(logits, temperature)
    torch.testing.assert_close(log_probs[mask], scored[mask], **allowed)
    torch.testing.assert_close(log_probs, (logits / temperature).log_softmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_and_greedy_its_maximum(temperature):
    task = count_task()
    agent = policy(task)
    batch = written(agent, task, questions=1, answers=20_000, temperature=temperature)
    share = torch.bincount(batch["tokens"][:, 0], minlength=len(task.vocab)) / 20_000
    assert (share - batch["log_probs"][0, 0].exp()).abs().max() < 0.015
    greedy = grpo.sample(agent, batch["prompts"], 1, task.max_length, 1.0)
    best = greedy["log_probs"].argmax(-1)
    assert greedy["tokens"][greedy["mask"]].equal(best[greedy["mask"]])


def test_the_agent_is_torchs_pre_norm_transformer_with_positions():
    agent, tokens = Agent(7, 9), torch.randint(0, 7, (3, 9))
    x = agent.word(tokens) + agent.position.weight
    later = torch.full((9, 9), -math.inf).triu(1)
    names = {"self_attn.in_proj_": "qkv", "self_attn.out_proj.": "out", "linear1.": "up"}
    names |= {"linear2.": "down", "norm1.": "norm1", "norm2.": "norm2"}
    for block in agent.blocks:
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        peer = torch.nn.TransformerEncoderLayer(64, 2, 256, **options)
        state = {}
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                state[theirs + part] = getattr(getattr(block, ours), part)
        peer.load_state_dict(state)
        x = peer(x, src_mask=later)
    expected = agent.logits(agent.norm(x)).log_softmax(-1)
    torch.testing.assert_close(agent(tokens)[0].log_softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_no_token_sees_what_follows_it():
    agent = policy()
    tokens = torch.randint(0, 12, (4, 9))
    before = agent(tokens)[0]
    tokens[:, 5] = (tokens[:, 5] + 1) % 12
    after = agent(tokens)[0]
    assert before[:, :5].equal(after[:, :5]) and not before[:, 5:].equal(after[:, 5:])


def random_rewards(groups: int, size: int) -> torch.Tensor:
    return torch.rand(groups, size, generator=torch.Generator().manual_seed(5))


def equal_rewards(groups: int, size: int) -> torch.Tensor:
    return torch.full((groups, size), 0.1)


def mixed_rewards(groups: int, size: int) -> torch.Tensor:
    return torch.cat([random_rewards(1, size), equal_rewards(groups - 1, size)])


def first_step(rewards: torch.Tensor, **flags) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Log-ratios of tokens, loss and gradient in the first step on 8 x 16 answers.

    The log-ratios are in units of what rounding may make of them.
    """
    task = count_task()
    args = Args(**{"kl_coef": 0.0} | flags)
    agent = policy(task)
    batch = written(agent, task)
    advantages = group_advantages(rewards, args.baseline, args.scale_rewards)
    reference = score(policy(task, seed=1), batch["prompts"], batch["tokens"], 16, 1.0)
    batch |= {"advantages": advantages.flatten(), "ref_log_probs": reference.detach()}
    log_probs = score(agent, batch["prompts"], batch["tokens"], 16, args.temperature)
    loss, _ = grpo_loss(log_probs, batch, task.max_length, args)
    gradient = parameters_to_vector(torch.autograd.grad(loss, list(agent.parameters())))
    tokens = batch["tokens"].unsqueeze(-1)
    logratio = (log_probs - batch["log_probs"]).gather(-1, tokens).squeeze(-1)
    allowed = rounding(agent.logits.in_features, log_probs[batch["mask"]].abs().max())
    return logratio[batch["mask"]] / allowed, loss.item(), gradient


@pytest.mark.parametrize("ratio", RATIOS)
def test_at_the_first_inner_step_the_ratio_is_1_and_the_gradient_is_not_0(ratio):
    rewards = random_rewards(8, 16)
    flags = {"ratio": ratio, "baseline": "none", "scale_rewards": "none"}
    logratios, loss, gradient = first_step(rewards, **flags)
    assert logratios.abs().max() < 1
    assert loss == pytest.approx(-rewards.mean().item(), abs=1e-4)  # so those of answers are 1 too
    assert gradient.norm() > 0.01


@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_groups_give_exactly_no_gradient(baseline, scale):
    flags = {"baseline": baseline, "scale_rewards": scale}
    *_, gradient = first_step(equal_rewards(8, 16), **flags)
    assert gradient.abs().max() == 0
    *_, gradient = first_step(equal_rewards(8, 16), **flags, kl_coef=0.1)
    assert gradient.norm() > 0.001  # the KL to another reference is still felt
    *_, gradient = first_step(mixed_rewards(8, 16), **flags)
    assert gradient.norm() > 0.001


def test_the_later_inner_steps_leave_ratio_1_and_are_clipped():
    task = count_task()
    args = Args(group_size=16, num_iterations=4, learning_rate=1e-2)
    agent = policy(task)
    batch = written(agent, task)
    batch["advantages"] = group_advantages(random_rewards(8, 16), "group", "group").flatten()
    batch["ref_log_probs"] = batch["log_probs"]
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    metrics = grpo.update(agent, optimizer, batch, task.max_length, args)
    assert metrics["clip_ratio/region_mean"] > 0.05 and metrics["kl_after_update"] > 1e-3
    moved = score(agent, batch["prompts"], batch["tokens"], 16, 1.0)
    p, q = (torch.distributions.Categorical(logits=x) for x in (batch["log_probs"], moved))
    kl = torch.distributions.kl_divergence(p, q)[batch["mask"]].mean()
    assert metrics["kl_after_update"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("limit", [0.1, math.inf])
def test_each_inner_step_follows_its_own_gradient_scaled_down_to_the_limit(limit):
    """Two steps on one batch are those of two calls with one step each."""
    task, weights, norms = count_task(), [], []
    for calls in ([1, 1], [2]):
        agent = policy(task)
        batch = written(agent, task)
        batch["advantages"] = group_advantages(random_rewards(8, 16), "group", "group").flatten()
        batch["ref_log_probs"] = batch["log_probs"]
        optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
        weights.append(parameters_to_vector(agent.parameters()).detach())
        for count in calls:
            args = Args(group_size=16, num_iterations=count, max_grad_norm=limit)
            metrics = grpo.update(agent, optimizer, batch, task.max_length, args)
            norms.append(metrics["grad_norm"])
            weights.append(parameters_to_vector(agent.parameters()).detach())
    start, first, second, start_again, both = weights
    assert start.equal(start_again) and norms[0] > 0.2  # as logged, before it is scaled down
    assert (first - start).norm().item() == pytest.approx(min(norms[0], limit), rel=1e-3)
    assert (second - first).abs().max() > 1e-3
    torch.testing.assert_close(both, second)
    mean = (norms[0] + norms[1]) / 2
    assert norms[2] == pytest.approx(mean, rel=1e-4)
    assert norms[1] != pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("anneal", [True, False])
def test_the_step_size_decays_to_0_where_it_is_told_to(anneal, monkeypatch, tmp_path):
    seen, update = [], grpo.update

    def watched(agent, optimizer, *rest):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["weight_decay"]))
        return update(agent, optimizer, *rest)

    monkeypatch.setattr(grpo, "update", watched)
    flags = {"learning_rate": 3e-3, "anneal_lr": anneal, "weight_decay": 0.02}
    run = tmp_path / "run"
    grpo.train(quick(total_timesteps=24, run_dir=str(run), **flags), count_task())
    expected = [3e-3, 2e-3, 1e-3] if anneal else [3e-3] * 3
    assert seen == [(pytest.approx(lr), 0.02) for lr in expected]
    logged = [float(row["charts/learning_rate"]) for row in rows(run / "metrics.csv")]
    assert logged == pytest.approx(expected)


# --------------------------------------------------------------------------- what is reported
def test_the_metrics_of_a_batch_by_hand():
    """Answers of 2, 3, 1 and 3 words; the second is cut off. The first of each group is right."""
    answers = {
        "tokens": torch.tensor([[5, 0, 0], [5, 6, 7], [0, 0, 0], [5, 6, 0]]),
        "mask": torch.arange(3) < torch.tensor([[2], [3], [1], [3]]),
    }
    found = grpo.group_metrics(torch.tensor([[1.0, 0.5], [1.0, 0.0]]), answers)
    by_hand = {
        "reward": 0.625,
        "reward_std": pytest.approx((0.125**0.5 + 0.5**0.5) / 2),  # of each group, with n - 1
        "frac_right": 0.5,
        "frac_all_right": 0.0,
        "frac_all_wrong": 0.0,
        "frac_reward_zero_std": 0.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_length": 2.25,
        "completions/mean_terminated_length": 2.0,
        "completions/mean_right_length": 1.5,
        "completions/mean_wrong_length": 3.0,
    }
    assert {name: found[name] for name in by_hand} == by_hand
    assert grpo.group_metrics(torch.zeros(2, 2), answers)["completions/mean_right_length"] is None


def test_pass_at_k_is_the_share_of_questions_with_a_right_answer():
    """Right is one of six greedy answers, and one of four samples for half of the questions."""
    rewards = iter([0, 1, 0, 0, 0, 0] + 3 * [0, 0, 0, 1] + 3 * [0, 0, 0, 0])
    task = count_task(verify=lambda prompt, answer: next(rewards))
    found = grpo.evaluate(policy(task), task, Args(pass_k=4))
    assert found["pass@1"] == pytest.approx(1 / 6) and found["pass@k"] == 0.5
    assert next(rewards, None) is None


# -------------------------------------------------------------------------------------- the tasks
def test_sort_is_verified_place_by_place():
    prompt = [*"3130", "_", "_"]
    for answer, reward in {
        ("0", "1", "3", "3", END): 1.0,
        ("0", "1", "3", "3"): 0.8,  # cut off
        ("0", "1", "3", "3", "3", END): 0.8,
        ("0", "1", "3", END): 0.6,
        (END,): 0.0,
        ("3", "3", "1", "0", END): 0.2,
        ("0", "1", "_", "3", END): 0.8,
    }.items():
        assert grpo.verify_sorted(prompt, list(answer)) == pytest.approx(reward)
    assert grpo.verify_sorted(["5", "5", *"____"], ["5", "5", END]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    {
        "3 + 7 * 2 <end>": 1,
        "( 3 + 7 * 2 ) <end>": 1,
        "2 * 7 + 3 <end>": 1,
        "( 3 ) + 7 * 2 <end>": 1,
        "( 3 + 7 ) * 2 <end>": 0.35,  # 20 is 3 off
        "3 + 7 + 2 <end>": 0.25,  # 12
        "7 * 3 + 2 <end>": 0.2,  # 23
        "7 * 3 * 2 <end>": 0,  # 42
        "3 + 7 * 2": 0,  # cut off before its end
        "17 <end>": 0,
        "7 + 7 + 3 <end>": 0,  # a number used twice, another not at all
        "3 + 7 * 2 + 3 <end>": 0,
        "3 + 7 + 7 * 2 - 7 <end>": 0,  # the value is right, a number is used too often
        "3 + 7 <end>": 0,
        "3 + 7 * 2 ) <end>": 0,  # something follows
        "3 + 7 * 2 + <end>": 0,
        "( 3 + 7 * 2 <end>": 0,
        ") 3 + 7 * 2 <end>": 0,
        "3 + * 7 2 <end>": 0,
        "3 7 2 <end>": 0,
        "3 ( 7 ) 2 <end>": 0,
        "- 3 + 7 * 2 <end>": 0,  # a sign is no operator between two numbers
        "( ) 3 + 7 * 2 <end>": 0,
        "<end>": 0,
        "( ( ( ( ( ( ( <end>": 0,
    }.items(),
)
def test_countdown_is_verified_exactly(answer, reward):
    assert grpo.verify_countdown(["3", "7", "2", "17"], answer.split()) == pytest.approx(reward)


def test_countdown_divides_exactly_and_never_by_zero():
    verify = grpo.verify_countdown
    assert verify(["4", "2", "2", "0"], ["4", "/", "(", "2", "-", "2", ")", END]) == 0.0
    assert verify(["1", "3", "3", "1"], ["1", "/", "3", "*", "3", END]) == 1.0
    assert verify(["7", "2", "1", "3"], ["7", "/", "2", "*", "1", END]) == 0.475  # 3.5, not 3
    assert grpo.value([*"8-3-2", END]) == 3 and grpo.value([*"8/4/2", END]) == 1  # from the left
    assert grpo.value([*"8-(3-2)", END]) == 7 and grpo.value([*"1/3", END]) == Fraction(1, 3)


def test_value_agrees_with_python_on_random_expressions():
    rng = random.Random(0)
    compared = 0
    for _ in range(2000):
        numbers = [str(rng.randint(1, 9)) for _ in range(3)]
        words = grpo.random_expression(numbers, rng)
        assert sorted(word for word in words if word.isdigit()) == sorted(numbers)
        code = " ".join(f"Fraction({word})" if word.isdigit() else word for word in words)
        with contextlib.suppress(ZeroDivisionError):
            expected = eval(code, {"Fraction": Fraction})
            assert grpo.value([*words, END]) == expected
            compared += 1
    assert compared > 1900


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_question_is_among_those_to_learn_from_in_any_order(name):
    task = TASKS[name]
    key = {"sort": sorted, "countdown": lambda prompt: (sorted(prompt[:3]), prompt[3])}[name]
    learned, held_out = ({str(key(q)) for q in qs} for qs in (task.prompts, task.held_out))
    assert not learned & held_out
    assert len(task.held_out) >= Args().eval_prompts and len(held_out) > 100
    assert 0.05 < len(task.held_out) / len(task.prompts) < 0.2
    assert {len(prompt) for prompt in task.prompts + task.held_out} == {len(task.prompts[0])}
    again = grpo.TASKS[name]()
    assert again.prompts == task.prompts and again.held_out == task.held_out


def test_every_question_has_a_right_answer_that_fits():
    sort = TASKS["sort"]
    for prompt in sort.prompts[:100]:
        answer = [*sorted(word for word in prompt if word != "_"), END]
        assert sort.verify(prompt, answer) == 1.0 and len(answer) < sort.max_length
    countdown, rng = TASKS["countdown"], random.Random(0)
    for prompt in countdown.held_out[:20]:
        found = [[*countdown.demonstrate(prompt, rng), END] for _ in range(3000)]
        assert max(map(len, found)) <= countdown.max_length
        assert any(countdown.verify(prompt, answer) == 1 for answer in found)


def test_the_warm_up_of_countdown_knows_nothing_of_the_target():
    countdown = TASKS["countdown"]
    prompt = countdown.prompts[0]
    other = [*prompt[:3], "0" if prompt[3] != "0" else "1"]
    shown = [countdown.demonstrate(question, random.Random(7)) for question in (prompt, other)]
    assert shown[0] == shown[1]


# --------------------------------------------------------------------------------------- the runs
DEFAULTS = {
    "num_prompts": 64,
    "group_size": 8,
    "temperature": 1.0,
    "baseline": "group",
    "scale_rewards": "group",
    "ratio": "token",
    "loss_agg": "grpo",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_coef": 0.07,
    "kl_estimator": "k3",
    "ref_sync": 0,
    "num_iterations": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.5,
    "anneal_lr": True,
    "max_grad_norm": 1.0,
    "eval_prompts": 500,
    "pass_k": 16,
}


def test_the_defaults_are_what_they_were():
    """With others, the numbers in benchmark/results/grpo would be out of date."""
    assert {name: getattr(Args(), name) for name in DEFAULTS} == DEFAULTS
    steps = {name: (task.total_timesteps, task.warmup_steps) for name, task in TASKS.items()}
    assert steps == {"sort": (200_000, 0), "countdown": (500_000, 500)}
    for name, task in TASKS.items():
        questions = json.dumps([task.prompts, task.held_out]).encode()
        assert hashlib.sha256(questions).hexdigest()[:16] == QUESTIONS[name]


def test_threads_may_stand_beside_resume(finished, main, tmp_path):
    shutil.copytree(finished["sort"], tmp_path / "run")
    code, _, err = main("--resume", "run", "--threads", 2)
    assert code == 0 and err[0].startswith("note: run goes on with threads 2;")


TINY = "--total-timesteps 96 --num-prompts 2 --group-size 4 --eval-prompts 8 --pass-k 2"
RUNS = {  # different in all that a checkpoint has to carry; 12 updates each
    "sort": f"{TINY} --checkpoint-every 5 --ref-sync 3",
    "countdown": f"{TINY} --task countdown --warmup-steps 2 --checkpoint-every 1 --seed 5 "
    "--ratio sequence",
}
CLOCKS = {"wall_seconds", "sps", "warmup_seconds"}
COLUMNS = """
    update global_step seed objective
    charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate
    losses/policy_loss losses/grad_norm losses/kl_after_update
    completions/mean_length completions/min_length completions/max_length
    completions/clipped_ratio completions/mean_terminated_length
    completions/mean_right_length completions/mean_wrong_length
    reward reward_std frac_reward_zero_std kl entropy
    clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean
    frac_right frac_all_right frac_all_wrong kl_exact kl_k1
"""
METRICS = COLUMNS.split()
SUMMARY = """
    task seed objective total_timesteps transitions wall_seconds sps last_100_return
    eval_return_mean eval_return_std eval_episodes diverged_at k warmup_seconds
    pass@1_before pass@k_before pass@1_after pass@k_after
"""


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plain(x):
    """Tensors as bytes, all the way down, so that == compares bits."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.numpy().tobytes()
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, list | tuple) else x


def without(row: dict, names: set) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def bits(run: Path) -> dict:
    """All that must come out the same: everything a run leaves, its clocks apart."""
    saved = grpo.load_checkpoint(run / "checkpoint.pt")
    (summary,) = json.loads((run / "summary.json").read_text())
    parts = ("agent", "reference", "optimizer", "prompt_rng", "answer_rng", "recent")
    return {
        "metrics": [without(row, {"charts/SPS"}) for row in rows(run / "metrics.csv")],
        "episodes": (run / "episodes.csv").read_bytes(),
        "state": plain(without(saved["state"], CLOCKS)),
        "summary": without(summary, CLOCKS),
        **{name: plain(saved[name]) for name in parts},
    }


def same_bits(run: Path, other: Path) -> None:
    ours, theirs = bits(run), bits(other)
    for name in ours:
        assert ours[name] == theirs[name], name


@pytest.fixture
def script():
    return grpo


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    """The folders of the runs in RUNS that nothing interrupted; look, do not touch."""
    folder = tmp_path_factory.mktemp("finished")
    for name, flags in RUNS.items():
        grpo.train(grpo.parse_args([*flags.split(), "--run-dir", str(folder / name)]))
    return {name: folder / name for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_another_process_leaves_the_same_bits(name, finished, tmp_path):
    command = [sys.executable, SCRIPT, *RUNS[name].split(), "--run-dir", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and done.stderr == ""
    same_bits(tmp_path / "run", finished[name])


def stop_in_update(monkeypatch, number: int) -> None:
    """Ctrl-C in the middle of the `number`-th update from here."""
    real, calls = grpo.update, []

    def update(*args):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(grpo, "update", update)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stops", [[2], [7], [4, 6], [8, 2, 2]])
def test_a_run_stopped_and_resumed_leaves_the_same_bits(
    name, stops, finished, main, monkeypatch, tmp_path
):
    command = [*RUNS[name].split(), "--run-dir", "run"]
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_in_update(patch, stop)
            code, _, err = main(*command)
        assert code == 130 and "--resume" in err[-1]
        command = ["--resume", "run"]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(*command)[0] == 0
    same_bits(tmp_path / "run", finished[name])


def test_a_run_killed_at_a_random_moment_and_resumed_leaves_the_same_bits(finished, tmp_path):
    run, rng = tmp_path / "run", random.Random(0)
    command = [*RUNS["countdown"].split(), "--run-dir", str(run)]
    for wanted in sorted(rng.sample(range(1, 7), 2)):  # early in 12 updates: none may escape
        quiet = {"stdout": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, SCRIPT, *command], **quiet)
        deadline = time.monotonic() + LIMIT
        metrics = run / "metrics.csv"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > wanted):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        command = ["--resume", str(run)]
    assert not (run / "summary.json").exists()
    assert subprocess.run([sys.executable, SCRIPT, *command], **quiet).returncode == 0
    same_bits(run, finished["countdown"])


def test_another_seed_is_another_run(finished, main, tmp_path):
    assert main(*RUNS["sort"].split(), "--seed", 2, "--run-dir", "run")[0] == 0
    ours, theirs = bits(tmp_path / "run"), bits(finished["sort"])
    assert all(ours[name] != theirs[name] for name in ("metrics", "episodes", "agent"))


@pytest.mark.parametrize("name", RUNS)
def test_everything_a_run_leaves(name, finished):
    run = finished[name]
    flags = grpo.parse_args(RUNS[name].split())
    left = ["checkpoint.pt", "config.json", "episodes.csv", "metrics.csv", "summary.json"]
    assert sorted(path.name for path in run.iterdir()) == left
    config = json.loads((run / "config.json").read_text())
    filled = {"warmup_steps": 2 if name == "countdown" else 0, "total_timesteps": 96}
    assert config["args"] == asdict(flags) | filled
    assert config["script"] == "grpo_toy" and config["versions"]["torch"] == torch.__version__

    metrics = rows(run / "metrics.csv")
    assert set(metrics[0]) == set(METRICS) and len(metrics) == 12
    for i, row in enumerate(metrics, 1):
        assert [row["update"], row["global_step"]] == [str(i), str(8 * i)]
        assert [row["seed"], row["objective"]] == [str(flags.seed), flags.objective]
        for metric in METRICS[4:]:
            if re.search("mean_(right|wrong|terminated)_length", metric):  # there may be none
                assert row[metric] == "" or 1 <= float(row[metric]) <= 8
            else:
                assert math.isfinite(float(row[metric])), (i, metric)
    assert len({row["losses/kl_after_update"] for row in metrics}) == 12

    episodes = rows(run / "episodes.csv")
    assert list(episodes[0]) == ["global_step", "seed", "objective", "return", "length"]
    assert [int(row["global_step"]) for row in episodes] == list(range(1, 97))
    for i, row in enumerate(metrics):
        batch = episodes[8 * i : 8 * i + 8]
        rewards = np.array([float(episode["return"]) for episode in batch])
        lengths = np.array([float(episode["length"]) for episode in batch])
        groups, right = rewards.reshape(2, 4), rewards == 1
        assert float(row["reward"]) == pytest.approx(rewards.mean())
        deviations = groups.std(1, ddof=1)
        assert float(row["reward_std"]) == pytest.approx(deviations.mean(), abs=1e-6)
        assert float(row["frac_reward_zero_std"]) == np.mean(groups.max(1) == groups.min(1))
        assert float(row["frac_right"]) == right.mean()
        assert float(row["frac_all_right"]) == (groups == 1).all(1).mean()
        assert float(row["frac_all_wrong"]) == (groups != 1).all(1).mean()
        assert float(row["completions/mean_length"]) == pytest.approx(lengths.mean())
        assert float(row["completions/min_length"]) == lengths.min()
        assert float(row["completions/max_length"]) == lengths.max()
        wrong = row["completions/mean_wrong_length"]
        assert wrong == "" if right.all() else float(wrong) == pytest.approx(lengths[~right].mean())

    (summary,) = json.loads((run / "summary.json").read_text())
    assert set(summary) == set(SUMMARY.split())
    assert next(iter(summary)) == "task" and summary["task"] == name
    assert summary["seed"] == flags.seed and summary["objective"] == flags.objective
    assert summary["total_timesteps"] == 96 and summary["eval_episodes"] == 8
    assert summary["transitions"] == sum(int(row["length"]) for row in episodes)
    assert all(0 <= summary[key] <= 1 for key in summary if key.startswith("pass"))
    assert summary["k"] == 2
    assert 0 < summary["warmup_seconds"] < summary["wall_seconds"] and summary["sps"] > 0


def test_what_a_person_sees(main, tmp_path):
    code, out, err = main(*TINY.split())
    assert code == 0 and err == []
    before, after = (i for i, x in enumerate(out) if re.match("(before|after) training: pass@1", x))
    for first in (before, after):
        for line in out[first + 1 : first + 5]:
            assert re.match(r"  [\d _]+ -> [\d _]*(<end>)?  \(reward \d\.\d\d\)$", line), line
    assert out[-1].startswith("sort, ") and "seed 1: evaluation" in out[-1]
    assert "runs/sort__grpo" in out[-1]


def test_evaluate_writes_evaluation_json_and_changes_nothing_else(finished, main, tmp_path):
    shutil.copytree(finished["sort"], tmp_path / "run")
    (summary,) = json.loads((finished["sort"] / "summary.json").read_text())
    results = []
    for prompts, k in ((8, 2), (20, 4), (20, 4)):
        code, out, err = main("--evaluate", "run", "--eval-prompts", prompts, "--pass-k", k)
        assert code == 0 and err == [] and out[0].startswith("run: pass@1 ")
        results += json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results[0]["pass@1"] == summary["pass@1_after"]
    assert results[0]["pass@k"] == summary["pass@k_after"]
    assert results[0]["eval_return_mean"] == pytest.approx(summary["eval_return_mean"])
    assert results[1] == results[2] and results[1]["returns"][:8] == results[0]["returns"]
    assert len(results[1]["returns"]) == 20 and results[1]["k"] == 4
    for path in finished["sort"].iterdir():
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()


def test_track_mirrors_a_run_offline(tmp_path):
    command = [sys.executable, SCRIPT, *TINY.split(), "--track", "--run-dir", "run"]
    environment = os.environ | {"WANDB_MODE": "offline"}
    quiet = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=LIMIT, **quiet)
    assert done.returncode == 0 and "evaluation" in done.stdout.splitlines()[-1]
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    mirrored = log.read_bytes()
    for name in ("charts/learning_rate", "losses/policy_loss", "completions/mean_length"):
        assert name.encode() in mirrored
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_task_of_ones_own_is_trained_resumed_and_evaluated(main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = count_task()
    args = Args(total_timesteps=96, num_prompts=2, group_size=4, pass_k=2, run_dir="run")
    args.checkpoint_every = 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_update(patch, 4)
        grpo.train(args, task)
    assert args.task == "sort"  # the caller's flags are not changed
    _, summary = grpo.train(Args(resume="run"), task)
    assert summary["task"] == "count" and summary["eval_episodes"] == 6
    agent, same_task, trained = grpo.load_agent("run", task)
    assert same_task is task
    assert grpo.evaluate(agent, task, trained)["pass@1"] == summary["pass@1_after"]
    for flag in ("--resume", "--evaluate"):
        code, _, (line,) = main(flag, "run")
        assert code == 2 and "'count'" in line
    with pytest.raises(grpo.UserError, match="on the task 'count', not 'sort'"):
        grpo.train(Args(resume="run"), TASKS["sort"])
    with pytest.raises(grpo.UserError, match="demonstrates nothing"):
        grpo.train(Args(warmup_steps=3), task)


def test_training_leaves_the_number_of_threads_as_it_was(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    flags = {"total_timesteps": 32, "num_prompts": 2, "group_size": 4, "pass_k": 2, "threads": 2}
    inside = []
    task = count_task()

    def verify(prompt, answer):
        inside.append(torch.get_num_threads())
        return task.verify(prompt, answer)

    try:
        torch.set_num_threads(3)
        grpo.train(Args(**flags, run_dir="a"), task._replace(verify=verify))
        assert set(inside) == {2} and torch.get_num_threads() == 3
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_in_update(patch, 2)
            grpo.train(Args(**flags, run_dir="b"), task)
        assert torch.get_num_threads() == 3
        with pytest.raises(grpo.UserError):
            grpo.train(Args(run_dir="b"), task)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------- errors
def tree(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


FLAGS = {
    "--task srt": "--task must be sort or countdown, not 'srt'",
    "--group-size 1": "--group-size must be between 2 and",
    "--num-prompts 0": "--num-prompts must be between 1 and",
    "--num-prompts 65536 --group-size 16": "a batch of 1048576 answers is too large",
    "--total-timesteps 0": "--total-timesteps must be between 1 and",
    "--num-iterations 0": "--num-iterations must be between 1 and",
    "--warmup-steps -1": "--warmup-steps must be between 0 and",
    "--warmup-steps 5": "the task sort demonstrates nothing",
    "--ref-sync -1": "--ref-sync must be between 0 and",
    "--threads 0": "--threads must be between 1 and",
    "--checkpoint-every 0": "--checkpoint-every must be between 1 and",
    "--eval-prompts 0": "--eval-prompts must be between 1 and",
    "--pass-k 0": "--pass-k must be between 1 and",
    f"--seed {2**31}": "--seed must be between 0 and 2147483647",
    "--ratio sequence --loss-agg dapo": "leave --loss-agg out",
    "--ratio sequence-mean --loss-agg dr_grpo": "leave --loss-agg out",
    "--resume nowhere": "nowhere is not a run folder",
    "--resume nowhere --seed 2": "--seed cannot stand beside --resume",
    "--evaluate nowhere": "nowhere is not a run folder",
    "--evaluate nowhere --group-size 2": "--group-size cannot stand beside --evaluate",
}
NUMBERS = {
    "temperature": ("0", "-1", "1e-40", "inf", "nan"),
    "learning-rate": ("0", "inf", "nan"),
    "clip-low": ("0", "-0.2", "nan"),
    "clip-high": ("0", "inf", "nan"),
    "kl-coef": ("-0.1", "inf", "nan"),
    "weight-decay": ("-0.1", "inf", "nan"),
    "max-grad-norm": ("0", "nan"),
}
for name, values in NUMBERS.items():
    for value in values:
        FLAGS[f"--{name} {value}"] = f"--{name} must be between"


@pytest.mark.parametrize("command", FLAGS)
def test_a_bad_flag_is_one_line_and_leaves_nothing(command, main, tmp_path):
    code, out, err = main(*command.split())
    assert code == 2 and out == [] and len(err) == 1
    assert err[0].startswith("error: ") and FLAGS[command] in err[0]
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", ["--ratio words", "--kl-estimator k1", "--learning-rat 1"])
def test_what_tyro_refuses_leaves_nothing(command, main, tmp_path):
    code, _, err = main(*command.split())
    assert code == 2 and command.split()[0] in " ".join(err)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--run-dir run", "run is not empty; choose another --run-dir, or --resume run"),
        ("--evaluate run --pass-k 0", "--pass-k must be between 1 and"),
        ("--evaluate run --eval-prompts 0", "--eval-prompts must be between 1 and"),
    ],
)
def test_a_folder_that_is_there_is_not_touched(command, said, finished, main, tmp_path):
    shutil.copytree(finished["sort"], tmp_path / "run")
    before = tree(tmp_path)
    code, out, err = main(*command.split())
    assert code == 2 and out == [] and len(err) == 1 and said in err[0]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_damaged_checkpoint_is_refused_by_name(flag, finished, main, tmp_path):
    shutil.copytree(finished["sort"], tmp_path / "run")
    data = bytearray((tmp_path / "run" / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "run" / "checkpoint.pt").write_bytes(data)
    code, _, err = main(flag, "run")
    assert code == 2 and "checkpoint.pt is truncated or damaged" in err[-1]


@pytest.mark.parametrize("source", ["rewards", "policy_loss", "weights"])
def test_a_number_that_is_none_stops_the_run_with_code_3_and_keeps_the_checkpoint(
    source, main, monkeypatch, tmp_path
):
    real, calls = grpo.update, []

    def update(agent, optimizer, batch, *rest):
        calls.append(0)
        if len(calls) == 4 and source == "policy_loss":
            batch = batch | {"advantages": batch["advantages"] * math.nan}
        metrics = real(agent, optimizer, batch, *rest)
        if len(calls) == 4 and source == "weights":
            with torch.no_grad():
                agent.logits.bias[0] = math.inf
        return metrics

    def verify(prompt, answer):
        spoiled = source == "rewards" and len(calls) == 3
        return math.nan if spoiled else grpo.verify_sorted(prompt, answer)

    sort = TASKS["sort"]._replace(verify=verify)
    monkeypatch.setattr(grpo, "update", update)
    monkeypatch.setitem(grpo.TASKS, "sort", lambda: sort)
    code, _, err = main(*TINY.split(), "--checkpoint-every", 2, "--run-dir", "run")
    said = f"{source} not finite in update 4$"
    if source == "rewards":
        said = r"sort, update 4: Task\.verify\(.*\) gave nan; a reward must"
    assert code == 3 and re.match(f"error: {said}", err[-1])
    saved = grpo.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    updates = 3 if source == "rewards" else 2  # no weights have changed before the rewards
    assert saved["state"]["updates"] == updates and not (tmp_path / "run" / "summary.json").exists()
    assert all(weights.isfinite().all() for weights in saved["agent"].values())


def test_help_explains_every_flag(main):
    code, out, err = main("--help")
    text = " ".join(line.strip(" │|") for line in out)
    assert code == 0 and err == []
    names = [field.name.replace("_", "-") for field in fields(Args)]
    starts = [re.search(rf"(?<![\w-])--{name}(?:, --no-{name})?(?![\w-])", text) for name in names]
    assert all(starts)
    ends = [*[match.start() for match in starts[1:]], len(text)]
    for name, match, end in zip(names, starts, ends, strict=True):
        assert len(text[match.end() : end].split()) >= 5, name


def test_what_is_around_the_run_is_the_text_of_the_other_scripts():
    ours, theirs = SCRIPT.read_text(), (ROOT / "ppo_cartpole.py").read_text()
    mark = re.compile("^# -+ AROUND THE RUN$", re.M)
    assert ours[mark.search(ours).start() :] == theirs[mark.search(theirs).start() :]


# ----------------------------------------------------------------------------- a Task with a fault
def quick(**flags) -> Args:
    """Flags of a run of six updates, in the folder run."""
    few = {"total_timesteps": 48, "num_prompts": 2, "group_size": 4, "pass_k": 2}
    return Args(**few | {"run_dir": "run", "num_iterations": 1} | flags)


def gives(result) -> dict:
    return {"verify": lambda prompt, answer: result}


def shows(result, **more) -> dict:
    return {"demonstrate": lambda prompt, rng: result, "warmup_steps": 1} | more


def fails(*_):
    raise ZeroDivisionError("no such\nquestion")


ANSWER = r"Task\.verify\(\['1', 'x'\], \['<end>'\]\)"
SHOWN = r"Task\.demonstrate\(\['1', 'x'\]\)"
WORDS = [END, "a", *"xyz123456"]
FAULTS = {
    "nothing": (gives(None), f"{ANSWER} gave None"),
    "a word": (gives("right"), f"{ANSWER} gave 'right'"),
    "a number as a word": (gives("1"), f"{ANSWER} gave '1'"),
    "NaN": (gives(np.float32("nan")), f"{ANSWER} gave .*nan"),
    "infinite": (gives(-math.inf), f"{ANSWER} gave -inf"),
    "infinite in float32": (gives(1e300), f"{ANSWER} gave 1e"),
    "two rewards": (gives(torch.ones(2)), f"{ANSWER} gave tensor"),
    "a pair": (gives((1.0, "why")), rf"{ANSWER} gave \(1"),
    "a dict": (gives({"reward": 1}), f"{ANSWER} gave {{"),
    "complex": (gives(1j), f"{ANSWER} gave 1j"),
    "an error": (
        {"verify": fails},
        rf"{ANSWER} raised ZeroDivisionError\(.*no such.*",
    ),
    "another signature": ({"verify": lambda answer: 1.0}, f"{ANSWER} raised TypeError"),
    "no function": ({"verify": None}, f"{ANSWER} raised TypeError"),
    "no answer to what is held out": (
        {"verify": lambda prompt, answer: {"x": 1, "y": 1}[prompt[1]]},
        r"Task\.verify\(\['1', 'z'\], \['<end>'\]\) raised KeyError",
    ),
    "no name": ({"name": Path("count")}, r"Task\.name must be a string, not PosixPath"),
    "no question": ({"prompts": []}, r"Task\.prompts must be .* training needs it"),
    "questions of None": ({"prompts": None}, r"Task\.prompts must be a list"),
    "questions to be used up": ({"prompts": iter([["1"]])}, r"Task\.prompts must be a list"),
    "nothing held out": ({"held_out": ()}, r"Task\.held_out must be .* evaluation needs it"),
    "a question of no words": ({"prompts": [[], []]}, r"Task\.prompts: the question \[\] has 0"),
    "a short question": (
        {"prompts": [["1", "x"], ["2"]]},
        r"Task\.prompts: the question \['2'\] has 1 words, the first 2",
    ),
    "a long one held out": (
        {"held_out": [["1", "z"], ["2", "z", "z"]]},
        r"Task\.held_out: the question \['2', 'z', 'z'\] has 3 words, the first 2",
    ),
    "a word that is none": (
        {"held_out": [["1", "z"], ["7", "w"]]},
        r"Task\.held_out: the question \['7', 'w'\] has what is not in Task\.vocab: '7', 'w'",
    ),
    "a number in a question": ({"prompts": [[1, "x"]]}, r"Task\.prompts: .*\[1, 'x'\] has .*: 1$"),
    "a list in a question": ({"prompts": [[["1", "x"]]]}, r"Task\.prompts: .* is not a list of w"),
    "a number for a question": ({"prompts": [1, 2]}, r"Task\.prompts: the question 1 is not a lis"),
    "one question": (
        {"prompts": ["1", "x", "one"]},
        r"Task\.prompts: the question one has .*: 'e'",
    ),
    "no words": ({"vocab": []}, r"Task\.vocab must be a list and not be empty"),
    "words twice": ({"vocab": [*WORDS, "a"]}, r"Task\.vocab must .* each once, but has 'a'"),
    "numbers among the words": ({"vocab": [*WORDS, 7]}, r"Task\.vocab must .* strings.*has 7"),
    "no end": ({"vocab": WORDS[1:]}, r"Task\.vocab must begin with '<end>', not with 'a'"),
    "the end last": (
        {"vocab": [*WORDS[1:], END]},
        r"Task\.vocab must begin with '<end>', not with",
    ),
    "words in no order": ({"vocab": set(WORDS)}, r"Task\.vocab must be a list"),
    "no length": ({"max_length": 0}, r"Task\.max_length must be a whole number between 1 and"),
    "half a word": (
        {"max_length": 7.5},
        r"Task\.max_length must be a whole number between 1 and 65536, not 7\.5",
    ),
    "a length in words": (
        {"max_length": "8"},
        r"Task\.max_length must be a whole number between 1 and 65536, not '8'",
    ),
    "no updates": ({"total_timesteps": 0}, r"--total-timesteps must be between 1 and"),
    "half a step": (shows(["a"], warmup_steps=0.5), r"warmup_steps must be int"),
    "no demonstration": ({"warmup_steps": 3}, r"--warmup-steps: .* Task\.demonstrate is missi"),
    "one too long": (shows(["a"] * 8), f"{SHOWN}: .* has 8 words; Task.max_length allows 7 words"),
    "one with its end": (shows(["a", END]), f"{SHOWN}: .* 7 words without '<end>', which is added"),
    "one of other words": (shows(["b", "a"]), f"{SHOWN}: .* has what is not in Task.vocab: 'b'"),
    "one of None": (shows(None), f"{SHOWN} raised TypeError"),
    "one that fails": ({"demonstrate": fails, "warmup_steps": 2}, f"{SHOWN} raised ZeroDivision"),
    "one that cannot be verified": (
        shows(["a"], verify=lambda prompt, answer: {1: 0.0}[len(answer)]),
        r"Task\.verify\(\['1', 'x'\], \['a', '<end>'\]\) raised KeyError\(2\)",
    ),
    "one of the later ones too long": (
        {"demonstrate": lambda prompt, rng: ["a"] * 2 * int(prompt[0]), "warmup_steps": 1},
        r"Task\.demonstrate\(\['4', 'x'\]\): .* has 8 words",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_task_is_named_before_anything_is_written(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    changes, said = FAULTS[name]
    args = quick(total_timesteps=None) if "total_timesteps" in changes else quick()
    with pytest.raises(grpo.UserError, match=said):
        grpo.train(args, count_task(**changes))
    assert tree(tmp_path) == {}


def pops(prompt, answer):
    """Takes the words off both lists, as a verifier that parses them may."""
    while prompt and answer:
        prompt.pop()
        answer.pop()
    return 1.0


HARMLESS = {
    "a bool": gives(True),
    "a NumPy bool": gives(np.bool_(True)),
    "a NumPy scalar": gives(np.float16(1)),
    "an array of one": gives(np.ones((1, 1), np.int64)),
    "a tensor with a gradient": gives(torch.ones((), requires_grad=True)),
    "a fraction": gives(Fraction(1)),
    "a verifier that takes words off": {"verify": pops},
    "tuples": {"vocab": tuple(WORDS), "prompts": (("1", "x"),), "held_out": (("2", "z"),)},
    "arrays": {"vocab": np.array(WORDS), "prompts": np.array([["1", "x"]] * 3)},
    "strings": {"prompts": ["1x", "2y"], "held_out": ["3z"]},
    "a length of NumPy": {"max_length": np.int64(8), "total_timesteps": np.int32(48)},
    "a demonstration word by word": {"demonstrate": lambda prompt, rng: iter("aa")},
    "the end in a question": {"prompts": [["1", END]]},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_just_works(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    verify = {"verify": lambda prompt, answer: 1.0}
    task = count_task(**verify | HARMLESS[name])
    warmup_steps = 1 if "demonstrate" in HARMLESS[name] else 0
    _, summary = grpo.train(quick(warmup_steps=warmup_steps, total_timesteps=16), task)
    assert summary["pass@1_after"] == 1.0 and summary["last_100_return"] == 1.0
    agent, *_ = grpo.load_agent("run", task)  # the checkpoint holds nothing that cannot be read
    assert all(weights.isfinite().all() for weights in agent.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_of_the_script_have_no_fault(name, capsys):
    grpo.check_task(TASKS[name], grpo.check_args(Args(), TASKS[name]), None)
    assert capsys.readouterr() == ("", "")


def test_a_held_out_question_that_is_trained_on_is_noted(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    task = count_task()
    grpo.train(quick(), task._replace(prompts=task.prompts + task.held_out[:2]))
    note = "note: 2 of 6 questions in Task.held_out are in Task.prompts too"
    assert capsys.readouterr().err.startswith(note)


def test_points_above_1_are_told_to_be_no_right_answers(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    grpo.train(quick(total_timesteps=8), count_task(**gives(10)))
    assert "note: Task.verify gave 10; only answers with a reward of 1" in capsys.readouterr().err


FLAGS_OF_A_NOTEBOOK = {
    r"ratio must be Literal\[.*\], not 'tokens'": {"ratio": "tokens"},
    r"loss_agg must be Literal\[.*\], not None": {"loss_agg": None},
    "anneal_lr must be bool, not 'no'": {"anneal_lr": "no"},
    "threads must be int, not None": {"threads": None},
    "group_size must be int, not 4.5": {"group_size": 4.5},
    "seed must be int, not '1'": {"seed": "1"},
    "learning_rate must be float, not 'small'": {"learning_rate": "small"},
    "temperature must be float, not None": {"temperature": None},
    "num_prompts must be int, not inf": {"num_prompts": math.inf},
}


@pytest.mark.parametrize("said", FLAGS_OF_A_NOTEBOOK)
def test_flags_that_no_command_line_has_checked(said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(grpo.UserError, match=f"^{said}"):
        grpo.train(quick(**FLAGS_OF_A_NOTEBOOK[said]), count_task())
    assert tree(tmp_path) == {}


def test_what_is_no_task_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        grpo.UserError, match="of your own must be a Task, not <function count_task"
    ):
        grpo.train(quick(), count_task)  # it was not called
    with pytest.raises(grpo.UserError, match="hand a task of your own to train") as caught:
        grpo.train(quick(task=TASKS["sort"]))
    assert len(str(caught.value)) < 300 and tree(tmp_path) == {}


def test_numbers_of_numpy_are_flags_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    numbers = {
        "seed": np.int64(5),
        "total_timesteps": np.int32(16),
        "learning_rate": np.float32(0.5),
    }
    numbers["anneal_lr"] = np.bool_(False)
    _, summary = grpo.train(quick(**numbers), count_task())
    flags = json.loads(Path("run/config.json").read_text())["args"]
    assert {name: flags[name] for name in numbers} == numbers
    assert summary["seed"] == 5 and summary["total_timesteps"] == 16


@pytest.mark.parametrize(
    "changes",
    [{"vocab": [*WORDS, "b"]}, {"vocab": [END, *reversed(WORDS[1:])]}, {"max_length": 9}],
)
def test_a_run_is_not_taken_for_one_of_another_task(changes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    grpo.train(quick(total_timesteps=8), count_task())
    before = tree(tmp_path)
    for go_on in (
        lambda task: grpo.train(Args(resume="run"), task),
        lambda task: grpo.load_agent("run", task),
    ):
        with pytest.raises(grpo.UserError, match="run is a run on a Task with other words"):
            go_on(count_task(**changes))
    assert tree(tmp_path) == before


def flaky(after: int, fault) -> Task:
    """count_task whose verifier answers with the fault, once, after so many good answers."""
    task, calls = count_task(), []

    def verify(prompt, answer):
        calls.append(0)
        if len(calls) == after + 1:
            return fault()
        return task.verify(prompt, answer)

    return task._replace(verify=verify)


def times_out():
    raise TimeoutError("the verifier\ndid not answer")


BEFORE = 2 + 6 + 12  # calls of verify before the first update: two tries, the evaluation, pass@2
ONCE = {"raises": (times_out, RuntimeError, r"update {}: .* raised TimeoutError\(")}
ONCE["None"] = (lambda: None, grpo.NonFiniteError, "update {}: .* gave None; a reward must be")
ONCE["NaN"] = (lambda: math.nan, grpo.NonFiniteError, "update {}: .* gave nan; a reward must be")


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("update", [1, 2, 4, 6])
def test_what_was_learned_before_a_verifier_failed_is_kept(name, update, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fault, kind, said = ONCE[name]
    task = flaky(BEFORE + 8 * (update - 1) + 5, fault)
    with pytest.raises(kind, match=said.format(update)) as caught:
        grpo.train(quick(), task)
    said = str(caught.value)
    question, answer = re.search(r"Task\.verify\((\[.*\]), (\[.*\])\) ", said).groups()
    assert eval(question) in task.prompts and set(eval(answer)) <= set(task.vocab)
    if name == "raises":
        cause = caught.value.__cause__.__cause__
        assert isinstance(cause, TimeoutError)
        frames = traceback.extract_tb(cause.__traceback__)
        assert frames[-1].name == "times_out"
    saved = grpo.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert saved["state"]["updates"] == update - 1
    done = (tmp_path / "run/episodes.csv").read_bytes()
    assert len(rows(tmp_path / "run/episodes.csv")) == 8 * (update - 1)

    grpo.train(Args(resume="run"), task)
    assert (tmp_path / "run/episodes.csv").read_bytes().startswith(done)
    metrics = rows(tmp_path / "run/metrics.csv")
    assert [int(row["update"]) for row in metrics] == [1, 2, 3, 4, 5, 6]
    grpo.train(quick(run_dir="whole"), count_task())
    same_bits(Path("run"), Path("whole"))  # this verifier has no state but the count


def test_a_verifier_that_fails_in_the_evaluation_costs_no_update(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = flaky(BEFORE + 48 + 3, times_out)
    with pytest.raises(RuntimeError, match=r"raised TimeoutError\("):
        grpo.train(quick(), task)
    done = (tmp_path / "run/metrics.csv").read_bytes()
    _, summary = grpo.train(Args(resume="run"), task)
    assert (tmp_path / "run/metrics.csv").read_bytes() == done and summary["eval_episodes"] == 6


def test_a_demonstration_that_fails_in_the_warm_up_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def demonstrate(prompt, rng):
        calls.append(0)
        if len(calls) == 300:  # the check at the start has shown it 12 questions
            times_out()
        return ["a"]

    task = count_task(demonstrate=demonstrate)
    with pytest.raises(RuntimeError, match=r"Task\.demonstrate\(\['\d', '[xy]'\]\) raised Time"):
        grpo.train(quick(warmup_steps=2), task)
    assert not (tmp_path / "run/checkpoint.pt").exists()
    _, summary = grpo.train(Args(resume="run"), task)  # it starts over
    assert summary["total_timesteps"] == 48


# -------------------------------------------------------------------------------------- mutations
def mutant(folder: Path, *edits: tuple[str, str]):
    """A copy of the script with these edits (old text, new text), as a module."""
    text = SCRIPT.read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    path = folder / SCRIPT.name
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"mutant_{folder.name}_{hash(text)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


TANH = ("F.relu(", "F.tanh(")
MASKED = (
    "log_probs = (logits / temperature).log_softmax(-1)\n",
    "logits = logits.clone()\n"
    "        logits[..., 1] = -math.inf\n"  # the blank of sort
    "        log_probs = (logits / temperature).log_softmax(-1)\n",
)


def tiny_run(module, task: Task, folder: Path) -> tuple[list, dict]:
    """All answers of a run, its two evaluations included, and its summary."""
    answers = []

    def verify(prompt, answer):
        answers.append(answer)
        return task.verify(prompt, answer)

    args = module.Args(total_timesteps=192, num_prompts=4, group_size=8, pass_k=4, seed=3)
    args.eval_prompts, args.run_dir, args.learning_rate = 20, str(folder), 3e-3
    _, summary = module.train(args, task._replace(verify=verify))
    return answers, summary


@pytest.mark.parametrize("edit", [TANH, MASKED])
def test_another_policy_is_played_learned_evaluated_and_loaded(edit, tmp_path):
    module = mutant(tmp_path / "copy", edit)
    task = TASKS["sort"]
    agent, original = policy(task, module=module), policy(task)
    batch = written(agent, task, module=module)
    mask = batch["mask"]
    scored = module.score(agent, batch["prompts"], batch["tokens"], 16, 1.0)
    largest = scored[mask][scored[mask] > -1e9].abs().max()
    atol = rounding(agent.logits.in_features, largest)
    torch.testing.assert_close(scored[mask], batch["log_probs"][mask], atol=atol, rtol=0)
    theirs = score(original, batch["prompts"], batch["tokens"], 16, 1.0)
    assert (theirs - scored)[mask].abs().max() > 0.1  # another policy

    answers, summary = tiny_run(module, task, tmp_path / "run")
    agent, _, args = module.load_agent(str(tmp_path / "run"))
    found = module.evaluate(agent, task, args)
    assert found["pass@k"] == summary["pass@k_after"]
    assert np.mean(found["returns"]) == pytest.approx(summary["eval_return_mean"])
    for row in rows(tmp_path / "run/metrics.csv"):
        assert math.isfinite(float(row["losses/policy_loss"])) and float(row["entropy"]) > 0
    blanks = [answer for answer in answers if BLANK in answer]
    assert (blanks == []) == (edit is MASKED)
    if edit is MASKED:
        assert scored[..., 1].max() == -1e9
        assert max(float(row["kl"]) for row in rows(tmp_path / "run/metrics.csv")) > 0


def test_a_new_metric_wherever_it_stands_changes_nothing_that_is_learned(tmp_path):
    task = TASKS["sort"]
    new = '"largest_ratio": ratio.max(),'
    first, last = (
        mutant(tmp_path / name, (old, old.replace(*edit)))
        for name, old, edit in (
            ("first", '"policy_loss": -objective,', ('"policy', f'{new}\n            "policy')),
            ("last", "ratio_mean(clipped_low | clipped_high),", ("high),", f"high),\n {new}")),
        )
    )
    tiny_run(grpo, task, tmp_path / "original")
    for module in (first, last):
        tiny_run(module, task, Path(f"{module.__file__}.run"))
        run = Path(f"{module.__file__}.run")
        assert float(rows(run / "metrics.csv")[-1]["largest_ratio"]) > 1
        ours, theirs = bits(run), bits(tmp_path / "original")
        ours["metrics"] = [without(row, {"largest_ratio"}) for row in ours["metrics"]]
        assert ours == theirs


CAUGHT = {  # a wrong edit -> the check that fails on it, and passes on the script
    "KL with a wrong sign": ("surrogate - args.kl_coef", "surrogate + args.kl_coef", check_loss),
    "loss with a wrong sign": ("return -objective, ", "return objective, ", check_loss),
    "max for min": ("torch.min(ratio * adv", "torch.max(ratio * adv", check_loss),
    "ratio upside down": ("logratio = new - old", "logratio = old - new", check_loss),
    "clip ranges swapped": (
        "clamp(1 - args.clip_low, 1 + args.clip_high)",
        "clamp(1 - args.clip_high, 1 + args.clip_low)",
        check_loss,
    ),
    "KL to the sampling policy": (
        'of_tokens(batch["ref_log_probs"], batch)',
        'of_tokens(batch["log_probs"], batch)',
        check_loss,
    ),
    "mask forgotten": ("masked_fill(~batch", "masked_fill(batch", check_loss),
    "no baseline": ("advantages = rewards - group_mean", "advantages = rewards", check_advantages),
    "no std": ("advantages / group_std", "advantages", check_advantages),
    "ratio not bounded": ("ratio = logratio.clamp(max=40)", "ratio = logratio", check_far_apart),
    "k3 not bounded": ("x_bounded = x.clamp(min=-40)", "x_bounded = x", check_kl_far_apart),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_wrong_edit_is_caught(name, tmp_path):
    old, new, check = CAUGHT[name]
    check(mutant(tmp_path / "same"))
    with pytest.raises(AssertionError):
        check(mutant(tmp_path / "edited", (old, new)))


def test_the_reference_is_the_policy_after_the_warm_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = count_task(demonstrate=lambda prompt, rng: ["a"] * rng.randint(1, 6))
    grpo.train(quick(warmup_steps=5), task)
    assert abs(float(rows(Path("run/metrics.csv"))[0]["kl_exact"])) < 1e-6


def test_dr_grpo_divides_by_the_longest_answer_that_the_task_allows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen, real = [], grpo.update

    def update(agent, optimizer, batch, max_length, args):
        seen.append((batch["tokens"].shape[1], max_length))
        return real(agent, optimizer, batch, max_length, args)

    monkeypatch.setattr(grpo, "update", update)
    grpo.train(quick(loss_agg="dr_grpo"), count_task(max_length=60))
    assert {allowed for _, allowed in seen} == {60} and min(longest for longest, _ in seen) < 60


def test_the_metrics_of_the_loss_are_means_over_tokens():
    """The answers have different lengths: what follows them counts for nothing."""
    new, batch, _ = example()
    mask, old = batch["mask"], batch["log_probs"]
    assert not mask.all()
    _, metrics = grpo_loss(new, batch, 9, Args())
    ratio = (new - old).gather(-1, batch["tokens"].unsqueeze(-1)).squeeze(-1)[mask].exp()
    good = (batch["advantages"] > 0).unsqueeze(1).expand_as(mask)[mask]
    expected = {
        "entropy": -(new.exp() * new).sum(-1)[mask].mean(),
        "kl_exact": (new.exp() * (new - batch["ref_log_probs"])).sum(-1)[mask].mean(),
        "clip_ratio/high_mean": ((ratio > 1.2) & good).float().mean(),
    }
    for name, x in expected.items():
        assert metrics[name].item() == pytest.approx(x.item(), rel=1e-4), name


@pytest.mark.parametrize(
    "flags, low, high",
    [
        ({"ratio": "sequence-mean", "clip_low": 0.05, "clip_high": 0.1}, 2 / 12, 3 / 12),
        ({"clip_low": 0.1, "clip_high": 0.5}, 8 / 42, 2 / 42),
    ],
)
def test_clip_ratio_counts_tokens_or_answers(flags, low, high):
    """Answers where each has one ratio, else tokens. TRL's example has 12 and 42."""
    new, batch, _ = example()
    _, metrics = grpo_loss(new, batch, 9, Args(**flags))
    assert metrics["clip_ratio/low_mean"].item() == pytest.approx(low, rel=1e-5)
    assert metrics["clip_ratio/high_mean"].item() == pytest.approx(high, rel=1e-5)


def test_baseline_and_scale_are_those_of_the_flags(monkeypatch, tmp_path):
    """The means are those of check_advantages()."""
    monkeypatch.chdir(tmp_path)
    seen, verify, update = [], grpo.verify, grpo.update

    def known_rewards(task, questions, answers, group_size):
        if group_size == 4:
            return torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.5, 0.0]])
        return verify(task, questions, answers, group_size)

    def watched(agent, optimizer, batch, max_length, args):
        seen.append(batch["advantages"].tolist())
        return update(agent, optimizer, batch, max_length, args)

    monkeypatch.setattr(grpo, "verify", known_rewards)
    monkeypatch.setattr(grpo, "update", watched)
    grpo.train(quick(total_timesteps=8, baseline="batch", scale_rewards="none"), count_task())
    assert seen == [[0.625, -0.375, -0.375, -0.375, 0.125, 0.625, 0.125, -0.375]]


def test_a_summary_has_pass_at_1_and_pass_at_k_before_and_after(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = iter([(0.1, 0.2), (0.3, 0.4)])

    def evaluate(*_):
        return dict(zip(("pass@1", "pass@k"), next(told), strict=True)) | {
            "returns": [0.0],
            "examples": [],
        }

    monkeypatch.setattr(grpo, "evaluate", evaluate)
    _, summary = grpo.train(quick(total_timesteps=8), count_task())
    names = ("pass@1_before", "pass@k_before", "pass@1_after", "pass@k_after")
    assert [summary[name] for name in names] == [0.1, 0.2, 0.3, 0.4]


def test_every_stream_of_a_run_follows_its_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked, stream = set(), grpo.stream
    monkeypatch.setattr(grpo, "stream", lambda *given: asked.add(given) or stream(*given))
    task = count_task(demonstrate=lambda prompt, rng: ["a"])
    grpo.train(quick(seed=7, warmup_steps=1, total_timesteps=8), task)
    names = ("weights", "prompts", "answers", "warm-up", "evaluation")
    assert asked == {(7, name) for name in names}


def test_pass_at_1_is_greedy_and_pass_at_k_is_sampled_at_the_temperature(monkeypatch):
    seen, sample = [], grpo.sample

    def watched(agent, prompts, group_size, max_length, temperature, rng=None):
        seen.append((group_size, temperature, None if rng is None else rng.initial_seed()))
        return sample(agent, prompts, group_size, max_length, temperature, rng)

    monkeypatch.setattr(grpo, "sample", watched)
    task = count_task()
    grpo.evaluate(policy(task), task, Args(pass_k=4, temperature=0.5, seed=3))
    assert (seen[0][0], seen[0][2]) == (1, None)
    assert seen[1:] == [(4, 0.5, grpo.stream(3, "evaluation"))]


# --------------------------------------------------------------------------------------- learning
VARIANTS = {
    "GRPO": {},
    "R1": {
        "ratio": "sequence",
        "clip_low": 10.0,
        "clip_high": 10.0,
        "kl_coef": 0.001,
        "total_timesteps": 57_600,  # it learns the questions of training long before the others
    },
    "Dr. GRPO": {"loss_agg": "dr_grpo", "scale_rewards": "none", "kl_coef": 0.0},
    "DAPO": {"loss_agg": "dapo", "clip_high": 0.28, "kl_coef": 0.0},
    "GSPO": {"ratio": "sequence-mean", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    "RLOO": {
        "baseline": "leave-one-out",
        "scale_rewards": "none",
        "ratio": "sequence",
        "num_iterations": 1,
        "kl_coef": 0.0,
    },
}


def test_answers_of_one_word_are_learned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = count_task(max_length=1, verify=lambda prompt, answer: float(answer == ["a"]))
    args = Args(total_timesteps=3200, num_prompts=8, group_size=8, run_dir="run")
    _, summary = grpo.train(args, task)
    assert summary["pass@1_after"] == 1.0 and summary["pass@k_after"] == 1.0


def test_temperature_and_reference_are_the_same_wherever_answers_are_scored(tmp_path, monkeypatch):
    """With a step size of all but 0 the policy stays what it was, and the reference is it too."""
    monkeypatch.chdir(tmp_path)
    args = Args(total_timesteps=192, num_prompts=8, group_size=8, temperature=0.5, run_dir="still")
    args.learning_rate, args.weight_decay, args.kl_coef = 1e-9, 0.0, 1.0
    args.baseline, args.scale_rewards = "none", "none"
    grpo.train(args, count_task())
    for row in rows(Path("still/metrics.csv")):
        assert abs(float(row["kl_exact"])) < 1e-6
        assert abs(float(row["losses/kl_after_update"])) < 1e-6
        assert float(row["losses/policy_loss"]) == pytest.approx(-float(row["reward"]), abs=1e-5)


def test_the_reference_stays_where_it_was_or_follows_with_ref_sync(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kl = {}
    for sync in (0, 2):
        args = Args(total_timesteps=256, num_prompts=8, group_size=8, ref_sync=sync)
        args.learning_rate, args.num_iterations, args.anneal_lr = 1e-2, 1, False
        args.run_dir = str(sync)
        grpo.train(args, count_task())
        kl[sync] = [float(row["kl_exact"]) for row in rows(Path(str(sync)) / "metrics.csv")]
    assert abs(kl[0][0]) < 1e-6 and min(kl[0][1:]) > 1e-4
    assert kl[2][:2] == kl[0][:2] and abs(kl[2][2]) < 1e-6 and kl[2][3] > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_to_count(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"total_timesteps": 19_200, "num_prompts": 8, "group_size": 8} | VARIANTS[name]
    args = Args(**flags)
    _, summary = grpo.train(args, count_task())
    # of six questions with a word never seen
    assert summary["pass@1_before"] <= 0.2 and summary["pass@1_after"] >= 0.5
    assert summary["last_100_return"] >= 0.85  # of those in training


def test_sorting_is_learned(tmp_path, monkeypatch):
    """The default run's task with two digits instead of up to five, and a sixth of its answers.
    Held out are five pairs of digits, each asked for again and again."""
    monkeypatch.chdir(tmp_path)
    task = TASKS["sort"]
    short = task._replace(
        prompts=[question for question in task.prompts if question[2] == BLANK],
        held_out=[question for question in task.held_out if question[2] == BLANK],
    )
    _, summary = grpo.train(Args(total_timesteps=32_000, num_prompts=32, run_dir="run"), short)
    assert summary["pass@1_before"] <= 0.05 and summary["pass@1_after"] >= 0.3
    assert summary["last_100_return"] >= 0.8  # of those in training, a share of right places


def test_countdown_is_learned_beyond_what_the_warm_up_taught(tmp_path, monkeypatch):
    """With a twelfth of the answers and less than half of the warm-up, but four gradient steps per
    batch and no KL."""
    monkeypatch.chdir(tmp_path)
    args = Args(task="countdown", total_timesteps=40_960, num_prompts=32, group_size=16)
    args.warmup_steps, args.num_iterations, args.kl_coef = 200, 4, 0.0
    args.eval_prompts, args.pass_k = 300, 4
    _, summary = grpo.train(args)
    assert summary["pass@1_after"] >= max(0.12, 5 * summary["pass@1_before"])


def is_expression(answer: list[str]) -> bool:
    """Whether it has a value, of whatever numbers."""
    words = list(answer)
    try:
        grpo.value(words)
    except (ValueError, ZeroDivisionError, IndexError):
        return False
    return words == [END]


def test_the_warm_up_teaches_the_form_of_an_answer():
    """The share of sampled answers that are expressions."""
    task, shares = TASKS["countdown"], []
    for steps in (0, 100):
        torch.manual_seed(0)
        agent = Agent(len(task.vocab), len(task.prompts[0]) + task.max_length)
        grpo.warm_up(agent, task, Args(warmup_steps=steps))
        prompts = task.encode(task.held_out[:64])
        batch = grpo.sample(agent, prompts, 4, task.max_length, 1.0, torch.Generator())
        answers = task.decode(batch["tokens"], batch["mask"])
        shares.append(np.mean([is_expression(answer) for answer in answers]))
    assert shares[0] <= 0.05 and shares[1] >= 0.3, shares


def test_a_warm_up_that_diverges_is_one_line(main):
    command = "--task countdown --weight-decay 5000 --warmup-steps 60 --run-dir run"
    code, _, err = main(*command.split())
    expected = "error: weights after the warm-up not finite in update 0"
    assert code == 3 and err[-1].startswith(expected)


def test_without_anything_to_learn_from_nothing_is_learned(tmp_path, monkeypatch):
    """Counting is not learned by luck: the same run on rewards that do not depend on the answer."""
    monkeypatch.chdir(tmp_path)
    task, rng = count_task(), random.Random(0)
    args = Args(total_timesteps=19_200, num_prompts=8, group_size=8, run_dir="run")
    agent, _ = grpo.train(args, task._replace(verify=lambda prompt, answer: rng.random()))
    assert grpo.evaluate(agent, task, args)["pass@1"] <= 0.4
