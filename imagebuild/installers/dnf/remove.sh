#!/bin/sh
# remove.sh NAME...: take packages away from a stage that is thrown away, whatever depends on them.
set -eu
for name; do
    # Without a plug-in that no build step can use, see install.sh.
    ! rpm --query --quiet "$name" ||
        rpm --define '__transaction_unshare %{nil}' --erase --nodeps --allmatches "$name"
done
