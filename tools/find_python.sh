#!/usr/bin/env bash
# Print the first Python of a supported version (3.10 to 3.13), or python3 so that check_system.sh can say what is wrong.
for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
  if command -v "$candidate" > /dev/null &&
    "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; then
    echo "$candidate"
    exit
  fi
done
echo python3
