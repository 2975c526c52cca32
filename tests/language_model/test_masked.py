"""The tree as one mask: flex_attention, uncompiled on CPU, against the dense mask."""

import pytest
import torch

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

    pack = packed(segments)
    size = len(pack.ids)
    dense = create_mask(masked.sees(pack, CPU), None, None, size, size, device="cpu")
    assert torch.equal(dense[0, 0], pack.mask())


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
def test_flex_attention_dense_mask_and_tree_give_the_same(segments, uncompiled, monkeypatch):
    pack = packed(segments)
    inputs = drawn(pack)
    tree = TreeLayout(pack).attend(0, *inputs, 0.3)
    dense = masked.tree_mask(pack, *inputs[:2])
    monkeypatch.setattr(masked, "flex_works", lambda *_: True)
    blocks = masked.tree_mask(pack, *inputs[:2])
    assert isinstance(dense, torch.Tensor) and not isinstance(blocks, torch.Tensor)
    for mask in (dense, blocks):
        torch.testing.assert_close(masked.attend(*inputs, mask, 0.3), tree)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_trial_passes_where_flex_attention_is_right_and_fails_where_its_mask_is_not(
    uncompiled, monkeypatch
):
    sizes = (torch.float32, 4, 2, 8)
    masked.trial(CPU, *sizes)
    monkeypatch.setattr(masked, "sees", lambda *_: lambda batch, head, query, key: key <= query)
    with pytest.raises(AssertionError, match="not close"):
        masked.trial(CPU, *sizes)


def test_where_the_trial_fails_the_mask_is_dense_and_the_log_says_why(monkeypatch, caplog):
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
    monkeypatch.setattr(masked, "tree_mask", lambda *_: made.append(1) or pack.mask())
    monkeypatch.setattr(masked, "attend", lambda query, *_: query)
    layout = TreeLayout(pack)
    inputs = [part.to("meta") for part in drawn(pack)]
    for layer in range(3):
        layout.attend(layer, *inputs, 0.3)
    assert len(made) == 1
