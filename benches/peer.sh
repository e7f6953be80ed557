#!/usr/bin/env bash
# Boots the Linux guest under a stock KVM with nested paging and under KVM's own shadow MMU, and prints what that KVM counted of
# each side by side: the peer of `antumbra compare` on the same kernel and workload. Both run in the nest (docs/nested.md), so any
# machine will do; the guest's devices are those of a second QEMU in there. Counts, not times: the hardware is emulated.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
forks=100 memory=256 seconds=300

usage() {
    cat <<'TEXT'
usage: benches/peer.sh [--forks N] [--memory MIB] [--seconds N]

  --forks N      fork+exec pairs of the workload (100)
  --memory MIB   the guest's memory (256)
  --seconds N    limit to each of the two boots (300)
TEXT
}

while [ $# -gt 0 ]; do
    case $1 in
        --forks | --memory | --seconds)
            case ${2-} in '' | *[!0-9]*) echo "$1 needs a number" >&2; exit 2 ;; esac
            printf -v "${1#--}" %s "$2"
            shift ;;
        --help | -h) usage; exit 0 ;;
        *) echo "unknown argument '$1'" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

qemu=$(command -v qemu-system-x86_64) || { echo "there is no qemu-system-x86_64" >&2; exit 3; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What QEMU loads into a PC, wherever this installation has it.
carried=()
for file in bios-256k.bin linuxboot_dma.bin kvmvapic.bin; do
    found=''
    while read -r folder; do
        if [ -z "$found" ] && [ -r "$folder/$file" ]; then found=$folder/$file; fi
    done < <("$qemu" -L help)
    [ -n "$found" ] || { echo "QEMU's file $file is not found" >&2; exit 3; }
    carried+=(--carry "$found=share/$file")
done

# The guest stops where it has powered off and the machine stays, so the counts are of the whole boot and of nothing else. XSAVE is left
# out because TCG lets a guest's XSETBV pass by KVM.
cat >"$work/boot" <<TEXT
read -r npt </sys/module/kvm_amd/parameters/npt
/share/qemu -L /share -accel kvm -cpu host,-xsave -m $memory -nodefaults -display none -vga none -no-reboot -no-shutdown \\
    -serial file:/tmp/serial -kernel /linux/vmlinuz -initrd /linux/initramfs.cpio \\
    -append 'console=ttyS0 cryptomgr.notests=1 panic=-1 antumbra.forks=$forks' &
machine=\$!
touch /tmp/serial
while [ -d /proc/\$machine ] && ! grep -q 'reboot: Power down' /tmp/serial; do sleep 1; done
sleep 1
grep -q 'ANTUMBRA: done' /tmp/serial || { tail -n 20 /tmp/serial >&2; exit 1; }
for file in /sys/kernel/debug/kvm/*-*/*; do
    [ ! -f "\$file" ] || echo "\$npt \${file##*/} \$(cat "\$file" 2>/dev/null)"
done
kill \$machine
rm /tmp/serial
TEXT

cargo build --quiet --release -p nest --manifest-path "$root/Cargo.toml"
"$root/target/release/nest" --linux --memory 2048 --seconds "$seconds" "${carried[@]}" --carry "$work/boot=boot" \
    --carry-program "$qemu=share/qemu" -- . /boot >"$work/counts" || { cat "$work/counts"; exit 1; }

printf '%-24s %12s %12s\n' "counted by KVM" npt=1 npt=0
awk 'NF == 3 && $3 ~ /^[0-9]+$/ { count[$1, $2] = $3; if ($3 > 0) moved[$2] = 1 }
    END { for (name in moved) printf "%-24s %12d %12d\n", name, count["Y", name], count["N", name] }' "$work/counts" | sort
