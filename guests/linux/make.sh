#!/usr/bin/env bash
# Gets a stock Linux kernel and makes the initial root file system that the tests, the benchmarks and the examples boot.
# Nothing is installed and root is not needed: packages are downloaded with apt-get and only unpacked.
#
# It relies on what every Debian system has (bash, coreutils, dpkg, apt, perl-base). --vmlinux also needs the
# decompressor of the kernel's payload (gzip, xz, zstd or lz4), --modules that of its modules where they are packed; both say which.
set -euo pipefail
export LC_ALL=C
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() {
    cat <<'TEXT'
usage: guests/linux/make.sh [options]

Puts into the output folder: vmlinuz (a stock kernel), initramfs.cpio (busybox and a small workload), SHA256SUMS.

  --output DIR     output folder (target/linux)
  --kernel FILE    use this bzImage rather than the distribution's
  --package NAME   take the kernel from this package (default: the one that linux-image-cloud-amd64 depends on)
  --busybox FILE   use this static busybox rather than the one of the package busybox-static
  --memtest        also memtest86+-x64.bin and memtest86+-ia32.bin, from the package memtest86+
  --modules        also modules.cpio, the kernel's own KVM and what it needs, for docs/nested.md
  --vmlinux        also vmlinux, the ELF kernel inside the bzImage, for a PVH or direct ELF boot
  --force          make everything again
  --help           this text

The command line words that the workload understands are listed at the head of guests/linux/init.
TEXT
}

say() { printf 'make.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

output=$root/target/linux kernel='' package='' busybox='' memtest=0 modules=0 vmlinux=0 force=0
while [ $# -gt 0 ]; do
    case $1 in
        --output | --kernel | --package | --busybox)
            [ $# -ge 2 ] || { say "$1 needs a value"; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift ;;
        --memtest | --modules | --vmlinux | --force) printf -v "${1#--}" %s 1 ;;
        --help | -h) usage; exit 0 ;;
        *) say "unknown argument '$1'"; usage >&2; exit 2 ;;
    esac
    shift
done
for file in "$kernel" "$busybox"; do
    [ -z "$file" ] || [ -r "$file" ] || fail "cannot read '$file'"
done

mkdir -p "$output"
output=$(cd "$output" && pwd)
# Everything is made in a folder beside the result and moved into place, so that an interrupted run leaves the old files.
work=$(mktemp -d "$output/.make.XXXXXX")
trap 'rm -rf "$work"' EXIT

# --- packages -------------------------------------------------------------------------------------------------------

lists_fresh=0
# Makes sure that apt knows the package $1; refreshes its lists once, if we may.
known() {
    apt-cache show --no-all-versions "$1" >/dev/null 2>&1 && return
    if [ "$lists_fresh" = 0 ] && [ "$(id -u)" = 0 ]; then
        say "refreshing the package lists (apt-get update)"
        apt-get update -qq </dev/null >&2 || fail "apt-get update failed; is there a network?"
        lists_fresh=1
        apt-cache show --no-all-versions "$1" >/dev/null 2>&1 && return
    fi
    fail "apt knows no package '$1' (run 'apt-get update' as root; on another distribution give --kernel and --busybox)"
}

# Downloads the package $1 and unpacks it into $work/$1.
unpack() {
    local tries
    command -v apt-get >/dev/null || fail "there is no apt-get here: give --kernel FILE and --busybox FILE"
    known "$1"
    say "downloading $1"
    mkdir -p "$work/deb/$1" "$work/$1"
    for tries in 1 2 3; do
        # _apt may not write into a folder of root's; the package's hash is checked all the same.
        (cd "$work/deb/$1" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "$1" </dev/null >log 2>&1) && break
        # The mirror may have moved on since the lists were read.
        if [ "$tries" = 3 ]; then cat "$work/deb/$1/log" >&2; fail "could not download the package '$1'"; fi
        if [ "$(id -u)" = 0 ]; then apt-get update -qq </dev/null >&2 || true; fi
        sleep 2
    done
    dpkg-deb -x "$work/deb/$1"/*.deb "$work/$1" || fail "could not unpack the package '$1'"
}

# --- the parts ------------------------------------------------------------------------------------------------------

make_kernel() {
    if [ -n "$kernel" ]; then
        cp "$kernel" "$work/vmlinuz"
    else
        if [ -z "$package" ]; then
            command -v apt-cache >/dev/null || fail "there is no apt here: give --kernel FILE and --busybox FILE"
            known linux-image-cloud-amd64
            package=$(apt-cache depends --no-recommends --no-suggests linux-image-cloud-amd64 |
                awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }')
            [ -n "$package" ] || fail "linux-image-cloud-amd64 depends on no kernel image; give --package or --kernel"
        fi
        unpack "$package"
        set -- "$work/$package"/boot/vmlinuz-*
        [ -f "$1" ] || fail "the package '$package' holds no boot/vmlinuz-*"
        cp "$1" "$work/vmlinuz"
    fi
    [ "$(od -An -v -t x1 -j 514 -N 4 "$work/vmlinuz" | tr -d ' \n')" = 48647253 ] ||
        fail "'${kernel:-$package}' is not a bzImage: it has no HdrS at offset 514"
}

# Little-endian number of $3 bytes (1 or 4) at offset $2 of the file $1.
number() { od -An -v -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' \n'; }

# The payload of a bzImage begins payload_offset (0x248) bytes after the real-mode part of setup_sects (0x1f1) + 1 sectors and is
# payload_length (0x24c) long; but for gzip, its last four bytes are the unpacked size, which the build appends.
make_vmlinux() {
    local image=$work/vmlinuz sectors start length magic tool size want
    sectors=$(number "$image" $((0x1f1)) 1)
    [ "$sectors" != 0 ] || sectors=4
    start=$(((sectors + 1) * 512 + $(number "$image" $((0x248)) 4)))
    length=$(number "$image" $((0x24c)) 4)
    size=$(stat -c %s "$image")
    if [ "$length" -le 8 ] || [ $((start + length)) -gt "$size" ]; then
        fail "the payload fields of the kernel's header point outside it"
    fi
    want=$(number "$image" $((start + length - 4)) 4)
    magic=$(od -An -v -t x1 -j "$start" -N 4 "$image" | tr -d ' \n')
    case $magic in
        1f8b*) tool=gzip ;;
        fd377a58) tool=xz ;;
        28b52ffd) tool=zstd ;;
        02214c18) tool=lz4 ;;
        *) fail "the kernel's payload is packed in a way not known here (it begins with $magic)" ;;
    esac
    [ "$tool" = gzip ] || length=$((length - 4))
    command -v "$tool" >/dev/null || fail "--vmlinux needs '$tool' for this kernel (apt-get install ${tool/%xz/xz-utils})"
    dd if="$image" of="$work/payload" bs=64k iflag=skip_bytes,count_bytes skip="$start" count="$length" 2>/dev/null
    "$tool" -dc <"$work/payload" >"$work/vmlinux" || fail "unpacking the kernel's payload with $tool failed"
    [ "$(stat -c %s "$work/vmlinux")" = "$want" ] || fail "the unpacked kernel has not the size that its header promises"
    [ "$(od -An -v -t x1 -N 5 "$work/vmlinux" | tr -d ' \n')" = 7f454c4602 ] || fail "the kernel's payload is not a 64-bit ELF file"
}

# Uncompressed: unpacking would cost the guest more than loading two megabytes costs us.
make_initramfs() {
    local applet
    if [ -z "$busybox" ]; then
        unpack busybox-static
        busybox=$work/busybox-static/bin/busybox
        [ -f "$busybox" ] || busybox=$work/busybox-static/usr/bin/busybox
        [ -f "$busybox" ] || fail "the package busybox-static holds no busybox"
    fi
    {
        for dir in bin dev proc sys tmp var root; do echo "dir $dir 0755"; done
        echo "nod dev/console 0600 5 1"
        echo "nod dev/null 0666 1 3"
        echo "file init 0755 $here/init"
        echo "file bin/busybox 0755 $work/busybox"
        for applet in $applets; do echo "slink bin/$applet busybox"; done
    } >"$work/list"
    cp "$busybox" "$work/busybox"
    perl "$here/cpio.pl" <"$work/list" >"$work/initramfs.cpio" || fail "could not write the initramfs"
}
applets='[ awk cat cp dd dmesg echo false gzip halt head hexdump kill ls md5sum mkdir mount mv poweroff ps reboot
    rev rm seq sh sha256sum sleep sort sync tail test touch tr true umount uname wc yes'

# Prints the module $1 of the kernel's package and before it those that it needs, a file a line; nothing is listed twice.
needed_modules() {
    local name=${1//-/_} found depends need tool
    case " $listed " in *" $name "*) return ;; esac
    listed="$listed $name"
    # The file may be named with either sign, and be packed.
    found=$(find "$work/$package" -path '*/lib/modules/*' \( -name "$name.ko*" -o -name "${name//_/-}.ko*" \) | head -n 1)
    [ -n "$found" ] || fail "the package '$package' holds no module '$name'"
    case $found in
        *.ko) tool='' ;;
        *.ko.xz) tool=xz ;;
        *.ko.zst) tool=zstd ;;
        *.ko.gz) tool=gzip ;;
        *) fail "the module '$found' is packed in a way not known here" ;;
    esac
    if [ -n "$tool" ]; then
        command -v "$tool" >/dev/null || fail "--modules needs '$tool' for this kernel (apt-get install ${tool/%xz/xz-utils})"
        "$tool" -dc <"$found" >"${found%.*}" || fail "unpacking '$found' failed"
        found=${found%.*}
    fi
    depends=$(tr '\0' '\n' <"$found" | sed -n 's/^depends=//p')
    for need in ${depends//,/ }; do needed_modules "$need"; done
    echo "$found" >>"$work/modules"
}

# An archive of its own: the kernel unpacks several, one behind the other, so a guest that wants them has both. `order` names
# the modules in the order in which they can be loaded; which of the last two is for the processor to say.
make_modules() {
    [ -z "$kernel" ] || fail "--modules takes the modules from the kernel's package, so it cannot be used with --kernel"
    local file listed=''
    : >"$work/modules"
    needed_modules kvm_intel
    needed_modules kvm_amd
    {
        echo "dir modules 0755"
        while read -r file; do
            echo "file modules/${file##*/} 0644 $file"
            echo "${file##*/}" >>"$work/order"
        done <"$work/modules"
        echo "file modules/order 0644 $work/order"
    } >"$work/list"
    perl "$here/cpio.pl" <"$work/list" >"$work/modules.cpio" || fail "could not write the archive of modules"
}

make_memtest() {
    unpack memtest86+
    local bits
    for bits in x64 ia32; do
        # The file's name before its last word differs between releases.
        set -- "$work"/memtest86+/boot/*"$bits".bin
        [ -f "$1" ] || fail "the package memtest86+ holds no $bits image"
        cp "$1" "$work/memtest86+-$bits.bin"
    done
}

# --- is there anything to do? -----------------------------------------------------------------------------------------

# The stamp names everything that the result depends on and that can change here. A newer package at the mirror is not looked for:
# --force does that. Without the same options the missing parts are made; parts made earlier stay.
wanted="vmlinuz initramfs.cpio"
[ "$vmlinux" = 0 ] || wanted="$wanted vmlinux"
[ "$modules" = 0 ] || wanted="$wanted modules.cpio"
[ "$memtest" = 0 ] || wanted="$wanted memtest86+-x64.bin memtest86+-ia32.bin"
stamp=$({
    cat "$here/make.sh" "$here/init" "$here/cpio.pl"
    printf '%s\n' "package=$package"
    for file in "$kernel" "$busybox"; do [ -z "$file" ] || sha256sum <"$file"; done
} | sha256sum | cut -d' ' -f1)

up_to_date() {
    [ "$force" = 0 ] && [ "$(cat "$output/.stamp" 2>/dev/null)" = "$stamp" ] && [ -f "$output/SHA256SUMS" ] || return 1
    for file in $wanted; do
        [ -f "$output/$file" ] && grep -q " $file\$" "$output/SHA256SUMS" || return 1
    done
    (cd "$output" && sha256sum --quiet --check SHA256SUMS >/dev/null 2>&1)
}

if up_to_date; then
    say "$output is up to date"
    exit 0
fi

make_kernel
make_initramfs
[ "$vmlinux" = 0 ] || make_vmlinux
[ "$modules" = 0 ] || make_modules
[ "$memtest" = 0 ] || make_memtest

# What was taken out of another kernel must not stay beside this one.
if ! cmp -s "$work/vmlinuz" "$output/vmlinuz"; then
    [ "$vmlinux" = 1 ] || rm -f "$output/vmlinux"
    [ "$modules" = 1 ] || rm -f "$output/modules.cpio"
fi
rm -f "$output/.stamp"
for file in $wanted; do mv "$work/$file" "$output/$file"; done
(
    cd "$output"
    for file in vmlinuz initramfs.cpio vmlinux modules.cpio memtest86+-x64.bin memtest86+-ia32.bin; do
        [ ! -f "$file" ] || sha256sum "$file"
    done >SHA256SUMS
)
echo "$stamp" >"$output/.stamp"
say "made in $output:"
cat "$output/SHA256SUMS" >&2
