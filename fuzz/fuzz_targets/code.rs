//! libFuzzer's program for the target `code`: any bytes as instructions, in every mode under both backends. All of it is in [`harness::code`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::code::code(data);
});
