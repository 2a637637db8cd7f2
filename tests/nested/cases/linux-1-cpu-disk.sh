# shellcheck shell=sh
# The same with a disk and a source of random numbers.
# shellcheck source=tests/nested/outer/linux.sh
. /linux.sh
linux 1 disk
