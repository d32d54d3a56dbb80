#!/bin/sh
# Prints the path of a Python >= 3.12 that runs and can make a virtual environment:
# $PYTHON, else one on PATH, else one that pyenv has installed.

# A pyenv shim is found on PATH and still fails: only running a candidate tells.
works() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

print_if_works() {
    if works "$1"; then
        printf '%s\n' "$1"
        exit 0
    fi
}

if [ -n "$PYTHON" ]; then
    print_if_works "$PYTHON"
    echo "PYTHON=$PYTHON is no Python >= 3.12 that runs: looking for another." >&2
fi

set -f
IFS=:
for name in python3.12 python3.13 python3.14 python3.15 python3 python; do
    for directory in $PATH; do
        [ -x "$directory/$name" ] && print_if_works "$directory/$name"
    done
done
unset IFS
set +f

for root in "$PYENV_ROOT" "$HOME/.pyenv"; do
    for candidate in "$root"/versions/3.1[2-9]*/bin/python; do
        print_if_works "$candidate"
    done
done

echo "No Python >= 3.12 found: get one with 'pyenv install 3.12', or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
