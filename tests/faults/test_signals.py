"""Ranks that are asked to stop, killed or frozen: the same command ends with the weights of a run that nobody disturbed."""

import signal
import time

import pytest
from command_line import call, snapshot, spawn, start, with_fields, write_yaml
from conftest import TINY
from faults.ranks_kit import checkpoints, running, wait_for, weights_of

pytestmark = pytest.mark.slow

LONG = {"pretrain.epochs": 30}  # 305 steps, seconds on two ranks
QUICK = {"SSL_AE_TIMEOUT_SECONDS": "5", "TORCHELASTIC_SHUTDOWN_TIMEOUT": "3"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits) -> str:
    """sha256 of the weights that two ranks make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_AE_TRACKING", "journal")
        folder = tmp_path_factory.mktemp("undisturbed")
        path = write_yaml(folder / "recipe.yaml", with_fields(TINY, {"data.path": str(digits), **LONG}))
        assert spawn("pretrain", path, "--out", folder / "run", "--nproc", 2).code == 0
    return weights_of(folder / "run")


@pytest.fixture
def command(recipe):
    return "pretrain", recipe(LONG), "--nproc", 2


@pytest.fixture
def run(here):
    return here / "runs" / "tiny"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_stop_at_one_step_and_go_on(command, run, undisturbed, number):
    with running(*command, after=lambda: checkpoints(run)) as both:
        both.send(number)
        code, stderr = both.end()
    assert code == 75
    steps = {line.split("stopped after step ")[1].split()[0] for line in stderr.splitlines() if "stopped after step " in line}
    assert len(steps) == 1  # the ranks agreed
    assert "Traceback" not in stderr
    assert f"step-{int(steps.pop()):010d}" in [path.name for path in checkpoints(run)]
    assert spawn(*command).code == 0
    assert weights_of(run) == undisturbed


def test_one_rank_that_is_asked_stops_all(command, run, undisturbed):
    with running(*command, after=lambda: checkpoints(run)) as both:
        both.send(signal.SIGTERM, rank=1)
        code, _ = both.end()
    assert code == 75
    assert spawn(*command).code == 0
    assert weights_of(run) == undisturbed


def test_a_second_interrupt_aborts(command, run, undisturbed):
    with running(*command, after=lambda: checkpoints(run)) as both:
        both.send(signal.SIGSTOP, rank=1)  # so that saving cannot succeed
        both.send(signal.SIGINT)
        time.sleep(0.5)
        both.send(signal.SIGINT)
        both.send(signal.SIGCONT, rank=1)
        code, stderr = both.end()
    assert code == 1, stderr
    assert spawn(*command).code == 0
    assert weights_of(run) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_start_again_when_one_is_killed(command, run, undisturbed, rank):
    with running(*command, "--max-restarts", 1, after=lambda: checkpoints(run)) as both:
        both.send(signal.SIGKILL, rank)
        code, stderr = both.end()
    assert code == 0, stderr
    assert "resuming pretrain at step " in stderr
    assert weights_of(run) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_start_again_when_one_is_frozen(command, run, undisturbed, rank):
    with running(*command, "--max-restarts", 1, after=lambda: checkpoints(run), **QUICK) as both:
        both.send(signal.SIGSTOP, rank)
        code, stderr = both.end()
    assert code == 0, stderr
    assert "another rank is gone, or did not answer for 5 s" in stderr or "no sign of life for 5 s" in stderr
    assert "resuming pretrain at step " in stderr
    assert weights_of(run) == undisturbed


def test_without_restarts_a_killed_rank_ends_the_run(command, run, undisturbed):
    with running(*command, after=lambda: checkpoints(run)) as both:
        both.send(signal.SIGKILL, rank=1)
        code, stderr = both.end()
    assert code == 1
    assert "another rank is gone" in stderr
    assert spawn(*command).code == 0
    assert weights_of(run) == undisturbed


def test_ranks_save_and_leave_when_their_launcher_is_killed(command, run, undisturbed):
    with running(*command, after=lambda: checkpoints(run)) as both:
        both.send(signal.SIGKILL)
        both.process.wait()
        wait_for(lambda: not any(rank.is_running() for rank in both.ranks.values()))
    assert spawn(*command).code == 0
    assert weights_of(run) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_extraction_that_is_asked_to_stop_goes_on(recipe, pretrained, number):
    path = recipe()
    with start("extract", "runs/tiny") as process:
        wait_for(lambda: list(pretrained.glob("latents/*")), process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stderr.splitlines()[-1] == "stopped; what is complete is kept. Run the same command to go on."
    assert "Traceback" not in stderr
    assert call("extract", "runs/tiny").code == 0
    tables = snapshot(pretrained / "latents")
    assert call("pretrain", path, "--out", "again").code == 0
    assert call("extract", "again").code == 0
    assert {name: digest for name, digest in tables.items() if name.endswith(".parquet")} == {
        name: digest
        for name, digest in snapshot(pretrained.parents[1] / "again" / "latents").items()
        if name.endswith(".parquet")
    }
