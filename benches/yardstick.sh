#!/usr/bin/env bash
# Times one program of compute kernels and kernel work (benches/yardstick) natively, in a Linux guest under QEMU's TCG with one
# vCPU, and in the same guest under antumbra with each MMU and engine: the same static file, kernel, initramfs, memory and
# command line. Prints what each kind of work costs everywhere, and the ratios to the host's processor and to TCG.
#
# The clock is the host's, and it is read here: guest time is no measure under antumbra, where it is retired instructions
# unless asked otherwise. The program says on its standard output (in a guest, the serial console) when a sample begins and
# ends, and waits until that has left; a sample is long enough that what the console costs does not count.
# Each machine is given as many units a sample as it does in about half a second, so times are divided by them.
#
# The rounds are interleaved, so that a noisy machine is noisy for everyone: only ratios taken in one run may be compared.
# It needs bash 5, coreutils, awk, perl and cargo; QEMU for the baseline; and the kernel that guests/linux/make.sh gets.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=benches/entrants.sh
. "$root/benches/entrants.sh"

usage() {
    cat <<'TEXT'
usage: benches/yardstick.sh [options]

  --rounds N         rounds, each of them every entrant once (3)
  --samples N        samples of each kind of work in a round (3); the fastest of all rounds counts
  --scale N          length of a sample: 10 is about half a second, much less measures the console too (10)
  --time CLOCK       wall, or cpu: what the entrant has had of the host's processors, for a host that is busy (wall)
  --only LIST        names of work, separated by commas (everything; the names: yardstick --list)
  --mmu LIST         MMUs of antumbra, separated by commas (shadow,ept)
  --engine LIST      engines of antumbra's CPU, separated by commas: interpret, translate; all: those it has
                     (the program's own choice)
  --direct LIST      also --cpu kvm --mmu shadow, with user code where each word of the list says, separated by commas: auto,
                     native, translate (none)
  --memory SIZE      guest memory (256M)
  --linux DIR        folder made by guests/linux/make.sh (target/linux)
  --kernel FILE      kernel image, if not DIR/vmlinuz
  --antumbra FILE    the program (target/release/antumbra)
  --yardstick FILE   the program to be timed, rather than the one that cargo builds now
  --machine M        QEMU's machine (pc)
  --qemu FILE        QEMU (qemu-system-x86_64)
  --no-qemu          without the baseline
  --no-native        without the host's processor
  --cmdline STR      words added to the kernel command line
  --timeout SECONDS  limit for one entrant's turn (600)
  --help             this text
TEXT
}

fail() { printf 'yardstick.sh: %s\n' "$*" >&2; exit 1; }

rounds=3 samples=3 scale=10 time=wall only='' mmu=shadow,ept engine='' direct='' memory=256M linux=$root/target/linux kernel='' antumbra=''
yardstick='' machine=pc qemu=qemu-system-x86_64 no_qemu=0 no_native=0 cmdline='' timeout=600
while [ $# -gt 0 ]; do
    case $1 in
        --rounds | --samples | --scale | --time | --only | --mmu | --engine | --direct | --memory | --linux | --kernel | --antumbra | --yardstick | \
            --machine | --qemu | --cmdline | --timeout)
            [ $# -ge 2 ] || { printf 'yardstick.sh: %s needs a value\n' "$1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift ;;
        --no-qemu) no_qemu=1 ;;
        --no-native) no_native=1 ;;
        --help | -h) usage; exit 0 ;;
        *) printf "yardstick.sh: unknown argument '%s'\n" "$1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
for option in rounds samples scale timeout; do
    [[ ${!option} =~ ^[1-9][0-9]*$ ]] || { echo "yardstick.sh: --$option takes a positive number" >&2; exit 2; }
done
[[ $time =~ ^(wall|cpu)$ ]] || { echo "yardstick.sh: --time takes wall or cpu" >&2; exit 2; }
[[ $memory =~ ^[1-9][0-9]*[KMG]?$ ]] || { echo "yardstick.sh: --memory takes a size such as 512M" >&2; exit 2; }

kernel=${kernel:-$linux/vmlinuz}
antumbra=${antumbra:-${CARGO_TARGET_DIR:-$root/target}/release/antumbra}
[ -r "$kernel" ] || fail "there is no $kernel: run guests/linux/make.sh"
[ -x "$antumbra" ] || fail "there is no $antumbra: run cargo build --release"
if [ "$no_qemu" = 0 ] && ! command -v "$qemu" >/dev/null; then
    fail "there is no $qemu (apt-get install qemu-system-x86), or give --no-qemu"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Static, because the guest has no libraries; without vectorisation, so that a loop is what it says. The flags are for every
# crate of the program, which is why they are not in the profile; its folder is its own, so nothing else is built anew.
if [ -z "$yardstick" ]; then
    env -u CARGO_ENCODED_RUSTFLAGS \
        RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static -C no-vectorize-loops -C no-vectorize-slp' \
        cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --profile yardstick -p yardstick >&2 ||
        fail "building the program failed"
    yardstick=${CARGO_TARGET_DIR:-$root/target}/yardstick/yardstick
fi
[ -x "$yardstick" ] || fail "there is no $yardstick"
"$yardstick" --list >"$work/list" || fail "$yardstick does not say what it can do"
works=()
for name in ${only//,/ }; do
    awk -v want="$name" '$1 == want { found = 1 } END { exit !found }' "$work/list" || fail "there is no work named '$name'"
    works+=("$name")
done
[ -n "$only" ] || mapfile -t works < <(awk '{ print $1 }' "$work/list")

# The program is the guest's first process, and all there is beside the console.
initramfs=$work/initramfs.cpio
printf '%s\n' "dir dev 0755" "nod dev/console 0600 5 1" "file init 0755 $work/init" >"$work/entries"
cp "$yardstick" "$work/init"
perl "$root/guests/linux/cpio.pl" <"$work/entries" >"$initramfs" || fail "could not write the initramfs"

words="console=ttyS0 nokaslr cryptomgr.notests=1 panic=-1 quiet${cmdline:+ $cmdline}"
listed=$(antumbra_entrants "$antumbra" "$mmu" "$engine") || exit 1
mapfile -t guests <<<"$listed"
listed=$(direct_entrants "$direct") || exit 1
[ -z "$listed" ] || mapfile -t -O ${#guests[@]} guests <<<"$listed"
[ "$no_qemu" = 1 ] || guests=(qemu "${guests[@]}")
entrants=("${guests[@]}")
[ "$no_native" = 1 ] || entrants=(native "${guests[@]}")

own_choice=$(engine_by_default "$antumbra")
# How many units the entrant $1 does in a sample, of work of the kind $2.
times_of() {
    local entrant=$1
    case $entrant in native | qemu | *-*) ;; *) entrant=$entrant-$own_choice ;; esac
    case $entrant-$2 in
        native-compute | direct-auto-compute | direct-native-compute) echo $((100 * scale)) ;;
        *-interpret-* | direct-native-system) echo "$scale" ;;
        *) echo $((20 * scale)) ;;
    esac
}

# Runs the entrant $1 with $2 units a sample of the work whose names follow.
execute() {
    local entrant=$1 argv options
    options="--times $2 --samples $samples ${*:3}"
    case $entrant in
        # Split on purpose: options and names are words.
        # shellcheck disable=SC2206
        native) argv=("$yardstick" $options) ;;
        # Without default devices, since each of them costs the kernel a driver's probe.
        qemu) argv=("$qemu" -machine "$machine" -accel tcg -cpu qemu64 -smp 1 -m "$memory" -nodefaults -no-reboot
            -display none -serial stdio -kernel "$kernel" -initrd "$initramfs" -append "$words -- yardstick $options") ;;
        *)
            mapfile -t argv < <(entrant_options "$antumbra" "$entrant")
            local environment=''
            # Where the host lets user code see its own CPUID, the C library takes instructions that the rest has not.
            [ "$entrant" != direct-native ] || environment=' GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ,-AVX512ER'
            argv=("$antumbra" run --quiet "${argv[@]}" --memory "$memory" --kernel "$kernel"
                --initramfs "$initramfs" --cmdline "$words$environment -- yardstick $options") ;;
    esac
    with_limit "$timeout" "${argv[@]}"
}

# One turn of the entrant $1 in round $2 with $3 units a sample of the work whose names follow. Appends "entrant name kind
# nanoseconds", the time of an operation, to the results.
turn() {
    local entrant=$1 round=$2 line process='' at='' name='' kind='' operations='' done='' status='' log
    log=$work/$entrant.$round.$3
    while IFS= read -r line; do
        line=${line%$'\r'}
        case $line in
            *'YARDSTICK: begin '*)
                read_stamp "$time" "$process"
                at=$stamp
                read -r name kind operations <<<"${line#*YARDSTICK: begin }" ;;
            *'YARDSTICK: sample '*)
                read_stamp "$time" "$process"
                printf '%s %s %s %s\n' "$entrant" "$name" "$kind" $(((stamp - at) / operations)) >>"$work/results"
                at=$stamp ;;
            'entrant process '*) process=${line##* } ;;
            *'YARDSTICK: done'*) done=1 ;;
            'yardstick.sh status '*) status=${line##* } ;;
        esac
        printf '%s\n' "$line" >>"$log.log"
    done < <(
        code=0
        execute "$entrant" "${@:3}" 2>"$log.err" || code=$?
        printf '\nyardstick.sh status %s\n' "$code"
    )
    if [ "$status" != 0 ] || [ -z "$done" ]; then
        tail -n 20 "$log.log" >&2
        tail -n 20 "$log.err" >&2
        if [ "$status" = 124 ]; then fail "$entrant, round $round: not over after $timeout s"; fi
        fail "$entrant, round $round: ended with status $status, ${done:+after}${done:-before} the work was done"
    fi
}

# The names among those asked for that are of the kind $1.
of_kind() { awk -v kind="$1" -v want=" ${works[*]} " '$2 == kind && index(want, " " $1 " ") { print $1 }' "$work/list"; }

# Prints the table of the kind $1: the fastest sample of each work and entrant in the unit $2 of $3 nanoseconds, the ratio to
# native (where $4 says so) and to QEMU, their geometric means and the worst of each.
table() {
    awk -v kind="$1" -v unit="$2" -v nanoseconds="$3" -v with_native="$4" -v entrants="${entrants[*]}" \
        -v works="$(of_kind "$1" | tr '\n' ' ')" '
        $3 == kind { if (!(($1, $2) in best) || $4 < best[$1, $2]) best[$1, $2] = $4 }
        function note(base, e, w,    ratio) {
            if (e == base || !((base, w) in best)) return "-"
            ratio = best[e, w] / best[base, w]
            logs[base, e] += log(ratio); count[base, e]++
            if (ratio > worst[base, e]) { worst[base, e] = ratio; whose[base, e] = w }
            return sprintf("%.2fx", ratio)
        }
        function mean(base, e) { return count[base, e] ? sprintf("%.2fx", exp(logs[base, e] / count[base, e])) : "-" }
        function most(base, e) { return count[base, e] ? sprintf("%.2fx", worst[base, e]) : "-" }
        function cell(e, time, to_native, to_qemu) {
            line = line sprintf(" %10s", time)
            if (with_native && e != "native") line = line sprintf(" %8s", to_native)
            if (e != "native" && e != "qemu") line = line sprintf(" %8s", to_qemu)
        }
        function flush_line(head) { printf "%-15s%s\n", head, line; line = "" }
        BEGIN { n = split(entrants, entrant, " "); m = split(works, work, " ") }
        END {
            for (i = 1; i <= n; i++) {
                wide = 11 + 9 * (with_native && entrant[i] != "native") + 9 * (entrant[i] != "native" && entrant[i] != "qemu")
                line = line sprintf(" %*s", wide - 1, entrant[i])
            }
            flush_line(kind)
            for (i = 1; i <= n; i++) cell(entrant[i], unit, "/native", "/qemu")
            flush_line("")
            for (j = 1; j <= m; j++) {
                for (i = 1; i <= n; i++) {
                    e = entrant[i]
                    cell(e, sprintf("%.2f", best[e, work[j]] / nanoseconds), note("native", e, work[j]), note("qemu", e, work[j]))
                }
                flush_line(work[j])
            }
            for (i = 1; i <= n; i++) cell(entrant[i], "", mean("native", entrant[i]), mean("qemu", entrant[i]))
            flush_line("geometric mean")
            for (i = 1; i <= n; i++) cell(entrant[i], "", most("native", entrant[i]), most("qemu", entrant[i]))
            flush_line("worst")
        }' "$work/results"
}

# How far the samples of an entrant lie apart: the median over the minimum, of the work where that is largest.
noise() {
    local entrant
    for entrant in "${entrants[@]}"; do
        sort -k1,1 -k2,2 -k4,4n "$work/results" | awk -v who="$entrant" '
            function close_work(    ratio) {
                if (n) { ratio = v[int((n + 1) / 2)] / v[1]; if (ratio > most) { most = ratio; whose = name } }
                n = 0
            }
            $1 == who { if ($2 != name) close_work(); name = $2; v[++n] = $4 }
            END { close_work(); printf "  %s %.2fx (%s)", who, most, whose }'
    done
    echo
}

# --- the run ----------------------------------------------------------------------------------------------------------

echo "kernel:   $(basename "$kernel") $(sha256sum <"$kernel" | cut -c1-16)   program: $(sha256sum <"$yardstick" | cut -c1-16)"
echo "command:  $words"
echo "machine:  $(nproc) CPUs, load $(cut -d' ' -f1-3 /proc/loadavg); guest memory $memory; rounds $rounds, samples $samples," \
    "scale $scale, $time time"
[ "$no_qemu" = 1 ] || echo "baseline: $("$qemu" --version | head -n 1), $machine, -accel tcg"
echo

for ((round = 1; round <= rounds; round++)); do
    for entrant in "${entrants[@]}"; do
        began=$SECONDS
        for kind in compute system; do
            mapfile -t names < <(of_kind "$kind")
            # One boot for everything, but where the kinds differ in what is done in half a second.
            apart=0
            case $entrant in native | direct-*) apart=1 ;; esac
            if [ "$apart" = 0 ]; then names=("${works[@]}"); fi
            [ ${#names[@]} = 0 ] || turn "$entrant" "$round" "$(times_of "$entrant" "$kind")" "${names[@]}"
            [ "$apart" = 1 ] || break
        done
        printf '  round %s  %-17s %4s s\n' "$round" "$entrant" $((SECONDS - began))
    done
done

if [ -n "$(of_kind compute)" ]; then
    echo
    table compute us/unit 1e3 1
    echo "(asked of antumbra: a geometric mean of at most 2.00x native, and none above 4.00x)"
fi
if [ -n "$(of_kind system)" ]; then
    echo
    table system us/each 1e3 0
    echo "(asked of antumbra: each at most 0.50x qemu)"
    [ "$time" = wall ] || echo "(native: without the time of child processes)"
fi
echo
echo "The fastest sample counts. Median over fastest, where that is most:$(noise)"
