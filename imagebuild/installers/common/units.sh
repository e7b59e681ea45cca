#!/bin/sh
# units.sh [enable|disable|mask UNIT]...: systemd units as the image shall have them, now and when
# presets are applied at first boot.
set -eu
preset=/usr/lib/systemd/system-preset/10-imgbuild.preset
mkdir -p "$(dirname "$preset")"
while [ $# -gt 0 ]; do
    systemctl --root=/ "$1" "$2"
    case $1 in
        enable) echo "enable $2" >> "$preset" ;;
        *) echo "disable $2" >> "$preset" ;;
    esac
    shift 2
done
