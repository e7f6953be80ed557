//! Lists of instructions with a property that the decoder does not know: alignment, MXCSR, waiting, x87 pointers.
//!
//! Where it stands in the path of one access: `allow` asks when an instruction is decoded. A mistake here cannot hurt
//! the host, only the guest, and the differential tests compare each instruction with the processor.
//!
//! Manual: Intel SDM Vol. 1 section 11.6.10 (alignment), 11.5 and appendix E (vector exceptions), 8.1.8 and 8.3.11
//! (x87 pointers, waiting instructions).

use iced_x86::{Code, Mnemonic};

use super::info::{Class, EnvForm, Lanes, PointerRule};

/// Legacy vector instructions want their 16-byte operands aligned, but for moves that say otherwise in their name and
/// string compares.
pub fn aligned(mnemonic: Mnemonic, class: Class, size: u16) -> bool {
    use Mnemonic as M;
    let unaligned = matches!(
        mnemonic,
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    );
    match class {
        Class::FxState => true,
        Class::Sse | Class::SseFp | Class::MmxSse => size == 16 && !unaligned,
        Class::Integer | Class::X87 | Class::Wait | Class::Mmx => false,
    }
}

/// Whether the result depends on MXCSR or an exception can be raised. The reciprocal estimates, moves, shuffles, logic
/// and the exact conversion of 32-bit integers to doubles have no part in it.
pub fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    lanes(mnemonic) != Lanes::None
        || matches!(
            mnemonic,
            M::Sqrtps
                | M::Sqrtpd
                | M::Sqrtss
                | M::Sqrtsd
                | M::Minps
                | M::Minpd
                | M::Minss
                | M::Minsd
                | M::Maxps
                | M::Maxpd
                | M::Maxss
                | M::Maxsd
                | M::Cmpps
                | M::Cmppd
                | M::Cmpss
                | M::Cmpsd
                | M::Comiss
                | M::Comisd
                | M::Ucomiss
                | M::Ucomisd
                | M::Roundps
                | M::Roundpd
                | M::Roundss
                | M::Roundsd
                | M::Cvtpi2ps
                | M::Cvtpi2pd
                | M::Cvtsi2ss
                | M::Cvtsi2sd
                | M::Cvtss2si
                | M::Cvtsd2si
                | M::Cvttss2si
                | M::Cvttsd2si
                | M::Cvtss2sd
                | M::Cvtps2pd
                | M::Cvtdq2ps
                | M::Cvtps2dq
                | M::Cvttps2dq
                | M::Cvtpd2dq
                | M::Cvttpd2dq
        )
}

/// Where a tiny result can be.
pub fn lanes(mnemonic: Mnemonic) -> Lanes {
    use Mnemonic as M;
    match mnemonic {
        M::Addss | M::Subss | M::Mulss | M::Divss | M::Cvtsd2ss => Lanes::Single,
        M::Addsd | M::Subsd | M::Mulsd | M::Divsd => Lanes::Double,
        M::Addps | M::Subps | M::Mulps | M::Divps => Lanes::Singles,
        M::Addsubps | M::Haddps | M::Hsubps | M::Dpps | M::Cvtpd2ps => Lanes::Singles,
        M::Addpd | M::Subpd | M::Mulpd | M::Divpd => Lanes::Doubles,
        M::Addsubpd | M::Haddpd | M::Hsubpd | M::Dppd => Lanes::Doubles,
        _ => Lanes::None,
    }
}

/// Instructions that execute although an x87 exception is pending.
pub fn no_wait(code: Code) -> bool {
    matches!(
        code,
        Code::Fninit
            | Code::Fnclex
            | Code::Fnstcw_m2byte
            | Code::Fnstsw_m2byte
            | Code::Fnstsw_AX
            | Code::Fnstenv_m14byte
            | Code::Fnstenv_m28byte
            | Code::Fnsave_m94byte
            | Code::Fnsave_m108byte
            | Code::Fneni
            | Code::Fndisi
            | Code::Fnsetpm
    )
}

/// What an instruction does to the recorded x87 pointers.
pub fn pointer_rule(code: Code, class: Class) -> PointerRule {
    match code {
        _ if class != Class::X87 => PointerRule::Keep,
        Code::Fldenv_m14byte | Code::Frstor_m94byte => PointerRule::Load(EnvForm::Short),
        Code::Fldenv_m28byte | Code::Frstor_m108byte => PointerRule::Load(EnvForm::Long),
        Code::Fnstenv_m14byte => PointerRule::Store(EnvForm::Short),
        Code::Fnstenv_m28byte => PointerRule::Store(EnvForm::Long),
        Code::Fnsave_m94byte => PointerRule::StoreAndClear(EnvForm::Short),
        Code::Fnsave_m108byte => PointerRule::StoreAndClear(EnvForm::Long),
        _ => PointerRule::Record,
    }
}
