#!/usr/bin/env bash
# The operator library's own tests, in C++.
#
#   scripts/check_native.sh host [--quick]     sanitizers: kernels and 1,000,000 fuzz cases; and -O3 kernels
#   scripts/check_native.sh aarch64 [--quick]  cross-compiled; scalar, NEON and i8mm kernels under qemu-user
#
# Emulated are every seventh case of each level, and 20,000 fuzz cases. --quick takes every seventh
# case with -O3, every 29th under sanitizers and emulated, and 40,000 fuzz cases under sanitizers: still
# each width with each group, and with each combination of types, at each level; levels whose
# instructions are emulated under sanitizers only.
#
# Tools that are missing are installed with apt-get where that is possible. Where it is not, the
# script fails, or with QALORA_ALLOW_SKIP=1 says so and ends well.
set -euo pipefail
cd "$(dirname "$0")/.."
native=qalora_compile/runtime/native
builds=build-native # not in build/, which a check of the wheel empties

need() { # COMMAND PACKAGE ...
    local missing=()
    while (($#)); do
        command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    ((${#missing[@]})) || return 0
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
            >/dev/null 2>&1 && return 0
    fi
    echo "NOTICE: native tests ($mode) need these packages: ${missing[*]}" >&2
    [[ ${QALORA_ALLOW_SKIP:-} == 1 ]] && exit 0
    exit 2
}

build() { # FOLDER TARGET[,TARGET] OPTION ...
    local folder=$1 targets=${2/,/ }
    shift 2
    cmake -S "$native" -B "$builds/$folder" -DQALORA_TESTS=ON "$@" >"$builds/$folder.log" ||
        { cat "$builds/$folder.log"; return 1; }
    cmake --build "$builds/$folder" --parallel 2 --target $targets >>"$builds/$folder.log" ||
        { cat "$builds/$folder.log"; return 1; }
}

at_once() { # COMMAND ...: each one string; all end before the first failure is one
    local jobs=() job status=0
    for job in "$@"; do
        $job | sed "s|^|${job%% *}: |" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    return "$status"
}

mode=${1:-}
plain=1 sanitized=1 emulated=7 cases=500000 levels=ON
[[ ${2:-} == --quick ]] && plain=7 sanitized=29 emulated=29 cases=20000 levels=OFF
mkdir -p "$builds"
case $mode in
host)
    need cmake cmake make make g++ g++
    at_once "build native-sanitize kernel_test,fuzz -DQALORA_SANITIZE=ON" \
        "build native-plain kernel_test -DQALORA_EMULATED=$levels"
    at_once "$builds/native-sanitize/kernel_test --part $sanitized" \
        "$builds/native-plain/kernel_test --part $plain" \
        "$builds/native-sanitize/fuzz 1 $cases" "$builds/native-sanitize/fuzz 2 $cases"
    ;;
aarch64)
    need cmake cmake make make aarch64-linux-gnu-g++ g++-aarch64-linux-gnu qemu-aarch64-static \
        qemu-user-static
    build native-aarch64 kernel_test,fuzz -DCMAKE_TOOLCHAIN_FILE="$PWD/$native/toolchains/aarch64-linux-gnu.cmake"
    # CPUs with matrix products, with dot products alone, and with neither, which must not take the NEON
    # kernels.
    at_once "qemu-aarch64-static -cpu max $builds/native-aarch64/kernel_test --part $emulated scalar neon i8mm" \
        "qemu-aarch64-static -cpu cortex-a76 $builds/native-aarch64/kernel_test --part $emulated" \
        "qemu-aarch64-static -cpu cortex-a53 $builds/native-aarch64/kernel_test --part $emulated" \
        "qemu-aarch64-static -cpu max $builds/native-aarch64/fuzz 1 20000"
    ;;
*)
    sed -n '4,5p' "$0" >&2
    exit 2
    ;;
esac
