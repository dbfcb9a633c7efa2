"""grpo_toy.py: its mathematics against hand-computed values, exact derivatives and TRL; its tasks; what it promises
about its runs, as test_cartpole_reliability.py and test_cartpole_errors.py have it for PPO; and that it learns."""

import contextlib
import csv
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
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import grpo_toy as grpo
from grpo_toy import END, Agent, Args, Task, group_advantages, grpo_loss, kl_terms, sample, score

ROOT, SCRIPT = Path(grpo.__file__).parent, Path(grpo.__file__)
EXPECTED = json.loads((ROOT / "tests/trl_expected.json").read_text())
RATIOS, AGGREGATIONS = ("token", "sequence", "sequence-mean"), ("grpo", "dr_grpo", "dapo")
BASELINES, SCALES, ESTIMATORS = (
    ("group", "batch", "leave-one-out", "none"), ("group", "batch", "none"), ("k2", "k3", "k3-corrected", "exact"),
)  # fmt: skip
COMBINATIONS = [*(("token", agg) for agg in AGGREGATIONS), *((ratio, "grpo") for ratio in RATIOS[1:])]


def example() -> tuple[torch.Tensor, dict, torch.Tensor]:
    """(log-probabilities under new weights [12, 6, 5], the batch that grpo_loss takes, rewards [3, 4]) from the example
    that TRL was given; answers of one to six tokens, one of them without an end."""
    data = {name: torch.tensor(x) for name, x in EXPECTED["example"].items()}
    mask = torch.arange(data["tokens"].shape[1]) < data["lengths"].unsqueeze(1)
    batch = {"tokens": data["tokens"], "mask": mask, "log_probs": data["old"], "ref_log_probs": data["reference"]}
    batch["advantages"] = group_advantages(data["rewards"], "group", "group").flatten()
    return data["new"], batch, data["rewards"]


# ------------------------------------------------------------------------------------------------------- advantages
def test_group_statistics_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.5, 0.0]])
    by_hand = {
        "group": [[0.75, -0.25, -0.25, -0.25], [0.0, 0.5, 0.0, -0.5]],
        "leave-one-out": [[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0, 2 / 3, 0.0, -2 / 3]],
        "batch": [[0.625, -0.375, -0.375, -0.375], [0.125, 0.625, 0.125, -0.375]],
        "none": rewards.tolist(),
    }
    group_std = torch.tensor([[0.5], [math.sqrt(0.5 / 3)]])
    spreads = {"none": 1.0, "group": group_std + 1e-4, "batch": math.sqrt(1.375 / 7) + 1e-4}
    for baseline in BASELINES:
        for scale in SCALES:
            expected = torch.tensor(by_hand[baseline]) / spreads[scale]
            torch.testing.assert_close(group_advantages(rewards, baseline, scale), expected)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_a_group_of_equal_rewards_has_no_advantage_exactly(size, reward):
    """Although the mean of equal numbers may be off by a rounding error, which a division by 1e-4 would blow up."""
    rewards = torch.full((2, size), reward)
    rewards[1, 0] = 0.7
    for scale in SCALES:
        for baseline in ("group", "leave-one-out"):
            advantages = group_advantages(rewards, baseline, scale)
            assert advantages[0].tolist() == [0.0] * size and advantages[1].abs().min() > 0.01
        assert group_advantages(rewards[:1], "batch", scale).tolist() == [[0.0] * size]
        assert group_advantages(rewards[:1], "none", scale).tolist() == rewards[:1].tolist()  # and nothing to divide by


def test_the_mean_of_equal_rewards_is_off_where_the_test_above_needs_it():
    rewards = [torch.full((size,), reward) for size in (2, 3, 7, 16) for reward in (0.1, 1 / 3)]
    assert any((x - x.mean()).abs().max() > 0 for x in rewards)


def test_grpo_without_std_is_leave_one_out_times_a_constant():
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    theirs = group_advantages(rewards, "leave-one-out", "none") * 7 / 8
    torch.testing.assert_close(group_advantages(rewards, "group", "none"), theirs)
    others = (rewards.sum(1, keepdim=True) - rewards) / 7  # and leave-one-out is what it is called
    torch.testing.assert_close(group_advantages(rewards, "leave-one-out", "none"), rewards - others)


# --------------------------------------------------------------------------------------------------------- the loss
def loss_by_hand(args: Args, new, batch: dict) -> float:
    """The loss in plain Python, token by token, in double precision."""
    count, width = batch["tokens"].shape
    means, total, tokens = [], 0.0, 0
    for i in range(count):
        length, advantage = int(batch["mask"][i].sum()), batch["advantages"][i].item()
        rows = [[float(x[i, t, batch["tokens"][i, t]]) for t in range(length)]
                for x in (new, batch["log_probs"], batch["ref_log_probs"])]  # fmt: skip
        logs = [p - q for p, q in zip(rows[0], rows[1], strict=True)]
        ratios = [math.exp(x) for x in logs]
        if args.ratio == "sequence":
            ratios = [math.exp(sum(logs))] * length
        if args.ratio == "sequence-mean":
            ratios = [math.exp(sum(logs) / length)] * length
        terms = []
        for t, r in enumerate(ratios):
            clipped = min(max(r, 1 - args.clip_low), 1 + args.clip_high)
            kl = math.exp(rows[2][t] - rows[0][t]) - (rows[2][t] - rows[0][t]) - 1
            if args.kl_estimator == "k2":
                kl = (rows[0][t] - rows[2][t]) ** 2 / 2
            if args.kl_estimator == "k3-corrected":
                kl *= math.exp(logs[t])
            if args.kl_estimator == "exact":
                p, q = new[i, t].tolist(), batch["ref_log_probs"][i, t].tolist()
                kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            terms.append(min(r * advantage, clipped * advantage) - args.kl_coef * kl)
        means.append(sum(terms) / length)
        total, tokens = total + sum(terms), tokens + length
    return {"grpo": -sum(means) / count, "dr_grpo": -total / (count * width), "dapo": -total / tokens}[args.loss_agg]


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("ratio", "loss_agg"), COMBINATIONS)
def test_every_variant_of_the_loss_against_plain_python(ratio, loss_agg, estimator, clip_high):
    new, batch, _ = example()
    args = Args(ratio=ratio, loss_agg=loss_agg, kl_estimator=estimator, kl_coef=0.3, clip_high=clip_high)
    loss, metrics = grpo_loss(new, batch, batch["tokens"].shape[1], args)
    assert loss.item() == pytest.approx(loss_by_hand(args, new, batch), abs=1e-6)
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0  # both sides were tried
    assert metrics["clip_ratio/region_mean"] == pytest.approx(
        float(metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"])
    )


def test_one_answer_of_two_tokens_in_numbers():
    """A = 2, ratios 1.5 and 0.5: eq. 3 takes 1.2 and 0.5; the product is 0.75, its geometric mean sqrt(0.75)."""
    old = torch.full((1, 2, 2), 0.5).log()
    new = torch.tensor([[[0.75, 0.25], [0.75, 0.25]]]).log()
    batch = {"tokens": torch.tensor([[0, 1]]), "mask": torch.ones(1, 2, dtype=torch.bool), "log_probs": old}
    batch |= {"ref_log_probs": old, "advantages": torch.tensor([2.0])}
    expected = {("token", "grpo"): 1.7, ("token", "dr_grpo"): 3.4 / 8, ("token", "dapo"): 1.7}
    # 0.75 is below 0.8, but a good answer is held only from above
    expected |= {("sequence", "grpo"): 1.5, ("sequence-mean", "grpo"): 2 * math.sqrt(0.75)}
    for (ratio, loss_agg), objective in expected.items():  # an answer may have 8 tokens
        args = Args(ratio=ratio, loss_agg=loss_agg, kl_coef=0.0)
        assert -grpo_loss(new, batch, 8, args)[0].item() == pytest.approx(objective)
    bad = batch | {"advantages": torch.tensor([-2.0])}
    assert -grpo_loss(new, bad, 8, Args(ratio="sequence", kl_coef=0.0))[0].item() == pytest.approx(-1.6)
    assert -grpo_loss(new, bad, 8, Args(kl_coef=0.0))[0].item() == pytest.approx(-(3.0 + 1.6) / 2)
    _, metrics = grpo_loss(new, batch, 8, Args(kl_coef=0.0))
    kl = [math.log(1.5), math.log(0.5)]
    assert metrics["kl_k1"].item() == pytest.approx(sum(kl) / 2)
    assert metrics["kl"].item() == pytest.approx(sum(math.exp(-x) + x - 1 for x in kl) / 2)
    assert metrics["kl_exact"].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert metrics["entropy"].item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert [metrics[f"clip_ratio/{name}_mean"].item() for name in ("low", "high", "region")] == [0, 0.5, 0.5]


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_stands_after_the_end_changes_nothing(ratio):
    new, batch, _ = example()
    args, outside = Args(ratio=ratio, kl_coef=0.3), ~batch["mask"]
    loss, metrics = grpo_loss(new, batch, 6, args)
    noise = 200 * torch.randn(new.shape, generator=torch.Generator().manual_seed(1))  # exp() of it overflows
    noise = noise.log_softmax(-1)
    other = {name: torch.where(outside.unsqueeze(-1), noise, batch[name]) for name in ("log_probs", "ref_log_probs")}
    other["tokens"] = torch.where(outside, 3, batch["tokens"])
    changed = torch.where(outside.unsqueeze(-1), noise.flip(0), new).requires_grad_()
    same, same_metrics = grpo_loss(changed, batch | other, 6, args)
    assert outside.sum() > 10 and same.item() == loss.item() and metrics == same_metrics
    (gradient,) = torch.autograd.grad(same, changed)
    assert gradient[outside].abs().max() == 0 and gradient[batch["mask"]].abs().max() > 0


@pytest.mark.parametrize("index", range(len(EXPECTED["cases"])))
def test_advantages_and_loss_are_those_of_trl(index):
    """Of the installed TRL where there is one, else of the one that tests/trl_expected.json names."""
    case = EXPECTED["cases"][index]
    new, batch, rewards = example()
    args = Args(**case["flags"])
    batch["advantages"] = group_advantages(rewards, args.baseline, args.scale_rewards).flatten()
    loss, _ = grpo_loss(new, batch, batch["tokens"].shape[1], args)
    if importlib.util.find_spec("trl"):
        from benchmark.trl_reference import reference

        case = reference(EXPECTED["example"], case["flags"])
    torch.testing.assert_close(batch["advantages"], torch.tensor(case["advantages"]), atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_the_table_of_trl_has_every_variant_that_trl_has():
    flags = [Args(**case["flags"]) for case in EXPECTED["cases"]]
    assert {(a.ratio, a.loss_agg) for a in flags} == {
        *(("token", agg) for agg in AGGREGATIONS),
        ("sequence-mean", "grpo"),
    }
    assert {a.scale_rewards for a in flags} == set(SCALES)
    assert {a.kl_estimator for a in flags if a.kl_coef} == {"k3", "k3-corrected"}
    assert any(a.clip_high != a.clip_low for a in flags)
    assert EXPECTED["versions"].keys() == {"trl", "transformers", "torch"}


# --------------------------------------------------------------------------------------------------- KL estimators
def test_gradients_of_the_kl_estimators_on_a_categorical():
    """In expectation over tokens of the policy that they were sampled from, which is a sum here, so exact."""
    rng = torch.Generator().manual_seed(0)
    start, reference, moved = (torch.randn(7, generator=rng, dtype=torch.float64) for _ in range(3))
    reference = reference.log_softmax(0)
    forward = lambda new: (reference.exp() * (reference - new)).sum()  # noqa: E731
    reverse = lambda new: (new.exp() * (new - reference)).sum()  # noqa: E731

    def gradient(logits, function):
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]

    def expected(name, old):
        return lambda new: (old.exp() * kl_terms(new, old, reference)[name]).sum()

    old = start.log_softmax(0)
    assert gradient(start, expected("k1", old)).abs().max() < 1e-12
    for name, kl in (("k2", reverse), ("k3", forward), ("k3-corrected", reverse)):
        torch.testing.assert_close(gradient(start, expected(name, old)), gradient(start, kl))
    assert (gradient(start, forward) - gradient(start, reverse)).abs().max() > 0.01
    # once the policy has moved on from the one that sampled, only the corrected one is still right
    torch.testing.assert_close(gradient(moved, expected("k3-corrected", old)), gradient(moved, reverse))
    for name, kl in (("k2", reverse), ("k3", forward)):
        assert (gradient(moved, expected(name, old)) - gradient(moved, kl)).abs().max() > 0.01
    # as measurements on its own samples all but k2 are unbiased
    for name in ("k1", "k3", "k3-corrected"):
        torch.testing.assert_close(expected(name, old)(old), reverse(old))


def test_the_exact_kl_is_that_of_torch_distributions():
    new, batch, _ = example()
    p, q = (torch.distributions.Categorical(logits=x) for x in (batch["log_probs"], new))
    torch.testing.assert_close(grpo.categorical_kl(batch["log_probs"], new), torch.distributions.kl_divergence(p, q))


# ------------------------------------------------------------------------------------------------------- the policy
TASKS = {name: make() for name, make in grpo.TASKS.items()}


def count_task(**changes) -> Task:
    """As many "a" as the question's digit says: seconds to learn, and small."""
    digits = [str(n) for n in range(1, 7)]

    def verify(prompt, answer):
        wanted = ["a"] * int(prompt[0]) + [END]
        return sum(a == w for a, w in zip(answer, wanted, strict=False)) / max(len(wanted), len(answer))

    prompts, held_out = [[d, x] for d in digits for x in "xy"], [[d, "z"] for d in digits]
    task = Task("count", [END, "a", *"xyz", *digits], prompts, held_out, 8, verify, 20_000)
    return task._replace(**changes)


def policy(task: Task = TASKS["sort"], seed: int = 0, sharpness: float = 20.0) -> Agent:
    """An untrained agent whose words are far from equally likely."""
    torch.manual_seed(seed)
    agent = Agent(len(task.vocab), len(task.prompts[0]) + task.max_length)
    with torch.no_grad():
        agent.logits.weight *= sharpness
    return agent


def written(agent: Agent, task: Task, questions: int = 8, answers: int = 16, temperature: float = 1.0) -> dict:
    prompts = task.encode(task.prompts[:questions])
    rng = torch.Generator().manual_seed(3)
    return {"prompts": prompts} | sample(agent, prompts, answers, task.max_length, temperature, rng)


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
    assert all(END not in answer[:-1] for answer in words) and sum(answer[-1] != END for answer in words) > 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_cache_changes_nothing_and_what_is_scored_is_what_was_sampled_from(temperature):
    task = count_task()
    agent = policy(task)
    batch = written(agent, task, temperature=temperature)
    scored = score(agent, batch["prompts"], batch["tokens"], temperature)
    mask = batch["mask"]
    torch.testing.assert_close(scored[mask], batch["log_probs"][mask], atol=1e-5, rtol=0)
    # and without any cache: one pass over questions and answers
    whole = torch.cat([batch["prompts"].repeat_interleave(16, 0), batch["tokens"]], 1)
    logits = agent(whole)[0][:, batch["prompts"].shape[1] - 1 : -1]
    torch.testing.assert_close((logits / temperature).log_softmax(-1)[mask], scored[mask], atol=1e-5, rtol=0)


def test_samples_follow_the_distribution_and_greedy_its_maximum():
    task = count_task()
    agent = policy(task)
    batch = written(agent, task, questions=1, answers=20_000)
    share = torch.bincount(batch["tokens"][:, 0], minlength=len(task.vocab)) / 20_000
    assert (share - batch["log_probs"][0, 0].exp()).abs().max() < 0.015
    greedy = sample(agent, batch["prompts"], 1, task.max_length, 1.0)
    assert greedy["tokens"].shape[1] <= task.max_length
    assert greedy["tokens"][greedy["mask"]].equal(greedy["log_probs"].argmax(-1)[greedy["mask"]])


def test_no_token_sees_what_follows_it():
    agent = policy()
    tokens = torch.randint(0, 12, (4, 9))
    before = agent(tokens)[0]
    tokens[:, 5] = (tokens[:, 5] + 1) % 12
    after = agent(tokens)[0]
    assert before[:, :5].equal(after[:, :5]) and not before[:, 5:].equal(after[:, 5:])


def first_step(rewards_of, flags: dict | None = None) -> tuple[dict, torch.Tensor]:
    """What a first inner step sees: its batch, and the gradient of its loss."""
    task, args = count_task(), Args(**{"kl_coef": 0.0} | (flags or {}))
    agent = policy(task)
    batch = written(agent, task)
    rewards = rewards_of(8, 16)
    batch["advantages"] = group_advantages(rewards, args.baseline, args.scale_rewards).flatten()
    batch["ref_log_probs"] = score(policy(task, seed=1), batch["prompts"], batch["tokens"], 1.0).detach()
    log_probs = score(agent, batch["prompts"], batch["tokens"], args.temperature)
    loss, _ = grpo_loss(log_probs, batch, task.max_length, args)
    gradient = torch.autograd.grad(loss, list(agent.parameters()))
    tokens = batch["tokens"].unsqueeze(-1)
    ratio = (log_probs - batch["log_probs"]).gather(-1, tokens).squeeze(-1).exp()[batch["mask"]]
    return {"ratio": ratio, "loss": loss.item(), "rewards": rewards}, parameters_to_vector(gradient)


def random_rewards(groups: int, size: int) -> torch.Tensor:
    return torch.rand(groups, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("ratio", RATIOS)
def test_at_the_first_inner_step_the_ratio_is_1_and_the_gradient_is_not_0(ratio):
    seen, gradient = first_step(random_rewards, {"ratio": ratio, "baseline": "none", "scale_rewards": "none"})
    assert (seen["ratio"] - 1).abs().max() < 1e-5
    assert seen["loss"] == pytest.approx(-seen["rewards"].mean().item(), abs=1e-5)  # so those of answers are 1, too
    assert gradient.norm() > 0.01


@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_groups_give_exactly_no_gradient(baseline, scale):
    equal = lambda groups, size: torch.full((groups, size), 0.1)  # noqa: E731
    flags = {"baseline": baseline, "scale_rewards": scale}
    assert first_step(equal, flags)[1].abs().max() == 0
    assert first_step(equal, flags | {"kl_coef": 0.1})[1].norm() > 0.001  # the KL to another reference is still felt
    mixed = lambda groups, size: torch.cat([random_rewards(1, size), equal(groups - 1, size)])  # noqa: E731
    assert first_step(mixed, flags)[1].norm() > 0.001


def test_the_later_inner_steps_leave_ratio_1_and_are_clipped():
    task, args = count_task(), Args(num_iterations=4, learning_rate=1e-2)
    agent = policy(task)
    batch = written(agent, task)
    batch["advantages"] = group_advantages(random_rewards(8, 16), "group", "group").flatten()
    batch["ref_log_probs"] = batch["log_probs"]
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    metrics = grpo.update(agent, optimizer, batch, task.max_length, args)
    assert metrics["clip_ratio/region_mean"] > 0.05 and metrics["kl_after_update"] > 1e-3
    moved = score(agent, batch["prompts"], batch["tokens"], 1.0)
    p, q = (torch.distributions.Categorical(logits=x) for x in (batch["log_probs"], moved))
    kl = torch.distributions.kl_divergence(p, q)[batch["mask"]].mean()
    assert metrics["kl_after_update"] == pytest.approx(kl.item(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- the tasks
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
    assert grpo.verify_countdown(["4", "2", "2", "0"], ["4", "/", "(", "2", "-", "2", ")", "<end>"]) == 0.0
    assert grpo.verify_countdown(["1", "3", "3", "1"], ["1", "/", "3", "*", "3", "<end>"]) == 1.0
    assert grpo.verify_countdown(["7", "2", "1", "3"], ["7", "/", "2", "*", "1", "<end>"]) == 0.475  # 3.5, not 3
    assert grpo.value([*"8-3-2", END]) == 3 and grpo.value([*"8/4/2", END]) == 1  # from the left
    assert grpo.value([*"8-(3-2)", END]) == 7 and grpo.value([*"1/3", END]) == Fraction(1, 3)


def test_value_agrees_with_python_on_random_expressions():
    rng, seen = random.Random(0), 0
    for _ in range(2000):
        numbers = [str(rng.randint(1, 9)) for _ in range(3)]
        words = grpo.random_expression(numbers, rng)
        assert sorted(word for word in words if word.isdigit()) == sorted(numbers)
        code = " ".join(f"Fraction({word})" if word.isdigit() else word for word in words)
        with contextlib.suppress(ZeroDivisionError):
            expected = eval(code, {"Fraction": Fraction})
            assert grpo.value([*words, END]) == expected
            seen += 1
    assert seen > 1900


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_question_is_among_those_to_learn_from_in_any_order(name):
    task = TASKS[name]
    key = {"sort": sorted, "countdown": lambda prompt: (sorted(prompt[:3]), prompt[3])}[name]
    learned, held_out = ({str(key(prompt)) for prompt in prompts} for prompts in (task.prompts, task.held_out))
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
    demonstrations = [[countdown.demonstrate(p, random.Random(7)) for _ in range(1)] for p in (prompt, other)]
    assert demonstrations[0] == demonstrations[1]


# --------------------------------------------------------------------------------------------------------- the runs
TINY = "--total-timesteps 96 --num-prompts 2 --group-size 4 --eval-prompts 8 --pass-k 2 --threads 1"
RUNS = {  # different in all that a checkpoint has to carry; 12 updates each
    "sort": f"{TINY} --checkpoint-every 5 --ref-sync 3",
    "countdown": f"{TINY} --task countdown --warmup-steps 2 --checkpoint-every 1 --seed 5 --ratio sequence",
}
CLOCKS = {"wall_seconds", "seconds", "sps", "warmup_seconds"}
CHARTS = "episodic_return episodic_length SPS learning_rate"
LOSSES = "policy_loss grad_norm kl_after_update"
TRL = (
    "reward reward_std frac_reward_zero_std kl entropy clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean"
)
COMPLETIONS = (
    "mean_length min_length max_length clipped_ratio mean_terminated_length mean_right_length mean_wrong_length"
)
OURS = "frac_right frac_all_right frac_all_wrong kl_exact kl_k1"
METRICS = [
    *("update", "global_step", "seed", "objective"),
    *(f"charts/{name}" for name in CHARTS.split()),
    *(f"losses/{name}" for name in LOSSES.split()),
    *(f"completions/{name}" for name in COMPLETIONS.split()),
    *f"{TRL} {OURS}".split(),
]


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


def bits(run: Path) -> dict:
    """All that must come out the same: everything a run leaves, its clocks apart."""
    saved, summary = grpo.load_checkpoint(run / "checkpoint.pt"), json.loads((run / "summary.json").read_text())
    parts = ("agent", "reference", "optimizer", "prompts", "answers", "state", "recent", "dims")
    return {
        "metrics": [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows(run / "metrics.csv")],
        "episodes": (run / "episodes.csv").read_bytes(),
        **{name: plain(saved[name]) for name in parts},
        "summary": [{k: v for k, v in row.items() if k not in CLOCKS} for row in summary],
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
        grpo.train(grpo.parse_args(Args, [*flags.split(), "--run-dir", str(folder / name)]))
    return {name: folder / name for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_another_process_leaves_the_same_bits(name, finished, tmp_path):
    command = [sys.executable, SCRIPT, *RUNS[name].split(), "--run-dir", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
def test_a_run_stopped_and_resumed_leaves_the_same_bits(name, stops, finished, main, monkeypatch, tmp_path):
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
    command = [*RUNS["countdown"].split(), "--run-dir", run]
    for wanted in sorted(rng.sample(range(1, 12), 2)):
        process = subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        metrics = run / "metrics.csv"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > wanted):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        command = ["--resume", run]
    assert not (run / "summary.json").exists()
    assert subprocess.run([sys.executable, SCRIPT, *map(str, command)], stdout=subprocess.DEVNULL).returncode == 0
    same_bits(run, finished["countdown"])


def test_another_seed_is_another_run(finished, main, tmp_path):
    assert main(*RUNS["sort"].split(), "--seed", 2, "--run-dir", "run")[0] == 0
    ours, theirs = bits(tmp_path / "run"), bits(finished["sort"])
    assert all(ours[name] != theirs[name] for name in ("metrics", "episodes", "agent"))


@pytest.mark.parametrize("name", RUNS)
def test_everything_a_run_leaves(name, finished):
    run, flags = finished[name], grpo.parse_args(Args, RUNS[name].split())
    left = ["checkpoint.pt", "config.json", "episodes.csv", "metrics.csv", "summary.json"]
    assert sorted(path.name for path in run.iterdir()) == left
    config = json.loads((run / "config.json").read_text())
    filled = {name: config["args"][name] for name in ("warmup_steps", "total_timesteps")}
    assert config["args"] == asdict(flags) | filled and filled["total_timesteps"] == 96
    assert config["script"] == "grpo_toy" and config["versions"]["torch"] == torch.__version__

    metrics, objective = rows(run / "metrics.csv"), flags.agents[0]["objective"]
    assert set(metrics[0]) == set(METRICS) and len(metrics) == 12
    for i, row in enumerate(metrics, 1):
        assert [row["update"], row["global_step"]] == [str(i), str(8 * i)]
        assert [row["seed"], row["objective"]] == [str(flags.seed), objective]
        for metric in METRICS[4:]:
            if re.search("mean_(right|wrong|terminated)_length", metric):  # of answers that there may be none of
                assert row[metric] == "" or 1 <= float(row[metric]) <= 8
            else:
                assert math.isfinite(float(row[metric])), (i, metric)
    assert len({row["losses/kl_after_update"] for row in metrics}) == 12

    episodes = rows(run / "episodes.csv")
    assert list(episodes[0]) == ["global_step", "seed", "objective", "return", "length"]
    assert [int(row["global_step"]) for row in episodes] == list(range(1, 97))
    for i, row in enumerate(metrics):
        batch = episodes[8 * i : 8 * i + 8]
        rewards, lengths = (np.array([float(x[key]) for x in batch]) for key in ("return", "length"))
        groups, right = rewards.reshape(2, 4), rewards == 1
        assert float(row["reward"]) == pytest.approx(rewards.mean())
        assert float(row["reward_std"]) == pytest.approx(rewards.std(ddof=1), abs=1e-6)
        assert float(row["frac_reward_zero_std"]) == np.mean(groups.max(1) == groups.min(1))
        assert float(row["frac_all_right"]) == (groups == 1).all(1).mean()
        assert float(row["frac_all_wrong"]) == (groups != 1).all(1).mean()
        assert float(row["completions/mean_length"]) == pytest.approx(lengths.mean())
        assert float(row["completions/max_length"]) == lengths.max()
        wrong = row["completions/mean_wrong_length"]
        assert wrong == "" if right.all() else float(wrong) == pytest.approx(lengths[~right].mean())

    (summary,) = json.loads((run / "summary.json").read_text())
    keys = "env_id seed objective total_timesteps transitions wall_seconds seconds sps last_100_return"
    shared = f"{keys} eval_return_mean eval_return_std eval_episodes diverged_at".replace("env_id", "task").split()
    own = ["pass@1_before", "pass@k_before", "pass@1_after", "pass@k_after", "k", "warmup_seconds"]
    assert set(summary) == {*shared, *own} and next(iter(summary)) == "task"
    assert summary["task"] == name and summary["seed"] == flags.seed and summary["k"] == 2
    assert summary["total_timesteps"] == 96 and summary["eval_episodes"] == 8
    assert summary["transitions"] == sum(int(row["length"]) for row in episodes)
    assert all(0 <= summary[key] <= 1 for key in own[:4])
    assert (summary["warmup_seconds"] > 0.01) == (name == "countdown")
    assert 0 < sum(summary["seconds"].values()) < summary["wall_seconds"] and summary["sps"] > 0


def test_what_a_person_sees(main, tmp_path):
    code, out, err = main(*TINY.split())
    assert code == 0 and err == []
    before, after = (i for i, line in enumerate(out) if re.match("(before|after) training: pass@1", line))
    for first in (before, after):
        for line in out[first + 1 : first + 5]:
            assert re.match(r"  [\d _]+ -> [\d _]*(<end>)?  \(reward \d\.\d\d\)$", line), line
    assert (
        out[-1].startswith("sort, seed 1 objective token/grpo/group/group: evaluation") and "runs/sort__grpo" in out[-1]
    )


def test_evaluate_writes_evaluation_json_and_changes_nothing_else(finished, main, tmp_path):
    shutil.copytree(finished["sort"], tmp_path / "run")
    (summary,) = json.loads((finished["sort"] / "summary.json").read_text())
    results = []
    for flags in ("--eval-prompts 8 --pass-k 2", "--eval-prompts 20 --pass-k 4", "--eval-prompts 20 --pass-k 4"):
        code, out, err = main("--evaluate", "run", *flags.split())
        assert code == 0 and err == [] and out[0].startswith("run: pass@1 ")
        results += json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results[0]["pass@1"] == summary["pass@1_after"] and results[0]["pass@k"] == summary["pass@k_after"]
    assert results[0]["eval_return_mean"] == pytest.approx(summary["eval_return_mean"])
    assert results[1] == results[2] and results[1]["returns"][:8] == results[0]["returns"]
    assert len(results[1]["returns"]) == 20 and results[1]["k"] == 4
    for path in finished["sort"].iterdir():
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()


def test_track_mirrors_a_run_offline(tmp_path):
    command = [sys.executable, SCRIPT, *TINY.split(), "--track", "--run-dir", "run"]
    quiet = {"cwd": tmp_path, "env": os.environ | {"WANDB_MODE": "offline"}, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=120, **quiet)
    assert done.returncode == 0 and "evaluation" in done.stdout.splitlines()[-1]
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert log.stat().st_size > 1000 and (tmp_path / "run" / "summary.json").exists()


def test_a_task_of_ones_own_is_trained_resumed_and_evaluated(main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = count_task()
    args = Args(total_timesteps=96, num_prompts=2, group_size=4, pass_k=2, run_dir="run", checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_update(patch, 4)
        grpo.train(args, task)
    assert args.task == "sort"  # the caller's flags are left alone
    _, (summary,) = grpo.train(Args(resume="run"), task)
    assert summary["task"] == "count" and summary["eval_episodes"] == 6
    agent, same_task, trained = grpo.load_agent("run", task)
    assert same_task is task and grpo.evaluate(agent, task, trained)["pass@1"] == summary["pass@1_after"]
    for flag in ("--resume", "--evaluate"):
        code, _, (line,) = main(flag, "run")
        assert code == 2 and "'count'" in line
    with pytest.raises(grpo.UserError, match="on the task 'count', not 'sort'"):
        grpo.train(Args(resume="run"), TASKS["sort"])
    with pytest.raises(grpo.UserError, match="demonstrates nothing"):
        grpo.train(Args(warmup_steps=3), task)


# ---------------------------------------------------------------------------------------------------------- errors
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
    "--ratio words": "argument '--ratio'",
    "--kl-estimator k1": "argument '--kl-estimator'",
    **{
        f"--{name} {value}": f"--{name} must be"
        for name, values in {
            "temperature": ("0", "-1", "1e-40", "inf", "nan"),
            "learning-rate": ("0", "inf", "nan"),
            "clip-low": ("0", "-0.2", "1", "nan"),
            "clip-high": ("0", "inf", "nan"),
            "kl-coef": ("-0.1", "inf", "nan"),
            "weight-decay": ("-0.1", "inf", "nan"),
            "max-grad-norm": ("0", "nan"),
        }.items()
        for value in values
    },
    "--learning-rat 1": "did you mean --learning-rate?",
    "--resume nowhere": "nowhere is not a run folder",
    "--resume nowhere --seed 2": "--seed cannot stand beside --resume",
    "--evaluate nowhere": "nowhere is not a run folder",
    "--evaluate nowhere --group-size 2": "--group-size cannot stand beside --evaluate",
}


@pytest.mark.parametrize("command", FLAGS)
def test_a_bad_flag_is_one_line_and_leaves_nothing(command, main, tmp_path):
    code, out, err = main(*command.split())
    assert code == 2 and out == [] and len(err) == 1
    assert err[0].startswith("error: ") and FLAGS[command] in err[0]
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
def test_a_number_that_is_none_stops_the_run_with_code_3_and_keeps_the_checkpoint(source, main, monkeypatch, tmp_path):
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

    sort = grpo.TASKS["sort"]()
    spoiled = sort._replace(verify=lambda *pair: math.nan if len(calls) == 3 else sort.verify(*pair))
    monkeypatch.setattr(grpo, "update", update)
    monkeypatch.setitem(grpo.TASKS, "sort", (lambda: spoiled) if source == "rewards" else (lambda: sort))
    code, _, err = main(*TINY.split(), "--checkpoint-every", 2, "--run-dir", "run")
    assert code == 3 and re.match(f"error: {source} not finite in update 4;", err[-1])
    saved = grpo.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["state"]["update"] == 2 and not (tmp_path / "run" / "summary.json").exists()
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


def test_the_part_that_is_read_is_short_and_the_rest_is_that_of_the_other_scripts():
    ours, theirs = SCRIPT.read_text(), (ROOT / "ppo_cartpole.py").read_text()
    for start, end in (("AROUND THE RUN\n", "# -----"), ("def main(", "__main__")):
        shared = theirs[theirs.index(start) : theirs.index(end, theirs.index(start))]
        assert shared in ours
    first = ours.index("\n# ------")
    assert ours[first : ours.index("AROUND THE RUN\n")].count("\n") <= 351


# -------------------------------------------------------------------------------------------------------- learning
VARIANTS = {
    "GRPO": {},
    "R1": {"ratio": "sequence"},
    "Dr. GRPO": {"loss_agg": "dr_grpo", "scale_rewards": "none", "kl_coef": 0.0},
    "DAPO": {"loss_agg": "dapo", "clip_high": 0.28, "kl_coef": 0.0},
    "GSPO": {"ratio": "sequence-mean", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    "RLOO": {"baseline": "leave-one-out", "scale_rewards": "none", "ratio": "sequence", "num_iterations": 1}
    | {"kl_coef": 0.0},
}


def test_answers_of_one_word_are_learned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = count_task(max_length=1, verify=lambda prompt, answer: float(answer == ["a"]))
    _, (summary,) = grpo.train(Args(total_timesteps=3200, num_prompts=8, group_size=8, run_dir="run"), task)
    assert summary["pass@1_after"] == 1.0 and summary["pass@k_after"] == 1.0


def test_temperature_and_reference_are_the_same_wherever_answers_are_scored(tmp_path, monkeypatch):
    """With a step size of all but 0 the policy stays what it was, whoever looks at it; the reference is it, too."""
    monkeypatch.chdir(tmp_path)
    args = Args(total_timesteps=192, num_prompts=8, group_size=8, temperature=0.5, baseline="none", run_dir="still")
    args.learning_rate, args.weight_decay, args.kl_coef, args.scale_rewards = 1e-9, 0.0, 1.0, "none"
    grpo.train(args, count_task())
    for row in rows(Path("still/metrics.csv")):
        assert abs(float(row["kl_exact"])) < 1e-6 and abs(float(row["losses/kl_after_update"])) < 1e-6
        assert float(row["losses/policy_loss"]) == pytest.approx(-float(row["reward"]), abs=1e-5)


def test_the_reference_stays_where_it_was_or_follows_when_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kl = {}
    for sync in (0, 2):
        args = Args(total_timesteps=256, num_prompts=8, group_size=8, ref_sync=sync, run_dir=str(sync))
        args.learning_rate, args.num_iterations, args.anneal_lr = 1e-2, 1, False
        grpo.train(args, count_task())
        kl[sync] = [float(row["kl_exact"]) for row in rows(Path(str(sync)) / "metrics.csv")]
    assert abs(kl[0][0]) < 1e-6 and min(kl[0][1:]) > 1e-4
    assert kl[2][:2] == kl[0][:2] and abs(kl[2][2]) < 1e-6 and kl[2][3] > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_to_count(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(total_timesteps=19_200, num_prompts=8, group_size=8, threads=1, **VARIANTS[name])
    _, (summary,) = grpo.train(args, count_task())
    assert summary["pass@1_before"] <= 0.2 and summary["pass@1_after"] >= 0.5  # of six questions with a word never seen
    assert summary["last_100_return"] >= 0.85  # of those in training


def test_sorting_is_learned(tmp_path, monkeypatch):
    """The default run's task with two digits instead of up to five, and a sixth of its answers. Held out are
    five pairs of digits, each asked for again and again."""
    monkeypatch.chdir(tmp_path)
    task = TASKS["sort"]
    short = {name: [q for q in getattr(task, name) if q[2] == grpo.BLANK] for name in ("prompts", "held_out")}
    args = Args(total_timesteps=32_000, num_prompts=32, run_dir="run")
    _, (summary,) = grpo.train(args, task._replace(**short))
    assert summary["pass@1_before"] <= 0.05 and summary["pass@1_after"] >= 0.3
    assert summary["last_100_return"] >= 0.8  # of those in training, a share of right places


def test_countdown_is_learned_beyond_what_the_warm_up_taught(tmp_path, monkeypatch):
    """With a twelfth of the answers and less than half of the warm-up, but four gradient steps per batch and no KL."""
    monkeypatch.chdir(tmp_path)
    args = Args(task="countdown", total_timesteps=40_960, num_prompts=32, group_size=16, warmup_steps=200)
    args.num_iterations, args.kl_coef, args.eval_prompts, args.pass_k = 4, 0.0, 300, 4
    _, (summary,) = grpo.train(args)
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
        batch = sample(agent, task.encode(task.held_out[:64]), 4, task.max_length, 1.0, torch.Generator())
        shares.append(np.mean([is_expression(answer) for answer in task.decode(batch["tokens"], batch["mask"])]))
    assert shares[0] <= 0.05 and shares[1] >= 0.3, shares


def test_a_warm_up_that_diverges_is_one_line(main):
    command = "--task countdown --weight-decay 5000 --warmup-steps 60 --run-dir run"
    code, _, err = main(*command.split())
    assert code == 3 and err[-1].startswith("error: weights after the warm-up not finite in update 0")


def test_without_anything_to_learn_from_nothing_is_learned(tmp_path, monkeypatch):
    """Counting is not learned by luck: the same run on rewards that do not depend on the answer."""
    monkeypatch.chdir(tmp_path)
    task, rng = count_task(), random.Random(0)
    args = Args(total_timesteps=19_200, num_prompts=8, group_size=8, threads=1, run_dir="run")
    agent, _ = grpo.train(args, task._replace(verify=lambda prompt, answer: rng.random()))
    assert grpo.evaluate(agent, task, args)["pass@1"] <= 0.4
