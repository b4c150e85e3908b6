# What the checks share: boot a guest, then look at how it ended and what it printed.
output=/tmp/output

# boot NAME [--end WORD] [--words WORDS] OPTION...: runs the guest to its end, showing what it prints.
boot() {
    name=$1 end=poweroff words= options=
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --end) end=$2; shift 2 ;;
            --words) words=$2; shift 2 ;;
            *) options="$options $1"; shift ;;
        esac
    done
    status=0
    # The status goes by a file: the pipe's is tee's.
    { code=0
        timeout -s KILL 150 bhyve -A -H -P -s 0:0,hostbridge -s 1:0,lpc -l com1,stdio $options \
        --kernel /guest/vmlinuz --initrd /guest/initramfs.cpio \
        --cmdline "console=ttyS0 $words apiary.end=$end" "$name" 2>&1 || code=$?
        echo "$code" >/tmp/status; } | tee "$output"
    status=$(cat /tmp/status)
}

expect_status() {
    [ "$status" -eq "$1" ] || { echo "expected exit status $1, not $status"; exit 1; }
}

expect() {
    grep -qF "$1" "$output" || { echo "expected the output to have: $1"; exit 1; }
}

expect_not() {
    ! grep -qF "$1" "$output" || { echo "expected the output not to have: $1"; exit 1; }
}
