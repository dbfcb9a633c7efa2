"""What users bring: environments with faults, work that could be lost, numbers that could be wrong.

Every test runs ppo_cartpole.py and ppo_continuous.py, unless it is about one of them.
"""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import locked_elsewhere

import grpo_toy
import ppo_atari
import ppo_cartpole
import ppo_continuous

SCRIPTS = {"cartpole": ppo_cartpole, "continuous": ppo_continuous}


@pytest.mark.parametrize("script", [*SCRIPTS.values(), ppo_atari, grpo_toy])
def test_every_number_among_the_flags_has_its_limits(script):
    limited = [name for names in script.LIMITS.values() for name in names]
    kinds = (int, float, int | None, float | None)
    numbers = {flag.name for flag in fields(script.Args) if flag.type in kinds}
    assert len(limited) == len(set(limited)) and set(limited) == numbers


TINY = "--total-timesteps 256 --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1"
TINY = f"{TINY} --eval-episodes 2 --no-compile"


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture
def kind(script) -> dict:
    """Of the user's environment: the actions that the script wants."""
    return {"continuous": script is ppo_continuous}


@pytest.fixture
def run(script, main):
    """A tiny run on an environment of this file, in the folder `run`."""

    def go(name: str, *more: str):
        suffix = "Box" if script is ppo_continuous else "Discrete"
        env_id = f"test_user_inputs:{name}{suffix}-v0"
        return main("--env-id", env_id, *TINY.split(), "--run-dir", "run", *more)

    return go


# ------------------------------------------------------------------------------- ENVIRONMENTS
class Good(gym.Env):
    """Walk to 1. An episode has 8 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    made = 0  # of each class: a test starts it from 0
    steps = 0  # of all copies, likewise

    def __init__(self, continuous: bool, render_mode: str | None = None):
        box = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = box if continuous else gym.spaces.Discrete(2)
        self.render_mode = render_mode
        type(self).made += 1

    def observe(self):
        return np.array([self.x, self.t / 8], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-1, 1))
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        type(self).steps += 1
        self.t += 1
        self.x += 0.1 * float(np.ravel(action)[0])
        return self.observe(), -abs(self.x - 1), False, self.t >= 8, {}

    def render(self):
        return np.full((63, 97, 3), 8 * self.t, np.uint8)  # odd sides


class NoSeed(Good):
    def reset(self):
        return super().reset()


class NoOptions(Good):
    def reset(self, seed=None):
        return super().reset(seed=seed)


class FourValues(Good):
    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, truncated, info


class NoInfo(Good):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class OtherShape(Good):
    def observe(self):
        return super().observe()[np.newaxis]


class Words(Good):
    def observe(self):
        return np.array(["left", "right"])


class NoReward(Good):
    def step(self, action):
        return super().step(action)[0], None, False, False, {}


class TwoRewards(Good):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward, reward]), *rest


class ResetFails(Good):
    def reset(self, *, seed=None, options=None):
        raise TimeoutError("the simulator\ndoes not answer")


class Loose(Good):
    """Departs from the interface wherever that does no harm."""

    def observe(self):
        return super().observe().astype(float).tolist()

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], None

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        infos = [None, {"ragged": np.zeros(self.t)}, {3: self}][self.t % 3]
        return obs, np.array([reward]), np.bool_(terminated), int(truncated), infos


class Nested(Good):
    """Observes a Dict. "Flat" is this one, flattened where it is registered."""

    observation_space = gym.spaces.Dict({"all": Good.observation_space})

    def observe(self):
        return {"all": super().observe()}


def flat(**options) -> gym.Env:
    return gym.wrappers.FlattenObservation(Nested(**options))


class Narrow(Good):
    """Declares bytes, gives numbers around 5,412,345."""

    observation_space = gym.spaces.Box(-128, 127, (2,), np.int8)

    def observe(self):
        return np.array([5_412_345 + 0.2 * self.x, 1000])


class Lost(Good):
    """Loses its host in step 80, in the second update: 64 rows of each are steps or resets."""

    def step(self, action):
        if type(self).steps == 80:
            raise ConnectionResetError("the host\nis gone")
        return super().step(action)


class Quits(Lost):
    def step(self, action):
        try:
            return super().step(action)
        except ConnectionResetError:
            sys.exit()


class Leaves(Good):
    def __init__(self, continuous: bool, render_mode: str | None = None):
        sys.exit("no licence")


class Sampler(Good):
    """Draws where an episode begins from its own action space."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(np.ravel(self.action_space.sample())[0])
        return self.observe(), {}


class Global(Good):
    """Draws from the global generators, in its constructor too."""

    def __init__(self, continuous: bool, render_mode: str | None = None):
        super().__init__(continuous, render_mode)
        self.goal = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.goal + np.random.rand()  # noqa: NPY002
        return self.observe(), {}


class Endless(Good):
    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


class Alone(Good):
    """A simulator of which one instance may live."""

    alive = False

    def __init__(self, continuous: bool, render_mode: str | None = None):
        if type(self).alive:
            raise OSError("port 5005 is in use")
        type(self).alive = True
        super().__init__(continuous, render_mode)

    def close(self):
        type(self).alive = False


class DoesNotClose(Good):
    def close(self):
        raise RuntimeError("no answer")


class LaterNaN(Good):
    """Rewards are NaN in the evaluation: in every instance but the two that are trained on."""

    def __init__(self, continuous: bool, render_mode: str | None = None):
        super().__init__(continuous, render_mode)
        self.reward = np.nan if type(self).made > 2 else 1.0

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.reward, *rest


class Grey(Good):
    def render(self):
        return np.zeros((64, 96), np.uint8)


class FloatPicture(Good):
    def render(self):
        return np.zeros((64, 96, 3))


class Wanders(Good):
    def step(self, action):
        if type(self).steps > 100:
            os.chdir("/")
        return super().step(action)


def descendants(cls) -> list:
    return [cls, *(below for child in cls.__subclasses__() for below in descendants(child))]


for suffix, continuous in (("Box", True), ("Discrete", False)):
    for cls in descendants(Good):
        gym.register(f"{cls.__name__}{suffix}-v0", cls, kwargs={"continuous": continuous})
    gym.register(f"Flat{suffix}-v0", flat, kwargs={"continuous": continuous})


@pytest.fixture(autouse=True)
def no_steps() -> None:
    for cls in descendants(Good):
        cls.made = cls.steps = 0


def rows(path: Path) -> int:
    return len(path.read_text().splitlines()) - 1


def load(path: Path) -> dict:
    """The checkpoint of a run folder."""
    return torch.load(path / "checkpoint.pt", weights_only=True)


def is_json(path: Path) -> bool:
    """Also to parsers that are stricter than Python's."""
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return True


# ------------------------------------------------------- 1. GYMNASIUM'S INTERFACE IS BROKEN
FAULTS = {
    "NoSeed": "the first reset() failed: TypeError: ",
    "NoOptions": "the first reset() failed: TypeError: ",
    "FourValues": "the first step() failed: ValueError: not enough values to unpack (expected 5",
    "NoInfo": "the first reset() failed: TypeError: it must give (observation, info), not ndarray",
    "OtherShape": "an observation of shape (1, 2) and float32; declared is Box(-inf, inf, (2,)",
    "Words": "reset() gives an observation of shape (2,) and <U5; declared is Box(",
    "NoReward": "the first step() failed: TypeError: float() argument must be a string or a real",
    "TwoRewards": "the first step() failed: ValueError: ",
    "ResetFails": "the first reset() failed: TimeoutError: the simulator does not answer",
    "Leaves": "cannot make 'test_user_inputs:Leaves",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_interface_is_one_line_before_anything_is_written(name, run, tmp_path):
    code, out, err = run(name)
    assert (code, out, len(err)) == (2, [], 1)
    assert f"test_user_inputs:{name}" in err[0] and FAULTS[name] in err[0]
    assert list(tmp_path.iterdir()) == []


def test_harmless_differences_change_nothing(run, tmp_path):
    names = ("Good", "Loose", "Flat")
    assert [run(name, "--run-dir", name).code for name in names] == [0, 0, 0]
    good, loose, flat = (tmp_path / name / "episodes.csv" for name in names)
    assert good.read_bytes() == loose.read_bytes() == flat.read_bytes() and rows(good) > 20


def test_integer_actions_are_refused_and_bounds_far_from_0_are_told(monkeypatch, capsys):
    args = ppo_continuous.Args(env_id="Pendulum-v1")
    bounds = [(100, 200, True), (0, 1, False), (-np.inf, -5, True), (0, 1e4, True), (2, 4, True)]
    bounds += [(0, 0.001, True), (-0.4, 0.4, False), (-np.inf, np.inf, False)]
    for low, high, note in bounds:
        ppo_continuous.note_far_bounds(args, gym.spaces.Box(low, high, (1,)))
        assert ("RescaleAction" in capsys.readouterr().err) == note
    monkeypatch.setattr(Good, "observation_space", gym.spaces.Box(-1, 1, (2,)))
    envs = gym.make_vec("GoodBox-v0", 1)
    envs.single_action_space = gym.spaces.Box(-10, 10, (1,), np.int64)
    with pytest.raises(ppo_continuous.UserError, match=r"int64\); this script wants actions of fl"):
        ppo_continuous.check_spaces(args, envs)


# -------------------------------------------------------------------------- 2. WORK IS LOST
@pytest.mark.parametrize(
    ("name", "reason"), {"Lost": "ConnectionResetError", "Quits": "RuntimeError"}.items()
)
def test_what_was_learned_before_an_environment_failed_is_kept(
    name, reason, run, main, script, monkeypatch, tmp_path
):
    with pytest.raises(
        RuntimeError, match=f"(?s){name}.*, update 2: {reason}: .*, --resume goes on there"
    ):
        run(name)
    assert load(tmp_path / "run")["state"]["updates"] == 1
    assert rows(tmp_path / "run/metrics.csv") == 1
    monkeypatch.setattr(Lost, "steps", 1000)
    monkeypatch.setattr(Quits, "steps", 1000)
    assert main("--resume", "run").code == 0
    assert rows(tmp_path / "run/metrics.csv") == 4
    assert load(tmp_path / "run")["state"]["updates"] == 4


def test_after_a_failure_the_generators_go_on_where_the_last_update_left_them(
    run, script, monkeypatch, tmp_path
):
    states = []
    real = script.collect

    def spy(play, actors, noise):
        states.append(noise)
        return real(play, actors, noise)

    monkeypatch.setattr(script, "collect", spy)
    with pytest.raises(RuntimeError):
        run("Lost")
    rng = torch.Generator()
    rng.set_state(load(tmp_path / "run")["action_rng"])
    assert np.array_equal(script.draw_noise(states[1].shape, rng), states[1])


def test_a_folder_belongs_to_one_process_at_a_time(run, main, tmp_path):
    assert run("Good").code == 0
    before = (tmp_path / "run/metrics.csv").read_bytes()
    with locked_elsewhere(tmp_path / "run/metrics.csv"):
        code, out, err = main("--resume", "run")
    assert (code, out) == (2, [])
    assert err == ["error: run: another process is at work on it; wait until it has ended"]
    assert (tmp_path / "run/metrics.csv").read_bytes() == before
    assert main("--resume", "run").code == 0


def test_after_an_error_another_process_may_have_the_folder(run, tmp_path):
    """While this one lives on, as a notebook does, and holds the exception."""
    take = "import fcntl; fcntl.lockf(open('run/metrics.csv', 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with pytest.raises(RuntimeError) as kept:
        run("Lost")
    assert subprocess.run([sys.executable, "-c", take], cwd=tmp_path).returncode == 0
    assert kept.value is not None


def test_a_run_that_went_on_between_reading_and_locking_is_left_alone(run, script, tmp_path):
    assert run("Good").code == 0
    args, saved = script.load_run(str(tmp_path / "run"))
    before = (tmp_path / "run/metrics.csv").read_bytes()
    saved["state"]["updates"] = 3  # as it was when this process read it
    with pytest.raises(script.UserError, match="has gone on meanwhile; --resume it again"):
        script.Run(args, {"env_id": args.env_id}, {}, saved)
    assert (tmp_path / "run/metrics.csv").read_bytes() == before


def test_a_file_system_without_locks_does(run, script, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(script.fcntl, "lockf", refuse)
    assert run("Good").code == 0


def test_where_nothing_can_be_saved_the_first_error_is_still_told(run, script, monkeypatch):
    def full(*_):
        raise script.UserError("cannot write to checkpoint.pt: No space left on device")

    monkeypatch.setattr(script, "save_checkpoint", full)
    said = "ConnectionResetError: .*No space left on device, so what was learned .* is lost"
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        run("Lost")


def test_where_no_time_limit_is_registered_checkpoints_follow_the_episodes(
    run, script, monkeypatch
):
    """8 steps and a reset: 100 episodes of the two actors have passed after 15 updates of 64."""
    saved = []
    real = script.save_checkpoint
    monkeypatch.setattr(
        script,
        "save_checkpoint",
        lambda *args: [saved.append(args[1]["state"]["updates"]), real(*args)],
    )
    assert run("Good", "--total-timesteps", "1280").code == 0
    assert saved == [15, 20]


def test_a_long_run_has_ten_checkpoints_however_long_its_episodes_are(script, capsys):
    args = script.Args(total_timesteps=10**7, num_envs=4, num_steps=250)  # 10,000 updates
    due = [n for n in range(1, 10_001) if script.checkpoint_due(args, n, 0)]
    assert due == list(range(1000, 10_001, 1000))
    limited = replace(args)
    script.space_checkpoints(limited, 10**6)
    assert limited.checkpoint_every == 1000
    script.space_checkpoints(replace(limited, resume="run"), 10**6)  # with what was filled in
    assert capsys.readouterr().err == ""
    script.space_checkpoints(replace(args, checkpoint_every=2000), 10**6)
    assert "--checkpoint-every below 200000 biases" in capsys.readouterr().err
    short = replace(args, total_timesteps=10**6)
    assert not any(script.checkpoint_due(short, n, 199) for n in range(1, 1001))
    assert script.checkpoint_due(short, 1, 200)


def test_a_resume_that_starts_over_says_so(run, main, tmp_path):
    assert run("Good").code == 0
    (tmp_path / "run/checkpoint.pt").unlink()
    code, _, err = main("--resume", "run")
    assert code == 0 and err == ["note: run has no checkpoint and starts over"]


def test_a_run_that_starts_over_without_the_compiler_can_be_read(run, main, tmp_path):
    assert run("Good").code == 0
    (tmp_path / "run/checkpoint.pt").unlink()
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["args"]["compile"] = True
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert main("--resume", "run", "--no-compile").code == 0
    code, (line,), _ = main("--evaluate", "run")
    assert code == 0 and line.startswith("run, seed 1: evaluation")


def test_a_checkpoint_that_does_not_fit_is_one_line(script, run, main, tmp_path):
    """As after a change of the network, or of what is saved."""
    assert run("Good").code == 0
    saved = load(tmp_path / "run")
    first = next(name for name in saved["agent"] if name.startswith("actor"))
    wide = saved | {"agent": saved["agent"] | {first: torch.zeros(1, 1)}}
    lacking = {name: part for name, part in saved.items() if name != "action_rng"}
    grouped = saved | {"optimizer": saved["optimizer"] | {"param_groups": []}}
    for changed, commands, what in (
        (wide, ("--resume", "--evaluate"), f"agent .* size mismatch for {first}"),
        (lacking, ("--resume",), "action_rng .*"),
        (grouped, ("--resume",), "optimizer .* parameter groups"),
    ):
        script.save_checkpoint(tmp_path / "run/checkpoint.pt", changed)
        for command in commands:
            code, _, err = main(command, "run")
            assert code == 2 and len(err) == 1
            assert re.match(f"error: the checkpoint's {what}", err[0])


def test_a_run_goes_on_without_the_compiler_it_began_with(script, run, main, monkeypatch, tmp_path):
    """And its folder stays what it was, so that it can move again."""
    real = script.compiled
    monkeypatch.setattr(script, "compiled", lambda function: function)
    assert run("Good", "--compile", "--checkpoint-every", "1").code == 0
    config = (tmp_path / "run/config.json").read_bytes()
    monkeypatch.setattr(script, "compiled", real)
    for _ in range(2):
        code, _, err = main("--resume", "run", "--no-compile")
        assert code == 0 and err[0].startswith("note: run goes on with device cpu, compile False")
    assert (tmp_path / "run/config.json").read_bytes() == config
    assert load(tmp_path / "run")["args"]["compile"]


def test_a_compiled_run_uses_what_was_compiled(run, script, monkeypatch):
    calls = []

    def compiled(function):
        return lambda *given: calls.append(0) or function(*given)

    monkeypatch.setattr(script, "compiled", compiled)
    assert run("Good", "--compile").code == 0
    args, _ = script.load_run("run")[:2]
    assert len(calls) == args.num_updates * args.update_epochs * args.num_minibatches


def test_an_environment_that_does_not_close_costs_nothing(run, tmp_path):
    code, _, err = run("DoesNotClose")
    assert code == 0 and is_json(tmp_path / "run/summary.json")
    assert err == ["note: the environments did not close: RuntimeError('no answer')"] * 2


def test_an_environment_may_change_the_working_directory(run, tmp_path):
    try:
        assert run("Wanders").code == 0
    finally:
        os.chdir(tmp_path)
    assert is_json(tmp_path / "run/summary.json") and (tmp_path / "run/checkpoint.pt").exists()


# ------------------------------------------------------------------ 3. SILENT WRONG NUMBERS
def test_a_return_of_the_evaluation_that_is_no_number_is_exit_3(run, main, tmp_path):
    code, out, err = run("LaterNaN")
    assert (code, out) == (3, [])
    assert err == ["error: a return of the evaluation is not finite: [nan, nan]"]
    assert load(tmp_path / "run")["state"]["updates"] == 4
    assert not (tmp_path / "run/summary.json").exists()
    assert main("--evaluate", "run").code == 3
    assert not (tmp_path / "run/evaluation.json").exists()


def test_every_json_of_a_run_is_json(run, main, tmp_path):
    assert run("Good", "--max-grad-norm", "inf").code == 0
    assert main("--evaluate", "run").code == 0
    found = list((tmp_path / "run").glob("*.json"))
    assert len(found) == 3 and all(map(is_json, found))
    args = json.loads((tmp_path / "run/config.json").read_text())["args"]
    assert args["max_grad_norm"] == np.inf


def test_an_observation_is_not_cut_to_the_dtype_that_was_declared(script, kind):
    """By the environment: its own float64 reaches the statistics of ppo_continuous.py."""
    suffix = "Box" if kind["continuous"] else "Discrete"
    actors = script.Actors(script.Args(env_id=f"test_user_inputs:Narrow{suffix}-v0"), 2)
    actors.restart(3)
    assert actors.obs[0, 1] == 1000
    if kind["continuous"]:
        inner = [env.unwrapped.x for env in actors.envs.envs]
        assert actors.obs[:, 0].tolist() == [5_412_345 + 0.2 * x for x in inner]
    actors.close()


@pytest.mark.parametrize("name", ["Global", "Sampler"])
def test_the_seed_covers_whatever_an_environment_draws_from(name, run, tmp_path):
    """So a run is repeated, whatever state the global generators were in."""
    env, found = name, []
    for name in ("1", "2"):
        random.seed(name)
        np.random.seed(int(name))  # noqa: NPY002
        torch.manual_seed(int(name))
        assert run(env, "--run-dir", name, "--checkpoint-every", "2").code == 0
        found.append((tmp_path / name / "episodes.csv").read_bytes())
    assert found[0] == found[1]


def test_resume_in_python_takes_its_flags_from_the_run_or_refuses_them(run, script, tmp_path):
    assert run("Good", "--seed", "3").code == 0
    folder = str(tmp_path / "run")
    for wrong in ({"seed": 7}, {"seed": 3}, {"gamma": 0.5}):
        with pytest.raises(script.UserError, match=r"Args\(resume=RUN_DIR\) stands alone"):
            script.train(script.Args(resume=folder, **wrong))
    _, summary = script.train(script.Args(resume=folder))
    assert summary["seed"] == 3
    script.train(replace(script.load_run(folder)[0], compile=False))


# --------------------------------------------------------- 4. ENVIRONMENTS MADE AND PLAYED
def test_environments_are_made_once_and_one_for_the_evaluation(run):
    assert run("Good", "--checkpoint-every", "1").code == 0
    assert Good.made == 2 + 1


def test_one_instance_at_a_time_is_enough(run):
    assert run("Alone", "--num-envs", "1", "--num-steps", "64").code == 0


def test_the_evaluation_of_a_task_without_end_is_no_longer_than_the_training(run, script):
    code, _, err = run("Endless", "--total-timesteps", "2560")
    assert code == 0
    what = "2 of 2 evaluation episodes did not end by themselves and were cut after 1,280 steps"
    assert err == [f"note: {what}"]
    assert Endless.steps == 2560 + 2 * 1280 + 1  # one is that of the check
    # the return of such an episode is that of its first steps
    policy, env = script.load_policy("run"), Endless(continuous=script is ppo_continuous)
    returns = []
    for episode in range(2):
        obs, _ = env.reset(seed=2**30 + script.stream(1, "evaluation") + episode)
        returns.append(0.0)
        for _ in range(1280):
            obs, reward, *_ = env.step(policy(obs))
            returns[-1] += reward
    (summary,) = json.loads(Path("run/summary.json").read_text())
    assert summary["eval_return_mean"] == pytest.approx(np.mean(returns), rel=1e-2)


# ---------------------------------------------------------- 5. WHAT COMES AFTER TRAINING
@pytest.mark.parametrize("name", ["Grey", "FloatPicture"])
def test_a_picture_that_makes_no_film_is_found_before_the_training(name, run, tmp_path):
    code, out, err = run(name, "--capture-video")
    assert (code, out, len(err)) == (2, [], 1) and list(tmp_path.iterdir()) == []
    assert f"cannot render test_user_inputs:{name}" in err[0]
    assert "which is no uint8 [H, W, 3]" in err[0]


def test_films_play_in_a_browser_and_are_those_of_the_last_evaluation(run, main, tmp_path):
    import imageio_ffmpeg

    assert run("Good", "--capture-video").code == 0
    films = sorted((tmp_path / "run/videos").iterdir())
    assert len(films) == 2
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(films[0])], capture_output=True, text=True
    ).stderr
    assert "yuv420p" in said and " 96x62" in said
    assert main("--evaluate", "run", "--eval-episodes", 1, "--capture-video").code == 0
    assert len(list((tmp_path / "run/videos").iterdir())) == 1


def test_a_film_prints_no_word_of_error(finished, process, tmp_path):
    """pygame complains of a missing screen, unless it is told that none is needed."""
    shutil.copytree(finished, tmp_path / "run")
    unset = {"XDG_RUNTIME_DIR": None, "SDL_VIDEODRIVER": None}
    film = ["--evaluate", "run", "--eval-episodes", 1, "--capture-video"]
    code, _, err = process(*film, **unset)
    assert code == 0 and not any("error" in line for line in err)
    assert len(list((tmp_path / "run/videos").iterdir())) == 1


# ------------------------------------------------------------------------- 7. SMALL THINGS
def test_a_tilde_is_the_home_folder(script, run, main, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("Good", "--run-dir=~/mine").code == 0
    assert main("--resume=~/mine").code == 0
    assert main("--evaluate=~/mine").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    script.load_policy("~/mine")


def test_flags_in_python_may_be_numpy_numbers_and_paths_but_no_words(script, kind, tmp_path):
    suffix = "Box" if kind["continuous"] else "Discrete"
    args = script.parse_args(["--env-id", f"test_user_inputs:Good{suffix}-v0", *TINY.split()])
    odd = {"seed": np.int64(5), "gamma": np.float32(0.5), "anneal_lr": np.bool_(False)}
    script.train(replace(args, run_dir=tmp_path / "run", **odd))
    flags = json.loads((tmp_path / "run/config.json").read_text())["args"]
    assert (flags["seed"], flags["gamma"], flags["anneal_lr"]) == (5, 0.5, False)
    for name, wrong in {"anneal_lr": "False", "num_envs": 2.0, "seed": "3", "gamma": None}.items():
        with pytest.raises(script.UserError, match=f"{name} must be .*, not {wrong!r}"):
            script.train(replace(args, run_dir=str(tmp_path / "never"), **{name: wrong}))
    assert not (tmp_path / "never").exists()


def test_two_runs_that_begin_in_one_second_have_two_folders(script, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    suffix = "Box" if kind["continuous"] else "Discrete"
    args = script.parse_args(["--env-id", f"test_user_inputs:Good{suffix}-v0", *TINY.split()])
    for _ in range(2):
        script.train(args)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_an_interrupted_train_leaves_torchs_threads_as_they_were(script, kind, monkeypatch):
    def interrupt(*_):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "begin", interrupt)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        suffix = "Box" if kind["continuous"] else "Discrete"
        with pytest.raises(KeyboardInterrupt):
            script.train(script.Args(env_id=f"test_user_inputs:Good{suffix}-v0", compile=False))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
