"""The package's kernels as the other supported Tritons compile them, each version in a process of its own.

On sm_90 and sm_100 alone: what those versions differ in is when products that run asynchronously are waited for. Of the rest it
is held that ptxas takes it without spilling; instructions are counted for the installed Triton only.
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
from pathlib import Path

from lora_kernels.testing.gates.configuration import Configuration, Cuda, Triton
from lora_kernels.testing.gates.measure import Row, compiled, soundness

CHIPS = ("sm_90", "sm_100")
Place = tuple[str, str]
Other = tuple[str, str, str]
Asked = list[tuple[str, str, Triton | Cuda]]
ROOT = Path(__file__).parents[3]
# a version that is not where it was looked for must not pass for another
RUN = (
    "import sys, triton; from lora_kernels.testing.gates import versions; assert triton.__version__ == sys.argv[1], triton;"
    "versions.main(sys.argv[2])"
)


def chosen(configurations: Iterable[Configuration]) -> list[tuple[Configuration, str]]:
    """What the other versions are asked for: the package's own Triton kernels, not the tests'."""
    own = [c for c in configurations if isinstance(c.kernel, Triton) and c.kernel.function.startswith("lora_kernels.")]
    return [(c, arch) for c in own for arch in c.chips if arch in CHIPS]


def others() -> list[str]:
    """The supported versions but the one installed; none where Triton is not installed."""
    try:
        import triton
    except ImportError:
        return []

    from lora_kernels.testing.triton_versions import TRIED

    return [version for version in TRIED if version != triton.__version__]


def recompute(configurations: Sequence[Configuration], jobs: int, cache: str) -> dict[Other, Row]:
    """A row for each version, configuration and chip. pip brings a version on its first call.

    Raises:
        RuntimeError: a version's process failed; the message is its own.
    """
    rows = {}
    for version in others():
        pairs = chosen(configurations)
        asked: Asked = [(c.name, arch, c.on(arch, version)) for c, arch in pairs]
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


def _process(version: str, asked: Asked, cache: str) -> dict[Place, Row]:
    if not asked:
        return {}
    places = os.pathsep.join([str(installed(version)), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": places, "TRITON_CACHE_DIR": f"{cache}/{version}"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "asked").write_bytes(pickle.dumps(asked))
        command = [sys.executable, "-c", RUN, version, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"triton {version}: {done.stderr.strip()[-2000:]}")
        rows = json.loads(Path(folder, "rows").read_text())
    return {(name, arch): row for name, arch, row in rows}


def main(folder: str) -> None:
    """Compiles what the file `asked` lists and writes the file `rows`; Triton itself prints."""
    asked: Asked = pickle.loads(Path(folder, "asked").read_bytes())
    rows = []
    for name, arch, kernel in asked:
        try:
            code, *_ = compiled(kernel, arch)
            row = {key: value for key, value in soundness(kernel, arch, code).items() if value}
        except Exception as error:  # each compiler has its own; the row has the message, and is broken
            row = {"error": f"{type(error).__name__}: {error}".strip()[:500]}
        rows.append((name, arch, row))
    Path(folder, "rows").write_text(json.dumps(rows))
