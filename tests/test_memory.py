"""Memory that a process frees and asks for again."""

import ctypes
import json
import subprocess
import sys

import pytest

from ssl_ae.memory import LARGEST, MMAP_THRESHOLD

PROGRAM = """
import json, resource, sys
import torch
from ssl_ae.memory import keep_freed

def pages(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(24):
        torch.empty(megabytes * 2**18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed()
pages(61)
print(json.dumps([pages(61), pages(53), pages(61)]))
"""


def takes_large_blocks() -> bool:
    """Whether this C library keeps a block of 61 MiB when it is told to: glibc does since 2.35. Asked in a process of its own."""
    program = f"import ctypes, sys; sys.exit(not ctypes.CDLL(None).mallopt({MMAP_THRESHOLD}, {LARGEST}))"
    return hasattr(ctypes.CDLL(None), "mallopt") and subprocess.run([sys.executable, "-c", program]).returncode == 0


def new_pages(how: str) -> list[int]:
    """How many pages the system handed out in each turn."""
    found = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not takes_large_blocks(), reason="the C library decides which blocks it keeps")
def test_blocks_that_were_freed_are_met_again_without_new_pages():
    """By itself glibc maps each block of more than 32 MiB anew (mallopt(3), M_MMAP_THRESHOLD); kept, some gap may be new."""
    by_itself, kept = new_pages("by itself"), new_pages("kept")
    assert all(again < anew / 4 for again, anew in zip(kept, by_itself, strict=True)), (kept, by_itself)
