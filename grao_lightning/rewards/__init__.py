"""Reward functions and the protocol they are called by.

May never import Lightning's trainer side (callbacks, modules) nor what samples: texts come in.
"""
