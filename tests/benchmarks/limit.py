"""The least a step can take on this machine: its arithmetic at the speed of plain matrix products.

Counted is what the work itself asks for, of whichever program: every prompt read once for sampling
and once for training, every sampled token decoded and trained once, no padding, no recomputation,
no reference answer. Not counted: memory traffic, norms, activations, softmax, the optimiser.
"""

import time
from collections.abc import Sequence

import torch


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the operations a second of a square matrix product, the best of 8.

    Of 2048 rows on a CPU, of 8192 elsewhere.
    """
    size = 2048 if device == "cpu" else 8192
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        wait()
        started = time.perf_counter()
        left @ right
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def least_operations(model: str, prompts: Sequence[int], completions: Sequence[int]) -> float:
    """Return the least floating-point operations of one step.

    Args:
        model: Folder of a Llama-like causal model.
        prompts: Tokens of each of B prompts.
        completions: Tokens of each of B x G completions, prompt-major.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    of_head = 2 * network.get_output_embeddings().weight.numel()
    layers = [m for m in network.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    of_token = 2 * sum(layer.weight.numel() for layer in layers)
    depth = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_pair = 4 * config.num_hidden_layers * config.num_attention_heads * depth  # query with key

    group = len(completions) // len(prompts)
    owners = [length for length in prompts for _ in range(group)]
    # The last token of a completion is predicted and predicts nothing.
    decoded = sum(length - 1 for length in completions)
    pairs = sum(length * (length + 1) / 2 for length in prompts) + sum(
        (length - 1) * prompt + length * (length - 1) / 2
        for prompt, length in zip(owners, completions, strict=True)
    )
    forward = of_token * (sum(prompts) + decoded) + of_pair * pairs
    sampling = forward + of_head * (len(prompts) + decoded)
    training = 3 * forward + 3 * of_head * sum(completions)
    return sampling + training
