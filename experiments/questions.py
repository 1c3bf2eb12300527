"""Questions whose answers are spans of a text, as a config describes them."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import tasks
from qat_jax import data
from qat_jax.data.pipeline import Augment
from qat_jax.models import find_pretrained
from qat_jax.training.evaluation import Metrics, predict
from qat_jax.training.objective import SpanExtraction
from qat_jax.training.sharding import Placement
from qat_jax.training.state import GraphDefs, TrainState
from qat_jax.training.step import make_predict_step


@dataclasses.dataclass(frozen=True)
class QuestionAnswering:
    """SQuAD: questions, their contexts, and the spans that answer them.

    Attributes:
        config: with sections `dataset` and `model`.

    Raises:
        ValueError: bad settings of how batches are made. Of its methods: `DataError` where there
            are no such questions or no vocabulary, ValueError where the model cannot read them.
    """

    config: ConfigDict
    fields = data.QUESTION_FIELDS
    headline = "f1"
    objective = SpanExtraction()

    def __post_init__(self) -> None:
        # Bad settings are told before anything is read.
        tasks.check_reading(self.config.dataset)
        self.bucketing  # noqa: B018

    @property
    def num_threads(self) -> int:
        """See `tasks.Task`."""
        return self.config.dataset.get("num_threads", 1)

    @property
    def bucketing(self) -> data.Bucketing | None:
        """See `tasks.Task`."""
        settings = self.config.dataset.get("bucketing")
        if settings is None:  # a run from before there was such a setting
            return None
        multiple, batches = settings.multiple, settings.batches
        return None if (multiple, batches) == (0, 1) else data.Bucketing(multiple, batches)

    def train_source(self) -> tuple[Any, Augment | None]:
        """See `tasks.Task`."""
        return self._source(self.config.dataset.train_split), None

    def calibration_source(self) -> Any:
        """See `tasks.Task`."""
        return self._source(self.config.dataset.train_split)

    def test_source(self) -> Any:
        """See `tasks.Task`."""
        return self._source(self.config.dataset.test_split)

    def validation_source(self) -> Any:
        """See `tasks.Task`."""
        train, split = self.config.dataset.train_split, self.config.dataset.validation_split
        if split is None:
            return None
        source = self._source(split)
        if train is not None and not set(source.questions).isdisjoint(self._training_questions):
            raise ValueError(tasks.not_held_out(train, split))
        return source

    def held(self, source: data.SquadFeatures) -> data.SquadFeatures:
        """The source, which is in memory."""
        return source

    def judge(self, graphdefs: GraphDefs, devices: Placement) -> tasks.Judge:
        """See `tasks.Task`; exact match and F1 of questions, the loss of windows."""
        step = make_predict_step(graphdefs, objective=self.objective, placement=devices)
        answers = self.config.answers.to_dict()

        def judge(state: TrainState, source: data.SquadFeatures) -> Metrics:
            if self.bucketing is not None:
                source = source.by_length()
            batches = tasks.eval_batches(self, source, self.config.batch_size)
            logits, loss = predict(step, state, batches, devices)
            predictions = data.best_answers(source, logits, **answers)
            return {"loss": loss, **data.score(predictions, source.questions)}

        return judge

    def _source(self, split: str) -> data.SquadFeatures:
        if split is None:
            raise ValueError(
                "name the questions: --config.dataset.test_split=NAME, and "
                "--config.dataset.train_split=NAME to train or calibrate on"
            )
        if split == self.config.dataset.train_split:
            return self.windows(self._training_questions)
        return self.windows(self._questions(split))

    def _questions(self, split: str) -> list[data.Question]:
        dataset = self.config.dataset
        return data.load_questions(dataset.name, split, dataset.data_dir)

    @functools.cached_property
    def _training_questions(self) -> list[data.Question]:
        return self._questions(self.config.dataset.train_split)

    def windows(self, questions: Sequence[data.Question]) -> data.SquadFeatures:
        """Questions as the model reads them.

        Raises:
            DataError: there is no vocabulary.
            ValueError: the model has fewer positions or tokens, or windows no room for a context.
        """
        dataset, size = self.config.dataset, self.config.model.size
        # JAX clamps a number that is out of a table's range, and says nothing.
        if dataset.length > size.positions:
            raise ValueError(
                f"windows of {dataset.length} tokens do not fit into the model's {size.positions} "
                f"positions: pass --config.dataset.length={size.positions} or less"
            )
        settings = {name: dataset[name] for name in ("length", "stride", "max_question_length")}
        if size.token_types < 2:
            raise ValueError(
                "a question and its context are of two types: pass "
                "--config.model.size.token_types=2"
            )
        wordpiece = data.WordPiece(self._vocabulary(), lowercase=dataset.lowercase)
        if wordpiece.size > size.vocabulary:
            raise ValueError(
                f"the vocabulary has {wordpiece.size} tokens and the model {size.vocabulary}: pass "
                f"--config.model.size.vocabulary={wordpiece.size}, or another dataset.vocabulary"
            )
        if dataset.cache_dir is None:
            return data.make_features(questions, wordpiece, **settings)
        return data.cached_features(questions, wordpiece, dataset.cache_dir, **settings)

    def _vocabulary(self) -> Path:
        """The file of tokens that is named, or that of the network that is."""
        named = self.config.dataset.vocabulary or self.config.model.pretrained
        if named is None:
            raise ValueError("name the tokens: --config.dataset.vocabulary=FILE")
        if Path(named).suffix == ".txt":
            return Path(named)
        vocabulary = find_pretrained(named).vocabulary
        if vocabulary is None:
            raise ValueError(
                f"there is no vocab.txt beside {named}: name the tokens, "
                "--config.dataset.vocabulary=FILE"
            )
        return vocabulary
