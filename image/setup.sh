#!/usr/bin/env bash
# Installs what building, running and checking Gaia needs, where it is missing. Run it as often as you like: with
# nothing missing it takes a fraction of a second and changes nothing.
#
#   image/setup.sh          everything: to build, run, check and measure
#   image/setup.sh run      only what building and running the appliance needs
#
# It installs Debian packages (as root, or through sudo), targets and components of the Rust toolchain in use
# (through rustup), and cargo-deny into the cache of this user, compiled from its source.
set -euo pipefail

readonly CARGO_DENY_VERSION=0.20.2
readonly CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/gaia"

# What is needed, and by what.
readonly PACKAGES_RUN=(
    linux-source-6.12 # the kernel's source
    gcc               # the kernel, and the C parts of Rust crates
    libc6-dev         # the tools that the kernel's build compiles for itself
    make              # the kernel, and this project's front door
    flex bison        # kconfig
    bc                # the kernel's time constants
    libelf-dev        # objtool, a tool of the kernel's build
    xz-utils          # unpacks the source
    zstd              # packs the kernel
    erofs-utils       # packs the programs
    musl-tools        # musl-gcc: C parts of Rust crates for the appliance
    qemu-system-x86   # the machine it runs on
    e2fsprogs         # mke2fs makes its data disk
)
# No libssl-dev: the kernel signs nothing and holds no certificate. No cpio, pahole or kmod: the initramfs is written by
# gaia-image, and there is neither BTF nor a module.
readonly PACKAGES_CHECK=(
    g++  # libFuzzer, which drives the fuzz targets
    curl # the request a person makes
    wrk  # load while a graph is deployed, and what `make bench` holds its own against
    rsyslog rsyslog-gnutls # where the log is sent; the tests start their own, and Debian's service is not needed
    protobuf-compiler # reads what `gaia profile --pprof` writes
    docker-registry # what components are pushed to and pulled from; the tests start their own, and Debian's service is not needed
)
readonly TARGETS=(x86_64-unknown-linux-musl wasm32-wasip2)
readonly COMPONENTS=(rustfmt clippy)

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# Installs those of its arguments that are not installed.
debian_packages() {
    local id=unknown
    # The file sets variables of its own, so it is read in a shell of its own.
    # shellcheck source=/dev/null
    [[ -r /etc/os-release ]] && id=$(. /etc/os-release && printf '%s' "${ID:-unknown}")
    if [[ $id != debian ]]; then
        fail "this is $id, and only Debian (12 or newer, x86-64) is supported to build on." \
            "What is needed there, as Debian's packages: $*" \
            "A container or a virtual machine with Debian does."
    fi
    local -A installed=()
    local package status
    while read -r status package; do
        [[ $status == ii* ]] && installed[${package%%:*}]=1
    done < <(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "$@" 2>/dev/null || true)
    local missing=()
    for package in "$@"; do
        [[ -n ${installed[$package]:-} ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0

    local as_root=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || fail "these Debian packages are missing; as root, run:" \
            "    apt-get update && apt-get install --no-install-recommends ${missing[*]}"
        as_root=(sudo)
    fi
    say "installing Debian packages: ${missing[*]}"
    "${as_root[@]}" apt-get -q update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "${missing[@]}" ||
        fail "apt-get could not install ${missing[*]}" \
            "linux-source-6.12 is in Debian 13, and for Debian 12 in its security archive: is that among your sources?"
}

# Adds the targets and components that the active Rust toolchain lacks.
rust() {
    { command -v rustc && command -v cargo; } >/dev/null ||
        fail "there is no Rust here. Install rustup (https://rustup.rs, or Debian 13's package), then: rustup default stable"
    local sysroot target component missing_targets=() missing_components=()
    sysroot=$(rustc --print sysroot)
    for target in "${TARGETS[@]}"; do
        [[ -d $sysroot/lib/rustlib/$target/lib ]] || missing_targets+=("$target")
    done
    for component in "${COMPONENTS[@]}"; do
        [[ -x $sysroot/bin/cargo-${component/rustfmt/fmt} ]] || missing_components+=("$component")
    done
    ((${#missing_targets[@]} + ${#missing_components[@]})) || return 0
    command -v rustup >/dev/null || fail "the Rust toolchain in $sysroot lacks: ${missing_targets[*]} ${missing_components[*]}" \
        "They come easiest with rustup (https://rustup.rs, or Debian 13's package)."
    if ((${#missing_targets[@]})); then
        say "adding Rust targets: ${missing_targets[*]}"
        rustup target add "${missing_targets[@]}"
    fi
    if ((${#missing_components[@]})); then
        say "adding Rust components: ${missing_components[*]}"
        rustup component add "${missing_components[@]}"
    fi
}

# Compiles cargo-deny for this user. It shares nothing with the project's builds, so what it was compiled from goes away.
cargo_deny() {
    local root=$CACHE/tools
    [[ $("$root/bin/cargo-deny" --version 2>/dev/null) == "cargo-deny $CARGO_DENY_VERSION" ]] && return 0
    say "compiling cargo-deny $CARGO_DENY_VERSION into $root: once, some three minutes on two cores"
    mkdir -p "$root"
    local target
    target=$(mktemp -d "$root/build.XXXXXX")
    # shellcheck disable=SC2064 # now, while it has its value
    trap "rm -rf '$target'" EXIT
    # Without the project's flags and target: it runs on this machine only.
    env -u RUSTFLAGS -u CARGO_BUILD_TARGET CARGO_TARGET_DIR="$target" \
        cargo install --quiet --locked --root "$root" --version "$CARGO_DENY_VERSION" cargo-deny
}

case ${1:-all} in
run)
    debian_packages "${PACKAGES_RUN[@]}"
    rust
    ;;
all)
    debian_packages "${PACKAGES_RUN[@]}" "${PACKAGES_CHECK[@]}"
    rust
    cargo_deny
    ;;
*) fail "usage: image/setup.sh [run]" ;;
esac
