//! Replays the inputs that are kept for fuzzing the userspace datapath.

use udp_fanout_testkit::fuzz::replay;

#[test]
fn netns_kept_inputs_of_the_userspace_datapath() {
    replay("user");
}
