# shellcheck shell=sh
# A stock Debian kernel on one CPU, which never sleeps.
# shellcheck source=tests/nested/outer/linux.sh
. /linux.sh
linux 1 busy
