#!/bin/sh
# install.sh FOLDER [KMODS...]: install exactly the package files in these folders, without any repository.
set -eu
folder=$1
shift
log=/tmp/imgbuild-dnf.log
# rpm writes it into its database as the time of installation: the same packages, the same bytes.
export SOURCE_DATE_EPOCH=1700000000
# rpm 4.20 brings a plug-in that gives each scriptlet namespaces of its own, which a build step may not make:
# every scriptlet fails then. dnf takes macros from files alone.
macros=/etc/rpm/macros.imgbuild
made=
[ -d /etc/rpm ] || made=/etc/rpm
mkdir -p /etc/rpm
echo '%__transaction_unshare %{nil}' > "$macros"
trap 'rm -f "$macros"; [ -z "$made" ] || rmdir "$made"' EXIT

# install RPM...: one transaction; what dnf keeps to itself counts too.
install() {
    [ $# -gt 0 ] || return 0
    # Signatures are a matter of verify.sh, which knows whose key each package needs.
    dnf --assumeyes --disablerepo='*' --noplugins --setopt=install_weak_deps=0 --setopt=best=1 \
        --setopt=localpkg_gpgcheck=0 install "$@" > "$log" 2>&1 || { cat "$log"; exit 1; }
    cat "$log"
    # dnf exits 0 when a scriptlet failed: only its output tells.
    if grep -E 'scriptlet failed|Error in [A-Z]+ scriptlet' "$log"; then
        echo "imgbuild: a package's scriptlet failed (see above)"
        exit 1
    fi
    rm -f "$log"
    for rpm; do
        rpm --query "$(rpm --query --package --nosignature --queryformat '%{NEVRA}' "$rpm")"
    done
}

# shellcheck disable=SC2046 # names of package files have no white space
[ $# = 0 ] || install $(for kmods; do find "$kmods" -name '*.rpm'; done | sort)
sh "$(dirname "$0")/verify.sh" "$folder"
# shellcheck disable=SC2046
install $(find "$folder" -name '*.rpm' | sort)
