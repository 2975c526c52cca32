"""Callbacks: one concern a file. Sampling, scoring and clipping fill the batch, in that order.

May never import a module (they are handed it by the trainer) nor a command.
"""
