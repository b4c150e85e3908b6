# lab/lib.sh: what every lab script shares. Sourced, never run.
#
# Places, messages, packages and guests' files. Everything that is made goes under build/ and can be deleted at any
# time. Two scripts may run at once: what they share is made under a lock, in a temporary directory that is renamed
# when it is complete, so a reader sees either nothing or the whole.
#
# Packages come from the Debian mirrors that the host's own apt is configured with, plus the same mirrors' backports.
# The package index is a private one under build/apt, so neither the host's sources nor its lists are touched; one of
# 32-bit packages is beside it.

set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${APIARY_BUILD:-$top/build}
guests=$build/guests
export LC_ALL=C

# say WORDS: one line of progress, on standard error.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die WORDS: says what is wrong and ends the script.
die() { say "$*"; exit 1; }

have() { command -v "$1" >/dev/null 2>&1; }

# locked NAME COMMAND...: runs the command while holding build/NAME.lock. The lock dies with its holder. A command that
# already runs under the lock (a script called by a script) goes straight on.
locked() {
    local name=$1 variable=APIARY_LOCKED_${1^^}
    shift
    if [ -n "${!variable:-}" ]; then
        "$@"
        return
    fi
    mkdir -p "$build"
    (
        flock -n 9 || { say "waiting for another run (build/$name.lock)"; flock 9; }
        export "$variable=1"
        # What the command leaves running must not keep the lock.
        "$@" 9>&-
    ) 9>"$build/$name.lock"
}

# ---------------------------------------------------------------------------------------------------------------------
# Packages

need_apt() {
    have apt-get && have dpkg-deb && [ -f /etc/debian_version ] ||
        die "this step takes its parts from Debian packages, and this host has no apt-get. Use a Debian host (or a" \
            "Debian chroot or container), or install by hand: $*"
}

# private_index [DIRECTORY]: sets the array `apt_options`, which makes apt use the index under build/apt, or in another
# directory. The host's own settings (proxies, certificates) still hold; what it does after an update (clean-up hooks for
# its own lists) does not.
private_index() {
    local dir=${1:-$build/apt}
    mkdir -p "$dir/sources.list.d" "$dir/lists/partial" "$dir/archives/partial"
    cat >"$dir/apt.conf" <<-END
	Dir::Etc::sourcelist "/dev/null";
	Dir::Etc::sourceparts "$dir/sources.list.d";
	Dir::State::lists "$dir/lists";
	Dir::Cache "$dir";
	Dir::Cache::archives "archives";
	Dir::Cache::pkgcache "pkgcache.bin";
	Dir::Cache::srcpkgcache "srcpkgcache.bin";
	APT::Sandbox::User "root";
	APT::Install-Recommends "false";
	Acquire::Languages "none";
	Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
	Acquire::Retries "5";
	DPkg::Lock::Timeout "600";
	Dpkg::Use-Pty "0";
	quiet "1";
	#clear APT::Update;
	END
    apt_options=(-c "$dir/apt.conf")
    export DEBIAN_FRONTEND=noninteractive
}

# release_mirror: sets release, the host's, uri, its mirror, which the index knows, and signed, an option for a sources
# line. The uri is empty where the host's release is not Debian's.
release_mirror() {
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    release=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    uri=$(apt-get "${apt_options[@]}" indextargets --format '$(REPO_URI) $(CODENAME) $(ORIGIN) $(COMPONENT)' \
        'Created-By: Packages' | awk -v r="$release" '$2 == r && $3 == "Debian" && $4 == "main" { print $1; exit }')
    signed=
    [ ! -e "$keyring" ] || signed="[signed-by=$keyring] "
}

make_index() {
    local dir=$build/apt file release uri signed
    rm -f "$dir"/sources.list.d/*
    [ ! -s /etc/apt/sources.list ] || ln -s /etc/apt/sources.list "$dir/sources.list.d/host.list"
    for file in /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ ! -e "$file" ] || ln -s "$file" "$dir/sources.list.d/"
    done
    apt-get "${apt_options[@]}" update >"$dir/update.log" 2>&1 ||
        { cat "$dir/update.log" >&2; die "apt-get update failed; is the network there?"; }

    # Backports live on the same mirror as the release.
    release_mirror
    if [ -n "$uri" ]; then
        printf 'deb %s%s %s-backports main\n' "$signed" "$uri" "$release" >"$dir/sources.list.d/backports.list"
        if ! apt-get "${apt_options[@]}" update >"$dir/update.log" 2>&1; then
            say "the mirror has no $release-backports; going on without"
            rm "$dir/sources.list.d/backports.list"
            apt-get "${apt_options[@]}" update >"$dir/update.log" 2>&1 ||
                { cat "$dir/update.log" >&2; die "apt-get update failed; is the network there?"; }
        fi
    fi
    touch "$dir/complete"
}

# package_index: makes the private index if there is none, or if it is older than a day. A mirror drops superseded
# packages, so a stale index names files that are gone.
package_index() {
    need_apt "$@"
    private_index
    locked index fresh_index
}

fresh_index() {
    local fresh
    fresh=$(find "$build/apt/complete" -mmin -1440 2>/dev/null || true)
    [ -n "$fresh" ] || { say "reading the package index"; rm -f "$build/apt/complete"; make_index; }
}

# package_index_i386 WHAT: the same for 32-bit packages, of the release alone, without its updates: what a program of
# last year did, it does still.
package_index_i386() {
    local dir=$build/apt-i386 release uri signed
    package_index "$@"
    release_mirror
    [ -n "$uri" ] || die "none of the host's sources is Debian $release"
    private_index "$dir"
    printf 'APT::Architecture "i386";\nAPT::Architectures { "i386"; };\n' >>"$dir/apt.conf"
    # A release changes a few times a year.
    if [ -z "$(find "$dir/complete" -mtime -7 2>/dev/null || true)" ]; then
        rm -f "$dir/complete"
        printf 'deb %s%s %s main\n' "$signed" "$uri" "$release" >"$dir/sources.list.d/release.list"
        apt-get "${apt_options[@]}" update >"$dir/update.log" 2>&1 ||
            { cat "$dir/update.log" >&2; die "apt-get update failed; is the network there?"; }
        touch "$dir/complete"
    fi
}

# candidate PACKAGE [backports]: the version that would be taken, or nothing.
candidate() {
    if [ "${2:-}" = backports ]; then
        apt-cache "${apt_options[@]}" madison "$1" 2>/dev/null | awk '$6 ~ /-backports\// { print $3; exit }'
    else
        apt-cache "${apt_options[@]}" policy "$1" 2>/dev/null |
            awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
    fi
}

# download PACKAGE[=VERSION]: fetches the .deb into the current directory; apt checks it against the signed index.
download() {
    apt-get "${apt_options[@]}" download "$1" >download.log 2>&1 ||
        { cat download.log >&2; die "the package $1 could not be fetched"; }
    rm download.log
}

# need COMMAND PACKAGE [COMMAND PACKAGE]...: installs each package whose command is missing.
need() {
    local missing=()
    while [ $# -gt 1 ]; do
        have "$1" || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} -eq 0 ] || locked packages install_packages "${missing[@]}"
}

install_packages() {
    need_apt "$@"
    [ "$(id -u)" -eq 0 ] || die "missing packages: $*. Install them (apt-get install $*), or run this as root."
    [ -n "${apt_options:-}" ] || package_index "$@"
    say "installing $*"
    apt-get "${apt_options[@]}" install -y --no-install-recommends "$@" >"$build/apt/install.log" 2>&1 ||
        { tail -n 30 "$build/apt/install.log" >&2; die "apt-get install $* failed (build/apt/install.log)"; }
}

# need_rust: the toolchain is the one thing that is not installed for the user: which one is theirs to choose.
need_rust() {
    have cargo || [ ! -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    have cargo || die "no cargo found: Apiary needs a Rust toolchain (1.90 or newer; rustup has them)"
    need cc gcc
}

# need_qemu: QEMU's system emulator, and its tools for images. They share files, so both have to be of the same version: that of
# the one which is installed, or the newest that the index has.
need_qemu() {
    ! have qemu-system-x86_64 || ! have qemu-img || return 0
    locked packages install_qemu
}

install_qemu() {
    package_index qemu-system-x86
    local version
    version=$(dpkg-query -W -f '${Version}\n' qemu-utils qemu-system-x86 2>/dev/null | grep -m1 . || true)
    [ -n "$version" ] || version=$(candidate qemu-system-x86 backports)
    [ -n "$version" ] || version=$(candidate qemu-system-x86)
    if [[ $version == *~bpo* ]]; then
        # Its companions (qemu-system-data, seabios) then have to come from backports as well.
        apt_options+=(-o "APT::Default-Release=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")-backports")
    fi
    install_packages "qemu-system-x86=$version" "qemu-utils=$version"
}

# ---------------------------------------------------------------------------------------------------------------------
# Guests

# pack DIRECTORY FILE: the directory as a newc archive, written reproducibly. A file that is already the same is left.
pack() {
    local new=$2.$$
    find "$1" -exec touch -h -d @0 {} +
    chmod -R u=rwX,go=rX "$1"
    (cd "$1" && find . -mindepth 1 | sort | cpio -o -H newc -R 0:0 --reproducible --quiet) >"$new"
    if cmp -s "$new" "$2"; then rm "$new"; else mv "$new" "$2"; fi
}
