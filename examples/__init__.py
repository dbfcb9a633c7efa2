"""Patches of ppo_cartpole.py, see docs/changing.md; and an environment that needs one of them.

python ppo_recurrent.py --env-id examples:PositionOnlyCartPole-v1
"""

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


class PositionOnlyCartPole(CartPoleEnv):
    """CartPole with the velocities hidden: one observation does not say where the pole is going.

    Observations are the positions of cart and pole, where +-1 ends the episode.
    """

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode=render_mode)
        self.bounds = np.array([self.x_threshold, self.theta_threshold_radians], np.float32)
        self.observation_space = gym.spaces.Box(-2.0, 2.0, (2,))  # an episode's last may be beyond

    def positions(self, obs: np.ndarray) -> np.ndarray:
        """The observation without 1 and 3, the velocities of cart and pole."""
        return obs[[0, 2]] / self.bounds

    def reset(self, **options) -> tuple:
        obs, info = super().reset(**options)
        return self.positions(obs), info

    def step(self, action: int) -> tuple:
        obs, *rest = super().step(action)
        return self.positions(obs), *rest


gym.register("PositionOnlyCartPole-v1", PositionOnlyCartPole, max_episode_steps=500)
