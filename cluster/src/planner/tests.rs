//! The planner over random clusters.
