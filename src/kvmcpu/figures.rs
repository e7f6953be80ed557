#![allow(unsafe_code, reason = "KVM_GET_STATS_FD is a system call that kvm-ioctls does not have")]
//! What the kernel counted: KVM's binary statistics of a virtual machine and of its vCPU (the kernel's `api.rst`,
//! KVM_GET_STATS_FD).
//!
//! It stands after a run. Which figures there are is the kernel's affair: a header says where their descriptors are, and each
//! descriptor names one. Single figures are taken as they are; histograms, of which KVM has a few about halting, are left out.

use crate::error::{KvmError, last};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
/// More than any kernel has, so that a broken header does not cost memory without limit.
const MOST_DESCRIPTORS: usize = 4096;
const MOST_NAME: usize = 256;
const TYPE_MASK: u32 = 0xf;
/// Types 0 to 2: cumulative, instantaneous, peak. Higher ones are histograms.
const LAST_SINGLE: u32 = 2;

/// The statistics of one machine or vCPU.
#[derive(Debug)]
pub struct Figures {
    file: File,
    /// Where each figure is, in bytes from the beginning, and its name.
    places: Vec<(u64, String)>,
}

impl Figures {
    /// Of what this descriptor is; `None` where the kernel has no binary statistics.
    pub fn of(fd: &impl AsRawFd) -> Result<Option<Self>, KvmError> {
        // SAFETY: the call has no argument and gives a new descriptor or an error.
        let stats = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD as _, 0) };
        if stats < 0 {
            return match io::Error::last_os_error().raw_os_error() {
                Some(libc::ENOTTY | libc::EINVAL) => Ok(None),
                _ => Err(last("opening KVM's statistics")),
            };
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let file = unsafe { File::from_raw_fd(stats) };
        let places = places(&|bytes, at| file.read_exact_at(bytes, at))?;
        Ok(Some(Self { file, places }))
    }

    /// Every figure by its name, in the kernel's order.
    pub fn read(&self) -> Result<Vec<(String, u64)>, KvmError> {
        let one = |(at, name): &(u64, String)| {
            let mut bytes = [0; 8];
            self.file
                .read_exact_at(&mut bytes, *at)
                .map_err(|_| KvmError::Figures("a figure cannot be read"))?;
            Ok((name.clone(), u64::from_le_bytes(bytes)))
        };
        self.places.iter().map(one).collect()
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// Reads the header and every descriptor.
fn places(read: &dyn Fn(&mut [u8], u64) -> io::Result<()>) -> Result<Vec<(u64, String)>, KvmError> {
    let mut header = [0; HEADER_BYTES];
    read(&mut header, 0).map_err(|_| KvmError::Figures("the header cannot be read"))?;
    let [name_bytes, count] = [4, 8].map(|at| word(&header, at) as usize);
    let [descriptors, data] = [16, 20].map(|at| u64::from(word(&header, at)));
    if count > MOST_DESCRIPTORS || name_bytes == 0 || name_bytes > MOST_NAME {
        return Err(KvmError::Figures("the header names sizes that cannot be"));
    }
    let stride = DESCRIPTOR_BYTES + name_bytes;
    let mut block = vec![0; stride * count];
    read(&mut block, descriptors).map_err(|_| KvmError::Figures("the descriptors cannot be read"))?;
    let single = |descriptor: &&[u8]| {
        let size = u16::from_le_bytes([descriptor[6], descriptor[7]]);
        word(descriptor, 0) & TYPE_MASK <= LAST_SINGLE && size == 1
    };
    let place = |descriptor: &[u8]| {
        let name = descriptor[DESCRIPTOR_BYTES..].split(|&byte| byte == 0).next().unwrap_or_default();
        (data + u64::from(word(descriptor, 8)), String::from_utf8_lossy(name).into_owned())
    };
    Ok(block.chunks_exact(stride).filter(single).map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as the kernel documents it: id at 24, descriptors at 72, data at 256.
    fn file(descriptors: &[(u32, u16, u32, &str)]) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        for (at, value) in [(4, 48u32), (8, descriptors.len() as u32), (12, 24), (16, 72), (20, 256)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        for (i, (flags, size, offset, name)) in descriptors.iter().enumerate() {
            let at = 72 + i * (DESCRIPTOR_BYTES + 48);
            bytes[at..at + 4].copy_from_slice(&flags.to_le_bytes());
            bytes[at + 6..at + 8].copy_from_slice(&size.to_le_bytes());
            bytes[at + 8..at + 12].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 16..at + 16 + name.len()].copy_from_slice(name.as_bytes());
        }
        bytes
    }

    fn parsed(bytes: &[u8]) -> Result<Vec<(u64, String)>, KvmError> {
        places(&|out, at| {
            let from = usize::try_from(at).unwrap();
            let piece = bytes.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(piece);
            Ok(())
        })
    }

    #[test]
    fn descriptors_name_single_figures_and_histograms_are_left_out() {
        let bytes = file(&[(0, 1, 8, "exits"), (4, 32, 16, "halt_poll_success_hist")]);
        assert_eq!(parsed(&bytes).unwrap(), [(264, "exits".to_owned())]);
    }

    #[test]
    fn a_broken_file_is_an_error() {
        assert!(parsed(&[0; 10]).is_err());
        let mut bytes = file(&[(0, 1, 8, "exits")]);
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(parsed(&bytes).is_err());
        bytes[8..12].copy_from_slice(&100u32.to_le_bytes());
        assert!(parsed(&bytes).is_err(), "the descriptors pass the end");
    }
}
