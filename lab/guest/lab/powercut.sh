#!/bin/sh
# powercut.sh FILES DEVICE: looks what of earlier records has survived, then writes new ones until the power fails.
#
# FILES is a disk with a file system, DEVICE one without; each by the model of its disk (SCSI and SATA disks are named in the order
# in which they are found, which is any) or its name in /dev.
disk() {
    for name in /sys/block/*; do
        read -r model 2>/dev/null <"$name/device/model" || continue
        [ "$model" != "$1" ] || { echo "/dev/${name##*/}"; return; }
    done
    echo "/dev/$1"
}

# Controllers find their disks in their own time.
for name; do
    until [ -b "$(disk "$name")" ]; do sleep 0.02; done
done
mkdir -p /mnt
mount -t ext4 "$(disk "$1")" /mnt || exit 1
/lab/powercut check /mnt "$(disk "$2")" || exit 1
echo 'powercut: begin'
exec /lab/powercut write /mnt "$(disk "$2")"
