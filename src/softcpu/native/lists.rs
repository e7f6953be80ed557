//! Lists of instructions with a property that the decoder does not know: alignment, MXCSR, waiting, x87 pointers.
//!
//! Where it stands in the path of one access: `allow` asks when an instruction is decoded. A mistake here cannot hurt
//! the host, only the guest, and the differential tests compare each instruction with the processor.
//!
//! Manual: Intel SDM Vol. 1 section 11.6.10 (alignment), 11.5 and appendix E (vector exceptions), 8.1.8 and 8.3.11
//! (x87 pointers, waiting instructions).

use iced_x86::{Code, Mnemonic};

use super::fused::Fused;
use super::info::{Class, EnvForm, Lanes, PointerRule};

/// Legacy vector instructions want their 16-byte operands aligned, but for moves that say otherwise in their name and
/// string compares. Those that VEX encodes do not, but for moves that say so in theirs.
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
        Class::Avx | Class::AvxFp => matches!(
            mnemonic,
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        ),
        Class::Integer | Class::X87 | Class::Wait | Class::Mmx => false,
    }
}

/// Whether the result depends on MXCSR or an exception can be raised. The reciprocal estimates, moves, shuffles, logic
/// and the exact conversion of 32-bit integers to doubles have no part in it.
pub fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    lanes(mnemonic) != Lanes::None
        || mnemonic == M::Vcvtph2ps
        || matches!(
            legacy(mnemonic),
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

/// The arithmetic that an instruction encoded by VEX shares with one of SSE, by the latter's name; any other by its own.
pub fn legacy(mnemonic: Mnemonic) -> Mnemonic {
    use Mnemonic as M;
    match mnemonic {
        M::Vaddps => M::Addps,
        M::Vaddpd => M::Addpd,
        M::Vaddss => M::Addss,
        M::Vaddsd => M::Addsd,
        M::Vsubps => M::Subps,
        M::Vsubpd => M::Subpd,
        M::Vsubss => M::Subss,
        M::Vsubsd => M::Subsd,
        M::Vmulps => M::Mulps,
        M::Vmulpd => M::Mulpd,
        M::Vmulss => M::Mulss,
        M::Vmulsd => M::Mulsd,
        M::Vdivps => M::Divps,
        M::Vdivpd => M::Divpd,
        M::Vdivss => M::Divss,
        M::Vdivsd => M::Divsd,
        M::Vsqrtps => M::Sqrtps,
        M::Vsqrtpd => M::Sqrtpd,
        M::Vsqrtss => M::Sqrtss,
        M::Vsqrtsd => M::Sqrtsd,
        M::Vminps => M::Minps,
        M::Vminpd => M::Minpd,
        M::Vminss => M::Minss,
        M::Vminsd => M::Minsd,
        M::Vmaxps => M::Maxps,
        M::Vmaxpd => M::Maxpd,
        M::Vmaxss => M::Maxss,
        M::Vmaxsd => M::Maxsd,
        M::Vcmpps => M::Cmpps,
        M::Vcmppd => M::Cmppd,
        M::Vcmpss => M::Cmpss,
        M::Vcmpsd => M::Cmpsd,
        M::Vcomiss => M::Comiss,
        M::Vcomisd => M::Comisd,
        M::Vucomiss => M::Ucomiss,
        M::Vucomisd => M::Ucomisd,
        M::Vroundps => M::Roundps,
        M::Vroundpd => M::Roundpd,
        M::Vroundss => M::Roundss,
        M::Vroundsd => M::Roundsd,
        M::Vaddsubps => M::Addsubps,
        M::Vaddsubpd => M::Addsubpd,
        M::Vhaddps => M::Haddps,
        M::Vhaddpd => M::Haddpd,
        M::Vhsubps => M::Hsubps,
        M::Vhsubpd => M::Hsubpd,
        M::Vdpps => M::Dpps,
        M::Vdppd => M::Dppd,
        M::Vcvtsi2ss => M::Cvtsi2ss,
        M::Vcvtsi2sd => M::Cvtsi2sd,
        M::Vcvtss2si => M::Cvtss2si,
        M::Vcvtsd2si => M::Cvtsd2si,
        M::Vcvttss2si => M::Cvttss2si,
        M::Vcvttsd2si => M::Cvttsd2si,
        M::Vcvtss2sd => M::Cvtss2sd,
        M::Vcvtsd2ss => M::Cvtsd2ss,
        M::Vcvtps2pd => M::Cvtps2pd,
        M::Vcvtpd2ps => M::Cvtpd2ps,
        M::Vcvtdq2ps => M::Cvtdq2ps,
        M::Vcvtps2dq => M::Cvtps2dq,
        M::Vcvttps2dq => M::Cvttps2dq,
        M::Vcvtpd2dq => M::Cvtpd2dq,
        M::Vcvttpd2dq => M::Cvttpd2dq,
        other => other,
    }
}

/// Where a tiny result can be.
pub fn lanes(mnemonic: Mnemonic) -> Lanes {
    use Mnemonic as M;
    if let Some(fused) = Fused::of(mnemonic) {
        return match (fused.single, fused.scalar) {
            (true, true) => Lanes::Single,
            (true, false) => Lanes::Singles,
            (false, true) => Lanes::Double,
            (false, false) => Lanes::Doubles,
        };
    }
    match legacy(mnemonic) {
        M::Vcvtps2ph => Lanes::Halves,
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
