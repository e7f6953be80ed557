//! Bulk copies for string instructions.
