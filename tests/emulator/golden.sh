#!/usr/bin/env bash
# golden.sh KDA_JIT DIRECTORY: every golden case on the emulator; 77 (skipped) without the data.
set -euo pipefail
kda=$1 golden=$2
[[ -d $golden ]] || { echo "SKIPPED: no golden data in $golden; set KDA_JIT_GOLDEN_DIR"; exit 77; }
export KDA_JIT_CACHE_DIR
KDA_JIT_CACHE_DIR=$(mktemp -d)
trap 'rm -rf "$KDA_JIT_CACHE_DIR"' EXIT
"$kda" check --golden "$golden" --device emulator 2>/dev/null
