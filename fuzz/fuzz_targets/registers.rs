//! libFuzzer's program for the target `registers`: accesses to every device. All of it is in [`harness::registers`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::registers::registers(data);
});
