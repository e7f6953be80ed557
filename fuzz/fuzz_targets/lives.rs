//! libFuzzer's program for the target `lives`: the life of a machine under both backends, beside a model. All of it is in [`harness::lives`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::lives::lives(data);
});
