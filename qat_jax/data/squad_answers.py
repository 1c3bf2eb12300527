"""From the logits of windows to the answers of questions."""

from typing import NamedTuple

import numpy as np

from qat_jax.data.squad_features import SquadFeatures


class RankedAnswer(NamedTuple):
    """A span that may be the answer.

    Attributes:
        text: what it says.
        start: the position of its first character in the context.
        score: the sum of its start's and its end's logit.
        probability: among those ranked with it.
    """

    text: str
    start: int
    score: float
    probability: float


def ranked_answers(
    features: SquadFeatures,
    logits: np.ndarray,
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> dict[str, list[RankedAnswer]]:
    """The best spans of each question over all of its windows, the best first.

    A window's spans start at one of its `n_best` best starts and end at one of its `n_best` best
    ends, in the context, start before end. A span that several windows have counts with its best
    score; BERT's own evaluation takes it only from the window that has most context around its
    start.

    Args:
        features: the windows.
        logits: float [N, L, 2], of start and end; or of fewer tokens, if the rest is padding.
        n_best: see above; also the most spans of a question.
        max_answer_tokens: of a span.

    Returns:
        By question's id; without spans for a question whose context has no token.
    """
    of_context = features.offsets[:, : logits.shape[1], 0] >= 0
    logits = np.where(of_context[..., None], logits, -np.inf)
    kept = min(n_best, logits.shape[1])
    best = np.argpartition(-logits, kept - 1, axis=1)[:, :kept]  # [N, K, 2], in no order
    starts, ends = best[..., 0][:, :, None], best[..., 1][:, None, :]  # [N, K, 1] and [N, 1, K]
    rows = np.arange(len(logits))[:, None, None]
    scores = logits[rows, starts, 0] + logits[rows, ends, 1]
    length = ends - starts + 1
    scores = np.where((length > 0) & (length <= max_answer_tokens), scores, -np.inf)

    found: dict[int, list[tuple[float, int, int]]] = {}
    for row, question in enumerate(features.question_index):
        flat = scores[row].ravel()
        order = np.argsort(-flat, kind="stable")[:n_best]
        for place in order[np.isfinite(flat[order])]:
            start, end = starts[row, place // kept, 0], ends[row, 0, place % kept]
            first, past = features.offsets[row, start, 0], features.offsets[row, end, 1]
            found.setdefault(int(question), []).append((float(flat[place]), first, past))
    return {
        question.id: _ranked(question.context, found.get(index, []), n_best)
        for index, question in enumerate(features.questions)
    }


def best_answers(
    features: SquadFeatures,
    logits: np.ndarray,
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    null_threshold: float | None = None,
) -> dict[str, str]:
    """The answer to each question.

    Args:
        features: the windows.
        logits: as of `ranked_answers`.
        n_best: see `ranked_answers`.
        max_answer_tokens: of an answer.
        null_threshold: for sets where some questions have no answer: it is "" where the least score
            of the [CLS] over the windows exceeds the best span's by more than this. None: every
            question has an answer.

    Returns:
        By question's id; "" where there is none.
    """
    ranked = ranked_answers(features, logits, n_best=n_best, max_answer_tokens=max_answer_tokens)
    answers = {id: spans[0].text if spans else "" for id, spans in ranked.items()}
    if null_threshold is None:
        return answers
    null = np.full(len(features.questions), np.inf)
    np.minimum.at(null, features.question_index, logits[:, 0].sum(-1))
    for index, question in enumerate(features.questions):
        spans = ranked[question.id]
        if spans and null[index] - spans[0].score > null_threshold:
            answers[question.id] = ""
    return answers


def _ranked(context: str, spans: list[tuple[float, int, int]], n_best: int) -> list[RankedAnswer]:
    """The best of the spans, each once though several windows may have it."""
    best: dict[tuple[int, int], float] = {}
    for score, first, past in sorted(spans, reverse=True):
        best.setdefault((first, past), score)
    kept = list(best.items())[:n_best]
    if not kept:
        return []
    weights = np.exp(np.array([score for _, score in kept]) - kept[0][1])
    return [
        RankedAnswer(context[first:past], int(first), score, float(weight))
        for ((first, past), score), weight in zip(kept, weights / weights.sum(), strict=True)
    ]
