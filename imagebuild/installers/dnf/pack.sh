#!/bin/sh
# pack.sh ROOT OUT: one RPM of the tree ROOT, by the spec file of the context.
set -eu
rpmbuild -bb --quiet --define "imgbuild_root $1" --define '_topdir /tmp/rpmbuild' --define "_rpmdir $2" \
    --define '_rpmfilename %{NAME}.rpm' --define 'use_source_date_epoch_as_buildtime 1' \
    --define 'clamp_mtime_to_source_date_epoch 1' --define '_buildhost imgbuild' /run/imgbuild/kmod/package/kmod.spec
rm -rf /tmp/rpmbuild
