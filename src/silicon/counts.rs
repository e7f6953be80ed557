#![allow(unsafe_code, reason = "kvm-ioctls has no call for KVM_GET_STATS_FD")]
//! What KVM counts of a machine by itself: its binary statistics (Linux Documentation/virt/kvm/api.rst §4.133).
//!
//! Beside the path of an access: an oracle that says who answered also shows it. A KVM that shadows takes a page fault for
//! every entry that it makes and zaps what is written to; under EPT or NPT the faults of a guest's own tables never reach it.

use crate::error::Error;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;
/// Number, exponent, size, offset and bucket size, before the name (`struct kvm_stats_desc`).
const DESCRIPTOR: usize = 16;
/// More than any kernel has, so that a strange answer does not become a large allocation.
const MOST: u32 = 4096;

/// Counters by the kernel's names for them; histograms are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// Asks KVM for those of a machine or of a vCPU. A kernel before 5.14 has none.
    pub(crate) fn of(fd: &impl AsRawFd) -> Result<Self, Error> {
        // SAFETY: the call takes no argument, touches no memory of ours and gives a new descriptor or -1.
        let raw = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD) };
        if raw < 0 {
            return match std::io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
                    Ok(Self::default())
                }
                source => Err(Error::Kvm { doing: "asking for KVM's statistics", source }),
            };
        }
        // SAFETY: the descriptor is new, so nobody else owns it.
        let file = unsafe { File::from_raw_fd(raw) };
        Self::read(|offset, length| {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
        .map_err(|source| Error::Kvm { doing: "reading KVM's statistics", source })
    }

    fn read(bytes: impl Fn(u64, usize) -> std::io::Result<Vec<u8>>) -> std::io::Result<Self> {
        let header = bytes(0, 24)?;
        // Flags, length of a name, number, and where identification, descriptors and data are.
        let [_, name, count, _, descriptors, data] =
            std::array::from_fn(|n| number(&header, n * 4, 4) as u32);
        if count > MOST || name > MOST {
            return Err(std::io::Error::other(format!(
                "{count} counters with names of {name} bytes are too many"
            )));
        }
        let each = DESCRIPTOR + name as usize;
        let table = bytes(descriptors.into(), each * count as usize)?;
        let mut counts = BTreeMap::new();
        for descriptor in table.chunks_exact(each) {
            let (kind, values) = (number(descriptor, 0, 4) & 0xf, number(descriptor, 6, 2));
            // Cumulative, instant, peak; the rest are histograms.
            if kind > 2 || values != 1 {
                continue;
            }
            let name = descriptor[DESCRIPTOR..].split(|byte| *byte == 0).next().unwrap_or_default();
            let value = bytes(u64::from(data) + number(descriptor, 8, 4), 8)?;
            counts.insert(String::from_utf8_lossy(name).into_owned(), number(&value, 0, 8));
        }
        Ok(Self(counts))
    }

    /// Adds those of another machine.
    pub fn add(&mut self, other: Self) {
        for (name, count) in other.0 {
            let sum = self.0.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
    }

    /// One of them, if this kernel has it.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }
}

/// A little-endian number of `length` bytes at `offset`.
fn number(bytes: &[u8], offset: usize, length: usize) -> u64 {
    bytes[offset..offset + length].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

impl fmt::Display for Counts {
    /// One line: those that are not 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moved: Vec<_> = self.0.iter().filter(|(_, count)| **count != 0).collect();
        if moved.is_empty() {
            return write!(f, "nothing");
        }
        for (nth, (name, count)) in moved.into_iter().enumerate() {
            write!(f, "{}{name} {count}", if nth == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel would give: a counter, a histogram of two values, and a peak.
    fn file() -> Vec<u8> {
        let mut file = Vec::new();
        for word in [0u32, 8, 3, 24, 24, 96] {
            file.extend(word.to_le_bytes());
        }
        for (flags, values, offset, name) in
            [(0u32, 1u16, 0u32, b"exits\0\0\0"), (3, 2, 8, b"waits\0\0\0"), (2, 1, 24, b"most\0\0\0\0")]
        {
            file.extend(flags.to_le_bytes());
            file.extend([0, 0]);
            file.extend(values.to_le_bytes());
            file.extend(offset.to_le_bytes());
            file.extend([0; 4]);
            file.extend(name);
        }
        for value in [7u64, 1, 2, 300] {
            file.extend(value.to_le_bytes());
        }
        file
    }

    fn from(file: &[u8]) -> std::io::Result<Counts> {
        Counts::read(|offset, length| {
            let end = offset as usize + length;
            file.get(offset as usize..end)
                .map(<[u8]>::to_vec)
                .ok_or_else(|| std::io::Error::other("too short"))
        })
    }

    #[test]
    fn counters_and_peaks_are_read_and_histograms_are_not() {
        let mut counts = from(&file()).unwrap();
        assert_eq!(counts.to_string(), "exits 7, most 300");
        counts.add(from(&file()).unwrap());
        assert_eq!((counts.get("exits"), counts.get("waits")), (Some(14), None));
    }

    #[test]
    fn what_is_too_short_or_too_long_is_an_error() {
        let whole = file();
        for length in 0..whole.len() {
            assert!(from(&whole[..length]).is_err(), "{length}");
        }
        let mut many = whole;
        many[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(from(&many).unwrap_err().to_string().contains("too many"));
    }
}
