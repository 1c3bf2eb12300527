"""Keeping the memory that steps free, seen by what the kernel has to hand out again."""

import os
import platform
import subprocess
import sys

import pytest

from experiments.freed_memory import keep_freed_memory

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from experiments.freed_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
x = jnp.ones((4000, 4000))  # 61 MiB: glibc would map it by itself
step = jax.jit(jnp.sin)
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_pages_are_not_asked_for_again_at_every_step():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library than glibc")
    assert page_faults("keep") < 0.4 * page_faults("leave")


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert not keep_freed_memory()
