#!/usr/bin/env bash
# All that only a GPU can show, in under eight minutes on one card: the tests marked `gpu`, the costs of
# benchmarks/overhead/, and the demo. Run it in an environment that has the package with its extras `demo` and
# `benchmarks`, pytest and pytest-xdist; PYTHON names its interpreter.
#
#   benchmarks/gpu/run.sh              # on a GPU; records go to benchmarks/gpu/records/ and benchmarks/overhead/records/
#   benchmarks/gpu/run.sh --device cpu # a trial of this script on a CPU, small; records go to a temporary folder
#
# Each part has a time limit, writes its record when it is done, and never stops the others. PARTS="tests demo" runs only
# those; the third is `costs`. Exits with 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
device=cuda
[[ "${1-}" == --device ]] && device=$2
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if [[ $device == cpu ]]; then
    output=$(mktemp -d /tmp/gpu-XXXXXX)
    costs=(ema merge swap step) amount=--smoke workers=2
    # Seconds are those of a small test.
    demo=(trainer.max_steps=150 "demo.anneal_at=[]" data.num_validation_blocks=16)
else
    name=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())') || exit 1
    output=benchmarks/gpu/records/$name
    costs=(waits memory step in_flight ema merge swap capture several whole scaling) amount= workers=6
    demo=(demo.seed=0)
fi
mkdir -p "$output"

# $1: name, $2: limit in seconds, rest: command.
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [[ -z "${PARTS-}" || " $PARTS " == *" $name "* ]] || return 0
    timeout --kill-after=5 "$limit" "$@" > "$output/$name.log" 2>&1
    local code=$?
    ((code == 0)) || tail -n 25 "$output/$name.log"
    printf '%s: exit code %d after %d s\n' "$name" $code $((SECONDS - began)) | tee -a "$output/parts.txt"
}

rm -f "$output/parts.txt"
part demo 120 "$python" -c 'from merge_callback.apps.cli import main; main()' demo "${demo[@]}" \
    +trainer.accelerator="$device" +trainer.devices=1 \
    hydra.run.dir="$output/demo" &
# No clock runs in demo and tests, so they may run side by side. cuBLAS needs the setting to be deterministic.
part tests 150 env TEST_DEVICE="$device" CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 \
    "$python" -m pytest -m gpu -n "$workers" --dist worksteal -p no:cacheprovider -p no:benchmark --junitxml="$output/tests.xml" \
    tests/promises tests/capture tests/live tests/callbacks tests/validation/test_merged_validation.py
wait
part costs 300 "$python" benchmarks/overhead/run.py --device "$device" --limit 60 $amount "${costs[@]}"
! grep -v "exit code 0 " "$output/parts.txt"
