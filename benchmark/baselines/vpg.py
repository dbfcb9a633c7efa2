"""Vanilla policy gradient with a step size that follows the KL.

One step of Adam per batch, along the policy gradient (eq. 1 of the PPO paper)

    g = mean of  grad log pi(a|s) A

and after it, by how far the policy has moved, another step size for the next batch:

    KL[old, new] > 2 d_targ:    step size / 1.5
    KL[old, new] < d_targ / 2:  step size x 1.5

Then the value function is fitted. The advantages are standardised.

The paper says: Adam, with a step size that follows the KL by a rule similar to that of Section 4.
It names a homework of Berkeley's course (cs294-112, hw4), from which are the rule and the first
step size, 1e-3. From OpenAI's acktr_cont (August 2017) are gamma and lambda alone; from its later
version the limits of the step size, 1e-8 and 1. Both have d_targ .002, standardised advantages, and
batches of whole episodes, 2,500 steps or more. These are guesses: exactly 2,500 steps, networks of
64-64 and their first weights, standardised observations, and a value function fitted as in OpenAI's
TRPO. The homework has plain returns minus V as advantages, and fits V for ten epochs. That is
--gae-lambda 1 --value-epochs 10, except for an episode that the end of a batch cuts.
benchmark/figure3.py tried it on three tasks; all three came nearer to the paper.

    python benchmark/baselines/vpg.py --env-id Hopper-v4
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_continuous as ppo
from benchmark import baselines
from benchmark.baselines import Batch, flat_gradient
from ppo_continuous import Agent, UserError  # noqa: F401  for benchmark/sweep.py


@dataclass
class Args(baselines.FittedArgs):
    """Vanilla policy gradient for continuous actions, with an adaptive step size."""

    script: ClassVar[str] = "vpg"

    num_steps: int = 2500  # steps of each environment per update (T)
    learning_rate: float = 1e-3  # Adam's first step size
    kl_target: float = 0.002  # d_targ: how far an update should go


def adapt_step_size(learning_rate: float, kl: float, kl_target: float) -> float:
    """The step size of the next update."""
    if kl > 2 * kl_target:
        learning_rate /= 1.5
    elif kl < kl_target / 2:
        learning_rate *= 1.5
    return min(max(learning_rate, 1e-8), 1.0)


def make_optimizers(agent: Agent, args: Args) -> dict:
    weights = ppo.one_vector(baselines.policy_of(agent))
    return {
        "optimizer": torch.optim.Adam([weights], args.learning_rate, fused=True),
        "value_optimizer": baselines.value_optimizer(agent, args.value_learning_rate),
    }


def learn(parts: dict, batch: Batch, state: dict, args: Args) -> tuple[dict, dict]:
    """A step of the policy, another step size, then the fit of the value function."""
    agent = parts["agent"]
    group = parts["optimizer"].param_groups[0]
    (weights,) = group["params"]
    log_prob = ppo.log_prob_of(*agent.policy(batch["obs"]), batch["actions"])
    loss = -(log_prob * ppo.standardise(batch["advantages"])).mean()
    weights.grad = flat_gradient(loss, baselines.policy_of(agent))
    parts["optimizer"].step()

    learning_rate = group["lr"]
    with torch.no_grad():
        kl = baselines.mean_kl(agent, batch).item()
    group["lr"] = adapt_step_size(learning_rate, kl, args.kl_target)
    losses = {"policy_loss": loss.item(), "grad_norm": weights.grad.norm().item()}
    losses["value_loss"] = baselines.fit_value(parts, batch, args)
    return {"learning_rate": learning_rate}, losses


parse_args = partial(baselines.parse_args, Args)
load_run = partial(baselines.load_run, Args)


def train(args: Args) -> tuple[Agent, dict]:
    return baselines.train(args, make_optimizers, learn)


if __name__ == "__main__":
    ppo.main(lambda argv: train(parse_args(argv)))
