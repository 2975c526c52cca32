"""``grao judge-check``: how far scorers agree with people, and with one another."""
