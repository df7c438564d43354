#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mosfs_fuzz::registry::source(data));
