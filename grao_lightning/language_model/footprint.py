"""How many bytes a training run needs, as plain arithmetic. Pure: no torch even.

Counted: what is there by design (weights, gradients, moments, a reference model, copies that casts
and the exchange of gradients make) and the tensors that a micro-batch keeps for its backward pass.
"""

from dataclasses import dataclass

#: precision -> bytes of a weight as it is kept, and as it is computed with
PRECISIONS = {
    "64-true": (8, 8),
    "32-true": (4, 4),
    "16-mixed": (4, 2),
    "bf16-mixed": (4, 2),
    "16-true": (2, 2),
    "bf16-true": (2, 2),
}
#: optimiser -> bytes of both moments of a weight; those of adamw have the weight's own type.
#: torchao keeps a float32 scale for every 256 (8 bits) or 128 (4 bits) numbers.
LOW_BIT_MOMENTS = {
    "adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_4bit": 2 * (1 / 2 + 4 / 128),
    "adamw_fp8": 2 * (1 + 4 / 256),
}
#: Of an nf4 weight: 4 bits, and for every 64 a scale of 8 bits with scales of its own.
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
#: Bytes of a token and vocabulary entry while the head is computed: logits, their gradient, masks.
HEAD = 14


@dataclass(frozen=True)
class ModelSize:
    """What a model's footprint depends on.

    Attributes:
        parameters: All of them; adapters are none.
        precise: Of these, kept in float32 in half precision.
        linear: Of these, in linear modules but the head: what 4-bit quantization reaches.
        head: Of the output head.
        largest_part: Most that are gathered together where weights are dealt out: of a layer, or
            of embeddings and head.
        layers: Number of layers.
        hidden: Size of a state.
        vocabulary: Number of tokens.
        cached: Numbers that sampling keeps of a token.
        kept: Bytes that a forward pass in half precision keeps of a token for its backward pass.
        kept_float32: The same in float32.
    """

    parameters: int
    precise: int
    linear: int
    head: int
    largest_part: int
    layers: int
    hidden: int
    vocabulary: int
    cached: int
    kept: float
    kept_float32: float


@dataclass(frozen=True)
class Run:
    """What else it depends on.

    Attributes:
        precision: Of Lightning's trainer.
        optimizer: "adamw" or one of `LOW_BIT_MOMENTS`.
        master_weights: Whether the optimiser keeps float32 copies.
        adapters: Parameters of adapters, which alone are trained then; None: all are trained.
        quantized: Whether frozen linear modules have 4 bits.
        micro_batch_tokens: Of a forward pass with its backward pass.
        checkpointing: Whether activations are computed again in the backward pass.
        offloaded: Whether activations wait in the host's memory.
        head_chunk: Tokens whose logits exist at the same time.
        ranks: All devices.
        shards: Devices that weights are dealt out over; 1: each has them whole.
        cpu_offload: Whether parts wait in the host's memory.
        cached_tokens: Of prompts and completions that are sampled at the same time.
        samples: Whether anything is sampled.
        packs: Whether it is sampled from packed weights, as on a CPU.
    """

    precision: str
    optimizer: str = "adamw"
    master_weights: bool = False
    adapters: int | None = None
    quantized: bool = False
    micro_batch_tokens: int = 8192
    checkpointing: bool = False
    offloaded: bool = False
    head_chunk: int = 128
    ranks: int = 1
    shards: int = 1
    cpu_offload: bool = False
    cached_tokens: int = 0
    samples: bool = True
    packs: bool = False

    @property
    def kept(self) -> int:
        """Return the bytes of a weight as it is kept."""
        return PRECISIONS[self.precision][0]

    @property
    def computed(self) -> int:
        """Return the bytes of a weight as it is computed with."""
        return PRECISIONS[self.precision][1]


def weights(size: ModelSize, run: Run, *, quantized: bool = False) -> float:
    """Return the bytes of a whole model's weights."""
    plain = size.parameters - size.precise - (size.linear if quantized else 0)
    few = size.linear * NF4 if quantized else 0.0
    return plain * run.kept + size.precise * max(run.kept, 4) + few


def trained(size: ModelSize, run: Run) -> tuple[int, int]:
    """Return how many parameters are trained, and how many of them are float32 in half precision.

    Adapters are float32, or wider.
    """
    if run.adapters is None:
        return size.parameters, size.precise
    return run.adapters, run.adapters


def gradients(size: ModelSize, run: Run) -> float:
    """Return the bytes of all gradients."""
    everyone, precise = trained(size, run)
    return (everyone - precise) * run.kept + precise * max(run.kept, 4)


def optimizer_state(size: ModelSize, run: Run) -> float:
    """Return the bytes of moments and master weights."""
    everyone, precise = trained(size, run)
    of_each = LOW_BIT_MOMENTS.get(run.optimizer)
    if run.master_weights:
        return everyone * (4 + (8 if of_each is None else of_each))
    if of_each is not None:
        return everyone * of_each
    return (everyone - precise) * 2 * run.kept + precise * 2 * max(run.kept, 4)


def copies(size: ModelSize, run: Run) -> float:
    """Return the bytes of copies on a device: casts, gradients underway, gathered parts."""
    if run.shards > 1:
        return 2 * size.largest_part * run.computed  # one is computed with, the next one underway
    cast = size.parameters * run.computed if run.computed < run.kept else 0.0
    if run.quantized:
        cast = size.largest_part * run.computed
    return cast + (gradients(size, run) if run.ranks > 1 else 0.0)


def activations(size: ModelSize, run: Run) -> float:
    """Return the bytes that one micro-batch keeps for its backward pass, and needs in it."""
    half = run.computed == 2
    of_token = size.kept if half else size.kept_float32 * run.computed / 4
    layer = of_token / size.layers
    if run.checkpointing:  # the input of each layer, and one layer at a time
        of_token = size.layers * size.hidden * run.computed + layer
    if run.offloaded:
        of_token = layer
    return run.micro_batch_tokens * (of_token + layer)  # gradients of a layer pass through


def head(size: ModelSize, run: Run) -> float:
    """Return the bytes of a chunk of logits, and of a float32 sum of the head's gradient."""
    chunk = min(run.head_chunk, run.micro_batch_tokens) * size.vocabulary * HEAD
    summed = run.adapters is None and (run.computed < 4 or run.shards > 1)
    return chunk + (size.head * 4 if summed else 0.0)


def cache(size: ModelSize, run: Run) -> float:
    """Return the bytes of keys and values while completions are sampled."""
    return size.cached * run.cached_tokens * run.computed if run.samples else 0.0


def packed(size: ModelSize, run: Run) -> float:
    """Return the bytes of packed weights."""
    if not run.packs or not run.samples:
        return 0.0
    linear = 0 if run.quantized else size.linear
    return (linear + size.head) * run.computed


def device(
    size: ModelSize, run: Run, reference_model: ModelSize | None
) -> tuple[dict[str, float], float]:
    """Return what one device holds, by name, and the most at one time.

    Sampling and the update take turns: the larger of both counts. Weights that are dealt out are
    gathered whole for sampling.

    Args:
        size: Of the trained model.
        run: What else counts.
        reference_model: Of a second, frozen model; None: there is none.
    """
    whole = weights(size, run, quantized=run.quantized)
    adapters = 0.0 if run.adapters is None else run.adapters * max(run.kept, 4)
    beside = 0.0 if reference_model is None else weights(reference_model, run)
    found = {
        "weights": (whole + adapters) / run.shards,
        "reference model": beside / run.shards,
        "gradients": gradients(size, run) / run.shards,
        "optimiser": optimizer_state(size, run) / run.shards,
        "copies": copies(size, run),
        "activations": activations(size, run),
        "head": head(size, run),
        "cache of sampling": cache(size, run),
        "gathered to sample": 0.0,
        "packed to sample": packed(size, run),
    }
    if run.cpu_offload:
        for name in ("weights", "reference model", "gradients", "optimiser"):
            found[name] = 0.0
    if run.shards > 1 and run.samples:
        found["gathered to sample"] = size.parameters * run.computed
    lasting = sum(found[name] for name in ("weights", "reference model", "optimiser"))
    update = sum(found[name] for name in ("gradients", "copies", "activations", "head"))
    sampling = sum(
        found[name] for name in ("cache of sampling", "gathered to sample", "packed to sample")
    )
    return found, lasting + max(update, sampling)


def host(size: ModelSize, run: Run, reference_model: ModelSize | None, ranks_here: int) -> float:
    """Return the most bytes of one host's memory, without those of the libraries.

    Models are read in float32 unless they are quantized or dealt out: whole by each rank, the
    reference model too.

    Args:
        size: Of the trained model.
        run: What else counts.
        reference_model: Of a second, frozen model; None: there is none.
        ranks_here: Ranks of one host.
    """
    models = [(size, run.quantized)] + ([(reference_model, False)] if reference_model else [])
    if run.shards == 1:
        each = sum(weights(m, run, quantized=True) if q else m.parameters * 4 for m, q in models)
        return ranks_here * each
    parts = sum(weights(model, run) for model, _ in models) / run.shards
    if run.cpu_offload:
        parts += (gradients(size, run) + optimizer_state(size, run)) / run.shards
    return ranks_here * parts


def checkpoint(size: ModelSize, run: Run) -> float:
    """Return the bytes of a checkpoint: what is trained, and the optimiser's state."""
    return gradients(size, run) + optimizer_state(size, run)
