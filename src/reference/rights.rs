//! Access rights (SDM Vol. 3 §4.6.1), protection keys (§4.6.2) and the error code (§4.7).

use crate::{Cpu, Leaf};
use mmu::{Access, AccessKind, Privilege};

pub(crate) const NOT_PRESENT: u32 = 0;
pub(crate) const RESERVED: u32 = 1 | 1 << 3;
const PROTECTION: u32 = 1;
const KEY: u32 = 1 | 1 << 5;

impl Leaf {
    /// The error code with which the access is refused, or `None` where it is permitted. A violation of the protection
    /// key is reported before one of the other rights, as processors do.
    pub fn refusal(&self, cpu: &Cpu, access: &Access) -> Option<u32> {
        if !cpu.pg {
            return None;
        }
        if !key_permits(cpu, access, self) {
            return Some(code(cpu, access, KEY));
        }
        if !rights_permit(cpu, access, self) {
            return Some(code(cpu, access, PROTECTION));
        }
        None
    }
}

/// §4.6.1, "Determination of Access Rights", sentence by sentence.
fn rights_permit(cpu: &Cpu, access: &Access, leaf: &Leaf) -> bool {
    let user_mode_access = access.privilege == Privilege::User;
    let user_mode_address = leaf.every_us;
    // The flag is reserved while IA32_EFER.NXE = 0, so that a walk does not get here with it; a cached one may.
    let execute_disabled = cpu.nxe && leaf.some_xd;
    if user_mode_access {
        return user_mode_address
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => leaf.every_rw,
                AccessKind::Execute => !execute_disabled,
            };
    }
    let smap_lets_in = !cpu.smap || access.ac && access.privilege == Privilege::Supervisor;
    match (access.kind, user_mode_address) {
        (AccessKind::Read, false) => true,
        (AccessKind::Read, true) => smap_lets_in,
        (AccessKind::Write, false) => !cpu.wp || leaf.every_rw,
        (AccessKind::Write, true) => smap_lets_in && (!cpu.wp || leaf.every_rw),
        (AccessKind::Execute, false) => !execute_disabled,
        (AccessKind::Execute, true) => !cpu.smep && !execute_disabled,
    }
}

/// §4.6.2, "Protection Keys".
fn key_permits(cpu: &Cpu, access: &Access, leaf: &Leaf) -> bool {
    if !cpu.lma || !cpu.pke || !leaf.every_us || access.kind == AccessKind::Execute {
        return true;
    }
    let access_disable = cpu.pkru >> (2 * leaf.key) & 1 == 1;
    let write_disable = cpu.pkru >> (2 * leaf.key + 1) & 1 == 1;
    if access_disable {
        return false;
    }
    let write = access.kind == AccessKind::Write;
    !(write && write_disable && (access.privilege == Privilege::User || cpu.wp))
}

/// §4.7, figure 4-12: the flags that say what the access was, beside those that say what was wrong.
pub(crate) fn code(cpu: &Cpu, access: &Access, flags: u32) -> u32 {
    let mut code = flags;
    if access.kind == AccessKind::Write {
        code |= 1 << 1;
    }
    if access.privilege == Privilege::User {
        code |= 1 << 2;
    }
    if access.kind == AccessKind::Execute && (cpu.smep || cpu.pae && cpu.nxe) {
        code |= 1 << 4;
    }
    code
}
