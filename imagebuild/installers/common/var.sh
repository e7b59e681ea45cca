#!/bin/sh
# var.sh: a line of tmpfiles.d for every folder and link that packages left in /var and no other line makes:
# updates of a host change /usr and never /var.
set -eu
conf=/usr/lib/tmpfiles.d/imgbuild-var.conf
rm -f "$conf"
made=$(cat /usr/lib/tmpfiles.d/*.conf /etc/tmpfiles.d/*.conf 2> /dev/null | awk '$1 ~ /^[dDvqQLC]/ { print $2 }')
# `%` begins a specifier in these files; names with white space are left to the check that finds them.
find /var -mindepth 1 ! -name '*[[:space:]]*' \
    \( -type d -printf 'd %p %m %u %g - -\n' -o -type l -printf 'L %p - - - - %l\n' \) |
    MADE=$made awk 'BEGIN { n = split(ENVIRON["MADE"], paths); for (i = 1; i <= n; i++) made[paths[i]] }
        !($2 in made) { gsub(/%/, "%%"); print }' | LC_ALL=C sort -k 2 > "$conf"
[ -s "$conf" ] || rm "$conf"
