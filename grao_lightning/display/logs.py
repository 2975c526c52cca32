"""What the commands print of the many things that libraries log."""

import logging


def configure_logging() -> None:
    """Print our own notes plainly, and of other libraries what a user can do something about."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    advertisements = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertisements.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
