"""The cross-entropy method (CEM): no gradient, only which candidates did best.

Szita and Lorincz (2006), with the shrinking noise that they used for Tetris. In every generation

    candidates: 200 weight vectors from N(mean, variance + extra), each weight independently
    returns:    one episode of each, with its deterministic policy
    mean, variance <- those of the best 20%
    extra  =  .01^2 max(0, 1 - generation / 150)

These settings are in Schulman's modular_rl (cem.py and experiments/battery-cem.yaml): all numbers
above, networks of 10 and 5 tanh units, a first variance of 1 around random weights, raw returns,
observations standardised and clipped at +-5. (150 is half of its generations.) These are guesses:
that Figure 3 used them, and the orthogonal initial weights. In modular_rl every worker process has
its own observation statistics and renews them at every step. Here there is one filter. It is
renewed at every step of the first generation, since nothing is known of the observations before;
later after each generation, so that all its candidates play under the same one.

Another guess is that actions are clipped to their bounds, which modular_rl does not do. The paper's
curves begin at a return of -95 on Reacher and -592 on HalfCheetah. Our first generation is a little
above both; without clipping (--no-clip-actions) Reacher begins below -440. Both tasks subtract the
squared action from the reward, and weights this random send large actions.

Later the paper's curve stays far below ours on Reacher and on the double pendulum. With normal
noise on all actions (--action-std 1), as a Gaussian policy with a deviation of 1 has it, ours comes
much nearer on both: benchmark/results/figure3 has the runs.

A generation is 200 episodes. Where an episode has 1,000 steps that is 200,000 steps: a million
steps are FIVE generations on HalfCheetah and Swimmer, a hundred on Reacher.

Candidates play side by side: an environment whose episode has ended takes the next candidate. The
run folder has them in their own order, one after another, as if there were one environment: in the
order in which they end, the last 100 would be the longest. metrics.csv has a row per generation,
and its column `update` counts steps.

    python benchmark/baselines/cem.py --env-id Hopper-v4
"""

import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_continuous as ppo
from benchmark import baselines
from ppo_continuous import Agent, UserError

HIDDEN = (10, 5)


@dataclass
class Args(baselines.Args):
    """The cross-entropy method over the weights of a deterministic policy."""

    script: ClassVar[str] = "cem"
    batch_size: ClassVar[int] = 1  # the run folder counts in steps: CEM has no batch of fixed size

    num_envs: int = 50  # candidates that play side by side
    clip_actions: bool = True  # clip actions to their bounds before they are sent
    action_std: float = 0.0  # deviation of normal noise on all actions; 0: deterministic policies
    candidates: int = 200  # candidates per generation
    elite: float = 0.2  # the share of them that the next mean and variance are made of
    std: float = 1.0  # the first deviation of every weight
    extra_std: float = 0.01  # its square is added to the variance at first, then less and less
    extra_generations: int = 150  # generations until nothing is added any more

    @property
    def num_updates(self) -> int:
        return self.total_timesteps

    @property
    def num_elite(self) -> int:
        return round(self.elite * self.candidates)


class Search(nn.Module):
    """A Gaussian over weight vectors [P], each weight independent of the others."""

    def __init__(self, mean: Tensor, std: float):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("variance", torch.full_like(mean, std**2))

    def draw(self, count: int, extra_variance: float, rng: torch.Generator) -> Tensor:
        """Candidates [count, P]."""
        noise = torch.randn(count, len(self.mean), generator=rng)
        return self.mean + (self.variance + extra_variance).sqrt() * noise

    def update(self, candidates: Tensor, returns: np.ndarray, num_elite: int) -> None:
        """Move to the best of the candidates [C, P] by their returns [C]."""
        best = np.argsort(returns, kind="stable")[-num_elite:]
        chosen = candidates[torch.from_numpy(best)]
        self.mean.copy_(chosen.mean(0))
        self.variance.copy_(chosen.var(0, correction=0))


def make_agent(args: Args, actors: ppo.Actors) -> Agent:
    """ppo_continuous.py's agent with a smaller policy; V and sigma are not used."""
    obs_dim = actors.envs.single_observation_space.shape[0]
    ppo.seed_globals(ppo.stream(args.seed, "weights"))
    agent = Agent(obs_dim, len(actors.low), args.obs_clip, log_std=0.0)
    agent.actor = baselines.mlp(obs_dim, HIDDEN, len(actors.low), gain=0.1)
    return agent


def split_candidates(agent: Agent, candidates: Tensor) -> list[np.ndarray]:
    """Candidates [C, P] -> the weights [C, U, D] and biases [C, 1, U] of every layer."""
    shapes = [weight.shape for weight in agent.actor.parameters()]
    parts = candidates.split([shape.numel() for shape in shapes], dim=1)
    layers = []
    for part, shape in zip(parts, shapes, strict=True):
        rows = shape if len(shape) == 2 else (1, *shape)
        layers.append(part.view(len(candidates), *rows).numpy())
    return layers


def filter_of(stats: ppo.RunningStats) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [D] of the observations so far: copies, as the filter goes on."""
    return stats.mean.numpy().copy(), stats.std.numpy().copy()


def batched_policy(layers: list[np.ndarray], mean, std, obs_clip: float) -> Callable:
    """The policies of N candidates, in NumPy: obs [N, D] -> actions [N, U], a row for each."""
    play = ppo.numpy_policy(layers, mean, std, obs_clip, action_std=0.0)
    return lambda obs: play(obs[:, np.newaxis], noise=0.0)[:, 0]


def check_policy(agent: Agent, candidates: Tensor) -> None:
    """Raises UserError where batched_policy() does not play what Agent.policy does."""
    mean, std = filter_of(agent.obs_stats)
    obs = mean + ppo.trial_obs(len(mean), agent.obs_clip) * std
    # the first candidate, once for each of these observations
    layers = [layer[:1].repeat(len(obs), 0) for layer in split_candidates(agent, candidates)]
    fast = batched_policy(layers, mean, std, agent.obs_clip)(obs)
    vector_to_parameters(candidates[0].clone(), agent.actor.parameters())
    if not np.allclose(fast, ppo.act(agent, obs), rtol=1e-4, atol=1e-5):
        raise UserError("batched_policy() does not play Agent.policy; change both alike")


def play_generation(
    agent: Agent,
    candidates: Tensor,
    actors: ppo.Actors,
    action_std: float,
    rng: torch.Generator,
    first: bool = False,
) -> tuple:
    """One episode of each of C candidates: returns [C], lengths [C], and the filter after it.

    They play under the filter as it was before; in the `first` generation it changes as they play.
    action_std: the deviation of the noise that `rng` adds to their actions.
    """
    count = len(candidates)
    shape = (actors.num_envs, len(actors.low))
    layers = split_candidates(agent, candidates)
    stats = copy.deepcopy(agent.obs_stats)  # the agent keeps its own, should an environment fail
    mean, std = filter_of(stats)
    returns, lengths = np.zeros(count), np.zeros(count, int)
    candidate_of = np.arange(actors.num_envs)  # of each environment
    next_candidate = actors.num_envs
    playing = np.ones(actors.num_envs, bool)
    changed = True
    while playing.any():
        valid = playing & ~actors.ended  # the step after an end only resets
        if valid.any():
            stats.update(torch.from_numpy(actors.obs[valid]))
        if first:
            mean, std = filter_of(stats)
        if first or changed:
            now = [layer[candidate_of] for layer in layers]
            play = batched_policy(now, mean, std, agent.obs_clip)
        *_, episodes = actors.step(play(actors.obs) + action_std * ppo.draw_noise(shape, rng))
        for i, episode_return, length in episodes:
            if playing[i]:
                returns[candidate_of[i]] = episode_return
                lengths[candidate_of[i]] = length
                playing[i] = next_candidate < count
                candidate_of[i] = min(next_candidate, count - 1)
                next_candidate += 1
        changed = len(episodes) > 0
    return returns, lengths, stats


@ppo.torch_threads(1)
def train(args: Args) -> tuple[Agent, dict]:
    """Generation after generation, then an evaluation of the mean. Returns agent and summary.

    The last generation is played to its end, so there may be more steps than total_timesteps.
    Raises UserError for bad input, and NonFiniteError where a number becomes NaN or infinite.
    """
    args, saved = baselines.load_resumed(args)
    args = baselines.check_args(args)
    if args.num_envs > args.candidates:
        raise UserError(f"--num-envs must be at most --candidates, {args.candidates}")
    if args.num_elite < 2:  # one alone has no variance
        raise UserError(f"--elite {args.elite} of {args.candidates} candidates are fewer than 2")
    actors = ppo.Actors(args, args.num_envs)
    ppo.check_interface(args, actors.envs)
    if actors.episode_limit is None:
        raise UserError(f"{args.env_id} has no time limit: one candidate might play forever")
    agent = make_agent(args, actors)
    search = Search(parameters_to_vector(agent.actor.parameters()).detach(), args.std)
    state = {"updates": 0, "transitions": 0, "generations": 0, "diverged_at": None}
    parts = {
        "agent": agent,
        "search": search,
        "candidate_rng": torch.Generator().manual_seed(ppo.stream(args.seed, "candidates")),
        "action_rng": torch.Generator().manual_seed(ppo.stream(args.seed, "actions")),
    }
    if saved is not None:
        state = saved["state"]
        ppo.restore(parts, saved)
    run = baselines.Run(args, saved)
    # SPS counts from the start, since nothing compiles
    run.warm_time, run.warm_step = run.started, state["updates"]

    with contextlib.closing(actors), contextlib.closing(run):
        while state["updates"] < args.total_timesteps:
            # GENERATION
            generation = state["generations"]
            extra = args.extra_std**2 * max(0.0, 1 - generation / args.extra_generations)
            with run.saving_work(state, parts):
                candidates = search.draw(args.candidates, extra, parts["candidate_rng"])
                actors.restart(ppo.stream(args.seed, "environments", generation))
                returns, lengths, stats = play_generation(
                    agent,
                    candidates,
                    actors,
                    args.action_std,
                    parts["action_rng"],
                    first=generation == 0,
                )
                numbers = {"obs": stats.mean, "returns": torch.from_numpy(returns)}
                ppo.check_finite(numbers, generation + 1)

            # UPDATE
            agent.obs_stats = stats
            check_policy(agent, candidates)
            search.update(candidates, returns, args.num_elite)
            vector_to_parameters(search.mean.clone(), agent.actor.parameters())

            # LOG
            steps = int(lengths.sum())
            ends = lengths.cumsum() - steps  # places of the last steps, counted from the end
            state["generations"] += 1
            state["updates"] += steps
            state["transitions"] += steps
            best = np.sort(returns)[::-1]
            charts = {
                "generation": state["generations"],
                "best_return": float(best[0]),
                "elite_return": float(best[: args.num_elite].mean()),
                "weight_std": search.variance.sqrt().mean().item(),
            }
            episodes = list(zip(ends.tolist(), returns.tolist(), lengths.tolist(), strict=True))
            run.bar.update(steps - 1)  # log() adds the last one
            run.log(state["updates"], episodes, charts, {"kl_after_update": None})
            ppo.save_checkpoint(run.path / "checkpoint.pt", run.checkpoint(state, parts))
    return agent, run.finish(state, ppo.evaluate(agent, args, run.path))


parse_args = partial(baselines.parse_args, Args)
load_run = partial(baselines.load_run, Args)


if __name__ == "__main__":
    ppo.main(lambda argv: train(parse_args(argv)))
