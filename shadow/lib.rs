//! The shadow backend: software shadow page tables.
