#!/usr/bin/env bash
# All that needs a GPU and is no measurement, in one go: the kernels' tests, the sanitizer over them,
# the operators' tests. Logs and a summary go to a folder; the exit status says whether all is well.
#
#   scripts/gpu_check.sh FOLDER [BUILD]
#
# FOLDER takes the logs; BUILD holds test_*_cuda (default build/cpp_tests, where `make test` puts
# them). The operators are those of the adamix that `$PYTHON` (default python3) imports.
set -uo pipefail
logs=${1:?usage: scripts/gpu_check.sh FOLDER [BUILD]}
build=${2:-build/cpp_tests}
python=${PYTHON:-python3}
# Without a GPU every test is skipped, and nothing would fail.
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) || {
  echo "gpu_check: needs a GPU, and nvidia-smi finds none" >&2
  exit 1
}
cd "$(dirname "$0")/.."
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)

# step NAME SECONDS COMMAND..: one line of the summary, one log.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1
  status=$?
  printf '%-32s %-14s %4d s   %s\n' "$name" \
    "$([ $status -eq 0 ] && echo ok || echo "failed ($status)")" $((SECONDS - start)) \
    "$(grep -hE '\[  (PASSED|FAILED)|ERROR SUMMARY|RACECHECK SUMMARY|[0-9] passed' "$logs/$name.log" |
      tail -1)" |
    tee -a "$logs/summary.txt"
}

{
  date -u +%Y-%m-%d
  # As benchmarks/rows.py: a copy of the files may have an older HEAD.
  echo "${ADAMIX_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo no commit)}"
  echo "$gpu"
} >"$logs/summary.txt"

for test in "$build"/test_*_cuda; do
  step "$(basename "$test")" 120 "$test"
done
step operators 300 "$python" -m pytest -q -p no:cacheprovider python_tests/test_bitpack.py \
  python_tests/test_gptq.py python_tests/test_delta_gemm.py \
  python_tests/test_delta_gemm_overloads.py python_tests/test_delta_embedding*.py \
  python_tests/test_add_rows.py python_tests/test_search_scales.py \
  python_tests/test_ops_contract.py
step compression 300 "$python" -m pytest -q -p no:cacheprovider python_tests/test_devices.py
step serving 300 "$python" -m pytest -q -p no:cacheprovider python_tests/test_attach.py \
  python_tests/test_many_finetunes.py python_tests/test_bank.py python_tests/test_continuous.py \
  python_tests/test_routed_experts.py
# Slow, so all of them side by side; SANITIZER_FILTER picks tests, SANITIZER_SECONDS limits each.
for tool in memcheck racecheck; do
  for test in "$build"/test_*_cuda; do
    step "$tool.$(basename "$test")" "${SANITIZER_SECONDS:-400}" compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$test" --gtest_filter="${SANITIZER_FILTER:-*}" &
  done
done
wait
cat "$logs/summary.txt"
! grep -q ' failed (' "$logs/summary.txt"
