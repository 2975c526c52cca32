"""How close a completion is to its reference answer in meaning, by an embedding model."""

import importlib.util
from pathlib import Path
from typing import Any

from grao_lightning.faults import Faults, UserError
from grao_lightning.rewards.against import AgainstReferenceAnswer

_FIX = "give a hub name (organisation/name) or a folder of a sentence-transformers model"


class EmbeddingSimilarity(AgainstReferenceAnswer):
    """Cosine of the embeddings of a completion and its reference answer, in [-1, 1].

    Source: sentence embeddings of arXiv 1908.10084. The default, all-MiniLM-L6-v2 (22 million
    parameters, English), reads the first 256 tokens of a text and no more.

    - The reference answer's own score is 1. Compared "pairwise" with it no completion can win:
      every other text loses, and GRAO only imitates. Compare "raw", or give it a small weight
      beside functions that can prefer a completion.
    - It measures the topic rather than the truth: "yes" and "no" to the same question are close,
      and a copy of the question is close to its answer.
    - An empty completion is scored as the model reads it: about 0.1 to any answer of Anthropic HH
      with the default model, as an unrelated text.

    The model is loaded at the first call. A text is embedded once a call however often it occurs,
    and its embedding depends on its neighbours in a batch by rounding alone (about 1e-7).

    Args:
        model: Hub name or folder of a sentence-transformers model.
        batch_size: Texts embedded at once, >= 1.
        device: Where the model runs, such as "cpu" or "cuda:0".

    Raises:
        ImportError: sentence-transformers is not installed.
        UserError: Arguments break their rules.
    """

    unit = "cosine"
    range = (-1.0, 1.0)

    def __init__(
        self,
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ImportError(
                "EmbeddingSimilarity needs sentence-transformers: pip install "
                "'grao-lightning[similarity]'"
            )
        faults = Faults()
        faults.add(_folder_fault(model))
        faults.at_least("batch_size", batch_size, 1)
        faults.raise_as_one()
        self.model, self.batch_size, self.device = model, batch_size, device
        self._encoder: Any = None

    def _compared(self, texts: list[str]) -> Any:
        """Return embeddings of length 1, [T, H] float64."""
        if self._encoder is None:
            self._encoder = self._load()
        return self._encoder.encode(
            texts,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        ).astype("float64")

    def _score(self, completion: Any, answer: Any) -> float:
        # A text against itself is 1 to the last bit, and no other is more, or rounding would decide
        # which of two equal texts wins.
        if completion is answer:
            return 1.0
        return float(min(1.0, max(-1.0, completion @ answer)))

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(str(Path(self.model).expanduser()), device=self.device)
        except (OSError, ValueError) as error:
            raise UserError(
                f"scoring.rewards: EmbeddingSimilarity cannot load model {self.model!r}: {error}; "
                f"{_FIX}"
            ) from error


def _folder_fault(model: str) -> str | None:
    """Return that a model is no folder though it reads like one; a hub name is not looked up."""
    path = Path(model).expanduser()
    is_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    return f"model: no such folder: {model}; {_FIX}" if is_path and not path.is_dir() else None
