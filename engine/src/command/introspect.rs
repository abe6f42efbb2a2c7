//! `COMMAND`.
