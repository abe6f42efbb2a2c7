//! A node in its cluster: what drives the pure machines of `gridkv-cluster` on the cores of this node.
//!
//! Only this module knows both sides. The machines decide; here their messages become frames on peer links, their
//! deadlines timers, and requests of clients become operations.

pub(crate) mod view;

pub use view::ClusterView;
