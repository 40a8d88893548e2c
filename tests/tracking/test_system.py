import subprocess
import sys
import time
from types import SimpleNamespace

from ssl_ae.tracking import system


def test_samples_come_at_the_start_each_interval_and_at_the_end(monkeypatch):
    monkeypatch.setattr(system, "INTERVAL_SECONDS", 0.05)
    samples = []
    sampler = system.Sampler(samples.append, rank=3)
    deadline = time.monotonic() + 5
    while len(samples) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    before = len(samples)
    sampler.stop()
    assert before >= 3
    assert len(samples) > before
    names = {"cpu_percent", "memory_mib", "machine_cpu_percent", "machine_memory_percent"}
    assert names <= {name.removeprefix("system/rank-3/") for name in samples[0]}


def test_a_report_that_fails_ends_the_samples_and_nothing_else():
    def full_disk(values):
        raise OSError("No space left on device")

    system.Sampler(full_disk, rank=0).stop()


def test_gpu_memory_is_asked_only_of_a_torch_that_runs_cuda(monkeypatch):
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        memory_allocated=lambda device: (device + 1) * 2**20,
        memory_reserved=lambda device: (device + 1) * 5 * 2**20,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    # 1 + 2 and 5 + 10 MiB on the two devices
    assert system._gpu_memory() == {"gpu_memory_allocated_mib": 3.0, "gpu_memory_reserved_mib": 15.0}
    cuda.is_initialized = lambda: False
    assert system._gpu_memory() == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert system._gpu_memory() == {}


def test_a_process_is_alive_until_it_ends_and_its_number_alone_proves_nothing():
    me = system.this_process()
    assert system.is_alive(me)
    assert not system.is_alive(me | {"started": me["started"] - 100})  # the number was given to somebody else since
    assert system.is_alive(me | {"host": "another", "pid": 1 << 30}) is None  # it cannot be asked
    assert system.is_alive({"pid": 1}) is None
    assert system.is_alive(None) is None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert not system.is_alive(me | {"pid": ended.pid})
