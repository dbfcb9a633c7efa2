"""Environments that isolate one piece of an actor-critic each (an idea of Andy L. Jones).

And one that counts.
"""

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """`length` steps an episode; reward(obs, action) at the last of them, 0 before."""

    def __init__(self, sees: bool, acts: bool, length: int):
        self.observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.sees = sees
        self.acts = acts
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        self.sign = self.np_random.choice([-1.0, 1.0]) if self.sees else 0.0
        return self.observe(), {}

    def observe(self):
        phase = self.step_count / self.length if self.length > 1 else 0.0
        return np.array([self.sign + phase], np.float32)

    def step(self, action):
        self.step_count += 1
        ended = self.step_count == self.length
        reward = 1.0 if ended else 0.0
        if self.acts and action == 0:
            reward = -reward
        if self.sees:
            reward *= self.sign
        return self.observe(), reward, ended, False, {}


class Counter(gym.Env):
    """Observes how many steps were taken since the reset, pays that number, never terminates."""

    observation_space = gym.spaces.Box(0, 1000, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.count += 1
        return np.array([self.count], np.float32), float(self.count), False, False, {}


for name, sees, acts, length in (
    ("Constant", False, False, 1),
    ("Sees", True, False, 1),
    ("Delayed", False, False, 2),
    ("Acts", False, True, 1),
    ("SeesAndActs", True, True, 1),
):
    kwargs = {"sees": sees, "acts": acts, "length": length}
    gym.register(f"Probe{name}-v0", entry_point=Probe, kwargs=kwargs)
gym.register("ProbeCounter-v0", entry_point=Counter, max_episode_steps=3)
