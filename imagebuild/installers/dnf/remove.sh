#!/bin/sh
# remove.sh NAME...: take packages away from a stage that is thrown away, whatever depends on them.
set -eu
for name; do
    ! rpm --query --quiet "$name" || rpm --erase --nodeps --allmatches "$name"
done
