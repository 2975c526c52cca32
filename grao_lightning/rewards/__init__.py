"""Reward functions and the protocol they are called by."""
