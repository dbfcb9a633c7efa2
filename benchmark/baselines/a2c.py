"""Advantage actor-critic (A2C), alone and with the trust region of ACER.

A2C is A3C (Mnih et al. 2016, https://arxiv.org/abs/1602.01783) whose actors wait for each other.
16 environments take 5 steps each; one step of RMSprop follows, along the gradient of

    mean of  log pi(a|s) A  +  c2 H[pi]  -  c1 (V - R)^2        R: the n-step return, A = R - V

scaled down to a norm of at most 0.5. The advantages are not standardised. PPO with one epoch of one
minibatch has this gradient, since its ratio is 1 (Huang et al. 2022,
https://arxiv.org/abs/2205.09123): tests/test_baselines.py takes both steps and compares them.

With --trust-region the policy's part of the gradient is changed before it goes on into the network
(Wang et al. 2016, https://arxiv.org/abs/1611.01224, section 3.3). In each state, g is its gradient
with respect to the distribution's parameters, mu and log sigma; it includes the entropy bonus. k is
the gradient of KL[average, current] with respect to the same parameters, where the average policy
has the Polyak average of the weights. g becomes

    z = g - max(0, (k.g - delta) / |k|^2) k

the nearest z to g with k.z <= delta: where k.g > delta, as much of k is taken away as makes
k.z = delta.

Environments, steps, RMSprop, c1, c2 and the gradient's norm are those of OpenAI's a2c (August
2017), delta and the share of the average those of its acer. Both are for discrete actions. It is a
guess that the unpublished continuous code of Figure 3 had the same ones. More guesses: standardised
observations, networks of their own for policy and value (OpenAI's a2c has one network with two
heads), and a trust region of mu and log sigma together. The step size of the paper may have been
larger: with 2.1e-3 the double pendulum ends at 7,130 on average, there at 6,681
(benchmark/results/figure3).

RMSprop there is TensorFlow's: its average of squares starts at ONE, so the first steps are short,
and eps stands under the root. PyTorch's starts at zero: its first step is ten step sizes long for
every weight, almost however small the gradient.

    python benchmark/baselines/a2c.py --env-id Hopper-v4
    python benchmark/baselines/a2c.py --env-id Hopper-v4 --trust-region
"""

import copy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_continuous as ppo
from benchmark import baselines
from benchmark.baselines import Batch, flat_gradient
from ppo_continuous import Agent, UserError


@dataclass
class Args(baselines.RolloutArgs):
    """A2C for continuous actions; with --trust-region, ACER's projection of the gradient."""

    script: ClassVar[str] = "a2c"

    num_envs: int = 16  # environments side by side
    num_steps: int = 5  # steps of each environment per update (T)
    gae_lambda: float = 1.0  # GAE with 1 is the n-step return minus V
    learning_rate: float = 7e-4  # RMSprop's step size, decays linearly to 0
    decay: float = 0.99  # share of RMSprop's average of squares that an update keeps
    eps: float = 1e-5  # under RMSprop's root
    vf_coef: float = 0.25  # c1 (OpenAI's 0.5, times the 1/2 in its mse)
    ent_coef: float = 0.01  # c2
    max_grad_norm: float = 0.5  # scale the gradient down to this norm
    trust_region: bool = False  # keep near the average policy
    delta: float = 1.0  # of the trust region: the bound of k.z
    average: float = 0.99  # of the trust region: share of the old average that an update keeps

    @property
    def name(self) -> str:
        return "a2c-tr" if self.trust_region else "a2c"


class RMSprop(torch.optim.Optimizer):
    """TensorFlow's: square <- decay square + (1 - decay) g^2, weights -= lr g / sqrt(square + eps).

    square starts at 1.
    """

    def __init__(self, weights: nn.Parameter, decay: float, eps: float):
        super().__init__([weights], {"lr": 0.0, "decay": decay, "eps": eps})
        self.state[weights]["square"] = torch.ones_like(weights)

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        (weights,) = group["params"]
        square = self.state[weights]["square"]
        square.lerp_(weights.grad.square(), 1 - group["decay"])
        weights -= group["lr"] * weights.grad / (square + group["eps"]).sqrt()


def project(g: Tensor, k: Tensor, delta: float) -> Tensor:
    """The nearest z to g with k.z <= delta, for each of B states: g, k [B, 2U] -> z [B, 2U]"""
    excess = (k * g).sum(-1, keepdim=True) - delta
    square = k.square().sum(-1, keepdim=True)
    return g - excess.clamp(min=0) / square.clamp(min=1e-12) * k


def within_trust_region(
    objective: Tensor, current: tuple[Tensor, Tensor], average: tuple[Tensor, Tensor], delta: float
) -> tuple[Tensor, dict]:
    """A term [B] in place of `objective` [B]; its gradient with respect to `current` is z.

    current, average: mean and log standard deviation [B, U] of a policy. And metrics: the mean KL,
    and the share of states in which z is not g.
    """
    kl = ppo.kl_between(*average, *current)
    g = torch.cat(torch.autograd.grad(objective.sum(), current, retain_graph=True), -1)
    k = torch.cat(torch.autograd.grad(kl.sum(), current, retain_graph=True), -1)
    z = project(g, k, delta)  # a constant: nothing flows back through it
    metrics = {"kl_from_average": kl.mean(), "projected": (z != g).any(-1).float().mean()}
    return (z * torch.cat(current, -1)).sum(-1), metrics


def gradient(agent: Agent, average: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict]:
    """The gradient of minus the objective, one vector [P], scaled down; and metrics.

    average: the agent whose policy has the Polyak average of the weights.
    """
    current = agent.policy(batch["obs"])
    policy_gain = ppo.log_prob_of(*current, batch["actions"]) * batch["advantages"]
    entropy = ppo.entropy_of(current[1])
    value_loss = (agent.value(batch["obs"]) - batch["returns"]).square().mean()
    metrics = {"policy_loss": -policy_gain.mean(), "entropy": entropy.mean()}
    metrics["value_loss"] = value_loss
    objective = policy_gain + args.ent_coef * entropy
    if args.trust_region:
        with torch.no_grad():
            near = average.policy(batch["obs"])
        objective, more = within_trust_region(objective, current, near, args.delta)
        metrics |= more
    grad = flat_gradient(args.vf_coef * value_loss - objective.mean(), agent.parameters())
    norm = grad.norm()
    metrics["grad_norm"] = norm
    shrink = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return shrink * grad, {name: x.item() for name, x in metrics.items()}


def make_optimizers(agent: Agent, args: Args) -> dict:
    average = copy.deepcopy(agent)
    average.obs_stats = agent.obs_stats  # both see the same observations
    optimizer = RMSprop(ppo.one_vector(agent), args.decay, args.eps)
    return {"optimizer": optimizer, "average": average}


def learn(parts: dict, batch: Batch, state: dict, args: Args) -> tuple[dict, dict]:
    """One step of RMSprop; then the average policy follows."""
    agent, average = parts["agent"], parts["average"]
    group = parts["optimizer"].param_groups[0]
    group["lr"] = args.learning_rate * (1 - state["updates"] / args.num_updates)
    (weights,) = group["params"]
    weights.grad, losses = gradient(agent, average, batch, args)
    parts["optimizer"].step()
    if args.trust_region:
        pairs = zip(baselines.policy_of(average), baselines.policy_of(agent), strict=True)
        with torch.no_grad():
            for average_weight, weight in pairs:
                average_weight.lerp_(weight, 1 - args.average)
    return {"learning_rate": group["lr"]}, losses


parse_args = partial(baselines.parse_args, Args)
load_run = partial(baselines.load_run, Args)


def train(args: Args) -> tuple[Agent, dict]:
    """baselines.train(). Raises UserError for flags of the trust region without --trust-region."""
    if not args.trust_region and (args.delta, args.average) != (Args.delta, Args.average):
        raise UserError("--delta and --average need --trust-region")
    return baselines.train(args, make_optimizers, learn)


if __name__ == "__main__":
    ppo.main(lambda argv: train(parse_args(argv)))
