"""Sampling completions from a causal language model.

May never import Lightning, data or rewards: prompts come as token ids, randomness as numbers.
"""
