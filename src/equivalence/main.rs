//! placeholder of the program that runs the suites
fn main() {}
