"""``grao compare``: many runs of ``grao fit`` on the same prompts, and a report of them.

May never be imported by a run: it starts runs as processes and reads what they leave.
"""
