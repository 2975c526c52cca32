"""The work both contenders do: one model folder, prompts of a chosen length, how to sample."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grao_lightning.data.formats import parse_rows
from grao_lightning.data.turns import Message

# Text for prompts where no dialogues are given.
_FILLER = "What should I look for in the report you sent last week, and why does it matter? "
_FILLER_ANSWER = (
    " It matters, since everyone who reads it will act on the figures of its last page first."
)
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: Published shapes: of Qwen2.5's config.json. "tiny" rehearses the code.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


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
        device: "cpu" or "cuda".
        lora: Rank of adapters on all linear modules but the head; 0 = the weights are trained.
    """

    model: str
    rows: str
    num_prompts: int
    group_size: int
    max_new_tokens: int
    dtype: str
    device: str = "cpu"
    lora: int = 0

    def dumps(self) -> str:
        """Return the workload as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Workload":
        """Return the workload of `dumps`."""
        return cls(**json.loads(text))


def model_folder(source: str, folder: Path, *, layers: int | None) -> Path:
    """Save a model for the benchmark and return its folder.

    Args:
        source: Hub name, folder or ``.gguf`` file, with a chat template.
        folder: Written to.
        layers: Keep only the first so many, for curves; None = all.
    """
    from grao_lightning.language_model.loading import load_model, load_tokenizer

    model, tokenizer = load_model("--model", source), load_tokenizer("--model", source)
    if not tokenizer.chat_template:
        raise SystemExit("--model: its tokenizer has no chat template, which the prompts need")
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _end_with(folder, tokenizer.eos_token_id)
    return folder


def random_model_folder(shape: str, folder: Path) -> Path:
    """Save a model of random weights, with a tokenizer of bytes, and return its folder.

    A step's time and memory depend on a model's shape and not on what it has learned.

    Args:
        shape: One of `SHAPES`.
        folder: Written to.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    vocabulary = {token: number for number, token in enumerate([*alphabet, end])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    wrapped.chat_template = _TEMPLATE
    config = Qwen2Config(
        **SHAPES[shape],
        pad_token_id=wrapped.pad_token_id,
        eos_token_id=wrapped.eos_token_id,
        bos_token_id=None,
        dtype="bfloat16" if shape != "tiny" else "float32",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(config.dtype)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    _end_with(folder, wrapped.eos_token_id)
    return folder


def end_never(folder: Path, rows: Path, device: str = "cpu") -> None:
    """Make the least likely token the end-of-sequence, so that every completion is of full length.

    Least likely after any of the prompts' tokens; the caller checks the lengths afterwards.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        loader.from_pretrained(folder) for loader in (AutoModelForCausalLM, AutoTokenizer)
    )
    model.to(device)
    likeliest = torch.zeros(len(tokenizer), device=device)
    for line in rows.read_text().splitlines():
        prompt = _tokens(tokenizer, json.loads(line)["prompt"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt], device=device)).logits[0]
        seen = logits.float().softmax(-1).amax(0)[: len(tokenizer)]  # ids that are a token
        likeliest = torch.maximum(likeliest, seen)
    _end_with(folder, int(likeliest.argmin()))


def _end_with(folder: Path, token: int) -> None:
    """Set the end-of-sequence token in the three places that tell it."""
    from transformers import AutoTokenizer

    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": token}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    tokenizer.save_pretrained(folder)


def write_rows(
    file: Path, tokenizer: Any, dialogues: str | None, num_prompts: int, tokens: tuple[int, int]
) -> list[int]:
    """Write prompts with reference answers and return the prompts' lengths in tokens.

    Args:
        file: Written to.
        tokenizer: Counts tokens, those of its chat template included.
        dialogues: Anthropic HH file (JSONL, gzipped or not); None = filler text.
        num_prompts: How many.
        tokens: Fewest and most tokens of a prompt. Where ``most`` is above 256, dialogues are put
            behind one another until they have the fewest.
    """
    low, high = tokens
    joins = high > 256
    rows: list[dict[str, Any]] = []
    before: list[Message] = []
    for prompt, answer in _dialogues(dialogues):
        turns = before + prompt
        length = len(_tokens(tokenizer, turns))
        before = []
        if joins and length < low:
            before = [*turns, {"role": "assistant", "content": answer}]
        while joins and length > high and len(turns) > 2:
            turns = turns[2:]
            length = len(_tokens(tokenizer, turns))
        usual = dialogues is None or 16 <= len(tokenizer(answer)["input_ids"]) <= 64
        if low <= length <= high and usual:
            completion = [{"role": "assistant", "content": answer}]
            rows.append({"prompt": turns, "completion": completion})
        if len(rows) == num_prompts:
            break
    if len(rows) < num_prompts:
        raise SystemExit(f"--dialogues: found {len(rows)} of {num_prompts} prompts of {tokens}")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [len(_tokens(tokenizer, row["prompt"])) for row in rows]


def _tokens(tokenizer: Any, turns: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _dialogues(file: str | None) -> Iterator[tuple[list[Message], str]]:
    if file is None:
        for number in range(10_000):
            question = f"({number}) " + _FILLER * (1 + number % 60)
            yield [{"role": "user", "content": question}], _FILLER_ANSWER
        return
    opener: Any = gzip.open if file.endswith(".gz") else open
    with opener(file, "rt") as lines:
        examples, _ = parse_rows([json.loads(line) for line in lines])
    for example in examples:
        assert isinstance(example.prompt, list) and example.reference_answer
        yield example.prompt, example.reference_answer
