//! libFuzzer's program for the target `images`: any file as a kernel. All of it is in [`harness::images`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::images::images(data);
});
