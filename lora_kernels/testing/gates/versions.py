"""The package's kernels as the other supported Tritons compile them, each version in a process of
its own.

On sm_90 and sm_100 alone: what those versions differ in is when products that run asynchronously
are waited for. Of the rest it is held that ptxas takes it without spilling; instructions are
counted for the installed Triton only. The installed one stands here, too, as "3.8.0, ptxas 13.3",
where a launch on sm_90 takes a later ptxas than Triton does (`triton_compiler.assembler`).
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from lora_kernels.testing.gates.configuration import Configuration, Cuda, Triton
from lora_kernels.testing.gates.measure import Row, compiled, soundness

CHIPS = ("sm_90", "sm_100")
# between a Triton and the ptxas that its launches on sm_90 take, where that is not its own
PTXAS = ", ptxas "
Place = tuple[str, str]
Other = tuple[str, str, str]
CompileJobs = list[tuple[str, str, Triton | Cuda]]
ROOT = Path(__file__).parents[3]
# a version that is not where it was looked for must not pass for another
PROCESS_CODE = (
    "import sys, triton; from lora_kernels.testing.gates import versions; assert triton.__version__ == sys.argv[1], triton;"
    "versions.main(*sys.argv[2:])"
)


def configurations_for(configurations: Iterable[Configuration], version: str) -> list[tuple[Configuration, str]]:
    """What another version is asked for: the package's own Triton kernels, not the tests'."""
    own = [c for c in configurations if isinstance(c.kernel, Triton) and c.kernel.function.startswith("lora_kernels.")]
    return [(c, arch) for c in own for arch in c.chips if arch in chips_to_compile(version)]


def chips_to_compile(version: str) -> tuple[str, ...]:
    """Those whose code a version decides about."""
    return CHIPS[:1] if PTXAS in version else CHIPS


def other_versions() -> list[str]:
    """The supported versions but the one installed, and that by the ptxas of launches; none where
    Triton is not installed."""
    try:
        import triton
    except ImportError:
        return []

    from lora_kernels.ops.triton_compiler import assembling, ptxas_release
    from lora_kernels.testing.triton_versions import TRIED

    own = ptxas_release(90)
    with assembling(90):
        launched = ptxas_release(90)
    installed = [] if launched == own else [f"{triton.__version__}{PTXAS}{launched}"]
    return [version for version in TRIED if version != triton.__version__] + installed


def recompute(configurations: Sequence[Configuration], jobs: int, cache: str) -> dict[Other, Row]:
    """A row for each version, configuration and chip. pip brings a version on its first call.

    Raises:
        RuntimeError: a version's process failed; the message is its own.
    """
    rows = {}
    for version in other_versions():
        pairs = configurations_for(configurations, version)
        asked: CompileJobs = [(c.name, arch, c.kernel_on(arch, version)) for c, arch in pairs]
        with ThreadPoolExecutor(jobs) as pool:  # of processes, which it waits for
            parts = pool.map(lambda i, by=version, all_=asked: _process(by, all_[i::jobs], cache), range(jobs))
            found = {place: row for part in parts for place, row in part.items()}
        for c, arch in pairs:
            rows[c.name, arch, version] = found[c.name, arch] | {"fingerprint": c.fingerprint(arch, version)}
    return rows


_pip = threading.Lock()


def installed(version: str) -> Path:
    """The folder with this Triton, beside the environment's own, for PYTHONPATH."""
    place = ROOT / ".venv" / "tritons" / version
    with _pip:
        if not place.exists():
            part = place.with_name(f"{version}.part")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(part)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
            part.rename(place)
    return place


def _process(version: str, asked: CompileJobs, cache: str) -> dict[Place, Row]:
    if not asked:
        return {}
    number, later, _ = version.partition(PTXAS)
    places = os.pathsep.join([*([] if later else [str(installed(version))]), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": places, "TRITON_CACHE_DIR": f"{cache}/{version}"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "asked").write_bytes(pickle.dumps(asked))
        command = [sys.executable, "-c", PROCESS_CODE, number, folder, *(["later"] if later else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"triton {version}: {done.stderr.strip()[-2000:]}")
        rows = json.loads(Path(folder, "rows").read_text())
    return {(name, arch): row for name, arch, row in rows}


def main(folder: str, ptxas: str = "") -> None:
    """Compiles what the file `asked` lists and writes the file `rows`; Triton itself prints.
    `ptxas` says "later" for that of launches."""
    from lora_kernels.ops.triton_compiler import assembling

    asked: CompileJobs = pickle.loads(Path(folder, "asked").read_bytes())
    rows = []
    for name, arch, kernel in asked:
        try:
            with assembling(int(arch[3:])) if ptxas else nullcontext():
                code, *_ = compiled(kernel, arch)
                row = {key: value for key, value in soundness(kernel, arch, code).items() if value}
        # each compiler has its own; the row has the message, and is broken
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}".strip()[:500]}
        rows.append((name, arch, row))
    Path(folder, "rows").write_text(json.dumps(rows))
