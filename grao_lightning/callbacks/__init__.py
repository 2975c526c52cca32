"""Callbacks: one concern a file. Sampling, scoring and clipping fill the batch, in that order."""
