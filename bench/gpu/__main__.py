"""`python -m bench.gpu`: everything that only a GPU can show, and where the results are.

    --minutes N  what is worth most first, within N minutes: `bench.gpu.timed` has the order and the
                 shares
    --dry-run    the same with CPU tensors in the simulator and small shapes: no times, nothing in
                 bench/results
    --arch 90    whose kernels a dry run simulates; 80 if not given
    --quick      fewer shapes and repetitions, without --minutes
    --only A B   these stages alone
    --out FILE   the JSON file; bench/results/<gpu>.json if not given, a temporary file in a dry
                 run. A picture goes beside it

The file is written anew after each check, so a run that is cut off leaves what it found. Each stage
runs in a process of its own, because an access out of bounds leaves a process without its GPU, and
says passed, failed or not run. Exit status: 0, 1 if a stage failed, 2 without a GPU (nothing is
written then).
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu import ready, timed
from bench.gpu.record import FAILED, Record
from bench.gpu.running import ROOT, Work, run_in_process, run_in_processes

# seconds of each: a kernel that hangs must not hold the others
STAGES = {"environment": 120, "correctness": 3600, "sanitizer": 7500, "determinism": 1800, "graphs": 1800, "speed": 5400}
TIMED_STAGES = tuple(stage.name for stage in timed.STAGES)


def main(argv: list[str] | None = None, here: bool = False) -> int:
    """The exit status. With `here` the stages run in this process."""
    options, began = parse_options(argv), time.monotonic()
    # before torch, whose import alone takes seconds
    words = ready.report_requirements(dry=options.dry_run) if not (options.stage or options.once) else []
    import torch

    from bench.gpu.setting import Setting, StageFindings, compile_processes

    if not options.dry_run and (not torch.cuda.is_available() or torch.version.hip is not None):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(
            f"bench.gpu: it needs an NVIDIA GPU and a torch built for it, and torch {torch.__version__}, with {built}, finds"
            " none here; nothing was written. --dry-run walks through it without one",
            file=sys.stderr,
        )
        return 2
    setting = Setting(options.dry_run, options.quick, options.tiny, options.arch or 80, bool(options.minutes) or options.timed)
    if options.once:
        from bench.gpu.cases import run_cases_once

        return run_cases_once(setting, few=setting.timed)
    if options.stage:  # one, in the process made for it
        record = Record(options.out) if options.form != "warm" else None
        skipped = frozenset(record.tried_checks(options.stage) if record else ())
        i, n = map(int, options.process.split("/"))
        found = StageFindings(record, options.stage, options.until, (i, n), skipped)
        return run_in_process(Work(options.stage, options.module, options.form), setting, found)

    if options.minutes and not options.dry_run:
        words += ready.build_cuda_module(0.25 * 60 * options.minutes)

    from bench.gpu.environment import gpu_stamp

    circumstances = gpu_stamp(setting)
    path = options.out or default_result_path(setting, circumstances["gpu"])
    record = Record(path)
    head = {"dry_run": setting.dry, "quick": setting.quick, "minutes": options.minutes}
    record.start_file(**head, stamp=circumstances, ready=words, command=sys.argv[1:])
    flags = {"--dry-run": setting.dry, "--quick": setting.quick, "--tiny": setting.tiny, "--timed": setting.timed}
    shared = [flag for flag, wanted in flags.items() if wanted] + (["--arch", str(options.arch)] if options.arch else [])
    if options.minutes:
        left = options.minutes - (time.monotonic() - began) / 60
        timed.run_stages(
            record, left, shared, compile_processes(), ready.assemblers(), options.only, drawn=lambda: picture(record)
        )
    else:
        for name in options.only or STAGES:
            work, start = Work(name, name), time.monotonic()
            if here:
                run_in_process(work, setting, StageFindings(record, name))
            else:
                run_in_processes(work, record, STAGES[name], shared)
            stage = record.finish_stage(name, wall_seconds=round(time.monotonic() - start, 1))
            print(timed.stage_summary(name, stage), flush=True)
        picture(record)
    print(path)
    return int(any(stage["status"] == FAILED for stage in record.read()["stages"].values()))


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__, formatter_class=form)
    parser.add_argument("--minutes", type=float, help="what is worth most first, within so many")
    parser.add_argument("--dry-run", action="store_true", help="CPU tensors in the simulator, small shapes, no times")
    parser.add_argument("--arch", type=int, help="with --dry-run: whose kernels; 90 is sm_90")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--tiny", action="store_true", help="with --dry-run: hardly anything, for the test of this command")
    names = f"{', '.join(STAGES)}; with --minutes {', '.join(TIMED_STAGES)}"
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=names)
    parser.add_argument("--out", type=Path, help="a JSON file")
    for name, default in {"--stage": None, "--module": None, "--form": "", "--process": "0/1"}.items():
        # of the process made for a stage
        parser.add_argument(name, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    for name in ("--timed", "--once"):  # for minutes; what compute-sanitizer looks at
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tiny and not options.dry_run:
        parser.error("--tiny is for --dry-run")
    if options.arch and not options.dry_run:
        parser.error("--arch is for --dry-run: a GPU has its own")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be above 0, found {options.minutes:g}")
    known = TIMED_STAGES if options.minutes else tuple(STAGES)
    if unknown := [name for name in options.only or [] if name not in known]:
        parser.error(f"--only knows {', '.join(known)}, found {', '.join(unknown)}")
    return options


def default_result_path(setting: Any, gpu: str) -> Path:
    """Where the JSON file goes if nobody says."""
    if setting.dry:
        return Path(tempfile.mkdtemp(prefix="bench-gpu-")) / "dry-run.json"
    return ROOT / "bench" / "results" / f"{kebab_case(gpu)}.json"


def kebab_case(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def picture(record: Record) -> None:
    """Draws it beside the file; if it cannot be drawn, that is a stage that failed. Without rows to
    draw, nothing."""
    from bench.gpu.plot import draw_picture
    from bench.gpu.setting import StageFindings

    result = record.read()
    if not any(row["op"] == "lora_linear" for row in result["rows"]):
        return
    if missing := ready.missing("matplotlib"):
        return StageFindings(record, "picture").skip(missing)
    result["stages"].pop("picture", None)
    found = StageFindings()
    found.check("picture", lambda: draw_picture(result, record.path.with_suffix(".png")))
    if found.failures:
        record.finish_stage("picture", **found.kept)


if __name__ == "__main__":
    sys.exit(main())
