#!/bin/sh
# i386.sh [SECONDS]: programs of the 32-bit Debian under /i386 next to the same of the 64-bit one, two of each at a time;
# their results have to be the same. (busybox's shell prefers its own applets, hence the full names.)
end=$(($(date +%s) + ${1:-0}))
rounds=0
cp /usr/lib/work/work.pl /usr/lib/work/work.lua /i386/tmp/
key="-K 00112233445566778899aabbccddeeff -iv 00000000000000000000000000000000"

# both NAME COMMAND...: runs it in both Debians at once. Paths are under /tmp.
both() {
    name=$1
    shift
    "$@" >"/tmp/$name.64" &
    chroot /i386 "$@" >"/tmp/$name.32"
    status32=$?
    wait $!
    status64=$?
    if [ $status32 -ne 0 ] || [ $status64 -ne 0 ]; then
        echo "i386: failed: $name: the statuses are $status64 (64 bits) and $status32 (32 bits)"
        exit 1
    fi
    cmp "/tmp/$name.64" "/tmp/$name.32" || { echo "i386: failed: $name: the results differ"; exit 1; }
}

while :; do
    # Something that looks random, another each round, and something that does not.
    # shellcheck disable=SC2086
    head -c 100000 /dev/zero | openssl enc -aes-128-ctr $key >/tmp/data
    { cat /usr/lib/work/*; echo "$rounds"; } >>/tmp/data
    cp /tmp/data /i386/tmp/data
    both xz /usr/bin/xz -1 -T1 -c /tmp/data
    # shellcheck disable=SC2086
    both cipher openssl enc -aes-256-cbc -pbkdf2 -nosalt -pass pass:word -in /tmp/data
    both digest openssl dgst -sha512 /tmp/data
    both sums busybox sha256sum /tmp/data
    both sorted busybox sort /tmp/data
    cp /usr/lib/work/work.pl /usr/lib/work/work.lua /tmp/
    both perl env -i perl /tmp/work.pl
    both luajit luajit /tmp/work.lua
    # And ours, of both kinds, at the same time.
    ./selfmod-32 >/tmp/selfmod &
    ./absent
    status64=$?
    if ! wait $! || [ $status64 -ne 0 ]; then
        cat /tmp/selfmod
        echo 'i386: failed: a program of ours beside one of the other kind'
        exit 1
    fi
    rounds=$((rounds + 1))
    [ "$(date +%s)" -lt "$end" ] || break
done
echo "i386: passed, $rounds rounds"
