//! placeholder
use super::Core;
use crate::Error;
use gridkv_net::frame::Frame;
use std::rc::Rc;
pub(crate) struct Connections;
impl Connections {
    pub(crate) fn open(_: &super::launch::Seat) -> Result<Connections, Error> { Ok(Connections) }
    pub(crate) fn wake_fd(&self) -> Result<std::os::fd::OwnedFd, Error> { Err(Error::Closed) }
    pub(crate) fn turn(&mut self, _: &Rc<Core>) -> bool { false }
    pub(crate) fn flush(&mut self, _: &Rc<Core>) -> bool { false }
    pub(crate) fn answer(&mut self, _: &Rc<Core>, _: &Frame<'_>) {}
    pub(crate) fn has_work(&mut self) -> bool { false }
    pub(crate) fn set_wakeups(&mut self, _: bool) {}
}
