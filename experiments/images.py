"""Images and their classes, as a config describes them."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import tasks
from qat_jax import data
from qat_jax.data.pipeline import IMAGE_FIELDS, Augment
from qat_jax.training.evaluation import evaluate
from qat_jax.training.objective import Classification, Normalisation
from qat_jax.training.sharding import Placement
from qat_jax.training.state import GraphDefs
from qat_jax.training.step import make_eval_step

FAKE_IMAGES = 1024


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """Images and their classes.

    Attributes:
        config: with sections `dataset` and `model`.

    Raises:
        ValueError: the config asks for something that cannot be. Of its methods: `DataError` where
            there are no such images, ValueError where the model expects other ones.
    """

    config: ConfigDict
    fields = IMAGE_FIELDS
    headline = "accuracy"
    bucketing = None

    def __post_init__(self) -> None:
        self.objective  # noqa: B018 - bad settings are told before anything is read

    @property
    def objective(self) -> Classification:
        """Cross-entropy, with the recipe's label smoothing."""
        return Classification(self._normalise, self.config.get("label_smoothing", 0.0))

    def train_source(self) -> tuple[Any, Augment | None]:
        """See `tasks.Task`."""
        dataset = self.config.dataset
        source = self._source(dataset.train_split)
        match dataset.augment:
            case "none":
                return self._prepared(source), None
            case "crop_flip":
                return self._prepared(source), data.random_crop_flip
            case "resized_crop_flip":
                if dataset.get("size") is None:
                    raise ValueError("dataset.augment 'resized_crop_flip' needs dataset.size")
                return source, data.RandomResizedCrop(dataset.size)
        raise ValueError(
            f"unknown dataset.augment {dataset.augment!r}: "
            "choose one of none, crop_flip, resized_crop_flip"
        )

    def calibration_source(self) -> Any:
        """See `tasks.Task`."""
        return self._prepared(self._source(self.config.dataset.train_split))

    def test_source(self) -> Any:
        """See `tasks.Task`."""
        return self._prepared(self._source(self.config.dataset.test_split))

    def validation_source(self) -> Any:
        """See `tasks.Task`."""
        split = self.config.dataset.validation_split
        return None if split is None else self._prepared(self._source(split))

    def held(self, source: Any) -> Any:
        """The images decoded, in memory."""
        return [source[i] for i in range(len(source))]

    def judge(self, graphdefs: GraphDefs, devices: Placement) -> tasks.Judge:
        """See `tasks.Task`."""
        # Without the smoothing, which is a device of training.
        objective = Classification(self._normalise)
        eval_step = make_eval_step(graphdefs, objective=objective, placement=devices)
        batch_size = self.config.batch_size
        return lambda state, source: evaluate(
            eval_step, state, tasks.eval_batches(self, source, batch_size), devices
        )

    @property
    def _normalise(self) -> Normalisation:
        return Normalisation(self.config.dataset.mean, self.config.dataset.std)

    def _prepared(self, source: Any) -> Any:
        """Cropped to `dataset.size`, if the config has one."""
        dataset = self.config.dataset
        if dataset.get("size") is None:
            return source
        crop = data.CentreCrop(dataset.size, dataset.resize, dataset.get("tensorflow", False))
        return data.PreparedSource(source, crop)

    def _source(self, split: str) -> Any:
        dataset, model = self.config.dataset, self.config.model
        if dataset.name == "image_folder":
            if dataset.data_dir is None or split is None:
                raise ValueError(
                    "name the images: --config.dataset.data_dir=DIR "
                    "--config.dataset.test_split=NAME, and --config.dataset.train_split=NAME to "
                    "calibrate; a folder or zip file each"
                )
            examples: Any = data.ImageFolder(Path(dataset.data_dir) / split)
        elif dataset.name == "fake":
            examples = data.FakeImages(
                dataset.get("fake_examples", FAKE_IMAGES),
                size=dataset.size,
                channels=model.in_channels,
                num_classes=model.num_classes,
            )
        else:
            examples = data.load_source(dataset.name, split, dataset.data_dir)
        channels = examples[0]["image"].shape[-1]
        if model.in_channels != channels:
            raise ValueError(
                f"the images of {dataset.name} have {channels} channels: "
                f"pass --config.model.in_channels={channels}"
            )
        for name in ("mean", "std"):
            if len(dataset[name]) not in (1, channels):
                raise ValueError(f"dataset.{name} needs one number for each of {channels} channels")
        return data.InMemory(examples) if dataset.get("in_memory", False) else examples
