"""Trust Region Policy Optimization (TRPO): the largest gain within a given KL of the old policy.

Schulman, Levine, Moritz, Jordan, Abbeel (2015), https://arxiv.org/abs/1502.05477. With r(theta) the
ratio of the new policy's probability of an action to the old one's, an update solves (eqs. 3 and 4
of the PPO paper)

    maximise  L(theta) = mean of r(theta) A   subject to  mean of KL[old, new] <= delta

to first order in L and to second order in the KL. With g the gradient of L and F the Hessian of the
KL, the Fisher information, both at the old weights, the solution is the step

    s = sqrt(2 delta / x'Fx) x      where  F x = g

x is found by conjugate gradients, which need F only in products with vectors, and such a product is
the gradient of a scalar: F v = grad of (grad KL . v). In the code F is computed from every fifth
row, and F + 0.1 I takes its place in both formulas. This is the damping; it makes the step shorter.
Neither expansion is exact. So the step is halved until the true KL is at most 1.5 delta and the
true L is not lower: the line search. After ten tries without success the policy stays as it was.
Then the value function is fitted.

These settings are in OpenAI's public code of the paper's time (baselines, trpo_mpi, July 2017): T,
gamma, lambda, delta, ten iterations, the damping, Fisher products on every fifth row, the line
search, the fit of the value function. These are guesses: 64-64 networks, as PPO has in the paper
(--hidden 32 is that code's size), ppo_continuous.py's initial weights, and standardised advantages.
(That code computed them from the start, and began to use them later that month.) Two more
differences: that code divides observations by no less than 0.1, and its advantages are from values
under the observation statistics before the batch, ours under those after it.

In that code log sigma was missing from the trained weights until January 2018: sigma stayed 1.
--sigma frozen does the same.

    python benchmark/baselines/trpo.py --env-id Hopper-v4
    python benchmark/baselines/trpo.py --env-id Reacher-v4 --sigma frozen
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_continuous as ppo
from benchmark import baselines
from benchmark.baselines import Batch, flat_gradient, mean_kl
from ppo_continuous import Agent, UserError  # noqa: F401  for benchmark/sweep.py


@dataclass
class Args(baselines.FittedArgs):
    """TRPO for continuous actions."""

    script: ClassVar[str] = "trpo"

    gae_lambda: float = 0.98  # lambda of GAE; 1: n-step returns
    sigma: Literal["learned", "frozen"] = "learned"  # whether log sigma is trained, or stays 0
    max_kl: float = 0.01  # delta, the KL aimed at; 1.5 times as much is accepted
    cg_iterations: int = 10  # iterations of conjugate gradients
    damping: float = 0.1  # this times the identity is added to F
    fisher_every: int = 5  # F is computed from every k-th row; this is k
    line_search_tries: int = 10  # step sizes that may be tried: 1, 1/2, 1/4, ...

    @property
    def name(self) -> str:
        size = "" if self.hidden == 64 else f"-{self.hidden}"
        return f"trpo-{self.sigma}{size}"


def trained_weights(agent: Agent, args: Args) -> nn.ParameterList:
    """The weights of the policy that an update may change."""
    if args.sigma == "frozen":
        return nn.ParameterList(agent.actor.parameters())
    return baselines.policy_of(agent)


def surrogate(agent: Agent, batch: Batch) -> Tensor:
    """L: the mean of r A."""
    log_prob = ppo.log_prob_of(*agent.policy(batch["obs"]), batch["actions"])
    return ((log_prob - batch["log_prob"]).exp() * batch["advantages"]).mean()


def fisher_product(agent: Agent, batch: Batch, weights, damping: float) -> Callable:
    """The function v -> (F + damping I) v, for vectors [P].

    Call it while the agent has the old weights: there the Hessian of the KL is F.
    """
    slope = flat_gradient(mean_kl(agent, batch), weights, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return flat_gradient(slope @ v, weights, retain_graph=True) + damping * v

    return product


def conjugate_gradient(product: Callable, b: Tensor, iterations: int) -> tuple[Tensor, float]:
    """x with A x = b, where product(v) is A v; and the residual that is left, |b - A x|.

    Hestenes and Stiefel (1952).
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = b.clone()
    square = residual @ residual
    for _ in range(iterations):
        if square < 1e-10:
            break
        image = product(direction)
        length = square / (direction @ image)
        x += length * direction
        residual -= length * image
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x, square.sqrt().item()


def trust_region_step(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Change the policy by one step of TRPO. Where no step size is accepted, it stays as it was."""
    weights = trained_weights(agent, args)
    old_surrogate = surrogate(agent, batch)
    g = flat_gradient(old_surrogate, weights)
    subset = {name: x[:: args.fisher_every] for name, x in batch.items()}
    product = fisher_product(agent, subset, weights, args.damping)
    x, residual = conjugate_gradient(product, g, args.cg_iterations)
    step = (2 * args.max_kl / (x @ product(x))).sqrt() * x
    # where g is 0, or nearly, x is 0 and this is NaN: no comparison below is true, nothing changes

    old = parameters_to_vector(weights).detach()
    with torch.no_grad():
        for backtracks in range(args.line_search_tries):
            vector_to_parameters(old + 0.5**backtracks * step, weights)
            new_surrogate = surrogate(agent, batch)
            kl = mean_kl(agent, batch)
            accepted = bool(kl <= 1.5 * args.max_kl and new_surrogate >= old_surrogate)
            if accepted:
                break
    if not accepted:
        vector_to_parameters(old, weights)
        new_surrogate = old_surrogate
    return {
        "surrogate_gain": (new_surrogate - old_surrogate).item(),
        "cg_residual": residual,
        "backtracks": backtracks,
        "accepted": float(accepted),
    }


def make_optimizers(agent: Agent, args: Args) -> dict:
    # an accepted step leaves the weights as views of one vector: begin so, or a resumed run would
    # round differently
    ppo.one_vector(trained_weights(agent, args))
    return {"value_optimizer": baselines.value_optimizer(agent, args.value_learning_rate)}


def learn(parts: dict, batch: Batch, state: dict, args: Args) -> tuple[dict, dict]:
    """A step of the policy, then the fit of the value function."""
    agent = parts["agent"]
    standardised = {"advantages": ppo.standardise(batch["advantages"])}
    losses = trust_region_step(agent, batch | standardised, args)
    losses["value_loss"] = baselines.fit_value(parts, batch, args)
    return {}, losses


parse_args = partial(baselines.parse_args, Args)
load_run = partial(baselines.load_run, Args)


def train(args: Args) -> tuple[Agent, dict]:
    return baselines.train(args, make_optimizers, learn)


if __name__ == "__main__":
    ppo.main(lambda argv: train(parse_args(argv)))
