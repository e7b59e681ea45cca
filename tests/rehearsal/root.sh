#!/bin/sh
# root.sh RPM...: makes a Debian root that has dnf into the look-alike of a bootc base image. Runs in it,
# with signed packages and keys in /run/rehearsal.
# shellcheck disable=SC2114,SC2115 # it is meant to delete system folders
set -eu
[ -d /run/rehearsal/keys ] || exit 1 # on no account anywhere else

# The traps of Debian's dnf and rpm that are not EL's:
# - plugins that want programs which are not here;
# - a plugin of rpm that no build in a chroot can use: every scriptlet fails then, and dnf exits with 0.
plugins=/usr/lib/python3/dist-packages/dnf-plugins
rm -f $plugins/local.py $plugins/system_upgrade.py
rm -f /usr/lib/rpm/macros.d/macros.transaction_unshare
mkdir -p /usr/lib/sysimage/rpm

# What EL has in packages of its own, for builders.
cd /
rm -rf /usr/bin/rpmbuild /usr/bin/rpmspec /usr/bin/gendiff /usr/bin/debugedit /usr/bin/find-debuginfo \
    /usr/bin/sepdebugcrcfix /usr/lib/rpm/brp-* /usr/lib/rpm/check-* /usr/lib/rpm/elfdeps \
    /usr/lib/rpm/fileattrs /usr/lib/rpm/find-* /usr/lib/rpm/rpmdeps /usr/lib/rpm/rpmuncompress \
    /usr/lib/rpm/script.req /usr/lib/rpm/sysusers.sh /usr/include

rm -f /etc/os-release /usr/lib/os-release
sh /run/rehearsal/install.sh first "$@"

# No trace of Debian's package manager: the database of this image is rpm's.
rm -rf /var/lib/dpkg /var/lib/apt /etc/apt /etc/dpkg /etc/debconf.conf /usr/share/debconf /usr/lib/dpkg \
    /usr/lib/apt /usr/share/dpkg /usr/share/doc /usr/share/man /usr/share/locale /usr/share/lintian \
    /usr/share/bug /usr/bin/apt /usr/bin/apt-* /usr/bin/dpkg* /usr/sbin/dpkg* /etc/debian_version \
    /etc/issue /etc/issue.net /etc/cron.daily /etc/logrotate.d /etc/init.d /etc/rc?.d /etc/default

# The layout of a bootc image.
for folder in home mnt opt srv; do
    rm -rf "/${folder:?}"
    ln -s "var/$folder" "/$folder"
done
rm -rf /root /media /boot
ln -s var/roothome /root
ln -s run/media /media
mkdir -m 0555 /boot
mkdir -p /sysroot
chmod 0755 /sysroot
ln -sfn sysroot/ostree /ostree
rm -rf /var/*
mkdir -p /var/lib /var/log /var/cache /var/spool
mkdir -m 1777 /var/tmp
ln -s ../run /var/run
ln -s ../run/lock /var/lock
: > /etc/machine-id
rm -f /etc/hostname /etc/resolv.conf /etc/fstab /etc/hosts /etc/vconsole.conf /etc/.pwd.lock /etc/*-
