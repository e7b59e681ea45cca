#!/bin/sh
# install.sh FOLDER RPM...: install packages of the repository /run/rehearsal/FOLDER, then remove what dnf
# leaves behind.
set -eu
place=/run/rehearsal/$1
shift
rpmkeys --import /run/rehearsal/keys/centos.asc
dnf --assumeyes --quiet --releasever=10 --disablerepo='*' --repofrompath="rehearsal,file://$place" \
    --enablerepo=rehearsal --setopt=rehearsal.gpgcheck=1 --setopt=install_weak_deps=0 \
    install "$@" > /tmp/dnf.log 2>&1 || { cat /tmp/dnf.log; exit 1; }
# dnf exits with 0 when a scriptlet failed.
if grep -E 'scriptlet failed|Error in [A-Z]+ scriptlet' /tmp/dnf.log; then exit 1; fi
rm -rf /tmp/dnf.log /var/cache/dnf /var/lib/dnf /var/log/* /var/cache/ldconfig /var/tmp/* \
    /usr/lib/sysimage/rpm/rpmdb.sqlite-shm /usr/lib/sysimage/rpm/rpmdb.sqlite-wal /usr/lib/sysimage/rpm/.rpm.lock
