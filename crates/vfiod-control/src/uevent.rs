//! Kernel uevents, as text and into a network namespace.
//!
//! A message sent to port 0 of a `NETLINK_KOBJECT_UEVENT` socket with a netlink header is
//! broadcast by the kernel as an event of its own, with a sequence number of its own
//! (`lib/kobject_uevent.c`, `uevent_net_rcv_skb` and `uevent_net_broadcast`). It stays in the network
//! namespace of the socket. Needs `CAP_SYS_ADMIN` in the user namespace that owns it.

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sendto, socket_with};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

/// What udev is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uevent {
    /// `add`, `remove`, `change`, `bind`, `unbind`, ….
    pub action: String,
    /// Path below `/sys`, starting with `/devices/`.
    pub devpath: String,
    /// `SUBSYSTEM`.
    pub subsystem: String,
    /// Further pairs, in order.
    pub env: Vec<(String, String)>,
}

impl Uevent {
    /// The text as the kernel has it, without `SEQNUM`, which is the kernel's to give
    /// (`kobject_uevent_env`).
    ///
    /// # Errors
    /// `EINVAL` when a part contains a NUL, which would forge further pairs.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        let mut part = |pieces: &[&str]| {
            for piece in pieces {
                if piece.as_bytes().contains(&0) {
                    return Err(Errno::INVAL);
                }
                bytes.extend_from_slice(piece.as_bytes());
            }
            bytes.push(0);
            Ok(())
        };
        part(&[&self.action, "@", &self.devpath])?;
        part(&["ACTION=", &self.action])?;
        part(&["DEVPATH=", &self.devpath])?;
        part(&["SUBSYSTEM=", &self.subsystem])?;
        for (key, value) in &self.env {
            part(&[key, "=", value])?;
        }
        Ok(bytes)
    }
}

/// Sends uevents into the network namespace it was made in.
#[derive(Debug)]
pub struct Injector(OwnedFd);

impl Injector {
    /// An injector for the caller's network namespace.
    ///
    /// # Errors
    /// `EPROTONOSUPPORT` on a kernel without netlink uevents.
    pub fn new() -> Result<Injector, Errno> {
        Ok(Injector(socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(netlink::KOBJECT_UEVENT),
        )?))
    }

    /// Has the kernel broadcast an event. Nobody need listen.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN` over the network namespace, `EINVAL` as
    /// [`Uevent::to_bytes`], `EMSGSIZE` past the socket's buffer.
    pub fn send(&self, uevent: &Uevent) -> Result<(), Errno> {
        let body = uevent.to_bytes()?;
        let length = u32::try_from(body.len() + 16).map_err(|_| Errno::MSGSIZE)?;
        let mut message = Vec::with_capacity(body.len() + 16);
        // struct nlmsghdr: length, type, flags, sequence, port. The type must be past the control
        // messages (NLMSG_MIN_TYPE), and the acknowledgement carries the kernel's verdict.
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&0x10_u16.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend_from_slice(&1_u32.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(&body);
        sendto(
            &self.0,
            &message,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        self.verdict()
    }

    /// The acknowledgement: `struct nlmsghdr`, then the error as a negative number, 0 for none.
    fn verdict(&self) -> Result<(), Errno> {
        let mut answer = [0_u8; 256];
        let (length, _) =
            rustix::net::recv(&self.0, &mut answer[..], rustix::net::RecvFlags::DONTWAIT)?;
        let error = answer
            .get(16..20)
            .filter(|_| length >= 20)
            .and_then(|bytes| Some(i32::from_ne_bytes(bytes.try_into().ok()?)))
            .ok_or(Errno::IO)?;
        match error {
            0 => Ok(()),
            error => Err(Errno::from_raw_os_error(error.saturating_neg())),
        }
    }
}

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> Uevent {
        Uevent {
            action: "add".into(),
            devpath: "/devices/x".into(),
            subsystem: "mdev".into(),
            env: vec![("A".into(), "b".into())],
        }
    }

    #[test]
    fn text_is_the_kernels() {
        assert_eq!(
            event().to_bytes().unwrap(),
            b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0SUBSYSTEM=mdev\0A=b\0"
        );
        let forged = Uevent {
            devpath: "/devices/x\0ACTION=remove".into(),
            ..event()
        };
        assert_eq!(forged.to_bytes(), Err(Errno::INVAL));
    }
}
