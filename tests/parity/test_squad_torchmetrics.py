"""Exact match and F1 against torchmetrics."""

import numpy as np
import pytest

from qat_jax.data import read_questions, score

torchmetrics = pytest.importorskip("torchmetrics")


def test_scores_of_perturbed_answers(shared_data):
    from torchmetrics.text import SQuAD

    path = shared_data / "squad" / "squad-v1.1-small-eval.json.xz"
    if not path.is_file():
        pytest.skip(f"no questions at {path}")
    questions = read_questions(path)
    rng = np.random.default_rng(0)
    changes = [
        lambda text: text,
        lambda text: text[: len(text) // 2],
        lambda text: f"the {text.upper()}!",
        lambda text: f"  an {text}, a",
        lambda text: "",
        lambda text: questions[rng.integers(len(questions))].answers[0].text,
        lambda text: f"{text} of {questions[rng.integers(len(questions))].answers[0].text}",
    ]
    predictions = {
        question.id: changes[rng.integers(len(changes))](
            question.answers[rng.integers(len(question.answers))].text
        )
        for question in questions
    }
    theirs = SQuAD()(
        [{"id": name, "prediction_text": text} for name, text in predictions.items()],
        [
            {
                "id": question.id,
                "answers": {
                    "text": [answer.text for answer in question.answers],
                    "answer_start": [answer.start for answer in question.answers],
                },
            }
            for question in questions
        ],
    )
    ours = score(predictions, questions)
    assert 100 * ours["exact_match"] == pytest.approx(float(theirs["exact_match"]), abs=1e-4)
    assert 100 * ours["f1"] == pytest.approx(float(theirs["f1"]), abs=1e-4)
    assert 0.2 < ours["exact_match"] < 0.8
