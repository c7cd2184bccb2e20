"""Builds ``slowfast_kernels._C`` with ninja: C++ for the CPU always, CUDA when nvcc is here. torch is not needed.

Environment:
    SLOWFAST_CUDA        auto (default): CUDA kernels if there is nvcc, or a driver that runs what PyPI's nvcc builds
                         (pip then brings it); 1: they must be built; 0: they are left out.
    SLOWFAST_CUDA_ARCHS  compute capabilities to build for, default "80;90a". The highest one without a letter is also
                         kept as PTX, for GPUs that are newer.
    CXX, CUDA_HOME       the C++ compiler, and where to look for nvcc besides PATH, /usr/local/cuda and this Python's
                         packages.

Objects stay under build/, so a second build compiles only what changed. Which nvcc is taken, and when PyPI's is asked
for, is decided in csrc/build_backend/cuda.py.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if str(ROOT / "csrc") not in sys.path:  # pyproject.toml's backend-path has done it, if this runs in a backend
    sys.path.insert(0, str(ROOT / "csrc"))

from build_backend import cuda  # noqa: E402  first, as it says so if setuptools is too old
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

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
    try:
        import pybind11
    except ImportError:
        raise SystemExit("pybind11 is needed to build: pip install 'pybind11>=2.13'") from None

    target = BUILD / f"pybind11-{pybind11.__version__}"
    if not (ROOT / target).is_dir():
        shutil.copytree(pybind11.get_include(), ROOT / target)
    return target


class NinjaFile:
    """The build.ninja of the extension; paths are relative to the checkout, where ninja runs."""

    def __init__(self, output: Path, version: str, nvcc: str | None, left_out: str):
        """``left_out``: why there is no ``nvcc``."""
        self.objects: list[str] = []
        cxx = compiler()
        link = f"{cxx} -shared -o $out $in -fopenmp -Wl,--exclude-libs,ALL"
        if nvcc:
            link += f" -L{word(cuda.library_folder(nvcc))} -lcudart_static -ldl -lrt -lpthread"
        self.lines = [f"builddir = {BUILD}", f"python = -I{stable_pybind11_include()} -I{word(python_include())}"]
        self.add_rule("link", link)
        self.add_rule("cxx", f"{cxx} {CXX_FLAGS} -Icsrc $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        if nvcc:
            cuda.check_nvcc(nvcc, host_compiler(cxx), " ".join(map(gencode, code_objects(cuda_archs()))))
            command = f"{word(nvcc)} -ccbin {word(host_compiler(cxx))} {NVCC_FLAGS}"
            self.add_rule("nvcc", f"{command} -Icsrc $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        self.add_cpu()
        defines = [define_string("SLOWFAST_VERSION", version)]
        if nvcc:
            defines += self.add_cuda(cuda.release_of(nvcc), cuda_archs())
        else:
            defines.append(define_string("SLOWFAST_CUDA_LEFT_OUT", left_out))
        self.add_object("cxx", Path("csrc/bindings_calls.cpp"), "$python")
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
            define_string("SLOWFAST_NVCC", release),
            f"-DSLOWFAST_CUDA_RUNTIME={major * 1000 + minor * 10}",
            define_string("SLOWFAST_CUDA_CODE", ",".join(codes)),
        ]

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n")


def sources(folder: str, pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def compiler() -> str:
    """The command of the C++ compiler; it is there."""
    command = os.environ.get("CXX") or "g++"
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise SystemExit(f"no C++ compiler: {program} is not on PATH; install it, or name another one in CXX")
    return command


def host_compiler(command: str) -> str:
    """What nvcc takes as -ccbin: the compiler alone, without its flags or a launcher such as ccache before it."""
    return [word for word in shlex.split(command) if not word.startswith("-")][-1]


def python_include() -> str:
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        raise SystemExit(f"Python.h is not in {include}; install Python's development files (Debian: python3-dev)")
    return include


def word(text: str | Path) -> str:
    """One word of a shell command in build.ninja: folders may have spaces in their names."""
    return shlex.quote(str(text)).replace("$", "$$")


def define_string(name: str, text: str) -> str:
    """The flag that defines ``name`` as a C string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return word(f'-D{name}="{escaped}"')


class NinjaBuildExt(build_ext):
    """``build_ext`` whose compiler is a build.ninja."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, left_out = cuda.choose_nvcc()
        if nvcc is None:
            print(f"slowfast-kernels: CUDA kernels are left out ({left_out}); the CPU kernels are built", flush=True)
        else:
            print(f"slowfast-kernels: CUDA kernels are built with {nvcc}", flush=True)
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        output, script = BUILD / Path(self.get_ext_filename(ext.name)).name, BUILD / "build.ninja"
        NinjaFile(output, self.distribution.get_version(), nvcc, left_out).write(ROOT / script)
        if subprocess.run([find_ninja(), "-f", str(script)], cwd=ROOT, check=False).returncode:
            raise SystemExit("slowfast-kernels: the extension does not compile; the compiler's own message is above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / output), str(target))


setup(ext_modules=[Extension("slowfast_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuildExt})
