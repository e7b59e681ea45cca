#!/bin/sh
# Makes a Debian 12 or 13 machine (a root shell, a CI container) able to run imgbuild, and runs it.
#
#   ./imgbuild.sh COMMAND ...            imgbuild's own commands, see ./imgbuild.sh --help
#   ./imgbuild.sh test [PYTEST-ARG ...]  linters, type checker and tests of imgbuild itself
#
# Debian packages are installed only if they are missing. Everything else lies in .venv beside this file.
set -eu

here=$(dirname -- "$(readlink -f -- "$0")")
venv=$here/.venv
packages="apt-utils buildah ca-certificates crun debian-archive-keyring kmod mmdebstrap netavark python3-apt
    skopeo systemd uidmap xz-utils zstd"
# The tests start a real registry (a container of podman, or a process) and make and sign package repositories.
[ "${1-}" != test ] ||
    packages="$packages catatonit createrepo-c docker-registry git gpg gpg-agent podman procps rpm slirp4netns"

say() { echo "imgbuild.sh: $*" >&2; }
die() { say "$*"; exit 4; }

# timed WHAT COMMAND...: run a command, say how long it took; its output is shown only if it fails.
timed() {
    what=$1
    shift
    began=$(date +%s)
    log=$(mktemp)
    say "$what ..."
    if "$@" < /dev/null > "$log" 2>&1; then
        say "$what: done in $(($(date +%s) - began)) s"
        rm -f "$log"
    else
        cat "$log" >&2
        rm -f "$log"
        die "$what: failed after $(($(date +%s) - began)) s, see above"
    fi
}

# missing PACKAGE...: those that are not installed.
missing() {
    # shellcheck disable=SC2016 # dpkg-query fills these in
    there=$(dpkg-query --show --showformat '${db:Status-Status} ${Package}\n' "$@" 2> /dev/null |
        sed -n 's/^installed //p' | tr '\n' ' ')
    for package; do
        case " $there" in
            *" $package "*) ;;
            *) printf '%s ' "$package" ;;
        esac
    done
}

# find_python: a Python that is new enough and can make virtual environments.
find_python() {
    for python in python3 /usr/bin/python3; do
        if "$python" -I -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$python"
            return
        fi
    done
}

# shellcheck disable=SC2329 # called through timed
apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 "$@"; }

install_packages() {
    [ "$(id -u)" = 0 ] || die "not root, and these Debian packages are missing: $*
    install them as root: apt-get update && apt-get install -y --no-install-recommends $*"
    timed "package lists" apt_get update
    timed "Debian packages $*" apt_get install --yes --no-install-recommends "$@"
}

# --- what is missing ---

have_venv=no
if [ "$(cat "$venv/imgbuild-home" 2> /dev/null)" = "$here" ] && "$venv/bin/python" -I -c '' 2> /dev/null; then
    have_venv=yes
fi
python=
[ $have_venv = yes ] || python=$(find_python)

if command -v apt-get > /dev/null && command -v dpkg-query > /dev/null; then
    [ $have_venv = yes ] || [ -n "$python" ] || packages="$packages python3 python3-venv"
    # shellcheck disable=SC2086 # a list of words
    lacking=$(missing $packages)
    if [ -n "$lacking" ]; then
        # shellcheck disable=SC2086
        install_packages $lacking
    elif [ "$(id -u)" = 0 ]; then
        # imgbuild looks up the location of Debian's archive in the lists; container images come without.
        for list in /var/lib/apt/lists/*Release; do
            [ -e "$list" ] || timed "package lists" apt_get update
            break
        done
    fi
else
    say "no apt-get here: nothing is installed; \`imgbuild doctor\` tells what is missing"
fi

# --- the virtual environment ---

if [ $have_venv = no ]; then
    [ -n "$python" ] || python=$(find_python)
    [ -n "$python" ] || die "Python 3.11 or newer with its venv module is needed, $(python3 --version 2>&1) is there"
    rm -rf "$venv"
    timed "virtual environment" "$python" -m venv "$venv"
    echo "$here" > "$venv/imgbuild-home"
fi

# install EXTRAS: pip-install this repository, again only if pyproject.toml changed since.
install() {
    sum=$(sha256sum < "$here/pyproject.toml")
    stamp=$venv/imgbuild-installed$1
    [ "$(cat "$stamp" 2> /dev/null)" != "$sum" ] || return 0
    timed "Python packages of imgbuild$1" \
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --editable "$here$1"
    echo "$sum" > "$stamp"
}

if [ "${1-}" != test ]; then
    install ""
    exec "$venv/bin/imgbuild" "$@"
fi

# --- ./imgbuild.sh test ---

install "[test]"
shift
cd "$here"
export PATH="$venv/bin:$PATH"
failed=0

# part COMMAND...: run one part of the tests, say how long it took, remember a failure.
part() {
    began=$(date +%s)
    code=0
    "$@" || code=$?
    say "$*: exit code $code after $(($(date +%s) - began)) s"
    [ $code = 0 ] || failed=$code
}

part ruff check .
part ruff format --check .
part mypy
part lint-imports
part pytest "$@"
exit $failed
