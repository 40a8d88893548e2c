"""Two "machines": network namespaces with a cable between them, which is cut while ranks train."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command_line import with_fields, write_yaml
from conftest import TINY
from faults.ranks_kit import SECONDS, checkpoints, wait_for, weights_of

LONG = {"pretrain.epochs": 30}
NAMES, PORT = ("ssl-ae-a", "ssl-ae-b"), 29_411
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[str]:
    """The interface of the second machine; both have one, and their own loopback."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    with contextlib.ExitStack() as stack:
        try:
            for name in NAMES:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "ssl-ae-0", "netns", NAMES[0], "type", "veth", "peer", "name", "ssl-ae-1", "netns", NAMES[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for k, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"{ADDRESSES[k]}/24", "dev", f"ssl-ae-{k}")
            for interface in ("lo", f"ssl-ae-{k}"):
                ip("-n", name, "link", "set", interface, "up")
            # torch's launcher asks the other machine for its store without a time-out: TCP gives up, after 15 minutes by default
            ip("netns", "exec", name, "sysctl", "-q", "-w", "net.ipv4.tcp_retries2=5")
        yield "ssl-ae-1"


@contextlib.contextmanager
def both(recipe: Path, out: Path) -> Iterator[list[subprocess.Popen]]:
    """`torchrun` on both machines, rank 0 on the first; nothing is left running."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"]
    environment = os.environ | {"SSL_AE_TIMEOUT_SECONDS": "8", "TORCHELASTIC_SHUTDOWN_TIMEOUT": "3"}
    processes = []
    for k, name in enumerate(NAMES):
        meeting = [
            "--rdzv-id",
            "test",
            "--rdzv-conf",
            f"is_host={int(k == 0)},read_timeout=10",
        ]  # the machines have one host name
        words = [*options, *meeting, "--local-addr", ADDRESSES[k], "-m", "ssl_ae", "pretrain", recipe, "--out", out]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *map(str, words)]
        own = environment | {"GLOO_SOCKET_IFNAME": f"ssl-ae-{k}"}
        log = open(out.with_name(f"{out.name}-{k}.log"), "a")  # noqa: SIM115
        processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True))
    try:
        yield processes
    finally:
        for process in processes:
            for child in family(process):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.wait()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(process.pid)
        return [own, *own.children(recursive=True)]
    return []


def log_of(out: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(out.parent.glob(f"{out.name}-*.log")))


def finish(recipe: Path, out: Path) -> None:
    with both(recipe, out) as processes:
        codes = [process.wait(SECONDS) for process in processes]
    assert codes == [0, 0], log_of(out)


@pytest.mark.slow
def test_a_cut_cable_ends_both_machines_and_the_same_command_goes_on(here, digits, cable):
    recipe = write_yaml(here / "recipe.yaml", with_fields(TINY, {"data.path": str(digits), **LONG}))
    finish(recipe, here / "undisturbed")
    run = here / "run"
    with both(recipe, run) as processes:
        wait_for(lambda: checkpoints(run), processes[0])
        started = [each for process in processes for each in family(process)]
        ip("-n", NAMES[1], "link", "set", cable, "down")
        codes = [process.wait(SECONDS) for process in processes]
        orphans = [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert 0 not in codes, log_of(run)
    assert not orphans, log_of(run)
    assert "another rank is gone, or did not answer for 8 s" in log_of(run) or "no sign of life" in log_of(run)  # by where it was
    assert not (run / "pretrain" / "model.safetensors").exists()
    ip("-n", NAMES[1], "link", "set", cable, "up")
    finish(recipe, run)
    assert weights_of(run) == weights_of(here / "undisturbed")
