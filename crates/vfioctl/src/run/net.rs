//! The network namespace of `run --uevents`: loopback, and uevents of vfiod's devices.

use crate::fail::{Fail, Result};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sendto, socket_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use vfiod_control::uevent::Injector;
use vfiod_control::{Answer, Call, Client};

/// Starts a process that injects uevents as long as this process lives, whatever it becomes, and is
/// not its child. On return no uevent is missed.
pub(super) fn start(socket: &Path) -> Result {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| Fail::failed(format!("{what}: {error}"))
    };
    loopback_up().map_err(|errno| Fail::failed(format!("loopback: {errno}")))?;
    let own = std::env::current_exe().map_err(failed("finding myself"))?;
    let mut child = Command::new(own)
        .arg("--socket")
        .arg(socket)
        .arg("internal-uevents")
        .arg(std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed("starting myself"))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(failed("uevents"))?;
    }
    let success = super::wait(&mut child).map_err(failed("uevents"))?;
    if line.trim() == READY && success {
        Ok(())
    } else {
        Err(Fail::failed("uevents cannot be had"))
    }
}

const READY: &str = "ready";
/// Tells the second of the two processes from the first.
const SECOND: &str = "VFIOCTL_UEVENTS_SECOND";

/// The other process. The first starts a second and ends, so that the command has no child that it
/// does not know of.
pub(crate) fn internal_uevents(client: Client, pid: i32) -> Result<ExitCode> {
    let failed = |error: std::io::Error| Fail::failed(format!("uevents: {error}"));
    if std::env::var_os(SECOND).is_none() {
        let own = std::env::current_exe().map_err(failed)?;
        Command::new(own)
            .args(std::env::args_os().skip(1))
            .env(SECOND, "1")
            .spawn()
            .map_err(failed)?;
        return Ok(ExitCode::SUCCESS);
    }
    inject(client, pid)
}

fn inject(mut client: Client, pid: i32) -> Result<ExitCode> {
    let failed = |error: std::io::Error| Fail::failed(format!("uevents: {error}"));
    let errno = |errno: Errno| Fail::failed(format!("uevents: {errno}"));
    let pid = Pid::from_raw(pid).ok_or_else(|| Fail::failed("no such process"))?;
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(errno)?;
    let injector = Injector::new().map_err(errno)?;
    client.send(Call::Uevents).map_err(failed)?;
    let stream = client.stream().map_err(failed)?;
    std::thread::spawn(move || {
        use rustix::event::{PollFd, PollFlags, poll};
        loop {
            let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], None);
            if ended != Err(Errno::INTR) {
                break;
            }
        }
        // The other thread reads the end of the stream.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    let mut complained = false;
    while let Ok(Some(answer)) = client.reply() {
        match answer {
            Answer::Subscribed => {
                let mut stdout = std::io::stdout().lock();
                let _ = writeln!(stdout, "{READY}").and_then(|()| stdout.flush());
            }
            Answer::Uevent(uevent) => {
                if let Err(errno) = injector.send(&uevent)
                    && !std::mem::replace(&mut complained, true)
                {
                    eprintln!("vfioctl: uevents do not get through: {errno}");
                }
            }
            Answer::Lost { count } => eprintln!("vfioctl: {count} uevents were lost"),
            Answer::Error(failure) => return Err(failure.into()),
            _ => {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `ip link set lo up`.
fn loopback_up() -> std::result::Result<(), Errno> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        // NETLINK_ROUTE is 0, the protocol that no number stands for.
        None,
    )?;
    let mut message = Vec::with_capacity(32);
    // struct nlmsghdr: length, RTM_NEWLINK, NLM_F_REQUEST, sequence, port.
    message.extend_from_slice(&32_u32.to_ne_bytes());
    message.extend_from_slice(&16_u16.to_ne_bytes());
    message.extend_from_slice(&1_u16.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    // struct ifinfomsg: family and type, index 1 (loopback's in every namespace), IFF_UP, and IFF_UP
    // as what is to change.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&1_i32.to_ne_bytes());
    message.extend_from_slice(&1_u32.to_ne_bytes());
    message.extend_from_slice(&1_u32.to_ne_bytes());
    sendto(
        &socket,
        &message,
        SendFlags::empty(),
        &SocketAddrNetlink::new(0, 0),
    )?;
    Ok(())
}
