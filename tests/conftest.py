"""Shared by the tests: main() in this process or its own, a finished run, odd environments.

The environments are registered on import: --env-id conftest:Name-v0 finds them in any process.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_cartpole

TESTS = Path(__file__).parent
SCRIPT = Path(ppo_cartpole.__file__)
TINY = "--total-timesteps 256 --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1"
TINY += " --eval-episodes 2"
LIMIT = 300  # seconds: against hanging alone, since other tests keep the cores busy


def pytest_configure():
    """Tests run side by side: their threads are few, and do not keep a core busy while they wait.

    The test processes are started later, and what they start inherits this.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)  # as in main() of the scripts


@pytest.fixture(autouse=True)
def same_numbers():
    """A test without a seed of its own draws the same numbers, whatever ran before it."""
    ppo_cartpole.seed_globals(0)


def rounding(terms: int, largest, dtype: torch.dtype = torch.float32) -> float:
    """How far apart a sum of so many terms may come out on two processors.

    Each of them adds in an order of its own, as do two batch sizes on one of them. An addition is
    off by half a unit in the last place, eps / 2 of the sum so far, which is at most `largest`. Two
    orders of `terms` additions differ by no more than terms * eps * largest.
    """
    return terms * torch.finfo(dtype).eps * torch.as_tensor(largest).item()


def spy_on_restarts(patch: pytest.MonkeyPatch, script) -> list:
    """The seeds on which environments of a script begin from now on."""
    seeds, restart = [], script.Actors.restart

    def watched(actors, seed):
        seeds.append(seed)
        restart(actors, seed)

    patch.setattr(script.Actors, "restart", watched)
    return seeds


def spoil_updates(patch: pytest.MonkeyPatch, script, bias_of) -> None:
    """From now on every update() of a script leaves a NaN in a weight: bias_of(agent)[0]."""
    update = script.update

    def spoiled(agent, **rest):
        losses = update(agent=agent, **rest)
        with torch.no_grad():
            bias_of(agent)[0] = float("nan")
        return losses

    patch.setattr(script, "update", spoiled)


def weights_of(agent: torch.nn.Module) -> torch.Tensor:
    """All of them, one vector: a copy, which does not change when they do."""
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


@contextlib.contextmanager
def locked_elsewhere(path: Path, text: str = ""):
    """Another process holds the lock of a file inside, and adds `text` to it at the end."""
    hold = f"import fcntl; file = open({str(path)!r}, 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
    hold += f"print(flush=True); input(); file.write({text!r})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as holder:
        holder.stdout.readline()
        yield
        holder.communicate(b"\n")
    assert holder.returncode == 0


class Outcome(NamedTuple):
    code: int
    out: list[str]  # lines of stdout
    err: list[str]  # lines of stderr


@pytest.fixture
def script():
    """Whose main() the fixture below runs. Tests of another script have a fixture of their own."""
    return ppo_cartpole


@pytest.fixture
def main(script, monkeypatch, capsys, tmp_path):
    """main() with these arguments in this process, in the empty folder of the test."""
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *(text.splitlines() for text in capsys.readouterr()))

    return run


def environment(**changes: str | None) -> dict:
    """This process's environment, and this folder importable. None takes a variable away."""
    changes = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(TESTS)])} | changes
    return {name: value for name, value in (os.environ | changes).items() if value is not None}


@pytest.fixture
def process(tmp_path):
    """The same in a process of its own, with an empty stdin."""

    def run(*argv, **changes) -> Outcome:
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, argv)],
            cwd=tmp_path,
            env=environment(**changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return Outcome(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run; look, do not touch."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ppo_cartpole.train(ppo_cartpole.parse_args([*TINY.split(), "--run-dir", str(path)]))
    return path


class Lever(gym.Env):
    """Three levers, numbered from 1; the highest pays 1.

    An episode ends after 5 steps: every third one by termination, the others by truncation.
    """

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gym.spaces.Discrete(3, start=1)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.episode += 1
        return self.np_random.uniform(-1, 1, 3), {}

    def step(self, action):
        if not self.action_space.contains(int(action)):
            raise ValueError(f"there is no lever {action}")
        self.count += 1
        ended = self.count == 5
        terminated = ended and self.episode % 3 == 0
        obs = self.np_random.uniform(-1, 1, 3)
        return obs, float(action == 3), terminated, ended and not terminated, {}


class Blind(Lever):
    """Says that it can be rendered, and cannot."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def render(self):
        return None


class Poison(gym.Env):
    """Never ends by itself. From its `after`-th step on, it poisons what `where` names.

    Steps are counted over all copies.
    """

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)
    steps = 0  # of all copies; a test starts it from 0

    def __init__(self, where: str, value: float, after: int):
        self.poison = {where: value}
        self.after = after

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        Poison.steps += 1
        poison = self.poison if Poison.steps >= self.after else {}
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        obs[0] = poison.get("obs", obs[0])
        return obs, poison.get("rewards", 1.0), False, False, {}


class Still(gym.Env):
    """Does nothing, in whatever spaces it is given."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space = observation_space
        self.action_space = action_space


class Broken(gym.Env):
    def __init__(self):
        raise RuntimeError("the simulator's licence\nhas run out")


VECTOR = gym.spaces.Box(-1, 1, (2,))
TWO = gym.spaces.Discrete(2)
for name, obs_space, action_space in (
    ("Image", gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), TWO),
    ("Dict", gym.spaces.Dict({"position": VECTOR}), TWO),
    ("ManyActions", VECTOR, gym.spaces.MultiDiscrete([2, 3])),
):
    kwargs = {"observation_space": obs_space, "action_space": action_space}
    gym.register(f"{name}-v0", Still, kwargs=kwargs, max_episode_steps=10)
# one step more than the run takes until then: make_envs() takes it, to see what it gives
for where, value, after in (("obs", np.nan, 258), ("obs", np.inf, 259), ("rewards", np.nan, 321)):
    kwargs = {"where": where, "value": value, "after": after}
    gym.register(f"Poison-{where}-{value}-v0", Poison, kwargs=kwargs, max_episode_steps=1000)
gym.register("Lever-v0", Lever, max_episode_steps=100)
gym.register("Blind-v0", Blind, max_episode_steps=100)
gym.register("Broken-v0", Broken)
