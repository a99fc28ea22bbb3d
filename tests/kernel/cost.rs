//! What the program costs the verifier, held under a budget: kernels give up at a million instructions looked at and at
//! 512 bytes of stack. Older ones look at more instructions than newer ones, because they see less often that they have
//! been there before.

use udp_fanout::config::Limits;
use udp_fanout::datapath::kernel::{Setup, skel};

/// Instructions looked at: a fifth of what kernels put up with, from 6.12 on; before, little more than half.
fn instructions() -> u32 {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-']).take(2).map(|number| number.parse().unwrap()).collect();
    if numbers >= vec![6, 12] { 200_000 } else { 600_000 }
}

/// Bytes of the deepest stack of one function.
const STACK: u32 = 320;

fn setup(redirects: bool, ring_buffer: bool) -> Setup {
    let limits = Limits { max_listeners: 4, max_downstreams: 16, max_sources: 16, max_senders: 16 };
    Setup { redirects, ring_buffer, ..Setup::new(&limits) }
}

/// The number that follows these words.
fn after(text: &str, words: &str) -> Option<String> {
    let rest = &text[text.find(words)? + words.len()..];
    Some(rest.split_whitespace().next()?.to_owned())
}

#[test]
fn root_the_verifier_is_not_burdened_beyond_its_budget() {
    for (redirects, ring_buffer) in [(true, true), (true, false), (false, false)] {
        let text = skel::verifier_statistics(&setup(redirects, ring_buffer)).unwrap();
        println!("redirects {redirects}, ring buffer {ring_buffer}:\n{text}");
        let looked_at: u32 = after(&text, "processed ").unwrap().parse().unwrap();
        let most = instructions();
        assert!(looked_at <= most, "the verifier looks at {looked_at} instructions, more than {most}");
        let depths = after(&text, "stack depth ").unwrap();
        let depths: Vec<u32> = depths.split('+').map(|depth| depth.parse().unwrap()).collect();
        let deepest = depths.iter().max().unwrap();
        assert!(*deepest <= STACK, "a function has {deepest} bytes of stack, more than {STACK}");
    }
}
