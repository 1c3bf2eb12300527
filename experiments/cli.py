"""What all mains share: flags, configs, one-line errors and exit statuses.

A main is `python -m experiments.NAME --config=configs/FILE.py[:ARG] --workdir=DIR
[--config.a.b=value …]` and ends with status 0 only if the work was done.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.logging
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from experiments.freed_memory import keep_freed_memory
from qat_jax.data import DataError
from qat_jax.policy import BLOCK_FORMATS
from qat_jax.policy_file import load_policy, policy_to_yaml
from qat_jax.training.checkpoint import CheckpointError
from qat_jax.training.loop import Interrupted, NonFiniteLossError
from qat_jax.training.workdir import Status, Workdir, WorkdirError

logger = logging.getLogger(__name__)

FAILED = 1
WRONG_USAGE = 2
SIGNAL_BASE = 128  # a shell's status of a command ended by signal n is 128 + n
SIGINT = int(signal.SIGINT)
# How the names of flags begin that change nothing; beside a notation, in `configs/_quant.py`.
_UNUSED_BY_NOTATION = (
    "quant.weight_bits",
    "quant.activation_bits",
    "quant.narrow",
    "quant.edge_bits",
    "quant.edge_clipping",
    "quant.shards",
)
# Of a policy file: what it says itself, in `configs/_quant.py` and `configs/_ptq.py`.
_SAID_BY_POLICY = (
    *_UNUSED_BY_NOTATION,
    "quant.clipping",
    "quant.gradient",
    "quant.edges",
    "quant.vector_size",
    "clipping.",
    "scale.",
)
# Of a block format, in `configs/_ptq.py`.
_SAID_BY_BLOCK_FORMAT = ("quant.vector_size", "clipping.", "scale.")
_PROJECT_LOGGERS = ("qat_jax", "experiments")

Run = Callable[[ConfigDict, Path], dict[str, Any]]


class UsageError(ValueError):
    """What the user asked for cannot be done; the message is one line that names the mend."""


class Terminated(KeyboardInterrupt):
    """What Ctrl-C raises, for another signal.

    Attributes:
        signal_number: its number.
    """

    def __init__(self, signal_number: int):
        super().__init__()
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a command line says.

    Attributes:
        config: the resolved settings, locked.
        workdir: the run folder; it may not exist yet.
    """

    config: ConfigDict
    workdir: Path


def main(
    run: Callable[[ConfigDict, Path], Any],
    usage: str,
    argv: Sequence[str],
    *,
    default_config: str | None = None,
) -> int:
    """Runs one experiment from a command line.

    Args:
        run: does the work, given the resolved config and the run folder.
        usage: what `--help` prints.
        argv: the program's name and its arguments.
        default_config: the config file where `--config` is not given.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n.
    """
    if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
        print(usage.strip())
        return 0

    def work() -> int:
        arguments = parse(argv, default_config=default_config)
        run(arguments.config, arguments.workdir)
        return 0

    return guarded(work)


def guarded(work: Callable[[], int]) -> int:
    """Does the work of a main; what goes wrong becomes one line and an exit status.

    Args:
        work: returns the exit status.

    Returns:
        That of `work`; 1 failed, 2 wrong usage, 128 + n ended by signal n.
    """
    _log_to_stderr()
    keep_freed_memory()
    # Jobs that a script starts in the background ignore SIGINT; asked to stop, a run should save.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return work()
    except (UsageError, WorkdirError, CheckpointError) as error:
        return fail(error, WRONG_USAGE)
    except (NonFiniteLossError, DataError) as error:
        return fail(error, FAILED)
    except Interrupted as error:
        return fail(error, SIGNAL_BASE + error.signal_number)
    except KeyboardInterrupt as error:
        number = error.signal_number if isinstance(error, Terminated) else SIGINT
        return fail("interrupted: run the same command again to go on", SIGNAL_BASE + number)


def path(written: str) -> Path:
    """A path of a command line: shells leave a ~ after = as it is."""
    return Path(written).expanduser()


def with_ending(out: Path, ending: str) -> Path:
    """A path with an ending added: of `lr0.1` nothing is one already."""
    return out.with_name(out.name + ending)


def gathering_main(usage: str, work: Callable[[Path, Path], str]) -> int:
    """A main that makes files of what finished runs left, by the flags --runs and --out.

    Args:
        usage: what `--help` prints.
        work: given the folder above the run folders and the path to write to without a suffix;
            returns what to print.

    Returns:
        The exit status: 0 done, 2 wrong usage, of which argparse exits by itself.
    """
    parser = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=path, required=True, help="the folder above the run folders")
    parser.add_argument("--out", type=path, required=True, help="where to write, without a suffix")
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():
        parser.error(f"--out: there is no folder {arguments.out.parent}: make it first")
    try:
        print(work(arguments.runs, arguments.out))
    except (OSError, WorkdirError) as error:
        return fail(error, WRONG_USAGE)
    return 0


def parse(argv: Sequence[str], *, default_config: str | None = None) -> Arguments:
    """Reads `--config`, its overrides and `--workdir`.

    Args:
        argv: the program's name and its arguments.
        default_config: the config file where `--config` is not given.

    Raises:
        UsageError: anything is wrong with them.
    """
    if default_config is not None and _config_spec(argv) is None:
        argv = [argv[0], f"--config={default_config}", *argv[1:]]
    spec = _config_spec(argv)
    if spec is None:
        raise UsageError(f"give --config=configs/NAME.py; {_known_configs(Path('configs'))}")
    config = _load_config(spec)
    _check_override_names(argv, config)

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=list(argv))
    flags.DEFINE_string("workdir", None, "the run folder", flag_values=values)
    try:
        positional = values(list(argv))[1:]
    except flags.IllegalFlagValueError as error:
        raise UsageError(f"{error}; {_expected_type(error, config)}") from error
    except (flags.Error, TypeError) as error:
        raise UsageError(f"{error}; see --help") from error
    if positional:
        raise UsageError(f"{positional[0]!r} is not a flag: write --config.NAME=VALUE; see --help")
    if not values.workdir:
        raise UsageError("give --workdir=DIR, the folder the run is written to")
    _check_seed(values.config)
    _check_quant(argv, values.config)
    _read_policy(values.config)
    return Arguments(config=values.config, workdir=path(values.workdir))


def require(config: ConfigDict, *keys: str) -> None:
    """Raises UsageError unless the config has all of these sections: else it is another main's."""
    missing = [key for key in keys if key not in config]
    if missing:
        raise UsageError(
            f"this config is not for this main: it has no {', '.join(missing)}; see --help"
        )


def finished(folder: Workdir, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run that is finished already, said so; None where there is work to do.

    Raises:
        WorkdirError: the folder holds something else.
    """
    if folder.status(settings) is not Status.FINISHED:
        return None
    logger.info("%s is finished, nothing to do: see %s", folder.path, folder.result_path)
    return folder.result()


def once(*sections: str) -> Callable[[Run], Run]:
    """Decorates a main's `run`: a folder that is finished is not run again, its result returned.

    The folder is locked while there is work to do.

    Args:
        *sections: what a config of this main has.

    Raises:
        UsageError: the config is another main's.
        WorkdirError: the folder holds something else, or another process works in it.
    """

    def decorate(run: Run) -> Run:
        @functools.wraps(run)
        def unless_finished(config: ConfigDict, workdir: Path) -> dict[str, Any]:
            require(config, *sections)
            folder = Workdir(workdir)
            if (result := finished(folder, config.to_dict())) is not None:
                return result
            with folder.locked():
                return run(config, workdir)

        return unless_finished

    return decorate


@contextlib.contextmanager
def setup_errors() -> Iterator[None]:
    """Turns errors in what a config asks for into `UsageError`.

    For the part of a main that builds things from the config, before anything is written.
    """
    try:
        yield
    except (DataError, ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _read_policy(config: ConfigDict) -> None:
    """Puts a policy's text in the place of its file's name: the file may be changed later."""
    path = config.get("quant", ConfigDict()).get("policy")
    if path:
        with setup_errors():
            config.quant.policy = policy_to_yaml(load_policy(path))


def _config_spec(argv: Sequence[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(r"--?config=(.*)", argument):
            return match[1]
        if argument in ("-config", "--config"):
            return following
    return None


def _load_config(spec: str) -> ConfigDict:
    path = Path(spec.partition(":")[0])
    if not path.is_file():
        raise UsageError(f"config file {path} does not exist; {_known_configs(path.parent)}")
    try:
        config = ConfigFileFlagParser("config").parse(spec)
    except SyntaxError as error:
        raise UsageError(f"{path} is no Python: {error}") from error
    except AttributeError as error:
        if error.name != "get_config":  # a bug in the file
            raise
        raise UsageError(f"{path} is no config: it has no function get_config") from error
    except (TypeError, ValueError) as error:
        # The parser wraps the config's own error in a traceback.
        raise UsageError(f"{spec}: {error.__context__ or error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{spec}: get_config must return a ml_collections.ConfigDict")
    return config


def _known_configs(folder: Path) -> str:
    names = sorted(str(path) for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return f"there are {', '.join(names)}" if names else f"there is no config in {folder}/"


def _check_override_names(argv: Sequence[str], config: ConfigDict) -> None:
    known = list(_keys(config))
    for key in _overridden(argv):
        if key in known:
            continue
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"unknown config key {key!r}: did you mean --config.{nearest}? "
            "(the config file lists them all)"
        )


def _check_seed(config: ConfigDict) -> None:
    if not 0 <= config.get("seed", 0) < 2**32:
        raise UsageError(f"seed is {config.seed}: give 0 to {2**32 - 1}")


def _check_quant(argv: Sequence[str], config: ConfigDict) -> None:
    """Refuses flags that would change nothing, since others say how to quantise."""
    quant = config.get("quant", ConfigDict())
    notation = quant.get("notation")
    said: tuple[str, ...] = ()
    if quant.get("policy"):
        by, said = "quant.policy", _SAID_BY_POLICY
    elif notation in BLOCK_FORMATS:
        by, said = f"quant.notation {notation}", _SAID_BY_BLOCK_FORMAT
    elif notation:
        by, said = f"quant.notation {notation}", _UNUSED_BY_NOTATION
    for key in _overridden(argv):
        if key.startswith(said):
            raise UsageError(f"{key} changes nothing beside {by}: leave one of them out")


def _overridden(argv: Sequence[str]) -> Iterator[str]:
    """The keys that flags set."""
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            yield match[1]


def _expected_type(error: flags.IllegalFlagValueError, config: ConfigDict) -> str:
    match = re.search(r"--config\.([^=]+)=", str(error))
    if match is None:
        return "see --help"
    return f"give {config_path.get_type(match[1], config).__name__}"


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def fail(error: Exception | str, status: int) -> int:
    """Prints one line about what went wrong and returns the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def speak_only_of_errors() -> None:
    """For all processes of a run but the first: what they would say is the same."""
    for name in _PROJECT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _log_to_stderr() -> None:
    """Shows this project's progress and other libraries' warnings."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in _PROJECT_LOGGERS:
        project_logger = logging.getLogger(name)
        project_logger.handlers = [handler]
        project_logger.setLevel(logging.INFO)
        project_logger.propagate = False
