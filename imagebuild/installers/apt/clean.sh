#!/bin/sh
# clean.sh: leave nothing behind that is not the image: caches, logs, copies, what only a first boot may make.
set -eu
rm -rf /var/cache/apt/archives /var/cache/apt/*.bin /var/lib/apt/lists /var/cache/debconf/*-old \
    /var/cache/ldconfig /var/cache/man /var/log/apt /var/log/*.log /var/lib/dpkg/*-old \
    /var/lib/systemd/random-seed /var/tmp/* /tmp/* /root/.gnupg /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- \
    /etc/.pwd.lock /etc/subuid- /etc/subgid-
# Mounts of the running step lie in /run/imgbuild; the step after this one removes the folder.
find /run -mindepth 1 -maxdepth 1 ! -name imgbuild ! -name lock ! -name .containerenv -exec rm -rf {} +
mkdir -p /var/cache/apt/archives/partial /var/lib/apt/lists/partial
rm -f /etc/ssh/ssh_host_*_key* /etc/hostid /var/lib/dbus/machine-id
: > /etc/machine-id
