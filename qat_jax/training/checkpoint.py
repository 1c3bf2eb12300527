"""Checkpoints of the whole training state, through Orbax.

A checkpoint appears atomically: a run that dies while writing one goes on from the one before.
"""

import itertools
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qat_jax.training import hosts
from qat_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which and what to do."""


class Checkpoints:
    """The newest few checkpoints of one run.

    Args:
        directory: made on the first save.
        keep: how many to keep.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self._directory = directory.absolute()
        self._keep = keep
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._damaged: list[int] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()

    def save(self, state: TrainState, *, seconds: float) -> None:
        """Writes `state` under its step and removes the oldest beyond `keep`.

        What `restore` passed over as damaged is first renamed to `damaged-STEP-1` and so on.

        Args:
            state: the state after `state.step` updates.
            seconds: time the run has taken so far, over all its parts.

        Raises:
            CheckpointError: the folder holds a later step, which somebody else has written.
        """
        self._set_damaged_aside()
        checkpointer, step = self._open(), int(state.step)
        # Synchronous: the next step donates these very buffers.
        saved = checkpointer.save(step, state, overwrite=True, custom_metadata={"seconds": seconds})
        if not saved:
            raise CheckpointError(
                f"step {step} cannot be saved in {self._directory}, which holds a later one: "
                "move what is later out of that folder"
            )

    def restore(self, like: TrainState) -> tuple[TrainState, float] | None:
        """Reads the newest checkpoint that is whole; damaged ones stay until something is saved.

        Args:
            like: a state of the same model and optimiser; its shapes, dtypes and shardings are
                those of the result.

        Returns:
            The state and the seconds the run had taken; None where there is no checkpoint.

        Raises:
            CheckpointError: the checkpoint is of another model or optimiser, or none is readable.
        """
        if not self._directory.is_dir():
            return None
        checkpointer = self._open()
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps:
            return None
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        self._damaged = []
        for step in reversed(steps):
            try:
                metadata = checkpointer.metadata(step)
                if metadata.metadata is None:
                    raise OSError("its description cannot be read")
                self._check_same_tree(metadata.metadata, abstract, step)
                state = checkpointer.load(step, abstract)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax raises many kinds for a damaged folder.
                logger.warning("checkpoint %d is damaged, trying an older one: %s", step, error)
                self._damaged.append(step)
                continue
            return state, float((metadata.custom_metadata or {}).get("seconds", 0.0))
        raise CheckpointError(
            f"no readable checkpoint in {self._directory}: remove that folder to start again"
        )

    def _open(self) -> ocp.training.Checkpointer:
        if self._checkpointer is None:
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _set_damaged_aside(self) -> None:
        """Orbax saves no step below the newest that it finds, damaged or not."""
        if not self._damaged:
            return
        if hosts.is_first():
            for step in self._damaged:
                names = (self._directory / f"damaged-{step}-{n}" for n in itertools.count(1))
                aside = next(path for path in names if not path.exists())
                (self._directory / str(step)).rename(aside)
                logger.warning("checkpoint %d, which is damaged, is now %s", step, aside)
        hosts.wait_for_all("damaged checkpoints are set aside")
        self._open().reload()
        self._damaged = []

    def _check_same_tree(self, saved: Any, expected: Any, step: int) -> None:
        difference = _first_difference(_signature(saved), _signature(expected))
        if difference:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} is of another model or "
                f"optimiser: {difference}; use another --workdir or the settings it was made with"
            )


def _signature(tree: Any) -> dict[str, str]:
    """The shape and dtype of every array by its path, container types left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {_path_name(path): _stored_form(leaf) for path, leaf in leaves}
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _stored_form(leaf: Any) -> Any:
    """PRNG keys are stored as the integers they are made of."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf


def _path_name(path: tuple[Any, ...]) -> str:
    # A container of the saved tree may come back as another kind: compare the names alone.
    return "/".join(
        str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))
        for entry in path
    )


def _first_difference(saved: dict[str, str], expected: dict[str, str]) -> str | None:
    for path in sorted(saved.keys() | expected.keys()):
        there, here = saved.get(path, "nothing"), expected.get(path, "nothing")
        if there != here:
            return f"{path} is {there} there and {here} here"
    return None
