"""Breaks the code on purpose, one line at a time, in a copy of the tree, and says which changes no test notices.

    python tests/mutants.py                      the list of mutants_cpu.txt; some 15 minutes with 2 workers
    python tests/mutants.py --only vision        those whose file, tests or description match the pattern
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
import hashlib
import os
import queue
import re
import shlex
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutant_trees import PRELOADED, PROCESSES, ROOT, NativeTree, Tree

LISTS = {"cpu": ROOT / "tests" / "mutants_cpu.txt", "cuda": ROOT / "tests" / "mutants_cuda.txt"}


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


def run_one(mutant: Mutant, tree: Tree, extensions: Extensions | None) -> Outcome:
    start = time.monotonic()
    with tree.changed(mutant.file, mutant.old, mutant.new):
        outcome = None
        if mutant.is_native and extensions:
            extensions.put_into(tree, mutant.name)
        elif mutant.is_native and (problem := tree.build()):
            outcome = Outcome(mutant, "unclear", f"does not build: {problem}")
        outcome = outcome or judged(mutant, tree)
    if mutant.is_native and extensions:
        extensions.put_into(tree, UNBROKEN)
    elif mutant.is_native:
        tree.restore()
    outcome.seconds = time.monotonic() - start
    return outcome


def run_all(mutants: list[Mutant], make_tree, workers: int, extensions: Extensions | None) -> list[Outcome]:
    """Every mutant in one of ``workers`` trees; those that need a build go to the first."""
    apart = [m for m in mutants if m.is_native and not extensions]
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        if mutant not in apart:
            waiting.put(mutant)
    outcomes: list[Outcome] = []
    printing = threading.Lock()

    def work(number: int) -> None:
        mine = list(apart) if number == 0 else []
        tree = make_tree(f"tree{number}", NativeTree if mine else Tree)
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
    """Killers that fail without the change too: they have noticed nothing. Suites have fixtures of their own."""
    killers: dict[tuple, set[str]] = {}
    for outcome in outcomes:
        if outcome.what == "killed":
            suite = Path(outcome.detail.partition("::")[0]).parent
            killers.setdefault((outcome.mutant.environment, suite), set()).add(outcome.detail)
    wrong = []
    for (environment, _), tests in killers.items():
        done = tree.test(tuple(sorted(tests)), **dict(environment))
        wrong += FAILED.findall(done.said) if done else ["the killers together do not end in time"]
    return wrong


# --------------------------------------------------------------------------------- extensions for a GPU machine

UNBROKEN, SOURCES = "unbroken", "sources"


class Extensions:
    """A folder of compressed extensions by mutant's name, built from the sources that are here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def put_into(self, tree: Tree, name: str) -> None:
        tree.extension.write_bytes(gzip.decompress((self.folder / f"{name}.gz").read_bytes()))

    def take(self, tree: Tree, name: str) -> None:
        (self.folder / f"{name}.gz").write_bytes(gzip.compress(tree.extension.read_bytes()))

    def are_of_these_sources(self) -> bool:
        file = self.folder / SOURCES
        return file.is_file() and file.read_text() == digest()

    def build(self, mutants: list[Mutant], scratch: Path) -> int:
        """Those that are not there; returns how many do not build."""
        if not self.are_of_these_sources():
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob("*.gz"):
                old.unlink()
            (self.folder / SOURCES).write_text(digest())
        missing = [m for m in mutants if m.is_native and not (self.folder / f"{m.name}.gz").exists()]
        os.environ.setdefault("SLOWFAST_CUDA_ARCHS", "90a")
        tree, failures = NativeTree(scratch / "tree", cuda=True) if missing else None, 0
        for mutant in missing:
            self.take(tree, UNBROKEN)
            with tree.changed(mutant.file, mutant.old, mutant.new):
                problem = tree.build()
                if not problem:
                    self.take(tree, mutant.name)
            tree.restore()
            failures += bool(problem)
            print(f"{mutant.name}: {f'does not build: {problem}' if problem else 'built'}", flush=True)
        return failures


def digest() -> str:
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="the list for a GPU")
    parser.add_argument("--only", default="", metavar="REGEX", help="mutants whose file, tests or description have it")
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
    mutants = [m for m in listed if re.search(options.only, f"{m.file} {' '.join(m.tests)} {m.breaks}")]
    if options.check or not mutants:
        print(f"{len(mutants)} mutants")
        return int(not mutants)
    if not options.cuda:
        os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        if options.build:
            return int(Extensions(options.build).build(mutants, Path(scratch)) > 0)
        extensions = Extensions(options.run) if options.run else None
        if extensions and not extensions.are_of_these_sources():
            parser.error(f"{options.run} was not built from these sources: --build it again")

        def make_tree(name: str, kind: type[Tree] = Tree) -> Tree:
            tree = kind(Path(scratch, name), options.cuda)
            if extensions:
                extensions.put_into(tree, UNBROKEN)
            return tree

        outcomes = run_all(mutants, make_tree, options.workers, extensions)
        wrong = not_of_the_change(outcomes, make_tree("unbroken"))
    left = [outcome for outcome in outcomes if outcome.what not in NOTICED]
    print(f"\n{len(outcomes)} mutants, {len(left)} survived or unclear", *left, sep="\n")
    print(*(f"fails without a change too: {test}" for test in wrong), sep="\n")
    return int(bool(left or wrong))


if __name__ == "__main__":
    raise SystemExit(main())
