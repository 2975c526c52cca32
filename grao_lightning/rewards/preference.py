"""A reward learned in seconds from preference pairs: character n-grams and logistic regression."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from grao_lightning.faults import UserError
from grao_lightning.metrics.outcomes import Estimate, wilson_interval

# An n-gram of a single answer says nothing about another one, and there are very many of them.
_MIN_ANSWERS_PER_NGRAM = 2
_UNITS = {"char_wb": "characters", "word": "words"}
_PARTS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


class NGramPreference:
    """Scores completions by how often answers made of such n-grams were preferred.

    A Bradley-Terry model: log-odds(chosen over rejected) = score(chosen) - score(rejected), with a
    score linear in the TF-IDF of character n-grams. It serves smoke tests, tutorials and machines
    without a GPU, and it is weak. On some 1,780 pairs each of Anthropic HH, 5-fold cross-validation
    gives 63 % of held-out pairs on harmless-base and 61 % on helpful-base, where the length alone
    gives 55 % (shorter) and 59 % (longer); standard error 1.2 %.

    What it sees, and what a policy can exploit:

    - The prompt is not looked at. Similarity to it, terms shared with it and low-rank products of
      both changed the cross-validated accuracy by less than its noise.
    - Each answer's features have unit length, which bounds the score: repeating a phrase hardly
      moves it, where plain sums grow with every repetition and are no more accurate.
    - Style decides. Trained on harmless-base, "I don't understand." scores above 98 % of real
      answers, and the score's rank correlation with length is -0.5 (on helpful-base +0.7). Keep the
      policy close to the reference model, and judge the result by something else.
    - An answer without any known n-gram, such as an empty one, gets the lowest score of the
      training answers; at 0 it would beat three quarters of the answers of harmless-base.

    Args:
        ngram_range: Smallest and largest n of the n-grams; those of characters stay within words.
        inverse_regularization: scikit-learn's C, > 0; smaller means weights closer to 0.
        analyzer: "char_wb", characters within words, or "word".
        part: Which pairs it learns from: "all", or only those of "even" or "odd" number. A reward
            of one half and a judge of the other share no pair.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        ngram_range: tuple[int, int] = (2, 4),
        inverse_regularization: float = 0.6,
        analyzer: Literal["char_wb", "word"] = "char_wb",
        part: Literal["all", "even", "odd"] = "all",
    ) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise ImportError(
                "NGramPreference needs scikit-learn: pip install 'grao-lightning[preference]'"
            )
        # A YAML file gives a list.
        self.ngram_range = tuple(ngram_range)
        if len(self.ngram_range) != 2 or not 1 <= self.ngram_range[0] <= self.ngram_range[1]:
            raise ValueError(
                "ngram_range must be two numbers, 1 <= smallest <= largest, such as [2, 4]; got "
                f"{ngram_range}"
            )
        if not inverse_regularization > 0:
            raise ValueError(f"inverse_regularization must be > 0; got {inverse_regularization}")
        for name, value, known in (
            ("analyzer", analyzer, tuple(_UNITS)),
            ("part", part, tuple(_PARTS)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        self.inverse_regularization = inverse_regularization
        self.analyzer = analyzer
        self.part = part
        self._vectorizer: Any = None
        self._weights: Any = None
        self._lowest = 0.0

    def fit(self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> None:
        """Learn from pairs; the same pairs give the same scores.

        Args:
            prompts: Not used, see the class.
            chosen: Preferred answers.
            rejected: The other answer to the same prompt.

        Raises:
            ValueError: The lengths differ.
            UserError: There are fewer than 2 pairs, or no n-gram occurs in 2 answers.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        _check_lengths(prompts=prompts, chosen=chosen, rejected=rejected)
        chosen, rejected = chosen[_PARTS[self.part]], rejected[_PARTS[self.part]]
        if len(chosen) < 2:
            raise UserError(
                f"scoring.rewards: NGramPreference needs >= 2 pairs to learn from; got "
                f"{len(chosen)}: give preference data with more rows"
            )
        vectorizer = TfidfVectorizer(
            analyzer=self.analyzer,
            ngram_range=self.ngram_range,
            min_df=_MIN_ANSWERS_PER_NGRAM,
            sublinear_tf=True,
        )
        answers = [*chosen, *rejected]
        try:
            vectorizer.fit(answers)
        except ValueError as error:
            raise UserError(
                f"scoring.rewards: no n-gram of {self.ngram_range} {_UNITS[self.analyzer]} occurs "
                f"in {_MIN_ANSWERS_PER_NGRAM} answers of {len(chosen)} pairs: give more pairs or "
                f"shorter n-grams ({error})"
            ) from error
        # Every other pair is shown the other way round: the solver wants two classes, and without
        # an intercept the loss is the same.
        pairs = enumerate(zip(chosen, rejected, strict=True))
        sides = [(c, r) if i % 2 else (r, c) for i, (c, r) in pairs]
        left, right = (vectorizer.transform(texts) for texts in zip(*sides, strict=True))
        model = LogisticRegression(
            C=self.inverse_regularization, fit_intercept=False, max_iter=1000
        ).fit(left - right, [i % 2 for i in range(len(sides))])
        self._vectorizer, self._weights = vectorizer, model.coef_[0]
        self._lowest = float((vectorizer.transform(answers) @ self._weights).min())

    def accuracy(
        self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
    ) -> Estimate:
        """Return the share of pairs whose chosen answer scores higher, a tie counting as half.

        Args:
            prompts: Not used, see the class.
            chosen: Preferred answers.
            rejected: The other answer to the same prompt.

        Returns:
            The share in [0, 1] with Wilson's interval; NaN without pairs.

        Raises:
            RuntimeError: `fit` was not called.
            ValueError: The lengths differ.
        """
        _check_lengths(prompts=prompts, chosen=chosen, rejected=rejected)
        pairs = list(zip(self._scores(chosen), self._scores(rejected), strict=True))
        return wilson_interval(sum((c > r) + 0.5 * (c == r) for c, r in pairs), len(pairs))

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        """Return each completion's score in log-odds, unbounded in principle, higher = preferred.

        Only differences carry meaning: sigmoid(score(a) - score(b)) is the probability that a is
        preferred to b. A completion's score does not depend on the others.

        Args:
            prompts: Not used, see the class.
            completions: Texts to score.
            **_: The dataset's other columns, not used.

        Returns:
            One float a completion.

        Raises:
            RuntimeError: `fit` was not called.
            ValueError: The lengths differ.
        """
        _check_lengths(prompts=prompts, completions=completions)
        return self._scores(completions)

    def _scores(self, answers: Sequence[str]) -> list[float]:
        if self._weights is None:
            raise RuntimeError(
                "NGramPreference has learned nothing yet: call fit(prompts, chosen, rejected) "
                "on preference pairs of the train split before scoring"
            )
        if not answers:
            return []
        features = self._vectorizer.transform(answers)
        scores = features @ self._weights
        scores[features.getnnz(axis=1) == 0] = self._lowest
        return scores.tolist()


def length_alone(
    train: tuple[Sequence[str], Sequence[str]], held_out: tuple[Sequence[str], Sequence[str]]
) -> Estimate:
    """Return the share of held-out pairs that the answers' lengths tell, what a reward must beat.

    Whether the longer or the shorter answer is guessed is learned from the train pairs.

    Args:
        train: Chosen and rejected answers.
        held_out: Chosen and rejected answers.

    Returns:
        The share in [0, 1] with Wilson's interval, a tie counting as half; NaN without pairs.
    """

    def longer_is_chosen(pairs: tuple[Sequence[str], Sequence[str]]) -> float:
        both = list(zip(*pairs, strict=True))
        return sum((len(c) > len(r)) + 0.5 * (len(c) == len(r)) for c, r in both)

    number = len(held_out[0])
    longer = longer_is_chosen(held_out)
    guess_longer = longer_is_chosen(train) >= len(train[0]) / 2
    return wilson_interval(longer if guess_longer else number - longer, number)


def _check_lengths(**columns: Sequence[str]) -> None:
    if len({len(column) for column in columns.values()}) > 1:
        got = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"give one entry a pair or completion in every column: got {got}")
