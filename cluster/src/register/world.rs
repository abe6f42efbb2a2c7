//! Whole groups of nodes around one register, under faults, from one seed.
