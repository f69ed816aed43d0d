//! One receive, one send, with descriptors.

use crate::wire::MAX_FDS;
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vfio_core::{Errno, Result};

/// Bytes of ancillary data that a full set of descriptors takes.
const ANCILLARY: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// What one receive brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// 0: the peer has closed its end.
    pub(crate) bytes: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// There were more descriptors than could be taken.
    pub(crate) lost: bool,
}

/// Receives what there is, at most `buf`. Waits unless `flags` say otherwise; then `EAGAIN`.
pub(crate) fn receive(socket: impl AsFd, buf: &mut [u8], flags: RecvFlags) -> Result<Received> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(buf)],
        &mut ancillary,
        flags | RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(Received {
        bytes: got.bytes,
        fds,
        lost: got.flags.contains(ReturnFlags::CTRUNC),
    })
}

/// Sends what goes at once, descriptors with the first byte; how much went. `EAGAIN` when nothing
/// does, and the descriptors have not gone either.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    if fds.is_empty() {
        return rustix::net::send(socket, bytes, flags);
    }
    let mut space = [MaybeUninit::uninit(); ANCILLARY];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags)
}
