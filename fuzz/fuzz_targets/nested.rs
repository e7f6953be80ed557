//! libFuzzer's program for the target `nested`: guest tables through EPT, against the manual. All of it is in [`harness::nested`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::nested::nested(data);
});
