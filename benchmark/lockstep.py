"""Many agents of ppo_continuous.py side by side, for far less than the price of as many runs.

    python benchmark/lockstep.py --env-id Hopper-v4 --seeds 1 2 3 --objectives none clip:0.2 kl:1
    python benchmark/lockstep.py --preset paper --seeds 1 2 3 --run-dir runs/mine
    python benchmark/lockstep.py --resume runs/mine

trains an agent for every pair of seed and objective. All other flags are ppo_continuous.py's, but
for --evaluate. Below the run folder, every agent has a folder of its own, such as clip-0.2__1, with
the files that the script would have written. So `ppo_continuous.py --evaluate`, load_policy() and
benchmark/plot.py take it like any other.

Agent, loss terms, advantages and random streams are the script's own functions. This file adds the
axis of agents, A, and writes again what that axis forces: means over a minibatch in which reset
rows weigh 0, the gradient's norm and an Adam step for each agent (gradient_step), the steps of an
update (update_group), how a rollout becomes batches (make_batches), the evaluation, and what
happens when an agent meets a number that is not finite (it is frozen). Every random stream of an
agent is keyed by its seed alone. So an agent starts with the same bits alone and in a crowd, on the
same simulator (--env-backend auto counts the actors of all agents). And agents of one seed begin
with the same weights, and get the same noise, minibatch orders and environment seeds: their
objectives can be compared in pairs.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous as ppo
from ppo_continuous import Actors, Agent, Args, NonFiniteError, Objective, RunningStats, UserError

Batch = dict[str, Tensor]
KINDS = {"clip": "clip", "none": "clip", "kl": "kl", "adaptive": "kl", "pg": "pg"}


def crowd_args(args: Args, seeds: list[int], objectives: list[str]) -> list[Args]:
    """The flags of every agent: those of the script, with a seed and an objective.

    Raises UserError for flags that make no sense.
    """
    for name, values in (("seeds", seeds), ("objectives", objectives)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} needs at least one value, and each only once")
    actors = args.num_envs * len(seeds) * len(objectives)
    args = replace(args, env_backend=ppo.choose_backend(args, actors))
    crowd = []
    for objective in objectives:
        for seed in seeds:
            crowd.append(ppo.check_args(replace(args, seed=seed, objective=objective)))
    if len(crowd) * args.batch_size > 10**8:
        raise UserError(f"{len(crowd)} batches of {args.batch_size} steps are too large")
    return crowd


# ------------------------------------------------------------------------------ THE GRADIENT STEP
class LossTerms(nn.Module):
    """The script's loss_terms() as a module, which is what functional_call() wants."""

    def __init__(self, agent: Agent, args: Args):
        super().__init__()
        self.agent = agent
        self.args = args

    def forward(self, minibatch: Batch, objective: Objective, beta: Tensor) -> Batch:
        return ppo.loss_terms(self.agent, minibatch, objective, beta, self.args)


def mean_of(x: Tensor, valid: Tensor) -> Tensor:
    """The mean of x [B] over its transitions; reset rows do not count, whatever is in them."""
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def standardise(x: Tensor, valid: Tensor) -> Tensor:
    """The script's standardise() of x [B], over its transitions."""
    x = x - mean_of(x, valid)
    variance = torch.where(valid, x.square(), 0.0).sum() / (valid.sum() - 1).clamp(min=1)
    return x / (variance.sqrt() + 1e-8)


def gradient_step(
    terms: LossTerms,
    kind: str,
    learner: dict,
    buffers: Batch,
    minibatch: Batch,
    corrections: tuple[Tensor, Tensor],
    epsilon: Tensor,
    beta: Tensor,
    lr: Tensor,
) -> dict:
    """A minibatch step of ONE agent: the script's gradient(), then Adam (Kingma and Ba 2015).

    learner: weights [P], one vector; Adam's m, v [P] and its step count t; sums of the metrics;
    active: whether to take this step; finite: whether all numbers were so far. A step that is not
    taken, or is not finite, changes nothing. corrections: bias_corrections() of this step.
    """
    args = terms.args
    valid = minibatch["valid"]
    if args.norm_adv == "minibatch":
        minibatch = minibatch | {"advantages": standardise(minibatch["advantages"], valid)}
    objective = Objective(kind, epsilon=epsilon)

    def loss(weights):  # no annotation: torch.compile would run it, and stop there
        named = by_name(terms, weights)
        each = functional_call(terms, (named, buffers), (minibatch, objective, beta))
        means = {name: mean_of(term, valid) for name, term in each.items()}
        return ppo.total_loss(means, args), means

    gradient, metrics = torch.func.grad(loss, has_aux=True)(learner["weights"])
    norm = gradient.norm()
    metrics["grad_norm"] = norm
    finite = torch.stack([norm, metrics["policy_loss"], metrics["value_loss"]]).isfinite().all()
    wanted = learner["active"] & (valid.sum() > 1)
    taken = wanted & finite

    gradient = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    bias_m, bias_v = corrections
    m = 0.9 * learner["m"] + 0.1 * gradient
    v = 0.999 * learner["v"] + 0.001 * gradient.square()
    step = lr * (m / bias_m) / ((v / bias_v).sqrt() + 1e-5)
    metrics["steps"] = torch.ones_like(norm)
    # the order of names is that of `learner`, or torch.compile would take it for another program
    result = {
        "weights": torch.where(taken, learner["weights"] - step, learner["weights"]),
        "m": torch.where(taken, m, learner["m"]),
        "v": torch.where(taken, v, learner["v"]),
        "t": torch.where(taken, learner["t"] + 1, learner["t"]),
        "active": learner["active"] & (finite | ~wanted),
        "finite": learner["finite"] & (finite | ~wanted),
        "sums": {},
    }
    for name, total in learner["sums"].items():
        result["sums"][name] = torch.where(taken, total + metrics[name], total)
    return result


def by_name(terms: LossTerms, weights: Tensor) -> Batch:
    """The vector of all weights [P] -> the weights of `terms` by name, views of it."""
    parts = weights.split([parameter.numel() for parameter in terms.parameters()])
    named = zip(terms.named_parameters(), parts, strict=True)
    return {name: part.view_as(parameter) for (name, parameter), part in named}


def bias_corrections(t: Tensor) -> tuple[Tensor, Tensor]:
    """What Adam divides m and v by in the step after t steps; t [A].

    Computed once, out here: in the compiled step, every loop would take both powers again.
    """
    t = t.double() + 1
    return (1 - 0.9**t).float(), (1 - 0.999**t).float()


def make_steps(agents: list[Agent], crowd: list[Args], compiling: bool) -> dict[str, Callable]:
    """gradient_step() of all agents of a kind of objective, a function for each kind there is.

    Grouped by kind, the branches of ppo_loss are Python's, as in the script, and no term of one
    kind can spoil the gradient of another. (`none` is `clip` with epsilon = inf.)
    """
    terms = LossTerms(agents[0], crowd[0])  # lends its structure; the weights are given
    steps = {}
    for kind in dict.fromkeys(kind_of(args) for args in crowd):
        step = torch.vmap(partial(gradient_step, terms, kind), in_dims=(0,) * 6 + (None,))
        steps[kind] = torch.compile(step, dynamic=False, fullgraph=True) if compiling else step
    return steps


def kind_of(args: Args) -> str:
    return KINDS[ppo.parse_objective(args.objective).kind]


# ------------------------------------------------------------------------------------- THE UPDATE
def stack(parts: list[Batch]) -> Batch:
    """A list of A dicts -> a dict of stacked tensors [A, ...]"""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def learner_of(optimizer: torch.optim.Adam) -> Batch:
    """Weights, Adam's two averages [P] and the number of its steps; zeros before the first."""
    (weights,) = optimizer.param_groups[0]["params"]
    state = optimizer.state[weights]
    return {
        "weights": weights.detach(),
        "m": state.get("exp_avg", torch.zeros_like(weights)),
        "v": state.get("exp_avg_sq", torch.zeros_like(weights)),
        "t": state.get("step", torch.zeros((), device=weights.device)),
    }


def put_back(optimizer: torch.optim.Adam, learner: dict, i: int) -> None:
    """Copy agent i's part of the stacked `learner` to its weights and its optimiser."""
    (weights,) = optimizer.param_groups[0]["params"]
    with torch.no_grad():
        weights.copy_(learner["weights"][i])
    optimizer.state[weights] = {
        "step": learner["t"][i].clone(),
        "exp_avg": learner["m"][i].clone(),
        "exp_avg_sq": learner["v"][i].clone(),
    }


def update(
    steps: dict[str, Callable],
    agents: list[Agent],
    optimizers: list[torch.optim.Adam],
    batches: list[Batch],
    betas: list[float],
    alive: list[bool],
    crowd: list[Args],
    orders: list[Tensor],
    lr: float,
) -> tuple[list[dict], list[bool]]:
    """The script's update() for every agent that is alive. Returns their metrics, and who still is.

    batches: for each agent what the script's update() takes. orders: for each [K, B], the order of
    its rows in every epoch.
    """
    metrics, alive = [{} for _ in agents], list(alive)
    device = orders[0].device
    if crowd[0].norm_adv == "batch":
        batches = [dict(batch) for batch in batches]
        for batch in batches:
            valid = batch["valid"]
            advantages = torch.zeros_like(batch["advantages"])
            advantages[valid] = ppo.standardise(batch["advantages"][valid])
            batch["advantages"] = advantages
    for kind, step in steps.items():
        members = [i for i, args in enumerate(crowd) if kind_of(args) == kind]
        learner = stack([learner_of(optimizers[i]) for i in members])
        learner |= {
            "active": torch.tensor([alive[i] for i in members], device=device),
            "finite": torch.tensor([alive[i] for i in members], device=device),
            "sums": zero_sums(agents[0], batches[0], crowd[0], len(members)),
        }
        epsilons = [ppo.parse_objective(crowd[i].objective).epsilon for i in members]
        learner = update_group(
            step=step,
            learner=learner,
            buffers=stack([dict(LossTerms(agents[i], crowd[0]).named_buffers()) for i in members]),
            batch=stack([batches[i] for i in members]),
            orders=torch.stack([orders[i] for i in members]),
            epsilon=torch.tensor(epsilons, device=device),
            beta=torch.tensor([betas[i] for i in members], device=device),
            lr=torch.tensor(lr, device=device),
            args=crowd[0],
        )
        for place, i in enumerate(members):
            put_back(optimizers[i], learner, place)
            for name, total in learner["sums"].items():
                if name != "steps":
                    metrics[i][name] = (total[place] / learner["sums"]["steps"][place]).item()
            metrics[i] |= ppo.batch_metrics(agents[i], batches[i])
            finite = all(map(math.isfinite, metrics[i].values()))
            alive[i] = bool(learner["finite"][place]) and finite
    return metrics, alive


def zero_sums(agent: Agent, batch: Batch, args: Args, agents: int) -> Batch:
    """Where the metrics of the steps are added up, [A] each: every name that loss_terms() gives."""
    two_rows = {name: x[:2] for name, x in batch.items()}
    with torch.no_grad():
        terms = ppo.loss_terms(agent, two_rows, Objective("none"), 0.0, args)
    device = batch["obs"].device
    return {name: torch.zeros(agents, device=device) for name in (*terms, "grad_norm", "steps")}


def shuffle(batch: Batch, order: Tensor) -> Batch:
    """The rows of every agent, x [A, B, ...], in its own order [A, B]."""
    first = torch.arange(len(order), device=order.device).unsqueeze(1) * order.shape[1]
    rows = (first + order).flatten()  # one index_select() is faster than x[i, order]
    shuffled = {name: x.flatten(0, 1).index_select(0, rows) for name, x in batch.items()}
    return {name: x.unflatten(0, order.shape) for name, x in shuffled.items()}


def update_group(step, learner, buffers, batch, orders, epsilon, beta, lr, args) -> dict:
    """K epochs of minibatch steps of the agents of a kind, [A, ...] each; the new learner."""
    for epoch in range(args.update_epochs):
        before = learner["sums"]
        shuffled = shuffle(batch, orders[:, epoch])
        chunks = {name: x.chunk(args.num_minibatches, 1) for name, x in shuffled.items()}
        for i in range(len(chunks["valid"])):
            minibatch = {name: parts[i] for name, parts in chunks.items()}
            corrections = bias_corrections(learner["t"])
            learner = step(learner, buffers, minibatch, corrections, epsilon, beta, lr)
        if args.target_kl is not None:
            steps = learner["sums"]["steps"] - before["steps"]
            approx_kl = (learner["sums"]["approx_kl"] - before["approx_kl"]) / steps
            learner["active"] = learner["active"] & (approx_kl <= args.target_kl)
            if not learner["active"].any():
                break
    return learner


# ------------------------------------------------------------------------------------ THE ROLLOUT
def follows(fast: Callable, agents: list[Agent], mean: np.ndarray, std: np.ndarray) -> bool:
    """Whether `fast` plays as every agent's act() does, on random observations.

    mean, std [A, 1, D]: each agent's statistics of observations.
    """
    obs = mean + ppo.trial_obs(mean.shape[-1], agents[0].obs_clip) * std
    played = fast(obs, 1.0)
    exact = [ppo.act(agent, mine, 1.0) for agent, mine in zip(agents, obs, strict=True)]
    return np.allclose(played, np.stack(exact), rtol=1e-4, atol=1e-5)


def crowd_policy(agents: list[Agent], check: bool = False) -> Callable:
    """All agents' act() as one function of obs [A * N, D] and noise [A * N, U], in NumPy.

    With `check`, raises UserError where an agent's own act() plays otherwise, as it does after a
    change of Agent.policy: then ppo.numpy_policy must be changed alike.
    """
    weights = []
    for same in zip(*(agent.actor.parameters() for agent in agents), strict=True):
        weights.append(torch.stack(same).detach().cpu().numpy())  # [A, out, in], of biases [A, out]
    weights = [x if x.ndim == 3 else x[:, np.newaxis] for x in weights]
    mean = torch.stack([agent.obs_stats.mean for agent in agents]).cpu().numpy()[:, np.newaxis]
    std = torch.stack([agent.obs_stats.std for agent in agents]).cpu().numpy()[:, np.newaxis]
    spread = torch.stack([agent.log_std.detach() for agent in agents]).cpu().exp().numpy()
    try:
        fast = ppo.numpy_policy(weights, mean, std, agents[0].obs_clip, spread[:, np.newaxis])
        same = not check or follows(fast, agents, mean, std)
    except ValueError:  # another network
        same = False
    if not same:
        raise UserError("ppo.numpy_policy does not play Agent.policy; change both alike")

    def play(obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        obs = obs.reshape(len(agents), -1, obs.shape[-1])
        noise = noise.reshape(len(agents), -1, noise.shape[-1])
        return fast(obs, noise).reshape(-1, noise.shape[-1])

    return play


def split(x: Tensor, agents: int) -> list[Tensor]:
    """[T, A * N, ...] -> A times [T, N, ...]"""
    return list(x.unflatten(1, (agents, -1)).unbind(1))


def make_batches(
    agents: list[Agent],
    return_stats: list[RunningStats],
    actors: Actors,
    rollout: Batch,
    alive: list[bool],
    args: Args,
) -> list[Batch]:
    """What the script's train() makes of a rollout under ADVANTAGES, for every agent.

    Agents that are not alive keep their statistics; what they are given means nothing.
    """
    count = len(agents)
    ended = rollout["terminated"] | rollout["truncated"]
    valid = split(rollout["valid"], count)
    rewards = split(rollout["rewards"], count)
    if args.scale_rewards:
        sums, actors.discounted = ppo.discounted_returns(
            rollout["rewards"].numpy(), ended.numpy(), actors.discounted, args.gamma
        )
        sums = split(torch.from_numpy(sums), count)
        for i in range(count):
            if alive[i]:
                return_stats[i].update(sums[i][valid[i]].unsqueeze(-1))
            rewards[i] = (rewards[i] / return_stats[i].std).clamp(-10, 10).float()
    terminated = rollout["terminated"]
    if not args.bootstrap_truncated:
        terminated = ended

    obs = split(rollout["obs"].to(args.device), count)
    actions = split(rollout["actions"].to(args.device), count)
    batches, values = [], []
    with torch.no_grad():
        for i, agent in enumerate(agents):
            if alive[i]:
                agent.obs_stats.update(obs[i][:-1][valid[i]])
            mean, log_std = agent.policy(obs[i][:-1])
            values.append(agent.value(obs[i]))
            batches.append(
                {
                    "obs": obs[i][:-1],
                    "actions": actions[i],
                    "mean": mean,
                    "log_std": log_std,
                    "log_prob": ppo.log_prob_of(mean, log_std, actions[i]),
                    "values": values[i][:-1],
                    "valid": valid[i].to(args.device),
                }
            )
    advantages = ppo.gae(
        torch.cat(rewards, 1),
        torch.cat(values, 1).cpu(),
        terminated,
        rollout["truncated"],
        args.gamma,
        args.gae_lambda,
    )
    for batch, mine in zip(batches, split(advantages.to(args.device), count), strict=True):
        batch["advantages"] = mine
        batch["returns"] = mine + batch["values"]
    return [{name: x.flatten(0, 1) for name, x in batch.items()} for batch in batches]


# --------------------------------------------------------------------------------------- TRAINING
class AgentRun(ppo.Run):
    """The run folder of one agent; the crowd has the progress bar."""

    hide_bar = True
    own_checkpoint = False


@ppo.torch_threads(1)  # as in the script: the bits of weights and rollouts depend on it
def train(args: Args, seeds: list[int], objectives: list[str]) -> list[dict]:
    """Algorithm 1 for all agents, then the evaluation. Returns the summaries of the agents.

    args.seed and args.objective are ignored. To go on with a run, args is
    Args(resume=RUN_DIR) or load_run(RUN_DIR)[0], in which `device` and `compile` may have changed;
    its folder says which agents there are, and `seeds` and `objectives` are ignored. Raises
    UserError for bad input, and NonFiniteError when no agent is alive any more.
    """
    saved = None
    if args.resume is not None:
        own, seeds, objectives, saved = load_run(args.resume)
        if args == Args(resume=args.resume):
            args = own
        changes = {name: getattr(args, name) for name in ppo.RESUME_FLAGS}
        if args != replace(own, **changes):
            raise UserError("resume stands alone, since config.json has the other flags")
    crowd = crowd_args(args, seeds, objectives)
    args = crowd[0]
    count = len(crowd)
    actors = Actors(args, args.num_envs * count)
    ppo.check_interface(args, actors.envs)
    ppo.space_checkpoints(args, actors.episode_limit)
    when = time.strftime("%Y%m%d-%H%M%S")
    name = re.sub("[/:]", "-", f"{args.env_id}__lockstep__{when}-{os.getpid()}")
    folder = Path(args.run_dir or f"runs/{name}").expanduser().absolute()
    if args.resume is None:
        make_folder(folder, args, seeds, objectives)
    states, parts, runs = [], [], []
    for i, agent_args in enumerate(crowd):
        path = folder / agent_name(agent_args)
        resume = None
        if args.resume is not None:
            path.mkdir(exist_ok=True)  # the crowd may have been stopped before it made this one
            resume = str(path)
        flags = {"run_dir": str(path), "resume": resume, "checkpoint_every": args.checkpoint_every}
        agent_args = replace(agent_args, **flags)
        agent_saved = saved["agents"][i] if saved else None
        state, agent_parts = ppo.begin(agent_args, actors, agent_saved)
        who = {"seed": agent_args.seed, "objective": agent_args.objective}
        states.append(state)
        parts.append(agent_parts)
        runs.append(AgentRun(agent_args, {"env_id": args.env_id}, who, agent_saved))
    flags = flags_of(args)
    if saved is not None:
        flags = saved["args"]  # as in config.json, also where the run has moved
        save_crowd(folder, flags, saved["agents"])  # files of agents may be older, or missing
    agents = [agent_parts["agent"] for agent_parts in parts]
    compiling = args.compile and ppo.has_compiler()
    steps = make_steps(agents, crowd, compiling)
    threads = cores() if count >= 4 else 1  # the steps of few agents are too small to share
    done = states[0]["updates"]
    total = args.num_updates * args.batch_size * count
    bar = tqdm(total=total, initial=done * args.batch_size * count, unit_scale=True, disable=None)
    bar.set_description(f"{args.env_id} x{count}")
    bar.set_postfix_str("the first update compiles" if compiling else "")

    def save() -> None:
        each = zip(runs, states, parts, strict=True)
        checkpoints = [run.checkpoint(state, agent_parts) for run, state, agent_parts in each]
        save_crowd(folder, flags, checkpoints)

    restart = True
    generators = [agent_parts["action_rng"] for agent_parts in parts]
    with contextlib.ExitStack() as stack:
        for open_now in (actors, *runs):
            stack.enter_context(contextlib.closing(open_now))
        for iteration in range(done, args.num_updates):
            # ROLLOUT
            torch.set_num_threads(1)
            shape = (args.num_steps, args.num_envs, len(actors.low))
            play = crowd_policy(agents, check=iteration == done)
            with ppo.saving_work(save, generators, f"{args.env_id}, update {iteration + 1}"):
                if restart:
                    seeds_now = []
                    for agent_args in crowd:
                        first = ppo.stream(agent_args.seed, "environments", iteration)
                        seeds_now += range(first, first + args.num_envs)
                    actors.restart(seeds_now)
                    num_episodes = np.zeros(count, int)  # of each agent since the last checkpoint
                noise = [ppo.draw_noise(shape, generator) for generator in generators]
                rollout, episodes = ppo.collect(play, actors, np.concatenate(noise, 1))
            if iteration == done:
                obs, actions = split(rollout["obs"], count), split(rollout["actions"], count)
                for i, agent in enumerate(agents):
                    ppo.check_played(agent, {"obs": obs[i], "actions": actions[i]}, noise[i])

            # ADVANTAGES
            torch.set_num_threads(threads)
            alive = [state["diverged_at"] is None for state in states]
            broken = find_broken(rollout, count)
            for name in ("obs", "rewards"):
                # no NaN in anybody's kernels
                rollout[name] = rollout[name].nan_to_num(0.0, 0.0, 0.0)
            alive = [alive[i] and i not in broken for i in range(count)]
            return_stats = [agent_parts["return_stats"] for agent_parts in parts]
            batches = make_batches(agents, return_stats, actors, rollout, alive, args)

            # UPDATE
            lr = args.learning_rate
            if args.anneal_lr:
                lr = lr * (1 - iteration / args.num_updates)
            orders = []
            for agent_parts in parts:
                rng = agent_parts["minibatch_rng"]
                order = [
                    torch.randperm(args.batch_size, generator=rng)
                    for _ in range(args.update_epochs)
                ]
                orders.append(torch.stack(order).to(args.device))
            # the first update has compiled all there is: no more checks whether that still fits
            with torch.compiler.set_stance(skip_guard_eval_unsafe=iteration > done):
                metrics, alive = update(
                    steps=steps,
                    agents=agents,
                    optimizers=[agent_parts["optimizer"] for agent_parts in parts],
                    batches=batches,
                    betas=[state["beta"] for state in states],
                    alive=alive,
                    crowd=crowd,
                    orders=orders,
                    lr=lr,
                )

            # LOG
            bar.update(args.batch_size * count)
            bar.set_postfix_str("", refresh=False)
            finished = [[] for _ in crowd]
            for row, episode_return, length in episodes:
                t, column = divmod(row, args.num_envs * count)
                i, actor = divmod(column, args.num_envs)
                finished[i].append((t * args.num_envs + actor, episode_return, length))
            for i, state in enumerate(states):
                beta = state["beta"]
                std = agents[i].log_std.detach().exp().mean().item()
                charts = {"learning_rate": lr, "beta": beta, "action_std": std}
                state["updates"] += 1
                state["transitions"] += int(batches[i]["valid"].sum())
                if not alive[i]:
                    metrics[i] = dict.fromkeys(metrics[i])  # empty cells
                    if state["diverged_at"] is None:
                        state["diverged_at"] = state["updates"] * args.batch_size
                        what = f"{broken.get(i, 'loss, gradient or KL')} not finite in update"
                        tqdm.write(f"{what} {state['updates']}: {agent_name(crowd[i])} is frozen")
                elif crowd[i].objective.startswith("adaptive"):
                    objective = ppo.parse_objective(crowd[i].objective)
                    state["beta"] = ppo.adapt_beta(beta, metrics[i]["kl_after_update"], objective)
                runs[i].log(state["updates"], finished[i], charts, metrics[i])
            if not any(alive):
                raise NonFiniteError(f"no agent is finite after update {iteration + 1}")
            num_episodes += [len(ended) for ended in finished]
            restart = ppo.checkpoint_due(args, iteration + 1, num_episodes.min())
            if restart or iteration + 1 == args.num_updates:
                save()
    bar.close()
    returns = evaluate(agents, crowd, folder)
    return [run.finish(*rest) for run, *rest in zip(runs, states, returns, strict=True)]


def find_broken(rollout: Batch, count: int) -> dict[int, str]:
    """Agents whose environments gave a number that is not finite -> where."""
    broken = {}
    for name in ("rewards", "obs"):
        for i, x in enumerate(split(rollout[name], count)):
            if not x.isfinite().all():
                broken[i] = name
    return broken


def evaluate(agents: list[Agent], crowd: list[Args], folder: Path) -> list[list[float]]:
    """The script's evaluate() for every agent, on the same seeds: A lists of returns.

    Many episodes run side by side. An agent with a return that is not finite has NaN for all of its
    returns. Films are made one by one, and there such a return is a NonFiniteError.
    """
    args = crowd[0]
    if args.capture_video:
        both = zip(agents, crowd, strict=True)
        return [ppo.evaluate(agent, mine, folder / agent_name(mine)) for agent, mine in both]
    firsts = [2**30 + ppo.stream(mine.seed, "evaluation") for mine in crowd]
    together = min(args.eval_episodes, max(1, 128 // len(crowd)))  # a simulator takes over 1 MB
    actors = Actors(args, together * len(crowd))
    limit = actors.episode_limit or max(1000, args.total_timesteps // args.eval_episodes)
    play = crowd_policy(agents)
    episodes = [[] for _ in crowd]
    for start in range(0, args.eval_episodes, together):
        seeds = [first + start + i for first in firsts for i in range(together)]
        played = play_once(play, actors, seeds, limit, args.sample_actions)
        for i, mine in enumerate(episodes):
            mine += played[i * together : (i + 1) * together]
    actors.close()
    episodes = [mine[: args.eval_episodes] for mine in episodes]
    num_cut = sum(cut for mine in episodes for _, cut in mine)
    if num_cut:
        what = f"{num_cut} of {len(crowd) * args.eval_episodes} evaluation episodes"
        tqdm.write(f"note: {what} did not end by themselves and were cut after {limit:,} steps")
    returns = [[episode_return for episode_return, _ in mine] for mine in episodes]
    for i, mine in enumerate(returns):
        if not np.isfinite(mine).all():
            tqdm.write(f"a return of the evaluation is not finite: {agent_name(crowd[i])}")
            returns[i] = [math.nan] * len(mine)
    return returns


def play_once(play, actors: Actors, seeds: list[int], limit: int, sample: bool) -> list[tuple]:
    """An episode of every actor, on its seed: its return, and whether `limit` steps cut it."""
    actors.restart(seeds)
    rng = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, len(actors.low))
    noise = np.zeros((actors.num_envs, len(actors.low)), np.float32)
    episodes = {}
    for _ in range(limit):
        if sample:
            noise = np.concatenate([ppo.draw_noise(shape, generator) for generator in rng])
        *_, ended = actors.step(play(actors.obs, noise))
        for i, episode_return, _ in ended:
            episodes.setdefault(i, (episode_return, False))
        if len(episodes) == actors.num_envs:
            break
    return [episodes.get(i, (float(actors.returns[i]), True)) for i in range(actors.num_envs)]


# ----------------------------------------------------------------------------- FLAGS AND FOLDERS
SCRIPT = "benchmark/lockstep"  # what config.json and the checkpoint of a crowd are signed with


def cores() -> int:
    """CPU cores that this process may use: the machine's, or fewer under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def agent_name(args: Args) -> str:
    """The folder of an agent: clip-0.2__1"""
    return f"{args.objective.replace(':', '-')}__{args.seed}"


def flags_of(args: Args) -> dict:
    """What config.json says of the flags that all agents share."""
    own = {"run_dir", "resume", "seed", "objective"}
    return json.loads(json.dumps({k: x for k, x in asdict(args).items() if k not in own}))


def make_folder(folder: Path, args: Args, seeds: list[int], objectives: list[str]) -> None:
    """A new folder with config.json in it. Raises UserError where it is not new."""
    config = {
        "script": SCRIPT,
        "args": flags_of(args),
        "seeds": list(seeds),
        "objectives": list(objectives),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    with ppo.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            what = f"choose another --run-dir, or --resume {folder}"
            raise UserError(f"{folder} is not empty; {what}")
    ppo.write_file(folder / "config.json", ppo.to_json(config))


def load_run(run_dir: str) -> tuple[Args, list[int], list[str], dict | None]:
    """Flags, seeds, objectives and the checkpoint, if any, of a crowd. Raises UserError."""
    path = Path(run_dir).expanduser()
    try:
        config = json.loads((path / "config.json").read_text())
        script, flags = config["script"], config["args"]
        saved = None
        if (path / "checkpoint.pt").exists():
            saved = ppo.load_checkpoint(path / "checkpoint.pt", SCRIPT)
        if script == SCRIPT:
            args = Args(**flags, run_dir=run_dir, resume=run_dir)
            seeds, objectives = config["seeds"], config["objectives"]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{run_dir} is not a run folder that can be read: {reason}") from reason
    if script != SCRIPT:
        raise UserError(f"{run_dir} is a run of {script}.py; go on with it there")
    if saved is not None and saved["args"] != flags:
        raise UserError(f"{path}/config.json has changed since the checkpoint; undo the change")
    return args, seeds, objectives, saved


def save_crowd(folder: Path, flags: dict, saved: list[dict]) -> None:
    """Checkpoints: that of the crowd, whole, then the files of the agents, which derive from it."""
    crowd = {"script": SCRIPT, "args": flags, "agents": saved}
    ppo.save_checkpoint(folder / "checkpoint.pt", crowd)
    for mine in saved:
        name = agent_name(Args(**mine["args"]))
        ppo.save_checkpoint(folder / name / "checkpoint.pt", mine)


def parse_args(argv: list[str]) -> tuple[Args, list[int], list[str]]:
    """The command line: flags of ppo_continuous.py, --seeds and --objectives. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--objectives", nargs="+", default=None)
    parser.add_argument("--resume", default=None)
    crowd, rest = parser.parse_known_args(argv)
    if "--help" in rest or "-h" in rest:
        print(__doc__)
        print(
            "--seeds INT [INT ...] (default: 1)  --objectives STR [STR ...] (default: clip:0.2)\n"
        )
    for word in rest:
        flag = word.partition("=")[0]
        if flag in ("--seed", "--objective"):
            raise UserError(f"{flag}: here it is {flag}s, followed by one or more")
        if flag == "--evaluate":
            raise UserError("--evaluate: python ppo_continuous.py --evaluate FOLDER_OF_AN_AGENT")
    args = ppo.parse_args(rest)
    if crowd.resume is not None:
        given = ppo.given_flags(argv)  # refuses what cannot stand beside --resume
        changes = {name: getattr(args, name) for name in ppo.RESUME_FLAGS if name in given}
        args = replace(load_run(crowd.resume)[0], **changes)
    return args, crowd.seeds or [1], crowd.objectives or ["clip:0.2"]


def command(argv: list[str]) -> None:
    train(*parse_args(argv))


if __name__ == "__main__":
    ppo.main(command)
