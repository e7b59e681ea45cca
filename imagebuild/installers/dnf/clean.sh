#!/bin/sh
# clean.sh: leave nothing behind that is not the image: caches, logs, what only a first boot may make.
set -eu
rm -rf /var/cache/dnf /var/lib/dnf/history.sqlite* /var/log/dnf* /var/log/hawkey.log /var/cache/ldconfig \
    /var/tmp/* /tmp/* /root/.gnupg /usr/lib/sysimage/rpm/rpmdb.sqlite-shm /usr/lib/sysimage/rpm/rpmdb.sqlite-wal \
    /usr/lib/sysimage/rpm/.rpm.lock
# Mounts of the running step lie in /run/imgbuild; the step after this one removes the folder.
find /run -mindepth 1 -maxdepth 1 ! -name imgbuild ! -name .containerenv -exec rm -rf {} +
rm -f /etc/ssh/ssh_host_*_key* /etc/hostid
: > /etc/machine-id
