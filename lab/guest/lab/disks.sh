#!/bin/sh
# disks.sh NAME...: writes random data to each disk of that name in /dev, past the cache, and looks whether it reads back the same.
failed=0
for name; do
    until [ -b "/dev/$name" ]; do sleep 0.02; done
    dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
    dd if=/tmp/data of="/dev/$name" bs=128k oflag=direct 2>/dev/null
    dd if="/dev/$name" of=/tmp/back bs=64k count=128 iflag=direct 2>/dev/null
    if cmp /tmp/data /tmp/back; then
        echo "disks: $name: as written"
    else
        echo "disks: $name: NOT as written"
        failed=1
    fi
done
exit $failed
