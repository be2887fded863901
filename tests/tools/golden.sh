#!/usr/bin/env bash
# golden.sh KDA_JIT DIRECTORY DEVICE: check every golden case; 77 (skipped) without the data or the device.
set -euo pipefail
kda=$1 golden=$2 device=$3
[[ -d $golden ]] || { echo "SKIPPED: no golden data in $golden; set KDA_JIT_GOLDEN_DIR"; exit 77; }
"$kda" doctor | grep -q "^ok   $device:" || {
  echo "SKIPPED: no $device here; on a machine with one: ctest --test-dir build -L gpu"
  exit 77
}
export KDA_JIT_CACHE_DIR
KDA_JIT_CACHE_DIR=$(mktemp -d)
trap 'rm -rf "$KDA_JIT_CACHE_DIR"' EXIT
"$kda" check --golden "$golden" --device "$device" 2>/dev/null
