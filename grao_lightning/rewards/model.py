"""A reward from any Hugging Face sequence classification model."""

import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from grao_lightning.faults import UserError

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


class RewardModel:
    """Scores completions by a sequence classification model, such as `RewardModule` trains.

    The unit is log-odds, higher = better. A model of one label gives its logit: only differences
    carry meaning, sigmoid(score(a) - score(b)) being the probability that a is preferred to b. Of
    several labels ``label`` names the one that counts, and its score is the log-odds of that label
    against all others (``logit - logsumexp(other logits)``; in a multi-label model the logit
    itself), so that the scores of helpful/unhelpful or toxic/clean are on one scale too.

    A completion is read as the assistant's turn after its prompt: through the tokenizer's chat
    template where there is one, else as Anthropic HH's text; by encoders as a pair of texts. A
    completion is read as ended, also where the length limit cut it off. Where prompt and completion
    are longer than ``max_tokens``, the prompt loses its oldest turns, then the start of its last
    one; a completion is never cut: one that has no room by itself has no score (missing).

    A completion's score does not depend on the others, to about 1e-6: the last token is known by
    the lengths, never looked for by its id. In lower precision than float32 every row is read by
    itself, or rounding would depend on its neighbours. Where the model allows it, completions of
    one prompt read it once.

    Construction is cheap; the model is loaded at the first call, once a process.

    Args:
        model: Hub name, folder (of ``grao export``, for example), or ``.gguf`` file with a score
            head.
        label: Name or number of the label that counts; needed where there are several.
        batch_tokens: Most tokens of a forward pass, padding included.
        max_tokens: Most tokens of prompt and completion together; null = the model's positions.
        max_prompt_tokens: Most tokens of the prompt, as ``data.max_prompt_tokens`` of the run that
            trained the model; null = no bound of its own.
        device: "auto" (this process's CUDA device where there is one, else the CPU), or a name such
            as "cuda:1".
        dtype: float32, bfloat16 or float16.
        chat_template: Jinja text instead of the tokenizer's own template.
        plain_text: Leave the tokenizer's template aside: prompts are read as the texts they are.

    Raises:
        ValueError: An argument breaks its rule.
    """

    unit = "log-odds"
    range = None
    pairwise = False

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        batch_tokens: int = 8192,
        max_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        device: str = "auto",
        dtype: Dtype = "float32",
        chat_template: str | None = None,
        plain_text: bool = False,
    ) -> None:
        from grao_lightning.language_model.loading import source_fault

        fault = source_fault("model", model)
        if fault:
            raise ValueError(fault)
        for name, value in (
            ("batch_tokens", batch_tokens),
            ("max_tokens", max_tokens),
            ("max_prompt_tokens", max_prompt_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}; got {dtype!r}")
        if plain_text and chat_template is not None:
            raise ValueError("chat_template must be null where plain_text is true; remove one")
        self.source = model
        self.label = label
        self.batch_tokens = batch_tokens
        self.max_tokens = max_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.device = device
        self.dtype = dtype
        self.chat_template = chat_template
        self.plain_text = plain_text
        self._loading = threading.Lock()
        self._model: Any = None
        self._encoder: Any = None
        self._number = 0
        self._most: int | None = None
        self._has_template = False
        self._warned = False
        labels = _labels_of_folder(model)
        if labels is not None:
            _number_of(label, labels, model)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **_: Any
    ) -> list[float | None]:
        """Return each completion's score in log-odds, None where it is too long to be read.

        Args:
            prompts: Texts, conversations written as "\\n\\nHuman: ...\\n\\nAssistant:".
            completions: What is scored.
            **_: The dataset's other columns, not used.

        Raises:
            UserError: The model cannot be loaded, or has no trained score head.
        """
        import torch

        from grao_lightning.language_model.scores import frozen_scores

        if len(prompts) != len(completions):
            raise ValueError(
                f"give one prompt a completion; got {len(prompts)} and {len(completions)}"
            )
        if not completions:
            return []
        self._load()
        rows = self._rows(prompts, completions)
        numbers = [number for number, row in enumerate(rows) if row is not None]
        kept = [row for row in rows if row is not None]
        scores: list[float | None] = [None] * len(rows)
        if not kept:
            return scores
        budget = self.batch_tokens if self.dtype == "float32" else 0
        # Autocast belongs to the policy's step, not to this model.
        with torch.autocast(self._model.device.type, enabled=False):
            logits = frozen_scores(self._model, kept, budget)
        for number, score in zip(numbers, self._by_label(logits).tolist(), strict=True):
            scores[number] = score
        return scores

    def _by_label(self, logits: Any) -> Any:
        """Return the scores [R] of logits [R, L]."""
        import torch

        own = logits[:, self._number]
        if logits.shape[1] == 1:
            return own
        if self._model.config.problem_type == "multi_label_classification":
            return own
        others = [number for number in range(logits.shape[1]) if number != self._number]
        return own - torch.logsumexp(logits[:, others], dim=1)

    def _rows(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Any]:
        """Return each prompt with its completion as a `TokenRow`, None where it has no room."""
        from grao_lightning.batch import TokenRow

        whole = {text: self._encoder.encode_prompt(self._as_turns(text)).ids for text in prompts}
        rows: list[Any] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            turns = self._as_turns(prompt)
            answer = self._encoder.encode_answer(completion, turns)
            ids = whole[prompt]
            if self._most is not None and len(ids) + len(answer) > self._most:
                ids = self._shortened(turns, self._most - len(answer))
            rows.append(None if ids is None else TokenRow(ids, answer))
        if None in rows and not self._warned:
            self._warned = True
            log.warning(
                "%s: a completion of more than %s tokens leaves no room for its prompt, and has no "
                "score; shorten completions or raise max_tokens, up to the model's positions",
                self.source,
                self._most,
            )
        return rows

    def _shortened(self, turns: Any, room: int) -> list[int] | None:
        """Return the newest part of a prompt that fits, None where not a token of it does."""
        try:
            ids: list[int] = self._encoder.encode_prompt(turns, max_tokens=room).ids
        except UserError:  # not even template and a character
            return None
        return ids if 0 < len(ids) <= room else None

    def _as_turns(self, prompt: str) -> Any:
        from grao_lightning.data.encoding import conversation_of

        if self.plain_text:
            return prompt
        turns = conversation_of(prompt)
        if isinstance(turns, str) and self._has_template:
            return [{"role": "user", "content": turns}]
        return turns

    def _load(self) -> None:
        """Load model and tokenizer; does nothing the second time."""
        with self._loading:
            if self._model is None:
                self._load_once()

    def _load_once(self) -> None:
        import torch

        from grao_lightning.data.text_pairs import encoder_for
        from grao_lightning.language_model.loading import (
            base_of,
            eos_ids,
            load_classifier,
            load_tokenizer,
        )
        from grao_lightning.language_model.scores import most_tokens, reading_of
        from grao_lightning.language_model.sharing import share_prompts

        setting = "scoring.rewards: model"
        tokenizer = load_tokenizer(setting, self.source)
        if self.plain_text:
            tokenizer.chat_template = None
        model, made_up = load_classifier(setting, self.source, dtype=getattr(torch, self.dtype))
        if made_up:
            raise UserError(
                f"{setting}: {self.source} has no trained score head ({', '.join(made_up)} would "
                "be random); name a reward model, or train one with configs/reward_smollm2.yaml "
                "and export it with grao export"
            )
        labels = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        self._number = _number_of(self.label, labels, self.source)
        self._has_template = bool(self.chat_template or tokenizer.chat_template)
        self._encoder = encoder_for(
            tokenizer,
            max_prompt_tokens=self.max_prompt_tokens,
            chat_template=self.chat_template,
            eos_ids=eos_ids(base_of(setting, self.source), tokenizer),
        )
        model.requires_grad_(False).eval()
        if reading_of(model) == "last token" and self.dtype == "float32":
            share_prompts(model, gives_tokens=False)
        bounds = [bound for bound in (self.max_tokens, most_tokens(model)) if bound is not None]
        self._most = min(bounds, default=None)
        self._model = model.to(self._device())

    def _device(self) -> str:
        import torch

        if self.device != "auto":
            return self.device
        if not torch.cuda.is_available():
            return "cpu"
        # Rewards are called in threads, where the current device is always the first.
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return f"cuda:{rank % torch.cuda.device_count()}"


def _labels_of_folder(source: str) -> list[str] | None:
    """Return the labels that a local folder's configuration names, None where it tells nothing."""
    path = Path(source).expanduser() / "config.json"
    if not path.is_file():
        return None
    names = json.loads(path.read_text(encoding="utf-8")).get("id2label")
    return [str(names[number]) for number in sorted(names, key=int)] if names else None


def _number_of(label: str | int | None, labels: Sequence[str], source: str) -> int:
    """Return the number of a label.

    Raises:
        UserError: It is none of the labels, or there are several and none is named.
    """
    known = ", ".join(f"{number}: {name}" for number, name in enumerate(labels))
    if label is None:
        if len(labels) == 1:
            return 0
        raise UserError(f"label must name one of the labels of {source}; got none of {known}")
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    if label in labels:
        return labels.index(str(label))
    raise UserError(f"label must be one of the labels of {source}, {known}; got {label!r}")
