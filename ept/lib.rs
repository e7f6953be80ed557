//! The nested backend: second-level tables in Intel's EPT format.
