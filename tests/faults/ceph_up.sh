#!/bin/sh
# Fills a folder with Ceph's daemons from Debian's packages, for the tests that want a real S3:
#   tests/faults/ceph_up.sh FOLDER && CMFORGE_CEPH=FOLDER python -m pytest tests
# Nothing is installed and no root is needed. Debian 12, about 50 MB of downloads, 200 MB unpacked.
set -eu
prefix=$(mkdir -p "${1:?usage: ceph_up.sh FOLDER}" && cd "$1" && pwd)
mkdir -p "$prefix/packages"
cd "$prefix/packages"
# What this machine lacks of radosgw's libraries; not the tools around disks, nor the manager's.
needed=$(apt-get install --simulate --no-install-recommends radosgw ceph-mon ceph-osd |
    sed -n 's/^Inst \([^ ]*\).*/\1/p' |
    grep -Ev '^(python3-|sudo|lvm2|dm|liblvm|crypt|gdisk|hdparm|logrot|uuid|nvme|libnvme|parted|smart|xfs)')
# shellcheck disable=SC2086  # one word per package
apt-get download $needed
for package in *.deb; do
    dpkg -x "$package" "$prefix"
done
libraries="$prefix/usr/lib/x86_64-linux-gnu"
LD_LIBRARY_PATH="$libraries:$libraries/ceph:$prefix/lib/x86_64-linux-gnu" "$prefix/usr/bin/radosgw" --version
