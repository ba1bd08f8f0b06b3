#!/usr/bin/env bash
# Builds .pollen/lib/libpollen_gloo.so: our C++ shim over the distribution's Gloo.
# Needs g++ but no root: without libgloo-dev on the system, its Debian packages are unpacked
# below .pollen/gloo. Does nothing, silently, if the library is up to date.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$root/scripts/install-gloo.sh
shim_dir=$root/collectives/gloo_shim
lib_dir=$root/.pollen/lib
library=$lib_dir/libpollen_gloo.so
stamp=$lib_dir/libpollen_gloo.stamp
debs=$root/.pollen/debs
tree=$root/.pollen/gloo
packages=(libgloo0 libgloo-dev libhiredis0.14 libibverbs1 libnl-3-200 libnl-route-3-200)

fail() {
    printf 'install-gloo: %s\n' "$*" >&2
    exit 1
}

wanted=$(cat "$shim_dir"/*.h "$shim_dir"/*.cc "$script" | sha256sum | cut -d' ' -f1)
if [[ -f $library && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

command -v g++ >/dev/null || fail 'g++ is missing: install the package g++ (apt-get install g++)'
mkdir -p "$lib_dir"
work=$(mktemp -d "$lib_dir/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Downloads one package into .pollen/debs unless it is there already.
download() {
    local package=$1
    compgen -G "$debs/${package}_*.deb" >/dev/null && return 0
    (cd "$debs" && apt-get -qq download "$package") >"$work/apt.log" 2>&1 && return 0
    if [[ $(id -u) == 0 && ! -e $work/updated ]]; then
        touch "$work/updated"
        apt-get -qq update >"$work/apt.log" 2>&1 || true
        (cd "$debs" && apt-get -qq download "$package") >>"$work/apt.log" 2>&1 && return 0
    fi
    return 1
}

compile=(g++ -std=c++17 -O3 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -o "$work/libpollen_gloo.so")
if [[ -f /usr/include/gloo/rendezvous/context.h ]]; then
    source='the system'
    link=(-lgloo)
else
    command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
        fail 'no Gloo headers in /usr/include and no apt-get to fetch them: install libgloo-dev (or build Gloo) and run this again'
    source='Debian packages'
    mkdir -p "$debs"
    for package in "${packages[@]}"; do
        download "$package" || fail "cannot download the package $package ($(tail -n 1 "$work/apt.log")): check the network, or run apt-get update as root, or install libgloo-dev"
    done
    for package in "${packages[@]}"; do
        for deb in "$debs/${package}"_*.deb; do
            dpkg -x "$deb" "$work/tree" || fail "cannot unpack $deb: delete it and run this again"
        done
    done
    rm -rf "$tree"
    mv "$work/tree" "$tree"
    # DT_RPATH, unlike DT_RUNPATH, also serves the libraries that libgloo itself needs.
    link=(-isystem "$tree/usr/include" -Wl,--disable-new-dtags)
    while IFS= read -r folder; do
        link+=("-L$folder" "-Wl,-rpath-link,$folder" "-Wl,-rpath,\$ORIGIN/../gloo${folder#"$tree"}")
    done < <(find "$tree" -name '*.so.*' -printf '%h\n' | sort -u)
    link+=(-lgloo)
fi

"${compile[@]}" "$shim_dir/pollen_gloo.cc" "${link[@]}" -pthread 2>"$work/compile.log" || {
    cat "$work/compile.log" >&2
    fail "cannot compile $shim_dir/pollen_gloo.cc against Gloo from $source"
}
# Checked at its final place, because the search path is relative to it.
mv "$work/libpollen_gloo.so" "$library"
rm -f "$stamp"
missing=$(ldd "$library" | awk '/not found/ {print $1}')
[[ -z $missing ]] || fail "$library needs libraries that are missing: ${missing//$'\n'/ }"
printf '%s\n' "$wanted" >"$stamp"
printf 'install-gloo: built .pollen/lib/libpollen_gloo.so against Gloo from %s\n' "$source"
