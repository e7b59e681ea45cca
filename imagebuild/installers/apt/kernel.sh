#!/bin/sh
# kernel.sh RELEASE: the kernel where bootc looks for it, nothing in /boot, and a place for the physical root.
set -eu
modules=/usr/lib/modules/$1
if [ -e "/boot/vmlinuz-$1" ]; then
    mv "/boot/vmlinuz-$1" "$modules/vmlinuz"
    mv "/boot/config-$1" "$modules/config"
    mv "/boot/System.map-$1" "$modules/System.map"
fi
# shellcheck disable=SC2115 # the whole of /boot is meant
rm -rf /boot/* /vmlinuz /vmlinuz.old /initrd.img /initrd.img.old
mkdir -p /sysroot
