"""``grao judge-check``: how far scorers agree with people, and with one another.

May never be imported by a run, and never imports what trains.
"""
