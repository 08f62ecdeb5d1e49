#!/usr/bin/env bash
# Install packages for a Python with the tools of .venv, quickly where that is possible.
#
#   scripts/install.sh [--pip] PYTHON REQUIREMENT ...    options that pip and uv share are passed on
#
# uv installs in seconds what takes pip a minute, and links files that another environment has. It
# reads none of pip's settings; where it cannot get at the packages, pip installs them. --pip is for
# torch, whose build depends on these settings.
set -euo pipefail
tools=$(dirname "$0")/../.venv/bin
if [[ $1 == --pip ]]; then
    shift
elif [[ -x $tools/uv ]]; then
    "$tools/uv" pip install --quiet --python "$@" && exit
    echo 'NOTICE: uv could not install these packages (see above); pip installs them.' >&2
fi
python=$1
shift
exec "$tools/python" -m pip --python "$python" install \
    --quiet --disable-pip-version-check --no-input --no-compile "$@"
