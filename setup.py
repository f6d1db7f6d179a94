"""Builds the compiled module with CMake and Ninja; CMakeLists.txt is the one description of the build.

RMT_KERNELS_CPU=1 demands the CPU module and fails without it, =0 skips it; unset, a failed build is reported and the
package installs without it. The build must see the torch that will run it: pip install --no-build-isolation .
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):  # type: ignore[misc]
    """Runs CMake for every extension; a missing compiler or torch is an explained omission."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("RMT_KERNELS_CPU", "")
        if wanted == "0":
            return
        try:
            self._cmake()
        except Exception as error:
            if wanted == "1":
                raise
            print(
                f"\nrmt_kernels: installing WITHOUT the compiled CPU kernels: {error}\n"
                "rmt_kernels: attention will fall back to stock PyTorch. Needed: a C++20 compiler, and torch, cmake, "
                "ninja and pybind11 in this environment (pip install --no-build-isolation .).\n",
                file=sys.stderr,
            )

    def _cmake(self) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise RuntimeError(f"{error.name} is not installed in the build environment") from error
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        scripts = Path(sysconfig.get_path("scripts"))
        cmake, ninja = cmake or str(scripts / "cmake"), ninja or str(scripts / "ninja")
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath("rmt_kernels._cpu")).resolve().parent
        version = torch.__version__.split("+")[0]
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DRMT_TORCH_DIR={Path(torch.__file__).parent}", f"-DRMT_TORCH_VERSION={version}",
            f"-DRMT_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-DRMT_MODULE_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


setup(ext_modules=[Extension("rmt_kernels._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
