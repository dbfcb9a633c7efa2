"""ppo_continuous.py: one agent's mathematics against independent computations, then many agents against one."""

import json
import math
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import ppo_cartpole
import ppo_continuous as ppo
from ppo_continuous import Agent, Args, parse_objective

ROOT = Path(__file__).parent.parent
OBJECTIVES = ("clip:0.2", "kl:1", "adaptive:0.01", "none", "pg")
SMALL = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 2, "compile": False, "eval_episodes": 1}


def text_between(script: str, start: str, end: str) -> str:
    text = (ROOT / script).read_text()
    return text[text.index(start) : text.index(end, text.index(start))]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("AROUND THE RUN\n", "# -----"),
        ("class Objective(", "# -----"),
        ("def layer_init(", "\n\n\n"),
        ("def gae(", "\n\n\n"),
        ("def open_env(", "\n\n\n"),
        ("def evaluate_run(", "\n\n\n"),
        ("def main(", "__main__"),
    ],
)
def test_what_both_scripts_share_is_the_same_text(start, end):
    assert text_between("ppo_cartpole.py", start, end) == text_between("ppo_continuous.py", start, end)


def arguments(**flags) -> Args:
    args = Args(**SMALL | flags)
    args.check()
    args.env_backend = ppo.choose_backend(args)
    return args


def recorded(agents: int, rows: int = 64, seed: int = 0) -> dict:
    """A batch [agents, rows, ...] of a 3-dimensional observation and 2-dimensional actions, some rows resets."""
    rng = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=rng)
    batch = {"obs": draw(agents, rows, 3), "mean": 0.1 * draw(agents, rows, 2), "log_std": torch.zeros(agents, rows, 2)}
    batch["actions"] = batch["mean"] + draw(agents, rows, 2)
    batch |= {name: draw(agents, rows) for name in ("advantages", "values", "returns")}
    batch["valid"] = (torch.rand(agents, rows, generator=rng) > 0.1).float()
    return batch | {"log_prob": ppo.gaussian_log_prob(batch["mean"], batch["log_std"], batch["actions"])}


def knobs(objectives) -> dict:
    parsed = [parse_objective(text) for text in objectives]
    return {name: torch.tensor([getattr(o, name) for o in parsed]) for name in ("log_prob", "epsilon", "beta")}


def learned(args: Args, batch: dict) -> dict:
    """The learners after one update of all agents in eager mode; minibatch order keyed by seed, as in train()."""
    step = torch.vmap(partial(ppo.gradient_step, Agent(3, 2), args), in_dims=(0, 0, 0, 0, None))
    rows = batch["obs"].shape[1]
    orders = []
    for agent in args.agents:
        rng = torch.Generator().manual_seed(ppo.stream(agent["seed"], "minibatches"))
        orders.append(torch.stack([torch.randperm(rows, generator=rng) for _ in range(args.update_epochs)]))
    objective = knobs([agent["objective"] for agent in args.agents])
    return ppo.update(step, ppo.new_learners(args, (3, 2)), batch, objective, torch.stack(orders), 3e-3, args)


# ------------------------------------------------------------------------------------------------------ mathematics
def test_gaussian_log_prob_and_kl_are_those_of_torch_distributions():
    mean, old_mean, action = torch.randn(3, 50, 4, dtype=torch.float64)
    log_std, old_log_std = torch.randn(2, 50, 4, dtype=torch.float64)
    new, old = (Independent(Normal(m, s.exp()), 1) for m, s in ((mean, log_std), (old_mean, old_log_std)))
    torch.testing.assert_close(ppo.gaussian_log_prob(mean, log_std, action), new.log_prob(action))
    torch.testing.assert_close(ppo.gaussian_kl(old_mean, old_log_std, mean, log_std), kl_divergence(old, new))


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_policy_loss_and_gradient_in_closed_form(objective, ratio, advantage):
    """One action at +1 of N(0, 1), whose density a shift of the mean by x multiplies by exp(x - x^2 / 2)."""
    shift = 1 - math.sqrt(1 - 2 * math.log(ratio)) if ratio < math.exp(0.5) else None
    log_std = 0.0
    if shift is None:  # no shift reaches that far: a narrower Gaussian around the action does
        shift, log_std = 1.0, 0.5 - math.log(ratio)
    mean = torch.tensor([[shift]], dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    batch = {"mean": zero, "log_std": zero, "actions": zero + 1, "valid": one, "values": one, "returns": one}
    batch |= {"advantages": advantage * one, "log_prob": ppo.gaussian_log_prob(zero, zero, zero + 1)}
    scalars = {name: x[0] for name, x in knobs([objective]).items()}
    scalars["beta"] = 3 * scalars["beta"]
    args = arguments(vf_coef=0.0)
    loss, metrics = ppo.ppo_loss((mean, zero + log_std, one), batch, scalars, args)
    (grad,) = torch.autograd.grad(loss, mean)
    kl = log_std + (1 + shift**2) / (2 * math.exp(2 * log_std)) - 0.5
    slope = (1 - shift) / math.exp(2 * log_std)  # of log pi, by the mean
    outside = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)  # where eq. 7 is flat
    expected, gradient = -ratio * advantage, -ratio * advantage * slope
    if objective == "clip:0.2" and outside:
        expected, gradient = -(1.2 if advantage > 0 else 0.8) * advantage, 0.0
    if objective == "pg":
        expected, gradient = -(batch["log_prob"].item() + math.log(ratio)) * advantage, -advantage * slope
    if objective in ("kl:1", "adaptive:0.01"):
        expected, gradient = expected + 3 * kl, gradient + 3 * shift / math.exp(2 * log_std)
    assert loss.item() == pytest.approx(expected)
    assert grad.item() == pytest.approx(gradient, abs=1e-9)
    assert metrics["kl"].item() == pytest.approx(kl)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert metrics["clipfrac"].item() == (objective == "clip:0.2" and abs(ratio - 1) > 0.2)


def test_a_term_that_an_objective_lacks_cannot_spoil_its_gradient():
    """The unused KL is infinite where the old spread is; the unused ratio of pg where the log-ratio is large."""
    batch = {name: x[0] for name, x in recorded(1).items()}
    mean, log_std = torch.zeros(64, 2, requires_grad=True), torch.zeros(64, 2, requires_grad=True)
    cases = {"clip:0.2": {"log_std": batch["log_std"] + 50}, "pg": {"log_prob": batch["log_prob"] - 200}}
    for objective, spoiled in cases.items():
        scalars = {name: x[0] for name, x in knobs([objective]).items()}
        loss, metrics = ppo.ppo_loss((mean, log_std, batch["values"]), batch | spoiled, scalars, arguments())
        assert not (metrics["kl"] if objective == "clip:0.2" else metrics["approx_kl"]).isfinite()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (mean, log_std)))


def test_running_statistics_are_those_of_all_valid_rows_at_once():
    rng = np.random.default_rng(0)
    rows, valid = rng.normal(3, 5, (2, 90, 4)), rng.random((2, 90)) > 0.3
    stats = ppo.new_stats(arguments(seeds=(1, 2)), (4, 2))["obs"]
    for part in np.split(np.arange(90), 3):
        stats = ppo.merge(stats, torch.tensor(rows[:, part]), torch.tensor(valid[:, part]), torch.ones(2) > 0)
    for agent in range(2):
        seen = rows[agent][valid[agent]]
        np.testing.assert_allclose(stats["mean"][agent], seen.mean(0))
        np.testing.assert_allclose(stats["var"][agent], seen.var(0))
        assert stats["count"][agent].item() == len(seen)
    after = ppo.merge(stats, torch.tensor(rows), torch.ones(2, 90), torch.tensor([False, True]))
    assert torch.equal(after["mean"][0], stats["mean"][0]) and not torch.equal(after["mean"][1], stats["mean"][1])


def test_reset_rows_change_nothing():
    args, batch = arguments(seeds=(1,)), recorded(1)
    spoiled = {name: x.clone() for name, x in batch.items()}
    rows = batch["valid"][0] == 0
    for name in ("actions", "advantages", "returns", "values"):
        spoiled[name][0, rows] = 7.0
    one, other = (learned(args, b)["weights"] for b in (batch, spoiled))
    assert rows.sum() > 2 and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- many against one
def test_an_agent_in_a_crowd_starts_as_it_would_alone():
    crowd = arguments(env_id="Hopper-v4", seeds=(1, 2), objectives=("clip:0.2", "kl:1"), env_backend="gymnasium")
    weights, actors = ppo.new_learners(crowd, (11, 3))["weights"], ppo.start_actors(crowd, 5)
    for i, agent in enumerate(crowd.agents):
        alone = arguments(env_id="Hopper-v4", seeds=(agent["seed"],), objectives=(agent["objective"],))
        for name, x in ppo.new_learners(alone, (11, 3))["weights"].items():
            assert torch.equal(weights[name][i], x[0])
        np.testing.assert_array_equal(actors.obs[i], ppo.start_actors(alone, 5).obs[0])
    assert not np.array_equal(actors.obs[0], actors.obs[1])


@pytest.mark.parametrize("flags", [{}, {"preset": "paper", "value_clip": 0.2}, {"target_kl": 0.001}])
def test_an_update_in_a_crowd_is_the_update_alone(flags):
    crowd = arguments(seeds=(1, 2), objectives=("clip:0.2", "none", "adaptive:0.01"), **flags)
    batch = recorded(6)
    together = learned(crowd, batch)
    for i, agent in enumerate(crowd.agents):
        alone = arguments(seeds=(agent["seed"],), objectives=(agent["objective"],), **flags)
        single = learned(alone, {name: x[i : i + 1] for name, x in batch.items()})
        for name, x in single["weights"].items():
            torch.testing.assert_close(together["weights"][name][i], x[0], rtol=1e-4, atol=1e-6)
        assert together["sums"]["steps"][i] == single["sums"]["steps"][0]


def test_the_vmapped_step_is_the_step_of_one_agent():
    args, batch = arguments(seeds=(3,)), recorded(1)
    learners, rows = ppo.new_learners(args, (3, 2)), torch.arange(16)
    objective, model = knobs(["clip:0.2"]), Agent(3, 2)
    first = torch.utils._pytree.tree_map(lambda x: x[0], (learners, batch, objective))
    one = ppo.gradient_step(model, args, *first[:2], rows, first[2], torch.tensor(1e-3))
    step = torch.vmap(partial(ppo.gradient_step, model, args), in_dims=(0, 0, 0, 0, None))
    all_of_it = step(learners, batch, rows[None], objective, torch.tensor(1e-3))
    for name, x in one["weights"].items():
        torch.testing.assert_close(all_of_it["weights"][name][0], x)
        assert not torch.equal(x, learners["weights"][name][0])


def test_adam_and_clipping_are_those_of_torch():
    args, batch = arguments(seeds=(3,), norm_adv="none", update_epochs=3), recorded(1)
    batch["valid"][:] = 1
    got = learned(args, batch)["weights"]
    torch.manual_seed(ppo.stream(3, "weights"))
    agent = Agent(3, 2)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    rng = torch.Generator().manual_seed(ppo.stream(3, "minibatches"))
    for _ in range(3):
        for rows in torch.randperm(64, generator=rng).chunk(4):
            minibatch = {name: x[0, rows] for name, x in batch.items()}
            objective = {name: x[0] for name, x in knobs(["clip:0.2"]).items()}
            loss, _ = ppo.ppo_loss(agent(minibatch["obs"]), minibatch, objective, args)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
    for name, x in agent.named_parameters():
        torch.testing.assert_close(got[name][0], x.detach(), rtol=1e-4, atol=1e-5)


def test_a_compiled_update_is_the_eager_one():
    args, batch = arguments(seeds=(1,), objectives=("clip:0.2", "kl:1")), recorded(2)
    step = torch.vmap(partial(ppo.gradient_step, Agent(3, 2), args), in_dims=(0, 0, 0, 0, None))
    rows, objective = torch.arange(32).expand(2, 32).contiguous(), knobs(["clip:0.2", "kl:1"])
    learners = ppo.new_learners(args, (3, 2))
    eager, compiled = (f(learners, batch, rows, objective, torch.tensor(1e-3)) for f in (step, torch.compile(step)))
    torch.testing.assert_close(eager["sums"], compiled["sums"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(eager["weights"], compiled["weights"], rtol=1e-3, atol=1e-5)


def test_a_frozen_agent_keeps_its_last_weights_and_leaves_the_others_untouched():
    args, batch = arguments(seeds=(1, 2, 3)), recorded(3)
    good = learned(args, batch)
    batch["returns"][1, 10] = math.nan
    bad = learned(args, batch)
    assert good["alive"].tolist() == [True] * 3 and bad["alive"].tolist() == [True, False, True]
    for name, x in bad["weights"].items():
        assert x.isfinite().all()
        assert torch.equal(x[[0, 2]], good["weights"][name][[0, 2]])


# --------------------------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
@pytest.mark.parametrize(("env_id", "terminates"), [("HalfCheetah-v4", False), ("Hopper-v4", True)])
def test_both_backends_end_episodes_alike(backend, env_id, terminates):
    args = arguments(env_id=env_id, env_backend=backend, seeds=(1, 2))
    actors, dims = ppo.start_actors(args, 0), {"HalfCheetah-v4": (17, 6), "Hopper-v4": (11, 3)}[env_id]
    noise = torch.randn(1005, 2, 1, dims[1], generator=torch.Generator().manual_seed(0))
    weights, seconds = ppo.new_learners(args, dims)["weights"], {"policy": 0.0, "environment": 0.0}
    rollout, episodes = ppo.collect(weights, ppo.new_stats(args, dims)["obs"], actors, noise, args, seconds)
    ended = rollout["terminated"] | rollout["truncated"]
    assert torch.equal(rollout["valid"][1:], ~ended[:-1]) and rollout["valid"][0].all()
    assert (rollout["rewards"][~rollout["valid"]] == 0).all() and not ended[~rollout["valid"]].any()
    assert sum(map(len, episodes)) == ended.sum()
    if terminates:
        assert rollout["terminated"].any() and not rollout["truncated"].any()
    else:
        assert ended.nonzero().tolist() == [[999, 0, 0], [999, 1, 0]] and not rollout["terminated"].any()
        assert (rollout["obs"][1001].abs() < 1).all() and (rollout["obs"][1000].abs() > 1).any()  # the reset, the end
        assert [e[0][2] for e in episodes] == [1000, 1000]
    total = rollout["rewards"][: episodes[0][0][0] + 1, 0].sum().item()
    assert episodes[0][0][1] == pytest.approx(total, rel=1e-4)


def test_the_raw_action_is_stored_and_the_clipped_one_is_sent(monkeypatch):
    args, sent, step = arguments(env_id="Pendulum-v1", seeds=(1,)), [], gym.vector.SyncVectorEnv.step
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", lambda self, a: sent.append(a.copy()) or step(self, a))
    actors = ppo.start_actors(args, 0)
    weights = ppo.new_learners(args, (3, 1))["weights"]
    noise = 5 * torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    stats, seconds = ppo.new_stats(args, (3, 1))["obs"], {"policy": 0.0, "environment": 0.0}
    rollout, _ = ppo.collect(weights, stats, actors, noise, args, seconds)
    assert rollout["actions"].abs().max() > 4 and np.abs(sent).max() == 2.0


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_a_time_limit_is_bootstrapped_and_the_raw_action_is_scored(backend, tmp_path, monkeypatch):
    seen, gae, update = {}, ppo.gae, ppo.update
    monkeypatch.setattr(ppo, "gae", lambda *recorded: seen.setdefault("gae", (recorded, gae(*recorded)))[1])
    monkeypatch.setattr(ppo, "update", lambda *given: seen.setdefault("given", given) and update(*given))
    flags = {"num_steps": 1024, "total_timesteps": 1024, "update_epochs": 1, "env_backend": backend}
    ppo.train(Args(**SMALL | flags, norm_adv="none", scale_rewards=False, run_dir=str(tmp_path / "run")))
    (rewards, values, _, truncated, *_), advantages = seen["gae"]
    _, learners, batch, *_ = seen["given"]
    assert truncated.nonzero().tolist() == [[999, 0, 0]]  # HalfCheetah ends by its time limit alone
    weights = {name: x[0] for name, x in learners["weights"].items()}
    final, last = torch.func.functional_call(Agent(17, 6), weights, batch["obs"][0, [1000, 999]])[2]
    torch.testing.assert_close(values[[1000, 999], 0, 0], torch.stack([final, last]))
    assert (advantages[999] - (rewards[999] + 0.99 * final - last)).abs() < 1e-4 and rewards[1000] == 0
    assert batch["valid"][0].tolist() == [row != 1000 for row in range(1024)]

    actions = batch["actions"][0]
    mean, log_std, _ = torch.func.functional_call(Agent(17, 6), weights, batch["obs"][0])
    density = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
    assert actions.abs().max() > 2  # far outside the bounds, which the environment was given
    torch.testing.assert_close(batch["log_prob"][0], density)  # so the ratio of the first minibatch is 1


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    flags = {"env_id": "InvertedPendulum-v4", "seeds": (1, 2), "objectives": ("clip:0.2", "adaptive:0.01")}
    flags |= {"total_timesteps": 64 * 6, "checkpoint_every": 2}
    whole, summaries = ppo.train(arguments(**flags, run_dir=str(tmp_path / "whole")))
    log = ppo.Run.log

    def stop(run, state, *rest):
        log(run, state, *rest)
        if state["update"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ppo.Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(arguments(**flags, run_dir=str(tmp_path / "stopped")))
    monkeypatch.undo()
    resumed, again = ppo.train(Args(resume=str(tmp_path / "stopped")))
    for part in ("weights", "m", "v"):
        assert all(torch.equal(x, resumed["learners"][part][name]) for name, x in whole["learners"][part].items())
    assert all(torch.equal(x, resumed["stats"]["obs"][name]) for name, x in whole["stats"]["obs"].items())
    for name in ("episodes.csv", "metrics.csv"):
        one, other = ((tmp_path / run / name).read_text().splitlines() for run in ("whole", "stopped"))
        speed = one[0].split(",").index("charts/SPS") if "charts/SPS" in one[0] else None
        cut = [[",".join(c for i, c in enumerate(line.split(",")) if i != speed) for line in x] for x in (one, other)]
        assert cut[0] == cut[1]
    kept = ("seed", "objective", "transitions", "last_100_return", "eval_return_mean", "diverged_at")
    assert [[row[k] for k in kept] for row in summaries] == [[row[k] for k in kept] for row in again]
    assert json.loads((tmp_path / "stopped" / "config.json").read_text())["args"]["env_backend"] == "envpool"


def test_a_run_goes_on_and_is_evaluated_where_there_is_no_compiler(tmp_path, monkeypatch, capsys):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 256, "checkpoint_every": 1, "compile": True}
    run, real = str(tmp_path / "run"), ppo.update
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setattr(ppo.shutil, "which", lambda name: f"/usr/bin/{name}")

    def train_until(args: Args, updates: int) -> None:
        calls = []

        def update(*rest):
            calls.append(1)
            if len(calls) > updates:
                raise KeyboardInterrupt
            return real(*rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ppo, "update", update)
            ppo.train(args)

    train_until(arguments(**flags, run_dir=run), 2)
    monkeypatch.setattr(ppo.shutil, "which", lambda _: None)
    train_until(Args(resume=run), 1)
    _, (summary,) = ppo.train(Args(resume=run))
    assert capsys.readouterr().err.count("note: no C++ compiler") == 2
    loaded, args = ppo.load_agent(run)
    assert ppo.evaluate(loaded, args, tmp_path)[0] == pytest.approx([summary["eval_return_mean"]])
    assert ppo.load_checkpoint(tmp_path / "run/checkpoint.pt")["seconds"]["starts"] == 3  # each compiled anew


def test_videos_show_every_episode_that_is_counted(tmp_path):
    flags = {"env_id": "Pendulum-v1", "seeds": (1, 2), "total_timesteps": 64, "num_envs": 2, "eval_episodes": 2}
    trained, _ = ppo.train(arguments(**flags, env_backend="gymnasium", run_dir=str(tmp_path / "run")))
    args = arguments(**flags, env_backend="gymnasium")
    plain = ppo.evaluate(trained, args, tmp_path)
    for sampled in (False, True):
        args.capture_video, args.sample_actions = True, sampled
        filmed = ppo.evaluate(trained, args, tmp_path / str(sampled))
        assert np.allclose(filmed, plain, rtol=1e-3) != sampled and np.isfinite(filmed).all()
        videos = sorted((tmp_path / str(sampled)).rglob("*.mp4"))
        assert [video.parent.name for video in videos] == ["0-0", "0-1", "1-0", "1-1"]
        assert all(video.read_bytes()[4:8] == b"ftyp" and video.stat().st_size > 1000 for video in videos)


def test_every_metric_of_every_agent_is_there_and_finite(tmp_path):
    flags = {"env_id": "Pendulum-v1", "objectives": OBJECTIVES, "total_timesteps": 256, "num_envs": 2}
    _, summaries = ppo.train(arguments(**flags, run_dir=str(tmp_path / "run")))
    header, *rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert header[:4] == ["update", "global_step", "seed", "objective"] and len(rows) == 2 * 5
    promised = ["policy_loss", "value_loss", "entropy", "kl", "approx_kl", "old_approx_kl", "clipfrac", "grad_norm"]
    promised = {f"losses/{name}" for name in [*promised, "kl_after_update", "explained_variance"]}
    assert promised | {"charts/beta", "charts/action_std", "charts/SPS"} <= set(header)
    for row in rows:
        values = dict(zip(header, row, strict=True))
        assert all(math.isfinite(float(values[name])) for name in header if name.startswith("losses/"))
    assert [row["objective"] for row in summaries] == list(OBJECTIVES)
    assert all(math.isfinite(row["eval_return_mean"]) for row in summaries)
    loaded, args = ppo.load_agent(str(tmp_path / "run"))
    assert ppo.evaluate(loaded, args, tmp_path)[0] == pytest.approx([summaries[0]["eval_return_mean"]])


@pytest.mark.parametrize("source", ["obs", "rewards"])
def test_a_nan_from_one_agents_simulator_stays_with_that_agent(source, tmp_path, monkeypatch, capsys):
    flags = {"env_id": "Pendulum-v1", "seeds": (1, 2, 3), "total_timesteps": 64 * 3}
    whole, _ = ppo.train(arguments(**flags, run_dir=str(tmp_path / "whole")))
    collect, calls = ppo.collect, []

    def spoil(*rest):
        rollout, episodes = collect(*rest)
        calls.append(1)
        if len(calls) == 2:
            rollout[source][10, 1] = math.nan
        return rollout, episodes

    monkeypatch.setattr(ppo, "collect", spoil)
    spoiled, summaries = ppo.train(arguments(**flags, run_dir=str(tmp_path / "spoiled")))
    for name, x in whole["learners"]["weights"].items():
        assert torch.equal(x[[0, 2]], spoiled["learners"]["weights"][name][[0, 2]])
        assert spoiled["learners"]["weights"][name].isfinite().all()
    for name, x in whole["stats"]["obs"].items():
        assert torch.equal(x[[0, 2]], spoiled["stats"]["obs"][name][[0, 2]])
        assert spoiled["stats"]["obs"][name].isfinite().all()
    assert [row["diverged_at"] for row in summaries] == [None, 128, None]
    assert f"{source} not finite in update 2: {{'seed': 2, " in capsys.readouterr().err


def test_a_lone_agent_that_goes_non_finite_stops_the_run(tmp_path, monkeypatch):
    scaled = ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *rest: scaled(*rest) * math.nan)
    with pytest.raises(ppo.NonFiniteError, match="loss or gradient not finite in update 1"):
        ppo.train(arguments(env_id="Pendulum-v1", total_timesteps=64, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--env-id CartPole-v1", "CartPole-v1 takes Discrete(2) actions"),
        ("--env-id HalfCheeta-v4", "Did you mean: `HalfCheetah`?"),
        ("--env-id HalfCheetah-v44 --env-backend envpool", "did you mean HalfCheetah-v4?"),
        ("--seeds 1 1", "--seeds needs at least one value, and each only once"),
        ("--seeds -1", "--seeds must be between 0"),
        ("--objectives clip:0.2 clip", "'clip' is no objective"),
        ("--obs-clip 0", "--obs-clip must be positive"),
        ("--max-grad-norm nan", "--max-grad-norm must be positive"),
        ("--num-minibatches 33", "does not divide into 33 minibatches"),
        ("--preset fast", "invalid choice 'fast'"),
        ("--evaluate nowhere", "nowhere is not a run folder"),
        ("--resume nowhere --seeds 2", "--seeds cannot stand beside --resume"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ppo_continuous.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_it_learns(tmp_path):
    flags = {"env_id": "InvertedPendulum-v4", "num_envs": 8, "num_steps": 128, "num_minibatches": 16}
    flags |= {"seeds": (1, 2), "total_timesteps": 60_000, "learning_rate": 1e-3, "eval_episodes": 5, "compile": True}
    _, summaries = ppo.train(Args(**flags, run_dir=str(tmp_path / "run")))
    assert all(row["eval_return_mean"] > 500 for row in summaries), [row["eval_return_mean"] for row in summaries]


def test_the_scripts_agree_on_what_an_objective_is():
    for text in OBJECTIVES:
        assert tuple(parse_objective(text)) == tuple(ppo_cartpole.parse_objective(text))
