//! placeholder
use gridkv_net::frame::{Batch, Frame, FrameError};
use super::serve::Serving;
pub(crate) fn serve(_s: &mut Serving<'_>, _f: &Frame<'_>, _r: &mut Batch) -> Result<(), FrameError> { Ok(()) }
