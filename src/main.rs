//! Entry point: hands the command line to the library.

fn main() {}
