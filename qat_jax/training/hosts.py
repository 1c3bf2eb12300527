"""Several processes, one run: how they find each other, who writes, and what they agree on.

One process is the same code without anybody to ask.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from qat_jax.training.sharding import Placement


def join(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None
) -> None:
    """Meet the other processes of the run; comes before anything asks JAX for its devices.

    Without arguments they are found by the cluster that started them, as `jax.distributed` knows
    SLURM, Kubernetes, Open MPI and the pods of TPUs.

    Args:
        coordinator: "HOST:PORT" of the first process, the same for all.
        processes: how many there are.
        index: which this is, from 0.

    Raises:
        ValueError: only a part is given, or no cluster is found and nothing is given.
    """
    given = {"coordinator": coordinator, "processes": processes, "index": index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"hosts.{missing[0]} is missing: give all of {', '.join(given)}, or none")
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot join the other processes ({str(error).splitlines()[0]}): give "
            "hosts.coordinator=HOST:PORT, hosts.processes and hosts.index, or start this under "
            "SLURM, Kubernetes, Open MPI or on a TPU pod"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this process is the whole run."""
    return jax.process_count() == 1


def wait_for_all(name: str) -> None:
    """Go on when every process has come here.

    Args:
        name: of the place, the same for all.
    """
    if not is_alone():
        multihost_utils.sync_global_devices(name)


class Largest:
    """The largest of every process's number, so that all of them act on the same.

    Nobody waits: with several processes, what is returned is the answer to the call before.

    Args:
        devices: of all processes.
    """

    def __init__(self, devices: Placement):
        self._split: NamedSharding = devices.batch
        self._max = jax.jit(lambda numbers: numbers.max(), out_shardings=devices.replicated)
        self._asked: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """The largest number that any process came with, 0 before there is an answer."""
        if is_alone():
            return number
        before = self._asked
        mine = np.full(jax.local_device_count(), number, np.int32)
        self._asked = self._max(jax.make_array_from_process_local_data(self._split, mine))
        return 0 if before is None else int(before)
