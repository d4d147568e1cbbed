#!/usr/bin/env bash
# All that only a GPU can show, in under eight minutes on one card: the tests marked `gpu`, the costs of
# benchmarks/overhead/, and the demo. Run it in an environment that has the package with its extras `demo` and
# `benchmarks`, pytest and pytest-xdist; PYTHON names its interpreter.
#
#   benchmarks/gpu/run.sh              # records go to benchmarks/gpu/records/ and benchmarks/overhead/records/
#   benchmarks/gpu/run.sh --device cpu # a trial of this script on a CPU, small; records go to $RECORDS, or to a temporary folder
#
# Each part has a time limit, writes its record when it is done, and never stops the others. PARTS="tests demo" runs only
# those; the third is `costs`. Exits with 1 if a part failed. Logs go to outputs/gpu/.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
device=cuda
[[ "${1-}" == --device ]] && device=$2
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if [[ $device == cpu ]]; then
    records=${RECORDS:-$(mktemp -d)} logs=$records
    costs=(swap) amount=--smoke workers=1 tests=(tests/promises/test_devices.py -k "fused and cpu")
    demo=(trainer.max_steps=20 trainer.val_check_interval=10 "demo.anneal_at=[]" data.num_validation_blocks=16)
else
    name=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())') || exit 1
    records=benchmarks/gpu/records/$name logs=outputs/gpu
    costs=(swap waits memory step in_flight capture several ema merge whole scaling) amount= workers=6
    tests=(tests/promises tests/capture tests/live tests/callbacks/test_merger.py) demo=()
fi
mkdir -p "$records" "$logs"
rm -f "$logs/parts"

# $1: name, $2: limit in seconds, rest: command.
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [[ -z "${PARTS-}" || " $PARTS " == *" $name "* ]] || return 0
    timeout --kill-after=5 "$limit" "$@" > "$logs/$name.log" 2>&1
    local code=$?
    ((code == 0)) || tail -n 25 "$logs/$name.log"
    printf '%s: exit code %d after %d s\n' "$name" $code $((SECONDS - began)) | tee -a "$logs/parts"
    # What is worth keeping.
    case $name in
        tests) grep -E '^(PASSED|FAILED|ERROR)|[0-9]+ (passed|failed)' "$logs/$name.log" > "$records/$name.txt" ;;
        demo) sed -n '/nats per byte/,/^Picture/p' "$logs/$name.log" > "$records/$name.txt" ;;
    esac
}

# No clock runs in demo and tests, so they may run side by side. cuBLAS needs the setting to be deterministic.
part demo 120 "$python" -c 'from merge_callback.apps.cli import main; main()' demo "${demo[@]}" \
    +trainer.accelerator="$device" +trainer.devices=1 hydra.run.dir="$logs/demo" &
part tests 150 env TEST_DEVICE="$device" CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 \
    "$python" -m pytest -m gpu -rpfE -n "$workers" --dist worksteal -p no:cacheprovider -p no:benchmark "${tests[@]}"
wait
part costs 300 "$python" benchmarks/overhead/run.py --device "$device" --limit 60 $amount "${costs[@]}"
! grep -v "exit code 0 " "$logs/parts"
