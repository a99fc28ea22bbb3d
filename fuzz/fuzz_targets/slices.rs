#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| udp_fanout_testkit::fuzz::slices::run(bytes));
