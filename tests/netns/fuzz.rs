//! Replays the saved fuzzing inputs of the userspace datapath.

use udp_fanout_testkit::fuzz::replay;

#[test]
fn netns_kept_inputs_of_the_userspace_datapath() {
    replay("user");
}
