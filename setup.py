"""Builds lora_kernels._cpu and _ptxsim with CMake and Ninja; pyproject.toml has the rest.

LORA_KERNELS_CPU=0 leaves the extension out, =1 makes a failed build an error. By default a failed build leaves its
reason in the package, where `python -m lora_kernels doctor` and `lora_kernels.explain` show it.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULES = ["lora_kernels._cpu", "lora_kernels._ptxsim"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name != MODULES[0]:
            return  # one build makes both
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = target.parent / "_build_error.txt"
        note.unlink(missing_ok=True)
        wanted = os.environ.get("LORA_KERNELS_CPU", "auto")
        if wanted == "0":
            self._leave_out(note, "LORA_KERNELS_CPU=0 when the package was built")
            return
        try:
            self._build(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            self._leave_out(note, f"{error}; see the output of `pip install -v .`")

    def _build(self, target: Path) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        generator = ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *options], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)

    def _leave_out(self, note: Path, reason: str) -> None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason + "\n", encoding="utf-8")
        print(f"lora_kernels: the CPU extension is left out: {reason}", file=sys.stderr)


setup(ext_modules=[Extension(name, [], optional=True) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
