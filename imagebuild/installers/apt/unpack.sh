#!/bin/sh
# unpack.sh FROM TO: unpack every package and tarball in FROM, or copy the tree it holds; run nothing of it.
set -eu
for file in "$1"/*; do
    case $file in
        *.deb) dpkg-deb --extract "$file" "$2" ;;
        *.tar | *.tar.* | *.tgz) tar --extract --file "$file" --directory "$2" --no-same-owner ;;
        *) cp -R --preserve=mode,timestamps "$file" "$2/" ;;
    esac
done
