"""All that knows a Hugging Face model's inside: loading, packing, attention, head, log-probs.

May never import Lightning, nor what trains, samples or scores: it is handed token rows.
"""
