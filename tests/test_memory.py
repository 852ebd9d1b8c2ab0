"""What becomes of the memory that tensors leave: glibc keeps what stands in the heap, and gives back what does not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

WHERE = """
import sys, torch
from llmfit.base_model import load_base_model

def in_heap(megabytes):
    place = torch.empty(megabytes * 2**20, dtype=torch.uint8).data_ptr()
    with open("/proc/self/maps") as maps:
        first, last = next(line.split()[0] for line in maps if "[heap]" in line).split("-")
    return int(first, 16) <= place < int(last, 16)

before = in_heap(20)
load_base_model(sys.argv[1], device="cpu")
print(before, in_heap(28))  # larger than what was freed so far
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")
def test_a_process_that_has_loaded_a_model_keeps_the_memory_of_large_tensors(tiny):
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))
    }
    run = subprocess.run([sys.executable, "-c", WHERE, tiny], env=own, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
