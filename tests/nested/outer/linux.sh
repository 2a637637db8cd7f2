#!/bin/sh
# linux CPUS [devices|busy]: a stock Debian kernel is booted, snapshotted at its line READY, restored eagerly and twice
# lazily. With `devices` it has a disk with a file system, a raw disk, a source of random numbers and a vsock. With
# `busy` it never sleeps, and is a file for longer than its watchdog allows a CPU to be stuck. For the cases, with the
# functions of steps.sh.

# ticks NAME: the guest's own checks from READY on, all ok.
ticks() {
    holds "$1" "11 ticks" test "$(grep -c '^tick [0-9]* ok ' "$1.out")" -ge 11
    holds "$1" "none of them bad" sh -c "! grep BAD $1.out"
}

# word KEY NAME: the value of KEY= in the first tick of a run.
word() { grep -m 1 '^tick' "$2.out" | tr ' ' '\n' | tr -d '\r' | sed -n "s/^$1=//p"; }

# on_time NAME RESTORED_AT: from its line READY to its ticks the guest's date has advanced as this kernel's has. The
# bounds are moments that were before and after. (A guest that starves while it boots loses time: that is not the
# restore's.)
on_time() {
    dates=$(grep '^tick .* date=' "$1.out" | tr ' ' '\n' | sed -n 's/^date=//p')
    first=$(($(echo "$dates" | head -n 1) - $(word ready "$1")))
    last=$(($(echo "$dates" | tail -n 1) - $(word ready "$1")))
    holds "$1" "its date has advanced" test "$first" -ge $(($2 - created_at - 1)) \
        -a "$last" -le $(($(date +%s) - creating_at + 1))
}

# A disk of 8 KiB that begins with this word.
raw_disk() {
    dd if=/dev/zero of="$1" bs=1024 count=8 2>/dev/null
    printf '%s\n' "$2" | dd of="$1" conv=notrunc 2>/dev/null
}

linux() {
    cpus=$1
    devices='' busy='' given='' moved=''
    case ${2:-} in
        devices) devices=1 ;;
        # A word that is not the kernel's becomes a variable of the first process.
        busy) busy=' busy=1' ;;
    esac
    if [ -n "$devices" ]; then
        # The disk with the file system has an overlay, so that all guests start with its content of that time.
        truncate -s 16M disk.img
        mke2fs -F disk.img >/dev/null 2>&1 || fail create "no file system on the disk"
        raw_disk raw.img before
        cksum disk.img >disk.sum
        given='--disk disk.img,overlay --disk raw.img --rng --vsock 3,guest.sock'
        # A host process with a connection of the guest at the snapshot.
        vsock answer guest.sock_2001 >old.out 2>&1 &
    fi
    creating_at=$(date +%s)
    # shellcheck disable=SC2086 # words
    step create snap create guest.snap --timeout 280s --kernel /vmlinux --initrd /guest.cpio \
        --memory 160M --cpus "$cpus" --when output:READY $given \
        --cmdline "console=ttyS0 quiet mitigations=off panic=-1$busy"
    created_at=$(date +%s)
    figures create 'guest.snap'
    step verify snap verify guest.snap

    for run in eager lazy clone; do
        case $run in eager) lazily='' ;; *) lazily=--lazy ;; esac
        if [ -n "$devices" ]; then
            # The raw disk has another content now, which the guest must see: so it is forced.
            raw_disk raw-copy.img "changed-for-$run"
            moved="--disk disk.img --disk raw-copy.img --force-disks"
            if [ "$run" = clone ]; then moved="$moved --vsock 4,clone.sock"; fi
            case $run in clone) socket=clone.sock ;; *) socket=guest.sock ;; esac
            vsock ask $socket 1000 "hello $run" >"$run.asked" 2>&1 &
            asking=$!
            vsock answer ${socket}_2000 >"$run.answered" 2>&1 &
        fi
        # 20 s are a lockup for its watchdog, unless it knows that it was paused.
        if [ "$run" = clone ] && [ -n "$busy" ]; then sleep 25; fi
        restored_at=$(date +%s)
        step "$run" sh -c "echo hello | snap restore $lazily guest.snap $moved --until 'tick 12 '"
        on_time "$run" "$restored_at"
        figures "$run" 'tick 11|first'
        ticks "$run"
        holds "$run" "it saw no lockup" sh -c "! grep lockup $run.out"
        holds "$run" "its input arrived" grep -q '^heard hello' "$run.out"
        holds "$run" "$cpus CPUs answer" grep -q "^tick 11 .* cpus=$cpus/$cpus" "$run.out"
        if [ -n "$devices" ]; then
            holds "$run" "it reads the disk as it is now" test "$(word raw "$run")" = "changed-for-$run"
            holds "$run" "its writes are on the disk" grep -q 'guest wrote this' raw-copy.img
            holds "$run" "the other disk's image is as it was" sh -c 'cksum disk.img | cmp - disk.sum'
            holds "$run" "its vsock answered" wait "$asking"
            holds "$run" "with the text that it received" grep -qx "hello $run" "$run.asked"
            holds "$run" "it connected to the host" grep -qx 'from the guest' "$run.answered"
            holds "$run" "its connection from before is gone" test "$(word old "$run")" = gone
        fi
    done
    holds clone "its random numbers differ from its twin's" \
        test "$(word random lazy)" != "$(word random clone)"
    holds clone "and its boot id" test "$(word boot lazy)" != "$(word boot clone)"
}
