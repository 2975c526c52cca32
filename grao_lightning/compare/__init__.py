"""``grao compare``: many runs of ``grao fit`` on the same prompts, and a report of them."""
