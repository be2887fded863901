#!/usr/bin/env bash
# report_page.sh KDA_JIT [CHROMIUM [PICTURES]]: the page of `kda-jit report --html` in a real browser, from a tuning of
# this machine, a report of 60 candidates and one of a single candidate; narrow and wide, light and dark. With a
# folder of PICTURES a screenshot of each is left there, to be looked at.
set -uo pipefail
kda=$1 chromium=${2:-} pictures=${3:-} here=$(dirname "$0")
if [[ ! -x $chromium ]]; then
  echo "SKIPPED: no chromium-headless-shell here"
  exit 77
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/kda page ü XXXXXX")
trap 'rm -rf "$work"' EXIT
export KDA_JIT_CACHE_DIR="$work/cache"
failures=0
fail() {
  echo "FAILED: $1"
  failures=$((failures + 1))
}

# report DEVICE CANDIDATES: one report as JSON
report() {
  local n status=ok separator=""
  printf '{"schema": 3, "reports": [{"problem": "forward H=96 HV=96 K=128 V=128 bf16 gate=bounded/fp32 beta=sigmoid/bf16 '
  printf 'state=fp32/k_v dt_bias l2norm varlen/int64", "bucket": "T8192 N1", "device": "%s", "driver": "13.0", ' "$1"
  printf '"compiler": "nvrtc 13.0.88", "mode": "cold L2, graph", "floor_us": 420, "bytes": 1.26e9, "flop": 9.02e10, "rows": ['
  for ((n = 0; n < $2; ++n)); do
    ((n % 9 != 8)) || status=faulted
    printf '%s\n{"variant": "chunk c=64 vt=%d pw=4 sw=4 st=2", "status": "%s", "reason": "%s", ' "$separator" $((n + 1)) $status \
      "$( ((n % 3)) || echo 'stopped after 2 samples: 1.5 times the best; a <sentence> & \"more\" of averyveryverylongwordwithoutanyspaceinit')"
    printf '"median_us": %d, "spread_us": %s, "error": 0.0035, "registers": 168, "shared_bytes": 230400, "chosen": %s, ' \
      $((600 + 37 * n * n)) "$( ((n % 2)) && echo null || echo $((n + 5)))" "$( ((n == 0)) && echo true || echo false)"
    printf '"image": "abc", "written": "2026-01-02T03:04:05Z"}'
    status=ok separator=,
  done
  printf ']}]}\n'
}
report "NVIDIA H100 80GB HBM3" 60 >"$work/60.json"
report "A device that nobody knows" 1 >"$work/1.json"
for file in 60 1; do
  "$kda" report --import "$work/$file.json" >"$work/log" 2>&1 || fail "import: $(cat "$work/log")"
done
"$kda" tune --device host --heads 2 --key-dim 32 --value-dim 32 --tokens 20 >"$work/log" 2>&1 || fail "tune: $(cat "$work/log")"
"$kda" report --json >"$work/all.json" || fail "report --json"
"$kda" report >"$work/terminal" || fail "report"
for word in "peak 989 TFLOP/s (data sheet)" "peak FLOP/s of this device not known" "memory 3 TB/s (measured)"; do
  grep -qF "$word" "$work/terminal" || fail "no '$word' on the terminal"
done
"$kda" report --html "$work/report.html" 2>"$work/log" || fail "report --html: $(cat "$work/log")"
! grep -qE '(src|href)=|@import|url\(' "$work/report.html" || fail "the page asks for something from elsewhere"
sed -n 's/.*"variant": "\(.*\)".*/row \1/p' "$work/all.json" | sort >"$work/expected"
(($(wc -l <"$work/expected") > 61)) || fail "the tuning left no candidates"
{ cat "$work/report.html"; echo "<script>"; cat "$here/report_page.js"; echo "</script>"; } >"$work/checked.html"

for width in 400 1400; do
  for scheme in dark light; do
    see=("$chromium" --no-sandbox --disable-gpu --hide-scrollbars "--window-size=$width,1000" "--user-data-dir=$work/profile"
      "--blink-settings=preferredColorScheme=$([[ $scheme == dark ]] && echo 0 || echo 1)")
    timeout 60 "${see[@]}" --enable-logging=stderr --dump-dom "file://$work/checked.html" >"$work/dom" 2>"$work/errors" ||
      fail "the browser ended with $?: $(tail -3 "$work/errors")"
    ! grep CONSOLE "$work/errors" || fail "errors in the page, see above"
    sed -n 's/^@ //p' "$work/dom" | sed 's/<\/pre>.*//; s/&lt;/</g; s/&gt;/>/g; s/&amp;/\&/g' >"$work/seen"
    grep -qx end "$work/seen" || fail "the check did not run to its end"
    grep -qE "^scheme $scheme width $width texts [0-9]{3,}" "$work/seen" || fail "not $scheme at $width: $(grep ^scheme "$work/seen")"
    grep -qE "^roofs 3 points " "$work/seen" || fail "not a roofline for each of three problems: $(grep ^roofs "$work/seen")"
    sort "$work/seen" | grep ^row | cmp - "$work/expected" || fail "not a row for each candidate"
    ! grep -m 5 ^amiss "$work/seen" || fail "$scheme at $width, see above"
    [[ -z $pictures ]] || (cd "$pictures" && timeout 60 "${see[@]}" "--window-size=$width,2600" \
      "--screenshot=$pictures/$scheme-$width.png" "file://$work/report.html" 2>/dev/null)
  done
done
echo "$failures failures"
((failures == 0))
