#!/bin/sh
# unpack.sh FROM TO: unpack every package and tarball in FROM, or copy the tree it holds; run nothing of it.
set -eu
sh "$(dirname "$0")/verify.sh" "$1"
for file in "$1"/*; do
    case $file in
        *.rpm) (cd "$2" && rpm2archive --nocompression - < "$file" | tar --extract --no-same-owner) ;;
        *.tar | *.tar.* | *.tgz) tar --extract --file "$file" --directory "$2" --no-same-owner ;;
        *) cp -R --preserve=mode,timestamps "$file" "$2/" ;;
    esac
done
