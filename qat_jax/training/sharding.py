"""Where arrays live: batches split over all devices, the state whole on each or split over some.

One device is the same code with a mesh of size one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run live.

    A batch is split over all devices. Kernels, and what the optimiser keeps of them, are split over
    each group of "fsdp" devices ("fully sharded data parallel", Rajbhandari et al.,
    arXiv:1910.02054): a step gathers them, and the memory for them falls with the size of the
    group.

    Attributes:
        mesh: all devices along the axes "data" and "fsdp".
    """

    mesh: Mesh

    @classmethod
    def over_all_devices(cls, fsdp: int = 1) -> "Placement":
        """A mesh over every device that JAX sees.

        Args:
            fsdp: devices that share a copy of the state; 1 gives each a whole one.

        Raises:
            ValueError: groups of that size do not fill the devices.
        """
        return cls.over(jax.devices(), fsdp)

    @classmethod
    def over(cls, devices: Sequence[jax.Device], fsdp: int = 1) -> "Placement":
        """A mesh over some devices; otherwise as `over_all_devices`."""
        count = len(devices)
        if fsdp < 1 or count % fsdp:
            raise ValueError(
                f"fsdp {fsdp} does not divide the {count} devices: choose one that does"
            )
        # Auto is stated because JAX's default axis type changed between releases.
        kinds = (AxisType.Auto,) * 2
        shape = (count // fsdp, fsdp)
        return cls(jax.make_mesh(shape, ("data", "fsdp"), kinds, devices=devices))

    @property
    def batch(self) -> NamedSharding:
        """Split along the leading axis."""
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check_batch_size(self, batch_size: int, accumulate: int = 1) -> None:
        """Checks that the devices can share a batch equally.

        Args:
            batch_size: its examples.
            accumulate: parts of it that are shared one after the other.

        Raises:
            ValueError: they cannot.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: choose at least 1")
        devices = self.mesh.size
        shares = devices * accumulate
        if batch_size % shares:
            below = batch_size - batch_size % shares
            reason = "" if accumulate == 1 else f" (devices times accumulate {accumulate})"
            raise ValueError(
                f"batch_size {batch_size} does not divide over {devices} devices: "
                f"choose a multiple of {shares}{reason}, such as {below or shares}"
            )

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Turns this process's part of a batch into global arrays, split along the batch axis."""
        return {
            name: jax.make_array_from_process_local_data(self.batch, array)
            for name, array in batch.items()
        }

    def shard_state(self, state: Tree) -> Tree:
        """Puts every array of a state where it lives."""
        return jax.device_put(state, self.of_state(state))

    def keep_state(self, state: Tree) -> Tree:
        """Inside a jitted function: says that every array of a state stays where it lives."""
        return lax.with_sharding_constraint(state, self.of_state(state))

    def gather(self, tree: Tree) -> Tree:
        """Inside a jitted function: a whole copy of every array on every device."""
        return lax.with_sharding_constraint(tree, self.replicated)

    def of_state(self, state: Any) -> Any:
        """The sharding of every array of a state.

        Arrays of two dimensions or more are split along the longest axis that the devices of a
        group share equally, if there is one; biases, statistics and counts are too small to.
        """
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), state)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        group = self.mesh.shape["fsdp"]
        divisible = [axis for axis, size in enumerate(shape) if size % group == 0]
        if group == 1 or len(shape) < 2 or not divisible:
            return PartitionSpec()
        longest = max(divisible, key=lambda axis: shape[axis])
        return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(longest + 1)))
