//! Ports that exist only in virtual machines: the debug console at 0xe9 and the debug exit at 0xf4.
//!
//! In the path of one access: port I/O exit → `Chipset` → here. They follow Bochs' port 0xe9 hack and QEMU's
//! isa-debugcon and isa-debug-exit, which test guests (kvm-unit-tests among them) speak.

/// Port of the debug console.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// First of the four ports of the debug exit.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// What a read of the debug console answers: the sign that it is there.
pub const DEBUG_CONSOLE_PRESENT: u8 = 0xe9;

/// The exit status that a value written to the debug exit asks for: always odd, so never success. Only the lowest
/// eight bits reach a process's status.
pub fn exit_status(value: u32) -> u8 {
    (value << 1) as u8 | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_is_odd() {
        assert_eq!(exit_status(0), 1);
        assert_eq!(exit_status(0x10), 33);
        assert_eq!(exit_status(u32::MAX), 255);
    }
}
