//! Who walks a vCPU's page tables on this host: the processor under nested paging, or the host's KVM.
//!
//! It stands behind every access of a guest that KVM runs, and decides what its exits mean: under EPT and NPT the kernel
//! counts faults of guest-physical addresses, elsewhere those of its own shadow tables (SDM Vol. 3 §29.3, AMD APM Vol. 2
//! §15.25).

use std::fmt;
use std::path::Path;

/// Who walks the vCPU's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walker {
    /// The processor, under Intel's EPT.
    Ept,
    /// The processor, under AMD's NPT.
    Npt,
    /// KVM, which shadows on VT-x or SVM.
    KvmShadows,
    /// KVM, which shadows without VT-x or SVM.
    KvmShadowsByItself,
    /// The host does not say.
    Unknown,
}

impl Walker {
    /// Asks the host.
    pub fn of_this_host() -> Self {
        Self::of(Path::new("/sys/module"))
    }

    fn of(modules: &Path) -> Self {
        let on = |parameter: &str| {
            let text = std::fs::read_to_string(modules.join(parameter)).ok()?;
            Some(matches!(text.trim(), "Y" | "y" | "1"))
        };
        match (on("kvm_intel/parameters/ept"), on("kvm_amd/parameters/npt")) {
            (Some(true), _) => Self::Ept,
            (_, Some(true)) => Self::Npt,
            (Some(false), _) | (_, Some(false)) => Self::KvmShadows,
            _ if modules.join("kvm_pvm").exists() => Self::KvmShadowsByItself,
            _ => Self::Unknown,
        }
    }

    /// Whether it is the processor's own walker.
    pub fn is_hardware(self) -> bool {
        matches!(self, Self::Ept | Self::Npt)
    }

    /// Whether CPUID leaves the guest at every privilege level: VT-x always makes it, and KVM asks SVM to. Without them user
    /// code asks the processor itself.
    pub fn traps_cpuid(self) -> bool {
        self != Self::KvmShadowsByItself
    }

    /// A word for it in reports and data.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ept => "ept",
            Self::Npt => "npt",
            Self::KvmShadows => "kvm-shadow",
            Self::KvmShadowsByItself => "pvm",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Walker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ept => "the processor's own page walker (KVM with EPT)",
            Self::Npt => "the processor's own page walker (KVM with NPT)",
            Self::KvmShadows => {
                "the page walker of the host's KVM (kvm_intel or kvm_amd without nested paging)"
            }
            Self::KvmShadowsByItself => "the page walker of the host's KVM (kvm_pvm, without VT-x or SVM)",
            Self::Unknown => "a KVM that does not say who walks tables",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walker_is_what_the_modules_say() {
        let root = std::env::temp_dir().join(format!("antumbra-walker-{}", std::process::id()));
        for (file, text, walker) in [
            ("kvm_intel/parameters/ept", "Y\n", Walker::Ept),
            ("kvm_intel/parameters/ept", "N\n", Walker::KvmShadows),
            ("kvm_amd/parameters/npt", "1\n", Walker::Npt),
            ("kvm_amd/parameters/npt", "0\n", Walker::KvmShadows),
            ("kvm_pvm/nothing", "", Walker::KvmShadowsByItself),
            ("kvm/nothing", "", Walker::Unknown),
        ] {
            let path = root.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            assert_eq!(Walker::of(&root), walker, "{file} {text:?}");
            std::fs::remove_dir_all(&root).unwrap();
        }
    }
}
