//! Whole clusters of the machine, in virtual time.
