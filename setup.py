"""Builds ``slowfast_kernels._C`` with ninja: C++ for the CPU always, CUDA when nvcc is here. torch is not needed.

Environment:
    SLOWFAST_CUDA        auto (default): CUDA kernels if nvcc is found; 1: they must be built; 0: they are left out.
    SLOWFAST_CUDA_ARCHS  compute capabilities to build for, default "80;90a". The highest one without a letter is also
                         kept as PTX, for GPUs that are newer.
    CXX, CUDA_HOME       the C++ compiler, and where to look for nvcc besides PATH and /usr/local/cuda.

Objects stay under build/, so a second build compiles only what changed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build") / f"native-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"
DEFAULT_ARCHS = "80;90a"

# One compilation of csrc/cpu/isa/*.cpp a level; the best one that the CPU has is picked at run time.
ISA_FLAGS = {"plain": ""}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = "-mavx2 -mfma -mf16c"
    avx512 = f"{avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    ISA_FLAGS |= {"avx2": avx2, "avx512": avx512, "avx512_bf16": f"{avx512} -mavx512bf16"}

# GCC's own AVX-512 headers trip these two.
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized"
HOST_FLAGS = "-fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall"
CXX_FLAGS = f"-std=c++17 -O3 {HOST_FLAGS} -Wextra"
NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -lineinfo -Xptxas -O3,--warn-on-spills"
NVCC_FLAGS += f" -Xcompiler {HOST_FLAGS.replace(' ', ',')}"


def find_nvcc() -> str | None:
    """nvcc from PATH, $CUDA_HOME or /usr/local/cuda, as SLOWFAST_CUDA allows."""
    wish = os.environ.get("SLOWFAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"SLOWFAST_CUDA: got {wish!r}, want auto, 0 or 1")
    if wish == "0":
        return None
    folders = [os.environ.get("PATH", "")]
    folders += [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and wish == "1":
        raise SystemExit("SLOWFAST_CUDA=1 but nvcc is not on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    return nvcc


def cuda_archs() -> list[str]:
    """SLOWFAST_CUDA_ARCHS as ["80", "90a"]."""
    archs = os.environ.get("SLOWFAST_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";")
    archs = [arch.strip().replace(".", "") for arch in archs if arch.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"SLOWFAST_CUDA_ARCHS: got {arch!r}, want compute capabilities such as {DEFAULT_ARCHS!r}")
        if int(arch.rstrip("af")) < 80:
            raise SystemExit(f"SLOWFAST_CUDA_ARCHS: got {arch!r}, want 80 or newer")
    if not archs:
        raise SystemExit(f"SLOWFAST_CUDA_ARCHS is empty, want compute capabilities such as {DEFAULT_ARCHS!r}")
    return archs


def code_objects(archs: list[str]) -> list[str]:
    """What the archs are built into: ["sm_80", "sm_90a", "compute_80"], PTX last."""
    portable = [arch for arch in archs if arch.isdigit()]
    ptx = [f"compute_{max(portable, key=int)}"] if portable else []
    return [f"sm_{arch}" for arch in archs] + ptx


def gencode(code: str) -> str:
    return f"-gencode arch=compute_{code.partition('_')[2]},code={code}"


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise SystemExit("ninja is needed to build: pip install ninja")
    return found


def stable_pybind11_include() -> Path:
    """pybind11's headers, copied under build/: an isolated build has them in a new temporary folder every time."""
    import pybind11

    target = BUILD / f"pybind11-{pybind11.__version__}"
    if not (ROOT / target).is_dir():
        shutil.copytree(pybind11.get_include(), ROOT / target)
    return target


class NinjaFile:
    """The build.ninja of the extension; paths are relative to the checkout, where ninja runs."""

    def __init__(self, output: Path, version: str, nvcc: str | None):
        self.objects: list[str] = []
        python = sysconfig.get_paths()["include"]
        cxx = os.environ.get("CXX", "g++")
        link = f"{cxx} -shared -o $out $in -fopenmp -Wl,--exclude-libs,ALL"
        if nvcc:
            link += f" -L{cuda_library_folder(nvcc)} -lcudart_static -ldl -lrt -lpthread"
        self.lines = [f"builddir = {BUILD}", f"python = -I{stable_pybind11_include()} -I{python}"]
        self.add_rule("link", link)
        self.add_rule("cxx", f"{cxx} {CXX_FLAGS} -Icsrc $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        if nvcc:
            compiler = f"{nvcc} -ccbin {cxx} {NVCC_FLAGS}"
            self.add_rule("nvcc", f"{compiler} -Icsrc $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        self.add_cpu()
        defines = [f'-DSLOWFAST_VERSION=\\"{version}\\"']
        if nvcc:
            defines += self.add_cuda(nvcc_release(nvcc), cuda_archs())
        self.add_object("cxx", Path("csrc/bindings.cpp"), f"$python {' '.join(defines)}")
        self.lines.append(f"build {output}: link {' '.join(self.objects)}")

    def add_rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def add_object(self, rule: str, source: Path, flags: str = "", suffix: str = ".o") -> None:
        target = BUILD / "obj" / source.relative_to("csrc").with_suffix(suffix)
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {flags}"]
        self.objects.append(str(target))

    def add_cpu(self) -> None:
        for source in sources("csrc/cpu", "*.cpp"):
            self.add_object("cxx", source)
        for source in sources("csrc/cpu/isa", "*.cpp"):
            for isa, flags in ISA_FLAGS.items():
                self.add_object("cxx", source, f"{flags} -DSLOWFAST_ISA={isa} {QUIET}", f".{isa}.o")

    def add_cuda(self, release: str, archs: list[str]) -> list[str]:
        """Adds the CUDA sources; returns what bindings.cpp must be told of them."""
        codes = code_objects(archs)
        portable = " ".join(gencode(code) for code in codes)
        sm90 = gencode("sm_90a") if "90a" in archs else ""
        define = "-DSLOWFAST_WITH_SM90" if sm90 else ""
        for source in sources("csrc/cuda", "**/*.cu"):
            if "sm90" not in source.name:
                self.add_object("nvcc", source, f"{define} {portable}")
            elif sm90:
                self.add_object("nvcc", source, f"{define} {sm90}")
        self.add_object("nvcc", Path("csrc/bindings_cuda.cpp"), f"{define} $python")
        major, minor = map(int, release.split("."))
        return [
            "-DSLOWFAST_WITH_CUDA",
            f'-DSLOWFAST_NVCC=\\"{release}\\"',
            f"-DSLOWFAST_CUDA_RUNTIME={major * 1000 + minor * 10}",
            f'-DSLOWFAST_CUDA_CODE=\\"{",".join(codes)}\\"',
        ]

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n")


def sources(folder: str, pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def cuda_library_folder(nvcc: str) -> Path:
    """Where nvcc itself would link libcudart_static from; PATH may hold only a wrapper of nvcc, so nvcc is asked."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], check=True, capture_output=True, text=True)
    for folder in re.findall(r'-L([^"\s]+)', done.stderr):
        if (Path(folder) / "libcudart_static.a").is_file():
            return Path(folder).resolve()
    raise SystemExit(f"libcudart_static.a is not in the toolkit of {nvcc}; SLOWFAST_CUDA=0 builds without CUDA kernels")


class NinjaBuildExt(build_ext):
    """``build_ext`` whose compiler is a build.ninja."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            why = "SLOWFAST_CUDA=0" if os.environ.get("SLOWFAST_CUDA") == "0" else "nvcc was not found"
            print(f"slowfast-kernels: CUDA kernels are left out ({why}); the CPU kernels are built", flush=True)
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        output, script = BUILD / Path(self.get_ext_filename(ext.name)).name, BUILD / "build.ninja"
        NinjaFile(output, self.distribution.get_version(), nvcc).write(ROOT / script)
        subprocess.run([find_ninja(), "-f", str(script)], cwd=ROOT, check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / output), str(target))


setup(ext_modules=[Extension("slowfast_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuildExt})
