#!/usr/bin/env bash
# The tests of sam_obf.py, and of a loop that uses it, on the oldest torch that its docstring claims and on the newest, each
# in a virtual environment of its own. It needs the network and 6 GB, and takes a few minutes.
#
#     tests/versions.sh                        # both
#     tests/versions.sh "==2.6.*" "==2.9.*"    # others
set -euo pipefail
cd "$(dirname "$0")/.."
claim=$(sed -n '2,3s/.*torch \([0-9.]*\) or newer.*/\1/p' sam_obf.py)
[ $# -gt 0 ] || set -- "==$claim.*" ">=$claim"
for version; do
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
    python3 -m venv "$place/venv"
    "$place/venv/bin/pip" install -q "torch$version" numpy pytest hypothesis scikit-learn
    cp sam_obf.py tests/{brute_force,test_obf,test_perturbations,test_sam_*,test_fuzz}.py "$place"
    cp examples/plain_loop.py "$place"
    cd "$place"
    venv/bin/python -c 'import sys, torch; print(f"\nPython {sys.version.split()[0]}, torch {torch.__version__}")'
    venv/bin/python -m pytest -q -rs -p no:cacheprovider .
    venv/bin/python plain_loop.py | tail -n 1
    cd - > /dev/null
    rm -rf "$place"
done
