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
expect 0 "removed 0 entries" "$kda" cache prune --max-mb 0
refused "--max-mb" "$kda" cache prune --max-mb -1
expect 0 "removed" "$kda" cache clear
expect 0 "best device" "$kda" doctor
expect 0 "No tuning rows" "$kda" report
expect 0 "chosen" "$kda" tune --device host --operation recurrent --heads 1 --key-dim 32 --value-dim 32 --tokens 8 --dtype fp32 --gate log_e --json
expect 0 "token" "$kda" report
expect 0 "wrote" "$kda" report --html "$work/report.html"
grep -q "<svg" "$work/report.html" || fail "the page has no chart"
refused "" "$kda" check --golden "$work/absent" --device host

echo "$failures failures"
((failures == 0))
