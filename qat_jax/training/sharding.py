"""Data parallelism over all devices: the batch is split, the state is replicated.

One device is the same code with a mesh of size one.
"""

import dataclasses
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Where the arrays of a data-parallel run live.

    Attributes:
        mesh: all devices along one axis, "data".
    """

    mesh: Mesh

    @classmethod
    def over_all_devices(cls) -> "DataParallel":
        """A mesh over every device that JAX sees."""
        # Auto is stated because JAX's default axis type changed between releases.
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        return cls(mesh)

    @property
    def batch(self) -> NamedSharding:
        """Split along the leading axis."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError unless the devices share a batch of this size equally."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: choose at least 1")
        devices = self.mesh.size
        if batch_size % devices:
            below = batch_size - batch_size % devices
            raise ValueError(
                f"batch_size {batch_size} does not divide over {devices} devices: "
                f"choose a multiple of {devices}, such as {below or devices}"
            )

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Turns this process's part of a batch into global arrays, split along the batch axis."""
        return {
            name: jax.make_array_from_process_local_data(self.batch, array)
            for name, array in batch.items()
        }

    def replicate(self, tree: Tree) -> Tree:
        """Puts a whole copy of every array of `tree` on every device."""
        return jax.device_put(tree, self.replicated)
