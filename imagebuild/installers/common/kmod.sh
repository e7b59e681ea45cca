#!/bin/sh
# kmod.sh OUT: compile, strip, compress and pack the modules of one driver.
# Variables: those of compile.sh, and MODULES LICENCES PACKAGE COMPRESSION
set -eu
out=$1
here=$(dirname "$0")
work=/usr/src/imgbuild
root=$out/root
moddir=$root/usr/lib/modules/$KERNEL_RELEASE/extra/$DRIVER
say() { echo "imgbuild: $*"; }
die() { say "$*"; exit 1; }

# Package tools take it for every time they write, those in the archive's own headers included.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
sh "$here/compile.sh" "$work"
cd "$work/$SOURCE_PATH"
mkdir -p "$moddir"
manifest=""
for module in $MODULES; do
    # A file of the name with dashes or underscores: kbuild allows both.
    found=$(find . -type f -name "$module.ko" | head -n 1)
    [ -n "$found" ] || die "$DRIVER was compiled, but there is no $module.ko"
    magic=$(modinfo -F vermagic "$found")
    [ "${magic%% *}" = "$KERNEL_RELEASE" ] || die "$module.ko is for kernel ${magic%% *}, not $KERNEL_RELEASE"
    strip --strip-debug -o "$moddir/$module.ko" "$found"
    chmod 0644 "$moddir/$module.ko"
    manifest="$manifest${manifest:+, }{\"name\": \"$module\", \"vermagic\": \"$magic\", \"sha256\": \"$(sha256sum < "$moddir/$module.ko" | cut -c1-64)\"}"
    case $COMPRESSION in
        xz) xz --check=crc32 --lzma2=dict=1MiB "$moddir/$module.ko" ;;
        zstd) zstd --quiet --rm -T1 "$moddir/$module.ko" ;;
        gzip) gzip -n "$moddir/$module.ko" ;;
        none) ;;
    esac
done
doc=$root/usr/share/doc/$PACKAGE
mkdir -p "$doc"
cd "$work"
for licence in $LICENCES; do
    [ -f "$licence" ] || die "the source of $DRIVER has no licence file $licence"
    cp "$licence" "$doc/"
done
find "$root" -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH:-0}" {} +
say "packing $PACKAGE"
sh "$here/pack.sh" "$root" "$out"
rm -rf "$root"
printf '{"driver": "%s", "version": "%s", "kernel_release": "%s", "package": "%s", "modules": [%s]}\n' \
    "$DRIVER" "$DRIVER_VERSION" "$KERNEL_RELEASE" "$PACKAGE" "$manifest" > "$out/manifest.json"
cd /
rm -rf "$work"
