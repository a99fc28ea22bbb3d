//! Replays the saved fuzzing inputs of the kernel program.

use udp_fanout_testkit::fuzz::replay;

#[test]
fn root_kept_inputs_of_the_kernel_program() {
    replay("kernel");
}
