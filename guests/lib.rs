//! Bare-metal guests, built by cargo and embedded in the program.
