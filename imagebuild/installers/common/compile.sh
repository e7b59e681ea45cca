#!/bin/sh
# compile.sh WORK: unpack the source of a driver into WORK, patch it and run the build lines of the context.
# In /run/imgbuild: source (package, tarball or tree), kmod (build.sh, patches), and core where there is one.
# Variables: DRIVER DRIVER_VERSION SOURCE_PATH, KERNEL_RELEASE (none for a core), SOURCES (all a core is made of)
set -eu
here=$(dirname "$0")
work=$1
say() { echo "imgbuild: $*"; }
die() { say "$*"; exit 1; }
what="$DRIVER $DRIVER_VERSION"
[ -n "${KERNEL_RELEASE:-}" ] || what="the core of $what"

mkdir -p "$work"
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

if [ -n "${SOURCES:-}" ]; then
    # What is not there has no say, and need not count.
    folder=$(pwd)
    set -f
    for path in $SOURCES; do
        [ -e "./$path" ] || die "the source of $DRIVER has no $path, of which its core is made"
        mkdir -p "$(dirname "$work.kept/$path")"
        mv "./$path" "$work.kept/$path"
    done
    rm -rf "$work"
    mkdir -p "$(dirname "$folder")"
    mv "$work.kept" "$folder"
    cd "$folder"
fi
if [ -d /run/imgbuild/core ]; then
    say "taking the core that was compiled before"
    cp -R --remove-destination /run/imgbuild/core/files/. .
fi

JOBS=$(nproc)
export JOBS KERNEL_RELEASE DRIVER_VERSION
# The same bytes from the same source, whoever builds and when (reproducible-builds.org, kbuild docs).
export KBUILD_BUILD_USER=imgbuild KBUILD_BUILD_HOST=imgbuild
KBUILD_BUILD_TIMESTAMP="@$SOURCE_DATE_EPOCH"
export KBUILD_BUILD_TIMESTAMP
say "compiling $what${KERNEL_RELEASE:+ for $KERNEL_RELEASE} with $JOBS jobs"
started=$(date +%s.%N)
{
    code=0
    sh -eu /run/imgbuild/kmod/build.sh 2>&1 || code=$?
    echo "$code" > /tmp/build.rc
} | tee /tmp/build.log
[ "$(cat /tmp/build.rc)" = 0 ] || {
    grep -E 'error:|Error [0-9]|undefined!|fatal:' /tmp/build.log | head -n 12 || true
    die "$what does not compile${KERNEL_RELEASE:+ for kernel $KERNEL_RELEASE}"
}
say "compiled in $(awk -v a="$started" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }') s"
