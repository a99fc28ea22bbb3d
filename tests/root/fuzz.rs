//! Replays the inputs that are kept for fuzzing the kernel program.

use udp_fanout_testkit::fuzz::replay;

#[test]
fn root_kept_inputs_of_the_kernel_program() {
    replay("kernel");
}
