"""Ranks and their devices, as far as one process can tell."""

import pytest

from ssl_ae import distributed
from ssl_ae.errors import RecipeError


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    """`device: auto` with more ranks than GPUs would end in a traceback of CUDA's."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="4 ranks on a machine with 2 GPUs"), distributed.process_group("auto"):
        pass
