#!/usr/bin/env bash
# A release for bare servers: one stripped binary against glibc 2.28 that carries compiled kernels for sm_80 (which 8.6 and 8.9 run, too)
# and sm_90a, a file with those for sm_100 and sm_120 (--kernels), the shells' completions, a manual, a wheel that installs binary and
# manual, the list of what is inside, and checksums. Needs Rust, Python with venv and pip, binutils and xz: the linker for the old glibc
# and the CUDA compiler come as wheels.
#     scripts/release.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/dist}
target=x86_64-unknown-linux-gnu
tools=target/release-tools
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
[ -d "$tools/lib" ] || python3 -m venv "$tools"
# 12.9 makes code that every driver from CUDA 12 on loads.
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check ziglang cargo-zigbuild "nvidia-cuda-nvrtc-cu12==12.9.*"
PATH="$PWD/$tools/bin:$PATH"
rustup target add "$target" 2> /dev/null || true

cargo build --release
rm -rf "$out"
mkdir -p "$out/completions"
export ARES_NVRTC=$(echo "$PWD/$tools"/lib/python*/site-packages/nvidia/cuda_nvrtc/lib)
target/release/ares kernels --arch sm_80,sm_90a --check --pack "$out/inside.pack" > "$out/kernels.txt"
target/release/ares kernels --arch sm_100,sm_120 --pack "$out/sm_100-sm_120.pack" >> "$out/kernels.txt"
xz --keep --stdout -6 "$out/inside.pack" > "$out/inside.pack.xz"
rm "$out/inside.pack"
export ARES_EMBED="$PWD/$out/inside.pack.xz"
# In a folder of its own: with another linker everything is compiled anew.
cargo zigbuild --release --target "$target.2.28" --target-dir target/release-build
binary="$out/ares"
cp "target/release-build/$target/release/ares" "$binary"
strip "$binary"
chmod 755 "$binary"
for shell in bash zsh fish; do "$binary" completions "$shell" > "$out/completions/ares.$shell"; done
"$binary" man "$out/man"
cargo metadata --format-version 1 --locked --filter-platform "$target" > "$out/metadata.json"
python3 scripts/release_files.py "$version" "$out"
rm "$out/metadata.json" "$out/inside.pack.xz"
(cd "$out" && sha256sum ares ./*.whl ./*.pack sbom.json > SHA256SUMS)

# The newest symbol that the loader will look for.
newest=$(readelf --version-info "$binary" | grep -o 'GLIBC_2\.[0-9.]*' | sort -Vu | tail -1)
[ "$(printf '%s\nGLIBC_2.28\n' "$newest" | sort -V | tail -1)" = GLIBC_2.28 ] || { echo "$binary needs $newest"; exit 1; }
size=$(stat -c %s "$binary")
[ "$size" -le 40000000 ] || { echo "$binary: $size bytes, expected at most 40 MB"; exit 1; }
echo "$binary: $size bytes, $newest"
