#!/bin/sh
# jit.sh [SECONDS]: LuaJIT, of both Debians, with its compiler on and eager, against the same with its compiler off.
end=$(($(date +%s) + ${1:-0}))
rounds=0
cp jit.lua /i386/tmp/
while :; do
    luajit -joff jit.lua 2 >/tmp/jit.off || exit 1
    for option in -jon -Ohotloop=1,hotexit=1 -O1 -Omaxmcode=64,sizemcode=32,hotloop=2; do
        luajit "$option" jit.lua 2 >/tmp/jit.64 &
        chroot /i386 luajit "$option" /tmp/jit.lua 2 >/tmp/jit.32
        status32=$?
        wait $!
        status64=$?
        if [ $status32 -ne 0 ] || [ $status64 -ne 0 ]; then
            echo "jit: failed: with $option the statuses are $status64 (64 bits) and $status32 (32 bits)"
            exit 1
        fi
        for bits in 64 32; do
            cmp /tmp/jit.off /tmp/jit.$bits && continue
            diff /tmp/jit.off /tmp/jit.$bits
            echo "jit: failed: with $option, $bits bits, the results differ"
            exit 1
        done
    done
    rounds=$((rounds + 1))
    [ "$(date +%s)" -lt "$end" ] || break
done
echo "jit: passed, $rounds rounds"
