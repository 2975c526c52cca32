"""The tree off CPU: flex_attention, uncompiled here, and part by part, against our CPU kernel."""

import random
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from grao_lightning.batch import TokenRow
from grao_lightning.language_model import masked
from grao_lightning.language_model.attention import TreeLayout
from grao_lightning.language_model.packing import Pack, pack_rows

CPU = torch.device("cpu")
#: (length of the prompt, lengths of its answers) of every segment; a branch is one shorter.
PACKS = {
    "one row": [(3, [5])],
    "one-token answers only": [(4, [1, 1])],
    "ragged": [(3, [5, 1, 2]), (1, [4, 4]), (7, [1]), (2, [3, 1, 9, 2])],
    "several blocks of 128": [(130, [40, 1, 200]), (5, [3]), (260, [30, 90, 7])],
}


def packed(segments: list[tuple[int, list[int]]]) -> Pack:
    """Return the pack of prompts that differ and of their answers, rows in turn between prompts."""
    rows = [
        (place, TokenRow([number] * length, [7] * answer))
        for number, (length, answers) in enumerate(segments)
        for place, answer in enumerate(answers)
    ]
    return pack_rows([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def drawn(pack: Pack, heads: int = 4, key_heads: int = 2, depth: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, number, len(pack.ids), depth) for number in (heads, key_heads, key_heads)]
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make flex_attention its own slow reference, which knows gradients on CPU too if let."""
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(masked, "_flex", lambda: module.flex_attention)
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
def test_the_mask_of_flex_attention_is_the_dense_mask_pair_by_pair(segments):
    from torch.nn.attention.flex_attention import create_mask

    pack = packed(segments).padded(masked.BLOCK)
    size = len(pack.ids)
    dense = create_mask(masked.sees(*pack.labels()), None, None, size, size, device="cpu")
    assert torch.equal(dense[0, 0], pack.mask())


def random_segments(seed: int) -> list[tuple[int, list[int]]]:
    """Return segments of all kinds: tiny ones, many in a block, and some over several blocks."""
    draw = random.Random(seed)
    scale = draw.choice([3, 40, 130, 300])
    return [
        (draw.randint(1, scale), [draw.randint(1, scale) for _ in range(draw.randint(1, 9))])
        for _ in range(draw.randint(1, 6))
    ]


@pytest.mark.parametrize("seeds", [range(n, n + 15) for n in range(0, 60, 15)])
def test_the_block_mask_made_from_segments_is_the_one_made_by_comparing_all_tokens(seeds):
    from torch.nn.attention.flex_attention import create_block_mask

    kinds = set()
    for seed in seeds:
        pack = packed(random_segments(seed)).padded(masked.BLOCK)
        size = len(pack.ids)
        expected = create_block_mask(
            masked.sees(*pack.labels()), None, None, size, size, device="cpu"
        )
        found = masked.block_mask(pack, CPU)
        assert found.seq_lengths == expected.seq_lengths == (size, size)
        for name in ("kv", "full_kv", "q", "full_q"):
            for part in (f"{name}_num_blocks", f"{name}_indices"):
                assert torch.equal(getattr(found, part), getattr(expected, part)), (seed, part)
        blocks = size // masked.BLOCK
        full, some = found.full_kv_num_blocks.sum(), found.kv_num_blocks.sum()
        kinds |= {"full"} if full else set()
        kinds |= {"none"} if full + some < blocks * (blocks + 1) / 2 else set()
    assert kinds == {"full", "none"}, "packs with blocks seen in full, in part and not at all"


def test_the_block_mask_of_a_long_pack_takes_no_time():
    """At 9,711 tokens at most 0.05 s, of which it needs a twentieth; comparing them takes 2 s."""
    pack = packed([(1024, [512] * 17)])
    assert len(pack.ids) == 9711
    pack, seconds = pack.padded(masked.BLOCK), []
    for _ in range(5):
        started = time.process_time()
        masked.block_mask(pack, CPU)
        seconds.append(time.process_time() - started)
    assert statistics.median(seconds) < 0.05


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("way", ["flex", "by parts"])
def test_both_ways_give_the_tree_and_its_gradients(segments, way, uncompiled, monkeypatch):
    pack = packed(segments)
    whole = pack.padded(masked.BLOCK)
    monkeypatch.setattr(masked, "flex_works", lambda *_: way == "flex")
    inputs = [part.requires_grad_() for part in drawn(whole)]
    mask = masked.tree_mask(whole, *inputs[:2])
    assert isinstance(mask, list) == (way == "by parts")
    size = len(pack.ids)
    results = []
    for attended in (
        TreeLayout(pack).attend(0, *(part[:, :, :size] for part in inputs), 0.3),
        masked.attend(*inputs, mask, 0.3)[:, :, :size],
    ):
        push = torch.linspace(-1, 1, attended.numel()).view_as(attended)
        results.append((attended, *torch.autograd.grad(attended, inputs, push)))
    torch.testing.assert_close(*results)
    assert not results[1][2][:, :, size:].any(), "nobody sees what a pack is padded with"


def test_part_by_part_nothing_is_masked_and_no_head_is_shared(monkeypatch):
    """Else scaled dot-product attention has no fused kernel, and forms all scores of a pack."""
    pack = packed([(700, [500, 400, 2]), (900, [300])]).padded(masked.BLOCK)
    monkeypatch.setattr(Pack, "mask", lambda self: pytest.fail("a dense mask was made"))
    asked, attention = [], F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        assert query.shape[:3] == key.shape[:3] == value.shape[:3]
        asked.append((options, len(query)))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    inputs = [part.to("meta") for part in drawn(pack)]
    assert TreeLayout(pack).attend(0, *inputs, 0.3).shape == inputs[0].shape
    assert [number for _, number in asked] == [3, 1, 1], "two prompts, and the padding"
    assert all(options == {"is_causal": True, "scale": 0.3} for options, _ in asked)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_trial_passes_where_flex_attention_is_right_and_fails_where_its_mask_is_not(
    uncompiled, monkeypatch
):
    sizes = (torch.float32, 4, 2, 8)
    masked.trial(CPU, *sizes)
    monkeypatch.setattr(masked, "sees", lambda *_: lambda batch, head, query, key: key <= query)
    with pytest.raises(AssertionError, match="not close"):
        masked.trial(CPU, *sizes)


def test_where_the_trial_fails_packs_go_part_by_part_and_the_log_says_why(monkeypatch, caplog):
    asked = []

    def trial(*arguments) -> None:
        asked.append(arguments)
        raise RuntimeError("head dimension too small\nand more")

    monkeypatch.setattr(masked, "trial", trial)
    masked.flex_works.cache_clear()
    sizes = (torch.float32, 4, 2, 8)
    assert [masked.flex_works(torch.device("cuda"), *sizes) for _ in range(2)] == [False, False]
    assert len(asked) == 1, "one trial for all layers and steps"
    assert caplog.text.count("flex_attention is not used") == 1
    assert "head dimension too small" in caplog.text and "and more" not in caplog.text
    assert not masked.flex_works(CPU, *sizes) and len(asked) == 1
    masked.flex_works.cache_clear()


def test_a_layout_makes_its_mask_once_for_all_layers(monkeypatch):
    pack = packed(PACKS["ragged"])
    made = []
    monkeypatch.setattr(masked, "tree_mask", lambda *_: made.append(1) or [])
    monkeypatch.setattr(masked, "attend", lambda query, *_: query)
    layout = TreeLayout(pack)
    inputs = [part.to("meta") for part in drawn(pack)]
    for layer in range(3):
        layout.attend(layer, *inputs, 0.3)
    assert len(made) == 1


@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
def test_gradients_in_half_precision_are_those_of_float32_but_for_rounding(segments):
    pack = packed(segments)
    exact = [part.bfloat16().float() for part in drawn(pack)]
    lowered = [part.bfloat16() for part in exact]
    gradients = []
    for parts in (exact, lowered):
        leaves = [part.detach().requires_grad_() for part in parts]
        output = TreeLayout(pack).attend(0, *leaves, 0.3)
        gradients.append(torch.autograd.grad((output.float() ** 2).sum(), leaves))
    for expected, found in zip(*gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.01 * expected.norm()
