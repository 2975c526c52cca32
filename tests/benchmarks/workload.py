"""The work both contenders do: one model folder, prompts of a chosen length, how to sample."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TURN = "\n\nAssistant:"
# Text for prompts where no dialogues are given.
_FILLER = "What should I look for in the report you sent last week, and why does it matter? "
_FILLER_ANSWER = (
    " It matters, since everyone who reads it will act on the figures of its last page first."
)


@dataclass(frozen=True)
class Workload:
    """One step's work, repeated.

    Attributes:
        model: Folder of `model_folder`.
        rows: JSONL file of `write_rows`, one prompt with its reference answer a line.
        num_prompts: B, prompts of a step.
        group_size: G, completions a prompt.
        max_new_tokens: Longest completion.
        dtype: "fp32" or "bf16": of weights, gradients, optimiser state and arithmetic alike.
    """

    model: str
    rows: str
    num_prompts: int
    group_size: int
    max_new_tokens: int
    dtype: str

    def dumps(self) -> str:
        """Return the workload as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Workload":
        """Return the workload of `dumps`."""
        return cls(**json.loads(text))


def model_folder(source: str, folder: Path, *, layers: int | None, stops: bool) -> Path:
    """Save a model for the benchmark and return its folder.

    Args:
        source: Hub name, folder or ``.gguf`` file.
        folder: Written to.
        layers: Keep only the first so many, for curves; None = all.
        stops: Whether its end-of-sequence token ends a completion. Otherwise another special token
            takes its place. The model may still sample that one, so compare seconds per token.
    """
    from grao_lightning.models import load_model, load_tokenizer

    model, tokenizer = load_model("--model", source), load_tokenizer("--model", source)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    if not stops:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(_spare_token(tokenizer))
    elif not tokenizer.pad_token:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _spare_token(tokenizer: Any) -> int:
    special = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    if not special:
        raise SystemExit("--model: its tokenizer has no spare special token to stand for the end")
    return max(special)


def write_rows(
    file: Path, tokenizer: Any, dialogues: str | None, num_prompts: int, tokens: tuple[int, int]
) -> list[int]:
    """Write prompts with reference answers and return the prompts' lengths in tokens.

    Args:
        file: Written to.
        tokenizer: Counts tokens.
        dialogues: Anthropic HH file (JSONL, gzipped or not); None = filler text.
        num_prompts: How many.
        tokens: Fewest and most tokens of a prompt. Where a file has no dialogue that long, several
            stand behind one another.
    """
    low, high = tokens
    rows: list[dict[str, str]] = []
    before = ""
    for prompt, answer in _dialogues(dialogues):
        text = before + prompt
        ids = tokenizer(text)["input_ids"]
        if len(ids) < low:
            # Turns before a dialogue make a longer one; a single file rarely has 1024 tokens.
            before = text + answer if low > 256 else ""
            continue
        if len(ids) > high:
            if low <= 256 and dialogues:
                continue
            text = tokenizer.decode(ids[-high:])
        before = ""
        if 16 <= len(tokenizer(answer)["input_ids"]) <= 64:
            rows.append({"prompt": text, "completion": answer})
        if len(rows) == num_prompts:
            break
    if len(rows) < num_prompts:
        raise SystemExit(f"--dialogues: found {len(rows)} of {num_prompts} prompts of {tokens}")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]


def _dialogues(file: str | None) -> Iterator[tuple[str, str]]:
    if file is None:
        for number in range(10_000):
            prompt = f"\n\nHuman: ({number}) " + _FILLER * (1 + number % 60) + _TURN
            yield prompt, _FILLER_ANSWER
        return
    opener: Any = gzip.open if file.endswith(".gz") else open
    with opener(file, "rt") as lines:
        for line in lines:
            text = json.loads(line)["chosen"]
            end = text.rindex(_TURN) + len(_TURN)
            yield text[:end], text[end:]
