//! libFuzzer's program for the target `texts`: sizes and reports as people and files give them. All of it is in [`harness::texts`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    harness::texts::texts(data);
});
