#!/bin/sh
# Unpack, patch, compile, strip, compress and pack the modules of one driver.
#   kmod.sh OUT        with /run/imgbuild/source (package, tarball or tree) and /run/imgbuild/kmod
# Variables: KERNEL_RELEASE DRIVER DRIVER_VERSION SOURCE_PATH MODULES LICENCES PACKAGE COMPRESSION
set -eu
out=$1
here=$(dirname "$0")
work=/usr/src/imgbuild
root=$out/root
moddir=$root/usr/lib/modules/$KERNEL_RELEASE/extra/$DRIVER
say() { echo "imgbuild: $*"; }
die() { say "$*"; exit 1; }

mkdir -p "$work" "$moddir"
say "unpacking the source of $DRIVER $DRIVER_VERSION"
sh "$here/unpack.sh" /run/imgbuild/source "$work"
cd "$work/$SOURCE_PATH" || die "the source of $DRIVER has no folder $SOURCE_PATH"

for patch in /run/imgbuild/kmod/patches/*.patch; do
    [ -e "$patch" ] || continue
    say "applying $(basename "$patch")"
    patch --strip=1 --fuzz=0 --forward --batch --reject-file=- < "$patch" > /tmp/patch.log 2>&1 || {
        cat /tmp/patch.log
        hunks=$(grep -oE 'Hunk #[0-9]+ (FAILED|ignored)[^.]*|hunks? (FAILED|ignored)|No file to patch' /tmp/patch.log | tr '\n' ';')
        die "patch $(basename "$patch") does not apply to $DRIVER $DRIVER_VERSION: ${hunks:-see above}"
    }
    cat /tmp/patch.log
done

# Package tools take it for every time they write, those in the archive's own headers included.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
JOBS=$(nproc)
export JOBS KERNEL_RELEASE DRIVER_VERSION
# The same bytes from the same source, whoever builds and when (reproducible-builds.org, kbuild docs).
export KBUILD_BUILD_USER=imgbuild KBUILD_BUILD_HOST=imgbuild
KBUILD_BUILD_TIMESTAMP="@${SOURCE_DATE_EPOCH:-0}"
export KBUILD_BUILD_TIMESTAMP
say "compiling $DRIVER $DRIVER_VERSION for $KERNEL_RELEASE with $JOBS jobs"
started=$(date +%s.%N)
{
    code=0
    sh -eu /run/imgbuild/kmod/build.sh 2>&1 || code=$?
    echo "$code" > /tmp/build.rc
} | tee /tmp/build.log
[ "$(cat /tmp/build.rc)" = 0 ] || {
    grep -E 'error:|Error [0-9]|undefined!|fatal:' /tmp/build.log | head -n 12 || true
    die "$DRIVER $DRIVER_VERSION does not compile for kernel $KERNEL_RELEASE"
}
say "compiled in $(awk -v a="$started" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }') s"

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
