#!/bin/sh
# install.sh FOLDER...: install exactly the package files in these folders, without any repository.
set -eu
# shellcheck disable=SC2046 # names of package files have no white space
set -- $(for folder; do find "$folder" -name '*.rpm'; done | sort)
[ $# -gt 0 ] || exit 0
log=/tmp/imgbuild-dnf.log
dnf --assumeyes --disablerepo='*' --setopt=install_weak_deps=0 --setopt=best=1 --setopt=localpkg_gpgcheck=0 \
    install "$@" > "$log" 2>&1 || { cat "$log"; exit 1; }
cat "$log"
# dnf exits 0 when a scriptlet failed: only its output tells.
if grep -E 'scriptlet failed|Error in [A-Z]+ scriptlet' "$log"; then
    echo "imgbuild: a package's scriptlet failed (see above)"
    exit 1
fi
rm -f "$log"
for rpm; do
    rpm --query "$(rpm --query --package --queryformat '%{NEVRA}' "$rpm")"
done
