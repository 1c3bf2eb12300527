"""Exact match and F1 of answers, as SQuAD's official evaluation defines them.

Of version 2.0, which differs from version 1.1's only where an answer or a prediction is nothing
but articles and punctuation.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from qat_jax.data.squad import Question

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words one space apart.

    Example:
        >>> normalise_answer("The  cat's  (a) hat!")
        'cats hat'
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers after `normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) in map(normalise_answer, answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The largest harmonic mean of precision and recall of words, over the answers.

    An empty prediction is right, and only right, where an answer is empty.

    Example:
        >>> f1("the black cat", ["a cat", "dog"])
        0.6666666666666666
    """
    return max(_f1(normalise_answer(prediction), normalise_answer(each)) for each in answers)


def score(predictions: Mapping[str, str], questions: Sequence[Question]) -> dict[str, float | int]:
    """What a set of predictions is worth.

    Args:
        predictions: the answer by question's id; a question without one counts as 0.
        questions: all that were asked; of those that the text does not answer the answer is "".

    Returns:
        `exact_match` and `f1`, means in [0, 1], and `count`.

    Raises:
        ValueError: there is no question.
    """
    if not questions:
        raise ValueError("there is no question to score: give at least one")
    matches, overlaps = [], []
    for question in questions:
        answers = [answer.text for answer in question.answers if normalise_answer(answer.text)]
        answers = answers or [""]
        prediction = predictions.get(question.id)
        matches.append(0.0 if prediction is None else exact_match(prediction, answers))
        overlaps.append(0.0 if prediction is None else f1(prediction, answers))
    count = len(questions)
    return {"exact_match": sum(matches) / count, "f1": sum(overlaps) / count, "count": count}


def _f1(prediction: str, answer: str) -> float:
    said, right = prediction.split(), answer.split()
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(right)
    return 2 * precision * recall / (precision + recall)
