//! The devices of the machine: register models and the chipset that routes to them.
