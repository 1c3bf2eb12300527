"""Images and their classes, as a config describes them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import tasks
from qat_jax import data
from qat_jax.data.pipeline import IMAGE_FIELDS, Augment
from qat_jax.data.sources import class_count, share_examples
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
        # Bad settings are told before anything is read.
        tasks.check_reading(self.config.dataset)
        self.objective  # noqa: B018

    @property
    def objective(self) -> Classification:
        """Cross-entropy, with the recipe's label smoothing."""
        return Classification(self._normalise, self.config.get("label_smoothing", 0.0))

    @property
    def num_threads(self) -> int:
        """See `tasks.Task`."""
        return self.config.dataset.get("num_threads", 1)

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
        train, split = self.config.dataset.train_split, self.config.dataset.validation_split
        if split is None:
            return None
        if train is not None and self._overlap(train, split):
            raise ValueError(tasks.not_held_out(train, split))
        return self._prepared(self._source(split))

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
        examples = self._examples(split)
        first = examples[0]
        if missing := set(self.fields).difference(first):
            raise ValueError(
                f"{dataset.name} is no set of images with labels, it has no {min(missing)}: choose "
                "another --config.dataset.name"
            )
        channels = first["image"].shape[-1]
        if model.in_channels != channels:
            raise ValueError(
                f"the images of {dataset.name} have {channels} channels: "
                f"pass --config.model.in_channels={channels}"
            )
        for name in ("mean", "std"):
            if len(dataset[name]) not in (1, channels):
                raise ValueError(f"dataset.{name} needs one number for each of {channels} channels")
        # JAX clamps or drops a label that is out of range, and says nothing.
        classes = self._class_count(examples)
        if classes is not None and classes > model.num_classes:
            raise ValueError(
                f"the labels of {dataset.name} tell {classes} classes apart and the network "
                f"{model.num_classes}: pass --config.model.num_classes={classes}"
            )
        return data.InMemory(examples) if dataset.get("in_memory", False) else examples

    def _examples(self, split: str) -> Any:
        dataset, model = self.config.dataset, self.config.model
        if dataset.name == "image_folder":
            return self._folder(split)
        if dataset.name == "fake":
            if dataset.get("size") is None:
                raise ValueError(
                    "dataset.name 'fake' needs dataset.size, which this config does not have: take "
                    "one that has it, such as configs/imagenet.py"
                )
            return data.FakeImages(
                dataset.get("fake_examples", FAKE_IMAGES),
                size=dataset.size,
                channels=model.in_channels,
                num_classes=model.num_classes,
            )
        return data.load_source(dataset.name, split, dataset.data_dir)

    def _folder(self, split: str) -> data.ImageFolder:
        """A folder's images, whose classes are those of the training images."""
        dataset, model = self.config.dataset, self.config.model
        if dataset.data_dir is None or split is None:
            raise ValueError(
                "name the images: --config.dataset.data_dir=DIR "
                "--config.dataset.test_split=NAME, and --config.dataset.train_split=NAME to "
                "calibrate; a folder or zip file each"
            )
        if split == dataset.train_split:
            return self._training_folder
        known = None if dataset.train_split is None else self._training_folder.class_names
        images = data.ImageFolder(self._path(split), known)
        if known is None and images.class_names and images.num_classes < model.num_classes:
            raise ValueError(
                f"which of {model.num_classes} classes the {images.num_classes} folders of {split} "
                "are is not known: name them by the classes' numbers, or name the training images, "
                "--config.dataset.train_split"
            )
        return images

    @functools.cached_property
    def _training_folder(self) -> data.ImageFolder:
        return data.ImageFolder(self._path(self.config.dataset.train_split))

    def _path(self, split: str) -> Path:
        return Path(self.config.dataset.data_dir).expanduser() / split

    def _class_count(self, examples: Any) -> int | None:
        """What is known without reading the images."""
        match self.config.dataset.name:
            case "image_folder":
                return examples.num_classes
            case "fake":
                return None
        return class_count(examples)

    def _overlap(self, split: str, other: str) -> bool:
        """Whether two splits are known to have images in common."""
        dataset = self.config.dataset
        match dataset.name:
            case "image_folder":
                ours, theirs = (self._path(each).resolve() for each in (split, other))
                return ours.is_relative_to(theirs) or theirs.is_relative_to(ours)
            case "fake":  # noise, whatever the split
                return False
        opened = (data.load_source(dataset.name, each, dataset.data_dir) for each in (split, other))
        return share_examples(*opened)
