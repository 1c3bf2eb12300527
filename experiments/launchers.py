"""Where the runs of a sweep take place: in processes of this machine, or in jobs of a cluster."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Job(Protocol):
    """A run that was started.

    Attributes:
        log: what it says; the file may not be there yet.
    """

    log: Path

    def status(self) -> int | None:
        """Its exit status; None while it is not over."""
        ...

    def stop(self) -> None:
        """Asks it to save and end."""
        ...


class Launcher(Protocol):
    """Starts runs.

    Attributes:
        places: how many at a time.
    """

    places: int

    def start(self, name: str, arguments: Sequence[str]) -> Job:
        """Starts `python -m ARGUMENTS`.

        Args:
            name: of the run.
            arguments: the module and its arguments.
        """
        ...


class LocalProcesses:
    """Runs in processes of this machine.

    If CUDA_VISIBLE_DEVICES names several GPUs, they are dealt out among the places.

    Args:
        places: runs at a time.
        logs: the folder for what they say.

    Raises:
        ValueError: there are fewer GPUs than places, or no place.
    """

    def __init__(self, places: int, logs: Path):
        if places < 1:
            raise ValueError(f"jobs is {places}: give at least 1")
        self.places = places
        self._logs = logs
        self._gpus = [gpu for gpu in os.environ.get(_GPUS, "").split(",") if gpu]
        if self._gpus and len(self._gpus) < places:
            raise ValueError(
                f"{places} jobs at a time need as many GPUs, {_GPUS} names {len(self._gpus)}: "
                f"pass --jobs={len(self._gpus)}"
            )
        self._jobs: list[_Process | None] = [None] * places

    def start(self, name: str, arguments: Sequence[str]) -> "_Process":
        """See `Launcher`."""
        place = next(
            index for index, job in enumerate(self._jobs) if job is None or job.status() is not None
        )
        environment = dict(os.environ)
        if self._gpus:
            environment[_GPUS] = ",".join(self._gpus[place :: self.places])
        self._logs.mkdir(parents=True, exist_ok=True)
        job = _Process(arguments, self._logs / f"{name}.log", environment)
        self._jobs[place] = job
        return job


class ClusterJobs:
    """Runs as jobs of a cluster, through submitit.

    Args:
        cluster: "slurm", or "local" and "debug" to try it on this machine.
        logs: a folder that this machine and the cluster's share.
        parameters: of a job, such as timeout_min, gpus_per_node, slurm_partition: those of
            submitit's `update_parameters`.

    Raises:
        ValueError: submitit is not installed, or does not know the cluster or a parameter.
    """

    def __init__(self, cluster: str, logs: Path, parameters: Mapping[str, Any]):
        # Its import would configure logging, and close the handlers that there are.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise ValueError("--cluster needs submitit: pip install 'qat_jax[cluster]'") from error
        self.places = sys.maxsize
        self._submitit = submitit
        self._cluster = cluster
        self._logs = logs
        self._parameters = parameters
        with tempfile.TemporaryDirectory() as elsewhere:  # an executor makes its folder
            try:
                self._executor_in(Path(elsewhere))
            except (ValueError, TypeError, NameError, RuntimeError) as error:
                raise ValueError(f"--cluster={cluster}: {error}") from error

    def start(self, name: str, arguments: Sequence[str]) -> "_ClusterJob":
        """See `Launcher`."""
        self._executor.update_parameters(name=name)
        command = [sys.executable, "-m", *arguments]
        function = self._submitit.helpers.CommandFunction(command, cwd=Path.cwd())
        return _ClusterJob(self._executor.submit(function))

    @functools.cached_property
    def _executor(self) -> Any:
        return self._executor_in(self._logs)

    def _executor_in(self, folder: Path) -> Any:
        executor = self._submitit.AutoExecutor(folder=folder, cluster=self._cluster)
        executor.update_parameters(**self._parameters)
        return executor


_GPUS = "CUDA_VISIBLE_DEVICES"


class _Process:
    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]):
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                # A terminal's Ctrl-C is for the sweep, which passes it on.
                start_new_session=True,
            )

    def status(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


class _ClusterJob:
    def __init__(self, job: Any):
        self._job = job
        self.log = Path(job.paths.stdout)

    def status(self) -> int | None:
        if not self._job.done():
            return None
        return 0 if self._job.exception() is None else 1

    def stop(self) -> None:
        self._job.cancel()
