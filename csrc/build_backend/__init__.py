"""The build backend that pyproject.toml names: setuptools', which also asks for PyPI's nvcc where that makes sense.

A machine with an NVIDIA driver and no CUDA toolkit then gets CUDA kernels from a plain ``pip install .``; when that is,
``cuda.py`` decides. It lies under csrc/, beside what it builds, and is in the sdist and in no wheel.
"""

from __future__ import annotations

OLDEST_SETUPTOOLS = 77  # the first that reads pyproject.toml's licence

# Without build isolation nobody has looked at pyproject.toml's requirements, and what an old setuptools says of the
# licence names neither itself nor the way out.
try:
    import setuptools
except ImportError:
    raise SystemExit(f"setuptools is needed to build: pip install 'setuptools>={OLDEST_SETUPTOOLS}'") from None
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"setuptools {setuptools.__version__} is too old to build this package, want {OLDEST_SETUPTOOLS} or newer: "
        f"pip install --upgrade 'setuptools>={OLDEST_SETUPTOOLS}', or build without --no-build-isolation"
    )

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403

from . import cuda  # noqa: E402


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """What a build needs besides pyproject.toml's requirements: PyPI's nvcc, or nothing."""
    return build_meta.get_requires_for_build_wheel(config_settings) + cuda.wheels_to_ask_for()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """The same for an editable install."""
    return build_meta.get_requires_for_build_editable(config_settings) + cuda.wheels_to_ask_for()
