"""The words for what is measured: one label, meaning, unit and better end a figure.

The console, the tables, TensorBoard's pages and ``docs/metrics.md`` take them from here, so that a
figure has one name wherever it is read.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple


class Figure(NamedTuple):
    """How a measured figure is spoken of.

    Attributes:
        name: Its tag without ``train/`` or ``val/``; ``*`` stands for a name of the user's.
        label: In the console, in tables and in charts; "" where none of them shows it.
        unit: Of the value in TensorBoard and ``summary.json``; shares are shown in percent.
        better: "higher", "lower", or "" where neither end is the better one.
        form: Of the value that is shown.
        meaning: What it is.
    """

    name: str
    label: str
    unit: str
    better: str
    form: str
    meaning: str

    @property
    def heading(self) -> str:
        """Return the label with the unit of the value that is shown."""
        if self.unit == "share":
            return f"{self.label} %"
        named = self.unit and self.unit != "the scorers'"
        return f"{self.label} ({self.unit})" if named else self.label

    def shown(self, value: float) -> str:
        """Return a value as people read it, without its unit."""
        return f"{100 * value if self.unit == 'share' else value:{self.form}}"


def _figures(table: str) -> dict[str, Figure]:
    rows = (line.split("|", 5) for line in table.strip().splitlines())
    figures = [Figure(*(cell.strip() for cell in row)) for row in rows]
    return {figure.name: figure for figure in figures}


#: What validation measures, ``val/``, with its 95 % interval under ``val_bounds/``.
VALIDATION = _figures("""
ras | RAS | share | higher | .1f | prompts won against the reference answer; ties by `model.ties_as`
nag | NAG | share | higher | +.1f | prompts won minus lost against the untrained base (`model.gain`)
reward | reward | the scorers' | higher | .3f | weighted sum of the scores of judges or rewards
length | length | tokens | | .1f | of a completion
cut_off | cut off | share | lower | .1f | completions ended by `sampling.max_new_tokens`
distinct | distinct | share | | .1f | different texts over prompts: small where many get one answer
loss | loss | nats | lower | .3f | SFT: by token of the answers; DPO, reward model: by pair
rewards/accuracies | accuracy | share | higher | .1f | DPO: pairs whose chosen answer leads
rewards/margins | margin | nats | higher | +.3f | DPO: by how much the chosen answer leads
rewards/chosen | chosen | nats | | +.3f | DPO: beta log(policy / reference model), chosen answer
rewards/rejected | rejected | nats | | +.3f | DPO: the same of the rejected answer
accuracy | accuracy | share | higher | .1f | reward model: pairs told; a tie counts as half
length_alone_accuracy | by length alone | share | | .1f | pairs told by a guess from length
margin | margin | log-odds | higher | +.3f | reward model: score, chosen minus rejected
calibration_error | calibration error | share | lower | .1f | reward model: confidence from accuracy
length_correlation | length correlation | | | +.2f | Spearman's, of lead in score and in tokens
missing_rewards | missing | share | lower | .1f | completions without a reward, left out elsewhere
rewards/*/mean | | its own | | .3f | what one reward function gives
""")

#: What a training step measures, ``train/``.
TRAINING = _figures("""
loss | loss | | lower | .3f | what is minimised
reward | reward | the scorers' | higher | .3f | weighted sum of the completions' scores
ras | RAS | share | higher | .0f | completions that beat the reference answer; ties are losses
completions/mean_length | length | tokens | | .1f | of a completion
completions/min_length | | tokens | | .0f | of the shortest completion
completions/max_length | | tokens | | .0f | of the longest completion
completions/cut_off | cut off | share | lower | .0f | completions ended by the length limit
completions/mean_logprob | | nats per token | | .3f | of a completion
kl | KL | nats per token | | .4f | drift from the reference model on sampled tokens
entropy | entropy | nats | | .2f | of the next token, over all tokens trained on
dead_groups | dead groups | share | lower | .0f | groups without signal: all advantages are 0
reward_std | | the scorers' | | .3f | standard deviation of a group's rewards
rewards/*/mean | | its own | | .3f | what one reward function gives
missing_rewards | missing | share | lower | .0f | completions without a reward
mean_abs_advantage | | | | .3f | mean size of an advantage
reference_answer/reward | | the scorers' | | .3f | of the reference answers
reference_answer/advantage | | | | .3f | of the reference answer in its group
reference_answer/grad_share | | share | | .1f | GRAO: its part of the gradient's coefficients
reference_answer/mean_logprob | | nats per token | | .3f | of a reference answer
objective/exploration | | nats per token | | .3f | GRAO: first term of equation 3
objective/imitation | | nats per token | | .3f | GRAO: second term
objective/regularizer | | nats per token | | .3f | GRAO: third term
objective/total | | nats per token | higher | .3f | GRAO: their sum
objective/*_share | | share | | .1f | GRAO: size of a term among the three
clip_ratio/low_mean | | share | | .1f | GRPO, PPO: tokens clipped below 1 - `model.eps_low`
clip_ratio/high_mean | | share | | .1f | GRPO, PPO: tokens clipped above 1 + `model.eps_high`
clip_ratio/outward | | share | | .1f | tokens dropped by `clipping.outward_mask`
clip_ratio/grad_norm | | share | | .1f | 1 where the gradient norm was clipped
router_loss | | | lower | .3f | of a mixture's experts, before the update and its weight
grad_norm | | | | .3f | gradient norm before it is clipped
kl_weight | | | | .4f | PPO: weight of the KL reward
value/loss | | squared reward | lower | .3f | PPO: of the value head
value/mean | | the scorers' | | .3f | PPO: value of a token
value/return | | the scorers' | | .3f | PPO: what the value learns
value/squared_error | | squared reward | lower | .3f | PPO: of the value before the update
rewards/accuracies | accuracy | share | higher | .0f | DPO: pairs whose chosen answer leads
rewards/margins | margin | nats | higher | +.3f | DPO: by how much the chosen answer leads
rewards/chosen | | nats | | +.3f | DPO: beta log(policy / reference model), chosen answer
rewards/rejected | | nats | | +.3f | DPO: the same of the rejected answer
logps/chosen | | nats | | .2f | DPO: log-probability of the chosen answer
logps/rejected | | nats | | .2f | DPO: log-probability of the rejected answer
accuracy | accuracy | share | higher | .0f | reward model: pairs told; a tie counts as half
margin | margin | log-odds | higher | +.3f | reward model: score, chosen minus rejected
mean_score | | log-odds | | .3f | reward model: of all answers; `model.centring` holds it near 0
left_out_pairs | | share | lower | .1f | reward model: pairs longer than the backbone reads
learning_rate | | | | .2e | of the optimiser
num_tokens | | tokens | | .0f | sampled in training so far
step_time | | seconds | lower | .2f | wall time of the step
perf/*_time | | seconds | lower | .2f | of a phase: sample, score, reference_model, update
perf/tokens_per_second | | tokens/s | higher | .0f | sampled tokens by wall time
""")

#: What a judge tells of itself, under ``train/judge/`` and ``val/judge/``.
JUDGES = _figures("""
failure_rate | | share | lower | .1f | pairs without a verdict
tie_rate | | share | | .1f | ties among the judged pairs, disagreeing orders included
inconsistency | | share | lower | .1f | judged pairs whose two orders disagree
position_bias | | share | lower | .1f | judged pairs both of whose orders prefer one position
position_lean | | | | +.2f | from -1, always the second text, to 1, always the first
unreadable_rate | | share | lower | .1f | answers without a readable verdict
cache_hit_rate | | share | | .1f | different questions answered from the cache
latency | | seconds | lower | .2f | of a request, pauses and failed attempts not counted
prompt_tokens | | tokens | | .0f | asked, the cache's not counted
completion_tokens | | tokens | | .0f | answered, the cache's not counted
""")

_COMPARED = ("base_", "reference_answer_")


def figure_of(tag: str) -> Figure | None:
    """Return what is known of a tag, None for one of the user's.

    >>> figure_of("val_bounds/base_ras_low").label
    'RAS'
    """
    group, _, name = tag.partition("/")
    if group == "val_bounds":
        stem = name.removesuffix("_low").removesuffix("_high")
        return None if stem == name else figure_of(f"val/{stem}")
    if group not in ("val", "train"):
        return None
    if name.startswith("judge/"):
        return JUDGES.get(name.rpartition("/")[2])
    if group == "train":
        return _match(name, TRAINING)
    for prefix in _COMPARED:
        name = name.removeprefix(prefix)
    return _match(name, VALIDATION)


def metrics_page() -> str:
    """Return ``docs/metrics.md``."""
    return _PAGE.format(
        validation=_table("val", VALIDATION.values()),
        training=_table("train", TRAINING.values()),
        judges=_table("train/judge", JUDGES.values()),
    )


def _match(name: str, figures: dict[str, Figure]) -> Figure | None:
    found = (figure for pattern, figure in figures.items() if fnmatchcase(name, pattern))
    return next(found, None)


def _table(group: str, figures: Iterable[Figure]) -> str:
    lines = ["| tag | shown as | what it is | unit | better |", "|---|---|---|---|---|"]
    for figure in figures:
        tag = f"`{group}/{figure.name}`"
        cells = (tag, figure.label, figure.meaning, figure.unit, figure.better)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_PAGE = """\
# What is measured

One name a figure, wherever it is read: a TensorBoard tag, the same word in `summary.json` (what
validation measures, without `val/`), and the label that the console and the tables show beside it.
Shares lie in [0, 1] in TensorBoard and `summary.json`, and are shown in percent. Written by
`python -m grao_lightning.display.vocabulary > docs/metrics.md`.

The step of a point is the number of steps that the measured policy had taken: the untrained base
stands at 0 in `val/`, and a training step, measured before its own update, one before the console's
number. All figures are those of all devices together.

## Validation

Each figure has a 95 % interval in `val_bounds/<name>_low` and `val_bounds/<name>_high` (`low` and
`high` in `summary.json`), but for `distinct` and `calibration_error`, which have none.
`val/base_<name>` is the untrained base's figure on the same prompts, `val/reference_answer_<name>`
the reference answers'. RAS and its like, down to `distinct`, need `scoring.rewards` or
`scoring.judges`; SFT and DPO do without.

{validation}

`best.ckpt` is that of the best `val/ras` where there is one, else of the least `val/loss`; for
reward models of the best `val/accuracy`.

## Training

{training}

## Judges

The same stands under `val/judge/`; where several judges tell, their name comes between.

{judges}
"""


if __name__ == "__main__":
    print(metrics_page(), end="")
