"""The seed of the run."""

import os


def run_seed() -> int:
    """Return the seed that ``seed_everything`` set for this run, 0 where none was set.

    Lightning keeps it in the environment, which is how child processes of a strategy get it.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
