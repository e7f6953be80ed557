//! What user code can see of the descriptor tables without a fault: by LAR, LSL, VERR and VERW, and by loading a selector.
//!
//! It stands beside the path of an access: before user code runs on the host's processor, the guest's descriptors that it may
//! use are copied to where the processor finds the stub's. None of the four instructions traps, and each sees a descriptor
//! only if its privilege level is 3 or it is of conforming code; all others are left out of the copy, and look to user code
//! as the guest's own do.
//!
//! Manual: Intel SDM Vol. 3 §3.4.5 (descriptors), §5.10.1 (LAR), §5.10.2 (VERR, VERW), §5.10.3 (LSL).

use crate::stub::MOST_DESCRIPTORS;
use vcpu::state::Segment;

const ACCESSED: u64 = 1 << 40;
const CONFORMING_CODE: u64 = 3 << 42;
const CODE_OR_DATA: u64 = 1 << 44;
const DPL_3: u64 = 3 << 45;
/// The type and S of a system descriptor that is none.
const KIND: u64 = 0x1f << 40;

/// The descriptors of a table that user code may see, in their places. `None` where user code could see something that a copy
/// does not show: a system descriptor of privilege level 3, one whose accessed flag a load would set in the guest's memory, a table
/// that is too long.
pub fn to_user(table: &[u8]) -> Option<Vec<u8>> {
    if table.len() > MOST_DESCRIPTORS {
        return None;
    }
    let mut copy = vec![0; table.len()];
    let mut upper_half = false;
    for (from, to) in table.chunks_exact(8).zip(copy.chunks_exact_mut(8)) {
        let descriptor = from.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        let reachable = descriptor & DPL_3 == DPL_3;
        if std::mem::take(&mut upper_half) || descriptor == 0 {
            continue;
        }
        if descriptor & CODE_OR_DATA == 0 {
            // It takes two places in long mode.
            upper_half = descriptor & KIND != 0;
            if reachable && upper_half {
                return None;
            }
            continue;
        }
        if reachable || descriptor & CONFORMING_CODE == CONFORMING_CODE {
            if descriptor & ACCESSED == 0 {
                return None;
            }
            to.copy_from_slice(from);
        }
    }
    Some(copy)
}

/// The segment that a selector names, as loading it gives it. `None` for one that the table does not have.
pub fn segment(table: &[u8], selector: u16) -> Option<Segment> {
    let at = usize::from(selector & !7);
    let bytes = table.get(at..at + 8)?;
    let descriptor = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let granular = descriptor >> 55 & 1 != 0;
    (descriptor >> 47 & 1 != 0).then_some(Segment {
        selector,
        base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        attributes: (descriptor >> 40 & 0xf0ff) as u16,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(descriptors: &[u64]) -> Vec<u8> {
        descriptors.iter().flat_map(|d| d.to_le_bytes()).collect()
    }

    const KERNEL_CODE: u64 = 0x00af_9b00_0000_ffff;
    const USER_CODE: u64 = 0x00af_fb00_0000_ffff;
    const USER_DATA: u64 = 0x00cf_f300_0000_ffff;
    const CONFORMING: u64 = 0x00af_9f00_0000_ffff;
    const TASK: u64 = 0x0000_8b00_5000_0067;

    #[test]
    fn only_what_user_code_sees_is_copied() {
        // The upper half of a task's descriptor looks like anything.
        let guest = table(&[0, KERNEL_CODE, USER_DATA, USER_CODE, TASK, USER_CODE, CONFORMING, USER_DATA]);
        let copy = to_user(&guest).unwrap();
        assert_eq!(copy, table(&[0, 0, USER_DATA, USER_CODE, 0, 0, CONFORMING, USER_DATA]));
    }

    #[test]
    fn what_a_copy_would_show_otherwise_is_refused() {
        assert_eq!(to_user(&table(&[0, USER_DATA & !ACCESSED])), None);
        assert_eq!(to_user(&table(&[0, TASK | DPL_3, 0])), None);
        assert_eq!(to_user(&vec![0; MOST_DESCRIPTORS + 8]), None);
        assert_eq!(to_user(&table(&[0, KERNEL_CODE & !ACCESSED])).unwrap(), table(&[0, 0]));
    }

    #[test]
    fn a_selector_gives_the_segment_of_its_descriptor() {
        let guest = table(&[0, USER_CODE, 0x12cf_f334_5678_ffff]);
        let code = segment(&guest, 0x0b).unwrap();
        assert_eq!((code.selector, code.base, code.limit, code.attributes), (0x0b, 0, u32::MAX, 0xa0fb));
        assert_eq!(segment(&guest, 0x13).unwrap().base, 0x1234_5678);
        assert_eq!((segment(&guest, 3), segment(&guest, 0x1b)), (None, None));
    }
}
