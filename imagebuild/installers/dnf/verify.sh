#!/bin/sh
# verify.sh FOLDER: every package in FOLDER is signed by a key of its own repository, see keys/packages.
set -eu
list=${KEYS:-/run/imgbuild/keys}/packages
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for rpm in "$1"/*.rpm; do
    [ -e "$rpm" ] || exit 0
    keys=$(awk -v file="${rpm##*/}" '$1 == file { $1 = ""; print substr($0, 2) }' "$list")
    [ -n "$keys" ] || { echo "imgbuild: nothing tells which key ${rpm##*/} is signed with"; exit 1; }
    # The list of SHA-256 it was locked from is signed, and it was compared with that.
    [ "$keys" != metadata ] || continue
    group=$work/$(echo "$keys" | sha256sum | cut -c1-16)
    if [ ! -d "$group" ]; then
        mkdir "$group"
        # A database of its own for each set of keys: no repository's key vouches for another's packages.
        for key in $keys; do rpmkeys --define "_dbpath $group/db" --import "$key"; done
    fi
    echo "$rpm" >> "$group/packages"
done
for group in "$work"/*; do
    [ -d "$group" ] || continue
    xargs rpmkeys --define "_dbpath $group/db" --define '_pkgverify_level all' --checksig < "$group/packages" \
        > "$group/said" 2>&1 || {
        grep -v ': digests signatures OK$' "$group/said" || true
        bad=$(sed -n 's|^/.*/\([^/]*\.rpm\): .*NOT OK$|\1|p' "$group/said" | head -n 3 | tr '\n' ' ')
        echo "imgbuild: not signed with the key of its repository: ${bad:-see above}"
        exit 1
    }
done
