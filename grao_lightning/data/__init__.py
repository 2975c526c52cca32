"""Rows from any source -> prompts and answers in token ids, and the DataModule that deals them.

May never import what samples, scores or trains.
"""
