#!/usr/bin/env bash
# Prepares a folder (.gpu) for one run of bench.gpu on a machine with a GPU and no network: bash bench/gpu/offline.sh [FOLDER].
# There, in the root of this tree: bash .gpu/run.sh. --help has the options; PYTHON names the Python that runs this.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m bench.gpu.offline "$@"
