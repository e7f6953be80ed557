//! The program: arguments, machine, run, report.
fn main() {}
