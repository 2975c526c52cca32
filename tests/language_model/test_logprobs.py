"""Log-probabilities against a naive computation, one row at a time and with full logits."""

import math

import pytest
import torch

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.attention import TreeLayout
from grao_lightning.language_model.head import Head, head_loss
from grao_lightning.language_model.logprobs import split_by_tokens, split_padded, token_logprobs
from grao_lightning.language_model.packing import own_budget, pack_rows, riders, split_into_packs
from grao_lightning.language_model.sharing import share_prompts, shares_prompts
from tests.conftest import VOCABULARY, tiny_model
from tests.memory import peak_memory

FAMILIES = ["Llama", "Qwen2", "Mixtral"]


def ragged_rows(num_rows: int = 7) -> list[TokenRow]:
    """Rows of all lengths; token 0, which pads, and token 2, an end of sequence, occur inside."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    rows = [TokenRow(ids(3 + 5 * n % 11), [0, *ids(1 + 4 * n % 9), 2, 2]) for n in range(num_rows)]
    return [TokenRow([1], [2]), *rows]


@torch.no_grad()
def naive_logprobs(model, row: TokenRow, temperature: float = 1.0) -> torch.Tensor:
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    logits = model(ids).logits[0].double() / temperature
    values = [
        logits[position - 1].log_softmax(-1)[ids[0, position]]
        for position in range(len(row.prompt_ids), len(row))
    ]
    return torch.stack(values)


@pytest.mark.parametrize(
    ("family", "shared"),
    [(family, False) for family in [*FAMILIES, "Gemma2", "Granite"]]
    + [(family, True) for family in [*FAMILIES, "Qwen3", "Gemma", "Granite"]],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_naive_computation_without_padding(family, shared, temperature):
    model, rows = tiny_model(family), ragged_rows() + ragged_rows()[::-1]
    assert share_prompts(model) if shared else True
    computed = token_logprobs(model, rows, temperature=temperature).by_row()
    for row, logprobs in zip(rows, computed, strict=True):
        expected = naive_logprobs(model, row, temperature).float()
        torch.testing.assert_close(logprobs.detach(), expected, atol=1e-5, rtol=0)


def by_rows(rows: list[TokenRow], coefficients: torch.Tensor):
    """Return weights for the objective ``sum_r c_r l(row_r)``."""
    lengths = torch.tensor([len(row.answer_ids) for row in rows])
    weights = (coefficients / lengths).repeat_interleave(lengths)
    return lambda part, logprobs: weights[part].to(logprobs.dtype)


def grouped_rows() -> list[TokenRow]:
    """Ragged groups of several prompts, prompts out of order, answers of one token among them."""
    rows = ragged_rows(5)
    return [
        TokenRow(rows[at % 3].prompt_ids, rows[at % 5].answer_ids[: 1 + at % 4]) for at in range(11)
    ] + rows


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_full_logits_without_padding(family, shared):
    model, rows = tiny_model(family), grouped_rows()
    coefficients = torch.linspace(-1, 1, len(rows))
    assert not shared or share_prompts(model)
    token_logprobs(model, rows, weigh=by_rows(rows, coefficients)).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for coefficient, row in zip(coefficients, rows, strict=True):
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        (-coefficient * logprobs[len(row.prompt_ids) - 1 :].mean()).backward()
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-5, name


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "packed"])
def test_padding_and_the_order_of_rows_leave_every_row_unchanged(shared):
    model, rows = tiny_model("Llama"), ragged_rows()
    assert not shared or share_prompts(model)
    together = token_logprobs(model, rows).by_row()
    for number, row in enumerate(rows):
        alone = token_logprobs(model, [row]).by_row()[0]
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=0)
    backwards = token_logprobs(model, rows[::-1]).by_row()[::-1]
    for left, right in zip(together, backwards, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "packed"])
def test_gradient_checkpointing_leaves_gradients_unchanged(shared):
    rows = grouped_rows()

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = tiny_model("Llama").train()
        assert not shared or share_prompts(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        token_logprobs(model, rows, weigh=by_rows(rows, torch.ones(len(rows)))).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for left, right in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_entropy_is_that_of_the_whole_next_token_distribution():
    model, row = tiny_model("Llama"), TokenRow([5, 6, 7], [8, 9])
    entropy = token_logprobs(model, [row]).entropy
    logits = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0, 2:4]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=0)


def test_the_loss_is_the_weighted_sum_of_the_logprobs_that_the_weights_may_depend_on():
    model, rows = tiny_model("Llama"), ragged_rows()
    computed = token_logprobs(model, rows, weigh=lambda part, logprobs: logprobs.exp())
    expected = -(computed.flat.exp() * computed.flat).sum()
    torch.testing.assert_close(computed.loss.detach(), expected)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "packed"])
def test_logits_of_the_vocabulary_exist_for_one_chunk_only(monkeypatch, shared):
    """The largest tensor that any operation makes must not be [tokens, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from grao_lightning.language_model import head

    class LargestTensor(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    monkeypatch.setattr(head, "CHUNK_TOKENS", 16)
    model = tiny_model("Llama", vocab_size=5000)
    rows = [TokenRow([1, 2], list(range(60))) for _ in range(8)]  # 480 answer tokens
    assert not shared or share_prompts(model)
    head.head_of(model)
    with LargestTensor() as seen:
        token_logprobs(model, rows, weigh=lambda part, logprobs: logprobs).loss.backward()
    # The head's gradient, V * H, is the largest; the logits of all tokens would be 15 times that.
    assert seen.largest == 5000 * 32


def test_the_heads_memory_does_not_grow_with_vocabulary_times_tokens():
    """A further token costs its state's gradient and two figures, [H] + 2 floats, and no logits."""
    hidden, vocabulary, tokens = 16, 4096, 1024

    def extra_bytes(tokens: int) -> int:
        states = torch.zeros(tokens, hidden, requires_grad=True)
        head = Head(torch.zeros(vocabulary, hidden, requires_grad=True))
        targets = torch.zeros(tokens, dtype=torch.long)
        with peak_memory() as peak:
            head_loss(states, head, targets, 1.0, lambda _, logprobs: logprobs)[0].backward()
        return peak.extra_bytes

    growth = extra_bytes(2 * tokens) - extra_bytes(tokens)
    by_hand = tokens * (hidden + 2) * 4
    assert by_hand <= growth <= 1.5 * by_hand
    assert growth < tokens * vocabulary * 4 / 100


def test_a_head_that_is_not_understood_falls_back_to_the_models_own_logits(caplog):
    model = tiny_model("Llama")
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits.pow(3) * 0.1  # no setting of the configuration tells of it
        return output

    model.forward = forward
    rows = [TokenRow([5, 6, 7], [8, 9]), TokenRow([5], [6, 7, 8])]
    assert not share_prompts(model)
    computed = token_logprobs(model, rows, weigh=by_rows(rows, torch.tensor([1.0, -2.0])))
    for row, logprobs in zip(rows, computed.by_row(), strict=True):
        torch.testing.assert_close(logprobs, naive_logprobs(model, row).float())
    assert "unknown way" in caplog.text
    means = torch.stack([logprobs.mean() for logprobs in computed.by_row()])
    torch.testing.assert_close(computed.loss.detach(), -(means[0] - 2 * means[1]))
    computed.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{"scale": 0.25}, {"cap": 2.0}, {"scale": 3.0, "cap": 1.5}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_heads_own_gradient_equals_autograds(options, with_bias):
    torch.manual_seed(0)
    states = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    bias = torch.randn(7, dtype=torch.double, requires_grad=True) if with_bias else None
    targets, weights = torch.tensor([0, 3, 6, 2, 3]), torch.linspace(-1, 1, 5).double()
    inputs = [states, weight] if bias is None else [states, weight, bias]
    head = Head(weight, bias, **options)
    loss, *_ = head_loss(states, head, targets, 0.7, lambda part, _: weights[part])
    found = torch.autograd.grad(2 * loss, inputs)

    logits = (states @ weight.T + (0 if bias is None else bias)) * options.get("scale", 1.0)
    if cap := options.get("cap"):
        logits = cap * torch.tanh(logits / cap)
    logprobs = (logits / 0.7).log_softmax(-1)[torch.arange(5), targets]
    expected = torch.autograd.grad(-2 * (weights * logprobs).sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_packs_hold_every_row_once_keep_to_their_budget_and_spare_prompts():
    rows = grouped_rows()
    wanted = [number for number in range(len(rows)) if number != 4]
    budget = 40
    packs = split_into_packs(rows, wanted, budget)
    assert sorted(number for pack in packs for number in pack) == wanted
    sizes = [len(pack_rows([rows[number] for number in pack]).ids) for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    assert sum(sizes) < sum(len(rows[number]) for number in wanted)
    everything = split_into_packs(rows, wanted, 10**6)
    assert len(everything) == 1


def test_a_group_larger_than_the_budget_is_spread_and_a_row_larger_stands_alone():
    rows = [TokenRow([1] * 10, [2] * 11) for _ in range(6)]  # 10 + 10 a branch
    assert split_into_packs(rows, range(6), 40) == [[0, 1, 2], [3, 4, 5]]
    assert split_into_packs(rows, range(2), 15) == [[0], [1]]


def test_rows_without_gradient_ride_only_where_reading_their_prompt_again_costs_more():
    short, long = TokenRow([1] * 10, [2] * 5), TokenRow([1] * 10, [2] * 6)  # 8, 10 extra tokens
    other = TokenRow([3] * 10, [2] * 2)
    assert riders([short, short], [True, False]) == {1}
    assert riders([short, long], [True, False]) == set()
    assert riders([short, other], [True, False]) == set()
    assert riders([short, short], [False, False]) == set()


def test_the_dense_mask_of_a_pack_shows_each_token_its_own_row_only():
    rows = grouped_rows()
    pack = pack_rows(rows)
    mask = pack.mask()
    seen_by_last = [
        mask[source].nonzero()[:, 0]
        for source in pack.sources[torch.cumsum(pack.lengths, 0) - 1].tolist()
    ]
    for row, seen in zip(rows, seen_by_last, strict=True):
        assert pack.ids[seen].tolist() == row.prompt_ids + row.answer_ids[:-1]
        assert pack.positions[seen].tolist() == list(range(len(row) - 1))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("Gemma2", {}, "sliding"),
        ("Mistral", {"sliding_window": 4}, "sliding"),
        ("Llama", {"attention_dropout": 0.1}, "drops out"),
        ("Bloom", {"n_head": 4}, "an attention that cannot be exchanged"),
    ],
)
def test_models_that_cannot_share_prompts_keep_their_attention_and_the_log_says_why(
    family, options, reason, caplog
):
    model = tiny_model(family, **options)
    own = model.config._attn_implementation
    assert not share_prompts(model)
    assert model.config._attn_implementation == own
    assert reason in caplog.text
    row = TokenRow([5, 6, 7], [8, 9])
    computed = token_logprobs(model, [row]).flat
    torch.testing.assert_close(computed, naive_logprobs(model, row).float(), atol=1e-5, rtol=0)


def test_layers_that_do_not_attend_to_everything_share_no_prompts(caplog):
    model = tiny_model("Llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not share_prompts(model)
    assert "layers of full_attention, linear_attention" in caplog.text


def test_a_model_whose_pack_disagrees_with_its_rows_gets_its_own_attention_back(
    monkeypatch, caplog
):
    model = tiny_model("Llama")
    own = model.config._attn_implementation
    layout = TreeLayout.attend
    monkeypatch.setattr(TreeLayout, "attend", lambda *arguments: 1.1 * layout(*arguments))
    assert not share_prompts(model)
    assert model.config._attn_implementation == own
    assert "differ from those of single rows" in caplog.text


def test_padded_micro_batches_hold_every_row_once_and_keep_to_their_budget():
    rows = ragged_rows(30)
    wanted = [number for number in range(len(rows)) if number % 3]
    budget = 40
    micro_batches = split_padded(rows, wanted, budget)
    assert sorted(number for part in micro_batches for number in part) == wanted
    for part in micro_batches:
        size = max(len(rows[number]) for number in part) * len(part)
        assert size <= budget or len(part) == 1
    assert len(micro_batches) < len(wanted)


@pytest.mark.parametrize("family", [*FAMILIES, "Gemma2", "Granite"])
def test_the_heads_of_known_families_are_understood(family, caplog):
    token_logprobs(tiny_model(family), ragged_rows(2))
    assert "unknown way" not in caplog.text


def test_looking_at_the_head_leaves_the_mode_of_the_model():
    for training in (True, False):
        model = tiny_model("Llama").train(training)
        token_logprobs(model, ragged_rows(2))
        assert model.training is training


def test_logprobs_of_a_half_precision_model_are_not_rounded_to_it():
    flat = token_logprobs(tiny_model("Llama").bfloat16(), ragged_rows()).flat
    assert flat.dtype == torch.float32
    assert (flat != flat.bfloat16()).any()


def routing_margin(model, row: TokenRow) -> float:
    """Return by how much the last expert chosen is ahead of the first one left out, at the least.

    In logits, over all tokens and layers; infinite in a model without experts.
    """
    margins = [torch.tensor([math.inf])]

    def note(router, inputs, outputs) -> None:
        falling = outputs[0].sort(dim=-1, descending=True).values
        margins.append(falling[:, router.top_k - 1] - falling[:, router.top_k])

    routers = [part for part in model.modules() if hasattr(part, "top_k") and part._parameters]
    hooks = [router.register_forward_hook(note) for router in routers]
    with torch.no_grad():
        model(torch.tensor([row.prompt_ids + row.answer_ids]))
    for hook in hooks:
        hook.remove()
    return torch.cat(margins).min().item()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mixtral", "Gemma"])
def test_bfloat16_gradients_of_packs_are_as_near_to_float32_as_those_of_padded_rows(family):
    """Distance from the float32 gradient of the same bfloat16 weights, by the gradient's norm.

    Measured over these sets of coefficients: packed 0.012 to 0.024, padded 0.010 to 0.028, their
    ratio 0.74 to 1.26; of a single parameter at most 0.044 packed, 0.040 padded.

    Of Mixtral only rows whose experts are clear in float32 take part. Where two experts are nearly
    even, rounding decides between them, in packed and padded rows alike: with all rows packed was
    up to 0.042 off where padded was 0.014.
    """
    exact_model = tiny_model(family).bfloat16().float()
    rows = [row for row in grouped_rows() if routing_margin(exact_model, row) > 0.05]
    assert len(rows) >= 9

    def gradients(model, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        token_logprobs(model, rows, weigh=by_rows(rows, coefficients)).loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    padded_model, packed_model = tiny_model(family).bfloat16(), tiny_model(family).bfloat16()
    assert share_prompts(packed_model)
    generator = torch.Generator().manual_seed(1)
    for coefficients in [
        torch.linspace(-1, 1, len(rows)),
        *torch.randn(2, len(rows), generator=generator),
    ]:
        exact = gradients(exact_model, coefficients)
        size = torch.stack([part.norm() for part in exact.values()])

        def distances(model, exact=exact, coefficients=coefficients) -> torch.Tensor:
            found = gradients(model, coefficients)
            return torch.stack([(found[name] - exact[name]).norm() for name in exact])

        padded, packed = distances(padded_model), distances(packed_model)
        assert packed.norm() <= 1.5 * padded.norm() + 0.002 * size.norm()
        assert packed.norm() <= 0.04 * size.norm()
        assert (packed <= 0.08 * size + 1e-6).all()


def test_the_heads_gradient_is_summed_up_in_float32(monkeypatch):
    """In bfloat16 a sum of ones stays at 256."""
    monkeypatch.setattr("grao_lightning.language_model.head.CHUNK_TOKENS", 1)
    states = torch.ones(400, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets, twice = torch.zeros(400, dtype=torch.long), torch.full((400,), 2.0)
    loss, *_ = head_loss(states, Head(weight), targets, 1.0, lambda part, _: twice[part])
    loss.backward()
    assert weight.grad[:, 0].tolist() == [-400.0, 400.0]  # 2 (p - 1) and 2 p with p = 1/2


def test_small_gradients_are_not_lost_under_float16_autocast():
    """Below 6e-8 float16 has nothing; a gradient scaler comes after the gradient is formed."""
    states = torch.ones(1, 1, requires_grad=True)
    weight, small = torch.tensor([[1.0], [-1.0]]), torch.tensor([1e-9])
    with torch.autocast("cpu", dtype=torch.float16):
        loss, *_ = head_loss(states, Head(weight), torch.tensor([0]), 1.0, lambda *_: small)
    loss.backward()
    # d(-w log p_0) / ds = w (p_0 - 1) * 1 + w p_1 * (-1) = -2 w p_1, p_1 = sigmoid(-2)
    expected = -2e-9 / (1 + math.exp(2))
    assert states.grad.item() == pytest.approx(expected, rel=1e-4, abs=0)


def test_a_budget_of_ones_own_holds_two_of_the_longest_rows():
    assert own_budget(280, "cpu") == 1024
    assert own_budget(1500, "cpu") == 3000
    assert own_budget(280, "cuda") == 8192
    model = tiny_model("Llama")
    rows = [TokenRow([1] * 500, [2] * 12) for _ in range(4)]
    assert not shares_prompts(model)
    numbers = [part.numbers for part in split_by_tokens(model, rows, [True] * 4, None)]
    assert numbers == [[0, 1], [2, 3]]
