//! x
use crate::cache::CodeCache;
/// CPU
pub struct SoftCpu {
    _core: crate::core::Core,
    _code: CodeCache,
}
