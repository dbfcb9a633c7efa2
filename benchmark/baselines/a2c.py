"""Advantage actor-critic (A2C), alone and with the trust region of ACER.

A2C is A3C (Mnih et al. 2016, https://arxiv.org/abs/1602.01783) whose actors wait for each other.
16 environments take 5 steps each; one step of RMSprop follows, along the gradient of

    mean of  log pi(a|s) A  +  c2 H[pi]  -  c1 (V - R)^2        R: the n-step return, A = R - V

That is PPO with one epoch of one minibatch, whose ratio is 1 (Huang et al. 2022,
https://arxiv.org/abs/2205.09123): tests/test_baselines.py takes both steps and compares them.

With --trust-region the gradient g of the policy's part, by the parameters mu and log sigma of the
distribution in each state, is shortened before it goes on into the network (Wang et al. 2016,
https://arxiv.org/abs/1611.01224, section 3.3). With k the gradient of KL[average, current] by the
same parameters, where the average policy has the Polyak average of the weights, it becomes

    z = g - max(0, (k.g - delta) / |k|^2) k

the nearest z to g with k.z <= delta: where g leads away from the average policy, it is shortened
until k.z is delta. g includes the gradient of the entropy bonus.

All settings are in baselines' a2c and acer (August 2017 and later), for discrete actions. It is a
guess that the unpublished continuous code of Figure 3 had the same ones. RMSprop there is
TensorFlow's: its average of squares starts at ONE, so the first steps are short, and eps stands
under the root. PyTorch's starts at zero: its first step is ten step sizes long for every weight,
however small the gradient.

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
from ppo_continuous import Agent, UserError  # noqa: F401  for benchmark/sweep.py


@dataclass
class Args(baselines.RolloutArgs):
    """A2C for continuous actions; with --trust-region, ACER's projection of the gradient."""

    script: ClassVar[str] = "a2c"

    num_envs: int = 16
    num_steps: int = 5
    gae_lambda: float = 1.0  # GAE with 1 is the n-step return minus V
    learning_rate: float = 7e-4  # RMSprop's step size, decays linearly to 0
    decay: float = 0.99  # of RMSprop's average of squares
    eps: float = 1e-5  # under RMSprop's root
    vf_coef: float = 0.25  # c1: baselines' 0.5 times the 1/2 in its mse
    ent_coef: float = 0.01  # c2
    max_grad_norm: float = 0.5
    trust_region: bool = False
    delta: float = 1.0  # of the trust region
    average: float = 0.99  # share of the old Polyak average that is kept in each update

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


def within_trust_region(gain, mean, log_std, average_mean, average_log_std, delta) -> tuple:
    """A term [B] in place of `gain` [B], whose gradient by mean and log_std [B, U] is projected.

    And the share of states in which the projection changes that gradient.
    """
    new = (mean, log_std)
    kl = ppo.kl_between(average_mean, average_log_std, *new)
    g = torch.cat(torch.autograd.grad(gain.sum(), new, retain_graph=True), -1)
    k = torch.cat(torch.autograd.grad(kl.sum(), new, retain_graph=True), -1)
    z = project(g, k, delta)
    return (z * torch.cat(new, -1)).sum(-1), (z != g).any(-1).float().mean()


def gradient(agent: Agent, average: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict]:
    """The gradient of minus the objective, one vector [P], scaled down; and metrics.

    average: the agent with the Polyak average of the weights; its statistics are not used.
    """
    mean, log_std = agent.policy(batch["obs"])
    log_prob = ppo.log_prob_of(mean, log_std, batch["actions"])
    entropy = ppo.entropy_of(log_std)
    gain = log_prob * batch["advantages"] + args.ent_coef * entropy
    metrics = {"policy_loss": -gain.mean(), "entropy": entropy.mean()}
    if args.trust_region:
        with torch.no_grad():
            average_mean = average.actor(agent.normalise(batch["obs"]))
            average_log_std = average.log_std + torch.zeros_like(mean)
            kl = ppo.kl_between(average_mean, average_log_std, mean, log_std)
        metrics["kl_from_average"] = kl.mean()
        gain, metrics["projected"] = within_trust_region(
            gain, mean, log_std, average_mean, average_log_std, args.delta
        )
    value_loss = (agent.value(batch["obs"]) - batch["returns"]).square().mean()
    metrics["value_loss"] = value_loss
    grad = flat_gradient(args.vf_coef * value_loss - gain.mean(), agent.parameters())
    norm = grad.norm()
    metrics["grad_norm"] = norm
    shrink = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return shrink * grad, {name: x.item() for name, x in metrics.items()}


def make_optimizers(agent: Agent, args: Args) -> dict:
    average = copy.deepcopy(agent)
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
    with torch.no_grad():
        for theirs, ours in zip(average.parameters(), agent.parameters(), strict=True):
            theirs.lerp_(ours, 1 - args.average)
    return {"learning_rate": group["lr"]}, losses


parse_args = partial(baselines.parse_args, Args)
load_run = partial(baselines.load_run, Args)


def train(args: Args) -> tuple[Agent, dict]:
    return baselines.train(args, make_optimizers, learn)


if __name__ == "__main__":
    ppo.main(lambda argv: train(parse_args(argv)))
