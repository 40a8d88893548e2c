"""Memory that a process frees and asks for again."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import torch
from ssl_ae.memory import keep_freed

def pages(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(megabytes * 2**18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed()
pages(29)
print(json.dumps([pages(29), pages(23), pages(29)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the C library decides")
def test_blocks_that_were_freed_are_met_again_without_new_pages():
    """Eight times 29 MiB would be 59,392 pages of 4 KiB, had the system to hand them out each time; some gap may be new."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert all(pages < 59392 / 4 for pages in json.loads(found.stdout))
