#!/bin/sh
# install.sh FOLDER...: install exactly the package files in these folders, without any repository.
set -eu
# shellcheck disable=SC2046 # names of package files have no white space
set -- $(for folder; do find "$folder" -name '*.deb'; done | sort)
[ $# -gt 0 ] || exit 0
# INITRD=No: the initramfs is made once, at the end (kernel postinst hooks obey it).
export DEBIAN_FRONTEND=noninteractive INITRD=No LC_ALL=C.UTF-8
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d
apt-get install --yes --quiet --no-install-recommends \
    -o APT::Sandbox::User=root -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts=/dev/null \
    -o Dpkg::Options::=--force-confold -o Dpkg::Use-Pty=0 -o Acquire::Languages=none "$@"
rm /usr/sbin/policy-rc.d
for deb; do
    package=$(dpkg-deb --field "$deb" Package)
    version=$(dpkg-deb --field "$deb" Version)
    # shellcheck disable=SC2016
    state=$(dpkg-query --show --showformat '${db:Status-Abbrev}${Version}' "$package")
    [ "$state" = "ii $version" ] || {
        echo "imgbuild: $package is not installed as locked: $state, wanted $version"
        exit 1
    }
done
