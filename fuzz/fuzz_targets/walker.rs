//! libFuzzer's program for the target `walker`: guest tables and accesses, against the walk that the manual describes. All of it is in [`harness::walker`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::walker::walker(data);
});
