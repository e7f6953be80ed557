#!/usr/bin/perl
# Writes a cpio archive in the "newc" format, which the kernel unpacks as its initial root file system, from a list of
# entries on standard input to standard output. The same list and the same files give the same bytes: every owner is
# root, every time is 0, inode numbers count up, and the order is the list's. Device nodes need no privilege, since they
# exist only in the archive. Perl is used because perl-base is part of every Debian system, while cpio and python are not.
#
# Entries, one a line (as in the kernel's gen_init_cpio):
#   dir NAME MODE | file NAME MODE SOURCE | slink NAME TARGET | nod NAME MODE MAJOR MINOR
# Format: "Buffer format" in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
use strict;
use warnings;

binmode STDOUT;
my $inode = 0;
my $written = 0;

# Appends bytes and pads to the multiple of four at which the next header or file must begin.
sub put {
    my ($bytes) = @_;
    my $padding = (4 - ($written + length $bytes) % 4) % 4;
    print STDOUT $bytes, "\0" x $padding or die "cpio.pl: writing the archive: $!\n";
    $written += length($bytes) + $padding;
}

sub entry {
    my ($name, $mode, $data, $major, $minor) = @_;
    $inode++;
    my $header = sprintf '070701' . '%08X' x 13,
        $inode, $mode, 0, 0, 1, 0, length $data, 0, 0, $major, $minor, length($name) + 1, 0;
    put($header . $name . "\0");
    put($data) if length $data;
}

sub slurp {
    my ($path) = @_;
    open my $file, '<:raw', $path or die "cpio.pl: opening $path: $!\n";
    local $/;
    my $data = <$file>;
    return defined $data ? $data : '';
}

while (my $line = <STDIN>) {
    chomp $line;
    next if $line =~ /^\s*(#|$)/;
    my ($kind, $name, @rest) = split ' ', $line;
    $name =~ s{^/+}{} if defined $name;
    if    ($kind eq 'dir'   && @rest == 1) { entry($name, 0040000 | oct $rest[0], '', 0, 0) }
    elsif ($kind eq 'file'  && @rest == 2) { entry($name, 0100000 | oct $rest[0], slurp($rest[1]), 0, 0) }
    elsif ($kind eq 'slink' && @rest == 1) { entry($name, 0120777, $rest[0], 0, 0) }
    elsif ($kind eq 'nod'   && @rest == 3) { entry($name, 0020000 | oct $rest[0], '', $rest[1], $rest[2]) }
    else { die "cpio.pl: line $. of the list is not an entry: $line\n" }
}
$inode = -1;    # the trailer's inode is 0
entry('TRAILER!!!', 0, '', 0, 0);
close STDOUT or die "cpio.pl: writing the archive: $!\n";
