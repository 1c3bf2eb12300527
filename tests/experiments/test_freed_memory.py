"""Keeping the memory that steps free, seen by what the kernel has to hand out again."""

import os
import platform
import subprocess
import sys

import pytest

from experiments import freed_memory
from experiments.freed_memory import keep_freed_memory, share_left

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from experiments.freed_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory(reserve=0)
x = jnp.ones((4000, 4000))  # 61 MiB: glibc would map it by itself
step = jax.jit(jnp.sin)
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

RESIDENT = """
import os, sys, time
import numpy as np
from experiments.freed_memory import keep_freed_memory

def resident():
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

assert keep_freed_memory(reserve=float(sys.argv[1]))
freed, after = np.ones(300 << 17), np.ones(1000)  # 300 MiB, and something that stays behind them
held = resident()
del freed
deadline = time.monotonic() + (2.5 if sys.argv[1] == "0" else 30)
while time.monotonic() < deadline and held - resident() < 250:
    time.sleep(0.1)
print(held - resident())
"""


def run(program, argument):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library than glibc")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    command = [sys.executable, "-c", program, argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_pages_are_not_asked_for_again_at_every_step():
    assert run(FAULTS, "keep") < 0.4 * run(FAULTS, "leave")


def test_what_is_kept_is_given_back_where_memory_runs_short():
    assert run(RESIDENT, "0") < 10  # MiB that went back
    assert run(RESIDENT, "1.1") > 250


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert not keep_freed_memory()


def test_a_group_above_this_process_may_have_less_left_than_the_machine(monkeypatch, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("control groups are Linux's")
    monkeypatch.setattr(freed_memory, "_CGROUPS", tmp_path / "nothing")
    alone = share_left()
    assert 0 < alone < 1
    monkeypatch.setattr(freed_memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert share_left() == pytest.approx(alone, abs=0.05)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 990\nfile 800\n")
    assert share_left() == pytest.approx(0.01)
