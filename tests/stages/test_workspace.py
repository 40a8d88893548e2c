"""What holds while a stage runs."""

import pytest
import torch

from ssl_ae.stages.workspace import no_denormals


def denormals_there() -> bool:
    """Half of the smallest normal float32 number, 2^-126, is a denormal one."""
    return float(torch.full((3,), 2.0**-126).mul(0.5).sum()) > 0


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot leave denormal numbers out")
def test_denormal_numbers_are_zero_inside_alone():
    assert denormals_there()
    with no_denormals():
        assert not denormals_there()
        with no_denormals():  # a stage inside a stage
            assert not denormals_there()
        assert not denormals_there()
    assert denormals_there()
    with pytest.raises(RuntimeError, match="from inside"), no_denormals():
        raise RuntimeError("from inside")
    assert denormals_there()
