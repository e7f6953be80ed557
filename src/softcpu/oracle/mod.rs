//! The host CPU as oracle for integer instructions.
