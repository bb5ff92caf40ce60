"""Memory that a step has freed is kept for the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorakit.training.allocator import glibc, keeping_freed_memory

PLAIN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MALLOC_") and name not in ("GLIBC_TUNABLES", "LD_PRELOAD")
}

# glibc maps blocks above 32 MiB on their own. Counted are the pages that had to be asked for in the last of some rounds
# in which such blocks were written and freed, and the resident MiB at the end.
SCRIPT = """
import resource, torch
from lorakit.training.allocator import keeping_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20
def asked():
    for i in range(24):
        if i == 16:
            before = faults()
        blocks = [torch.ones(size * 2**18) for size in (36, 40, 44, 48)]
        del blocks
    return faults() - before
usual = asked()
with keeping_freed_memory() as kept:
    within = asked()
    during = resident()
print(kept, usual, within, during, resident())
"""


@pytest.mark.skipif(glibc(PLAIN) is None, reason="another C library than glibc, or another allocator")
def test_pages_are_asked_for_once_and_given_back_at_the_end() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=PLAIN, capture_output=True, text=True, check=True)
    kept, usual, within, during, afterwards = found.stdout.split()
    assert kept == "True"
    assert int(within) < int(usual) / 8
    assert int(afterwards) < int(during) - 100


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, {"LD_PRELOAD": "x.so"}],
)
def test_an_allocator_that_the_user_has_set_up_is_left_alone(variables: dict[str, str]) -> None:
    assert glibc(variables) is None


def test_it_can_be_declined() -> None:
    with keeping_freed_memory(wanted=False) as kept:
        assert not kept
