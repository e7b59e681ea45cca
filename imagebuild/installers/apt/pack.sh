#!/bin/sh
# pack.sh ROOT OUT: one .deb of the tree ROOT, by the control file of the context.
set -eu
mkdir "$1/DEBIAN"
cp /run/imgbuild/kmod/package/control "$1/DEBIAN/control"
echo "Installed-Size: $(du -sk --apparent-size "$1/usr" | cut -f1)" >> "$1/DEBIAN/control"
chmod -R u=rwX,go=rX "$1"
find "$1/DEBIAN" -exec touch --date="@${SOURCE_DATE_EPOCH:-0}" {} +
dpkg-deb --root-owner-group --build -Zzstd "$1" "$2/$PACKAGE.deb"
