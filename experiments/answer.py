"""Answer a question about a text with a network that `experiments.train` fine-tuned.

Usage:
    python -m experiments.answer --checkpoint=RUN (--context-file=FILE | --context=TEXT) "QUESTION"

RUN is the folder of a finished run of a question-answering config, quantised or not; the network is
used as it was trained. Nothing is downloaded.

Example:
    python -m experiments.answer --checkpoint=runs/squad-4 \
        --context="Paris is the capital of France." "What is the capital of France?"
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from experiments import build, cli, runs, tasks
from experiments.questions import QuestionAnswering
from qat_jax import data
from qat_jax.text_file import read_text
from qat_jax.training.workdir import WorkdirError

_MARGIN = 80  # characters of the context that are shown on each side of the answer


def answer(run: Path, context: str, question: str, n_best: int) -> list[data.RankedAnswer]:
    """The likeliest answers of a trained network, the best first.

    None where the run's `answers.null_threshold` says that the context does not tell.

    Args:
        run: the folder of a finished run.
        context: the text that holds the answer.
        question: what is asked.
        n_best: how many at most.

    Raises:
        cli.UsageError: there is no such run, it is not finished, or of another kind.
    """
    with cli.setup_errors():
        config = runs.finished_config(run)
        task = build.task(config)
        if not isinstance(task, QuestionAnswering):
            raise ValueError(f"{run} is a run of {config.task}: give one of question_answering")
        source = task.windows([data.Question("asked", question, context, ())])
        inputs = tasks.first_inputs(task, source, len(source))
        model = runs.trained_model(config, run, *inputs)
    logits = np.asarray(jax.jit(lambda *inputs: model(*inputs))(*inputs))
    settings = config.answers.to_dict()
    if not data.best_answers(source, logits, **settings)["asked"]:
        return []
    del settings["null_threshold"]
    return data.ranked_answers(source, logits, **settings)["asked"][:n_best]


def show(console: Console, context: str, answers: Sequence[data.RankedAnswer]) -> None:
    """Prints answers, and the best one where it stands."""
    if not answers:
        console.print("no answer: the context does not say")
        return
    for number, ranked in enumerate(answers, start=1):
        # Not markup: a text may have brackets of its own.
        console.print(
            Text.assemble(f"{number}. {ranked.text}  ", (f"{ranked.probability:.0%}", "dim"))
        )
    best = answers[0]
    first, past = max(best.start - _MARGIN, 0), best.start + len(best.text) + _MARGIN
    around = Text(context[first:past].replace("\n", " "))
    around.stylize("bold reverse", best.start - first, best.start - first + len(best.text))
    console.print()
    console.print("…" if first else "", around, "…" if past < len(context) else "", sep="")


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 answered, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=cli.path, required=True, metavar="RUN", help="see above"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--context-file", type=cli.path, help="a text file that holds the answer")
    where.add_argument("--context", help="the text itself")
    parser.add_argument("--n-best", type=int, default=3, help="how many answers to show")
    parser.add_argument("question")
    arguments = parser.parse_args(argv)
    try:
        context = arguments.context
        if context is None:
            with cli.setup_errors():
                context = read_text(arguments.context_file)
        answers = answer(arguments.checkpoint, context, arguments.question, arguments.n_best)
    except (cli.UsageError, WorkdirError) as error:
        return cli.fail(error, cli.WRONG_USAGE)
    show(Console(highlight=False), context, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
