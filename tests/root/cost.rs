//! What the program costs the verifier, held under a budget: kernels give up at a million instructions looked at and at
//! 512 bytes of stack. Older ones look at more instructions than newer ones, because they see less often that they have
//! been there before.

use udp_fanout::testing::config::MapLimits;
use udp_fanout::testing::datapath::kernel::{KernelSetup, skel};

/// Instructions looked at: a tenth of what kernels put up with. Each takes about a microsecond, at every start.
const INSTRUCTIONS: u32 = 100_000;

/// Bytes of the deepest stack of one function.
const STACK: u32 = 320;

fn setup(redirects: bool, ring_buffer: bool) -> KernelSetup {
    let limits = MapLimits { max_listeners: 4, max_downstreams: 16, max_sources: 16, max_senders: 16 };
    KernelSetup { redirects, ring_buffer, ..KernelSetup::new(&limits) }
}

/// The number that follows these words.
fn after(text: &str, words: &str) -> Option<String> {
    let rest = &text[text.find(words)? + words.len()..];
    Some(rest.split_whitespace().next()?.to_owned())
}

/// Bytes of each function's stack: in a row, or, from Linux 7 on, on a line for each.
fn stack_depths(text: &str) -> Vec<u32> {
    let lines = text.lines().filter(|line| line.starts_with("subprog "));
    let each: Vec<u32> = lines.map(|line| after(line, " stack ").unwrap().parse().unwrap()).collect();
    if !each.is_empty() {
        return each;
    }
    after(text, "stack depth ").unwrap().split('+').map(|depth| depth.parse().unwrap()).collect()
}

#[test]
fn root_the_verifier_is_not_burdened_beyond_its_budget() {
    for (redirects, ring_buffer) in [(true, true), (true, false), (false, false)] {
        let text = skel::verifier_statistics(&setup(redirects, ring_buffer)).unwrap();
        println!("redirects {redirects}, ring buffer {ring_buffer}:\n{text}");
        let looked_at: u32 = after(&text, "processed ").unwrap().parse().unwrap();
        assert!(looked_at <= INSTRUCTIONS, "the verifier looks at {looked_at} instructions, more than {INSTRUCTIONS}");
        let deepest = stack_depths(&text).into_iter().max().unwrap();
        assert!(deepest <= STACK, "a function has {deepest} bytes of stack, more than {STACK}");
    }
}
