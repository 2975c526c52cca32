"""Sampling completions from a causal language model."""
