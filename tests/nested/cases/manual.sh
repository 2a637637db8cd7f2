# shellcheck shell=sh
# The commands of docs/guests.md: the distribution's bzImage and an initrd of busybox boot to READY; the shell
# takes keyboard input after the restore.
cp -r /manual/root /manual/initrd.cpio .
step create sh -c "$(sed -n 1p /manual/commands.snap) --timeout 280s"
figures create 'linux.snap'
step shell sh -c "echo 'echo \$((6 * 7)) is the answer' | $(sed -n 2p /manual/commands.snap) --until '42 is the answer'"
figures shell '42 is the answer|first'
