#!/usr/bin/env bash
# Boots the stock Linux kernel side by side in one run: under QEMU's TCG with one vCPU, and under antumbra with each MMU; the
# same kernel, initramfs, memory and command line. Prints how long it took from the start of the program to the marker line
# of user space and to power-off (minima and medians over the rounds), what each phase of the workload took, the ratios to
# QEMU, and antumbra's own exact counts.
#
# All times are the host's, taken when a line comes out of the guest; guest time is no measure under antumbra, where it is
# retired instructions.
#
# The rounds are interleaved, so that a noisy machine is noisy for everyone: only ratios taken in one run may be compared.
# It needs bash 5, coreutils and awk; QEMU for the baseline; and what guests/linux/make.sh made.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=benches/entrants.sh
. "$root/benches/entrants.sh"

# Where the counts stand in the program's --report file: a heading, then the path of the number, with dots between the keys.
# A path that the report has not is shown as "?", and the run says so.
counts=(
    "instructions:counts.instructions"
    "exits:counts.exits"
    "walk references:counts.counters.walk_references"
    "table bytes:counts.table_bytes_peak"
)

usage() {
    cat <<'TEXT'
usage: benches/boot.sh [options]

  --rounds N         rounds, each of them every entrant once (3)
  --workload W       marker: stop at user space; short: 200 fork+exec and files; full: hashing, compression, sorting too (short)
  --time CLOCK       wall, or cpu: what the entrant has had of the host's processors, for a host that is busy (wall)
  --memory SIZE      guest memory (512M)
  --mmu LIST         MMUs of antumbra, separated by commas (shadow,ept)
  --engine LIST      engines of antumbra's CPU, separated by commas: interpret, translate; all: those it has
                     (the program's own choice)
  --direct LIST      also --cpu kvm --mmu shadow, with user code where each word of the list says, separated by commas: auto,
                     native, translate (none)
  --linux DIR        folder made by guests/linux/make.sh (target/linux)
  --kernel FILE      kernel image, if not DIR/vmlinuz
  --antumbra FILE    the program (target/release/antumbra)
  --machine M        QEMU's machine (pc)
  --qemu FILE        QEMU (qemu-system-x86_64)
  --no-qemu          without the baseline
  --cmdline STR      words added to the kernel command line
  --timeout SECONDS  limit for one boot (600)
  --help             this text
TEXT
}

fail() { printf 'boot.sh: %s\n' "$*" >&2; exit 1; }

rounds=3 workload=short time=wall memory=512M mmu=shadow,ept engine='' direct='' linux=$root/target/linux kernel='' antumbra='' machine=pc
qemu=qemu-system-x86_64 no_qemu=0 cmdline='' timeout=600
while [ $# -gt 0 ]; do
    case $1 in
        --rounds | --workload | --time | --memory | --mmu | --engine | --direct | --linux | --kernel | --antumbra | --machine | --qemu | --cmdline | \
            --timeout)
            [ $# -ge 2 ] || { printf 'boot.sh: %s needs a value\n' "$1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift ;;
        --no-qemu) no_qemu=1 ;;
        --help | -h) usage; exit 0 ;;
        *) printf "boot.sh: unknown argument '%s'\n" "$1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
[[ $rounds =~ ^[1-9][0-9]*$ ]] || { echo "boot.sh: --rounds takes a positive number" >&2; exit 2; }
[[ $timeout =~ ^[1-9][0-9]*$ ]] || { echo "boot.sh: --timeout takes a positive number" >&2; exit 2; }
[[ $time =~ ^(wall|cpu)$ ]] || { echo "boot.sh: --time takes wall or cpu" >&2; exit 2; }
[[ $memory =~ ^[1-9][0-9]*[KMG]?$ ]] || { echo "boot.sh: --memory takes a size such as 512M" >&2; exit 2; }

kernel=${kernel:-$linux/vmlinuz}
initramfs=$linux/initramfs.cpio
antumbra=${antumbra:-${CARGO_TARGET_DIR:-$root/target}/release/antumbra}
for file in "$kernel" "$initramfs"; do [ -r "$file" ] || fail "there is no $file: run guests/linux/make.sh"; done
[ -x "$antumbra" ] || fail "there is no $antumbra: run cargo build --release"
if [ "$no_qemu" = 0 ] && ! command -v "$qemu" >/dev/null; then
    fail "there is no $qemu (apt-get install qemu-system-x86), or give --no-qemu"
fi

# The self-tests of the kernel's ciphers are three fifths of a boot and say nothing about an MMU.
words="console=ttyS0 nokaslr cryptomgr.notests=1 panic=-1"
case $workload in
    marker) words="$words antumbra.stop=marker" last='user space reached' ;;
    short) last='done' ;;
    full) words="$words antumbra.workload=full" last='done' ;;
    *) echo "boot.sh: --workload takes marker, short or full" >&2; exit 2 ;;
esac
words=$words${cmdline:+ $cmdline}

entrants=()
[ "$no_qemu" = 1 ] || entrants+=(qemu)
listed=$(antumbra_entrants "$antumbra" "$mmu" "$engine") || exit 1
while IFS= read -r entrant; do entrants+=("$entrant"); done <<<"$listed"
listed=$(direct_entrants "$direct") || exit 1
[ -z "$listed" ] || while IFS= read -r entrant; do entrants+=("$entrant"); done <<<"$listed"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Prints the command line of an entrant, one word a line.
command_of() {
    case $1 in
        # A vCPU of TCG; without default devices, since each of them costs the kernel a driver's probe.
        qemu) printf '%s\n' "$qemu" -machine "$machine" -accel tcg -cpu qemu64 -smp 1 -m "$memory" -nodefaults -no-reboot \
            -display none -serial stdio -kernel "$kernel" -initrd "$initramfs" -append "$words" ;;
        *)
            printf '%s\n' "$antumbra" run
            entrant_options "$antumbra" "$1"
            printf '%s\n' --memory "$memory" --kernel "$kernel" --initramfs "$initramfs" \
                --cmdline "$words" --report "$work/report.$1.json" ;;
    esac
}

# Boots the entrant $1 in round $2 and appends "entrant marker total" in microseconds to the results, and "entrant phase
# microseconds" to the phases. Processor time to power-off is all that the process has had, as the shell counts it.
boot() {
    local entrant=$1 round=$2 began marker='' ended='' seen='' status='' line argv phase at='' process='' used=''
    mapfile -t argv < <(command_of "$entrant")
    began=${EPOCHREALTIME/./}
    [ "$time" = wall ] || began=0
    # What comes out is kept, to be shown when a boot fails; the status comes as a last line of its own.
    while IFS= read -r line; do
        case $line in
            *'ANTUMBRA: user space reached'*)
                read_stamp "$time" "$process"
                marker=${marker:-$((stamp / 1000))} at=$((stamp / 1000)) ;;
            *'ANTUMBRA: phase '*' done'*)
                read_stamp "$time" "$process"
                phase=${line#*ANTUMBRA: phase }
                printf '%s %s %s\n' "$entrant" "${phase%% *}" $((stamp / 1000 - at)) >>"$work/phases"
                at=$((stamp / 1000)) ;;
            'entrant process '*) process=${line##* } ;;
            *'boot.sh status '*)
                ended=${EPOCHREALTIME/./}
                read -r _ _ status used <<<"$line"
                [ "$time" = wall ] || ended=$used ;;
        esac
        case $line in *"ANTUMBRA: $last"*) seen=1 ;; esac
        printf '%s\n' "$line" >>"$work/$entrant.$round.log"
    done < <(
        code=0
        with_limit "$timeout" "${argv[@]}" 2>"$work/$entrant.$round.err" || code=$?
        # The last line is what children have had: minutes and seconds in user mode, and in the kernel.
        times >"$work/times"
        used=$(awk 'END { split($0, part, /[ms ]+/); print int((part[1] + part[3]) * 6e7 + (part[2] + part[4]) * 1e6) }' "$work/times")
        printf '\nboot.sh status %s %s\n' "$code" "$used"
    )
    if [ "$status" != 0 ] || [ -z "$marker" ] || [ -z "$seen" ]; then
        tail -n 20 "$work/$entrant.$round.log" >&2
        tail -n 20 "$work/$entrant.$round.err" >&2
        if [ "$status" = 124 ]; then fail "$entrant, round $round: not over after $timeout s"; fi
        fail "$entrant, round $round: ended with status $status, ${marker:+with}${marker:-without} the marker line" \
            "and ${seen:+with}${seen:-without} 'ANTUMBRA: $last'"
    fi
    printf '%s %s %s\n' "$entrant" $((marker - began)) $((ended - began)) >>"$work/results"
    printf '  round %s  %-17s %8.2f s to user space  %8.2f s to power-off\n' "$round" "$entrant" \
        "$(awk "BEGIN { print ($marker - $began) / 1e6 }")" "$(awk "BEGIN { print ($ended - $began) / 1e6 }")"
}

# Prints the number at the path $2 of the JSON file $1, or "?". The keys of the path are separated by dots.
number_at() {
    awk -v want="$2" '
        { text = text $0 "\n" }
        END {
            depth = 0
            while (length(text)) {
                if (match(text, /^[ \t\r\n,]+/)) { }
                else if (match(text, /^"([^"\\]|\\.)*"[ \t\r\n]*:/)) {
                    key = substr(text, RSTART + 1, RLENGTH - 2)
                    sub(/"[ \t\r\n]*$/, "", key)
                    name[depth] = key
                }
                else if (match(text, /^[{[]/)) { depth++; name[depth] = "" }
                else if (match(text, /^[]}]/)) { depth-- }
                else if (match(text, /^"([^"\\]|\\.)*"/)) { }
                else if (match(text, /^[^] \t\r\n,{}[]+/)) {
                    path = name[1]
                    for (i = 2; i <= depth; i++) path = path "." name[i]
                    if (path == want) { print substr(text, 1, RLENGTH); found = 1; exit }
                }
                else { break }
                text = substr(text, RLENGTH + 1)
            }
        }
        END { if (!found) print "?" }' "$1"
}

# Prints "minimum median" of column $2 of the entrant $1, in microseconds.
summary() {
    awk -v who="$1" -v column="$2" '$1 == who { print $column }' "$work/results" | sort -n |
        awk '{ v[NR] = $1 } END { m = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2; print v[1], m }'
}

# --- the run ----------------------------------------------------------------------------------------------------------

echo "kernel:   $(basename "$kernel") $(sha256sum <"$kernel" | cut -c1-16)   initramfs: $(sha256sum <"$initramfs" | cut -c1-16)"
echo "command:  $words"
echo "machine:  $(nproc) CPUs, load $(cut -d' ' -f1-3 /proc/loadavg); guest memory $memory; rounds $rounds; workload $workload; $time time"
[ "$no_qemu" = 1 ] || echo "baseline: $("$qemu" --version | head -n 1), $machine, -accel tcg"
echo

for ((round = 1; round <= rounds; round++)); do
    for entrant in "${entrants[@]}"; do boot "$entrant" "$round"; done
done

echo
printf '%-17s %30s %30s\n' '' '-- to user space, seconds --' '---- to power-off, seconds ----'
printf '%-17s %10s %10s %9s %10s %10s %9s\n' '' minimum median ratio minimum median ratio
reference=${entrants[0]}
read -r marker_base _ < <(summary "$reference" 2)
read -r total_base _ < <(summary "$reference" 3)
for entrant in "${entrants[@]}"; do
    read -r marker_min marker_median < <(summary "$entrant" 2)
    read -r total_min total_median < <(summary "$entrant" 3)
    awk -v e="$entrant" -v a="$marker_min" -v b="$marker_median" -v ab="$marker_base" -v c="$total_min" -v d="$total_median" -v cb="$total_base" \
        'BEGIN { printf "%-17s %10.2f %10.2f %8.2fx %10.2f %10.2f %8.2fx\n", e, a / 1e6, b / 1e6, a / ab, c / 1e6, d / 1e6, c / cb }'
done
echo "(ratio: minimum over the minimum of $reference)"
case $reference-$workload in
    qemu-marker) echo "(asked of antumbra: at most 0.80x to user space, aiming at 0.50x)" ;;
    qemu-full) echo "(asked of antumbra: at most 0.80x to user space, aiming at 0.50x; at most 0.50x to power-off)" ;;
esac

if [ -s "$work/phases" ]; then
    echo
    awk -v entrants="${entrants[*]}" '
        !($2 in seen) { seen[$2]; phase[++phases] = $2 }
        !(($1, $2) in best) || $3 < best[$1, $2] { best[$1, $2] = $3 }
        END {
            n = split(entrants, entrant, " ")
            printf "%-17s", "phase, seconds"
            for (i = 1; i <= n; i++) printf i == 1 ? " %8s" : " %17s", entrant[i]
            print ""
            for (j = 1; j <= phases; j++) {
                printf "%-17s", phase[j]
                for (i = 1; i <= n; i++) {
                    time = best[entrant[i], phase[j]]
                    printf " %8.2f", time / 1e6
                    if (i > 1) printf " %7.2fx", time / best[entrant[1], phase[j]]
                }
                print ""
            }
        }' "$work/phases"
fi

echo
printf '%-17s' ''
for count in "${counts[@]}"; do printf ' %18s' "${count%%:*}"; done
echo
missing=''
for entrant in "${entrants[@]}"; do
    [ "$entrant" != qemu ] || continue
    printf '%-17s' "$entrant"
    for count in "${counts[@]}"; do
        value='?'
        [ ! -r "$work/report.$entrant.json" ] || value=$(number_at "$work/report.$entrant.json" "${count#*:}")
        [ "$value" != '?' ] || missing="$missing ${count#*:}"
        printf ' %18s' "$value"
    done
    echo
done
[ -z "$missing" ] || echo "(not found in the report:$missing)"
