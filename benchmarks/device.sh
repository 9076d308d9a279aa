#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: builds in place, tests, checks memory accesses and races,
# measures.
#
#   benchmarks/device.sh [build] [tests] [sanitizer] [train_step] [growth] [kernels] [ladder] [quality] [words]
#                                                                                             no stage named: all
#
# A stage that fails does not stop the next one; a table of what came of each is printed last, and the exit status tells
# whether all went well. Records go to benchmarks/results, and to the folder $OUT, if set, in records.tar beside the log.
#   PYTHON           the interpreter (python3)
#   NEUROGEN_TEXT    the text that stage `quality` learns, and `ladder` (Python's help topics if unset)
#   NEUROGEN_WORDS   the folder that stage `words` learns: train.txt and valid.txt
#   NEUROGEN_COMMIT  the commit, where there is no git
#   TEST_OPTIONS, TRAIN_STEP_OPTIONS, GROWTH_OPTIONS, KERNELS_OPTIONS, LADDER_OPTIONS, QUALITY_OPTIONS
#                    further options of those stages
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=benchmarks/results
log=${OUT:+$OUT/device.log}
export PATH="$PATH:/usr/local/cuda/bin" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
summary=() failures=0

# stage NAME SECONDS COMMAND...: runs it within that time, and keeps a line about it.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  printf '\n== %s\n' "$name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "${log:-/dev/null}"
  status=${PIPESTATUS[0]}
  ((status == 0)) || ((failures++))
  summary+=("$(printf '%-22s %-10s %4d s' "$name" "$( ((status)) && echo "exit $status" || echo ok)" $((SECONDS - begin)))")
}

# sanitize TOOL [--quick]: that tool of compute-sanitizer over the reduced suite; its summary goes to sanitizer.txt.
sanitize() {
  local tool=$1 status watched=()
  shift
  # A kernel that another one of a library feeds must not look uninitialised, so the other tools watch every kernel.
  [[ $tool == racecheck || $tool == synccheck ]] && watched=(--kernel-name kns=neurogen)
  compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "${watched[@]}" \
    "$python" tests/sanitizer_suite.py "$@" >"/tmp/sanitizer_$tool.log" 2>&1
  status=$?
  grep -v 'suite finished\|SUMMARY' "/tmp/sanitizer_$tool.log" | head -60
  { echo "$tool $*: exit $status"; grep 'suite finished\|SUMMARY' "/tmp/sanitizer_$tool.log"; } |
    tee -a "$results/sanitizer.txt"
  grep -q 'suite finished' "/tmp/sanitizer_$tool.log" && return "$status"
}

for name in "${@:-all}"; do
  case $name in all | build | tests | sanitizer | train_step | growth | kernels | ladder | quality | words) ;; *)
    echo "unknown stage $name: expected build, tests, sanitizer, train_step, growth, kernels, ladder, quality or words" >&2
    exit 2
    ;;
  esac
done
wanted() { [[ " ${chosen[*]} " == *" $1 "* || " ${chosen[*]} " == *" all "* ]]; }
chosen=("${@:-all}")

if wanted build; then
  stage build 420 env NEUROGEN_CUDA=1 NEUROGEN_CUDA_ARCHS="${NEUROGEN_CUDA_ARCHS:-90a}" \
    "$python" setup.py build_ext --inplace
fi
if wanted tests; then
  # shellcheck disable=SC2086
  stage tests 480 "$python" tests/gpu_record.py -v ${TEST_OPTIONS:-}
fi
if wanted sanitizer; then
  rm -f "$results/sanitizer.txt"
  export -f sanitize
  export python results
  for tool in memcheck initcheck synccheck "racecheck --quick"; do stage "$tool" 200 bash -c "sanitize $tool"; done
fi
if wanted train_step; then
  # shellcheck disable=SC2086
  stage train_step 240 "$python" benchmarks/train_step.py ${TRAIN_STEP_OPTIONS:-}
fi
if wanted growth; then  # no row begins after that time; docs/growth.png is drawn from the record, anywhere
  # shellcheck disable=SC2086
  stage growth 120 "$python" benchmarks/growth.py --seconds 75 ${GROWTH_OPTIONS:-}
fi
if wanted kernels; then
  # shellcheck disable=SC2086
  stage kernels 120 "$python" benchmarks/kernels.py --seconds 60 ${KERNELS_OPTIONS:-}
fi
if wanted ladder; then
  # shellcheck disable=SC2086
  stage ladder 180 "$python" benchmarks/ladder.py --backend cuda ${LADDER_OPTIONS:-}
fi
if wanted quality; then
  # shellcheck disable=SC2086
  stage quality 240 "$python" benchmarks/quality.py gpu --data "${NEUROGEN_TEXT:-no text in NEUROGEN_TEXT}" \
    ${QUALITY_OPTIONS:-}
fi
if wanted words; then
  stage words 120 "$python" benchmarks/words.py --data "${NEUROGEN_WORDS:-no folder in NEUROGEN_WORDS}"
fi

if [[ -n ${OUT:-} ]]; then
  (cd "$results" && tar -cf "$OUT/records.tar" ./*.json sanitizer.txt)
fi
printf '\n'
printf '%s\n' "${summary[@]}"
exit $((failures > 0))
