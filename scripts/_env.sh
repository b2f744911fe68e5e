# Sourced by the scripts beside it: finds a Python, makes the virtual environment, installs into it.
#
#   prepare_environment EXTRAS     EXTRAS: comma-separated extras of pyproject.toml
#
# It sets VENV and puts its programs first on PATH. What is installed already is not touched again as
# long as pyproject.toml, constraints.txt, the compiled core's sources and the Python stay as they are.
#
#   SHMBLOCKS_VENV      where the environment lies (.venv in the checkout)
#   SHMBLOCKS_PYTHON    the Python to make it from (the first of python3, python3.14 ... python3.10
#                       that is new enough)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SHMBLOCKS_VENV:-$ROOT/.venv}

_is_usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

_find_python() {
    local candidate
    for candidate in ${SHMBLOCKS_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if _is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python of at least 3.10 with the modules venv and ensurepip was found" \
        "(tried ${SHMBLOCKS_PYTHON:-python3 and python3.14 to python3.10});" \
        "install one, or name one in SHMBLOCKS_PYTHON" >&2
    return 1
}

# What the installation depends on; the checkout too, because it is installed in place.
_fingerprint() {
    {
        echo "$ROOT $1"
        "$VENV/bin/python" --version
        cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT/scripts/constraints.txt"
        cat "$ROOT"/shmblocks/_core/*.[ch] # compiled by the installation
    } | sha256sum | cut -d ' ' -f 1
}

_is_installed() {
    [ -f "$2" ] && [ "$(cat "$2")" = "$(_fingerprint "$1")" ]
}

_install() {
    local extras=$1 stamp="$VENV/.installed-${1//,/-}" python
    if _is_installed "$extras" "$stamp"; then
        return
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(_find_python)
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    echo "installing shmblocks[$extras] into $VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/scripts/constraints.txt" --editable "$ROOT[$extras]"
    _fingerprint "$extras" >"$stamp"
}

prepare_environment() {
    # Two scripts started together must not install into one environment at once.
    mkdir -p "$VENV"
    (
        if command -v flock >/dev/null; then
            flock 9
        fi
        _install "$1"
    ) 9>"$VENV/.lock"
    export PATH="$VENV/bin:$PATH"
}
