//! Requests and replies.

use crate::uevent::Uevent;
use crate::view;
use serde::{Deserialize, Serialize};

/// Version of the protocol. A request with another number is refused with
/// [`FailureKind::Protocol`], and the refusal says which one the daemon speaks.
pub const PROTOCOL: u32 = 1;

/// One line from the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`PROTOCOL`].
    pub v: u32,
    /// What is wanted.
    pub call: Call,
}

impl Request {
    /// `call` in the protocol version of this crate.
    pub fn new(call: Call) -> Request {
        Request { v: PROTOCOL, call }
    }
}

/// What a client can ask for. Devices are named as [`crate::Spec`] reads them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Call {
    /// [`Answer::Status`].
    Status,
    /// [`Answer::Devices`].
    List,
    /// [`Answer::Tree`].
    Tree,
    /// [`Answer::Show`].
    Show {
        /// Which device.
        device: String,
    },
    /// [`Answer::Types`]: what mediated devices can be made.
    Types {
        /// Of this parent only.
        #[serde(default)]
        parent: Option<String>,
    },
    /// Makes a mediated device; [`Answer::Started`].
    Start {
        /// The parent's name; may be left out when the type says it.
        #[serde(default)]
        parent: Option<String>,
        /// The type's id, `mtty-1`.
        mdev_type: String,
        /// Its name; a random one when left out.
        #[serde(default)]
        uuid: Option<String>,
    },
    /// Removes a mediated device; [`Answer::Progress`] …, [`Answer::Ended`].
    Stop {
        /// Which device.
        device: String,
        /// What happens to its users.
        #[serde(default)]
        policy: UnregisterPolicy,
    },
    /// Binds a driver; [`Answer::Done`].
    Bind {
        /// Which device.
        device: String,
        /// The driver; the bus chooses when left out.
        #[serde(default)]
        driver: Option<String>,
    },
    /// Takes the driver off; [`Answer::Progress`] …, [`Answer::Ended`].
    Unbind {
        /// Which device.
        device: String,
        /// What happens to its users.
        #[serde(default)]
        policy: UnregisterPolicy,
    },
    /// [`Answer::Holders`]: who holds the device now.
    Who {
        /// Which device.
        device: String,
    },
    /// Offers the device to clients that speak vfio-user; [`Answer::Offered`]. One that is offered
    /// already stays as it is.
    Offer {
        /// Which device.
        device: String,
        /// Where the socket shall be; among the others when left out. Another place is for root
        /// and the daemon's own user: it is made with the daemon's rights.
        #[serde(default)]
        path: Option<String>,
    },
    /// Takes a device's sockets away and closes their connections; [`Answer::Done`].
    Withdraw {
        /// Which device.
        device: String,
    },
    /// [`Answer::Ended`] when the device is released; a [`FailureKind::Timeout`] when it is not
    /// in time.
    WaitGone {
        /// Which device.
        device: String,
        /// Milliseconds; for ever when left out.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// [`Answer::Pending`]: unregisters that wait, and for whom.
    Pending,
    /// [`Answer::Subscribed`], then [`Answer::Event`] for every step of every device.
    Events,
    /// [`Answer::Subscribed`], then [`Answer::Uevent`] for all that udev would be told.
    Uevents,
    /// Mounts a tree in which the entries of the machine's own `/sys` have places among ours, if
    /// it is not mounted yet; [`Answer::Merge`].
    MergeTree,
}

/// What happens to the users of a device that is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum UnregisterPolicy {
    /// They are asked to leave and waited for, for ever: what the kernel does.
    #[default]
    Wait,
    /// They are asked and waited for so long, then cut off.
    Timeout {
        /// Milliseconds.
        ms: u64,
    },
    /// They are cut off now.
    Force,
}

/// One line from the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// [`PROTOCOL`].
    pub v: u32,
    /// What it says.
    pub answer: Answer,
}

impl Reply {
    /// `answer` in the protocol version of this crate.
    pub fn new(answer: Answer) -> Reply {
        Reply {
            v: PROTOCOL,
            answer,
        }
    }
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// How it is.
    Status(view::Status),
    /// What there is.
    Devices(Vec<view::Device>),
    /// What there is, in its places.
    Tree(view::Tree),
    /// All about one.
    Show(Box<view::Show>),
    /// What can be made.
    Types(Vec<view::Parent>),
    /// It was made.
    Started {
        /// Its UUID.
        uuid: String,
        /// Its `vfioN`, once a driver has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
    },
    /// It listens.
    Offered {
        /// The socket's path.
        path: String,
    },
    /// It is done.
    Done,
    /// Who has it.
    Holders(Vec<view::Holder>),
    /// What waits.
    Pending(Vec<view::Pending>),
    /// It is not finished yet; this is what it waits for. More lines follow.
    Progress(view::Pending),
    /// The device is gone.
    Ended(End),
    /// From now on [`Answer::Event`] or [`Answer::Uevent`] lines follow.
    Subscribed,
    /// A step in a device's life.
    Event(Event),
    /// What udev would be told.
    Uevent(Uevent),
    /// The reader was too slow: so many events were thrown away here.
    Lost {
        /// How many.
        count: u64,
    },
    /// Where the merge tree is.
    Merge {
        /// Its mount point.
        path: String,
    },
    /// It did not work.
    Error(Failure),
}

/// How a device went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// True if users were cut off instead of leaving by themselves.
    #[serde(default)]
    pub users_cut_off: bool,
}

/// A step in the life of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Microseconds since the epoch.
    pub at_us: u64,
    /// `vfioN`.
    pub device: String,
    /// Its name on its bus.
    pub address: String,
    /// What happened: `allocated`, `registered`, `opened`, `bound`, `unbound`, `closed`,
    /// `unregistering`, `requested`, `disassociated`, `unregistered`, `released`, `panicked`.
    pub what: String,
    /// With `unregistering`: how many users it found. With `requested`: the count, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind, for programs.
    pub kind: FailureKind,
    /// The errno behind it, by name (`EBUSY`), if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    /// For people: what happened, to which device, who holds it, what to do.
    pub message: String,
}

/// Kinds of failure; each is an exit code of `vfioctl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// It failed.
    Failed,
    /// The request makes no sense.
    Usage,
    /// No such device, parent or type.
    NotFound,
    /// Somebody uses it, or none is left.
    Busy,
    /// Not in time.
    Timeout,
    /// The request is not of this protocol or version.
    Protocol,
}

impl FailureKind {
    /// The exit code of `vfioctl`.
    pub fn exit_code(self) -> u8 {
        match self {
            FailureKind::Failed | FailureKind::Protocol => 1,
            FailureKind::Usage => 2,
            FailureKind::NotFound => 3,
            FailureKind::Busy => 4,
            FailureKind::Timeout => 5,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        let parse = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(parse(r#"{"v":1,"call":"list"}"#).unwrap().call, Call::List);
        assert_eq!(
            parse(r#"{"v":1,"call":{"unbind":{"device":"vfio0","policy":{"timeout":{"ms":5}}}}}"#)
                .unwrap()
                .call,
            Call::Unbind {
                device: "vfio0".into(),
                policy: UnregisterPolicy::Timeout { ms: 5 }
            }
        );
        assert_eq!(
            parse(r#"{"v":1,"call":{"unbind":{"device":"vfio0"}}}"#)
                .unwrap()
                .call,
            Call::Unbind {
                device: "vfio0".into(),
                policy: UnregisterPolicy::Wait
            }
        );
        for wrong in [
            r#"{"v":1}"#,
            r#"{"call":"list"}"#,
            r#"{"v":1,"call":"lisp"}"#,
            r#"{"v":1,"call":"list","more":1}"#,
            r#"{"v":1,"call":{"who":{"device":"vfio0","x":1}}}"#,
            r#"{"v":1,"call":{"who":{}}}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn replies_survive_the_wire() {
        let reply = Reply::new(Answer::Error(Failure {
            kind: FailureKind::Busy,
            errno: Some("EBUSY".into()),
            message: "a\nb".into(),
        }));
        let text = serde_json::to_string(&reply).unwrap();
        assert!(!text.contains('\n'), "one line: {text}");
        assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), reply);
        assert!(text.contains(r#""kind":"busy""#), "{text}");
    }

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes = [
            (FailureKind::Failed, 1),
            (FailureKind::Usage, 2),
            (FailureKind::NotFound, 3),
            (FailureKind::Busy, 4),
            (FailureKind::Timeout, 5),
        ];
        for (kind, code) in codes {
            assert_eq!(kind.exit_code(), code);
        }
    }
}
