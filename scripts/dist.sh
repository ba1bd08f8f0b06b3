#!/usr/bin/env bash
# Packs what a GPU machine needs into one archive: scripts/dist.sh POLLEN [ARCHIVE.tar.xz]
# The program without its symbols, recipes and what they name, the smaller demo dataset, golden tensors,
# and the benchmark beside PyTorch. Fails above 24 MiB: what carries it there takes no more.
set -euo pipefail
cd "$(dirname "$0")/.."
pollen=${1:?usage: scripts/dist.sh POLLEN [ARCHIVE]}
archive=${2:-target/dist/pollen-cuda.tar.xz}
limit=$((24 * 1024 * 1024))

fail() {
    printf 'dist: %s\n' "$*" >&2
    exit 1
}

for tool in strip tar xz; do
    command -v "$tool" >/dev/null || fail "$tool is missing: install binutils, tar and xz-utils"
done
[[ -x $pollen ]] || fail "$pollen is no program: make build-cuda makes it"
mkdir -p "$(dirname "$archive")"
work=$(mktemp -d "$(dirname "$archive")/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/pollen-cuda

# Whatever is committed below these paths, except what only a machine that builds can use.
mkdir -p "$tree"
git ls-files -- LICENSE README.md CHANGELOG.md docs recipes configs demo/tokenizer.json demo/data/lift \
    'tests/golden/*.safetensors' benches/pytorch benches/step scripts/bench-step.sh |
    grep -v '^tests/golden/augment_free_preprocess' |
    tar --create --files-from=- | tar --extract --directory="$tree"
strip --strip-all -o "$tree/pollen" "$pollen"

# The packed program must start by itself and find all that a check reads.
(cd "$tree" && ./pollen gpu-check --device cpu --quick --out ../check --stage golden --stage gradients) \
    >"$work/check.log" 2>&1 || {
    cat "$work/check.log" >&2
    fail "the packed program does not pass its own check on the CPU"
}

# Machine code packs better with its jump targets made absolute.
tar --create --directory="$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 pollen-cuda |
    xz --threads=1 --x86 --lzma2=preset=9e,dict=64MiB >"$archive.new"
size=$(stat --format=%s "$archive.new")
mv "$archive.new" "$archive"
awk -v size="$size" -v program="$(stat --format=%s "$tree/pollen")" -v archive="$archive" 'BEGIN {
    printf "dist: %s, %.1f MiB; the program in it %.1f MiB\n", archive, size / 1048576, program / 1048576 }'
[[ $size -le $limit ]] || fail "$archive is above 24 MiB: see what grew with tar --list --verbose"
