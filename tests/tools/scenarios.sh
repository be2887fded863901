#!/usr/bin/env bash
# scenarios.sh KDA_JIT: what the binary does with good and bad input. Bad input: exit 2, a sentence, nothing written.
set -uo pipefail
kda=$1
work=$(mktemp -d "${TMPDIR:-/tmp}/kda scenario ü XXXXXX")
trap 'rm -rf "$work"' EXIT
export KDA_JIT_CACHE_DIR="$work/cache"
failures=0

fail() {
  echo "FAILED: $1"
  failures=$((failures + 1))
}
# expect CODE WORD COMMAND...: exit code and a word of its output
expect() {
  local code=$1 word=$2 out got
  shift 2
  out=$("$@" 2>&1)
  got=$?
  [[ $got == "$code" ]] || fail "exit $got, expected $code: $* : $out"
  grep -qF -- "$word" <<<"$out" || fail "no '$word' in the output of $* : $out"
}
# refused WORD COMMAND...: exit 2 and no output file
refused() {
  rm -f "$work/out.st"
  expect 2 "$@"
  [[ ! -e $work/out.st ]] || fail "an output file was written by $*"
}

expect 0 T=20 "$kda" sample --tokens 20 --heads 2 --key-dim 32 --value-dim 16 --output "$work/in.st"
run=("$kda" run --device host --input "$work/in.st" --output "$work/out.st")
expect 0 "compiled" "${run[@]}"
[[ -s $work/out.st ]] || fail "run wrote no output"
expect 0 "nothing compiled" "${run[@]}"
expect 0 '"origin": "disk"' "${run[@]}" --json

refused "cannot" "$kda" run --device host --input "$work/absent.st" --output "$work/out.st"
printf 'garbage' >"$work/broken.st"
refused "" "$kda" run --device host --input "$work/broken.st" --output "$work/out.st"
head -c 300 "$work/in.st" >"$work/cut.st"
refused "" "$kda" run --device host --input "$work/cut.st" --output "$work/out.st"
refused "unknown device 'moon'" "$kda" run --device moon --input "$work/in.st" --output "$work/out.st"
refused "cannot read" "${run[@]}" --variant "what c=1"
refused "cannot run" "${run[@]}" --variant "token r=7777"
refused "--nonsense" "${run[@]}" --nonsense
refused "" "$kda" run --device host --input "$work/in.st"

refused "multiples of 4" "$kda" precompile --key-dim 17 --arch sm_90a
refused "multiple of heads" "$kda" precompile --heads 2 --value-heads 3 --arch sm_90a
refused "unknown architecture" "$kda" precompile --arch sm_70
refused "unknown model" "$kda" precompile --model gpt --arch sm_90a
refused "cannot share" env "$kda" precompile --model kimi-k3 --tp 5 --arch sm_90a
echo '[{"haeds": 3}]' >"$work/problems.json"
refused "haeds" "$kda" precompile --file "$work/problems.json" --arch sm_90a
refused "unknown dtype" "$kda" precompile --dtype fp8 --arch sm_90a
refused "a state pool goes with the operations recurrent" "$kda" precompile --state-pool --arch sm_90a
refused "whose slots take the states" "$kda" precompile --operation recurrent --every-state --arch sm_90a
echo '[{"state_pool": true}]' >"$work/problems.json"
refused "a state pool goes with the operations recurrent" "$kda" precompile --file "$work/problems.json" --arch sm_90a
# Without NVRTC: one sentence for all images, exit 1.
lost=$(KDA_JIT_NVRTC="$work/absent.so" "$kda" precompile --model kimi-k3 --arch sm_90a,sm_100a 2>&1)
[[ $? == 1 ]] || fail "precompile without NVRTC does not exit with 1"
[[ $(grep -c NVRTC <<<"$lost") == 1 && $(wc -l <<<"$lost") -le 2 ]] || fail "not one sentence without NVRTC: $lost"

expect 0 KDA_JIT_CACHE_DIR "$kda" env
refused KDA_JIT_CACHE_DRI env KDA_JIT_CACHE_DRI=x "$kda" env --strict
refused KDA_JIT_TUNE env KDA_JIT_TUNE=sometimes "${run[@]}"
expect 0 "entries" "$kda" cache stat
expect 0 "0 bad" "$kda" cache verify
# Packs: what the cache holds in one file, of use without the cache, and back into another one.
expect 0 "digest" "$kda" cache pack "$work/kernels.kdapack"
expect 0 '"entries": 1' "$kda" cache pack "$work/kernels.kdapack" --json
expect 0 "KDA_JIT_CACHE_PACKS" "$kda" cache pack --help
expect 0 "verified first" "$kda" cache unpack --help
refused "file" "$kda" cache pack
refused "file" "$kda" cache unpack
expect 1 "no entry" "$kda" cache pack "$work/none.kdapack" --arch sm_90a
[[ ! -e $work/none.kdapack ]] || fail "a pack of nothing was written"
expect 1 "cannot write" "$kda" cache pack "$work/absent/kernels.kdapack"
packed=(env KDA_JIT_CACHE_DIR="$work/new cache" KDA_JIT_CACHE_PACKS="$work/kernels.kdapack" "$kda")
expect 0 "KDA_JIT_CACHE_PACKS" "${packed[@]}" env
expect 0 "kernels.kdapack" "${packed[@]}" cache stat
expect 0 '"digest"' "${packed[@]}" cache stat --json
expect 0 "1 good, 0 bad" "${packed[@]}" cache verify
expect 0 '"origin": "pack"' "${packed[@]}" run --device host --input "$work/in.st" --output "$work/out.st" --json
expect 0 "entries   0" "${packed[@]}" cache stat
other=(env KDA_JIT_CACHE_DIR="$work/unpacked" "$kda")
head -c 2000 "$work/kernels.kdapack" >"$work/cut.kdapack"
expect 1 "bytes long" "${other[@]}" cache unpack "$work/cut.kdapack"
expect 0 "entries   0" "${other[@]}" cache stat
expect 0 "1 entries added" "${other[@]}" cache unpack "$work/kernels.kdapack"
expect 0 '"present": 1' "${other[@]}" cache unpack "$work/kernels.kdapack" --json
expect 0 '"origin": "disk"' "${other[@]}" run --device host --input "$work/in.st" --output "$work/out.st" --json
expect 0 "removed 0 entries" "$kda" cache prune --max-mb 0
refused "--max-mb" "$kda" cache prune --max-mb -1
expect 0 "removed" "$kda" cache clear
expect 0 "best device" "$kda" doctor
expect 0 "No tuning rows" "$kda" report
expect 0 "chosen" "$kda" tune --device host --operation recurrent --heads 1 --key-dim 32 --value-dim 32 --tokens 8 --dtype fp32 --gate log_e --json
expect 0 "token" "$kda" report
expect 0 "wrote" "$kda" report --html "$work/report.html"
grep -q "<svg" "$work/report.html" || fail "the page has no chart"

# Tuning: in a process of its own and in this one, exported, imported, compared and pinned.
problem=(--device host --heads 2 --key-dim 32 --value-dim 32 --tokens 20 --dt-bias --beta-sigmoid --qk-l2norm --state-layout k_v)
"$kda" sample --tokens 20 --heads 2 --key-dim 32 --value-dim 32 --output "$work/tuned.st" >"$work/log" || fail "sample: $(cat "$work/log")"
# Whether there are finals depends on the times seen: on a busy machine one candidate may be far behind.
expect 0 "timing 1/2" "$kda" tune "${problem[@]}"
expect 0 "timing 1/2" "$kda" tune "${problem[@]}" --in-process
expect 0 '"mode": "warm L2, graph"' env KDA_JIT_TUNE_TIMING=warm-graph "$kda" tune "${problem[@]}" --json
expect 0 "the untuned choice stays" env KDA_JIT_TUNE_MEMORY_MB=1 "$kda" tune "${problem[@]}" # said by the worker
refused "KDA_JIT_TUNE_TIMING" env KDA_JIT_TUNE_TIMING=hot "$kda" tune "${problem[@]}"
refused "cannot read" "$kda" tune "${problem[@]}" --only="magic r=1"
expect 1 "KDA_JIT_TUNE_WORKER" env KDA_JIT_TUNE_WORKER="$work/absent" "$kda" tune "${problem[@]}"
"$kda" tune "${problem[@]}" --json 2>"$work/log" >"$work/report.json" || fail "tune --json: $(cat "$work/log")"
expect 0 "are in both reports" "$kda" report --against "$work/report.json"
refused "cannot open" "$kda" report --against "$work/absent.json"
refused "holds no tuning reports" "$kda" report --import "$work/problems.json"
other=(env KDA_JIT_CACHE_DIR="$work/other cache" "$kda")
expect 0 "No tuning rows" "${other[@]}" report
expect 0 "imported" "${other[@]}" report --import "$work/report.json"
expect 0 "tuned" "${other[@]}" run --device host --input "$work/tuned.st" --output "$work/out.st"
# The pin is another variant than the tuned one: its choice is the pin's doing.
awk '/"chosen": true/ {sub(/true/, "false"); print; next} /"chosen": false/ && !n++ {sub(/false/, "true")} {print}' \
  "$work/report.json" >"$work/pins.json"
pinned=$(awk -F'"' '/"chosen": true/ {c = 1} c && $2 == "variant" {print $4; exit}' "$work/pins.json")
[[ -n $pinned ]] || fail "the host has one variant only, nothing to pin"
for process in 1 2; do # both cold
  expect 0 "\"variant\": \"$pinned\"" env KDA_JIT_CACHE_DIR="$work/cold $process" KDA_JIT_TUNE=pinned KDA_JIT_TUNE_PINS="$work/pins.json" \
    "$kda" run --device host --input "$work/tuned.st" --output "$work/pinned$process.st" --json
done
cmp "$work/pinned1.st" "$work/pinned2.st" || fail "two pinned processes differ"
refused "cannot open" env KDA_JIT_TUNE=pinned KDA_JIT_TUNE_PINS="$work/absent.json" "$kda" run --device host --input "$work/tuned.st" \
  --output "$work/out.st"
refused "" "$kda" check --golden "$work/absent" --device host

echo "$failures failures"
((failures == 0))
