"""Reinforcement learning with GRPO: rollouts, rewards, advantages within groups, and the clipped policy update."""
