"""Builds lora_kernels._cpu, _ptxsim and _cuda with CMake and Ninja; pyproject.toml has the rest.

LORA_KERNELS_CPU=0 leaves the first two out, LORA_KERNELS_CUDA=0 the third; =1 makes a failed build
an error. By default a failed build leaves its reason in the package, in one line and with what
cures it, where the import warns with it once and `python -m lora_kernels doctor` and
`lora_kernels.explain` show it. _cuda wants nvcc: LORA_KERNELS_NVCC, or that of CUDA_HOME, on PATH,
or of the wheels nvidia-cuda-nvcc and -runtime. TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") says for which
GPUs, MAX_JOBS how many compilers run at once.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULES = ["lora_kernels._cpu", "lora_kernels._ptxsim", "lora_kernels._cuda"]
# what a build says that fails, and in words, what is missing and where it comes from: on Linux, on
# macOS
AGAIN = "pip install --force-reinstall --no-deps ."
BUILD_ERROR_CURES = [
    (r"No such file or directory: 'cmake'", "no cmake", "pip install cmake ninja", "pip install cmake ninja"),
    (r"CMAKE_MAKE_PROGRAM is not set|build program corresponding", "no ninja", "pip install ninja", "pip install ninja"),
    (r"CMAKE_CXX_COMPILER could be found|CMAKE_CXX_COMPILER not set|not a full path to an existing compiler|"
     r"compile a simple test program|dialect \"?CXX17", "no C++17 compiler", "apt install g++", "xcode-select --install"),
    (r"Could NOT find OpenMP", "no OpenMP", "apt install libomp-dev", "brew install libomp"),
    (r"Could NOT find Python|Python\.h", "no Python headers", "apt install python3-dev", "brew install python"),
    (r"No module named pybind11", "no pybind11", "pip install pybind11", "pip install pybind11"),
    (r"Killed signal|out of memory|Cannot allocate memory", "too little memory", "export MAX_JOBS=1", "export MAX_JOBS=1"),
]  # fmt: skip
# name: its environment variable, the CMake targets, the note that says why it is not there
EXTENSIONS = {
    "CPU": ("LORA_KERNELS_CPU", ["_cpu", "_ptxsim"], "_build_error.txt"),
    "CUDA": ("LORA_KERNELS_CUDA", ["_cuda"], "_cuda_build_error.txt"),
}


class CMakeBuild(build_ext):
    def run(self) -> None:
        # which the base sets back while it builds; it copies modules into the sources, and no notes
        inplace = self.inplace
        self._reasons: dict[str, str] = {}
        super().run()
        for part in EXTENSIONS if inplace else ():
            self._write_note(part, ROOT / "lora_kernels", self._reasons.get(part))

    def build_extension(self, ext: Extension) -> None:
        if ext.name != MODULES[0]:
            return  # one build makes all
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        for part, (variable, targets, _) in EXTENSIONS.items():
            wanted = os.environ.get(variable, "auto")
            try:
                if wanted == "0":
                    self._reasons[part] = f"{variable}=0 when the package was built"
                else:
                    self._run_cmake(target, targets, part)
            except (OSError, subprocess.CalledProcessError) as error:
                if wanted == "1":
                    raise
                missing = self._build_folder(part) / "no_cuda.txt"
                said = str(error.output) if isinstance(error, subprocess.CalledProcessError) else str(error)
                self._reasons[part] = missing.read_text() if missing.is_file() else build_error_line(said)
            self._write_note(part, target, self._reasons.get(part))
            if part in self._reasons:
                print(f"lora_kernels: the {part} extension is left out: {self._reasons[part]}", file=sys.stderr)

    def _build_folder(self, part: str) -> Path:
        return Path(self.build_temp).resolve() / f"cmake-{part.lower()}"

    def _run_cmake(self, target: Path, targets: list[str], part: str) -> None:
        build, cuda = self._build_folder(part), part == "CUDA"
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        options += [f"-DLK_CUDA={'ON' if cuda else 'OFF'}"]
        if cuda:
            options += [f"-DLK_NVCC={os.environ.get('LORA_KERNELS_NVCC', '')}", *architectures()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run_command(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options])
        run_command(["cmake", "--build", str(build), "--parallel", jobs, "--target", *targets])

    def _write_note(self, part: str, package: Path, reason: str | None) -> None:
        """Leaves in a folder of the package why a part is not there, or no note."""
        _, modules, note = EXTENSIONS[part]
        (package / note).unlink(missing_ok=True)
        if reason is not None:
            for module in modules:  # an older one would be found
                (package / Path(self.get_ext_filename(module)).name).unlink(missing_ok=True)
            (package / note).write_text(reason + "\n", encoding="utf-8")


def run_command(command: list[str]) -> None:
    """Runs a command; its output is shown as it comes and, if it fails, in the error."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(lines))


def build_error_line(said: str, system: str = sys.platform) -> str:
    """One line of what a build said: what is missing and what gets it, or else its first error."""
    for pattern, what, linux, mac in BUILD_ERROR_CURES:
        if re.search(pattern, said):
            return f"{what}: {mac if system == 'darwin' else linux}, then {AGAIN}"
    lines = [line.strip() for line in said.splitlines()]
    at = next((i for i, line in enumerate(lines) if re.search(r"\berror\b|CMake Error", line, re.IGNORECASE)), len(lines) - 1)
    first = lines[at] if lines else "no output"
    if first.startswith("CMake Error") and first.endswith(":"):  # the reason follows it
        first = next((line for line in lines[at + 1 :] if line), first)
    return f"{first[:200]}; `pip install -v .` says more"


def architectures() -> list[str]:
    """CMake's options for TORCH_CUDA_ARCH_LIST, which torch's own extensions follow: "8.0;9.0+PTX";
    none for "native"."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    numbers = [each for each in given.split(";") if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", each)]
    if not numbers:
        return []
    plain = [each.replace(".", "").removesuffix("+PTX") for each in numbers]
    ptx = [each.replace(".", "").removesuffix("+PTX") for each in numbers if each.endswith("+PTX")]
    return [f"-DLK_CUDA_ARCHITECTURES={';'.join(plain)}", f"-DLK_CUDA_PTX={';'.join(ptx)}"]


if __name__ == "__main__":
    setup(ext_modules=[Extension(name, [], optional=True) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
