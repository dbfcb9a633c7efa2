"""benchmark/lockstep.py: an agent of a crowd is the agent that ppo_continuous.py trains alone."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import locked_elsewhere, spy_on_restarts, weights_of

import ppo_continuous as ppo
from benchmark import lockstep
from ppo_continuous import Args

SEEDS = [1, 2]
OBJECTIVES = ["clip:0.2", "kl:1", "adaptive:0.01", "none"]
SMALL = {
    "env_id": "Hopper-v4",
    "num_steps": 64,
    "num_minibatches": 4,
    "update_epochs": 3,
    "compile": False,
    "env_backend": "gymnasium",
    "eval_episodes": 2,
    "learning_rate": 3e-3,
}


@pytest.fixture(autouse=True)
def one_thread():
    """As in main() of the script: the bits of orthogonal weights depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_leaves_the_number_of_threads_as_it_was(tmp_path):
    torch.set_num_threads(2)
    train(tmp_path / "run", total_timesteps=64)
    assert torch.get_num_threads() == 2


def crowd_of(seeds=SEEDS, objectives=OBJECTIVES, **flags) -> list[Args]:
    return lockstep.crowd_args(Args(**SMALL | flags), seeds, objectives)


def train(folder: Path, seeds=SEEDS, objectives=OBJECTIVES, **flags) -> list[dict]:
    return lockstep.train(Args(**SMALL | flags, run_dir=str(folder)), seeds, objectives)


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Recorder:
    """Watches a run: initial weights, first observations, noise, minibatch orders, all steps."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.weights, self.obs, self.noise, self.orders, self.steps = [], [], [], [], []
        collect, randperm, begin = ppo.collect, torch.randperm, ppo.begin

        def watched_collect(play, actors, noise):
            self.obs.append(actors.obs.copy())
            self.noise.append(noise)
            return collect(play, actors, noise)

        def watched_randperm(n, generator=None):
            order = randperm(n, generator=generator)
            self.orders.append(order)
            return order

        def watched_begin(*given):
            state, parts = begin(*given)
            self.weights.append({n: x.clone() for n, x in parts["agent"].state_dict().items()})
            return state, parts

        patch.setattr(ppo, "collect", watched_collect)
        patch.setattr(torch, "randperm", watched_randperm)
        patch.setattr(ppo, "begin", watched_begin)


def test_every_agent_starts_with_the_bits_of_the_script(monkeypatch, tmp_path):
    """Weights, environment seeds, noise and minibatch order, as train() draws them."""
    with monkeypatch.context() as patch:
        crowd = Recorder(patch)
        train(tmp_path / "crowd", total_timesteps=64)
    epochs = SMALL["update_epochs"]
    assert len(crowd.orders) == len(SEEDS) * len(OBJECTIVES) * epochs
    for i, args in enumerate(crowd_of(total_timesteps=64)):
        with monkeypatch.context() as patch:
            alone = Recorder(patch)
            ppo.train(replace(args, run_dir=str(tmp_path / str(i))))
        same(alone.weights[0], crowd.weights[i])
        assert np.array_equal(alone.obs[0], crowd.obs[0][i : i + 1])
        assert np.array_equal(alone.noise[0], crowd.noise[0][:, i : i + 1])
        assert len(alone.orders) == epochs
        assert torch.equal(
            torch.stack(alone.orders), torch.stack(crowd.orders)[i * epochs :][:epochs]
        )
    assert not torch.equal(crowd.weights[0]["critic.0.weight"], crowd.weights[1]["critic.0.weight"])
    same(crowd.weights[0], crowd.weights[2])  # one seed, two objectives


# --------------------------------------------------------------- over one recorded rollout
def record_rollout(crowd: list[Args]) -> tuple[dict, np.ndarray]:
    """A rollout of a crowd, and its noise.

    Hopper falls within 64 steps. The first ends are made time limits, so that there are both kinds.
    """
    actors = ppo.Actors(crowd[0], len(crowd))
    actors.restart(list(range(len(crowd))))
    parts = [ppo.begin(args, actors, None)[1] for args in crowd]
    shape = (crowd[0].num_steps, 1, len(actors.low))
    noise = np.concatenate([ppo.draw_noise(shape, mine["action_rng"]) for mine in parts], 1)
    play = lockstep.crowd_policy([mine["agent"] for mine in parts], check=True)
    rollout, _ = ppo.collect(play, actors, noise)
    for t, i in rollout["terminated"].nonzero()[:2].tolist():
        rollout["terminated"][t, i] = False
        rollout["truncated"][t, i] = True
    for i, mine in enumerate(parts):  # every step is the one that the agent's own act() takes
        exact = torch.from_numpy(
            ppo.act(mine["agent"], rollout["obs"][:-1, i].numpy(), noise[:, i])
        )
        got = rollout["actions"][:, i]
        torch.testing.assert_close(got.float(), exact.float(), rtol=1e-5, atol=1e-5)
    return rollout, noise


def replay(patch: pytest.MonkeyPatch, *rollouts: dict) -> None:
    """Let whoever collects get these rollouts in turn, and nobody be evaluated."""
    copies = iter([{name: x.clone() for name, x in rollout.items()} for rollout in rollouts])
    patch.setattr(ppo, "collect", lambda *_: (next(copies), []))
    patch.setattr(ppo, "evaluate", lambda *_: [0.0])
    patch.setattr(lockstep, "evaluate", lambda agents, *_: [[0.0] for _ in agents])


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"norm_adv": "batch", "scale_rewards": False, "bootstrap_truncated": False},
        {"value_clip": 0.2, "ent_coef": 0.01, "max_grad_norm": math.inf, "norm_adv": "none"},
        {"target_kl": 2e-3},
        {"gamma": 0.9, "gae_lambda": 0.8},
    ],
)
def test_every_agent_learns_from_a_rollout_what_the_script_learns(flags, monkeypatch, tmp_path):
    """All K x M steps, statistics and metrics agree to the rounding of float32.

    A gradient is a mean of 16 rows with about 64 terms each: it is known to some 64 roundings, of
    2^-24 of its largest term each, about 4e-6. Adam divides it by no less than 1e-5. So a weight
    whose gradient is nearly 0 may move by a fraction of a step more or less. The others agree.
    """
    flags = flags | {"total_timesteps": 64}
    crowd = crowd_of(**flags)
    rollout, _ = record_rollout(crowd)
    assert rollout["terminated"].any() and rollout["truncated"].any()
    assert rollout["valid"].sum(0).min() < rollout["valid"].sum(0).max()
    crowd_steps = {}
    make_steps = lockstep.make_steps

    def watched_steps(*given, **named):
        def watch(kind, step):
            def watched(*given):
                learner = step(*given)
                crowd_steps.setdefault(kind, []).append(learner["weights"])
                return learner

            return watched

        return {kind: watch(kind, step) for kind, step in make_steps(*given, **named).items()}

    with monkeypatch.context() as patch:
        replay(patch, rollout)
        patch.setattr(lockstep, "make_steps", watched_steps)
        train(tmp_path / "crowd", **flags)
    places, counts = {"clip": 0, "kl": 0}, []
    for i, args in enumerate(crowd):
        alone, steps, adam_step = tmp_path / str(i), [], torch.optim.Adam.step
        with monkeypatch.context() as patch:
            replay(patch, {name: x[:, i : i + 1] for name, x in rollout.items()})

            def watched_adam(optimizer, adam_step=adam_step, steps=steps):
                adam_step(optimizer)
                (weights,) = optimizer.param_groups[0]["params"]
                steps.append(weights.detach().clone())

            patch.setattr(torch.optim.Adam, "step", watched_adam)
            ppo.train(replace(args, run_dir=str(alone)))
        kind = lockstep.kind_of(args)
        place, places[kind] = places[kind], places[kind] + 1
        counts.append(len(steps))
        for k, weights in enumerate(steps, 1):
            gaps = (weights - crowd_steps[kind][k - 1][place]).abs()
            assert gaps.max() <= 0.4 * k * args.learning_rate
            assert gaps.mean() <= 1e-3 * k * args.learning_rate
        mine = ppo.load_checkpoint(tmp_path / "crowd" / lockstep.agent_name(args) / "checkpoint.pt")
        saved = ppo.load_checkpoint(alone / "checkpoint.pt")
        # an agent that stopped early has taken no step after that
        assert torch.equal(vector(mine), crowd_steps[kind][len(steps) - 1][place])
        assert mine.keys() == saved.keys() and mine["state"].keys() == saved["state"].keys()
        assert mine["state"]["beta"] == saved["state"]["beta"]
        assert mine["state"]["transitions"] == saved["state"]["transitions"]
        for part in ("action_rng", "minibatch_rng"):
            assert torch.equal(mine[part], saved[part])
        for part in ("count", "mean", "var"):
            name = f"obs_stats.{part}"
            torch.testing.assert_close(mine["agent"][name], saved["agent"][name])
            torch.testing.assert_close(mine["return_stats"][part], saved["return_stats"][part])
        (ours,) = rows(tmp_path / "crowd" / lockstep.agent_name(args) / "metrics.csv")
        (theirs,) = rows(alone / "metrics.csv")
        assert list(ours) == list(theirs)
        for name in ours:
            if name.startswith("losses/"):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-2, abs=1e-4)
    stopped = [count for count in counts if count < 12]
    assert min(counts) >= 4 and bool(stopped) == ("target_kl" in flags)


def vector(saved: dict) -> torch.Tensor:
    """All weights of a checkpoint's agent, in the order of its parameters."""
    agent = ppo.Agent(**saved["state"]["dims"])
    ppo.restore({"agent": agent}, saved)
    return weights_of(agent)


def test_the_episodes_of_several_actors_are_those_of_the_script(tmp_path):
    """Untrained poles fall within some ten steps, each of which pays 1: the same bytes."""
    flags = {"env_id": "InvertedPendulum-v4", "num_envs": 3, "total_timesteps": 3 * 64}
    train(tmp_path / "crowd", **flags)
    for args in crowd_of(**flags):
        name = lockstep.agent_name(args)
        ppo.train(replace(args, run_dir=str(tmp_path / "alone" / name)))
        ours, theirs = (tmp_path / where / name / "episodes.csv" for where in ("crowd", "alone"))
        assert len(rows(ours)) > 6 and ours.read_bytes() == theirs.read_bytes()


def test_every_agent_is_charted_by_its_own_numbers(tmp_path):
    train(tmp_path / "run", total_timesteps=128)
    for args in crowd_of():
        folder = tmp_path / "run" / lockstep.agent_name(args)
        agent, _ = ppo.load_agent(str(folder))
        charts = rows(folder / "metrics.csv")
        std = agent.log_std.exp().mean().item()
        assert float(charts[-1]["charts/action_std"]) == pytest.approx(std, rel=1e-6)
        steps = [float(row["charts/learning_rate"]) for row in charts]
        assert steps == pytest.approx([3e-3, 1.5e-3])


def test_the_first_episode_of_an_evaluation_counts_and_so_does_one_that_is_cut():
    ends = iter([[(0, 1.0, 1)], [(0, 2.0, 1)], [(1, 7.0, 3)], [(0, 5.0, 1)], []])
    actors = SimpleNamespace(num_envs=2, low=np.zeros(1), obs=None, returns=np.array([0.5, 4.0]))
    actors.restart, actors.step = lambda seeds: None, lambda actions: (None, next(ends))

    def play(obs, noise):
        return noise

    assert lockstep.play_once(play, actors, [5, 6], 9, False) == [(1.0, False), (7.0, False)]
    assert lockstep.play_once(play, actors, [5, 6], 2, False) == [(5.0, False), (4.0, True)]


def test_what_a_crowd_had_learned_before_a_simulator_failed_is_kept(tmp_path, monkeypatch):
    collect, noises = ppo.collect, []

    def fail(play, actors, noise):
        noises.append(noise)
        if len(noises) == 3:
            raise ConnectionResetError("the host is gone")
        return collect(play, actors, noise)

    monkeypatch.setattr(ppo, "collect", fail)
    with pytest.raises(RuntimeError, match="Pendulum-v1, update 3: ConnectionResetError"):
        train(tmp_path / "run", env_id="Pendulum-v1", total_timesteps=64 * 4)
    saved = ppo.load_checkpoint(tmp_path / "run/checkpoint.pt", lockstep.SCRIPT)["agents"]
    for i, mine in enumerate(saved):
        assert mine["state"]["updates"] == 2
        rng = torch.Generator()
        rng.set_state(mine["action_rng"])  # the failed rollout's noise is still to be drawn
        assert np.array_equal(ppo.draw_noise((64, 1, 1), rng)[:, 0], noises[2][:, i])


def test_what_a_crowd_carries_on_from_update_to_update_is_what_the_script_does(
    monkeypatch, tmp_path
):
    """Step size, beta, environment seeds, statistics; three updates in which no weight changes.

    A checkpoint after the second restarts the environments. In the third, one reward of each agent
    is so large that it is clipped.
    """
    flags = {"total_timesteps": 3 * 64, "checkpoint_every": 2}
    crowd = crowd_of(objectives=["adaptive:0.01"], **flags)
    rollout, _ = record_rollout(crowd)
    rewards = torch.cat([rollout["rewards"][:-1], torch.tensor([[1e4, -1e4]])])
    rollouts = [rollout, rollout, rollout | {"rewards": rewards}]
    seen = []

    kl_of_seed = {1: 0.1, 2: 0.001}  # beta doubles, beta is halved

    def crowd_update(agents, batches, betas, alive, lr, **_):
        seen.append((lr, betas, batches))
        return [{"kl_after_update": kl_of_seed[args.seed]} for args in crowd], alive

    with monkeypatch.context() as patch:
        replay(patch, *rollouts)
        our_seeds = spy_on_restarts(patch, ppo)
        patch.setattr(lockstep, "update", crowd_update)
        train(tmp_path / "crowd", objectives=["adaptive:0.01"], **flags)
    ours = seen[:]
    assert len(ours) == 3 and len(our_seeds) == 2
    for i, args in enumerate(crowd):
        seen.clear()

        def update(optimizer, beta, batch, args, **_):
            seen.append((optimizer.param_groups[0]["lr"], beta, batch))
            return {"kl_after_update": kl_of_seed[args.seed]}

        with monkeypatch.context() as patch:
            replay(patch, *[{name: x[:, i : i + 1] for name, x in r.items()} for r in rollouts])
            seeds = spy_on_restarts(patch, ppo)
            patch.setattr(ppo, "update", update)
            patch.setattr(ppo, "check_played", lambda *_: None)  # it was played with no statistics
            ppo.train(replace(args, run_dir=str(tmp_path / str(i))))
        assert [each[i] for each in our_seeds] == seeds and seeds[0] != seeds[1]
        for (our_lr, betas, batches), (lr, beta, batch) in zip(ours, seen, strict=True):
            assert (our_lr, betas[i]) == (lr, beta)
            for name, x in batch.items():
                torch.testing.assert_close(batches[i][name], x, rtol=1e-4, atol=1e-4)
        assert [lr for lr, *_ in seen] == pytest.approx([3e-3, 2e-3, 1e-3])
        expected = {1: [1, 2, 4], 2: [1, 0.5, 0.25]}[args.seed]
        assert [beta for _, beta, _ in seen] == expected
        charts = rows(tmp_path / "crowd" / lockstep.agent_name(args) / "metrics.csv")
        assert [float(row["charts/beta"]) for row in charts] == expected


def shift_policy(monkeypatch):
    policy = ppo.Agent.policy
    monkeypatch.setattr(
        ppo.Agent, "policy", lambda self, obs: (policy(self, obs)[0] + 0.1, policy(self, obs)[1])
    )


def add_a_layer(monkeypatch):
    mlp = ppo.mlp
    monkeypatch.setattr(
        ppo,
        "mlp",
        lambda inputs, outputs, gain: mlp(inputs, 64, 1.0).append(torch.nn.Linear(64, outputs)),
    )


@pytest.mark.parametrize("change", [shift_policy, add_a_layer])
def test_a_policy_that_the_fast_one_does_not_follow_is_refused(monkeypatch, tmp_path, change):
    change(monkeypatch)
    with pytest.raises(ppo.UserError, match=r"does not play Agent\.policy"):
        train(tmp_path / "run", total_timesteps=64)


def test_a_compiled_step_is_the_eager_one():
    crowd = crowd_of()
    actors = ppo.Actors(crowd[0], len(crowd))
    results = []
    for compiling in (False, True):
        parts = [ppo.begin(args, actors, None)[1] for args in crowd]
        rng = torch.Generator().manual_seed(0)
        batches = [random_batch(mine["agent"], rng) for mine in parts]
        _, alive = learn(crowd, parts, batches, compiling)
        assert all(alive)
        results.append(torch.stack([weights_of(mine["agent"]) for mine in parts]))
    assert (results[0] - results[1]).abs().max() <= 0.4 * 12 * 3e-3
    assert (results[0] - results[1]).abs().mean() <= 1e-3 * 12 * 3e-3


@torch.no_grad()
def random_batch(agent: ppo.Agent, rng: torch.Generator) -> dict:
    obs = torch.randn(64, 11, generator=rng).double()
    mean, log_std = agent.policy(obs)
    actions = mean + torch.randn(64, 3, generator=rng)
    return {
        "obs": obs,
        "actions": actions,
        "mean": mean,
        "log_std": log_std,
        "log_prob": ppo.log_prob_of(mean, log_std, actions),
        "values": agent.value(obs),
        "advantages": torch.randn(64, generator=rng),
        "returns": torch.randn(64, generator=rng),
        "valid": torch.rand(64, generator=rng) > 0.1,
    }


def orders_of(crowd: list[Args]) -> list[torch.Tensor]:
    """Of the rows, in three epochs: each agent has its own, in every call the same."""
    torch.manual_seed(0)
    return [torch.stack([torch.randperm(64) for _ in range(3)]) for _ in crowd]


def learn(
    crowd: list[Args],
    parts: list[dict],
    batches: list[dict],
    compiling=False,
    first=0,
    betas=None,
) -> tuple:
    """An update, with the orders of rows from epoch `first` on."""
    agents = [mine["agent"] for mine in parts]
    return lockstep.update(
        steps=lockstep.make_steps(agents, crowd, compiling),
        agents=agents,
        optimizers=[mine["optimizer"] for mine in parts],
        batches=batches,
        betas=betas or [1.0] * len(crowd),
        alive=[True] * len(crowd),
        crowd=crowd,
        orders=[order[first:] for order in orders_of(crowd)],
        lr=3e-3,
    )


def test_two_updates_are_one_of_as_many_epochs():
    """To the bit: Adam goes on from where it was."""
    crowd, results = crowd_of(), []
    actors = ppo.Actors(crowd[0], len(crowd))
    for epochs in ([3], [1, 2]):
        parts = [ppo.begin(args, actors, None)[1] for args in crowd]
        rng = torch.Generator().manual_seed(0)
        batches = [random_batch(mine["agent"], rng) for mine in parts]
        done = 0
        for count in epochs:
            learn(crowd_of(update_epochs=count), parts, batches, first=done)
            done += count
        states = []
        for mine in parts:
            (state,) = mine["optimizer"].state.values()
            states.append(state | {"weights": weights_of(mine["agent"])})
        results.append(states)
    for one, other in zip(*results, strict=True):
        assert one["step"] == 12 and one["exp_avg"].abs().max() > 0
        same(one, other)


def test_a_step_that_is_not_taken_changes_nothing():
    """Agent 1 meets a NaN in its first minibatch and stops. Agent 2 has one transition in its
    first: that step is left out, and does not count."""
    crowd = crowd_of(norm_adv="none", update_epochs=1)
    actors = ppo.Actors(crowd[0], len(crowd))
    parts = [ppo.begin(args, actors, None)[1] for args in crowd]
    before = [weights_of(mine["agent"]) for mine in parts]
    rng = torch.Generator().manual_seed(0)
    batches = [random_batch(mine["agent"], rng) for mine in parts]
    first_rows = [order[0, :16] for order in orders_of(crowd)]
    batches[1]["valid"][first_rows[1][0]] = True
    batches[1]["returns"][first_rows[1][0]] = math.nan
    batches[2]["valid"][first_rows[2]] = False
    batches[2]["valid"][first_rows[2][0]] = True
    _, alive = learn(crowd, parts, batches)
    assert alive == [i != 1 for i in range(len(crowd))]
    assert torch.equal(weights_of(parts[1]["agent"]), before[1])
    states = [next(iter(mine["optimizer"].state.values())) for mine in parts]
    assert [int(state["step"]) for state in states] == [4, 0, 3, *[4] * (len(crowd) - 3)]
    assert not states[1]["exp_avg"].any() and not states[1]["exp_avg_sq"].any()


def test_every_agent_learns_with_its_own_beta():
    crowd = crowd_of([1], ["kl:1", "adaptive:0.01"])
    actors = ppo.Actors(crowd[0], len(crowd))
    results = []
    for betas in ([1.0, 1.0], [1.0, 64.0]):
        parts = [ppo.begin(args, actors, None)[1] for args in crowd]
        rng = torch.Generator().manual_seed(0)
        batches = [random_batch(mine["agent"], rng) for mine in parts]
        learn(crowd, parts, batches, betas=betas)
        results.append([weights_of(mine["agent"]) for mine in parts])
    same_beta, other_beta = zip(*results, strict=True)
    assert torch.equal(*same_beta) and not torch.equal(*other_beta)


def test_an_update_ends_after_the_epoch_whose_mean_kl_is_too_large():
    """0.1 in the first of three epochs, 0.6 in the second: the mean of both is below 0.5."""
    kls = iter([0.1, 0.1, 0.6, 0.6, 0.6, 0.6])

    def step(learner, *_):
        sums = {"steps": learner["sums"]["steps"] + 1}
        sums["approx_kl"] = learner["sums"]["approx_kl"] + next(kls)
        return learner | {"sums": sums}

    args = replace(crowd_of([1], ["none"])[0], num_minibatches=2, target_kl=0.5)
    zero = torch.zeros(1)
    learner = {"t": zero, "active": zero == 0, "sums": {"steps": zero, "approx_kl": zero}}
    batch = {"valid": torch.ones(1, 8, dtype=torch.bool)}
    orders = torch.arange(8).expand(1, 3, 8)
    learner = lockstep.update_group(step, learner, {}, batch, orders, zero, zero, zero, args)
    assert learner["sums"]["steps"] == 4 and not learner["active"].any()


@pytest.mark.parametrize("where", ["returns", "advantages", "obs"])
def test_an_agent_that_is_not_finite_keeps_finite_weights_and_harms_nobody(where):
    crowd = crowd_of(norm_adv="none")
    actors = ppo.Actors(crowd[0], len(crowd))
    results = []
    for spoil in (False, True):
        parts = [ppo.begin(args, actors, None)[1] for args in crowd]
        rng = torch.Generator().manual_seed(0)
        batches = [random_batch(mine["agent"], rng) for mine in parts]
        for batch in batches:
            batch["valid"][10] = True
        if spoil:
            batches[1][where][10] = math.nan
        _, alive = learn(crowd, parts, batches)
        assert alive == [not spoil or i != 1 for i in range(len(crowd))]
        results.append([weights_of(mine["agent"]) for mine in parts])
    for i, (good, spoiled) in enumerate(zip(*results, strict=True)):
        assert spoiled.isfinite().all()
        assert torch.equal(good, spoiled) == (i != 1)


def test_an_agent_with_a_metric_that_is_not_finite_is_not_alive():
    """With a clip, the KL is in no loss, so that no step shows it."""
    crowd = crowd_of(norm_adv="none", objectives=["clip:0.2"])
    actors = ppo.Actors(crowd[0], len(crowd))
    parts = [ppo.begin(args, actors, None)[1] for args in crowd]
    rng = torch.Generator().manual_seed(0)
    batches = [random_batch(mine["agent"], rng) for mine in parts]
    batches[1]["valid"][10] = True
    batches[1]["mean"][10] = math.inf
    metrics, alive = learn(crowd, parts, batches)
    assert alive == [True, False]
    assert not math.isfinite(metrics[1]["kl_after_update"])
    assert math.isfinite(metrics[1]["policy_loss"])


def test_what_stands_in_reset_rows_changes_nothing():
    crowd = crowd_of()
    actors = ppo.Actors(crowd[0], len(crowd))
    results = []
    for spoil in (False, True):
        parts = [ppo.begin(args, actors, None)[1] for args in crowd]
        rng = torch.Generator().manual_seed(0)
        batches = [random_batch(mine["agent"], rng) for mine in parts]
        for batch in batches if spoil else []:
            for name in ("actions", "advantages", "returns", "values"):
                batch[name][~batch["valid"]] = 7.0
        learn(crowd, parts, batches)
        results.append(torch.stack([weights_of(mine["agent"]) for mine in parts]))
    assert torch.equal(*results)


@pytest.mark.parametrize("sample", [False, True])
def test_the_evaluation_begins_as_the_scripts_does(sample, monkeypatch, tmp_path):
    """The seed of every episode, more of them than fit at once, and its first action.

    Episodes of one step, which return their seed.
    """
    crowd = crowd_of(env_id="Pendulum-v1", eval_episodes=20, sample_actions=sample)
    actors = ppo.Actors(crowd[0], len(crowd))
    agents = [ppo.begin(args, actors, None)[1]["agent"] for args in crowd]
    restart, played = ppo.Actors.restart, []

    def watched_restart(actors, seeds):
        restart(actors, seeds)
        actors.seeds = seeds

    def step(actors, actions):
        played.append((actors.seeds, actors.obs, actions))
        return None, [(i, float(seed), 1) for i, seed in enumerate(actors.seeds)]

    monkeypatch.setattr(ppo.Actors, "restart", watched_restart)
    monkeypatch.setattr(ppo.Actors, "step", step)
    returns = lockstep.evaluate(agents, crowd, tmp_path)
    for args, mine in zip(crowd, returns, strict=True):
        first = 2**30 + ppo.stream(args.seed, "evaluation")
        assert mine == list(range(first, first + 20))
    assert len(played) == 2
    for seeds, obs, actions in played:
        for i, seed in enumerate(seeds):
            rng = torch.Generator().manual_seed(seed)
            noise = ppo.draw_noise((1, 1), rng) if sample else 0.0
            agent = agents[i * len(agents) // len(seeds)]
            expected = ppo.act(agent, obs[i : i + 1], noise)[0]
            np.testing.assert_allclose(actions[i], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- a crowd's folder
def test_the_script_takes_the_folder_of_an_agent(tmp_path, monkeypatch, capsys):
    summaries = train(tmp_path / "crowd", total_timesteps=128)
    ppo.train(Args(**SMALL, total_timesteps=128, run_dir=str(tmp_path / "alone")))
    alone = tmp_path / "alone"
    names = [lockstep.agent_name(args) for args in crowd_of()]
    left = {path.name for path in (tmp_path / "crowd").iterdir()}
    assert left == {"config.json", "checkpoint.pt", *names}
    for name, summary in zip(names, summaries, strict=True):
        folder = tmp_path / "crowd" / name
        assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
        for file in ("metrics.csv", "episodes.csv"):
            assert list(rows(folder / file)[0]) == list(rows(alone / file)[0])
        config, theirs = (json.loads((x / "config.json").read_text()) for x in (folder, alone))
        assert config.keys() == theirs.keys() and config["args"].keys() == theirs["args"].keys()
        assert (config["args"]["seed"], config["args"]["objective"]) == (
            summary["seed"],
            summary["objective"],
        )
        assert json.loads((folder / "summary.json").read_text()) == [summary]
        assert summary.keys() == json.loads((alone / "summary.json").read_text())[0].keys()
    monkeypatch.setattr(sys, "argv", ["x", "--evaluate", str(tmp_path / "crowd" / names[1])])
    ppo.main()
    assert f"{names[1]}, seed {summaries[1]['seed']}: evaluation" in capsys.readouterr().out
    (evaluated,) = json.loads((tmp_path / "crowd" / names[1] / "evaluation.json").read_text())
    assert len(evaluated["returns"]) == 20
    # Hopper under an untrained policy falls within a few steps, too soon for chaos
    assert np.mean(evaluated["returns"][:2]) == pytest.approx(
        summaries[1]["eval_return_mean"], rel=1e-2
    )
    policy = ppo.load_policy(str(tmp_path / "crowd" / names[1]))
    assert policy(np.zeros(11)).shape == (3,) and policy(np.zeros((5, 11))).shape == (5, 3)
    ppo.train(Args(resume=str(tmp_path / "crowd" / names[0])))  # an agent can go on alone


FLAGS = {"env_id": "InvertedPendulum-v4", "total_timesteps": 64 * 6, "checkpoint_every": 2}


def test_a_crowd_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", **FLAGS)
    log = ppo.Run.log

    def stop(run, update, *rest):
        log(run, update, *rest)
        if update == 5 and run.who == {"seed": 2, "objective": "kl:1"}:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo.Run, "log", stop)
        train(tmp_path / "stopped", **FLAGS)
    for path in (tmp_path / "stopped").glob("*/checkpoint.pt"):
        path.unlink()  # those of the agents derive from the crowd's
    resumed = lockstep.train(Args(resume=str(tmp_path / "stopped")), [], [])
    clocks = {"wall_seconds", "sps"}
    for one, other in zip(whole, resumed, strict=True):
        assert {k: x for k, x in one.items() if k not in clocks} == {
            k: x for k, x in other.items() if k not in clocks
        }
    for args in crowd_of():
        one, other = (tmp_path / run / lockstep.agent_name(args) for run in ("whole", "stopped"))
        assert (one / "episodes.csv").read_bytes() == (other / "episodes.csv").read_bytes()
        for mine, theirs in zip(
            rows(one / "metrics.csv"), rows(other / "metrics.csv"), strict=True
        ):
            assert mine | {"charts/SPS": ""} == theirs | {"charts/SPS": ""}
        mine, theirs = (ppo.load_checkpoint(x / "checkpoint.pt") for x in (one, other))
        same(mine["agent"], theirs["agent"])
        for a, b in zip(
            mine["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True
        ):
            same(a, b)


def test_a_crowd_without_a_checkpoint_is_left_to_the_process_that_works_on_it(
    tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "collect", stop)
        train(tmp_path / "crowd", **FLAGS)
    files = sorted((tmp_path / "crowd").glob("*/metrics.csv"))
    assert len(files) > 1 and not list(tmp_path.rglob("checkpoint.pt"))
    with (
        locked_elsewhere(files[0], text="mine"),
        pytest.raises(ppo.UserError, match="another process is at work on it"),
    ):
        lockstep.train(Args(resume=str(tmp_path / "crowd")), [], [])
    assert files[0].read_text() == "mine"  # it was not put in the place of another file


def test_without_a_checkpoint_a_crowd_starts_over(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", **FLAGS)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "collect", stop)
        train(tmp_path / "stopped", **FLAGS)
    again = lockstep.train(Args(resume=str(tmp_path / "stopped")), [], [])
    assert [row["last_100_return"] for row in whole] == [row["last_100_return"] for row in again]


@pytest.mark.parametrize("source", ["obs", "rewards"])
def test_a_nan_from_one_agents_simulator_freezes_that_agent(source, tmp_path, monkeypatch, capsys):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 64 * 3}
    whole = train(tmp_path / "whole", **flags)
    collect, calls = ppo.collect, []

    def spoil(*given):
        rollout, episodes = collect(*given)
        calls.append(1)
        if len(calls) == 2:
            rollout[source][10, 1] = math.nan
        return rollout, episodes

    monkeypatch.setattr(ppo, "collect", spoil)
    spoiled = train(tmp_path / "spoiled", **flags)
    assert [row["diverged_at"] for row in spoiled] == [None, 128, *[None] * 6]
    assert f"{source} not finite in update 2: clip-0.2__2 is frozen" in capsys.readouterr().out
    for args, one, other in zip(crowd_of(), whole, spoiled, strict=True):
        name = lockstep.agent_name(args)
        mine, theirs = (
            ppo.load_checkpoint(tmp_path / run / name / "checkpoint.pt")["agent"]
            for run in ("whole", "spoiled")
        )
        assert all(x.isfinite().all() for x in theirs.values())
        if name != "clip-0.2__2":
            same(mine, theirs)
            assert one["eval_return_mean"] == other["eval_return_mean"]
    saved = ppo.load_checkpoint(tmp_path / "spoiled/clip-0.2__2/checkpoint.pt")
    monkeypatch.setattr(ppo, "collect", collect)
    train(tmp_path / "one", env_id="Pendulum-v1", total_timesteps=64)
    one = ppo.load_checkpoint(tmp_path / "one/clip-0.2__2/checkpoint.pt")
    same(saved["agent"], one["agent"])  # nothing is learned any more
    # its statistics are those of the first update
    assert saved["return_stats"]["count"] == saved["agent"]["obs_stats.count"] == 64
    frozen = rows(tmp_path / "spoiled" / "clip-0.2__2" / "metrics.csv")
    assert [row["losses/policy_loss"] == "" for row in frozen] == [False, True, True]


def test_an_evaluation_that_is_not_finite_costs_that_agent_alone(tmp_path, monkeypatch, capsys):
    play_once = lockstep.play_once

    def spoil(play, actors, seeds, *rest):
        episodes = play_once(play, actors, seeds, *rest)
        assert len(episodes) == 8 * 2  # two episodes of each agent; the second one's are spoiled
        return [*episodes[:2], (math.nan, True), *episodes[3:]]

    monkeypatch.setattr(lockstep, "play_once", spoil)
    train(tmp_path / "run", env_id="Pendulum-v1", total_timesteps=64)
    said = capsys.readouterr().out
    assert "not finite: clip-0.2__2" in said
    assert "note: 1 of 16 evaluation episodes" in said and "cut after 200 steps" in said
    for args in crowd_of():
        name = lockstep.agent_name(args)
        (summary,) = json.loads((tmp_path / "run" / name / "summary.json").read_text())
        assert (summary["eval_return_mean"] is None) == (name == "clip-0.2__2")


def test_a_crowd_that_goes_on_has_the_flags_of_its_folder(tmp_path):
    train(tmp_path / "run", env_id="Pendulum-v1", total_timesteps=64)
    args, seeds, objectives, _ = lockstep.load_run(str(tmp_path / "run"))
    with pytest.raises(ppo.UserError, match="resume stands alone"):
        lockstep.train(replace(args, gamma=0.5), seeds, objectives)


def test_a_crowd_of_none_but_frozen_agents_stops(tmp_path, monkeypatch):
    gae = ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *given: gae(*given) * math.nan)
    with pytest.raises(ppo.NonFiniteError, match="no agent is finite after update 1"):
        train(tmp_path / "run", env_id="Pendulum-v1", total_timesteps=64)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--seeds 1 1", "--seeds needs at least one value, and each only once"),
        ("--seeds -1", "--seed must be between 0"),
        ("--objectives clip:0.2 clip", "'clip' is no objective"),
        ("--objectives clip:0.2 pg", "--objective pg: eq. 2 can use a batch once only"),
        ("--seed 3", "--seed: here it is --seeds"),
        ("--objective none", "--objective: here it is --objectives"),
        ("--evaluate x", "python ppo_continuous.py --evaluate"),
        ("--resume x --seeds 1", "cannot stand beside --resume"),
        ("--resume x --gamma 0.9", "--gamma cannot stand beside --resume"),
        ("--resume nowhere", "nowhere is not a run folder"),
        ("--env-id CartPole-v1", "CartPole-v1 takes Discrete(2)"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lockstep.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        ppo.main(lockstep.command)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_crowd_learns(tmp_path):
    flags = {
        "env_id": "InvertedPendulum-v4",
        "num_envs": 8,
        "num_steps": 128,
        "num_minibatches": 16,
    }
    flags |= {"update_epochs": 10, "total_timesteps": 60_000, "learning_rate": 1e-3}
    flags |= {"compile": True, "eval_episodes": 5, "env_backend": "auto"}
    summaries = train(tmp_path / "run", objectives=["clip:0.2"], **flags)
    returns = [row["eval_return_mean"] for row in summaries]
    assert min(returns) > 500, returns
