//! Links over the loopback interface.
