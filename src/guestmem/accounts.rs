//! Memory for the accounts that grow with the guest (marks, map, dirty log, free frames), asked for in a way that can be
//! refused: a size from the command line must end in an error, not in an abort.

use crate::host::HostMemoryError;

/// `count` values. Refused when the host has no memory for them; `frames` is what the error says they account for.
pub(crate) fn filled<T>(count: u64, frames: u64, make: impl FnMut() -> T) -> Result<Vec<T>, HostMemoryError> {
    let refused = HostMemoryError::Accounts { frames };
    let Ok(len) = usize::try_from(count) else { return Err(refused) };
    let mut values = Vec::new();
    if values.try_reserve_exact(len).is_err() {
        return Err(refused);
    }
    values.resize_with(len, make);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_refused() {
        for count in [u64::MAX, u64::MAX / 8, 1 << 60] {
            let error = filled(count, 77, || 0u64).unwrap_err();
            assert_eq!(
                error.to_string(),
                "keeping account of 77 frames failed: the host has no memory for that"
            );
        }
        assert_eq!(filled(3, 3, || 5u8).unwrap(), [5; 3]);
        assert!(filled(0, 0, || 5u8).unwrap().is_empty());
    }
}
