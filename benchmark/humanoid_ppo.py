"""PPO for MuJoCo's Humanoid: ppo_continuous.py with what a body of 17 joints asks for.

    python benchmark/humanoid_ppo.py                              # 10M steps on one core: hours
    python benchmark/humanoid_ppo.py --seed 2 --run-dir runs/mine
    python benchmark/humanoid_ppo.py --resume runs/mine
    python benchmark/humanoid_ppo.py --evaluate runs/mine --capture-video

Read ppo_continuous.py first: rollouts, advantages, loss, minibatches and run folders are its own
functions, and its flags are flags here. What is new, with its flag where it has one:

    many actors        64 environments x 128 steps                     --num-envs, --num-steps
    a larger network   512-256-128 ELU units, which the policy and the value function share
    the step size      follows the KL of each minibatch: adapt_lr()    --no-adapt-lr
    values             learned with mean 0 and deviation 1             --no-norm-values
    rewards            times 0.1, and no running scale                 --reward-scale
    the value loss     clipped, as the policy's is                     --value-clip None
    dead inputs        count for nothing, in another simulator too: Agent.normalise()

All numbers of the recipe stand in Args, also those that ppo_continuous.py has too.

In spirit that is Table 4 of the paper (Roboschool's humanoid): many actors, and a step size
"adjusted based on the target value of the KL divergence". The numbers are those that rl_games has
for EnvPool's Humanoid-v4 (https://github.com/Denys88/rl_games, humanoid_envpool.yaml of 2022). What
rl_games has and this file does not have: a smooth clip, a small pull of actions towards 0, values
cut at +-5 deviations, weights as PyTorch draws them, minibatches of neighbouring environments. What
it does otherwise: it sets the step size after a step, not before it, from KL[new, old], not KL[old,
new]; its Adam has an epsilon of 1e-8; values count in the statistics of returns; at a time limit it
goes on with V of the second-to-last state.

Actions. rl_games acts within [-1, 1] and multiplies by 0.4, the bound of Humanoid's actions. Here
the Gaussian lives in the simulator's units: Agent multiplies the mean by the bound, and a sigma
of 1 there is 0.4 here, a log sigma of -0.92. The two are the same policy.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_continuous as ppo
from ppo_continuous import Actors, Objective, RunningStats, UserError, layer_init

SCRIPT = "benchmark/humanoid_ppo"  # what config.json and checkpoints are signed with
FORWARD = 22  # where an observation of Humanoid has the torso's forward speed, in m/s


@dataclass
class Args(ppo.Args):
    """PPO for Humanoid. The flags of ppo_continuous.py, some with other defaults, and more."""

    env_id: str = "Humanoid-v4"  # Humanoid-v4 or another version of it
    objective: str = "clip:0.2"  # clip:EPS (eq. 7) alone
    total_timesteps: int = 10_000_000  # environment steps, reset steps too, in whole updates
    num_envs: int = 64  # parallel actors (N)
    num_steps: int = 128  # steps of each actor per update (T)

    obs_clip: float = 5.0  # standardised observations are clipped to +- this
    clip_actions: bool = True  # clip what is sent to the bounds, learn from the raw
    scale_rewards: bool = False  # not here: --reward-scale and --norm-values do that
    reward_scale: float = 0.1  # rewards are multiplied by this
    log_std: float = -0.92  # where the Gaussian's log standard deviation starts: at log 0.4
    norm_values: bool = True  # the value function learns returns of mean 0 and deviation 1

    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE
    bootstrap_truncated: bool = True  # a time limit is no end: go on with V
    norm_adv: Literal["batch", "minibatch", "none"] = "batch"  # standardise advantages
    update_epochs: int = 5  # passes over the batch per update (K)
    num_minibatches: int = 4  # minibatches per pass: of 2,048 transitions
    learning_rate: float = 3e-4  # Adam step size; with --adapt-lr, its first value
    adapt_lr: bool = True  # let the step size follow the KL
    desired_kl: float = 0.008  # the KL that it follows
    # KL from which policy: that of each row's last visit, an epoch ago, or the rollout's
    kl_since: Literal["visit", "rollout"] = "visit"
    anneal_lr: bool = False  # with --no-adapt-lr: decay the step size linearly to 0
    vf_coef: float = 2.0  # weight of (V - V_targ)^2, without 1/2; rl_games: 4, with 1/2
    ent_coef: float = 0.0  # weight of the entropy bonus
    value_clip: float | None = 0.2  # clip V to this distance from the old V, take the larger loss
    max_grad_norm: float = 1.0  # scale the gradient down to this norm


# ----------------------------------------------------------------------------------------- AGENT
class Agent(nn.Module):
    """Policy and value function on one trunk, and the statistics of observations and values."""

    def __init__(self, obs_dim: int, bounds: list[float], obs_clip: float, log_std: float):
        super().__init__()
        self.obs_clip = obs_clip
        self.obs_stats = RunningStats(obs_dim)
        self.value_stats = RunningStats(1)  # stays at 0 and 1 with --no-norm-values
        self.register_buffer("bounds", torch.tensor(bounds))  # of actions: +- this [U]
        self.trunk = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 512)),
            nn.ELU(),
            layer_init(nn.Linear(512, 256)),
            nn.ELU(),
            layer_init(nn.Linear(256, 128)),
            nn.ELU(),
        )
        self.actor = layer_init(nn.Linear(128, len(bounds)), 0.01)  # actions start around 0
        self.critic = layer_init(nn.Linear(128, 1), 1.0)
        self.log_std = nn.Parameter(torch.full((len(bounds),), log_std))  # no state changes it

    def normalise(self, obs: Tensor) -> Tensor:
        """obs [..., D] -> [..., D], by the script's function; 0 for inputs that never varied.

        In EnvPool the contact forces, 84 of 376 inputs, are always 0; in Gymnasium they are not.
        Weights that no input has ever trained are noise, and there they would be played.
        """
        varies = self.obs_stats.var > 1e-8  # as small as what RunningStats.std adds
        return ppo.Agent.normalise(self, obs) * varies

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs [..., D] -> mean and log standard deviation [..., U], normalised value [...]."""
        features = self.trunk(self.normalise(obs))
        mean = self.bounds * self.actor(features)
        values = self.critic(features).squeeze(-1)
        return mean, self.log_std + torch.zeros_like(mean), values

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [..., D] -> mean and log standard deviation [..., U] of the Gaussian."""
        mean, log_std, _ = self(obs)
        return mean, log_std

    def normalise_values(self, values: Tensor) -> Tensor:
        """Values or returns, in units of rewards -> of mean 0 and deviation 1, as is learned."""
        return ((values - self.value_stats.mean) / self.value_stats.std).float()

    def restore_values(self, normalised: Tensor) -> Tensor:
        """Undoes normalise_values()."""
        return (normalised * self.value_stats.std + self.value_stats.mean).float()


# --------------------------------------------------------------------------------- THE ALGORITHM
def adapt_lr(lr: float, kl: float, desired_kl: float) -> float:
    """The next step size: smaller where the KL is over twice what is desired, larger under half."""
    if kl > 2 * desired_kl:
        return max(lr / 1.5, 1e-6)
    if kl < desired_kl / 2:
        return min(lr * 1.5, 1e-2)
    return lr


@torch.no_grad()
def make_batch(agent: Agent, rollout: dict, args: Args) -> dict:
    """What ADVANTAGES of ppo_continuous.py makes of a rollout, [B, ...] each. Renews statistics.

    Advantages are computed in units of rewards, bootstrap and all. Then values and returns are
    normalised, with statistics that have seen these returns. (The same weights then mean another V
    than a moment ago. The difference is large in the first updates and fades as statistics settle.)
    last_mean, last_log_std: the policy at the last visit of each row. row: its number.
    """
    valid = rollout["valid"]
    terminated = rollout["terminated"]
    truncated = rollout["truncated"]
    if not args.bootstrap_truncated:  # a time limit counts as an end
        terminated = terminated | truncated
    agent.obs_stats.update(rollout["obs"][:-1][valid])
    mean, log_std, learned = agent(rollout["obs"])
    values = agent.restore_values(learned)  # in units of rewards
    rewards = rollout["rewards"] * args.reward_scale
    advantages = ppo.gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
    returns = advantages + values[:-1]  # V_targ
    if args.norm_values:
        agent.value_stats.update(returns[valid].unsqueeze(-1))
    batch = {
        "obs": rollout["obs"][:-1],
        "actions": rollout["actions"],
        "mean": mean[:-1],
        "log_std": log_std[:-1],
        "last_mean": mean[:-1].clone(),  # copies: these change during the update
        "last_log_std": log_std[:-1].clone(),
        "log_prob": ppo.log_prob_of(mean[:-1], log_std[:-1], rollout["actions"]),
        "values": agent.normalise_values(values[:-1]),
        "advantages": advantages,
        "returns": agent.normalise_values(returns),
        "valid": valid,
    }
    batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # [T, N, ...] -> [B, ...]
    return batch | {"row": torch.arange(len(batch["valid"]), device=valid.device)}


def gradient_and_policy(agent: Agent, minibatch: dict, objective: Objective, args: Args) -> tuple:
    """The script's gradient(), for a network with one trunk; and the outputs of the policy.

    The KL is that from the last visit. Returns the gradient [P], the means of all terms, and mean
    and log_std of the policy [B, U].
    """
    if args.norm_adv == "minibatch":
        advantages = ppo.standardise(minibatch["advantages"])
        minibatch = minibatch | {"advantages": advantages}
    mean, log_std, values = agent(minibatch["obs"])
    terms = ppo.ppo_loss(
        log_prob=ppo.log_prob_of(mean, log_std, minibatch["actions"]),
        entropy=ppo.entropy_of(log_std),
        kl=ppo.kl_between(minibatch["last_mean"], minibatch["last_log_std"], mean, log_std),
        values=values,
        batch=minibatch,
        objective=objective,
        beta=0.0,  # the clipped objective has no KL penalty
        args=args,
    )
    means = {name: term.mean() for name, term in terms.items()}
    grads = torch.autograd.grad(ppo.total_loss(means, args), list(agent.parameters()))
    grad = torch.cat([each.flatten() for each in grads])
    means["grad_norm"] = grad.norm()
    shrink = (args.max_grad_norm / (means["grad_norm"] + 1e-6)).clamp(max=1)
    means = {name: x.detach() for name, x in means.items()}
    return shrink * grad, means, mean.detach(), log_std.detach()


def adapting(gradient_fn: Callable, optimizer: torch.optim.Adam, batch: dict) -> Callable:
    """The gradient_fn for ppo.update(): before each step, the step size is set from the KL.

    With --kl-since visit, that is how far the policy has moved in one epoch; in the first epoch,
    since the rollout. Every minibatch leaves its policy in the rows of `batch` for the next epoch.
    """

    def adapt_and_differentiate(agent, minibatch, objective, beta, args):
        grad, means, mean, log_std = gradient_fn(agent, minibatch, objective, args)
        if args.kl_since == "visit":
            batch["last_mean"][minibatch["row"]] = mean
            batch["last_log_std"][minibatch["row"]] = log_std
        if args.adapt_lr:
            group = optimizer.param_groups[0]
            group["lr"] = adapt_lr(group["lr"], means["kl"].item(), args.desired_kl)
        return grad, means

    return adapt_and_differentiate


# -------------------------------------------------------------------------------------- TRAINING
def begin(args: Args, actors: Actors, saved: dict | None) -> tuple[dict, dict]:
    """The state of the loop, plain values, and the parts that learn or draw; new, or restored."""
    dims = {
        "obs_dim": actors.envs.single_observation_space.shape[0],
        "bounds": actors.envs.single_action_space.high.tolist(),
        "obs_clip": args.obs_clip,
        "log_std": args.log_std,
    }
    ppo.seed_globals(ppo.stream(args.seed, "weights"))
    agent = Agent(**dims).to(args.device)
    weights = ppo.one_vector(agent)
    parts = {
        "agent": agent,
        # the step size is a part of it, and is saved with it
        "optimizer": torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True),
        "action_rng": torch.Generator().manual_seed(ppo.stream(args.seed, "actions")),
        "minibatch_rng": torch.Generator().manual_seed(ppo.stream(args.seed, "minibatches")),
    }
    state = {"updates": 0, "transitions": 0, "diverged_at": None, "dims": dims}
    if saved is not None:
        state = saved["state"]
        ppo.restore(parts, saved)
    return state, parts


@ppo.torch_threads(1)  # one process on each core gets more done than one on all
def train(args: Args) -> tuple[Agent, dict]:
    """Algorithm 1, then the evaluation. Returns the agent and what summary.json says of the run.

    Raises UserError for bad input, and NonFiniteError where a number becomes NaN or infinite.
    """
    saved = None
    if args.resume is not None:
        own, saved = load_run(args.resume)
        if args == Args(resume=args.resume):
            args = own
        changes = {name: getattr(args, name) for name in ppo.RESUME_FLAGS}
        if args != replace(own, **changes):
            raise UserError("resume stands alone, since config.json has the other flags")
    args = check_args(args)
    objective = ppo.parse_objective(args.objective)
    actors = Actors(args, args.num_envs)
    ppo.check_interface(args, actors.envs)
    state, parts = begin(args, actors, saved)
    agent, optimizer = parts["agent"], parts["optimizer"]
    compiling = args.compile and ppo.has_compiler()
    gradient_fn = ppo.compiled(gradient_and_policy) if compiling else gradient_and_policy
    ppo.space_checkpoints(args, actors.episode_limit)
    who = {"seed": args.seed, "objective": args.objective}
    run = Run(args, {"env_id": args.env_id}, who, saved)
    run.bar.set_postfix_str("the first update compiles" if compiling else "")

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
                rollout, episodes = ppo.collect(partial(ppo.act, agent), actors, noise)
                measured = {"obs": rollout["obs"], "rewards": rollout["rewards"]}
                ppo.check_finite(measured, iteration + 1)
            speed = rollout["obs"][1:, :, FORWARD][rollout["valid"]].mean().item()

            # ADVANTAGES
            rollout = {name: x.to(args.device) for name, x in rollout.items()}
            batch = make_batch(agent, rollout, args)

            # UPDATE
            if args.anneal_lr:
                lr = args.learning_rate * (1 - iteration / args.num_updates)
                optimizer.param_groups[0]["lr"] = lr
            losses = ppo.update(
                agent=agent,
                optimizer=optimizer,
                batch=batch,
                objective=objective,
                beta=0.0,
                args=args,
                rng=parts["minibatch_rng"],
                gradient_fn=adapting(gradient_fn, optimizer, batch),
            )
            weights = nn.utils.parameters_to_vector(agent.parameters())
            ppo.check_finite(losses | {"weights": weights}, iteration + 1)

            # LOG
            state["updates"] += 1
            state["transitions"] += int(batch["valid"].sum())
            charts = {
                "learning_rate": optimizer.param_groups[0]["lr"],  # after the last step
                "action_std": agent.log_std.exp().mean().item(),
                "forward_speed": speed,
            }
            run.log(state["updates"], episodes, charts, losses)
            num_episodes += len(episodes)
            restart = ppo.checkpoint_due(args, state["updates"], num_episodes)
            if restart or state["updates"] == args.num_updates:
                ppo.save_checkpoint(run.path / "checkpoint.pt", run.checkpoint(state, parts))
    return agent, run.finish(state, ppo.evaluate(agent, args, run.path))


# ----------------------------------------------------------------------------- FLAGS AND FOLDERS
class Run(ppo.Run):
    """The run folder of the script, signed by this file."""

    script = SCRIPT


def check_args(args: Args) -> Args:
    """A copy of the flags, to work with. Raises UserError for the first that makes no sense."""
    args = ppo.check_args(args)
    if not args.env_id.startswith("Humanoid-v"):
        raise UserError(f"--env-id: this file is for Humanoid-v4, not for {args.env_id}")
    if ppo.parse_objective(args.objective).kind != "clip":
        raise UserError(f"--objective must be clip:EPS here, not {args.objective}")
    if args.scale_rewards:
        raise UserError("--scale-rewards: here --reward-scale and --norm-values do that")
    if args.adapt_lr and args.anneal_lr:
        raise UserError("--anneal-lr needs --no-adapt-lr: only one can set the step size")
    for name in ("reward_scale", "desired_kl"):
        value = getattr(args, name)
        if not 1e-12 <= value <= 1e12:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be between 1e-12 and 1e+12, not {value}")
    return args


def parse_args(argv: list[str]) -> Args:
    """The command line. Where it is wrong, tyro says so in a box and exits with code 2."""
    given = ppo.given_flags(argv)
    args = tyro.cli(Args, args=argv)
    if args.resume is None:
        return args
    changes = {name: getattr(args, name) for name in ppo.RESUME_FLAGS if name in given}
    return replace(load_run(args.resume)[0], **changes)


def load_run(run_dir: str) -> tuple[Args, dict | None]:
    """The flags of a run folder, and its checkpoint if there is one. Raises UserError."""
    path = Path(run_dir).expanduser()
    try:
        config = json.loads((path / "config.json").read_text())
        script, flags = config["script"], config["args"]
        saved = None
        if (path / "checkpoint.pt").exists():
            saved = ppo.load_checkpoint(path / "checkpoint.pt", SCRIPT)
        if script == SCRIPT:
            args = Args(**flags | {"run_dir": run_dir, "resume": run_dir})
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{run_dir} is not a run folder that can be read: {reason}") from reason
    if script != SCRIPT:
        raise UserError(f"{run_dir} is a run of {script}.py; go on with it there")
    if saved is not None and saved["args"] != flags:
        raise UserError(f"{path}/config.json has changed since the checkpoint; undo the change")
    return args, saved


def load_agent(run_dir: str) -> tuple[Agent, Args]:
    """The trained agent of a run folder, on the CPU, and its flags. Raises UserError."""
    args, saved = load_run(run_dir)
    if saved is None:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with the run: --resume {run_dir}")
    agent = Agent(**saved["state"]["dims"])
    ppo.one_vector(agent)  # in memory as in training, or products of matrices may round otherwise
    agent.load_state_dict(saved["agent"])
    return agent, replace(args, device="cpu", compile=False)


def evaluate_run(args: Args) -> None:
    """--evaluate: evaluate the run of a folder, and print it."""
    agent, trained = load_agent(args.evaluate)
    options = {name: getattr(args, name) for name in ppo.EVALUATION_FLAGS}
    path = Path(args.evaluate).expanduser().absolute()
    returns = ppo.evaluate(agent, check_args(replace(trained, **options)), path)
    actions = "sampled" if args.sample_actions else "greedy"
    print(f"{args.evaluate}, seed {trained.seed}: {ppo.describe(returns)}, {actions} actions")


def command(argv: list[str]) -> None:
    """Train, or evaluate, as the command line says."""
    args = parse_args(argv)
    if args.evaluate is None:
        train(args)
    else:
        evaluate_run(args)


if __name__ == "__main__":
    ppo.main(command)
