# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# All of the library, for scripts that set something up.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for part in toolchain-root kernel own-kernel upstream-tests accel module selftests vmtest; do
    # shellcheck source=/dev/null
    . "$SOURCE_DIR/scripts/lib/$part.sh"
done
unset part
