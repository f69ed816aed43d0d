//! Programs of others that work with VFIO devices.

use super::{Finding, quiet};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// What a program printed.
pub(super) struct Output {
    pub(super) out: String,
    err: String,
    /// None: it was killed after the limit.
    status: Option<ExitStatus>,
}

impl Output {
    /// How it ended, as "it …", with the last line of its errors.
    pub(super) fn how(&self) -> String {
        let how = match self.status {
            Some(status) => format!("ended with {status}"),
            None => "did not end".to_owned(),
        };
        match self.err.lines().last() {
            Some(line) => format!("{how} ({line})"),
            None => how,
        }
    }
}

/// Runs a program to its end, or kills it.
pub(super) fn output(command: &mut Command, limit: Duration) -> std::io::Result<Output> {
    let mut child = quiet(command).spawn()?;
    let read = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|stream| Box::new(stream) as _));
    let err = read(child.stderr.take().map(|stream| Box::new(stream) as _));
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break Some(status),
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
        }
    };
    Ok(Output {
        out: out.join().unwrap_or_default(),
        err: err.join().unwrap_or_default(),
        status,
    })
}

/// A program by name, as a shell finds it.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    std::fs::metadata(file)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// mdevctl, and whether its udev rule finds it.
pub(super) fn mdevctl() -> Finding {
    const NAME: &str = "mdevctl";
    let places = ["/usr/sbin/mdevctl", "/usr/bin/mdevctl"].map(PathBuf::from);
    let Some(program) = find(NAME).or_else(|| places.into_iter().find(|file| is_program(file)))
    else {
        return Finding::ok(
            NAME,
            "not installed; `vfioctl start` makes mediated devices without it",
        );
    };
    let rules = [
        "/etc/udev/rules.d",
        "/usr/lib/udev/rules.d",
        "/lib/udev/rules.d",
    ];
    let called = rules.iter().find_map(|dir| {
        let text = std::fs::read_to_string(Path::new(dir).join("60-mdevctl.rules")).ok()?;
        called_by(&text)
    });
    match called {
        Some(called) if !is_program(&called) => Finding::limited(
            NAME,
            format!(
                "{}; its udev rule calls {}, which is not there: devices defined with --auto do not start",
                program.display(),
                called.display()
            ),
            format!("ln -s {} {}", program.display(), called.display()),
        ),
        _ => Finding::ok(NAME, program.display().to_string()),
    }
}

/// Where a udev rule expects mdevctl, be it run by a shell.
fn called_by(rules: &str) -> Option<PathBuf> {
    rules
        .lines()
        .filter_map(|line| {
            line.split_once("RUN+=")?
                .1
                .split(['"', '\'', ' '])
                .find(|word| word.starts_with('/') && word.ends_with("/mdevctl"))
        })
        .map(PathBuf::from)
        .next()
}

/// QEMU, and by which ways it takes a device.
pub(super) fn qemu() -> Finding {
    const NAME: &str = "qemu";
    const LIMIT: Duration = Duration::from_secs(20);
    let program = format!("qemu-system-{}", std::env::consts::ARCH);
    let Some(path) = find(&program) else {
        return Finding::ok(
            NAME,
            format!("no {program} in PATH; without a guest none is needed"),
        );
    };
    let ask = |args: &[&str]| {
        output(Command::new(&path).args(args), LIMIT).unwrap_or_else(|error| Output {
            out: String::new(),
            err: error.to_string(),
            status: None,
        })
    };
    let version = ask(&["--version"]);
    let Some(number) = version.out.lines().next().and_then(|line| {
        let (_, rest) = line.split_once(" version ")?;
        rest.split(' ').next()
    }) else {
        return Finding::limited(
            NAME,
            format!("{} {}", path.display(), version.how()),
            "install it anew",
        );
    };
    let found = format!("{number} at {}", path.display());
    let devices = ask(&["-device", "help"]).out;
    let has = |name: &str| devices.contains(&format!("name \"{name}\""));
    if !has("vfio-pci") {
        return Finding::limited(
            NAME,
            format!("{found}, without vfio-pci"),
            "a package for this architecture has it",
        );
    }
    let mut ways = vec!["/dev/vfio/N"];
    if ask(&["-device", "vfio-pci,help"]).out.contains("iommufd=") {
        ways.push("/dev/vfio/devices/vfioN with iommufd");
    }
    if has("vfio-user-pci") {
        ways.push("vfio-user sockets");
        return Finding::ok(NAME, format!("{found}, by {}", ways.join(", ")));
    }
    Finding::limited(
        NAME,
        format!(
            "{found}, by {}; not by vfio-user sockets",
            ways.join(" and ")
        ),
        "QEMU 10.1 and newer have them",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_rule() {
        let found = Some(PathBuf::from("/usr/sbin/mdevctl"));
        let shell = "# comment\nACTION==\"add\", TEST==\"/etc/mdevctl.d/$kernel\", RUN+=\"/bin/sh -c \
                     '{ /usr/sbin/mdevctl start-parent-mdevs %k 2>&3; } 3>&1'\"\n";
        assert_eq!(called_by(shell), found);
        let plain = "ACTION==\"change\", RUN+=\"/usr/sbin/mdevctl start-parent-mdevs %k\"\n";
        assert_eq!(called_by(plain), found);
        assert_eq!(called_by("RUN+=\"mdevctl\""), None);
        assert_eq!(called_by(""), None);
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let mut sleep = Command::new("sleep");
        let output = output(sleep.arg("1000"), Duration::from_millis(50)).unwrap();
        assert_eq!(output.how(), "did not end");
    }
}
