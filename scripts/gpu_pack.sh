#!/usr/bin/env bash
# Everything that a machine with a GPU needs to check ARES, in one folder: binaries, the tests' data, the scripts, and the wheels that
# the framework's machine may lack; and the same as one archive, a third as large.
#     scripts/gpu_pack.sh [FOLDER]        then there: python3 FOLDER/gpu_check.py --call A --out A.json
set -euo pipefail
cd "$(dirname "$0")/.."
pack=${1:-target/gpu}
rm -rf "$pack"
mkdir -p "$pack/bin" "$pack/tests" "$pack/tokenizer"
cargo build --release
programs=$(cargo test --release --no-run --test ops --test parity --message-format=json \
    | python3 -c 'import json, sys; [print(m["target"]["name"], m["executable"]) for m in map(json.loads, sys.stdin) if m.get("executable")]')
cp target/release/ares "$pack/bin/ares"
while read -r name program; do
    if [ "$name" != ares ]; then cp "$program" "$pack/bin/$name"; fi
done <<< "$programs"
strip "$pack"/bin/*
cp -r tests/golden tests/golden-joint "$pack/tests/"
mkdir -p "$pack/models"
cp -r models/framing "$pack/models/"
cp models/framing/policy/tokenizer*.json models/framing/policy/special_tokens_map.json "$pack/tokenizer/"
cp -r scripts/gpu_check.py scripts/baseline_hf.py scripts/random_workload.py scripts/hf_baseline "$pack/"
rm -rf "$pack/hf_baseline/__pycache__"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$pack/wheels" "$(grep -E '^peft' scripts/requirements.txt)"
# Compiled here where libnvrtc is: a machine without it needs no compiler then.
if [ -n "${ARES_NVRTC:-}" ]; then
    target/release/ares kernels --arch sm_90a --pack "$pack/kernels.pack"
fi
tar -C "$(dirname "$pack")" -cJf "$pack.tar.xz" "$(basename "$pack")"
du -sh "$pack" "$pack.tar.xz"
