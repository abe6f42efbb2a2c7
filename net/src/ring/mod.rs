//! The sockets of one core: an io_uring that receives, sends, accepts and connects, driven turn by turn.
//!
//! ```text
//!        owner (a core's loop, a bench, an example)
//!          │ listen connect adopt send pause resume        ▲ Accepted Connected Data Sent Eof Detached Closed
//!          │ detach close watch                            │ Readable
//!          ▼                                               │
//!        Ring ── turn(): one io_uring_enter at most ── submit what was queued, reap what is there
//!          │                                               ▲
//!          ▼  accept (multishot)  recv (multishot, lent buffers)  send (one per connection)
//!        kernel
//! ```
//!
//! A turn hands over everything queued since the last one and gives each completion to the owner's handler; the handler
//! may queue more, which leaves with the next turn. So one system call serves all connections of a turn. There is none
//! when nothing waits: the kernel announces work in shared memory, which [`Ring::has_work`] reads.
//!
//! # Contract
//!
//! - [`Ring::turn`] never blocks. [`Ring::wait`] does, for those who own their thread. Those who share it sleep on
//!   [`Ring::wake_fd`] after [`Ring::set_wakeups`]`(true)` and a last look at [`Ring::has_work`].
//! - **Data** is lent for the length of the handler's call. After [`Ring::pause_reads`] what the kernel had received
//!   already still arrives; keep it.
//! - **One send at a time** per connection: give a buffer, get it back empty with [`Event::Sent`], give the next. Short
//!   writes are continued inside. This bounds what a client that never reads can make us hold: the owner holds it.
//! - **[`Event::Eof`]** says that the peer will send no more; it may still read. Send what is owed, then close.
//! - **[`Event::Closed`]** comes exactly once per connection, last, whoever ended it. Until then the place is taken.
//! - **[`RingPort::detach`]** takes a connection out of the ring alive: [`Event::Detached`] brings its descriptor in place
//!   of `Closed`, and [`RingPort::adopt`] puts it into another ring.
//! - An id whose connection is gone is harmless: every verb ignores it.
//!
//! # Invariants
//!
//! - Memory that the kernel reads or writes stays put until the operation's last completion: send buffers belong to the
//!   connection's place, receive buffers to `buffers`, and a place is freed only when the kernel holds nothing of it.
//!   A dropped ring waits for all operations to end and, if they don't, leaks the memory instead of freeing it.
//! - A completion names its connection by place and generation, so that a late one matches nothing.
//! - At most one multishot receive and one send are under way per connection.
//!
//! Not here: what the bytes mean (`resp`, `session`), who runs when (the driver), timeouts of connections.
//!
//! Why the details are as they are: `SINGLE_ISSUER` and `DEFER_TASKRUN` keep the kernel from interrupting the core. The
//! send's completion is not suppressed, because it brings the buffer back. Zero-copy sends cost more than copying at the
//! size of replies. Tried and left out, since an echo of small messages gained nothing beyond the noise of ±3 %: direct
//! descriptors, bundled receives, gaps between the buffers. The kernel's TCP takes nearly all of the time.

mod buffers;
mod conn;
mod error;
mod kernel;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use io_uring::{cqueue, opcode, types};
use socket2::{SockAddr, SockRef, Socket};

pub use conn::ConnId;
pub use error::RingError;
pub use socket::probe_port;

use buffers::Buffers;
use conn::{Class, MAX_PLACES, Phase, Places, Recv};
use kernel::Kernel;

/// How large a ring is.
///
/// Locked memory (`ulimit -l`, counted over all processes of a user without `CAP_IPC_LOCK`): about 128 bytes per entry
/// and 16 per buffer, 140 KiB by default. The kernel gives it back a moment after the ring's end, not at it.
#[derive(Clone, Debug)]
pub struct RingConfig {
    /// Submission queue entries, rounded up to a power of two. More operations than that in one turn cost another
    /// system call.
    pub entries: u32,
    /// Receive buffers, a power of two up to 32768. When all are in use receives end and are started anew.
    pub buffers: u16,
    /// Bytes per receive buffer: the most that one [`Event::Data`] holds.
    pub buffer_len: u32,
    /// Connections beyond which an accepted one is announced as `over_limit` and [`Ring::connect`] fails. Those of peers
    /// are counted apart, up to [`MAX_PEERS`].
    pub max_connections: u32,
}

impl Default for RingConfig {
    fn default() -> RingConfig {
        RingConfig { entries: 1024, buffers: 256, buffer_len: 16 << 10, max_connections: 10_000 }
    }
}

/// Connections with peers that a ring holds at most, beside those with clients: those of [`Ring::listen_for_peers`],
/// [`RingPort::connect_peer`] and [`RingPort::adopt`]. So clients cannot keep nodes from talking with each other.
pub const MAX_PEERS: u32 = 16 << 10;
/// Connections beyond the limit that may be told so at once; those beyond are closed unseen.
const OVER_LIMIT_PLACES: u32 = 64;
/// The most bytes of receive buffers that a ring may ask for.
const MAX_BUFFER_BYTES: u64 = 1 << 30;
/// The most bytes handed to the kernel in one send; the rest follows.
const MAX_SEND: usize = 1 << 30;
/// How long a listener rests after an error that would otherwise repeat at once.
static ACCEPT_REST: types::Timespec = types::Timespec::new().nsec(100_000_000);
/// What a dropped ring waits for the next completion, and how often in vain, before it leaks.
const DRAIN_WAIT: Duration = Duration::from_millis(20);
const DRAIN_PATIENCE: u32 = 50;

/// Which listener accepted a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(u32);

/// A descriptor that a ring watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId(u32);

/// What happened. The order of events of one connection is the order in which they happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A peer connected. Receiving starts when the handler returns, unless it paused or closed, or `over_limit` is set.
    Accepted {
        /// The new connection.
        conn: ConnId,
        /// Who accepted it.
        listener: ListenerId,
        /// The peer's address.
        peer: SocketAddr,
        /// The ring was full: say so to the peer if you like ([`RingPort::send`], [`RingPort::finish`]), and close.
        over_limit: bool,
    },
    /// An outgoing connection stands. Receiving starts when the handler returns.
    Connected {
        /// The connection.
        conn: ConnId,
    },
    /// Bytes came. Never empty.
    Data {
        /// The connection.
        conn: ConnId,
        /// What came, lent until the handler returns.
        bytes: &'a [u8],
    },
    /// All of the buffer given to [`RingPort::send`] is in the kernel's hands; the next send may follow.
    Sent {
        /// The connection.
        conn: ConnId,
        /// The buffer, emptied, with its capacity.
        buf: Vec<u8>,
    },
    /// The peer ended its side. It may still read: send what is owed, then close.
    Eof {
        /// The connection.
        conn: ConnId,
    },
    /// The connection left the ring, as [`RingPort::detach`] asked; its id is void. Its last event, in place of `Closed`.
    Detached {
        /// The connection that was.
        conn: ConnId,
        /// Its socket, which nothing else refers to.
        fd: OwnedFd,
    },
    /// A watched descriptor can be read. Read what is there, or some of it: while something is left this comes again.
    Readable {
        /// What [`Ring::watch`] returned.
        watch: WatchId,
    },
    /// The connection is gone; its id is void. The last event of every connection that was not detached.
    Closed {
        /// The connection that was.
        conn: ConnId,
        /// What broke it, if it was not closed by its owner.
        error: Option<io::Error>,
    },
}

impl Event<'_> {
    /// The connection that this is about, if it is about one.
    pub fn conn(&self) -> Option<ConnId> {
        match self {
            Event::Accepted { conn, .. }
            | Event::Connected { conn }
            | Event::Data { conn, .. }
            | Event::Sent { conn, .. }
            | Event::Eof { conn }
            | Event::Detached { conn, .. }
            | Event::Closed { conn, .. } => Some(*conn),
            Event::Readable { .. } => None,
        }
    }
}

/// What a ring has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// System calls to submit and reap.
    pub enters: u64,
    /// Completions reaped.
    pub completions: u64,
    /// Connections accepted, those over the limit included.
    pub accepted: u64,
    /// Connections closed unseen: even the places for refusals were taken, or the peer had reset already.
    pub dropped: u64,
    /// Failed accepts.
    pub accept_errors: u64,
    /// Receives that ended because all buffers were in use.
    pub no_buffers: u64,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
}

/// What an operation was, in the low byte of its `user_data`; above it the bits of a [`ConnId`] or a listener's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Op {
    /// A cancellation: its own result says nothing that the cancelled operation does not say.
    Cancel = 0,
    Recv = 1,
    Send = 2,
    Connect = 3,
    Accept = 4,
    Rest = 5,
    Poll = 6,
}

impl Op {
    fn of(self, bits: u64) -> u64 {
        bits << 8 | self as u64
    }

    fn from_user_data(user_data: u64) -> (Op, u64) {
        let op = match user_data as u8 {
            0 => Op::Cancel,
            1 => Op::Recv,
            2 => Op::Send,
            3 => Op::Connect,
            4 => Op::Accept,
            5 => Op::Rest,
            6 => Op::Poll,
            other => unreachable!("no operation was submitted as {other}"),
        };
        (op, user_data >> 8)
    }
}

struct Listener {
    /// `None` once closed.
    socket: Option<Socket>,
    /// The kernel holds a multishot accept.
    accepting: bool,
    /// The kernel holds the timer that ends a rest.
    resting: bool,
    closing: bool,
    /// Whom it accepts.
    class: Class,
}

struct Watch {
    /// `None` once unwatched.
    fd: Option<OwnedFd>,
    /// The kernel holds a poll.
    polling: bool,
}

/// Everything of a ring but the receive buffers, which a handler's event borrows meanwhile.
struct Inner {
    kernel: Kernel,
    places: Places,
    listeners: Vec<Listener>,
    watches: Vec<Watch>,
    /// Connections that the kernel is done with, to be reported.
    closed: VecDeque<ConnId>,
    max_connections: u32,
    counters: RingCounters,
}

/// The sockets of one core. Lives and dies on the thread that made it.
pub struct Ring {
    inner: Inner,
    /// Freed in `drop`, or leaked when the kernel does not let go.
    buffers: ManuallyDrop<Buffers>,
}

/// A ring's verbs, as an event handler may use them.
pub struct RingPort<'a> {
    inner: &'a mut Inner,
}

impl Ring {
    /// A ring for the calling thread.
    pub fn new(config: RingConfig) -> Result<Ring, RingError> {
        if config.entries == 0 || config.entries > 1 << 15 {
            return Err(RingError::Config("entries must lie in 1..=32768"));
        }
        if !config.buffers.is_power_of_two() || config.buffers > 1 << 15 {
            return Err(RingError::Config("buffers must be a power of two up to 32768"));
        }
        if config.buffer_len == 0 || u64::from(config.buffer_len) * u64::from(config.buffers) > MAX_BUFFER_BYTES {
            return Err(RingError::Config("buffers must hold something, and 1 GiB at most in all"));
        }
        if config.max_connections == 0 || config.max_connections > MAX_PLACES / 2 {
            return Err(RingError::Config("max_connections must lie in 1..=2^23"));
        }
        let kernel = Kernel::new(config.entries)?;
        let buffers = Buffers::new(config.buffers, config.buffer_len).ok_or_else(|| RingError::Memory {
            what: "its receive buffers",
            memlock: error::memlock(),
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        let (addr, count) = buffers.registration();
        // SAFETY: the entries live until `Ring::drop`, which unregisters them first or leaks them; on the error path below
        // nothing was registered, and `buffers` has no destructor.
        if let Err(error) = unsafe { kernel.register_buffers(addr, count) } {
            // SAFETY: not registered, and no operation was ever queued.
            unsafe { buffers.free() };
            return Err(error);
        }
        Ok(Ring {
            inner: Inner {
                kernel,
                places: Places::new(),
                listeners: Vec::new(),
                watches: Vec::new(),
                closed: VecDeque::new(),
                max_connections: config.max_connections,
                counters: RingCounters::default(),
            },
            buffers: ManuallyDrop::new(buffers),
        })
    }

    /// The verbs, as a handler gets them.
    pub fn port(&mut self) -> RingPort<'_> {
        RingPort { inner: &mut self.inner }
    }

    /// Listens on `addr`, sharing the port with the rings of other cores; returns the actual address, port 0 resolved.
    /// Call [`probe_port`] once beforehand, or a second process would go unnoticed.
    pub fn listen(&mut self, addr: SocketAddr, backlog: i32) -> Result<(ListenerId, SocketAddr), RingError> {
        self.listen_for(Class::Client, addr, backlog)
    }

    /// As [`Ring::listen`], for connections that count against [`MAX_PEERS`].
    pub fn listen_for_peers(&mut self, addr: SocketAddr, backlog: i32) -> Result<(ListenerId, SocketAddr), RingError> {
        self.listen_for(Class::Peer, addr, backlog)
    }

    fn listen_for(
        &mut self,
        class: Class,
        addr: SocketAddr,
        backlog: i32,
    ) -> Result<(ListenerId, SocketAddr), RingError> {
        let (socket, actual) = socket::listener(addr, backlog)?;
        let index = self.inner.listeners.len() as u32;
        self.inner.listeners.push(Listener {
            socket: Some(socket),
            accepting: false,
            resting: false,
            closing: false,
            class,
        });
        self.inner.arm_accept(index);
        Ok((ListenerId(index), actual))
    }

    /// Stops listening. Connections stay; those not yet accepted are reset by the kernel.
    pub fn unlisten(&mut self, listener: ListenerId) {
        self.inner.unlisten(listener.0);
    }

    /// Reports whenever `fd` can be read, as [`Event::Readable`]. For the few sockets that are not connections: the ring
    /// reads nothing from it, the owner does, through its own descriptor of the same thing in non-blocking mode.
    pub fn watch(&mut self, fd: OwnedFd) -> WatchId {
        let index = self.inner.watches.len() as u32;
        self.inner.watches.push(Watch { fd: Some(fd), polling: false });
        self.inner.arm_poll(index);
        WatchId(index)
    }

    /// Stops watching, and closes the ring's descriptor.
    pub fn unwatch(&mut self, watch: WatchId) {
        self.inner.unwatch(watch.0);
    }

    /// See [`RingPort::connect`].
    pub fn connect(&mut self, addr: SocketAddr) -> Result<ConnId, RingError> {
        self.port().connect(addr)
    }

    /// See [`RingPort::send`].
    pub fn send(&mut self, conn: ConnId, buf: Vec<u8>) -> Result<(), Vec<u8>> {
        self.port().send(conn, buf)
    }

    /// See [`RingPort::is_sending`].
    pub fn is_sending(&mut self, conn: ConnId) -> bool {
        self.port().is_sending(conn)
    }

    /// See [`RingPort::pause_reads`].
    pub fn pause_reads(&mut self, conn: ConnId) {
        self.port().pause_reads(conn);
    }

    /// See [`RingPort::resume_reads`].
    pub fn resume_reads(&mut self, conn: ConnId) {
        self.port().resume_reads(conn);
    }

    /// See [`RingPort::finish`].
    pub fn finish(&mut self, conn: ConnId) {
        self.port().finish(conn);
    }

    /// See [`RingPort::close`].
    pub fn close(&mut self, conn: ConnId) {
        self.port().close(conn);
    }

    /// Submits what is queued, takes what is there, and gives each event to `on`. Never blocks. Returns the number of
    /// completions handled.
    ///
    /// What `on` queues leaves with the next turn: [`Ring::has_work`] says that one is due.
    ///
    /// An error means that the ring itself is broken (the thread changed, the descriptor is gone): nothing else will work.
    /// If `on` panics the ring stays whole: the event counts as delivered.
    pub fn turn(&mut self, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) -> io::Result<usize> {
        if self.inner.kernel.wants_enter() {
            self.inner.counters.enters += 1;
            self.inner.kernel.enter()?;
        }
        Ok(self.reap(on))
    }

    /// Submits what is queued and blocks until a turn would find something, or `timeout` is over (`None`: for ever).
    /// For those who own their thread.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.inner.closed.is_empty() && self.inner.kernel.reapable() == 0 {
            self.inner.counters.enters += 1;
            self.inner.kernel.enter_and_wait(timeout)?;
        }
        Ok(())
    }

    /// Whether a turn would find something to submit or to reap. Looks at memory only.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.inner.kernel.has_news() || !self.inner.closed.is_empty()
    }

    /// An eventfd that the kernel writes when a turn is due, while wake-ups are on. Made in blocking mode.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.inner.kernel.wake_fd()
    }

    /// Turns writing of the eventfd on (about to sleep) or off (awake; the initial state). After turning it on look at
    /// [`Ring::has_work`] once more, then sleep: what comes later writes the eventfd.
    pub fn set_wakeups(&mut self, on: bool) {
        self.inner.kernel.set_wakeups(on);
    }

    /// Connections that have a place: those being opened or closed, and those over the limit, included.
    pub fn connections(&self) -> usize {
        self.inner.places.live()
    }

    /// What the ring has done so far.
    pub fn counters(&self) -> RingCounters {
        self.inner.counters
    }

    fn reap(&mut self, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) -> usize {
        let Ring { inner, buffers } = self;
        let ready = inner.kernel.reapable();
        for _ in 0..ready {
            let Some(completion) = inner.kernel.reap() else { break };
            inner.counters.completions += 1;
            let (result, flags) = (completion.result(), completion.flags());
            let (op, bits) = Op::from_user_data(completion.user_data());
            match op {
                Op::Recv => inner.on_recv(buffers, ConnId::from_bits(bits), result, flags, on),
                Op::Send => inner.on_send(ConnId::from_bits(bits), result, on),
                Op::Connect => inner.on_connect(ConnId::from_bits(bits), result, on),
                Op::Accept => inner.on_accept(bits as u32, result, flags, on),
                Op::Rest => inner.on_rested(bits as u32),
                Op::Poll => inner.on_poll(bits as u32, result, on),
                Op::Cancel => {}
            }
        }
        while let Some(conn) = inner.closed.pop_front() {
            let place = inner.places.get_mut(conn).expect("a closed connection keeps its place until it is reported");
            let error = (place.errno != 0).then(|| io::Error::from_raw_os_error(place.errno));
            let event = match place.detached.take() {
                Some(fd) => Event::Detached { conn, fd },
                None => Event::Closed { conn, error },
            };
            inner.places.release(conn);
            on(&mut RingPort { inner }, event);
        }
        ready
    }

    /// Ends everything and waits until the kernel holds nothing of ours. False when it does not let go.
    fn drain(&mut self) -> bool {
        for index in 0..self.inner.listeners.len() as u32 {
            self.inner.unlisten(index);
        }
        for index in 0..self.inner.watches.len() as u32 {
            self.inner.unwatch(index);
        }
        for conn in self.inner.places.ids().collect::<Vec<_>>() {
            self.inner.retire(conn, 0);
        }
        let mut patience = DRAIN_PATIENCE;
        loop {
            self.reap(&mut |_, _| {});
            let Inner { places, listeners, watches, .. } = &self.inner;
            let listening = listeners.iter().any(|l| l.accepting || l.resting);
            if places.live() == 0 && !listening && !watches.iter().any(|w| w.polling) {
                return self.inner.kernel.unregister_buffers();
            }
            if patience == 0 || self.inner.kernel.enter_and_wait(Some(DRAIN_WAIT)).is_err() {
                return false;
            }
            if self.inner.kernel.reapable() == 0 {
                patience -= 1;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.drain() {
            // SAFETY: taken once, here; every operation has completed and the entries are unregistered.
            unsafe { ManuallyDrop::take(&mut self.buffers).free() };
        } else {
            // The kernel may still use the memory: receive buffers have no destructor, send buffers are forgotten.
            self.inner.places.leak();
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("connections", &self.connections())
            .field("counters", &self.inner.counters)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for RingPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingPort").field("connections", &self.inner.places.live()).finish_non_exhaustive()
    }
}

impl RingPort<'_> {
    /// Starts connecting to `addr`. [`Event::Connected`] or [`Event::Closed`] follows.
    pub fn connect(&mut self, addr: SocketAddr) -> Result<ConnId, RingError> {
        self.connect_as(Class::Client, addr)
    }

    /// As [`RingPort::connect`], for a connection that counts against [`MAX_PEERS`].
    pub fn connect_peer(&mut self, addr: SocketAddr) -> Result<ConnId, RingError> {
        self.connect_as(Class::Peer, addr)
    }

    fn connect_as(&mut self, class: Class, addr: SocketAddr) -> Result<ConnId, RingError> {
        self.inner.room_for(class)?;
        let socket = socket::connector(addr)?;
        let fd = types::Fd(socket.as_raw_fd());
        let conn = self.inner.places.take(socket.into(), Phase::Connecting, class);
        let place = self.inner.places.get_mut(conn).expect("just taken");
        let target = place.target.insert(Box::new(SockAddr::from(addr)));
        let entry = opcode::Connect::new(fd, target.as_ptr().cast(), target.len())
            .build()
            .user_data(Op::Connect.of(conn.to_bits()));
        // SAFETY: the address is boxed in the place, which is not freed before the completion takes the box out.
        unsafe { self.inner.kernel.push(entry) };
        Ok(conn)
    }

    /// Takes over the socket of a connection that stands, in blocking mode, from another ring or elsewhere. Receiving
    /// starts at once. It counts against [`MAX_PEERS`].
    pub fn adopt(&mut self, fd: OwnedFd) -> Result<ConnId, RingError> {
        self.inner.room_for(Class::Peer)?;
        let conn = self.inner.places.take(fd, Phase::Open, Class::Peer);
        self.inner.settle(conn);
        Ok(conn)
    }

    /// Asks for the connection's socket. [`Event::Detached`] brings it when the kernel is done with what is under way: a
    /// receive is cancelled, a send is awaited. What the kernel had received by then comes before, as [`Event::Data`].
    ///
    /// [`Event::Closed`] comes instead if the connection breaks, or is closed, before.
    pub fn detach(&mut self, conn: ConnId) {
        match self.inner.places.get_mut(conn) {
            Some(place) if place.phase == Phase::Open && !place.finishing => place.detaching = true,
            _ => return,
        }
        self.pause_reads(conn);
        self.inner.settle(conn);
    }

    /// Sends all of `buf`; [`Event::Sent`] brings it back emptied.
    ///
    /// Hands `buf` back untouched when nothing can be sent: the connection is gone, closing, being detached, or not yet
    /// connected, a send is still under way, or `buf` is empty.
    pub fn send(&mut self, conn: ConnId, buf: Vec<u8>) -> Result<(), Vec<u8>> {
        match self.inner.places.get_mut(conn) {
            Some(place) if place.may_send() && !buf.is_empty() => {
                place.buf = buf;
                place.sent = 0;
                self.inner.push_send(conn);
                Ok(())
            }
            _ => Err(buf),
        }
    }

    /// A send is under way.
    pub fn is_sending(&self, conn: ConnId) -> bool {
        self.inner.places.get(conn).is_some_and(|place| place.sending)
    }

    /// Asks the kernel to receive no more. What it has received already still arrives as [`Event::Data`].
    pub fn pause_reads(&mut self, conn: ConnId) {
        let Some(place) = self.inner.places.get_mut(conn) else { return };
        place.reading = false;
        if place.recv == Recv::Armed && place.phase == Phase::Open {
            place.recv = Recv::Cancelling;
            self.inner.cancel(Op::Recv, conn);
        }
    }

    /// Receives again.
    pub fn resume_reads(&mut self, conn: ConnId) {
        let Some(place) = self.inner.places.get_mut(conn) else { return };
        place.reading = true;
        self.inner.settle(conn);
    }

    /// Closes once the send under way is done (at once if there is none). Reading stops now. A peer that never reads
    /// keeps the connection until [`RingPort::close`].
    pub fn finish(&mut self, conn: ConnId) {
        match self.inner.places.get_mut(conn) {
            Some(place) if place.sending && place.phase == Phase::Open => {
                place.finishing = true;
                self.pause_reads(conn);
            }
            Some(_) => self.inner.retire(conn, 0),
            None => {}
        }
    }

    /// Closes now: a send under way is abandoned. Only [`Event::Closed`] follows.
    pub fn close(&mut self, conn: ConnId) {
        self.inner.retire(conn, 0);
    }
}

impl Inner {
    fn on_recv(
        &mut self,
        buffers: &mut Buffers,
        conn: ConnId,
        result: i32,
        flags: u32,
        on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>),
    ) {
        // Taken first, so that the buffer goes back to the kernel whatever happens below.
        let lease = cqueue::buffer_select(flags).map(|bid| buffers.lease(bid, result.max(0) as usize));
        let Some(place) = self.places.get_mut(conn) else {
            unreachable!("a place outlives its receive");
        };
        let ended = !cqueue::more(flags);
        if ended {
            place.recv = Recv::Idle;
        }
        let open = place.phase == Phase::Open;
        match (result, &lease) {
            (1.., Some(lease)) => {
                self.counters.received += result as u64;
                if open && !place.finishing {
                    on(&mut RingPort { inner: self }, Event::Data { conn, bytes: lease.bytes() });
                }
            }
            (0.., _) => {
                place.eof = true;
                if open && !place.finishing {
                    on(&mut RingPort { inner: self }, Event::Eof { conn });
                }
            }
            _ => match -result {
                // Paused, closing, or out of buffers, which are back by the time the next receive is submitted.
                libc::ECANCELED | libc::EAGAIN | libc::EINTR => {}
                libc::ENOBUFS => self.counters.no_buffers += 1,
                errno => self.retire(conn, errno),
            },
        }
        drop(lease);
        if ended {
            self.settle(conn);
        }
    }

    fn on_send(&mut self, conn: ConnId, result: i32, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) {
        let Some(place) = self.places.get_mut(conn) else {
            unreachable!("a place outlives its send");
        };
        place.sending = false;
        match result {
            0 => self.retire(conn, libc::EPIPE),
            1.. => {
                place.sent += result as usize;
                self.counters.sent += result as u64;
            }
            _ if matches!(-result, libc::EAGAIN | libc::EINTR) => {}
            _ => self.retire(conn, -result),
        }
        let place = self.places.get_mut(conn).expect("retired places keep their id until reported");
        if place.phase != Phase::Open {
            place.buf = Vec::new();
            place.finishing = false;
            return self.settle(conn);
        }
        if place.sent < place.buf.len() {
            return self.push_send(conn);
        }
        let mut buf = std::mem::take(&mut place.buf);
        buf.clear();
        if place.finishing {
            place.finishing = false;
            self.retire(conn, 0);
        } else {
            on(&mut RingPort { inner: self }, Event::Sent { conn, buf });
            self.settle(conn);
        }
    }

    fn on_connect(&mut self, conn: ConnId, result: i32, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) {
        let Some(place) = self.places.get_mut(conn) else {
            unreachable!("a place outlives its connect");
        };
        place.target = None;
        if place.phase == Phase::Connecting {
            place.phase = Phase::Open;
            if result < 0 {
                self.retire(conn, -result);
            } else {
                on(&mut RingPort { inner: self }, Event::Connected { conn });
            }
        }
        self.settle(conn);
    }

    fn on_accept(&mut self, index: u32, result: i32, flags: u32, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) {
        if result >= 0 {
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
            let fd = unsafe { OwnedFd::from_raw_fd(result) };
            self.counters.accepted += 1;
            if !self.listeners[index as usize].closing {
                self.welcome(ListenerId(index), fd, on);
            }
        } else if -result != libc::ECANCELED {
            self.counters.accept_errors += 1;
        }
        if cqueue::more(flags) {
            return;
        }
        let listener = &mut self.listeners[index as usize];
        listener.accepting = false;
        if listener.closing {
            listener.socket = None;
            return;
        }
        match -result {
            // The peer gave up while it waited: the next one may be fine.
            errno
                if errno <= 0 || matches!(errno, libc::ECONNABORTED | libc::EPROTO | libc::EINTR | libc::ECANCELED) =>
            {
                self.arm_accept(index);
            }
            // Out of descriptors or memory: the connection still waits, and asking at once would spin.
            _ => self.rest(index),
        }
    }

    fn limit_of(&self, class: Class) -> u32 {
        match class {
            Class::Client => self.max_connections,
            Class::Peer => MAX_PEERS,
        }
    }

    fn room_for(&self, class: Class) -> Result<(), RingError> {
        let limit = self.limit_of(class);
        if self.places.live_of(class) < limit as usize { Ok(()) } else { Err(RingError::TooManyConnections { limit }) }
    }

    fn welcome(&mut self, listener: ListenerId, fd: OwnedFd, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) {
        let class = self.listeners[listener.0 as usize].class;
        let (live, limit) = (self.places.live_of(class), self.limit_of(class));
        if live >= (limit + OVER_LIMIT_PLACES) as usize {
            self.counters.dropped += 1;
            return;
        }
        // A peer that is gone already has no address.
        let Some(peer) = SockRef::from(&fd).peer_addr().ok().and_then(|peer| peer.as_socket()) else {
            self.counters.dropped += 1;
            return;
        };
        let over_limit = live >= limit as usize;
        let conn = self.places.take(fd, Phase::Open, class);
        self.places.get_mut(conn).expect("just taken").reading = !over_limit;
        on(&mut RingPort { inner: self }, Event::Accepted { conn, listener, peer, over_limit });
        self.settle(conn);
    }

    fn on_rested(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        listener.resting = false;
        if listener.closing {
            listener.socket = None;
        } else {
            self.arm_accept(index);
        }
    }

    fn on_poll(&mut self, index: u32, result: i32, on: &mut impl FnMut(&mut RingPort<'_>, Event<'_>)) {
        let watch = &mut self.watches[index as usize];
        watch.polling = false;
        if watch.fd.is_none() {
            return;
        }
        // An error of the poll itself would repeat at once, and there is nothing to be read without it.
        if result < 0 && result != -libc::ECANCELED {
            watch.fd = None;
            return;
        }
        on(&mut RingPort { inner: self }, Event::Readable { watch: WatchId(index) });
        self.arm_poll(index);
    }

    /// Does what a connection's state asks for: start receiving, or report it detached or closed.
    fn settle(&mut self, conn: ConnId) {
        let Some(place) = self.places.get_mut(conn) else { return };
        if cfg!(debug_assertions) {
            place.invariants();
        }
        if place.wants_recv() {
            let fd = place.fd.as_ref().expect("an open connection has a descriptor");
            let entry =
                opcode::RecvMulti::new(types::Fd(fd.as_raw_fd()), 0).build().user_data(Op::Recv.of(conn.to_bits()));
            place.recv = Recv::Armed;
            // SAFETY: the entry points to nothing; the buffers of group 0 outlive every operation (see `Ring::drop`).
            unsafe { self.kernel.push(entry) };
        } else if place.detaching && place.phase == Phase::Open && !place.busy() {
            place.phase = Phase::Closing;
            place.detached = place.fd.take();
            self.closed.push_back(conn);
        } else if place.phase == Phase::Closing && !place.busy() && place.fd.take().is_some() {
            self.closed.push_back(conn);
        }
    }

    /// Begins the end of a connection: no more events but `Closed`, which waits for the kernel to let go.
    fn retire(&mut self, conn: ConnId, errno: i32) {
        let Some(place) = self.places.get_mut(conn) else { return };
        if place.phase == Phase::Closing {
            return;
        }
        place.phase = Phase::Closing;
        place.errno = errno;
        place.finishing = false;
        let (receiving, sending, connecting) = (place.recv != Recv::Idle, place.sending, place.target.is_some());
        if place.busy() {
            // Ends what a cancellation could miss: an operation that is just being retried. Fails harmlessly when the
            // peer is gone already.
            let _ =
                SockRef::from(place.fd.as_ref().expect("a live connection has a descriptor")).shutdown(Shutdown::Both);
        }
        if receiving {
            self.cancel(Op::Recv, conn);
        }
        if sending {
            self.cancel(Op::Send, conn);
        }
        if connecting {
            self.cancel(Op::Connect, conn);
        }
        self.settle(conn);
    }

    fn cancel(&mut self, op: Op, conn: ConnId) {
        let entry = opcode::AsyncCancel::new(op.of(conn.to_bits())).build().user_data(Op::Cancel.of(0));
        // SAFETY: the entry points to nothing.
        unsafe { self.kernel.push(entry) };
    }

    fn push_send(&mut self, conn: ConnId) {
        let place = self.places.get_mut(conn).expect("only a live connection sends");
        let fd = place.fd.as_ref().expect("an open connection has a descriptor");
        let rest = &place.buf[place.sent..];
        let entry = opcode::Send::new(types::Fd(fd.as_raw_fd()), rest.as_ptr(), rest.len().min(MAX_SEND) as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build()
            .user_data(Op::Send.of(conn.to_bits()));
        place.sending = true;
        // SAFETY: the bytes are the heap memory of `place.buf`, which is neither changed, moved out nor dropped while
        // `sending` is set: `send` refuses, `on_send` clears the flag first, and `Places::release` asserts it.
        unsafe { self.kernel.push(entry) };
    }

    fn arm_accept(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        let socket = listener.socket.as_ref().expect("only an open listener accepts");
        let entry = opcode::AcceptMulti::new(types::Fd(socket.as_raw_fd()))
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(Op::Accept.of(u64::from(index)));
        listener.accepting = true;
        // SAFETY: the entry points to nothing: a multishot accept reports no address.
        unsafe { self.kernel.push(entry) };
    }

    /// One poll at a time, armed anew after each report, so that what was left unread is reported again.
    fn arm_poll(&mut self, index: u32) {
        let watch = &mut self.watches[index as usize];
        let Some(fd) = &watch.fd else { return };
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32)
            .build()
            .user_data(Op::Poll.of(u64::from(index)));
        watch.polling = true;
        // SAFETY: the entry points to nothing.
        unsafe { self.kernel.push(entry) };
    }

    fn unwatch(&mut self, index: u32) {
        let watch = &mut self.watches[index as usize];
        watch.fd = None;
        if watch.polling {
            let entry = opcode::AsyncCancel::new(Op::Poll.of(u64::from(index))).build().user_data(Op::Cancel.of(0));
            // SAFETY: the entry points to nothing.
            unsafe { self.kernel.push(entry) };
        }
    }

    fn rest(&mut self, index: u32) {
        let entry = opcode::Timeout::new(&ACCEPT_REST).build().user_data(Op::Rest.of(u64::from(index)));
        self.listeners[index as usize].resting = true;
        // SAFETY: the time is a static.
        unsafe { self.kernel.push(entry) };
    }

    fn unlisten(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        if listener.closing {
            return;
        }
        listener.closing = true;
        let (accepting, resting) = (listener.accepting, listener.resting);
        if accepting || resting {
            let op = if accepting { Op::Accept } else { Op::Rest };
            let entry = opcode::AsyncCancel::new(op.of(u64::from(index))).build().user_data(Op::Cancel.of(0));
            // SAFETY: the entry points to nothing.
            unsafe { self.kernel.push(entry) };
        } else {
            listener.socket = None;
        }
    }
}
