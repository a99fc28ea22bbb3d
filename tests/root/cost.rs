//! The verifier's cost of the program stays within a budget: kernels refuse more than a million processed instructions
//! or 512 bytes of stack. Older kernels process more instructions than newer ones, because they prune fewer equivalent
//! states.

use udp_fanout::testing::config::MapLimits;
use udp_fanout::testing::datapath::kernel::{KernelSetup, skel};

/// Processed instructions: a tenth of the kernel's limit. Each takes about a microsecond at every start.
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

/// Bytes of each function's stack: on one line, or, from Linux 7 on, one line per function.
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
        let processed: u32 = after(&text, "processed ").unwrap().parse().unwrap();
        assert!(processed <= INSTRUCTIONS, "the verifier processes {processed} instructions, more than {INSTRUCTIONS}");
        let deepest = stack_depths(&text).into_iter().max().unwrap();
        assert!(deepest <= STACK, "a function has {deepest} bytes of stack, more than {STACK}");
    }
}
