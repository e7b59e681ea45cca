#!/bin/sh
# kernel.sh RELEASE: this kernel alone, and nothing in /boot; EL keeps its kernel in /usr/lib/modules already.
set -eu
release=$1
[ -e "/usr/lib/modules/$release/vmlinuz" ] || { echo "imgbuild: there is no kernel $release"; exit 1; }
for modules in /usr/lib/modules/*; do
    other=${modules##*/}
    [ "$other" != "$release" ] || continue
    echo "imgbuild: removing kernel $other"
    # What owns files of it, and the metapackage: no more, so that rpm refuses where anything else needs them.
    owners=$(find "$modules" -exec rpm --query --file --queryformat '%{NEVRA} %{EVR}\n' {} + |
        grep -v ' is not owned by any package$' | sort -u)
    for version in $(echo "$owners" | cut -d' ' -f2 | sort -u); do
        owners="$owners
$(rpm --query --all --queryformat '%{NEVRA} %{EVR}\n' kernel | grep -F " $version" || true)"
    done
    # Without a plug-in that no build step can use, see install.sh.
    # shellcheck disable=SC2046 # names of packages have no white space
    rpm --define '__transaction_unshare %{nil}' --erase $(echo "$owners" | cut -d' ' -f1)
    rm -rf "$modules"
done
# shellcheck disable=SC2115 # the whole of /boot is meant
rm -rf /boot/*
