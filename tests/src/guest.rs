//! Debian guests under the private QEMU: a stock kernel, BusyBox, and what a test puts beside it,
//! with a shell on the serial console. They run without KVM, so that they run everywhere.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdin;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::console::Console;
use crate::initramfs;
use crate::initramfs::Initramfs;
use crate::packages::Kernel;
use crate::packages::Prefix;

/// How long a guest may take until its shell answers. It takes about 3 s on two processors.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// The longest command that [`Guest::run`] takes, in bytes: what a tty of Linux buffers for a
/// reader that is slower than the line.
const COMMAND_LIMIT: usize = 3000;

/// Printed by init when the shell is about to read.
const READY: &str = "vfiod-guest-ready";

/// Programs as they run in a guest that a test has not started yet.
#[derive(Debug)]
pub struct Builder {
    prefix: Prefix,
    qemu: PathBuf,
    kernel: Kernel,
    modules: Vec<String>,
    files: Vec<(PathBuf, String, bool)>,
    machine: String,
    memory_mib: u32,
    kernel_arguments: Vec<String>,
    qemu_arguments: Vec<String>,
    inherited: Vec<OwnedFd>,
    environment: Vec<(String, String)>,
}

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    input: ChildStdin,
    console: Arc<Console>,
    dir: PathBuf,
    release: String,
    commands: u32,
}

/// What a command in the guest printed, both streams together, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status as the shell sees it.
    pub status: i32,
    /// What it printed, without the last newline.
    pub text: String,
}

/// A PCI device of the guest that its own vfio-pci drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VfioDevice {
    /// Where it is, e.g. `0000:00:02.0`.
    pub address: String,
    /// The number of its IOMMU group, and the name of its node in `/dev/vfio`.
    pub group: u32,
}

impl Guest {
    /// A guest with Debian 12's kernel and nothing but BusyBox and what QEMU's `pc` machine has.
    pub fn builder(prefix: &Prefix) -> Builder {
        Builder {
            prefix: prefix.clone(),
            qemu: prefix.qemu(),
            kernel: Kernel::Bookworm,
            modules: Vec::new(),
            files: Vec::new(),
            machine: "pc".to_owned(),
            memory_mib: 256,
            kernel_arguments: Vec::new(),
            qemu_arguments: Vec::new(),
            inherited: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// A guest that is a VFIO host itself: an emulated Intel IOMMU, and a network card to give away
    /// ([`Guest::bind_vfio`]). Programs run in it meet a real kernel's `/sys`.
    pub fn vfio_host(prefix: &Prefix) -> Builder {
        Self::builder(prefix)
            .machine("q35")
            .kernel_arguments(&["intel_iommu=on"])
            .qemu_args(&["-device", "intel-iommu,intremap=on"])
            .qemu_args(&["-device", "e1000e,addr=02.0"])
            .modules(&["vfio_pci", "vfio_iommu_type1"])
    }

    /// What `uname -r` prints inside.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The socket of QEMU's monitor (QMP); see [`Guest::monitor`].
    pub fn monitor_path(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// Everything that the console and QEMU printed so far.
    pub fn log(&self) -> String {
        self.console.text()
    }

    /// The process that was started: QEMU, or the program that runs it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a shell command in the guest and waits for its end. Commands share one shell, one after
    /// the other; what they leave running in the background keeps running.
    ///
    /// # Errors
    /// The guest is gone, the command is too long, or it has not ended within `limit`; the message
    /// has the end of the console's log. After a timeout the shell is busy and the guest of no use.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Output, String> {
        if command.len() > COMMAND_LIMIT {
            return Err(format!(
                "a command of {} bytes is too long: put it into a file",
                command.len()
            ));
        }
        self.commands += 1;
        // The quotes keep the markers from being found in an echo of the command.
        let (begin, end) = (
            format!("begin-{}!", self.commands),
            format!("end-{}=", self.commands),
        );
        let line = format!(
            "echo 'be''gin-{n}!'; {{ {command}\n}} </dev/null 2>&1; s=$?; echo; echo \"e\"\"nd-{n}=$s!\"\n",
            n = self.commands
        );
        self.input
            .write_all(line.as_bytes())
            .and_then(|()| self.input.flush())
            .map_err(|error| {
                self.console
                    .complain(&format!("`{command}` could not be sent: {error}"))
            })?;
        let deadline = Instant::now() + limit;
        self.console.wait_for(&begin, "\n", deadline, command)?;
        let text = self
            .console
            .wait_for("", &format!("\n{end}"), deadline, command)?;
        let status = self.console.wait_for("", "!\n", deadline, command)?;
        Ok(Output {
            status: status.parse().map_err(|_| {
                self.console
                    .complain(&format!("`{command}` ended with {status:?}"))
            })?,
            text: text.strip_suffix('\n').unwrap_or(&text).to_owned(),
        })
    }

    /// As [`Guest::run`], and the command must succeed. Returns what it printed.
    ///
    /// # Errors
    /// As [`Guest::run`], or the command failed.
    pub fn check(&mut self, command: &str, limit: Duration) -> Result<String, String> {
        let output = self.run(command, limit)?;
        if output.status != 0 {
            return Err(self.console.complain(&format!(
                "in the guest `{command}` ended with {}:\n{}\n",
                output.status, output.text
            )));
        }
        Ok(output.text)
    }

    /// Binds a PCI device of the guest to the guest's own vfio-pci, by `driver_override`, and waits
    /// for its group's node.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn bind_vfio(&mut self, address: &str, limit: Duration) -> Result<VfioDevice, String> {
        let device = format!("/sys/bus/pci/devices/{address}");
        let group = self.check(
            &format!(
                "[ ! -e {device}/driver ] || echo {address} > {device}/driver/unbind; \
                 echo vfio-pci > {device}/driver_override; echo {address} > /sys/bus/pci/drivers_probe; \
                 g=$(basename $(readlink {device}/iommu_group)); \
                 [ $(basename $(readlink {device}/driver)) = vfio-pci ] && [ -c /dev/vfio/$g ] && echo $g"
            ),
            limit,
        )?;
        Ok(VfioDevice {
            address: address.to_owned(),
            group: group.trim().parse().map_err(|_| {
                self.console
                    .complain(&format!("{address} is in group {group:?}"))
            })?,
        })
    }

    /// Switches the guest off and waits for QEMU to end. True if it ended with 0.
    ///
    /// # Errors
    /// It has not ended within `limit`; it is killed when dropped.
    fn power_off(mut self, limit: Duration) -> Result<bool, String> {
        // A guest that is gone already is off.
        let _ = self.input.write_all(b"poweroff -f\n");
        let _ = self.input.flush();
        if !self.console.wait_for_end(Instant::now() + limit) {
            return Err(self
                .console
                .complain("the guest does not switch itself off"));
        }
        // Both its outputs are closed: it has ended, or is about to.
        self.child
            .wait()
            .map(|status| status.success())
            .map_err(|error| error.to_string())
    }

    /// Switches the guest off, after which QEMU ends with 0.
    ///
    /// # Panics
    /// It does not, or not within `limit`.
    pub fn switch_off(self, limit: Duration) {
        assert!(
            self.power_off(limit)
                .expect("the guest switches itself off")
        );
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A program that runs QEMU for us may have children: all of them are in its group.
        if let Some(pid) = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Builder {
    /// Chooses another QEMU than the prefix's usual one, as [`Prefix::qemu11`].
    pub fn qemu(mut self, program: impl Into<PathBuf>) -> Self {
        self.qemu = program.into();
        self
    }

    /// Chooses the kernel.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Loads kernel modules, and those they need, before the shell starts. Built-in ones count as
    /// loaded.
    pub fn modules(mut self, names: &[&str]) -> Self {
        self.modules
            .extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// Copies a file of this machine into the guest.
    pub fn file(mut self, from: impl Into<PathBuf>, to: &str) -> Self {
        self.files.push((from.into(), to.to_owned(), false));
        self
    }

    /// Copies a program of this machine into the guest's `/bin`, with the libraries it is linked to.
    /// It comes before BusyBox's program of that name.
    pub fn program(mut self, from: impl Into<PathBuf>) -> Self {
        let from = from.into();
        let name = from
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        self.files.push((from, format!("/bin/{name}"), true));
        self
    }

    /// The machine type: `pc` (the default) or `q35`.
    pub fn machine(mut self, machine: &str) -> Self {
        self.machine = machine.to_owned();
        self
    }

    /// Memory of the guest; 256 MiB unless told.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// More arguments for the kernel.
    pub fn kernel_arguments(mut self, arguments: &[&str]) -> Self {
        self.kernel_arguments
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// More arguments for QEMU.
    pub fn qemu_args(mut self, arguments: &[&str]) -> Self {
        self.qemu_arguments
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Hands a descriptor to QEMU under its number, which is to be named in
    /// [`qemu_args`](Self::qemu_args) (`fd=N`). Ours is closed once QEMU has it.
    pub fn inherit(mut self, fd: OwnedFd) -> Self {
        self.inherited.push(fd);
        self
    }

    /// Sets a variable in QEMU's environment.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Starts QEMU and waits until the guest's shell answers.
    ///
    /// # Errors
    /// The guest could not be made, or did not boot within [`BOOT_LIMIT`]; the message has the end
    /// of the console's log.
    pub fn boot(self) -> Result<Guest, String> {
        self.boot_under(&[])
    }

    /// As [`boot`](Self::boot), with QEMU run by another program: `["vfioctl", "run", "--"]`.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_under(self, runner: &[&str]) -> Result<Guest, String> {
        let files = self.prefix.kernel(self.kernel)?;
        let dir = scratch()?;
        let archive = dir.join("initramfs");
        let written = self
            .archive(&files.modules)
            .and_then(|bytes| {
                fs::write(&archive, bytes)
                    .map_err(|error| format!("{}: {error}", archive.display()))
            })
            .and_then(|()| self.spawn(runner, &files.image, &dir));
        let mut child = written.inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir);
        })?;
        let console = Arc::new(Console::default());
        let input = child.stdin.take();
        let output = child.stdout.take();
        let errors = child.stderr.take();
        let (Some(input), Some(output), Some(errors)) = (input, output, errors) else {
            return Err("QEMU was started without pipes".to_owned());
        };
        console.read(output, true);
        console.read(errors, false);
        let guest = Guest {
            child,
            input,
            console,
            dir,
            release: files.release,
            commands: 0,
        };
        drop(self);
        guest.console.wait_for(
            "",
            &format!("{READY}\n"),
            Instant::now() + BOOT_LIMIT,
            "boot",
        )?;
        Ok(guest)
    }

    /// Writes `vmlinuz` and `initrd.img` into a directory, for a QEMU that somebody else starts: the
    /// guest's shell is on its first serial port, and says `vfiod-guest-ready` before it reads.
    ///
    /// # Errors
    /// The prefix is incomplete, or a file cannot be written.
    pub fn write_to(&self, dir: &Path) -> Result<(), String> {
        let files = self.prefix.kernel(self.kernel)?;
        let told = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
        fs::copy(&files.image, dir.join("vmlinuz")).map_err(|error| told(&files.image, error))?;
        let archive = dir.join("initrd.img");
        fs::write(&archive, self.archive(&files.modules)?).map_err(|error| told(&archive, error))
    }

    fn spawn(&self, runner: &[&str], image: &Path, dir: &Path) -> Result<Child, String> {
        // Should the test die, QEMU dies: setpriv asks the kernel for that.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .args(runner)
            .arg(&self.qemu);
        command.args(["-machine", &self.machine, "-accel", "tcg", "-cpu", "max"]);
        command.args([
            "-m",
            &self.memory_mib.to_string(),
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ]);
        command.args([
            "-display",
            "none",
            "-chardev",
            "stdio,id=console,signal=off",
        ]);
        command.args(["-serial", "chardev:console"]);
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", dir.join("qmp").display()),
        ]);
        command
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(dir.join("initramfs"));
        // Calibrating against emulated timers, and probing what the machine has not, takes seconds.
        let mut arguments =
            "console=ttyS0 quiet panic=-1 rdinit=/init tsc=reliable no_timer_check \
                             mitigations=off random.trust_cpu=on audit=0 i8042.noaux"
                .to_owned();
        for argument in &self.kernel_arguments {
            arguments.push(' ');
            arguments.push_str(argument);
        }
        command
            .args(["-append", &arguments])
            .args(&self.qemu_arguments);
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        for fd in &self.inherited {
            rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty())
                .map_err(|errno| format!("a descriptor for QEMU: {errno}"))?;
        }
        command
            .spawn()
            .map_err(|error| format!("setpriv, which runs QEMU: {error}"))
    }

    /// The guest's file system.
    fn archive(&self, modules: &Path) -> Result<Vec<u8>, String> {
        let mut archive = Initramfs::default();
        for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/etc"] {
            archive.dir(dir);
        }
        let copied = |path: &Path, result: std::io::Result<()>| {
            result.map_err(|error| format!("copying {} into the guest: {error}", path.display()))
        };
        for (from, to, with_libraries) in &self.files {
            let result = if *with_libraries {
                archive.program(from, to)
            } else {
                archive.copy(from, to)
            };
            copied(from, result)?;
        }
        let busybox = self.prefix.busybox();
        copied(&busybox, archive.copy(&busybox, "/bin/busybox"))?;
        archive.link("/sbin", "bin");
        let names: Vec<&str> = self.modules.iter().map(String::as_str).collect();
        let mut list = String::new();
        for path in initramfs::modules(modules, &names)? {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let name = format!("/modules/{}", file.trim_end_matches(".xz"));
            archive.file(&name, false, &initramfs::module_contents(&path)?);
            list.push_str(&name);
            list.push('\n');
        }
        archive.file("/modules/list", false, list.as_bytes());
        archive.file("/init", true, include_bytes!("../assets/guest-init.sh"));
        Ok(archive.finish())
    }
}

/// A new directory for one guest's files.
fn scratch() -> Result<PathBuf, String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let dir = std::env::temp_dir().join(format!(
        "vfiod-guest-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(dir)
}
