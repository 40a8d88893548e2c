"""The command line under test: in this process for speed, or as a process of its own."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml

from ssl_ae.cli import main


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict:
        """The one line that `--json` promises."""
        assert self.code == 0, self.stderr
        (line,) = self.stdout.splitlines()
        return json.loads(line, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def call(*words: object) -> Answer:
    """`ssl-ae WORDS` in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    arguments = ["ssl-ae", *map(str, words)]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), mock.patch.object(sys, "argv", arguments):
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
    return Answer(code, stdout.getvalue(), stderr.getvalue())


def start(*words: object, launcher: tuple[str, ...] = ("-m", "ssl_ae"), **environment: str) -> subprocess.Popen:
    """`python -m ssl_ae WORDS` in the current folder, running."""
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def spawn(*words: object, launcher: tuple[str, ...] = ("-m", "ssl_ae"), **environment: str) -> Answer:
    """`python -m ssl_ae WORDS` in the current folder, to its end."""
    with start(*words, launcher=launcher, **environment) as process:
        stdout, stderr = process.communicate(timeout=240)
    return Answer(process.returncode, stdout, stderr)


def write_yaml(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def with_fields(tree: dict, fields: dict[str, object]) -> dict:
    """A deep copy of `tree` with fields replaced, named as `--set` names them; None removes one."""
    copy = yaml.safe_load(yaml.safe_dump(tree))
    for name, value in fields.items():
        *parents, last = name.split(".")
        node = copy
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(last)
        else:
            node[last] = value
    return copy


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder with the sha256 of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(*words: object, by=call) -> str:
    """The message of a command that must refuse its input and leave the current folder as it is."""
    before = snapshot(Path.cwd())
    answer = by(*words)
    assert answer.code == 2, answer
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("error:") == 1
    assert "Traceback" not in answer.stderr
    assert snapshot(Path.cwd()) == before
    return answer.stderr.removeprefix("error: ").rstrip("\n")


def one_line(*words: object) -> str:
    message = refused(*words)
    assert "\n" not in message
    return message
