#!/usr/bin/env bash
# On the machine with the GPU, in the root of the tree: bash FOLDER/run.sh [--minutes 8, and more of bench.gpu]
# Results go to $OUT, or to FOLDER/out: a JSON file, a picture, the tuned table, the log.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$PWD
test -d "$root/bench/gpu" || root=$(dirname "$here")
cd "$root"
out=${OUT:-$here/out}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
{
  ptxas=$("${PYTHON:-python3}" -m bench.gpu.offline --unpack "$here" "$scratch") || exit
  # for the witness alone: all else is assembled as it is for users
  test -z "$ptxas" || export BENCH_PTXAS="$ptxas"
  "${PYTHON:-python3}" -m bench.gpu --out "$out/gpu.json" --minutes 8 "$@"
} 2>&1 | tee "$out/log.txt"
