#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mosfs_fuzz::medium::image(data));
