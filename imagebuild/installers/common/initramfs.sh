#!/bin/sh
# initramfs.sh RELEASE: module index and initramfs of the one kernel.
set -eu
release=$1
modules=/usr/lib/modules/$release
echo "imgbuild: module index and initramfs of $release"
depmod --all "$release"
# DRACUT_NO_XATTR: overlay storage of a build refuses some attributes.
DRACUT_NO_XATTR=1 dracut --force --quiet --no-hostonly --reproducible --kver "$release" "$modules/initramfs.img"
chmod 0600 "$modules/initramfs.img"
