//! Instructions that move the state image itself or its control words: FXSAVE, FXRSTOR, FLDCW and their like, the
//! switch between x87 and MMX, and the x87 pointers in environments.
//!
//! Where it stands in the path of one access: between the interpreter's load and store of the memory operand, like a
//! stub, but in Rust. A host would fault on reserved MXCSR bits, and would put its own instruction addresses into the
//! pointers; here neither can happen.
//!
//! Manual: Intel SDM Vol. 2 FXSAVE (tables 3-43 to 3-46), LDMXCSR; Vol. 1 figures 8-9 to 8-12
//! (environments), table 8-1 and section 9.6.2 (FNINIT, EMMS); Vol. 3 table 12-3 (MMX and the x87 tags).

use super::context::{FpuContext, IMAGE_BYTES, InvalidMxcsr, X87Pointers, image};
use super::info::{Control, EnvForm, FxForm};

/// Bytes that FXSAVE stores outside 64-bit mode: XMM8 and above keep what memory held.
const LEGACY_END: u16 = 288;

/// The image as FXSAVE and XSAVE store it, with pointers of 64 bits or not.
#[must_use]
pub fn saved_image(context: &FpuContext, wide_pointers: bool) -> [u8; IMAGE_BYTES] {
    let mut out = *context.image();
    if !wide_pointers {
        narrow_pointers(&mut out);
    }
    out
}

/// Replaces the image by one that FXRSTOR or XRSTOR has read, with pointers of 64 bits or not.
///
/// # Errors
/// Reserved MXCSR bits are set; nothing is changed.
pub fn restored_image(
    context: &mut FpuContext,
    new: &[u8; IMAGE_BYTES],
    wide_pointers: bool,
) -> Result<(), InvalidMxcsr> {
    let mut new = *new;
    if !wide_pointers {
        narrow_pointers(&mut new);
    }
    context.load_image(&new)
}

/// The upper halves of the pointers are selectors in the narrow form, and those are always zero here.
fn narrow_pointers(bytes: &mut [u8; IMAGE_BYTES]) {
    bytes[image::FIP + 4..image::FIP + 8].fill(0);
    bytes[image::FDP + 4..image::FDP + 8].fill(0);
}

/// FXSAVE into the memory buffer; returns how many bytes are stored. The rest of the 512 belongs to software.
pub fn fx_save(context: &mut FpuContext, form: FxForm) -> u16 {
    let out = saved_image(context, form.wide_pointers);
    let end = if form.all_registers { image::END as u16 } else { LEGACY_END };
    context.mem[..usize::from(end)].copy_from_slice(&out[..usize::from(end)]);
    end
}

/// FXRSTOR from the memory buffer.
pub fn fx_restore(context: &mut FpuContext, form: FxForm) -> Result<(), InvalidMxcsr> {
    let mut new: [u8; IMAGE_BYTES] = context.mem;
    if !form.all_registers {
        let kept = usize::from(LEGACY_END)..image::END;
        new[kept.clone()].copy_from_slice(&context.image()[kept]);
    }
    restored_image(context, &new, form.wide_pointers)
}

/// The pointers in an environment image in memory, as FLDENV and FRSTOR read them.
pub fn pointers_from_environment(memory: &[u8; IMAGE_BYTES], form: EnvForm) -> X87Pointers {
    let half = |at: usize| u16::from_le_bytes([memory[at], memory[at + 1]]);
    match form {
        EnvForm::Short => {
            X87Pointers { opcode: 0, instruction: u64::from(half(6)), data: u64::from(half(10)) }
        }
        EnvForm::Long => X87Pointers {
            opcode: half(18) & 0x7FF,
            instruction: u64::from(half(12)) | u64::from(half(14)) << 16,
            data: u64::from(half(20)) | u64::from(half(22)) << 16,
        },
    }
}

/// Puts the guest's pointers over those of the host in an environment that FNSTENV or FNSAVE wrote.
pub fn pointers_into_environment(memory: &mut [u8; IMAGE_BYTES], form: EnvForm, pointers: X87Pointers) {
    let (opcode, instruction, data) = (pointers.opcode, pointers.instruction as u32, pointers.data as u32);
    match form {
        EnvForm::Short => {
            let words = [instruction as u16, 0, data as u16, 0];
            for (index, word) in words.into_iter().enumerate() {
                memory[6 + 2 * index..8 + 2 * index].copy_from_slice(&word.to_le_bytes());
            }
        }
        EnvForm::Long => {
            // The upper half of the data selector's word is reserved and stored as ones.
            let words = [instruction, u32::from(opcode) << 16, data, 0xFFFF_0000];
            for (index, word) in words.into_iter().enumerate() {
                memory[12 + 4 * index..16 + 4 * index].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// An instruction on the control and status words.
pub fn control(context: &mut FpuContext, control: Control) {
    let (fcw, fsw) = (context.fcw(), context.fsw());
    match control {
        Control::StoreWord => context.mem[..2].copy_from_slice(&fcw.to_le_bytes()),
        Control::StoreStatus => context.mem[..2].copy_from_slice(&fsw.to_le_bytes()),
        Control::StatusToAx => context.gpr[0] = context.gpr[0] & !0xFFFF | u64::from(fsw),
        Control::LoadWord => {
            let new = u16::from_le_bytes([context.mem[0], context.mem[1]]);
            context.set_x87_words(new, fsw);
        }
        Control::ClearExceptions => context.set_x87_words(fcw, fsw & 0x7F00),
        Control::EmptyMmx => {
            enter_mmx(context);
            context.put(image::FTW, &[0]);
        }
        Control::Initialize => {
            enter_mmx(context); // the registers keep their contents, and the top is register 0
            context.put(image::FTW, &[0]);
            context.set_x87_words(0x37F, 0);
            context.set_pointers(X87Pointers::default());
        }
    }
}

/// What every MMX instruction but EMMS does to the x87 state: all registers valid, top of stack 0.
pub fn enter_mmx(context: &mut FpuContext) {
    let top = usize::from(context.fsw() >> 11 & 7);
    if top != 0 {
        // The image lists registers from the top of the stack, which is register 0 from now on.
        let mut registers: [u8; 128] = context.bytes(image::ST);
        registers.rotate_right(16 * top);
        context.put(image::ST, &registers);
        let fsw = context.fsw() & !(7 << 11);
        context.put(image::FSW, &fsw.to_le_bytes());
    }
    context.put(image::FTW, &[0xFF]);
}
