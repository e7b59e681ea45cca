#!/bin/sh
# core.sh OUT FROM TO [FROM TO]...: compile what of a driver no kernel has a say in; keep file FROM as TO.
# Variables: those of compile.sh, and USER_HEADERS, packages of the kernel's source that compilers bring
set -eu
out=$1
shift
here=$(dirname "$0")
work=/usr/src/imgbuild
say() { echo "imgbuild: $*"; }
die() { say "$*"; exit 1; }

# shellcheck disable=SC2086 # names of packages
sh "$here/remove.sh" $USER_HEADERS
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
sh "$here/compile.sh" "$work"
cd "$work/$SOURCE_PATH"
manifest=""
while [ $# -gt 0 ]; do
    [ -f "./$1" ] || die "the core of $DRIVER was compiled, but there is no $1"
    mkdir -p "$(dirname "$out/files/$2")"
    cp "./$1" "$out/files/$2"
    chmod 0644 "$out/files/$2"
    manifest="$manifest${manifest:+, }{\"file\": \"$2\", \"sha256\": \"$(sha256sum < "$out/files/$2" | cut -c1-64)\"}"
    shift 2
done
printf '{"driver": "%s", "version": "%s", "files": [%s]}\n' "$DRIVER" "$DRIVER_VERSION" "$manifest" > "$out/manifest.json"
cd /
rm -rf "$work"
