"""Breaks the code on purpose, one line at a time, in a copy of the tree, and says which changes no test notices.

    python tests/mutants.py                      the list of mutants_cpu.txt; some 15 minutes with 2 workers
    python tests/mutants.py --only vision        those whose file, tests or description hold the text
    python tests/mutants.py --check              only whether each old text is still found exactly once
    python tests/mutants.py --cuda --build DIR   builds the extensions of mutants_cuda.txt (nvcc, no GPU needed)
    python tests/mutants.py --cuda --run DIR     and runs them, on a GPU machine to which the checkout and DIR came

Exit status 1 if a mutant survives, if its tests do not run or fail without it too, or if the list does not fit the
tree. A list's format is described at the top of mutants_cpu.txt. Mutants of C++ are built with ninja, which compiles
what changed; one worker has a build folder for them.
"""

from __future__ import annotations

import argparse
import gzip
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LISTS = {"cpu": ROOT / "tests" / "mutants_cpu.txt", "cuda": ROOT / "tests" / "mutants_cuda.txt"}
LEFT_OUT = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "out")
TIMEOUT_S = 300  # a mutant whose tests take longer hangs, and is noticed by that
SEED = "1"  # of the tests' inputs: whether a mutant is noticed must not depend on the run


# ------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Mutant:
    """One change: ``old``, which ``file`` holds exactly once, becomes ``new``, and one of ``tests`` should fail."""

    file: str
    tests: tuple[str, ...]  # pytest's arguments
    environment: tuple[tuple[str, str], ...]
    breaks: str
    old: str
    new: str

    @property
    def is_native(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.endswith(".py")

    @property
    def name(self) -> str:
        """As a file name."""
        return re.sub(r"\W+", "-", f"{Path(self.file).with_suffix('')}-{self.breaks}".lower())[:150]

    def problem(self, text: str) -> str:
        """Why this change cannot be made to ``text``, or nothing."""
        count = text.count(self.old)
        return "" if count == 1 else f"{self.file}: {self.old!r} is found {count} times, want once ({self.breaks})"


def read_list(path: Path) -> list[Mutant]:
    """The mutants of a list, in its order."""
    mutants: list[Mutant] = []
    file, section_tests, tests, breaks = "", "", "", ""
    lines: dict[str, list[str]] = {"-": [], "+": []}

    def finish() -> None:
        if breaks:
            words = shlex.split(tests)
            settings = tuple(tuple(word.split("=")) for word in words if re.match("[A-Z_]+=", word))
            arguments = [word for word in words if not re.match("[A-Z_]+=", word)]
            arguments = tuple(f"tests/{word}" if word.startswith("test_") else word for word in arguments)
            mutants.append(Mutant(file, arguments, settings, breaks, *("\n".join(lines[sign]) for sign in "-+")))

    for line in path.read_text().splitlines():
        if line.startswith(("- ", "+ ")):
            lines[line[0]].append(line[2:])
            continue
        if line.startswith("@ "):
            tests = line[2:]
            continue
        if line.startswith("#") or not line:
            continue
        finish()
        breaks, lines = "", {"-": [], "+": []}
        if line.startswith("== "):
            file, _, section_tests = (part.strip() for part in line[3:].partition("|"))
        else:
            breaks, tests = line, section_tests
    finish()
    return mutants


def unfit(mutants: list[Mutant]) -> list[str]:
    """What keeps the list from fitting the tree, a line each."""
    lines = []
    for mutant in mutants:
        path = ROOT / mutant.file
        lines.append(mutant.problem(path.read_text()) if path.is_file() else f"{mutant.file}: no such file")
        files = [word.partition("::")[0] for word in mutant.tests if word.startswith("tests/")]
        lines += [f"{name}: no such tests ({mutant.breaks})" for name in files if not (ROOT / name).is_file()]
        if not files or mutant.old == mutant.new:
            lines.append(f"{mutant.file}: no tests, or no change ({mutant.breaks})")
    names = [mutant.name for mutant in mutants]
    lines += [f"{name}: is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    return list(filter(None, lines))


# ------------------------------------------------------------------------------------------------- a copy

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

    @property
    def extension(self) -> Path:
        found = sorted((self.folder / "slowfast_kernels").glob("_C.*.so"))
        if not found:
            raise SystemExit("the extension is not built: python setup.py build_ext --inplace")
        return found[0]

    @contextmanager
    def broken_by(self, mutant: Mutant) -> Iterator[None]:
        path = self.folder / mutant.file
        text, stat = path.read_text(), path.stat()
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def build(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **options)

    def test(self, arguments: tuple[str, ...], *options: str, **environment: str) -> Tested | None:
        """What pytest says of these tests; None if it does not end in time."""
        said = self.folder.parent / f"{self.folder.name}.log"
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
        done = self.build()
        if done.returncode:
            raise SystemExit(f"the unbroken tree does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        self.built, self.kept = folder / "build", folder.parent / f"{folder.name}-build"
        shutil.copytree(self.built, self.kept)
        self.unbroken = self.extension.read_bytes()

    @contextmanager
    def broken_by(self, mutant: Mutant) -> Iterator[None]:
        try:
            with super().broken_by(mutant):
                yield
        finally:
            if mutant.is_native:  # ninja goes by times, so sources and objects get their old ones back
                shutil.rmtree(self.built)
                shutil.copytree(self.kept, self.built)
                self.extension.write_bytes(self.unbroken)


# ------------------------------------------------------------------------------------------------- running


FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.+?)(?: - .*)?$", re.MULTILINE)
NOTICED = ("killed", "hangs", "crashes")


@dataclass
class Outcome:
    """What became of a mutant: "killed" by the test in ``detail``, "hangs", "crashes"; or "survived"; or "unclear"."""

    mutant: Mutant
    what: str
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        at = f"{self.mutant.file}: {self.mutant.breaks}"
        return f"{self.what:<9}{self.seconds:5.0f} s  {at}" + (f"\n{'':18}{self.detail}" if self.detail else "")


def judged(mutant: Mutant, tree: Tree) -> Outcome:
    """Of a tree that is broken and built."""
    done = tree.test(mutant.tests, "-x", **dict(mutant.environment))
    if done is None:
        return Outcome(mutant, "hangs")
    if done.status == 0:
        some = re.search(r"\d+ passed", done.said)
        return Outcome(mutant, "survived") if some else Outcome(mutant, "unclear", "every test was skipped")
    if done.status < 0:
        return Outcome(mutant, "crashes")
    failed = FAILED.search(done.said)
    return Outcome(mutant, "killed", failed[1]) if failed else Outcome(mutant, "unclear", done.said[-800:])


def run_one(mutant: Mutant, tree: Tree, extensions: Path | None) -> Outcome:
    start = time.monotonic()
    with tree.broken_by(mutant):
        if mutant.is_native and extensions is not None:
            tree.extension.write_bytes(gzip.decompress((extensions / f"{mutant.name}.gz").read_bytes()))
        elif mutant.is_native:
            done = tree.build()
            if done.returncode:
                return Outcome(mutant, "unclear", f"does not build: {(done.stdout + done.stderr)[-800:]}")
        outcome = judged(mutant, tree)
    if mutant.is_native and extensions is not None:
        tree.extension.write_bytes(gzip.decompress((extensions / "unbroken.gz").read_bytes()))
    outcome.seconds = time.monotonic() - start
    return outcome


def run_all(mutants: list[Mutant], folder: Path, workers: int, cuda: bool, extensions: Path | None) -> list[Outcome]:
    """Every mutant in one of ``workers`` trees; those that need a build go to the first."""
    apart = [m for m in mutants if m.is_native and extensions is None]
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        if mutant not in apart:
            waiting.put(mutant)
    outcomes: list[Outcome] = []
    printing = threading.Lock()

    def work(number: int) -> None:
        tree = (NativeTree if number == 0 and apart else Tree)(folder / f"tree{number}", cuda)
        if extensions is not None:
            tree.extension.write_bytes(gzip.decompress((extensions / "unbroken.gz").read_bytes()))
        mine = list(apart) if number == 0 else []
        while mine or not waiting.empty():
            try:
                mutant = mine.pop(0) if mine else waiting.get_nowait()
            except queue.Empty:
                return
            outcome = run_one(mutant, tree, extensions)
            with printing:
                outcomes.append(outcome)
                print(outcome, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work, number) for number in range(workers)]:
            future.result()
    return outcomes


def not_of_the_change(outcomes: list[Outcome], tree: Tree) -> list[str]:
    """Killers that fail without the change too: they have noticed nothing."""
    killers: dict[tuple, set[str]] = {}
    for outcome in outcomes:
        if outcome.what == "killed":
            killers.setdefault(outcome.mutant.environment, set()).add(outcome.detail)
    wrong = []
    for environment, tests in killers.items():
        done = tree.test(tuple(sorted(tests)), **dict(environment))
        wrong += FAILED.findall(done.said) if done else ["the killers together do not end in time"]
    return wrong


def build_all(mutants: list[Mutant], folder: Path, target: Path) -> int:
    """The extension of each mutant that needs one, compressed, for a machine with a GPU."""
    target.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SLOWFAST_CUDA_ARCHS", "90a")
    native = [m for m in mutants if m.is_native and not (target / f"{m.name}.gz").exists()]
    if not native:
        return 0
    tree = NativeTree(folder / "tree", cuda=True)
    (target / "unbroken.gz").write_bytes(gzip.compress(tree.unbroken))
    failures = 0
    for mutant in native:
        with tree.broken_by(mutant):
            done = tree.build()
            if done.returncode == 0:
                (target / f"{mutant.name}.gz").write_bytes(gzip.compress(tree.extension.read_bytes()))
        failures += done.returncode != 0
        said = "built" if done.returncode == 0 else f"does not build: {(done.stdout + done.stderr)[-800:]}"
        print(f"{mutant.name}: {said}", flush=True)
    return int(failures > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="the list for a GPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose file, tests or description hold it")
    parser.add_argument("--workers", type=int, default=2, help="trees at a time")
    parser.add_argument("--check", action="store_true", help="only see that the list fits the tree")
    parser.add_argument("--build", type=Path, metavar="DIR", help="with --cuda: build extensions into DIR")
    parser.add_argument("--run", type=Path, metavar="DIR", help="with --cuda: run with the extensions in DIR")
    options = parser.parse_args()
    if options.cuda and not (options.check or options.build or options.run):
        parser.error("--cuda wants --build DIR, --run DIR or --check")

    listed = read_list(LISTS["cuda" if options.cuda else "cpu"])
    if problems := unfit(listed):
        print("\n".join(problems))
        return 1
    mutants = [m for m in listed if options.only in f"{m.file} {' '.join(m.tests)} {m.breaks}"]
    if options.check or not mutants:
        print(f"{len(mutants)} mutants")
        return int(not mutants)
    if not options.cuda:
        os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folder = Path(scratch)
        if options.build:
            return build_all(mutants, folder, options.build)
        extensions = options.run.resolve() if options.run else None
        outcomes = run_all(mutants, folder, options.workers, options.cuda, extensions)
        wrong = not_of_the_change(outcomes, Tree(folder / "unbroken", options.cuda))
    left = [outcome for outcome in outcomes if outcome.what not in NOTICED]
    print(f"\n{len(outcomes)} mutants, {len(left)} survived or unclear", *left, sep="\n")
    print(*(f"fails without a change too: {test}" for test in wrong), sep="\n")
    return int(bool(left or wrong))


if __name__ == "__main__":
    raise SystemExit(main())
