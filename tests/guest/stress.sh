#!/bin/sh
# stress.sh SECONDS [CLASS]...: stress-ng, each of whose stressors checks its own results (--verify), on its classes cpu,
# vm, memory, signal and scheduler.
#
# With less than a minute some of each class run side by side. With more, all of them run, one kind after the other, as
# many at a time as there are processors, and share the time. Left out is what ends in the kernel's killing of other
# processes for want of memory, needs devices, or measures speed.
seconds=${1:-0}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- cpu vm memory signal scheduler

some() {
    case $1 in
        cpu) echo cpu fp hash matrix qsort vecmath vecwide longjmp ;;
        vm) echo mmap mprotect mremap shm vm vm-rw vm-segv ;;
        memory) echo atomic lockbus memcpy misaligned randlist tlb-shootdown ;;
        signal) echo kill sigfpe signal sigq sigsegv sigsuspend ;;
        scheduler) echo affinity clone futex mutex pthread switch vfork ;;
        *) return 1 ;;
    esac
}

all() {
    case $1 in
        cpu)
            echo atomic branch bsearch context cpu crypt fp fp-error funccall funcret getrandom goto hash heapsort \
                hsearch judy list longjmp lsearch matrix matrix-3d mergesort nop opcode prefetch priv-instr qsort \
                radixsort regs rotate rseq shellsort skiplist sparsematrix str syncload tree tsc tsearch vecfp vecmath \
                vecshuf vecwide waitcpu wcs x86cpuid zlib
            ;;
        vm)
            echo bad-altstack dev-shm env madvise malloc mlock mmap mmapaddr mmapfixed mmapfork mmapmany mprotect \
                mremap msync munmap pageswap shm shm-sysv stackmmap vm vm-addr vm-rw vm-segv vm-splice
            ;;
        memory)
            echo full lockbus mcontend membarrier memcpy memfd memrate memthrash mincore misaligned null pipe pipeherd \
                randlist remap rmap tlb-shootdown zero
            ;;
        signal)
            echo kill sigabrt sigchld sigfd sigfpe sigio signal signest sigpending sigpipe sigq sigrt sigsegv \
                sigsuspend sigtrap
            ;;
        scheduler)
            echo affinity clone cyclic daemon dnotify eventfd exec exit-group fifo fork futex hrtimers inotify mmapfork \
                mq msg mutex nanosleep nice poll pthread race-sched resched schedpolicy sem sem-sysv session sleep spawn \
                switch tee vfork wait yield zombie
            ;;
        *) return 1 ;;
    esac
}

# run TIME STRESSOR...: together. Statuses of stress-ng(1): 0 well, 3 and 4 not to be had here.
run() {
    time=$1
    options=
    shift
    for stressor; do options="$options --$stressor $instances"; done
    # shellcheck disable=SC2086
    stress-ng --verify --no-rand-seed --temp-path /tmp --vm-bytes 24M --mmap-bytes 24M --shm-bytes 2M --timeout "$time" \
        $options >/tmp/stress.log 2>&1
    status=$?
    case $status in
        0) ;;
        3 | 4) echo "stress: not here: $*" ;;
        *)
            tail -n 30 /tmp/stress.log
            echo "stress: failed: $* (status $status)"
            failed=yes
            ;;
    esac
}

cd /tmp || exit 1
failed=
instances=$(nproc)
for class; do
    if [ "$seconds" -lt 60 ]; then
        # Some side by side are load enough.
        instances=1
        # shellcheck disable=SC2046
        run 4 $(some "$class")
    else
        stressors=$(all "$class")
        # shellcheck disable=SC2086
        each=$((seconds / $# / $(echo $stressors | wc -w)))
        [ "$each" -gt 0 ] || each=1
        for stressor in $stressors; do run $each "$stressor"; done
    fi
    echo "stress: $class done"
done
[ -z "$failed" ] && echo "stress: passed, $(nproc) processors"
