"""Drawing tokens: the right distribution, and randomness that depends on its key alone."""

import pytest
import torch
from scipy import stats

from grao_lightning.sampling.draw import SamplingSettings, draw_tokens, row_uniforms

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -torch.inf, 0.0], dtype=torch.double)


def counts(settings: SamplingSettings, draws: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(draws, generator=generator, dtype=torch.double)
    tokens = draw_tokens(LOGITS.expand(draws, -1), uniforms, settings)
    return torch.bincount(tokens, minlength=len(LOGITS))


def settings(**options) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=1, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_tokens_follow_the_softmax_of_logits_over_temperature(temperature):
    drawn = counts(settings(temperature=temperature))
    expected = torch.softmax(LOGITS / temperature, dim=0) * drawn.sum()
    possible = expected > 0
    assert drawn[~possible].sum() == 0, "a token of probability 0 was drawn"
    assert stats.chisquare(drawn[possible], expected[possible]).pvalue > 0.001


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [-torch.inf, -5.0, -4.0]])
    uniforms = torch.tensor([0.999, 0.0], dtype=torch.double)
    assert draw_tokens(logits, uniforms, settings(temperature=0.0)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [0, 3]),
        # softmax: .513 .026 .114 .189 0 .070 ... : .513 < .6 keeps the second too, then .70 >= .6
        ({"top_p": 0.6}, [0, 3]),
        ({"top_p": 0.01}, [0]),
        ({"min_p": 0.2}, [0, 2, 3]),  # ratios to the best: e^-1.5 = .22, e^-1 = .37, e^-2 = .14
        ({"top_k": 3, "min_p": 0.3}, [0, 3]),
    ],
)
def test_truncation_keeps_the_tokens_it_should_in_their_proportions(options, kept):
    drawn = counts(settings(**options))
    assert drawn.nonzero()[:, 0].tolist() == kept
    if len(kept) > 1:
        expected = torch.softmax(LOGITS[kept], dim=0) * drawn.sum()
        assert stats.chisquare(drawn[kept], expected).pvalue > 0.001


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1.0 - 1e-17], dtype=torch.double)
    assert draw_tokens(logits, uniforms, settings()).tolist() == [1, 2]


def test_uniforms_are_a_function_of_their_key_alone():
    key = {"seed": 1, "stream": "train", "step": 2, "index": 3, "group_size": 4, "num_tokens": 5}
    assert torch.equal(row_uniforms(**key), row_uniforms(**key))
    for name, other in [("seed", 9), ("stream", "validation"), ("step", 9), ("index", 9)]:
        assert not torch.equal(row_uniforms(**key), row_uniforms(**{**key, name: other})), name
    assert len(row_uniforms(**key).unique()) == 20, "rows and tokens must not share numbers"


def test_half_precision_logits_are_drawn_from_in_full_precision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 300, generator=generator).bfloat16()
    uniforms = torch.rand(500, generator=generator, dtype=torch.double)
    drawn = draw_tokens(logits, uniforms, settings(temperature=0.7))
    assert torch.equal(drawn, draw_tokens(logits.double(), uniforms, settings(temperature=0.7)))


def test_a_vocabulary_of_several_blocks_is_drawn_from_as_by_one_cumulative_sum():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, 600, generator=generator)  # two whole blocks and a part
    logits[:1000, :256] = -torch.inf
    logits[1000:2000, 256:] = -torch.inf
    uniforms = torch.rand(5000, generator=generator, dtype=torch.double)
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
    expected = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1)
    assert torch.equal(draw_tokens(logits, uniforms, settings()), expected)
