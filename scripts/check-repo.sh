#!/usr/bin/env bash
# Rules of the repository that no compiler checks: the length of sources, the size of every file, and
# that every path in the README's file tree exists.
set -euo pipefail
cd "$(dirname "$0")/.."
status=0
while read -r file; do
    # Tests stand last in a file and do not count towards its length.
    lines=$(sed '/^#\[cfg(test)\]/,$d' "$file" | wc -l)
    if [ "$lines" -gt 500 ]; then
        echo "$file has $lines lines without its tests; split it (limit 500)" >&2
        status=1
    fi
done < <(git ls-files '*.rs' '*.py' '*.sh' | grep -v '/tests/')
# A clone stays quick: the demo's largest shard has 3.8 MB, and nothing larger belongs in git.
while IFS= read -r -d '' file; do
    size=$(wc -c <"$file")
    if [ "$size" -gt 4000000 ]; then
        echo "$file has $size bytes (limit 4,000,000); take it out with: git rm --cached '$file'" >&2
        status=1
    fi
done < <(git ls-files -z)
while read -r path; do
    if [ ! -e "$path" ]; then
        echo "README.md's file tree names $path, which does not exist" >&2
        status=1
    fi
done < <(sed -n '/^```tree/,/^```$/p' README.md | sed '1d;$d' | awk '{print $1}')
exit $status
