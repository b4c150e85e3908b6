#!/bin/sh
# powercut.sh FILES DEVICE: looks what of earlier records has survived, then writes new ones until the power fails.
#
# FILES is a disk with a file system, DEVICE one without; each by the serial number of its disk or its name in /dev.
disk() {
    for name in /sys/block/*; do
        [ "$(cat "$name/serial" 2>/dev/null)" != "$1" ] || { echo "/dev/${name##*/}"; return; }
    done
    echo "/dev/$1"
}

mkdir -p /mnt
mount -t ext4 "$(disk "$1")" /mnt || exit 1
/lab/powercut check /mnt "$(disk "$2")" || exit 1
echo 'powercut: begin'
exec /lab/powercut write /mnt "$(disk "$2")"
