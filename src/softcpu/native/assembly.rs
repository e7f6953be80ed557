//! The assembler of stubs: an encoder, and the few shapes of instruction that surround the guest's own.
//!
//! Where it stands in the path of one access: once for each decoded instruction, under `encode`.
//!
//! Manual: Intel SDM Vol. 2 chapter 2 (encoding), Vol. 1 section 8.1.8 and 9.6.2 (an empty x87 unit).

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, IcedError, Instruction, MemoryOperand, OpKind, Register,
};

use super::context::{image, layout};

/// Length of a short jump.
const JUMP: u64 = 2;

/// The encoder, with the few shapes of instruction that surround the guest's.
pub struct Assembly {
    encoder: Encoder,
}

impl Assembly {
    /// An empty one, for 64-bit mode.
    pub fn new() -> Self {
        Self { encoder: Encoder::new(64) }
    }

    /// The machine code.
    pub fn finish(mut self) -> Vec<u8> {
        self.encoder.take_buffer()
    }

    /// Every instruction is encoded for address 0: the only addresses in stubs are short jumps forward.
    fn add(&mut self, instruction: &Instruction) -> Result<usize, String> {
        self.encoder.encode(instruction, 0).map_err(text)
    }

    /// An instruction without operands.
    pub fn plain(&mut self, code: Code) -> Result<(), String> {
        self.add(&Instruction::with(code)).map(drop)
    }

    /// An instruction on the context.
    pub fn memory(&mut self, code: Code, place: usize) -> Result<(), String> {
        let instruction = Instruction::with1(code, operand(place)).map_err(text)?;
        self.add(&instruction).map(drop)
    }

    /// An instruction on a register and the context, in this order.
    pub fn load(&mut self, code: Code, register: Register, place: usize) -> Result<(), String> {
        let instruction = Instruction::with2(code, register, operand(place)).map_err(text)?;
        self.add(&instruction).map(drop)
    }

    /// An instruction on the context and a register, in this order.
    pub fn store(&mut self, code: Code, register: Register, place: usize) -> Result<(), String> {
        let instruction = Instruction::with2(code, operand(place), register).map_err(text)?;
        self.add(&instruction).map(drop)
    }

    /// Puts 16 bytes of the context into the upper half of a YMM register.
    pub fn insert_high(&mut self, register: Register, place: usize) -> Result<(), String> {
        let code = Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8;
        let instruction = Instruction::with4(code, register, register, operand(place), 1).map_err(text)?;
        self.add(&instruction).map(drop)
    }

    /// Puts the upper half of a YMM register into the context.
    pub fn extract_high(&mut self, register: Register, place: usize) -> Result<(), String> {
        let code = Code::VEX_Vextractf128_xmmm128_ymm_imm8;
        let instruction = Instruction::with3(code, operand(place), register, 1).map_err(text)?;
        self.add(&instruction).map(drop)
    }

    /// Gives the host an empty x87 unit with its own control word back. FNINIT does, at 40 ns; where the guest's control
    /// word is the host's and no exception is pending, EMMS is enough, at 1 ns.
    pub fn clean_x87(&mut self) -> Result<(), String> {
        const HOST_CONTROL: i32 = 0x37F;
        let (fcw, fsw) = (operand(layout::IMAGE + image::FCW), operand(layout::IMAGE + image::FSW));
        let compare = Instruction::with2(Code::Cmp_rm16_imm16, fcw, HOST_CONTROL).map_err(text)?;
        let test = Instruction::with2(Code::Test_rm8_imm8, fsw, 0x80).map_err(text)?;
        let (emms, fninit) = (2, 2);
        self.add(&compare)?;
        self.jump(Code::Jne_rel8_64, length(&test)? + JUMP + emms + JUMP)?; // to FNINIT
        self.add(&test)?;
        self.jump(Code::Jne_rel8_64, emms + JUMP)?; // to FNINIT
        self.plain(Code::Emms)?;
        self.jump(Code::Jmp_rel8_64, fninit)?; // past it
        self.plain(Code::Fninit)
    }

    /// A short jump over that many bytes.
    fn jump(&mut self, code: Code, over: u64) -> Result<(), String> {
        self.add(&Instruction::with_branch(code, JUMP + over).map_err(text)?).map(drop)
    }

    /// Adds the guest's instruction and makes sure that the host will read it as it was meant.
    pub fn checked(&mut self, body: &Instruction) -> Result<(), String> {
        let length = self.add(body)?;
        let whole = self.encoder.take_buffer();
        let start = whole.len().checked_sub(length).ok_or("the encoder lost count")?;
        let again = Decoder::new(64, &whole[start..], DecoderOptions::NONE).decode();
        let same = again.len() == length
            && again.code() == body.code()
            && again.op_count() == body.op_count()
            && (0..body.op_count()).all(|operand| same_operand(body, &again, operand));
        self.encoder.set_buffer(whole);
        if same { Ok(()) } else { Err("its encoding for the host does not decode to the same".into()) }
    }
}

fn same_operand(one: &Instruction, other: &Instruction, operand: u32) -> bool {
    one.op_kind(operand) == other.op_kind(operand)
        && match one.op_kind(operand) {
            OpKind::Register => one.op_register(operand) == other.op_register(operand),
            OpKind::Memory => {
                other.memory_base() == Register::RDI
                    && other.memory_index() == Register::None
                    && other.memory_displacement64() == layout::MEM as u64
                    && other.segment_prefix() == Register::None
            }
            _ => one.immediate8() == other.immediate8(),
        }
}

fn operand(place: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RDI, place as i64)
}

fn text(error: IcedError) -> String {
    error.to_string()
}

fn length(instruction: &Instruction) -> Result<u64, String> {
    Encoder::new(64).encode(instruction, 0).map(|length| length as u64).map_err(text)
}
