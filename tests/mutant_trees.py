"""Copies of the checkout in which code may be broken, built and tested: what ``mutants.py`` works with."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # asked once: two threads that ask first get None

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "out")
TIMEOUT_S = 300  # tests that take longer hang
SEED = "1"  # of the tests' inputs: whether a mutant is noticed must not depend on the run

# Half of a small test's time is torch's import. A server imports it once and forks a process for each mutant.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["numpy", "torch", "pytest"]  # triton reads TRITON_INTERPRET when it is imported


class Tested(NamedTuple):
    """Of a run of pytest."""

    status: int
    said: str


def run_pytest(folder: str, environment: dict[str, str], log: str, arguments: tuple[str, ...]) -> None:
    """As ``python -m pytest`` in ``folder``; for a process of its own, which nothing of the package was imported in."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = True
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "tests")))]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import pytest

    status = pytest.main(list(arguments))
    sys.stdout.flush()
    os._exit(status)


class Tree:
    """A copy of the checkout, with its extension, in which code may be broken."""

    def __init__(self, folder: Path, cuda: bool) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLOWFAST_TEST_SEED": SEED,
            "SLOWFAST_CUDA": str(int(cuda)),
            "PYTHONPATH": str(folder),
            # A change within a second that keeps a file's size would be taken for the code compiled before.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)

        self.extension = folder / "slowfast_kernels" / f"_C{EXT_SUFFIX}"

    @contextmanager
    def changed(self, file: str, old: str, new: str) -> Iterator[None]:
        """In this block ``file`` has ``new`` in place of ``old``."""
        path = self.folder / file
        text, stat = path.read_text(), path.stat()
        path.write_text(text.replace(old, new))
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def build(self) -> str:
        """The extension of the sources as they are; returns what the compiler said if it fails."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        return (done.stdout + done.stderr)[-2000:] if done.returncode else ""

    def test(self, arguments: tuple[str, ...], *options: str, **environment: str) -> Tested | None:
        """What pytest says of these tests; None if it does not end in time."""
        said = self.folder.parent / f"{self.folder.name}.log"
        said.write_text("")  # what an earlier run said is not this one's
        quiet = ("-q", "-p", "no:cacheprovider", "--no-header", "-rfE")
        process = PROCESSES.Process(
            target=run_pytest,
            args=(str(self.folder), self.environment | environment, str(said), (*quiet, *options, *arguments)),
        )
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return None
        return Tested(process.exitcode, said.read_text(errors="replace"))


class NativeTree(Tree):
    """A tree with a build folder of the unbroken code, to which it goes back after each mutant."""

    def __init__(self, folder: Path, cuda: bool) -> None:
        super().__init__(folder, cuda)
        if problem := self.build():
            raise SystemExit(f"the unbroken tree does not build:\n{problem}")
        self.built, self.kept = folder / "build", folder.parent / f"{folder.name}-build"
        shutil.copytree(self.built, self.kept)
        self.unbroken = self.extension.read_bytes()

    def restore(self) -> None:
        """Objects and extension of the unbroken code; ninja goes by times, and sources have got theirs back."""
        shutil.rmtree(self.built)
        shutil.copytree(self.kept, self.built)
        self.extension.write_bytes(self.unbroken)
