"""The part of a training config that says what it runs on."""

from typing import Any

from ml_collections.config_dict import placeholder


def machine_config() -> dict[str, Any]:
    """Where and how the steps run; only `accumulate` can change what comes out."""
    return {
        "accumulate": 1,  # parts of a batch that run one after the other
        "fsdp": 1,  # devices that share a copy of the state
        "hosts": {
            "join": False,  # several processes train together: see docs/launch.md
            "coordinator": placeholder(str),  # HOST:PORT of the first; None: the cluster knows
            "processes": placeholder(int),  # likewise
            "index": placeholder(int),  # likewise
        },
        "profile": False,  # record a trace of steps 6 to 10 in the run folder
    }
