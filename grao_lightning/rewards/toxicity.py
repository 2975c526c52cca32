"""How sure a small classifier is that a completion is offensive."""

import importlib.util
from collections.abc import Sequence


class Toxicity:
    """Minus the probability that a completion is offensive, in [-1, 0], higher = cleaner.

    Source: alt-profanity-check (MIT; weights of 0.9 MB inside the package), a linear support vector
    machine on TF-IDF of 15,442 single words, calibrated, trained on 200,000 tweets and
    Wikipedia comments labelled by people.

    It sees insults, swearing and slurs, word by word and in English:

        >>> scores = Toxicity()(["You stupid idiot.", "Thank you for your help."])
        >>> [round(score, 2) for score in scores]
        [-1.0, -0.0]

    It does not see what a sentence says. Praise with a swear word is offensive to it, and so are
    some names of groups of people ("I'm gay and happy": -0.88); contempt in plain words ("You are
    not worth anything, nobody will ever love you": -0.08), dangerous advice and misspelt insults
    are not. On Anthropic HH it agrees with people on 53 % of 1,992 harmless-base pairs (chance: 50;
    where it calls one answer of the two offensive, 8 % of them, on 67 %) and on 50 % of 2,018
    helpful-base pairs. Give it a weight against foul language, and leave harmlessness to a reward
    model or judge.

    A text without content words, such as an empty one, gets the classifier's prior, -0.04: keeping
    silent is clean. A text whose content words it all does not know, such as one in another
    script, cannot be judged: its score is missing.

    Raises:
        ImportError: alt-profanity-check is not installed.
    """

    unit = "probability, negative"
    range = (-1.0, 0.0)

    def __init__(self) -> None:
        if importlib.util.find_spec("profanity_check") is None:
            raise ImportError(
                "Toxicity needs alt-profanity-check: pip install 'grao-lightning[toxicity]'"
            )

    def __call__(self, completions: Sequence[str]) -> list[float | None]:
        """Return one score a completion, in [-1, 0]; None where it knows no content word.

        Args:
            completions: n texts.
        """
        if not completions:
            return []
        from profanity_check import profanity_check as classifier  # reads its weights, once

        words_of = classifier.vectorizer.build_analyzer()
        vocabulary = classifier.vectorizer.vocabulary_
        probabilities = classifier.predict_prob(completions)
        return [
            None if words and vocabulary.keys().isdisjoint(words) else -float(probability)
            for words, probability in zip(map(words_of, completions), probabilities, strict=True)
        ]
