"""`bash bench/gpu/offline.sh [FOLDER]`: a folder for one run of bench.gpu on a machine with a GPU
and no network.

    lib/lora_kernels   the modules _cuda (for --arch alone), _cpu and _ptxsim for --python, by nvcc
                       and the compiler here
    ptxas.xz           an assembler from 13.3 on: of --ptxas, of a Triton here, or of the wheel
                       nvidia-cuda-nvcc
    run.sh             what to call there
    manifest.json      versions, sizes, sha256

It wants nvcc, a C++ compiler, a Python of the version that the other machine has, with headers and
venv, and a package index for pybind11, cmake and ninja. What is missing is said before anything is
built, with exit status 2.
"""

import argparse
import hashlib
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.ready import FIRST_SOUND_PTXAS, ROOT, nvcc_path, release

MAX_BYTES = 64 * 2**20  # bytes, of the folder and the tree together
TOOLS = ["pybind11>=2.13", "cmake>=3.18", "ninja", "setuptools>=70"]
SCRIPT = "run.sh"
# what a Python must have to build for: its tag, or in words what it lacks
PYTHON_PROBE = """
import sysconfig, pathlib, sys, importlib.util as u
if not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file(): sys.exit("it has no headers (Python.h)")
if not u.find_spec("venv") or not u.find_spec("ensurepip"): sys.exit("it has no venv")
print(*sys.version_info[:3], sep=".")
"""


class MissingToolError(Exception):
    """What is not here."""


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench/gpu/offline.sh", description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / ".gpu")
    parser.add_argument("--python", help="of the version that the other machine has; python3.12 if not given")
    parser.add_argument("--version", default="3.12", help="that version")
    parser.add_argument("--arch", default="9.0", help="of its GPU: 9.0 is an H100 or H200")
    parser.add_argument("--ptxas", help="an assembler from 13.3 on")
    parser.add_argument("--without-ptxas", action="store_true", help="leave it out")
    parser.add_argument("--check", action="store_true", help="say what is there, build nothing")
    parser.add_argument("--unpack", type=Path, nargs=2, metavar=("FOLDER", "SCRATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if options.unpack:
            print(unpack_folder(*options.unpack))
            return 0
        python, found = find_requirements(options.python, options.version)
        for name, what in found.items():
            print(f"    {name}: {what}", flush=True)
        if not options.check:
            prepare(options, python, found)
    except MissingToolError as missing:
        print(f"bench/gpu/offline.sh: {missing}", file=sys.stderr)
        return 2
    return 0


def find_requirements(python: str | None, wanted: str) -> tuple[str, dict[str, str]]:
    """The Python to build for, and what was found.

    Raises:
        Missing: all that is not here.
    """
    lacking, found = [], {}
    chosen, version = "", ""
    reasons = []
    for each in [python] if python else pythons(wanted):
        version, reason = python_version(each, wanted)
        if not reason:
            chosen = each
            break
        reasons.append(f"{each}: {reason}")
    if chosen:
        found["python"] = f"{version}, {chosen}"
    else:
        said = "; ".join(reasons) or f"there is no python{wanted} on PATH or in pyenv"
        lacking.append(f"a Python {wanted} with headers and venv ({said}); --python names one")
    if compiler := nvcc_path():
        found["nvcc"] = compiler
    else:
        lacking.append("nvcc (PATH, /usr/local/cuda/bin, LORA_KERNELS_NVCC)")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        lacking.append("a C++ compiler")
    if lacking:
        raise MissingToolError("it needs " + ", and ".join(lacking))
    return chosen, found


def pythons(wanted: str) -> list[str]:
    """Where one may be: on PATH, and of pyenv, whose own command runs only the version that was
    chosen."""
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    places = [shutil.which(f"python{wanted}"), *(str(p) for p in sorted(root.glob(f"versions/{wanted}.*/bin/python")))]
    return [place for place in places if place]


def python_version(python: str, wanted: str) -> tuple[str, str]:
    """The version of a Python; and why it will not do, or nothing."""
    try:
        done = subprocess.run([python, "-c", PYTHON_PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        return "", f"does not run: {error.strerror}"
    if done.returncode:
        return "", (done.stderr.strip().splitlines() or ["does not run"])[0]
    version = done.stdout.strip()
    return version, "" if version.startswith(f"{wanted}.") else f"is Python {version}"


def prepare(options: argparse.Namespace, python: str, found: dict[str, str]) -> None:
    folder, work = options.folder.resolve(), ROOT / "build" / "offline"
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise MissingToolError(f"{folder} holds what this command did not make; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    extensions(python, options.arch, folder / "lib", work)
    if not options.without_ptxas:
        path = assembler(options.ptxas, work)
        found["ptxas"] = ".".join(map(str, release(str(path))))
        (folder / "ptxas.xz").write_bytes(lzma.compress(path.read_bytes(), preset=6))
    shutil.copy(Path(__file__).with_name("offline_run.sh"), folder / SCRIPT)
    made = {
        "made_for": {"python": options.version, "machine": platform.machine(), "gpu": f"sm_{options.arch.replace('.', '')}"},
        "made_by": found | {"commit": command_output("git", "rev-parse", "--short", "HEAD")},
        "sources": sources(),
        "files": {str(path.relative_to(folder)): size_and_digest(path) for path in files_below(folder)},
    }
    (folder / "manifest.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    size, tree = sum(path.stat().st_size for path in files_below(folder)), tree_size()
    for name, each in made["files"].items():
        print(f"    {each['bytes'] / 2**20:6.2f} MiB  {name}")
    print(f"{folder}: {size / 2**20:.1f} MiB, and the tree's {tree / 2**20:.1f} MiB, of {MAX_BYTES / 2**20:.0f}")
    if size + tree > MAX_BYTES:
        raise MissingToolError(
            f"room: {(size + tree) / 2**20:.1f} MiB are more than {MAX_BYTES / 2**20:.0f}; --without-ptxas is smaller"
        )
    print(f"there, in the root of this tree: bash {options.folder.name}/{SCRIPT}")


def extensions(python: str, arch: str, folder: Path, work: Path) -> None:
    """Builds the modules into folder/lora_kernels."""
    venv = work / "venv"
    own = venv / "bin" / "python"
    if not own.is_file():
        run_or_raise("a virtual environment", python, "-m", "venv", str(venv))
    run_or_raise("the tools of the build", str(own), "-m", "pip", "install", "--quiet", *TOOLS)
    environment = {
        **os.environ, "PATH": f"{venv / 'bin'}:{os.environ.get('PATH', '')}", "TORCH_CUDA_ARCH_LIST": arch,
        "LORA_KERNELS_CPU": "1", "LORA_KERNELS_CUDA": "1", "LORA_KERNELS_NVCC": nvcc_path() or "",
    }  # fmt: skip
    places = ["--build-lib", str(folder), "--build-temp", str(work / "temp")]
    run_or_raise("the extensions", str(own), "setup.py", "--quiet", "build_ext", *places, environment=environment)
    # in this very Python: what cannot be imported here will not be there
    names = ("_cpu", "_cuda", "_ptxsim")
    check = f"import sys; sys.path.insert(0, {str(folder / 'lora_kernels')!r}); import {', '.join(names)}"
    run_or_raise("the import of what was built", str(own), "-c", check)


def assembler(given: str | None, work: Path) -> Path:
    """A ptxas from FIRST_SOUND_PTXAS on."""
    least = ".".join(map(str, FIRST_SOUND_PTXAS))
    if given:
        if release(given) < FIRST_SOUND_PTXAS:
            raise MissingToolError(
                f"--ptxas: {given} is {'.'.join(map(str, release(given))) or 'no ptxas'}, wanted {least} or later"
            )
        return Path(given)
    for place in local_assemblers():
        if release(str(place)) >= FIRST_SOUND_PTXAS:
            return place
    run_or_raise("an assembler", sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work / "wheel"),
                 f"nvidia-cuda-nvcc>={least},<{FIRST_SOUND_PTXAS[0] + 1}")  # fmt: skip
    for wheel in sorted((work / "wheel").glob("nvidia_cuda_nvcc*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            for name in packed.namelist():
                if name.endswith("/bin/ptxas"):
                    path = work / "ptxas"
                    path.write_bytes(packed.read(name))
                    path.chmod(0o755)
                    if release(str(path)) >= FIRST_SOUND_PTXAS:
                        return path
    raise MissingToolError(f"it needs a ptxas from {least} on; --ptxas names one, --without-ptxas leaves it out")


def local_assemblers() -> Iterator[Path]:
    """What Tritons of this machine have for later GPUs, and the toolkit's."""
    inside = "site-packages/triton/backends/nvidia/bin/ptxas-blackwell"
    for base in (Path(sys.prefix), ROOT / ".venv"):
        yield from base.glob(f"lib/python*/{inside}")
    if on_path := shutil.which("ptxas"):
        yield Path(on_path)


def run_or_raise(what: str, *words: str, environment: dict[str, str] | None = None) -> None:
    print(f"{what}: {' '.join(words)}", flush=True)
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise MissingToolError(f"{what} failed with {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:]}")


def command_output(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip()


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_and_digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def sources() -> str:
    """What the modules are built from, as one sha256."""
    names = [ROOT / "CMakeLists.txt", *files_below(ROOT / "cmake"), *files_below(ROOT / "csrc")]
    total = hashlib.sha256()
    for path in names:
        total.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def tree_size() -> int:
    """Bytes of what git has or would take."""
    names = command_output("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def unpack_folder(folder: Path, scratch: Path) -> str:
    """On the other machine: puts the modules into the package, and the assembler into `scratch`;
    gives its path, or nothing.

    Raises:
        Missing: a file, or what the modules were built from, is not what the manifest says.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file() or size_and_digest(path) != wanted:
            raise MissingToolError(f"{path} is not what manifest.json says; the folder was not copied whole")
    if sources() != manifest["sources"]:
        raise MissingToolError("csrc has changed since the modules were built: bash bench/gpu/offline.sh makes them again")
    own = ".".join(map(str, sys.version_info[:2]))
    if own != manifest["made_for"]["python"]:
        print(f"made for Python {manifest['made_for']['python']}, and this is {own}: the modules are not used", file=sys.stderr)
    for path in folder.glob("lib/lora_kernels/*.so"):
        shutil.copy(path, ROOT / "lora_kernels" / path.name)
    if not (folder / "ptxas.xz").is_file():
        return ""
    path = scratch / "ptxas"
    path.write_bytes(lzma.decompress((folder / "ptxas.xz").read_bytes()))
    path.chmod(0o755)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
