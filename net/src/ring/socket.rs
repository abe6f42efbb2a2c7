//! Opening sockets the way the ring wants them.
//!
//! Sockets stay in blocking mode: the kernel then waits for readiness inside the operation, where a non-blocking socket
//! would answer "try again" to the ring.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use super::error::RingError;

/// How long a peer may be silent before the kernel asks whether it is still there, how often it asks, and how many
/// silences end the connection: a peer that vanished without a word gives its place back within ten minutes.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(300);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(100);
const KEEPALIVE_TRIES: u32 = 3;

/// Fails when somebody listens on `addr` already, and settles port 0: returns the address that all cores then listen on.
///
/// Needed because the listeners share their port (`SO_REUSEPORT`): a second process of the same user would share it too,
/// silently, and take half of the connections.
pub fn probe_port(addr: SocketAddr) -> Result<SocketAddr, RingError> {
    let bound = || {
        let socket = stream(addr)?;
        socket.set_reuse_address(true)?;
        socket.bind(&addr.into())?;
        local(&socket)
    };
    bound().map_err(|source| listen_error(addr, source))
}

/// A listener that shares its port with those of the other cores. Accepted sockets inherit `TCP_NODELAY` and keep-alive
/// from it, which saves the calls per connection.
pub(super) fn listener(addr: SocketAddr, backlog: i32) -> Result<(Socket, SocketAddr), RingError> {
    let listening = || {
        let socket = stream(addr)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_tcp_nodelay(true)?;
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
        socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_TRIES))?;
        socket.bind(&addr.into())?;
        socket.listen(backlog)?;
        let actual = local(&socket)?;
        Ok((socket, actual))
    };
    listening().map_err(|source| listen_error(addr, source))
}

/// A socket that is about to connect to `addr`.
pub(super) fn connector(addr: SocketAddr) -> Result<Socket, RingError> {
    let made = || {
        let socket = stream(addr)?;
        socket.set_tcp_nodelay(true)?;
        Ok(socket)
    };
    made().map_err(|source| RingError::Socket { addr, source })
}

fn stream(addr: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))
}

fn local(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))
}

fn listen_error(addr: SocketAddr, source: io::Error) -> RingError {
    match source.kind() {
        io::ErrorKind::AddrInUse => RingError::AddressInUse { addr },
        _ => RingError::Listen { addr, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_sockets_inherit_what_the_listener_is_set_to() {
        let (listener, addr) = listener("127.0.0.1:0".parse().unwrap(), 1).unwrap();
        let _client = std::net::TcpStream::connect(addr).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), KEEPALIVE_AFTER);
    }

    #[test]
    fn a_taken_port_is_found_though_ours_are_shared() {
        let any = "127.0.0.1:0".parse().unwrap();
        let free = probe_port(any).unwrap();
        assert_ne!(free.port(), 0);
        let (_first, addr) = listener(any, 1).unwrap();
        let (_second, same) = listener(addr, 1).unwrap();
        assert_eq!(addr, same);
        assert!(matches!(probe_port(addr), Err(RingError::AddressInUse { addr: a }) if a == addr));
    }
}
