#!/bin/sh
# clean.sh: leave nothing behind that is not the image: caches, logs, copies, what only a first boot may make.
set -eu
rm -rf /var/cache/apt/archives /var/cache/apt/*.bin /var/lib/apt/lists /var/cache/debconf/*-old \
    /var/cache/ldconfig /var/cache/man /var/log/apt /var/log/*.log /var/lib/dpkg/*-old \
    /var/lib/systemd/random-seed /var/lib/systemd/catalog/database /var/tmp/* /tmp/* /root/.gnupg \
    /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /etc/.pwd.lock /etc/subuid- /etc/subgid-
# Mounts of the running step lie in /run/imgbuild; the step after this one removes the folder.
find /run -mindepth 1 -maxdepth 1 ! -name imgbuild ! -name .containerenv -exec rm -rf {} +
mkdir -p /var/cache/apt/archives/partial /var/lib/apt/lists/partial
rm -f /etc/ssh/ssh_host_*_key* /etc/hostid /var/lib/dbus/machine-id
: > /etc/machine-id
# What package tools remember belongs to the system they installed: an update brings /usr, and never /var.
for state in lib/dpkg lib/apt/extended_states lib/pam lib/shells.state cache/debconf \
    lib/systemd/deb-systemd-helper-enabled lib/systemd/deb-systemd-helper-masked \
    lib/systemd/deb-systemd-user-helper-enabled lib/systemd/deb-systemd-user-helper-masked; do
    if [ -e "/var/$state" ] && [ ! -L "/var/$state" ]; then
        kept=/usr/lib/sysimage/${state#*/}
        mkdir -p "$(dirname "$kept")"
        rm -rf "$kept"
        mv "/var/$state" "$kept"
        ln -s --relative "$kept" "/var/$state"
    fi
done
