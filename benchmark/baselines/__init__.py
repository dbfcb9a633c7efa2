"""Code shared by the algorithms that Figure 3 of the paper compares with PPO.

Each file of this folder is one algorithm, with its equations, its source, and which settings are
known. Agent, distribution, gae(), rollouts, random streams and run folders are those of
ppo_continuous.py. This file adds what the algorithms share besides: flags, networks of other sizes,
the loop of the three that learn from rollouts, and the run folder under the name of the algorithm.

As in ppo_continuous.py with --preset paper, rewards are raw, actions are not clipped (except in
CEM), observations are filtered and clipped to +-5, and a time limit counts as an end. A file and
its flags train one agent; benchmark/figure3.py runs them all.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import tyro
from torch import Tensor, nn

import ppo_continuous as ppo
from ppo_continuous import UserError

Batch = dict[str, Tensor]


# ----------------------------------------------------------------------------------------- FLAGS
@dataclass
class Args:
    """What every algorithm takes."""

    script: ClassVar[str]  # the name of its file, which is written into its run folders
    sample_actions: ClassVar[bool] = False  # the evaluation plays the mean actions
    capture_video: ClassVar[bool] = False

    env_id: str = "HalfCheetah-v4"  # environment id; module:Name-v0 imports the module first
    seed: int = 1  # seed of every random stream: weights, actions, minibatches, environments
    total_timesteps: int = 1_000_000  # environment steps, in whole updates
    num_envs: int = 1  # environments side by side
    # auto: EnvPool with 4 environments or more
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    obs_clip: float = 5.0  # standardised observations are clipped to +- this
    clip_actions: bool = False  # clip actions to their bounds before they are sent
    eval_episodes: int = 20  # evaluation episodes, on seeds that training never used
    run_dir: str | None = None  # folder of this run; None makes one under runs/
    resume: str | None = None  # go on with the run in this folder; its config.json has the flags
    track: bool = False  # mirror the run to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = "ppo"  # project for --track

    @property
    def name(self) -> str:
        """What the rows of the run folder call the algorithm."""
        return self.script


@dataclass
class RolloutArgs(Args):
    """The further flags of the algorithms that learn from rollouts of T steps."""

    num_steps: int = 1024  # steps of each environment per update (T)
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.97  # lambda of GAE; 1: n-step returns
    hidden: int = 64  # units of each of the two hidden layers
    checkpoint_every: int = 0  # updates between checkpoints, which cut episodes short; 0: seldom

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)


@dataclass
class FittedArgs(RolloutArgs):
    """The further flags of those that fit the value function on its own: fit_value()."""

    value_epochs: int = 5  # passes over the batch that fit the value function
    value_minibatch: int = 64  # rows of each of its steps
    value_learning_rate: float = 1e-3  # its Adam step size


LIMITS = {  # of the flags of all algorithms
    (0, 2**31 - 1): ["seed"],
    (1, 10**12): ["total_timesteps"],
    (1, 2**20): ["num_envs", "hidden", "eval_episodes", "value_minibatch"],
    (1, 10**4): ["cg_iterations", "fisher_every", "line_search_tries", "value_epochs"],
    (1, 10**6): ["extra_generations"],
    (2, 2**20): ["num_steps"],
    (2, 10**5): ["candidates"],
    (0, 1): ["gamma", "gae_lambda", "decay", "average", "elite"],
    (0, 1e12): ["vf_coef", "ent_coef", "damping", "checkpoint_every", "extra_std", "action_std"],
    (1e-12, 1): ["learning_rate"],
    (1e-12, 1e12): ["value_learning_rate", "max_kl", "kl_target", "std", "delta", "eps"],
    (1e-12, math.inf): ["max_grad_norm", "obs_clip"],
}


def check_args(args: Args) -> Args:
    """A copy of the flags, to work with. Raises UserError for the first that makes no sense."""
    args = ppo.check_types(args)
    for (low, high), names in LIMITS.items():
        for name in names:
            value = getattr(args, name, low)  # no algorithm has them all
            if not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be between {low} and {high}, not {value}")
    if isinstance(args, RolloutArgs):
        size = f"a batch of {args.num_envs} x {args.num_steps} steps"
        if args.batch_size > 10**8:
            raise UserError(f"{size} is too large; lower --num-envs or --num-steps")
        # every second row may be a reset: two rows must be left
        if args.num_envs * (args.num_steps // 2) < 2:
            raise UserError(f"{size} is too small; raise --num-envs or --num-steps")
    return replace(args, env_backend=ppo.choose_backend(args, args.num_envs))


def parse_args(kind: type[Args], argv: list[str]) -> Args:
    """The command line of an algorithm. Where it is wrong, tyro says so and exits with code 2.

    Raises UserError for what cannot stand beside --resume.
    """
    ppo.given_flags(argv)  # for its errors
    args = tyro.cli(kind, args=argv)
    return args if args.resume is None else load_run(kind, args.resume)[0]


def load_run(kind: type[Args], run_dir: str) -> tuple[Args, dict | None]:
    """The flags of a run folder, and its checkpoint if there is one. Raises UserError."""
    path = Path(run_dir).expanduser()
    try:
        config = json.loads((path / "config.json").read_text())
        if config["script"] != kind.script:
            what = f"{run_dir} is a run of {config['script']}.py, not of {kind.script}.py"
            raise UserError(what)
        args = kind(**config["args"] | {"run_dir": run_dir, "resume": run_dir})
        exists = (path / "checkpoint.pt").exists()
        saved = ppo.load_checkpoint(path / "checkpoint.pt", kind.script) if exists else None
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{run_dir} is not a run folder that can be read: {reason}") from reason
    if saved is not None and saved["args"] != config["args"]:
        raise UserError(f"{path}/config.json has changed since the checkpoint; undo the change")
    return args, saved


def load_resumed(args: Args) -> tuple[Args, dict | None]:
    """load_run() of args.resume where it is given, for train(). Raises UserError."""
    if args.resume is None:
        return args, None
    run_args, saved = load_run(type(args), args.resume)
    if args not in (run_args, type(args)(resume=args.resume)):
        raise UserError("resume stands alone, since config.json has the other flags")
    if saved is None:
        print(f"note: {args.resume} has no checkpoint and starts over", file=sys.stderr)
    return run_args, saved


# ---------------------------------------------------------------------------------------- AGENTS
def mlp(inputs: int, hidden: tuple[int, int], outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of tanh units. `gain` scales the last layer's weights."""
    return nn.Sequential(
        ppo.layer_init(nn.Linear(inputs, hidden[0])),
        nn.Tanh(),
        ppo.layer_init(nn.Linear(hidden[0], hidden[1])),
        nn.Tanh(),
        ppo.layer_init(nn.Linear(hidden[1], outputs), gain),
    )


def make_agent(args: RolloutArgs, actors: ppo.Actors) -> ppo.Agent:
    """The agent of ppo_continuous.py. With 64 hidden units the first weights, too, are the same."""
    obs_dim = actors.envs.single_observation_space.shape[0]
    action_dim = len(actors.low)
    ppo.seed_globals(ppo.stream(args.seed, "weights"))
    agent = ppo.Agent(obs_dim, action_dim, args.obs_clip, log_std=0.0)
    if args.hidden != 64:
        agent.actor = mlp(obs_dim, (args.hidden, args.hidden), action_dim, gain=0.01)
        agent.critic = mlp(obs_dim, (args.hidden, args.hidden), 1, gain=1.0)
    return agent


def policy_of(agent: ppo.Agent) -> nn.ParameterList:
    """The weights of the policy alone: log sigma and the network of the mean."""
    return nn.ParameterList([agent.log_std, *agent.actor.parameters()])


def flat_gradient(y: Tensor, weights, **options) -> Tensor:
    """The gradient of y with respect to a list of weights, one vector [P]."""
    grads = torch.autograd.grad(y, list(weights), **options)
    return torch.cat([grad.flatten() for grad in grads])


def mean_kl(agent: ppo.Agent, batch: Batch) -> Tensor:
    """The mean of KL[old, new] over the batch."""
    return ppo.kl_between(batch["mean"], batch["log_std"], *agent.policy(batch["obs"])).mean()


def value_optimizer(agent: ppo.Agent, learning_rate: float) -> torch.optim.Adam:
    """Adam for the value function alone."""
    return torch.optim.Adam([ppo.one_vector(agent.critic)], learning_rate, fused=True)


def fit_value(parts: dict, batch: Batch, args: FittedArgs) -> float:
    """Fit V to batch["returns"]. Returns the mean loss of the minibatches.

    Every epoch shuffles the rows, and drops those that fill no minibatch, as OpenAI's baselines do.
    """
    agent, optimizer = parts["agent"], parts["value_optimizer"]
    (weights,) = optimizer.param_groups[0]["params"]
    obs = agent.normalise(batch["obs"])
    size = min(args.value_minibatch, len(obs))
    losses = []
    for _ in range(args.value_epochs):
        order = torch.randperm(len(obs), generator=parts["minibatch_rng"])
        for rows in order[: len(order) // size * size].split(size):
            loss = (agent.critic(obs[rows]).squeeze(-1) - batch["returns"][rows]).square().mean()
            weights.grad = flat_gradient(loss, agent.critic.parameters())
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


# -------------------------------------------------------------------------------------- TRAINING
@torch.no_grad()
def make_batch(agent: ppo.Agent, rollout: Batch, args: RolloutArgs) -> Batch:
    """What the algorithms learn from: the B transitions of a rollout, without reset steps.

    The old policy and the old V are those of the weights now, under the statistics now.
    """
    values = agent.value(rollout["obs"])
    mean, log_std = agent.policy(rollout["obs"][:-1])
    ended = rollout["terminated"] | rollout["truncated"]  # a time limit is an end
    advantages = ppo.gae(rollout["rewards"], values, ended, ended, args.gamma, args.gae_lambda)
    batch = {
        "obs": rollout["obs"][:-1],
        "actions": rollout["actions"],
        "mean": mean,
        "log_std": log_std,
        "log_prob": ppo.log_prob_of(mean, log_std, rollout["actions"]),
        "values": values[:-1],
        "advantages": advantages,
        "returns": advantages + values[:-1],
        "valid": rollout["valid"],  # all True in the end; ppo.batch_metrics() reads it
    }
    return {name: x[rollout["valid"]] for name, x in batch.items()}


@ppo.torch_threads(1)  # as in the scripts: for small networks, more cost more than they save
def train(args: RolloutArgs, make_optimizers: Callable, learn: Callable) -> tuple:
    """Rollout, batch, learn, log; then the evaluation. Returns the agent and its summary.

    make_optimizers(agent, args): the parts of the run that learn, by name, besides the agent.
    learn(parts, batch, state, args): one update; returns its charts and its losses.
    Raises UserError for bad input, and NonFiniteError where a number becomes NaN or infinite.
    """
    args, saved = load_resumed(args)
    args = check_args(args)
    actors = ppo.Actors(args, args.num_envs)
    ppo.check_interface(args, actors.envs)
    ppo.space_checkpoints(args, actors.episode_limit)
    agent = make_agent(args, actors)
    state = {"updates": 0, "transitions": 0, "diverged_at": None}
    parts = {
        "agent": agent,
        "action_rng": torch.Generator().manual_seed(ppo.stream(args.seed, "actions")),
        "minibatch_rng": torch.Generator().manual_seed(ppo.stream(args.seed, "minibatches")),
        **make_optimizers(agent, args),
    }
    if saved is not None:
        state = saved["state"]
        ppo.restore(parts, saved)
    run = Run(args, saved)

    with contextlib.closing(actors), contextlib.closing(run):
        restart = True  # environments cannot be saved: they begin anew after a checkpoint
        for iteration in range(state["updates"], args.num_updates):
            # ROLLOUT
            shape = (args.num_steps, args.num_envs, len(actors.low))
            with run.saving_work(state, parts):
                if restart:
                    actors.restart(ppo.stream(args.seed, "environments", iteration))
                    num_episodes = 0
                noise = ppo.draw_noise(shape, parts["action_rng"])
                rollout, episodes = ppo.collect(ppo.in_numpy(agent), actors, noise)
                ppo.check_finite(
                    {"obs": rollout["obs"], "rewards": rollout["rewards"]}, iteration + 1
                )
            ppo.check_played(agent, rollout, noise)

            # UPDATE: first the statistics, as in ppo_continuous.py
            agent.obs_stats.update(rollout["obs"][:-1][rollout["valid"]])
            batch = make_batch(agent, rollout, args)
            charts, losses = learn(parts, batch, state, args)
            losses |= ppo.batch_metrics(agent, batch)
            weights = nn.utils.parameters_to_vector(agent.parameters())
            ppo.check_finite(losses | {"weights": weights}, iteration + 1)

            # LOG
            state["updates"] += 1
            state["transitions"] += len(batch["obs"])
            charts["action_std"] = agent.log_std.exp().mean().item()
            run.log(state["updates"], episodes, charts, losses)
            num_episodes += len(episodes)
            restart = ppo.checkpoint_due(args, state["updates"], num_episodes)
            if restart or state["updates"] == args.num_updates:
                ppo.save_checkpoint(run.path / "checkpoint.pt", run.checkpoint(state, parts))
    return agent, run.finish(state, ppo.evaluate(agent, args, run.path))


class Run(ppo.Run):
    """The run folder of ppo_continuous.py, with the name of another script in it."""

    def __init__(self, args: Args, saved: dict | None):
        self.script = args.script
        super().__init__(
            args, {"env_id": args.env_id}, {"seed": args.seed, "objective": args.name}, saved
        )
