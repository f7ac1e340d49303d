#!/usr/bin/env bash
# Collects the wheels that a GPU machine without a network lacks, for `gpu.sh`: bash tests/benchmarks/gpu_wheels.sh [FOLDER]
#
# That machine has Python 3.12 on x86-64 Linux with torch, transformers, triton, numpy, pyarrow and Pillow. Versions are
# those of constraints.txt, but for Liger's kernels, which only this benchmark uses. DeepSpeed publishes no wheel; one is
# built here, without compiled operations. The folder may weigh 60 MB.
set -euo pipefail
cd "$(dirname "$0")/../.."

FOLDER=${1:-.wheels}
PYTHON=${PYTHON:-.venv/bin/python}
MOST_BYTES=60000000
PACKAGES=(zarr numcodecs donfig google-crc32c omegaconf webdataset braceexpand hjson msgpack py-cpuinfo
  pydantic pydantic_core annotated-types typing-inspection typing_extensions)

pins=(liger-kernel==0.8.5)
for package in "${PACKAGES[@]}"; do
  pins+=("$(grep -iE "^${package}==" constraints.txt)") || { echo "constraints.txt has no pin of $package" >&2; exit 1; }
done

rm -rf "$FOLDER"
mkdir -p "$FOLDER"
platforms=()
for version in 2014_x86_64 _2_17_x86_64 _2_27_x86_64 _2_28_x86_64 _2_34_x86_64; do
  platforms+=(--platform "manylinux$version")
done
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" -d "$FOLDER" "${pins[@]}"
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w "$FOLDER" \
  "$(grep '^deepspeed==' constraints.txt)"

bytes=$(du -cb "$FOLDER"/*.whl | tail -1 | cut -f1)
echo "$(find "$FOLDER" -name '*.whl' | wc -l) wheels, $((bytes / 1000000)) MB, in $FOLDER"
if ((bytes > MOST_BYTES)); then
  echo "$FOLDER weighs more than 60 MB: leave something out" >&2
  exit 1
fi
