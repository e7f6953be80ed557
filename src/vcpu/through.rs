//! A CPU around another: what it does not do itself it passes through.
//!
//! It stands beside the contract ([`crate::Vcpu`]), for CPUs that begin in a state of their own, are interrupted at chosen
//! instructions or go wrong on purpose: they write the methods that they change and name the others.

/// Inside an `impl Vcpu`, writes the named methods so that they call those of a field: `vcpu_through!(cpu: ticks state);`.
/// The crate that uses it must depend on `mmu`, whose types the contract speaks of.
#[macro_export]
macro_rules! vcpu_through {
    ($cpu:ident: $($method:ident)*) => { $($crate::vcpu_through!(@ $method $cpu);)* };
    (@ ticks $cpu:ident) => { fn ticks(&self) -> u64 { self.$cpu.ticks() } };
    (@ add_ticks $cpu:ident) => { fn add_ticks(&mut self, ticks: u64) { self.$cpu.add_ticks(ticks); } };
    (@ retired $cpu:ident) => { fn retired(&self) -> u64 { self.$cpu.retired() } };
    (@ paging_state $cpu:ident) => { fn paging_state(&self) -> ::mmu::PagingState { self.$cpu.paging_state() } };
    (@ set_translation $cpu:ident) => {
        fn set_translation(&mut self, root: ::mmu::TableRoot, intercepts: ::mmu::Intercepts) {
            self.$cpu.set_translation(root, intercepts);
        }
    };
    (@ flush $cpu:ident) => { fn flush(&mut self, flush: ::mmu::TlbFlush) { self.$cpu.flush(flush); } };
    (@ can_take_interrupt $cpu:ident) => {
        fn can_take_interrupt(&self) -> bool { self.$cpu.can_take_interrupt() }
    };
    (@ is_delivering $cpu:ident) => { fn is_delivering(&self) -> bool { self.$cpu.is_delivering() } };
    (@ inject_interrupt $cpu:ident) => {
        fn inject_interrupt(&mut self, vector: u8) { self.$cpu.inject_interrupt(vector); }
    };
    (@ inject_nmi $cpu:ident) => { fn inject_nmi(&mut self) { self.$cpu.inject_nmi(); } };
    (@ request_interrupt_window $cpu:ident) => {
        fn request_interrupt_window(&mut self, wanted: bool) { self.$cpu.request_interrupt_window(wanted); }
    };
    (@ state $cpu:ident) => { fn state(&self) -> $crate::ArchState { self.$cpu.state() } };
    (@ set_state $cpu:ident) => {
        fn set_state(&mut self, state: &$crate::ArchState) { self.$cpu.set_state(state); }
    };
    (@ cached_translations $cpu:ident) => {
        fn cached_translations(&self) -> Vec<$crate::CachedTranslation> { self.$cpu.cached_translations() }
    };
    (@ counters $cpu:ident) => { fn counters(&self) -> &::mmu::Counters { self.$cpu.counters() } };
}
