#!/usr/bin/env bash
# Say in one line what is missing on this machine. Usage: check_system.sh PYTHON
python=${1:-python3}
fail() {
  echo "zerokl: $1" >&2
  exit 1
}
"$python" -c '' 2> /dev/null || fail "no $python found; on Debian or Ubuntu: apt-get install python3 python3-venv python3-dev g++"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$python is $("$python" -V 2>&1), but 3.10 to 3.13 is needed; choose one with: make clean; make PYTHON=python3.12 ..."
"$python" -c 'import venv, ensurepip' 2> /dev/null || fail "$python has no venv module; on Debian or Ubuntu: apt-get install python3-venv"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
  fail "$python has no headers; on Debian or Ubuntu: apt-get install python3-dev"
compiler=${CXX:-g++} # may carry a launcher or options
command -v "${compiler%% *}" > /dev/null || fail "no C++ compiler found; on Debian or Ubuntu: apt-get install g++"
