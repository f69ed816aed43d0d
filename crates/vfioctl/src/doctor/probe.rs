//! What is tried in a process of its own: `vfioctl internal-doctor`. Prints a finding a line.

use super::{CLIENTS, Finding, MOUNTS, SECCOMP, USER_NAMESPACES, fuse, programs};
use crate::fail::{Fail, Result};
use crate::namespace::{self, NoNamespace};
use nix::sched::CloneFlags;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    fsconfig_create, fsmount, fsopen, mount_change, move_mount,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use seccomp_notify::{Filter, InstallError, Installed};
use std::io::{BufRead, BufReader, IoSliceMut, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Which process this is.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Role {
    /// An ordinary user, which root becomes: only user namespaces.
    #[arg(long)]
    as_user: bool,
    /// A client: prints where it has something to read, and ends with its standard input.
    #[arg(long)]
    client: bool,
    /// A daemon that reaches for that client: its process and an address.
    #[arg(long, value_names = ["PID", "ADDRESS"], num_args = 2)]
    reach: Option<Vec<u64>>,
}

/// What the client has in its memory.
static MARK: [u8; 16] = *b"vfioctl's mark..";

/// The other process.
pub(crate) fn internal(role: &Role) -> Result<ExitCode> {
    if role.client {
        return client();
    }
    if let Some([pid, address]) = role.reach.as_deref() {
        return reach(*pid, *address);
    }
    if role.as_user {
        say(&as_user());
        return Ok(ExitCode::SUCCESS);
    }
    // The filter first: it goes by this process's right, not by that in a namespace.
    let seccomp = seccomp();
    let user = match namespace::unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => false,
        Err(_) => {
            let made = namespace::own_user(CloneFlags::CLONE_NEWNS);
            say(&user_namespaces(made.as_ref().err(), true));
            made.is_ok()
        }
    };
    if let Err(errno) = namespace::mounts_stay_inside() {
        // Then nothing may be mounted here, or it would be seen outside.
        say(&Finding::missing(
            MOUNTS,
            format!("no mounts of one's own: {errno}"),
            "vfioctl run needs CAP_SYS_ADMIN or user namespaces",
        ));
        say(&seccomp);
        return Ok(ExitCode::SUCCESS);
    }
    for finding in fuse::fuse() {
        say(&finding);
    }
    say(&clients(user));
    say(&seccomp);
    say(&mounts());
    Ok(ExitCode::SUCCESS)
}

fn say(finding: &Finding) {
    if let Ok(text) = serde_json::to_string(finding) {
        println!("{text}");
    }
}

/// The finding about user namespaces. Only root can do without.
fn user_namespaces(error: Option<&NoNamespace>, needed: bool) -> Finding {
    let Some(error) = error else {
        return Finding::ok(
            USER_NAMESPACES,
            "an ordinary user can have one: `vfioctl run --user`",
        );
    };
    let advice = match forbidden() {
        Some(sysctl) => format!("sysctl {sysctl} allows them"),
        None => {
            "the kernel needs CONFIG_USER_NS; in a container, allow unshare in its seccomp profile"
                .to_owned()
        }
    };
    let found = format!("an ordinary user cannot have one: {error}");
    if needed {
        Finding::missing(USER_NAMESPACES, found, format!("{advice}; or be root"))
    } else {
        Finding::limited(USER_NAMESPACES, found, advice)
    }
}

/// The setting that forbids user namespaces, with the value that would not.
fn forbidden() -> Option<&'static str> {
    let is = |path: &str, value: &str| {
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value)
    };
    // Debian's, everybody's, and Ubuntu's.
    if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        return Some("kernel.unprivileged_userns_clone=1");
    }
    if is("/proc/sys/user/max_user_namespaces", "0") {
        return Some("user.max_user_namespaces=10000");
    }
    is(
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
    )
    .then_some("kernel.apparmor_restrict_unprivileged_userns=0")
}

/// Becomes nobody, for good, and tries.
fn as_user() -> Finding {
    use rustix::process::{DumpableBehavior, Gid, Uid};
    const NOBODY: u32 = 65534;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    let become_nobody = || {
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        // Another user's process owns its /proc/self only if it can be traced.
        rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
    };
    if let Err(errno) = become_nobody() {
        return Finding::limited(
            USER_NAMESPACES,
            format!("could not be tried: becoming nobody: {errno}"),
            "run vfioctl doctor as the user in question",
        );
    }
    let made = namespace::own_user(CloneFlags::CLONE_NEWNS);
    user_namespaces(made.as_ref().err(), false)
}

/// Whether a daemon reaches a client that is not its child: its descriptors and its memory.
fn clients(user: bool) -> Finding {
    let advice = match std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) if scope.trim() != "0" => {
            format!("sysctl kernel.yama.ptrace_scope=0 (it is {})", scope.trim())
        }
        _ => {
            "vfiod needs CAP_SYS_PTRACE (in a container --cap-add SYS_PTRACE) or its clients' user"
                .to_owned()
        }
    };
    match try_clients(user) {
        Ok(said) if said == REACHED => Finding::ok(
            CLIENTS,
            "descriptors (pidfd_getfd) and memory (process_vm_readv) of others can be reached",
        ),
        Ok(said) => Finding::missing(CLIENTS, said, advice),
        Err(error) => Finding::missing(CLIENTS, format!("could not be tried: {error}"), advice),
    }
}

const REACHED: &str = "reached";

fn try_clients(user: bool) -> std::io::Result<String> {
    let own = || {
        let mut command = Command::new("/proc/self/exe");
        command.arg("internal-doctor");
        command
    };
    let mut client = own()
        .arg("--client")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut address = String::new();
    if let Some(stdout) = client.stdout.take() {
        BufReader::new(stdout).read_line(&mut address)?;
    }
    let mut daemon = own();
    daemon
        .arg("--reach")
        .arg(client.id().to_string())
        .arg(address.trim());
    let mut reach = || programs::output(&mut daemon, Duration::from_secs(10));
    let result = if user {
        // As the daemon of `run --user` is started.
        namespace::with_capabilities_kept(reach)?
    } else {
        reach()
    };
    drop(client.stdin.take());
    client.wait()?;
    let output = result?;
    Ok(match output.out.trim() {
        "" => format!("it {}", output.how()),
        said => said.to_owned(),
    })
}

fn client() -> Result<ExitCode> {
    let failed = |error: std::io::Error| Fail::failed(error.to_string());
    println!("{}", MARK.as_ptr().expose_provenance());
    std::io::stdout().flush().map_err(failed)?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}

fn reach(pid: u64, address: u64) -> Result<ExitCode> {
    let said = match try_reach(pid, address) {
        Ok(()) => REACHED.to_owned(),
        Err((what, errno)) => format!("{what}: {errno}"),
    };
    println!("{said}");
    Ok(ExitCode::SUCCESS)
}

fn try_reach(pid: u64, address: u64) -> std::result::Result<(), (&'static str, Errno)> {
    let at = |what: &'static str| move |errno: Errno| (what, errno);
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(("the client", Errno::SRCH))?;
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(at("pidfd_open"))?;
    pidfd_getfd(&process, 0, PidfdGetfdFlags::empty())
        .map_err(at("descriptors of clients (pidfd_getfd)"))?;
    let mut bytes = [0; MARK.len()];
    let remote = RemoteIoVec {
        base: usize::try_from(address).unwrap_or(0),
        len: bytes.len(),
    };
    let memory = at("memory of clients (process_vm_readv)");
    let read = process_vm_readv(
        nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get()),
        &mut [IoSliceMut::new(&mut bytes)],
        &[remote],
    )
    .map_err(|errno| memory(Errno::from_raw_os_error(errno as i32)))?;
    if read == bytes.len() && bytes == MARK {
        Ok(())
    } else {
        Err(("memory of clients (process_vm_readv)", Errno::IO))
    }
}

/// Whether a system call can be trapped and answered with a descriptor, as `vfioctl run` does.
fn seccomp() -> Finding {
    let (to_us, from_thread) = mpsc::channel::<std::result::Result<Installed, InstallError>>();
    let caller = std::thread::spawn(move || -> std::result::Result<(), Errno> {
        // Filters are the thread's alone, and it ends here.
        rustix::thread::set_no_new_privs(true)?;
        let installed = Filter::new().trap(libc::SYS_dup).install();
        let failed = installed.is_err();
        let _ = to_us.send(installed);
        if failed {
            return Err(Errno::CANCELED);
        }
        let file = rustix::io::dup(std::io::stdin())?;
        let mut bytes = [0; MARK.len()];
        match rustix::io::pread(&file, &mut bytes, 0) {
            Ok(_) if bytes == MARK => Ok(()),
            _ => Err(Errno::IO),
        }
    });
    let missing = |found: String, advice: &str| Finding::missing(SECCOMP, found, advice);
    let installed = match from_thread.recv() {
        Ok(Ok(installed)) => installed,
        Ok(Err(error)) => {
            return missing(
                format!("system calls cannot be trapped: {error}"),
                match error {
                    InstallError::HasListener => {
                        "run it outside of `vfioctl run` and of a container whose runtime supervises \
                         it"
                    }
                    _ => {
                        "Linux 5.5 and newer with CONFIG_SECCOMP_FILTER have it; in a container, \
                          allow seccomp in its profile"
                    }
                },
            );
        }
        Err(_) => {
            return missing(
                "no_new_privs is refused".to_owned(),
                "allow prctl in the container's seccomp profile",
            );
        }
    };
    let sync = installed.listener.set_sync_wake_up().is_ok();
    let answered = installed.listener.recv().and_then(|call| {
        let file = memfd_create("vfioctl-doctor", MemfdFlags::CLOEXEC)?;
        rustix::io::write(&file, &MARK)?;
        installed.listener.result_fd(call.id, &file, true)
    });
    // Should it still wait, it gets ENOSYS.
    drop(installed.listener);
    if let Err(errno) = answered {
        return missing(
            format!("a trapped call cannot be answered with a descriptor: {errno}"),
            "Linux 5.14 and newer can",
        );
    }
    match caller.join() {
        Ok(Ok(())) => {}
        _ => {
            return missing(
                "the answer to a trapped call did not arrive".to_owned(),
                "see the kernel's log",
            );
        }
    }
    match (installed.wait_killable, sync) {
        (true, true) => Finding::ok(
            SECCOMP,
            "system calls are trapped and answered with descriptors",
        ),
        (true, false) => Finding::limited(
            SECCOMP,
            "works; without SYNC_WAKE_UP a trapped call may cost a wake-up of another CPU",
            "Linux 6.6 and newer have it",
        ),
        (false, _) => Finding::limited(
            SECCOMP,
            "works; without WAIT_KILLABLE_RECV a client that gets many signals may open a device \
             twice",
            "Linux 5.19 and newer have it",
        ),
    }
}

/// Whether a mount that is made later reaches a mount namespace that was made before, as each device
/// in use needs it. Covers this process's /sys, so it comes last.
fn mounts() -> Finding {
    match try_mounts() {
        Ok(true) => Finding::ok(
            MOUNTS,
            "namespaces of one's own, reached by what is mounted later",
        ),
        Ok(false) => Finding::limited(
            MOUNTS,
            "what is mounted later does not reach a namespace made before",
            "devices share one connection under `vfioctl run`; see mount_namespaces(7)",
        ),
        Err(errno) => Finding::missing(
            MOUNTS,
            format!("mounting: {errno}"),
            "vfioctl run needs CAP_SYS_ADMIN or user namespaces",
        ),
    }
}

fn try_mounts() -> std::result::Result<bool, Errno> {
    let place = Path::new("/sys");
    tmpfs_at(place)?;
    mount_change(place, MountPropagationFlags::SHARED)?;
    let below = place.join("below");
    rustix::fs::mkdir(&below, Mode::RWXU)?;
    let (to_thread, look) = mpsc::channel::<()>();
    let (to_us, from_thread) = mpsc::channel::<std::result::Result<bool, Errno>>();
    std::thread::scope(|scope| {
        let file = below.join("file");
        scope.spawn(move || {
            let entered = namespace::unshare(CloneFlags::CLONE_NEWNS)
                .and_then(|()| namespace::mounts_stay_inside());
            let failed = entered.is_err();
            let _ = to_us.send(entered.map(|()| false));
            if !failed && look.recv().is_ok() {
                let _ = to_us.send(Ok(file.exists()));
            }
        });
        let answer = || from_thread.recv().unwrap_or(Err(Errno::IO));
        answer()?;
        tmpfs_at(&below)?;
        rustix::fs::open(
            below.join("file"),
            OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC,
            Mode::RUSR,
        )?;
        let _ = to_thread.send(());
        answer()
    })
}

fn tmpfs_at(place: &Path) -> std::result::Result<(), Errno> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(fs.as_fd())?;
    let mount = fsmount(
        fs.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID,
    )?;
    move_mount(
        &mount,
        "",
        rustix::fs::CWD,
        place,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}
