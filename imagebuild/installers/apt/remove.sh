#!/bin/sh
# remove.sh NAME...: take packages away from a stage that is thrown away, whatever depends on them.
set -eu
[ $# -eq 0 ] || dpkg --purge --force-depends "$@"
