"""Patches of ppo_cartpole.py, see docs/changing.md; and an environment that needs one of them.

python ppo_cartpole.py --env-id examples:PositionOnlyCartPole-v1
"""

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

POSITIONS = [0, 2]  # of cart and pole; 1 and 3 are their velocities


class PositionOnlyCartPole(CartPoleEnv):
    """CartPole with the velocities hidden: one observation does not say where the pole is going."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode=render_mode)
        full = self.observation_space
        self.observation_space = gym.spaces.Box(full.low[POSITIONS], full.high[POSITIONS])

    def reset(self, **options) -> tuple:
        obs, info = super().reset(**options)
        return obs[POSITIONS], info

    def step(self, action: int) -> tuple:
        obs, *rest = super().step(action)
        return obs[POSITIONS], *rest


gym.register("PositionOnlyCartPole-v1", PositionOnlyCartPole, max_episode_steps=500)
