"""Groups scored against their reference answers."""

import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from grao_lightning import GRAOModule
from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks.checkpoint import LastCheckpoint
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.data.example import Example
from grao_lightning.faults import UserError
from grao_lightning.objectives.advantages import group_advantages
from grao_lightning.rewards.protocol import RewardSpec
from tests.runs import fit, stages, trainer_at

HERE = "tests.callbacks.test_scoring"


def word_count(completions):
    return [float(len(text.split())) for text in completions]


def missing_where_empty(completions):
    return [float(len(text.split())) if text else None for text in completions]


class Words:
    """A scorer that is an instance."""

    def __call__(self, completions):
        return word_count(completions)

    def counted(self, completions):
        return word_count(completions)


class Verdicts:
    """Compares word counts with the reference answer's, and tells how often it was asked."""

    pairwise = True
    unit, range = "verdict", (-1, 1)

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, completions, reference_answers):
        self.asked += completions
        pairs = zip(word_count(completions), word_count(reference_answers), strict=True)
        return [float((own > other) - (own < other)) for own, other in pairs]

    def statistics(self):
        asked, self.asked = len(self.asked), []
        return {"ones": (float(asked), asked), "asked": (float(asked), None)}


def hundred_squares(completions):
    return [100.0 * words**2 for words in word_count(completions)]


def bonus(completions, extra):
    return [float(value) for value in extra]


def scored(
    texts,
    answers,
    *,
    extra=(),
    needs_spread=True,
    own_statistics="inside",
    own_scale="population_std",
    **options,
) -> PromptBatch:
    """Score the groups ``texts`` against ``answers`` and return their batch."""
    group_size = len(texts[0])
    flat = [text for group in texts for text in group]
    batch = PromptBatch(
        indices=list(range(len(texts))),
        prompt_ids=[[1]] * len(texts),
        prompts=["q"] * len(texts),
        reference_answer_ids=[[2]] * len(texts),
        reference_answers=answers,
        columns=[{"extra": value} for value in extra] or [{}] * len(texts),
        completions=Completions([[2]] * len(flat), flat, [False] * len(flat), group_size),
    )
    scoring = GroupScoring(
        **{"rewards": [RewardSpec(f"{HERE}.word_count")], "comparison": "raw", **options}
    )
    module = SimpleNamespace(
        trains_on_groups=True,
        needs_spread=needs_spread,
        group_statistics=own_statistics,
        group_scale=own_scale,
    )
    scoring.on_train_batch_start(trainer_at(0), module, batch, 0)
    return batch


TEXTS = [["a", "a b", "a b c"], ["a b", "a b", "a b"]]
ANSWERS = ["a b", "a b"]


def test_rewards_are_those_of_completions_and_then_of_the_reference_answer():
    batch = scored(TEXTS, ANSWERS)
    assert batch.rewards.tolist() == [[1, 2, 3, 2], [2, 2, 2, 2]]
    assert batch.outcomes.tolist() == [[-1, 0, 1], [0, 0, 0]]


def test_raw_advantages_come_from_rewards_and_pairwise_ones_from_outcomes():
    texts = [["a", "a b c d e f", "a b c"]]
    raw = scored(texts, ["a b"])
    pairwise = scored(texts, ["a b"], comparison="pairwise")
    expected_raw = group_advantages(torch.tensor([[1.0, 6.0, 3.0, 2.0]]))
    expected_pairwise = group_advantages(torch.tensor([[-1.0, 1.0, 1.0, 0.0]]))
    torch.testing.assert_close(raw.advantages, expected_raw)
    torch.testing.assert_close(pairwise.advantages, expected_pairwise)


def test_differences_within_the_tolerance_are_ties():
    assert scored(TEXTS, ANSWERS, tie_tolerance=1.0).outcomes.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_weights_multiply_and_each_function_is_kept_by_its_name():
    rewards = [
        RewardSpec(f"{HERE}.word_count", weight=2.0),
        RewardSpec(f"{HERE}.bonus", weight=-1.0, name="extra_bonus"),
    ]
    batch = scored(TEXTS, ANSWERS, extra=[10, 20], rewards=rewards)
    # 2 * words - extra, the column of the group's own prompt
    assert batch.rewards.tolist() == [[-8, -6, -4, -6], [-16, -16, -16, -16]]
    assert batch.rewards_by_name["extra_bonus"].tolist() == [[10] * 4, [20] * 4]


def test_a_missing_score_is_left_out_and_never_counts_as_zero():
    rewards = [RewardSpec(f"{HERE}.missing_where_empty")]
    batch = scored([["a b c", "", "a"]], ["a b"], rewards=rewards)
    assert batch.rewards[0].isnan().tolist() == [False, True, False, False]
    assert math.isnan(batch.outcomes[0, 1])
    expected = group_advantages(torch.tensor([[3.0, 1.0, 2.0]]))[0]
    kept = batch.advantages[0, [0, 2, 3]]
    torch.testing.assert_close(kept, expected)
    assert batch.advantages[0, 1] == 0
    statistics = batch.statistics.reduced(lambda values, _: values)
    assert statistics["reward"] == 2.0, "mean of 3 and 1"
    assert statistics["ras"] == 0.5, "one of two compared completions wins"
    assert statistics["missing_rewards"] == pytest.approx(1 / 3), "of the completions"


def test_a_pairwise_scorer_compares_completions_and_the_reference_answers_own_score_is_0():
    batch = scored(TEXTS, ANSWERS, rewards=[RewardSpec(f"{HERE}.Verdicts", name="judge")])
    assert batch.rewards.tolist() == [[-1, 0, 1, 0], [0, 0, 0, 0]]
    assert batch.outcomes.tolist() == [[-1, 0, 1], [0, 0, 0]]
    statistics = batch.statistics.reduced(lambda values, _: values)
    assert statistics["judge/ones"] == 1.0, "a mean"
    assert statistics["judge/asked"] == 6.0, "a total: six completions and no reference answer"


def test_pairwise_and_pointwise_scores_add_up():
    rewards = [
        RewardSpec(f"{HERE}.Verdicts", weight=10.0),
        RewardSpec(f"{HERE}.word_count", weight=1.0),
    ]
    assert scored(TEXTS, ANSWERS, rewards=rewards).rewards.tolist() == [
        [-10 + 1, 0 + 2, 10 + 3, 0 + 2],
        [2, 2, 2, 2],
    ]


def test_statistics_of_two_scorers_keep_their_names_apart():
    rewards = [RewardSpec(f"{HERE}.Verdicts", name=name) for name in ("kind", "honest")]
    statistics = scored(TEXTS, ANSWERS, rewards=rewards).statistics.reduced(lambda v, _: v)
    assert statistics["judge/kind/asked"] == statistics["judge/honest/asked"] == 6.0


def test_normalised_scores_count_the_same_whatever_their_units():
    """Words 1, 2, 3 and the answer's 2; the other function gives 100 times the squares."""
    rewards = [
        RewardSpec(f"{HERE}.word_count", weight=1.0),
        RewardSpec(f"{HERE}.hundred_squares", weight=0.5),
    ]
    texts, answers = TEXTS[:1], ANSWERS[:1]
    batch = scored(texts, answers, rewards=rewards, aggregation="normalized")
    words, squares = torch.tensor([1.0, 2, 3, 2]), torch.tensor([1.0, 4, 9, 4])
    total = sum(
        weight * (values - values.mean()) / values.std(correction=0)
        for weight, values in ((1.0, words), (0.5, squares))
    )
    torch.testing.assert_close(batch.compared[0].float(), total)
    assert batch.rewards[0].tolist() == [1 + 50, 2 + 200, 3 + 450, 2 + 200], "reward stays raw"


def test_normalised_scores_leave_missing_ones_missing_and_outcomes_follow_them():
    rewards = [
        RewardSpec(f"{HERE}.missing_where_empty"),
        RewardSpec(f"{HERE}.hundred_squares", weight=-0.5),
    ]
    options = {"rewards": rewards, "comparison": "pairwise", "aggregation": "normalized"}
    batch = scored([["a", "", "a b c"]], ["a b"], **options)
    # words z = (-1, 0, 1) * sqrt(1.5) without the empty text; squares 1, 0, 9 and 4 less their
    # mean 3.5, over sqrt((6.25 + 12.25 + 30.25 + 0.25) / 4) = 3.5: -0.714, -1, 1.571, 0.143
    # totals: -1.225 + 0.357 = -0.868; missing; 1.225 - 0.786 = 0.439; answer 0 - 0.071
    assert batch.compared[0, [0, 2, 3]].tolist() == [-1, 1, 0]
    assert batch.compared[0, 1].isnan()
    raw = scored([["a", "", "a b c"]], ["a b"], **{**options, "aggregation": "raw"})
    assert raw.compared[0, [0, 2, 3]].tolist() == [1, -1, 0], "squares of another unit decide"


def test_statistics_tell_dead_groups_and_the_spread():
    statistics = scored(TEXTS, ANSWERS).statistics.reduced(lambda values, _: values)
    assert statistics["dead_groups"] == 0.5
    # groups {1, 2, 3} and {2, 2, 2}: population std sqrt(2/3) and 0
    assert statistics["reward_std"] == pytest.approx(math.sqrt(2 / 3) / 2)
    assert statistics["reference_answer/reward"] == 2.0


def test_the_order_of_prompts_and_of_completions_moves_rewards_along():
    texts, answers = [["a", "a b", "a b c"], ["x y", "x", "x"]], ["a b", "x"]
    batch, swapped = scored(texts, answers), scored(texts[::-1], answers[::-1])
    assert torch.equal(batch.advantages, swapped.advantages.flip(0))
    turned = scored([group[::-1] for group in texts], answers)
    assert torch.equal(batch.advantages[:, :-1], turned.advantages[:, :-1].flip(1))


def recorded(prompts, completions, reference_answers, truncated, extra):
    SEEN.update(
        prompts=prompts,
        completions=completions,
        reference_answers=reference_answers,
        truncated=truncated,
        extra=extra,
    )
    return [0.0] * len(completions)


SEEN: dict[str, list] = {}


def test_functions_see_completions_in_order_and_then_the_reference_answers_each_with_its_own():
    batch = PromptBatch(
        indices=[0, 1],
        prompt_ids=[[1]] * 2,
        prompts=["p", "q"],
        reference_answer_ids=[[2]] * 2,
        reference_answers=["y", "z"],
        columns=[{"extra": 1}, {"extra": 2}],
        completions=Completions([[2]] * 4, ["a", "b", "c", "d"], [True, False, False, False], 2),
    )
    specs = [RewardSpec(f"{HERE}.recorded")]
    GroupScoring(specs)._score(batch, batch.completions, specs)
    assert SEEN == {
        "prompts": ["p", "p", "q", "q", "p", "q"],
        "completions": ["a", "b", "c", "d", "y", "z"],
        "reference_answers": ["y", "y", "z", "z", "y", "z"],
        "truncated": [True, False, False, False, False, False],
        "extra": [1, 1, 2, 2, 1, 2],
    }


@pytest.mark.parametrize("statistics", ["inside", "outside", "split"])
def test_the_choice_of_statistics_reaches_the_advantages(statistics):
    texts = [["a", "a b c d e f", "a b c"]]
    advantages = scored(texts, ["a b"], statistics=statistics).advantages
    rewards = torch.tensor([[1.0, 6.0, 3.0, 2.0]])
    torch.testing.assert_close(advantages, group_advantages(rewards, statistics=statistics))


@pytest.mark.parametrize("asked_for", [None, "sample_std"])
def test_without_a_setting_the_method_chooses_its_statistics_and_scale(asked_for):
    texts = [["a", "a b c d e f", "a b c"]]
    own = {"own_statistics": "outside", "own_scale": "none"}
    batch = scored(texts, ["a b"], scale=asked_for, **own)
    rewards = torch.tensor([[1.0, 6.0, 3.0, 2.0]])
    expected = group_advantages(rewards, statistics="outside", scale=asked_for or "none")
    torch.testing.assert_close(batch.advantages, expected)


def test_a_method_that_needs_no_spread_is_not_warned_of_a_dead_step(recwarn):
    scored(TEXTS[1:], ANSWERS[1:], needs_spread=False)
    assert not recwarn.list


def test_judges_score_validation_and_rewards_training(tmp_path):
    """keyword_score trains; the judge, which counts words, gives another figure in validation."""
    rewards = [RewardSpec("grao_lightning.embedded.keywords.keyword_score")]
    figures = {}
    for judges in (None, [RewardSpec(f"{HERE}.word_count")]):
        callbacks = stages(scoring={"rewards": rewards, "judges": judges})
        module = fit(
            tmp_path,
            callbacks=callbacks,
            data={"validation_prompts": 8},
            max_steps=1,
            limit_val_batches=1.0,
            val_check_interval=1,
        )
        figures[judges is None] = (module.step_values["reward"], module.estimates)
    (trained, own), (trained_again, judged) = figures[True], figures[False]
    assert trained == trained_again < 1
    assert own["reference_answer_reward"].value < 1
    assert judged["reference_answer_reward"].value > 3
    assert judged["base_reward"].value > 2


def test_every_function_that_cannot_be_made_is_told():
    specs = [RewardSpec(f"no_such_package.{name}") for name in ("first", "second")]
    told = "\n".join(GroupScoring(specs[:1], judges=specs[1:]).faults())
    assert "no_such_package.first" in told and "no_such_package.second" in told


def test_only_a_step_without_any_signal_is_warned_of(recwarn):
    scored(TEXTS, ANSWERS)  # one group of two is dead
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no group carries a signal"):
        scored(TEXTS[1:], ANSWERS[1:])


class Outage:
    """Scores by words, but for the calls of an outage, when every score is missing."""

    calls = 0
    during = range(0)

    def __call__(self, completions):
        type(self).calls += 1
        down = type(self).calls in type(self).during
        return [None if down else words for words in word_count(completions)]


@pytest.fixture
def outage(monkeypatch):
    """Set when the scorer is down, by the number of its call; one call a step."""

    def during(calls):
        monkeypatch.setattr(Outage, "calls", -1)  # the first call is a trial
        monkeypatch.setattr(Outage, "during", calls)
        return {
            "rewards": [RewardSpec(f"{HERE}.Outage")],
            "max_missing": 0.5,
            "missing_window": 3,
        }

    return during


@pytest.mark.filterwarnings("ignore:step")
def test_a_short_outage_is_waited_out_and_teaches_nothing(tmp_path, outage):
    shares = []

    class Noted(GroupScoring):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            values = pl_module.step_values
            shares.append((values["missing_rewards"], values["dead_groups"]))
            super().on_train_batch_end(trainer, pl_module, *rest)

    callbacks = stages()
    callbacks[1] = Noted(**outage(range(3, 4)))
    fit(tmp_path, callbacks=callbacks, max_steps=5)
    assert [missing for missing, _ in shares] == [0, 0, 1, 0, 0]
    assert shares[2][1] == 1, "every group is without signal"


@pytest.mark.filterwarnings("ignore:step")
def test_a_long_outage_ends_the_run_with_a_checkpoint_it_can_go_on_from(tmp_path, outage):
    def run(settings, **options):
        checkpoint = LastCheckpoint(dirpath=tmp_path, filename="last", save_on_exception=True)
        callbacks = [*stages(scoring=settings), checkpoint]
        return fit(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_steps=9, **options)

    with pytest.raises(UserError, match=r"got 67% of the rewards missing.*at step 6.*last.ckpt"):
        run(outage(range(5, 99)))  # of steps 4, 5, 6 the last two are missing
    module = run(outage(range(0)), ckpt_path=str(tmp_path / "last.ckpt"))
    assert module.trainer.global_step == 9
    assert Outage.calls == 3, "steps 7 to 9"


def test_a_base_answer_that_was_not_scored_is_scored_at_the_next_validation(tmp_path, outage):
    """Calls: policy, base, policy, base again, policy: one batch, three validations."""
    module = None

    class Seen(GroupScoring):
        def on_validation_epoch_end(self, trainer, pl_module):
            super().on_validation_epoch_end(trainer, pl_module)
            present.append(trainer.callback_metrics["val/missing_rewards"].item())

    present, judges = [], outage(range(2, 3))["rewards"]
    callbacks = stages()
    callbacks[1] = Seen([RewardSpec(f"{HERE}.word_count")], judges=judges)
    module = fit(
        tmp_path,
        callbacks=callbacks,
        data={"validation_prompts": 8},
        limit_val_batches=1.0,
        val_check_interval=1,
    )
    assert Outage.calls == 5
    assert module.estimates["base_reward"].value > 2
    assert present == [0, 0, 0], "the policy's own answers all have scores"


@pytest.mark.filterwarnings("ignore:validation at step")
def test_validation_logs_each_judge_and_what_is_missing(tmp_path, outage):
    judges = [*outage(range(1, 2))["rewards"], RewardSpec(f"{HERE}.Verdicts", name="verdicts")]
    module = fit(
        tmp_path,
        callbacks=stages(scoring={"judges": judges}),
        data={"validation_prompts": 8},
        max_steps=1,
        limit_val_batches=1.0,
        val_check_interval=1,
    )
    logged = module.trainer.callback_metrics
    assert logged["val/judge/asked"] == 16.0, "eight prompts, policy and base"
    assert -1 <= logged["val/rewards/verdicts/mean"] <= 1
    # The first judge scored nothing, so it does not apply; the other's verdicts stand.
    assert logged["val/missing_rewards"] == 0
    assert math.isnan(logged["val/rewards/Outage/mean"])


# -- what a list of rewards may hold in Python -----------------------------------------------------


def scaled(completions, factor):
    return [factor * words for words in word_count(completions)]


@pytest.mark.parametrize(
    ("reward", "label"),
    [
        (word_count, "word_count"),
        (lambda completions: word_count(completions), "lambda"),
        (partial(scaled, factor=1.0), "scaled"),
        (Words(), "Words"),
        (Words, "Words"),
        (Words().counted, "counted"),
        (RewardSpec(word_count), "word_count"),
        (RewardSpec(word_count, name="words"), "words"),
        (f"{HERE}.word_count", "word_count"),
        ({"function": word_count}, "word_count"),
        ({"function": f"{HERE}.word_count", "name": "words"}, "words"),
    ],
)
def test_a_reward_may_be_given_as_what_it_is_by_path_or_in_a_spec(reward, label):
    batch = scored(TEXTS, ANSWERS, rewards=[reward])
    assert list(batch.rewards_by_name) == [label]
    assert batch.rewards.tolist() == [[1, 2, 3, 2], [2, 2, 2, 2]]


def test_kinds_of_rewards_mix_with_their_weights_and_judge_too():
    rewards = [word_count, RewardSpec(Words(), weight=0.5), {"function": bonus, "weight": -1.0}]
    batch = scored(TEXTS, ANSWERS, extra=[10, 20], rewards=rewards)
    assert batch.rewards.tolist() == [[-8.5, -7, -5.5, -7], [-17, -17, -17, -17]]
    judges = GroupScoring([word_count], judges=[Words(), "a.b"]).judges
    assert [spec.label for spec in judges] == ["Words", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rewards": [lambda completions: [], lambda completions: []]},
            r"'lambda' names two reward functions; .* RewardSpec\(my_function, name=",
        ),
        ({"rewards": [word_count, f"{HERE}.word_count"]}, "'word_count' names two reward"),
        ({"rewards": [Words()], "judges": [Words()]}, "'Words' names two reward functions"),
        ({"rewards": [RewardSpec(word_count, weight="much")]}, "weight of word_count must be a"),
        ({"rewards": [RewardSpec(word_count, arguments={"a": 1})]}, "parameters of it"),
    ],
)
def test_faults_of_rewards_in_python_are_told_with_the_fix(options, message):
    with pytest.raises(UserError, match=message):
        GroupScoring(**options).faults().raise_if_any()


@pytest.mark.parametrize("one", [word_count, "a.b", RewardSpec("a.b"), {"function": "a.b"}])
def test_a_lone_reward_is_asked_for_in_brackets(one):
    with pytest.raises(UserError, match=r"scoring.rewards must be a list; .*brackets"):
        GroupScoring(one)


@pytest.mark.parametrize("entry", [3, None, {"weight": 1.0}])
def test_what_is_no_reward_is_refused_with_what_may_stand_there(entry):
    with pytest.raises(UserError, match=r"scoring.judges must hold reward functions, RewardSpec"):
        GroupScoring([word_count], judges=[entry])
    with pytest.raises(TypeError, match="'weigth'; did you mean weight"):
        GroupScoring([{"function": word_count, "weigth": 1.0}])


def echo(completions):
    seen.extend(completions)
    return [float(len(text)) for text in completions]


seen = []


def shown(sees, **options):
    """Return what a scorer is shown of two groups, the second opened by its template."""
    seen.clear()
    written = ["<think>a</think> b", "c<|tool|>", "a</think>b", "c"]
    plain = ["a b", "c", "ab", "c"]
    batch = PromptBatch(
        indices=[0, 1],
        prompt_ids=[[1], [1]],
        prompts=["q", "q"],
        reference_answer_ids=[[2], [2]],
        reference_answers=["<think>x</think>\ny", "z"],
        columns=[{}, {}],
        completions=Completions(
            [[2]] * 4, plain, [False] * 4, 2, written=written,
            prompt_ends=["assistant\n", "assistant\n<think>\n"],
        ),
    )  # fmt: skip
    scoring = GroupScoring(rewards=[RewardSpec(echo)], comparison="raw", sees=sees, **options)
    module = SimpleNamespace(
        trains_on_groups=True,
        needs_spread=True,
        group_statistics="inside",
        group_scale="population_std",
    )
    scoring.on_train_batch_start(trainer_at(0), module, batch, 0)
    return list(seen)


def test_scorers_see_special_tokens_and_the_tag_that_the_template_opened():
    thoughts = ["<think>x</think>\ny", "z"]
    opened = ["<think>\na</think>b", "<think>\nc"]
    assert shown("written") == ["<think>a</think> b", "c<|tool|>", *opened, *thoughts]
    assert shown("plain") == ["a b", "c", "ab", "c", *thoughts]


def test_the_answer_is_what_stands_behind_a_thought_and_nothing_where_it_never_ended():
    assert shown("answer") == ["b", "c", "b", "", "y", "z"]
    others = shown("answer", thought_tags=["<reason>", "</reason>"])
    assert others == ["a b", "c", "ab", "c", "<think>x</think>\ny", "z"]


def test_what_scorers_may_see_is_told():
    with pytest.raises(UserError, match=r"scoring\.sees must be one of .*got 'all'"):
        GroupScoring(rewards=[echo], sees="all").faults().raise_if_any()
    with pytest.raises(UserError, match=r"thought_tags must be the two texts .*got \['<think>'\]"):
        GroupScoring(rewards=[echo], thought_tags=["<think>"]).faults().raise_if_any()


def conversational(prompts, completions, **columns):
    return [float(len(prompt[-1]["content"]) + len(one[0]["content"]))
            for prompt, one in zip(prompts, completions, strict=True)]  # fmt: skip


def broken(completions):
    raise KeyError("no such thing")


def fussy(completions):
    return [1.0]


def nothing(completions):
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (conversational, r"conversational fails on the first rows of data.train: "
         r".*test_scoring.py, line \d+: TypeError: "
         ".*it reads conversations, as TRL's may: add format: messages"),
        (broken, r"broken fails .*KeyError: 'no such thing'; completions .* lists of texts"),
        (fussy, r"fussy fails .*one score a completion: got 1 for 2"),
    ],
)  # fmt: skip
def test_a_reward_function_that_fails_is_told_before_a_model_loads(function, told, tmp_path):
    module = GRAOModule()
    with pytest.raises(UserError, match=told):
        fit(tmp_path, module=module, callbacks=stages(scoring={"rewards": [function]}))
    assert module.policy is None


def test_a_function_may_read_conversations(tmp_path):
    spec = RewardSpec(conversational, format="messages")
    module = fit(tmp_path, callbacks=stages(scoring={"rewards": [spec]}), max_steps=1)
    assert module.trainer.callback_metrics["train/missing_rewards"] == 0


def test_a_trial_leaves_the_random_numbers_of_the_run_alone(tmp_path):
    def guessing(completions):
        return [random.random() + torch.rand(()).item() for _ in completions]

    def state():
        return random.getstate(), torch.get_rng_state().tolist()

    scoring = GroupScoring(rewards=[guessing], comparison="raw")
    rows = [Example("p", "a", None, {})] * 3
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(
            examples={"train": rows}, has_reference_answers=lambda split: True
        )
    )
    before = state()
    scoring.setup(trainer, SimpleNamespace(samples=True), "fit")
    assert state() == before


def test_a_first_step_without_any_reward_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="must give rewards from the first step on; got none"):
        fit(tmp_path, callbacks=stages(scoring={"rewards": [nothing]}))
