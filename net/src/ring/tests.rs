//! The ring over the loopback interface, against plain blocking sockets of the standard library.
