"""The trials before prompts are shared: what they must see, and what they must not mind."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from grao_lightning.batch import TokenRow
from grao_lightning.faults import UserError
from grao_lightning.language_model.attention import SHARED, TreeLayout, register
from grao_lightning.language_model.head import head_of
from grao_lightning.language_model.logprobs import TokenLogprobs, token_logprobs
from grao_lightning.language_model.sharing import share_prompts, shares_prompts, tell_dropout
from tests.language_model.architectures import build
from tests.language_model.test_architectures import ROWS


def logprobs_alone(name: str, row: TokenRow, **options) -> Tensor:
    """Return what a model that has read nothing else says of a row."""
    model = build(name, **options)
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0]


def computed_by(model, rows) -> TokenLogprobs:
    with torch.no_grad():
        return token_logprobs(model, rows)


# -- the trial of attention ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stablelm", "nemotron"])
def test_ids_that_training_never_saw_hide_nothing_from_the_trial(name):
    model = build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[:10] = 0
    assert not share_prompts(model)


def test_small_states_hide_nothing_from_the_trial():
    model = build("stablelm")
    with torch.no_grad():
        for parameter in model.model.norm.parameters():
            parameter.mul_(1e-4)
        model.lm_head.weight.mul_(1e4)  # the same function
    assert not share_prompts(model)


@pytest.mark.parametrize("size", [4, 9])
def test_a_small_vocabulary_is_tried_as_well(size):
    assert share_prompts(build("llama", vocab_size=size))


def test_a_layer_that_does_not_ask_our_attention_is_seen(caplog):
    model = build("llama")
    last = model.model.layers[1].self_attn
    last.forward = lambda hidden_states, **_: (hidden_states, None)
    assert not share_prompts(model)
    assert "not all of its 2 layers ask our attention" in caplog.text


def test_a_layer_of_another_kind_that_does_not_ask_is_seen(caplog):
    class Silent(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    model = build("llama")
    model.model.layers[1].self_attn = Silent()
    assert not share_prompts(model)
    assert "not all of its 2 layers ask our attention" in caplog.text


def test_a_layer_that_does_not_ask_is_seen_where_others_ask_several_times(caplog):
    model = build("hrm_text")
    kind = type(next(m for m in model.modules() if type(m).__name__.endswith("Attention")))
    attentions = [part for part in model.modules() if type(part) is kind]
    attentions[-1].forward = lambda hidden_states, **_: (hidden_states, None)
    model.config.num_hidden_layers = len(attentions)  # each is run four times
    assert not share_prompts(model)
    assert "not all of its" in caplog.text


def test_single_rows_are_read_with_the_attention_that_was_there_before(caplog):
    model = build("llama")
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(*arguments, **options):
        output, weights = own(*arguments, **options)
        return output * (2 if attention.config._attn_implementation == "sdpa" else 1), weights

    attention.forward = forward
    assert not share_prompts(model)
    assert "its states differ from those of single rows" in caplog.text


def test_a_mask_of_a_layer_of_its_own_is_seen_while_it_masks_nothing_more(caplog):
    """Doge learns its mask; ours is not read."""
    model = build("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(hidden_states, **options):
        size = hidden_states.shape[1]
        options["attention_mask"] = torch.full((1, 1, size, size), -torch.inf).triu(1)
        return own(hidden_states, **options)

    attention.forward = forward
    assert not share_prompts(model)
    assert "its layers attend by a mask of their own" in caplog.text


@pytest.mark.parametrize("error", [IndexError, AssertionError, ZeroDivisionError])
@pytest.mark.parametrize("where", ["attention", "switch", "after the switch"])
def test_whatever_fails_in_the_trial_the_models_own_attention_is_put_back(
    error, where, monkeypatch, caplog
):
    model = build("llama")
    switch = model.set_attn_implementation

    def fail(*arguments) -> None:
        if where == "after the switch" and not shares_prompts(model):
            switch(*arguments)
        raise error("said no")

    if where == "attention":
        monkeypatch.setattr(TreeLayout, "attend", fail)
    else:
        monkeypatch.setattr(model, "set_attn_implementation", fail, raising=False)
    assert not share_prompts(model)
    assert model.config._attn_implementation == "sdpa"
    assert f"{error.__name__}: said no" in caplog.text


def test_every_module_keeps_its_own_mode_in_a_trial():
    model = build("llama").train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    share_prompts(model)
    assert [part.training for part in model.modules()] == before


def test_the_trial_leaves_random_numbers_as_they_are():
    model = build("llama")
    before = torch.get_rng_state()
    share_prompts(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mixtral", "gpt2", "deepseek_v3"])
def test_rounding_of_bfloat16_is_not_taken_for_disagreement(name):
    assert share_prompts(build(name).bfloat16())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mixtral", "gpt2", "deepseek_v3"])
def test_rows_of_a_pack_that_see_each_other_are_not_taken_for_rounding(name, monkeypatch, caplog):
    def blind(self, layer, query, key, value, scale):
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale
        )

    monkeypatch.setattr(TreeLayout, "attend", blind)
    assert not share_prompts(build(name).bfloat16())
    assert "its states differ" in caplog.text


def test_our_attention_takes_its_mask_by_keyword():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register()
    states = torch.randn(1, 2, 3, 4)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=False)
    output, _ = ALL_ATTENTION_FUNCTIONS[SHARED](
        module, states, states, states, attention_mask=None, scaling=0.5
    )
    expected = nn.functional.scaled_dot_product_attention(
        states, states, states, is_causal=True, scale=0.5
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_layers_that_count_the_tokens_of_a_pass_get_no_pack_however_late_it_matters(caplog):
    """Llama4's temperature of attention: from token 8192 on, here from 100 on, which no row has."""
    name, options = "llama4_text, full layers", {"no_rope_layers": [1, 0], "attn_scale": 1.0}
    model, rows = build(name, floor_scale=100, **options), rows_of([(40, 9)] * 6)
    assert not share_prompts(model)
    for row, found in zip(rows, computed_by(model, rows).by_row(), strict=True):
        expected = logprobs_alone(name, row, floor_scale=100, **options)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "its layers count positions themselves (attn_temperature_tuning)" in caplog.text
    assert share_prompts(build(name, no_rope_layers=[1, 1]))


# -- what is dropped is told -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("gpt2", "attn_pdrop"),
        ("biogpt", "attention_probs_dropout_prob"),
        ("llama", "attention_dropout"),
        ("opt", "attention_dropout"),
    ],
)
def test_dropout_of_attention_is_refused_under_each_of_its_names(name, setting, caplog):
    assert not share_prompts(build(name, **{setting: 0.1}))
    assert f"it drops out attention ({setting}=0.1" in caplog.text


def test_dropout_of_attention_that_no_setting_tells_of_is_seen(caplog):
    model = build("llama")
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert not share_prompts(model)
    assert "it drops out attention (0.1)" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gpt2", {"resid_pdrop": 0.1}, "transformer.h.0.attn.resid_dropout: 0.1 and 3 more"),
        ("opt", {"dropout": 0.1}, "its logits change"),
        ("phimoe", {"input_jitter_noise": 0.1}, "its logits change"),
        ("llama", {"attention_dropout": 0.1}, "its logits change"),
        ("llama", {}, None),
        ("llama, dynamic NTK", {}, None),
        ("qwen3_moe", {}, None),
    ],
)
def test_whatever_makes_another_model_of_a_policy_in_training_is_said(name, options, said, caplog):
    model, before = build(name, **options), torch.get_rng_state()
    tell_dropout(model)
    assert ("drops out in training" in caplog.text) == (said is not None)
    assert (said or "") in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in model.modules())


def test_dropout_of_an_adapter_that_is_still_zero_is_said(caplog):
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head, nn.Dropout(0.0))
    tell_dropout(model)
    assert not caplog.text
    model.adapter = nn.Dropout(0.05)
    tell_dropout(model)
    assert "drops out in training (adapter: 0.05 and 0 more modules)" in caplog.text


@pytest.mark.parametrize("window", [8, 4096])
def test_a_window_whose_family_ignores_use_sliding_window_is_refused(window, caplog):
    model = build("mistral", sliding_window=window, use_sliding_window=False)
    assert not share_prompts(model)
    assert "it attends in a sliding window" in caplog.text


@pytest.mark.parametrize("window", [8, 4096])
@pytest.mark.parametrize("name", ["mistral", "olmo3"])
def test_windows_of_any_size_are_seen_that_no_setting_tells_of(name, window, monkeypatch, caplog):
    monkeypatch.setattr("grao_lightning.language_model.sharing.obstacle", lambda model: None)
    assert not share_prompts(build(name, sliding_window=window))
    assert ("it attends in a sliding window" if window > 8 else "since it") in caplog.text


def test_chunks_are_seen_by_their_mask_alone(monkeypatch, caplog):
    """Llama4's layers do not say that they attend in chunks, here longer ones than the trial."""
    monkeypatch.setattr("grao_lightning.language_model.sharing.obstacle", lambda model: None)
    assert not share_prompts(build("llama4_text", attention_chunk_size=4096))
    assert "it attends in a sliding window" in caplog.text


def test_scores_of_attention_that_are_capped_are_refused(caplog):
    full = ["full_attention"] * 2
    assert not share_prompts(build("gemma2", layer_types=full))
    assert "it caps its attention scores" in caplog.text
    assert share_prompts(build("gemma2", layer_types=full, attn_logit_softcapping=None))


def test_layers_that_are_all_full_may_have_a_window_in_their_configuration():
    full = ["full_attention"] * 2
    assert share_prompts(build("olmo3", layer_types=full, sliding_window=8))


# -- the head --------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """An adapter on a linear map, without effect at first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + self.up(self.down(states))


@pytest.mark.parametrize("looked_at_before", [False, True])
def test_an_adapter_on_the_head_gets_gradients_and_is_heeded(looked_at_before):
    model = build("llama")
    if looked_at_before:
        assert share_prompts(model) and head_of(model) is not None
    model.lm_head = Adapted(model.lm_head)
    assert not share_prompts(model)
    token_logprobs(model, ROWS, weigh=lambda part, logprobs: logprobs.exp()).loss.backward()
    assert model.lm_head.up.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.lm_head.up.weight.normal_()
    row = ROWS[0]
    logits = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits
    expected = logits.log_softmax(-1)[0, len(row.prompt_ids) - 1 : -1].gather(
        1, torch.tensor(row.answer_ids)[:, None]
    )
    torch.testing.assert_close(computed_by(model, [row]).flat, expected[:, 0].detach())


def test_a_hook_on_the_head_is_heeded():
    model = build("llama")
    assert head_of(model) is not None
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert head_of(model) is None
    handle.remove()
    assert head_of(model) is not None


def test_a_forward_pass_that_is_given_to_the_head_is_heeded():
    model = build("llama")
    assert head_of(model) is not None
    own = model.lm_head.forward
    model.lm_head.forward = lambda states: 2 * own(states)
    assert head_of(model) is None


def test_a_hook_on_the_model_is_heeded_that_came_after_the_trial():
    model = build("llama")
    assert head_of(model) is not None

    def double(module, inputs, output):
        output.logits = 2 * output.logits
        return output

    handle = model.register_forward_hook(double)
    assert head_of(model) is None
    handle.remove()
    assert head_of(model) is not None


def test_a_forward_pass_that_is_given_to_the_model_after_the_trial_is_heeded():
    model = build("llama")
    assert head_of(model) is not None
    own = model.forward

    def forward(*arguments, **options):
        output = own(*arguments, **options)
        output.logits = 2 * output.logits
        return output

    model.forward = forward
    assert head_of(model) is None


def test_a_cap_that_is_taken_off_after_the_trial_is_gone():
    model = build("gemma2", final_logit_softcapping=2.0)
    assert head_of(model).cap == 2.0
    model.config.final_logit_softcapping = None
    assert head_of(model).cap is None


def with_logits(model, change) -> None:
    """Let a model change its logits in its own forward pass: change(model, logits)."""
    kind = type(model)

    class Changed(kind):
        def forward(self, *arguments, **options):
            output = kind.forward(self, *arguments, **options)
            output.logits = change(self, output.logits)
            return output

    model.__class__ = Changed


def test_a_scale_that_is_learned_is_heeded_though_it_is_one_at_first():
    model = build("llama")
    model.scale = nn.Parameter(torch.ones(()))
    with_logits(model, lambda model, logits: logits * model.scale)
    assert head_of(model) is None
    token_logprobs(model, ROWS, weigh=lambda part, logprobs: logprobs.exp()).loss.backward()
    assert model.scale.grad.abs() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_logits_do_not_reach_yet_is_heeded(dtype):
    model = build("llama", std=0.02).to(dtype)
    with_logits(model, lambda model, logits: 30 * torch.tanh(logits / 30))
    assert head_of(model) is None
    known = head_of(build("recurrent_gemma", std=0.02, logits_soft_cap=30.0))
    assert known is not None and known.cap == 30.0


@pytest.mark.parametrize("name", ["cohere", "cohere, logit scale", "granite", "gemma2", "minicpm3"])
def test_known_factors_of_logits_stay_fast(name):
    assert head_of(build(name)) is not None


# -- frequencies and positions ---------------------------------------------------------------------

LENGTHS = [(5, 6), (20, 4), (20, 5), (20, 6), (30, 10), (16, 1), (15, 1), (18, 9)]


def rows_of(lengths) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 117, (length,), generator=generator).tolist()

    return [TokenRow(ids(prompt), ids(answer)) for prompt, answer in lengths]


@pytest.mark.parametrize(
    "name", ["phi3, longrope", "phi3, longrope and window", "llama, dynamic NTK"]
)
def test_rows_just_above_and_below_the_threshold_are_read_as_by_themselves(name):
    """Thresholds are 24 and 16 tokens; each row stands beside all others, and by itself."""
    model, rows = build(name), rows_of(LENGTHS)
    share_prompts(model)
    together = computed_by(model, rows).by_row()
    for row, found in zip(rows, together, strict=True):
        expected = logprobs_alone(name, row)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(computed_by(model, [row]).flat, expected, atol=1e-4, rtol=0)


def test_a_longer_text_read_before_leaves_no_frequencies_behind():
    name = "llama, dynamic NTK"
    model, (longer, shorter) = build(name), rows_of([(30, 10), (20, 5)])
    share_prompts(model)
    computed_by(model, [longer])
    found = computed_by(model, [shorter]).flat
    torch.testing.assert_close(found, logprobs_alone(name, shorter), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_pack_may_be_longer_than_the_positions_and_a_row_may_not(shared):
    model = build("gpt2, positions of 64")
    assert not shared or share_prompts(model)
    computed_by(model, rows_of([(60, 4), (50, 3)]))
    with pytest.raises(UserError, match="65 tokens, and GPT2LMHeadModel has positions for 64"):
        computed_by(model, rows_of([(60, 5)]))


def test_a_row_longer_than_rotary_positions_is_read_and_said_once(caplog):
    model = build("llama", max_position_embeddings=16)
    rows = rows_of([(20, 5)])
    found = computed_by(model, rows).flat
    computed_by(model, rows)
    assert caplog.text.count("more than the 16") == 1
    expected = logprobs_alone("llama", rows[0], max_position_embeddings=16)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_model_that_selects_keys_gets_its_rows_one_by_one(caplog):
    model = build("llama")
    model.config.index_topk = 4
    computed_by(model, ROWS)
    assert "reads rows one by one, since it selects keys" in caplog.text


def test_a_model_that_reads_padding_gets_its_rows_one_by_one(caplog):
    name = "xlm"  # it counts padding tokens, wherever they stand
    model = build(name)
    for row, found in zip(ROWS, computed_by(model, ROWS).by_row(), strict=True):
        torch.testing.assert_close(found, logprobs_alone(name, row), atol=1e-4, rtol=0)
    assert "reads rows one by one" in caplog.text
    assert not shares_prompts(model)


def test_a_long_row_is_told_of_and_the_rows_of_a_trial_are_not(caplog):
    model = build("llama")
    model.config.max_position_embeddings = 32
    assert share_prompts(model)
    computed_by(model, [TokenRow([1, 2, 3], [4] * 29)])
    assert "is made for" not in caplog.text
    computed_by(model, [TokenRow([1, 2, 3], [4] * 30)])
    assert "A row has 33 tokens, more than the 32 that LlamaForCausalLM is made for" in caplog.text
