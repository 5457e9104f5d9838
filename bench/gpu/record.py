"""The JSON file of a run. It is replaced as a whole after each check, so a run that is cut off
leaves what it found."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
MAX_FAILURES_KEPT = 60  # failures that are kept in words; the number counts all


def empty_stage() -> dict[str, Any]:
    """A stage of which nothing is known yet."""
    return {"status": NOT_RUN, "checked": 0, "failed": 0, "failures": [], "passed": [], "notes": [], "not_run": []}


def add_to_stage(stage: dict[str, Any], kind: str, value: Any) -> None:
    """Adds one thing to a stage: a name that passed, why one failed, a note, what did not run and
    why."""
    if kind in (PASSED, FAILED):
        stage["checked"] += 1
    if kind == FAILED:
        stage["failed"] += 1
        stage["failures"] += [value[:1000]] if len(stage["failures"]) < MAX_FAILURES_KEPT else []
    else:
        stage[{PASSED: "passed", "note": "notes", NOT_RUN: "not_run"}[kind]].append(value)
    stage["status"] = FAILED if stage["failed"] else PASSED if stage["checked"] else NOT_RUN


class Record:
    """A file that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start_file(self, **head: Any) -> None:
        """Starts anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace_file({**head, "stages": {}, "rows": []})

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """What is in the file, to be changed; no other process changes it meanwhile."""
        # the file itself is another one after each change, and its folder may be where nothing can
        # be locked
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        with open(Path(tempfile.gettempdir()) / f"bench-gpu-{name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.read()
            yield content
            self._replace_file(content)

    def add_entry(self, stage: str, kind: str, value: Any) -> None:
        """Adds to a stage what `add_to_stage` knows; a "row"; or what a process is at ("started":
        its number and the check)."""
        with self.changed() as content:
            here = content["stages"].setdefault(stage, empty_stage())
            if kind == "row":
                content["rows"].append(value)
            elif kind == "started":
                process, check = value
                here.setdefault("running", {})[process] = check
                here.setdefault("tried", []).append(check)
            elif kind == "ended":
                here.get("running", {}).pop(value, None)
            else:
                add_to_stage(here, kind, value)

    def finish_stage(self, stage: str, **more: Any) -> dict[str, Any]:
        """What is known of a stage, with more in it."""
        with self.changed() as content:
            here = content["stages"].setdefault(stage, empty_stage())
            here.update(more)
            for name in ("tried", "running"):
                if not here.get(name):
                    here.pop(name, None)
        return here

    def add_death(self, stage: str, process: str, how: str) -> None:
        """A process of a stage ended, and not as it should."""
        with self.changed() as content:
            here = content["stages"].setdefault(stage, empty_stage())
            at = here.get("running", {}).pop(process, None)
            add_to_stage(here, FAILED, f"its process {how}" + (f" during {at}" if at else " between checks"))

    def tried_checks(self, stage: str) -> set[str]:
        """The checks that were begun."""
        return set(self.read()["stages"].get(stage, {}).get("tried", []))

    def _replace_file(self, content: dict[str, Any]) -> None:
        made = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        made.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(made, self.path)
